"""PTX as text: basic blocks, loops, and where each line comes from in the source."""

from __future__ import annotations

import ast
import bisect
import functools
import re
from pathlib import Path
from typing import NamedTuple

from .graph import Loop, natural_loops
from .machine_code import for_tests

_LOC = re.compile(
    r"[ \t]*\.loc\s+(\d+)\s+(\d+)\s+(\d+)"
    r"(?:,\s*function_name\s+\$?(\w+)(?:\s*\+\s*(\d+))?,\s*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?"
)
_FILE = re.compile(r'[ \t]*\.file\s+(\d+)\s+"([^"]*)"')
_STRING = re.compile(r"\$(L__info_string\d+):\s*((?:\.b8 [\d,]+\s*)+)")
_COMMENT = re.compile(r"// ([\w.]+:\d+:\d+(?: @\[ [\w.]+:\d+:\d+)*)")
_PLACE = re.compile(r"([\w.]+):(\d+):\d+")
_FUNCTION = re.compile(r"^[ \t]*(?:\.(?:visible|extern|weak)\s+)*\.(?:entry|func)\b[^(\n]*", re.M)
_BRANCH = re.compile(r"(@!?\s*%\w+\s+)?bra(?:\.uni)?\s+(\$?[\w$]+)")
_LEAVES = re.compile(r"(@!?\s*%\w+\s+)?(?:ret|exit|trap)\b")
# Another type for the bits of a register, or two halves of one side by side.
_SAME_BITS = re.compile(r"mov\.[bu]32\s+%\w+,\s*(?:%[frd]\d+|\{%\w+,\s*%\w+\});?$")
_TO_HALF = re.compile(r"cvt\.rn\.(?:bf16|f16)\.f32\s")


@functools.cache
def _functions(path: str) -> list[tuple[int, int, str]]:
    """First and last line, and name, of the functions of a Python file; of none, nothing."""
    if not path.endswith(".py") or not Path(path).is_file():
        return []
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return [
        (node.lineno, node.end_lineno or node.lineno, node.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]


def _function_at(path: str, line: int) -> str:
    return next((name for first, last, name in _functions(path) if first <= line <= last), "")


def machine_instructions(statement: str) -> float:
    """How many instructions of machine code one of PTX becomes, as far as ptxas makes fewer of it.

    A register has no type there: bits that are now of a float, or of two 16-bit numbers, stay where
    they are. Two numbers are rounded to 16 bits by one instruction (F2FP.PACK_AB), which also puts
    them side by side. Everything else counts once.
    """
    if _SAME_BITS.match(statement):
        return 0.0
    return 0.5 if _TO_HALF.match(statement) else 1.0


class Frame(NamedTuple):
    """A place in the source: the function that it is in, and those that this is inlined into, from
    inside to outside."""

    file: str
    line: int
    functions: tuple[str, ...]


class Text:
    """A module of PTX whose basic blocks are numbered as the counters of ``ptx.translate.Module``
    number them."""

    def __init__(self, text: str, leaders: list[int]) -> None:
        self.text = text
        self.leaders = leaders
        self._order = sorted(range(len(leaders)), key=leaders.__getitem__)
        self._starts = [leaders[i] for i in self._order]
        for_tests()
        from ptx.translate import statements

        self.instructions: list[list[int]] = [[] for _ in leaders]  # lines of each block
        #: of machine code, see :func:`machine_instructions`
        self.expected: list[float] = [0.0 for _ in leaders]
        self.successors: list[list[int]] = [[] for _ in leaders]
        self.frames: dict[int, Frame] = {}
        self._statements = [
            s for s in statements(text) if not s.text.startswith(".") and s.text not in "{}"
        ]
        self._connect()
        self._locate()

    def block_of(self, line: int) -> int | None:
        """The block that an instruction on that line belongs to."""
        at = bisect.bisect_right(self._starts, line) - 1
        return self._order[at] if at >= 0 else None

    def _connect(self) -> None:
        labels: dict[str, int] = {}
        waiting: list[str] = []
        branches: list[tuple[int, str]] = []
        previous: int | None = None  # the block that goes on into the next one
        for statement in self._statements:
            text = statement.text
            if text.endswith(":"):
                waiting.append(text[:-1])
                continue
            if text.endswith("{"):  # a function's head
                previous = None
                continue
            block = self.block_of(statement.line)
            if block is None:
                continue
            labels |= dict.fromkeys(waiting, block)
            waiting = []
            if not self.instructions[block] and previous is not None:
                self.successors[previous].append(block)
            self.instructions[block].append(statement.line)
            self.expected[block] += machine_instructions(text)
            previous = block
            if found := _BRANCH.match(text):
                branches.append((block, found[2]))
                previous = block if found[1] else None
            elif found := _LEAVES.match(text):
                previous = block if found[1] else None
        for block, label in branches:
            if label in labels:
                self.successors[block].append(labels[label])

    def loops(self) -> list[Loop]:
        """See :func:`natural_loops`; blocks of PTX are in the order of the text."""
        place = {block: i for i, block in enumerate(self._order)}
        ordered = [[place[s] for s in self.successors[block]] for block in self._order]
        return [
            Loop(self._order[loop.head], frozenset(self._order[b] for b in loop.blocks))
            for loop in natural_loops(ordered)
        ]

    def _locate(self) -> None:
        strings = {
            name: bytes(int(n) for n in re.findall(r"\d+", re.sub(r"\.b8", "", data)))
            for name, data in _STRING.findall(self.text)
        }
        files: dict[str, str] = {}
        paths: dict[str, str] = {}
        for number, path in _FILE.findall(self.text):
            files[number] = path.rpartition("/")[2]
            paths[files[number]] = path
        # A place that something is inlined at may be named only later in the text.
        inlined: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {}

        def name_of(found: re.Match[str]) -> str:
            data = strings.get(found[4], b"")[int(found[5] or 0) :]
            return data.split(b"\0")[0].decode(errors="replace")

        lines = self.text.split("\n")
        located = {n: found for n, line in enumerate(lines, 1) if (found := _LOC.match(line))}
        for found in located.values():
            if found[4]:
                inlined[found.group(1, 2, 3)] = name_of(found), found.group(6, 7, 8)
        outer, here = "", Frame("", 0, ())
        for number, line in enumerate(lines, 1):
            if _FUNCTION.match(line):
                outer = line.split("(")[0].split()[-1]
                here = Frame("", 0, (outer,))
            elif found := located.get(number):
                names: list[str] = []
                if commented := _COMMENT.search(line):  # Triton's, from inside to outside
                    for file, at_line in _PLACE.findall(commented[1]):
                        names.append(_function_at(paths.get(file, ""), int(at_line)))
                if found[4]:
                    inlined[found.group(1, 2, 3)] = name_of(found), found.group(6, 7, 8)
                    at = found.group(1, 2, 3)
                    while at in inlined and len(names) < 64:
                        names.append(inlined[at][0])
                        at = inlined[at][1]
                here = Frame(files.get(found[1], ""), int(found[2]), (*names, outer))
            else:
                self.frames[number] = here
