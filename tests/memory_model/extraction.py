"""The synchronizing instructions of a compiled kernel, in the orders in which a thread can come to
them, and whether those are a protocol's.

A kernel's PTX is one for all launch plans: which exchange it does is a field of its parameters. So
the constants of a plan are carried through the PTX (registers and branches alike, as a compiler
does), and what a thread of that plan cannot reach is left out. What remains is compared with the
regular expression of a protocol: every path of the kernel has to be in it, and every step of it on
some path of the kernel.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ptx import compiling
from ptx.translate import FUNCTION, split, statements

from .protocols import Protocol

#: Barriers, fences, atomic operations, asynchronous copies, and accesses with an order.
SYNCHRONIZES = re.compile(
    r"(bar|barrier|red|atom|fence|membar|mbarrier|cp\.async|cp\.reduce|st\.async|griddep\w+|"
    r"multimem|tensormap|wgmma|elect)\b|(ld|st)\.(?=.*\b(acquire|release|relaxed|volatile|mmio)\b)"
)
#: Plain accesses of the protocols: of no named state space, past L1, of whole vectors, a counter's.
_ACCESSES = re.compile(r"st\.f32|ld\.global\.cg|ld\.shared\.v4\.u32|st\.global\.u32")
_UNKNOWN = object()
_WIDTH = re.compile(r"\.[usb](\d+)$")


class Step(NamedTuple):
    """An instruction that a protocol may know, with its line of PTX."""

    opcode: str
    line: int


class _Instruction(NamedTuple):
    line: int
    predicate: str  # "" without
    negated: bool
    opcode: str
    operands: list[str]
    targets: list[str]  # registers that it writes


@dataclass(eq=False)
class _Function:
    instructions: list[_Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@functools.lru_cache(8)
def _parsed(text: str) -> tuple[dict[str, _Function], str]:
    """The functions of a module, by name, and the entry's name."""
    functions: dict[str, _Function] = {}
    entry, current, depth = "", _Function(), 0
    for statement in statements(text):
        head = FUNCTION.fullmatch(statement.text)
        if head and head["body"]:
            current = functions[head["name"]] = _Function()
            entry = head["name"] if head["kind"] == "entry" else entry
            depth = 1
        elif statement.text in ("{", "}"):
            depth += 1 if statement.text == "{" else -1
        elif statement.text.endswith(":"):
            current.labels[statement.text[:-1]] = len(current.instructions)
        elif depth and not statement.text.startswith("."):
            match = re.match(r"(?:@(!?)(%?\w+)\s+)?(\S+)\s*(.*)", statement.text, re.S)
            assert match
            opcode, operands = match[3], split(match[4])
            writes = operands and operands[0][0] != "[" and not re.match(r"st\.|bra|call", opcode)
            targets = re.findall(r"%\w+", operands[0]) if writes else []
            current.instructions.append(_Instruction(
                statement.line, match[2] or "", bool(match[1]), opcode, operands, targets,
            ))  # fmt: skip
    return functions, entry


# ---- constants of the plan ----


def _signed(value: int, opcode: str) -> int:
    found = re.search(r"\.([usb])(\d+)$", opcode)
    if not found:
        return value
    value &= 2 ** int(found[2]) - 1
    return value - 2 ** int(found[2]) if found[1] == "s" and value >> (int(found[2]) - 1) else value


_COMPARE = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip
_ARITHMETIC = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "and": lambda a, b: a & b,
    "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "shl": lambda a, b: a << b,
}  # fmt: skip


