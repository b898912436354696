"""Machine code as ``nvdisasm -c -g`` prints it: instructions, basic blocks, and what each
instruction takes of a multiprocessor."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from .graph import Loop, natural_loops

_INSTRUCTION = re.compile(
    r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;"
)
_SECTION = re.compile(r"\.text\.([\w$.]+):")
_LABEL = re.compile(r"\s*(\.L_x_\d+|\$[\w$.]+|[A-Za-z_][\w$]*):$")
_LINE = re.compile(r'\s*//## File "[^"]*", line (\d+)')
_TARGET = re.compile(r"`\(([\w$.]+)\)")
_TARGETS = re.compile(r"BRANCH_TARGETS ([\w$.,]+)")
_REGISTER = re.compile(r"\b(U?R\d+)\b")
# Control goes elsewhere after these, and never on to the next instruction without a predicate.
_LEAVES = ("BRA", "EXIT", "RET", "BRX", "BRXU", "JMP", "JMX", "KILL", "BPT", "BREAK")
_NO_PATH_ON = ("EXIT", "RET", "BRX", "BRXU", "JMP", "JMX", "KILL", "BRA")


class Instruction(NamedTuple):
    """``line`` is that of the PTX it comes from; 0 where nobody says."""

    address: int
    predicate: str
    opcode: str
    operands: str
    line: int

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bytes(self) -> int:
        """Of a thread's access to memory."""
        parts = self.opcode.split(".")
        for part, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if part in parts:
                return size
        return 4

    @property
    def conditional(self) -> bool:
        """Whether a branch may fall through: a predicate before it or among its operands."""
        if self.predicate and self.predicate not in ("@PT", "@UPT"):
            return True
        return bool(re.match(r"!?U?P\d", self.operands)) or ".DIV" in self.opcode

    def writes(self) -> set[str]:
        """Registers of a load's result."""
        first = _REGISTER.match(self.operands)
        if not first or self.name in ("STG", "STS", "ST", "STL", "RED"):
            return set()
        number = int(re.sub(r"\D", "", first[1]))
        letters = re.sub(r"\d", "", first[1])
        return {f"{letters}{number + i}" for i in range(max(1, self.bytes // 4))}

    def reads(self) -> set[str]:
        """Registers named among the operands but for the first, which is written; of stores and of
        what has no result, all. An operand of a wide access names the first register only."""
        text = self.operands
        if self.name not in ("STG", "STS", "ST", "STL", "RED", "BRA", "BAR", "WARPSYNC"):
            text = text.partition(",")[2]
        found = set(_REGISTER.findall(text))
        for name in list(found):
            if re.search(rf"\b{name}\.64\b", text):
                found.add(re.sub(r"\d+", lambda m: str(int(m[0]) + 1), name))
        if self.name in ("STG", "STS", "ST"):
            value = _REGISTER.findall(text)
            if value:
                number, letters = int(re.sub(r"\D", "", value[-1])), re.sub(r"\d", "", value[-1])
                found |= {f"{letters}{number + i}" for i in range(max(1, self.bytes // 4))}
        return found


@dataclass
class Block:
    """A basic block: instructions that run one after another, and the blocks that may follow."""

    number: int
    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)


class Program:
    """A kernel with the functions that it calls, as one section of a cubin has them.

    Raises:
        ValueError: the text has no such section, or none at all.
    """

    def __init__(self, text: str, section: str | None = None) -> None:
        self.name = section or ""
        self.instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        inside, line = False, 0
        for row in text.splitlines():
            if found := _SECTION.match(row):
                inside = found[1] == section if section else not self.instructions
                self.name = found[1] if inside else self.name
                line = 0
            elif not inside:
                continue
            elif found := _LINE.match(row):
                line = int(found[1])
            elif found := _LABEL.match(row):
                labels[found[1]] = len(self.instructions)
            elif found := _INSTRUCTION.match(row):
                address, predicate, opcode, operands = found.groups()
                self.instructions.append(
                    Instruction(int(address, 16), predicate or "", opcode, operands, line)
                )
        if not self.instructions:
            raise ValueError(f"no machine code of {section or 'any kernel'} in the text")
        # Behind the end the section is filled up with NOPs, after a branch to itself.
        while len(self.instructions) > 1 and self.instructions[-1].name == "NOP":
            self.instructions.pop()
        self.blocks = self._cut(labels)

    def _cut(self, labels: dict[str, int]) -> list[Block]:
        code = self.instructions
        leaders = {0} | {at for at in labels.values() if at < len(code)}
        for i, instruction in enumerate(code):
            if instruction.name in _LEAVES:
                leaders.add(i + 1)
        starts = sorted(at for at in leaders if at < len(code))
        number_at = {start: number for number, start in enumerate(starts)}
        blocks = []
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(code)], strict=True)):
            block = Block(number, code[start:end])
            last = code[end - 1]
            falls = last.name not in _NO_PATH_ON or last.conditional
            if falls and end < len(code):
                block.successors.append(number_at[end])
            if last.name == "BRA" and (found := _TARGET.search(last.operands)):
                block.successors.append(number_at[labels[found[1]]])
            elif last.name in ("BRX", "BRXU") and (found := _TARGETS.search(last.operands)):
                targets = dict.fromkeys(found[1].split(","))
                block.successors += [number_at[labels[target]] for target in targets]
            blocks.append(block)
        return blocks

    def loops(self) -> list[Loop]:
        return natural_loops([block.successors for block in self.blocks])
