"""Machine code with how often each instruction runs, by phase, by loop and by line of source."""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .graph import Loop, frequencies
from .machine_code import MachineCode
from .pipes import Use, use
from .ptx import Frame, Text
from .sass import Instruction

#: Phases by what a function's name contains, the first that fits of the innermost function that any
#: fits. Mangled names have the length of each part before it.
CUDA_PHASES = (
    ("load", r"4Ring|13prefetch_rows|14prefetch_slice"),
    ("exchange", r"4Team.*(4meet|5total)E|12cluster_sync"),
    ("sum", r"12ForwardBlock.*7squeezeE|13BackwardBlock.*3sumE"),
    ("mlp", r"6exciteE|(12rows|15columns)_product|12through_gate|14through_layers"),
    ("mlp", r"11finish_sums|11divide_mean|13BackwardBlock.*7prepareE|8value_of|8chain_of"),
    ("write", r"12ForwardBlock.*(5scale|11scale_units)E|13BackwardBlock.*5writeE|11write_bytes"),
    ("parameters", r"16gradients_kernel"),
)  # fmt: skip
PHASES = ("load", "sum", "exchange", "mlp", "write", "parameters", "other")
_NOWHERE = Frame("", 0, ())
_MEMORY_16 = ("LDG", "LDS", "LD", "STG", "ST", "STS", "LDGSTS")


class Timed(NamedTuple):
    """An instruction, and how often warps issue it."""

    instruction: Instruction
    times: float
    phase: str
    frame: Frame


class LoopCount(NamedTuple):
    """An innermost loop of the machine code that 16-byte accesses are in.

    ``iterations`` are of its head, by warps. ``loads`` of 16 bytes are issued before the first
    result is used, of ``of`` in an iteration.
    """

    name: str
    iterations: float
    instructions: float  # of the machine code, in an iteration
    ptx: float  # of PTX, in one of the same loop, less what becomes none (Text.expected)
    loads: int
    of: int


def phase_of(frame: Frame, phases: tuple[tuple[str, str], ...] = CUDA_PHASES) -> str:
    """The phase that an instruction from there belongs to; ``other`` if nothing says."""
    return _phase(frame.functions, phases)


@functools.cache
def _phase(functions: tuple[str, ...], phases: tuple[tuple[str, str], ...]) -> str:
    for name in functions:
        for phase, pattern in phases:
            if re.search(pattern, name):
                return phase
    return "other"