class _Constants:
    """What registers of a function hold, if it is the same wherever they are written, and which
    instructions can be reached: found together, the optimistic way. Of flags (predicates that are
    only ever set to constants) it is found at each instruction: ``flags`` has them."""

    def __init__(
        self, function: _Function, parameters: Mapping[int, int], leader: bool = False
    ) -> None:
        self.function, self.parameters = function, parameters
        # Blocks are one-dimensional.
        self.special = {"%tid.y": 0, "%tid.z": 0} | ({"%tid.x": 0} if leader else {})
        written: dict[str, list[_Instruction]] = defaultdict(list)
        for i in function.instructions:
            if i.operands and i.operands[0].startswith("%p"):
                written[i.operands[0]].append(i)
        self.is_flag = {register for register, by in written.items()
                        if len(by) > 1 and all(i.opcode == "mov.pred" and not i.predicate
                                               and re.fullmatch(r"-?\d+", i.operands[1])
                                               for i in by)}  # fmt: skip
        self.values: dict[str, Any] = {}
        self.flags: dict[int, dict[str, Any]] = {0: {}}
        before = None
        while before != (len(self.flags), self.values):
            before = (len(self.flags), dict(self.values))
            self._walk()

    def _walk(self) -> None:
        todo, seen = [0], set()
        while todo:
            at = todo.pop()
            seen.add(at)
            i = self.function.instructions[at]
            flags = self.flags[at]
            self._define(i)
            if i.operands and i.operands[0] in self.is_flag and i.opcode == "mov.pred":
                flags = flags | {i.operands[0]: int(i.operands[1])}
            for successor in self.successors(at):
                known = self.flags.get(successor)
                joined = flags if known is None else {
                    name: known.get(name, flags.get(name))
                    if known.get(name, flags.get(name)) == flags.get(name, known.get(name))
                    else _UNKNOWN
                    for name in known | flags
                }  # fmt: skip
                if joined != known or successor not in seen:
                    self.flags[successor] = joined
                    todo.append(successor)

    def successors(self, at: int) -> list[int]:
        i = self.function.instructions[at]
        opcode = i.opcode.partition(".")[0]
        if opcode not in ("bra", "ret", "exit", "trap"):
            return [at + 1]
        taken = [self.function.labels[i.operands[0]]] if opcode == "bra" else []
        if not i.predicate:
            return taken
        values = self.flags[at] if i.predicate in self.is_flag else self.values
        holds = values.get(i.predicate)
        if holds is None:  # not yet found
            return []
        if holds is _UNKNOWN:
            return [*taken, at + 1]
        return taken if bool(holds) != i.negated else [at + 1]

    def _operand(self, text: str) -> Any:
        if text.startswith("%"):
            if re.match(r"%(tid|ctaid|ntid|nctaid|envreg|laneid|cluster)", text):
                return self.special.get(text, _UNKNOWN)
            return self.values.get(text)
        if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", text):
            return int(text, 0)
        return ("parameter", 0) if text.endswith("_param_0") else _UNKNOWN

    def _define(self, i: _Instruction) -> None:
        if all(self.values.get(target) is _UNKNOWN for target in i.targets):
            return
        count = len(i.targets)
        values = [_UNKNOWN] * count if i.predicate else self._result(i, count)
        for target, value in zip(i.targets, values, strict=True):
            old = self.values.get(target)
            if value is not None and old is not _UNKNOWN and old != value:
                self.values[target] = value if old is None else _UNKNOWN

    def _result(self, i: _Instruction, count: int) -> list[Any]:
        """Of each target; None: not yet known."""
        name, rest = i.opcode.split(".")[0], [self._operand(o) for o in i.operands[1:]]
        if i.opcode.startswith("ld.param"):
            return self._parameter(i, count)
        if count != 1:
            return [_UNKNOWN] * count
        if name in ("or", "and") and i.opcode.endswith("pred"):
            decides = name == "or"
            if any(v is not None and v is not _UNKNOWN and bool(v) == decides for v in rest):
                return [decides]
        if any(v is None for v in rest):
            return [None]
        if any(v is _UNKNOWN for v in rest):
            if name == "selp" and rest[2] is not _UNKNOWN:
                return [rest[0] if rest[2] else rest[1]]
            return [_UNKNOWN]
        if name == "add" and isinstance(rest[0], tuple) and isinstance(rest[1], int):
            return [("parameter", rest[0][1] + rest[1])]
        if name in ("mov", "cvta"):
            return [rest[0]]
        if any(isinstance(v, tuple) for v in rest):
            return [_UNKNOWN]
        if (
            name == "setp"
            and i.opcode.count(".") == 2
            and (kind := i.opcode.split(".")[1]) in _COMPARE
        ):
            return [_COMPARE[kind](*(_signed(v, i.opcode) for v in rest))]
        if i.opcode == "not.pred":
            return [not rest[0]]
        if name == "neg":
            return [_signed(-rest[0], i.opcode)]
        if name == "selp":
            return [rest[0] if rest[2] else rest[1]]
        if name in _ARITHMETIC and not i.opcode.endswith("pred"):
            return [_signed(_ARITHMETIC[name](*rest), i.opcode)]
        if i.opcode in ("or.pred", "and.pred"):
            return [
                bool(rest[0]) and bool(rest[1]) if name == "and" else bool(rest[0]) or bool(rest[1])
            ]
        return [_UNKNOWN]

    def _parameter(self, i: _Instruction, count: int) -> list[Any]:
        found = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", i.operands[1])
        assert found, i
        base = self._operand(found[1])
        if base is None:
            return [None] * count
        width = _WIDTH.search(i.opcode)
        if not isinstance(base, tuple) or not width:
            return [_UNKNOWN] * count
        at = base[1] + int(found[2] or 0)
        return [self.parameters.get(at + k * int(width[1]) // 8, _UNKNOWN) for k in range(count)]


# ---- the kernel as an automaton ----


@dataclass
class _Graph:
    """Nodes with what a thread does there, if it concerns any protocol, and where it goes on."""

    steps: list[Step | None] = field(default_factory=list)
    after: list[list[int]] = field(default_factory=list)

    def add(self, step: Step | None) -> int:
        self.steps.append(step)
        self.after.append([])
        return len(self.steps) - 1


class Kernel:
    """A kernel of csrc/cuda as nvcc compiles it for a target, under a launch plan: ``plan`` has the
    fields of ``Plan`` that are known. ``leader``: as the first thread of a block executes it, not
    any thread. ``ptx``: to look at instead of what nvcc emits."""

    def __init__(
        self,
        name: str,
        target: str,
        plan: Mapping[str, int],
        *,
        leader: bool = False,
        ptx: str | None = None,
    ) -> None:
        self.functions, self.entry = _parsed(ptx or compiling.ptx_of(name, target))
        header = compiling.instance(name)[0].removesuffix(".cuh")
        offsets = _offsets(target) if plan else {}
        parameters = {offsets[header] + offsets[key]: value for key, value in plan.items()}
        self.leader = leader
        self.graph = _Graph()
        self.start, self.ends = self._expand(self.entry, parameters)

    def _expand(self, name: str, parameters: Mapping[int, int]) -> tuple[int, list[int]]:
        """A function's nodes, with those of the functions it calls in the place of each call."""
        function = self.functions[name]
        constants = _constants(function, tuple(parameters.items()), self.leader)
        reached = sorted(constants.flags)
        mapped = {i.operands[0] for i in function.instructions if i.opcode.startswith("mapa")}
        enter: dict[int, int] = {}
        leave: dict[int, list[int]] = {}
        ends = []
        for at in reached:
            i = function.instructions[at]
            called = next((o for o in i.operands if o in self.functions), None)
            if i.opcode.startswith("call") and called and _concerns(self.functions, called):
                # Parameters of other functions are not those of the plan.
                enter[at], leave[at] = self._expand(called, {})
            else:
                enter[at] = self.graph.add(_step(i, mapped))
                leave[at] = [enter[at]]
            if i.opcode.partition(".")[0] in ("ret", "exit"):
                ends.append(enter[at])
        for at in reached:
            for successor in constants.successors(at):
                for node in leave[at]:
                    self.graph.after[node].append(enter[successor])
        return enter[0], ends

    def steps(self) -> Iterator[Step]:
        """All that a thread can come to, in the order of the text."""
        seen, todo = {self.start}, [self.start]
        while todo:
            for node in self.graph.after[todo.pop()]:
                if node not in seen:
                    seen.add(node)
                    todo.append(node)
        return (step for node in sorted(seen) if (step := self.graph.steps[node]))

    def opcodes(self) -> set[str]:
        return {step.opcode for step in self.steps()}

    def compare(self, protocol: Protocol) -> str | None:
        """How a path of the kernel departs from the protocol, or what of the protocol is on no
        path; None: nothing. Of the kernel's instructions those count that the protocol has."""
        expected = _Expression(protocol, self.leader)
        known = {protocol.steps[name.replace("_", " ")] for name in expected.names.values()}
        used: set[str] = set()
        first = (self.start, expected.start)
        seen, todo = {first}, [first]
        while todo:
            node, states = todo.pop()
            step = self.graph.steps[node]
            if step and step.opcode in known:
                after = expected.after(states, step.opcode)
                if not after:
                    awaited = sorted(expected.possible(states))
                    return f"line {step.line}: {step.opcode} where the protocol has {awaited}"
                used |= {expected.names[s] for s in after}
                states = after
            if node in self.ends and expected.end not in expected.closure(states):
                return f"ends where the protocol has {sorted(expected.possible(states))}"
            for successor in self.graph.after[node]:
                if (pair := (successor, states)) not in seen:
                    seen.add(pair)
                    todo.append(pair)
        missing = set(expected.names.values()) - used
        return f"no path has {sorted(missing)}" if missing else None


def _step(i: _Instruction, mapped: Iterable[str]) -> Step | None:
    opcode = re.sub(r"\.f64$", ".f32", i.opcode)
    if opcode.startswith("ld.f32") and i.operands[1].strip("[]") in mapped:
        return Step("ld.f32 of mapa", i.line)
    if opcode.startswith("cp.async.wait_group"):
        return Step(f"{opcode} {i.operands[0]}", i.line)
    if SYNCHRONIZES.match(opcode) or _ACCESSES.match(opcode):
        return Step(opcode, i.line)
    return None


def _concerns(functions: Mapping[str, _Function], name: str) -> bool:
    """Whether a function has steps, or calls one that has."""
    return any(
        _step(i, ()) or any(o in functions and _concerns(functions, o) for o in i.operands)
        for i in functions[name].instructions
    )


@functools.lru_cache(64)
def _constants(
    function: _Function, parameters: tuple[tuple[int, int], ...], leader: bool
) -> _Constants:
    return _Constants(function, dict(parameters), leader)


_FIELDS = ("exchange", "axis", "resident", "slots", "bulk", "vector")


@functools.cache
def _offsets(target: str) -> dict[str, int]:
    """Of the plan in the parameters of the kernels, and of its fields in the plan, as nvcc lays
    them out."""
    names = [*(f"senet_{header}" for header in ("forward", "backward")), *_FIELDS]
    wanted = ["offsetof(ForwardLaunch, plan)", "offsetof(BackwardLaunch, plan)",
              *(f"offsetof(Plan, {name})" for name in _FIELDS)]  # fmt: skip
    text = ('#include <cstddef>\n#include "backward.cuh"\n#include "forward.cuh"\n'
            "namespace senet::gpu {\n"
            f'extern "C" __device__ int offsets[] = {{{", ".join(wanted)}}};\n}}\n')  # fmt: skip
    ptx = compiling.ptx_file_of(text, "offsets", target).read_text()
    found = re.search(r"\.b8 offsets\[\d+\] = \{([^}]*)\}", ptx)
    assert found, ptx
    data = bytes(map(int, found[1].split(","))).ljust(4 * len(names), b"\0")
    return {name.removeprefix("senet_"): int.from_bytes(data[4 * k : 4 * k + 4], "little")
            for k, name in enumerate(names)}  # fmt: skip


# ---- the protocol as an automaton ----


class _Expression:
    """The regular expression of a protocol over the names of its steps: sequences, ``|``, ``?``,
    ``*``, ``+`` and parentheses. What ``!`` follows is the leader's: the first thread has to do it,
    any thread may. A state is the last step that a thread has come to."""

    def __init__(self, protocol: Protocol, leader: bool) -> None:
        self.opcodes = {name.replace(" ", "_"): opcode for name, opcode in protocol.steps.items()}
        self.names: dict[int, str] = {}  # of states that are steps
        self.silent: dict[int, set[int]] = defaultdict(set)
        self.next: dict[int, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        self.count = 0
        self.tokens = re.findall(
            r"\w+|[()|?*+]", protocol.order.replace("!", "" if leader else "?")
        )
        first, self.end = self._alternatives()
        assert not self.tokens
        self.start = frozenset([first])

    def _new(self) -> int:
        self.count += 1
        return self.count

    def _alternatives(self) -> tuple[int, int]:
        first, last = self._new(), self._new()
        while True:
            a, b = self._sequence()
            self.silent[first].add(a)
            self.silent[b].add(last)
            if not self.tokens or self.tokens[0] != "|":
                return first, last
            self.tokens.pop(0)

    def _sequence(self) -> tuple[int, int]:
        first = last = self._new()
        while self.tokens and self.tokens[0] not in ("|", ")"):
            token = self.tokens.pop(0)
            if token == "(":
                a, b = self._alternatives()
                assert self.tokens.pop(0) == ")"
            else:
                a, b = self._new(), self._new()
                self.next[a][self.opcodes[token]].add(b)
                self.names[b] = token
            repeat = self.tokens.pop(0) if self.tokens and self.tokens[0] in "?*+" else ""
            enter, leave = self._new(), self._new()
            self.silent[enter].add(a)
            self.silent[b].add(leave)
            if repeat in ("?", "*"):
                self.silent[enter].add(leave)
            if repeat in ("*", "+"):
                self.silent[leave].add(enter)
            self.silent[last].add(enter)
            last = leave
        return first, last

    def closure(self, states: Iterable[int]) -> set[int]:
        found, todo = set(states), list(states)
        while todo:
            more = self.silent[todo.pop()] - found
            found |= more
            todo += more
        return found

    def possible(self, states: Iterable[int]) -> set[str]:
        return {opcode for s in self.closure(states) for opcode in self.next[s]}

    def after(self, states: Iterable[int], opcode: str) -> frozenset[int]:
        return frozenset(t for s in self.closure(states) for t in self.next[s].get(opcode, ()))