class Profile:
    """Of one kernel.

    Args:
        code: its machine code.
        text: its PTX.
        warps, threads: executions of each block of the PTX.
        phases: see :data:`CUDA_PHASES`.
    """

    def __init__(
        self,
        code: MachineCode,
        text: Text,
        warps: Sequence[float],
        threads: Sequence[float],
        phases: tuple[tuple[str, str], ...] = CUDA_PHASES,
    ) -> None:
        self.code, self.text = code, text
        self.warps = [max(0.0, w) for w in warps]
        threads = [max(0.0, t) for t in threads]
        blocks = code.program.blocks
        evidence: list[dict[int, int]] = []
        for block in blocks:
            row: Counter[int] = Counter()
            for instruction in block.instructions:
                of = text.block_of(instruction.line) if instruction.line else None
                if of is not None:
                    row[int(threads[of])] += 1
            evidence.append(dict(row))
        flow = frequencies([block.successors for block in blocks], evidence)
        # Threads of a warp that go different ways: as many warps to a thread as in the block of PTX
        # that runs about as often.
        self.times: list[float] = []
        for block, count in zip(blocks, flow, strict=True):
            lines = {text.block_of(i.line) for i in block.instructions if i.line}
            of = [b for b in lines if b is not None and threads[b]]
            near = min(of, key=lambda b: abs(threads[b] - count), default=None)
            self.times.append(count / 32 if near is None else count * warps[near] / threads[near])
        self.timed: list[Timed] = []
        around_ptx = [
            self._commonest(phase_of(text.frames.get(line, _NOWHERE), phases) for line in lines)
            for lines in text.instructions
        ]
        for block, times in zip(blocks, self.times, strict=True):
            frames = [text.frames.get(i.line, _NOWHERE) for i in block.instructions]
            named = [phase_of(frame, phases) for frame in frames]
            # What the compiler gives no place to belongs to what is around it.
            around = self._commonest(named)
            for i, frame, name in zip(block.instructions, frames, named, strict=True):
                if name == "other":
                    of = text.block_of(i.line) if i.line else None
                    name = around or (around_ptx[of] if of is not None else "") or name
                if times > 0:
                    self.timed.append(Timed(i, times, name, frame))

    @staticmethod
    def _commonest(phases: Iterable[str]) -> str:
        """Of those that say something; empty where none does."""
        named = Counter(phase for phase in phases if phase != "other").most_common(1)
        return named[0][0] if named else ""

    @property
    def instructions(self) -> float:
        """That all warps issue."""
        return sum(t.times for t in self.timed)

    @property
    def ptx_instructions(self) -> float:
        return sum(
            len(lines) * times
            for lines, times in zip(self.text.instructions, self.warps, strict=True)
        )

    def uses(self, capability: int) -> dict[str, Use]:
        """By phase."""
        found = dict.fromkeys(PHASES, Use(0))
        for t in self.timed:
            found[t.phase] = found[t.phase].plus(use(t.instruction, capability), t.times)
        return found

    def per_image(self, capability: int) -> Use:
        """All phases together."""
        total = Use(0)
        for of_phase in self.uses(capability).values():
            total = total.plus(of_phase)
        return total

    def lines(self) -> list[tuple[str, int, str, float]]:
        """File, line, phase, and instructions, the most first."""
        found: defaultdict[tuple[str, int, str], float] = defaultdict(float)
        for t in self.timed:
            found[t.frame.file, t.frame.line, t.phase] += t.times
        return [(*at, n) for at, n in sorted(found.items(), key=lambda item: -item[1])]

    @property
    def prefetches(self) -> bool:
        """Whether it asks L2 for what it reads, before it does."""
        return any(".PF" in t.instruction.opcode or t.instruction.name == "UBLKPF"
                   for t in self.timed)  # fmt: skip

    def narrow(self, phases: Sequence[str] = ("sum", "write")) -> float:
        """Accesses to global memory of less than 16 bytes among all in phases that stream."""
        wide = narrow = 0.0
        for t in self.timed:
            if t.phase in phases and t.instruction.name in ("LDG", "STG", "LD", "ST"):
                if t.instruction.bytes == 16:
                    wide += t.times
                else:
                    narrow += t.times
        return narrow / (wide + narrow) if wide + narrow else 0.0

    def loops(self) -> list[LoopCount]:
        """The innermost loops with 16-byte accesses that run, the most instructions first."""
        program = self.code.program
        every = program.loops()
        of_ptx = self.text.loops()
        found = []
        for loop in every:
            inside = [o for o in every if o.blocks < loop.blocks and self.times[o.head] > 0
                      and self._wide(o)]  # fmt: skip
            if inside or not self._wide(loop) or self.times[loop.head] <= 0:
                continue
            issued = sum(self.times[b] * len(program.blocks[b].instructions) for b in loop.blocks)
            iterations = self.times[loop.head]
            loads, of = self._loads_before_use(loop)
            found.append(
                (issued, LoopCount(self._name(loop), iterations, issued / iterations,
                                   self._same_in_ptx(loop, of_ptx), loads, of))
            )  # fmt: skip
        return [count for _, count in sorted(found, key=lambda item: -item[0])]

    def _running(self, loop: Loop) -> list[Instruction]:
        """Instructions of a loop in the order of the code, without what hardly ever runs."""
        least = self.times[loop.head] / 4
        return [
            i
            for b in sorted(loop.blocks)
            if self.times[b] > least
            for i in self.code.program.blocks[b].instructions
        ]

    def _wide(self, loop: Loop) -> bool:
        return any(i.bytes == 16 and i.name in _MEMORY_16 for i in self._running(loop))

    def _loads_before_use(self, loop: Loop) -> tuple[int, int]:
        loads, of = 0, 0
        waiting: set[str] = set()
        used = False
        for i in self._running(loop):
            used = used or bool(waiting & i.reads())
            if i.bytes == 16 and i.name in ("LDG", "LDS", "LD"):
                of += 1
                if not used:
                    loads += 1
                    waiting |= i.writes()
        return loads, of

    def _name(self, loop: Loop) -> str:
        """The phase that most of it is of, and the line of source that its wide access is on."""
        blocks = set(loop.blocks)
        addresses = {i.address for b in blocks for i in self.code.program.blocks[b].instructions}
        of = [t for t in self.timed if t.instruction.address in addresses]
        phases: Counter[str] = Counter()
        for t in of:
            phases[t.phase] += int(t.times)
        return phases.most_common(1)[0][0]

    def _same_in_ptx(self, loop: Loop, loops: Sequence[Loop]) -> float:
        """Instructions in an iteration of the loop of PTX that has most of the same lines."""
        lines = Counter(
            self.text.block_of(i.line)
            for b in loop.blocks
            if self.times[b] > 0
            for i in self.code.program.blocks[b].instructions
        )
        best, most = None, 0.0
        for candidate in loops:
            common = sum(n for block, n in lines.items() if block in candidate.blocks)
            size = sum(
                len(self.text.instructions[b]) for b in candidate.blocks if self.warps[b] > 0
            )
            score = common / (sum(lines.values()) + size - min(common, size) or 1)
            if self.warps[candidate.head] > 0 and score >= most:  # inner ones last
                best, most = candidate, score
        if best is None:
            return 0.0
        issued = sum(self.warps[b] * self.text.expected[b] for b in best.blocks)
        return issued / self.warps[best.head]
