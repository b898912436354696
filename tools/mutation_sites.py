"""Where the kernels can be mutated, and how: the sites that :mod:`tools.mutate` draws from.

A mutant is one small change of a kernel's text: an operator, a constant, an index, a mask, a
barrier, a sum. Sites are found in C++ by patterns on text without comments and strings
(clang-format puts spaces around binary operators and nowhere else), in Triton by Python's own
parser. Each has a name that stays the same while the file does: path, line, column, and what
becomes of what.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: The kernels, by backend. Not here: what decides how work is shared out and launched (plan.h,
#: plan.cpp, launch.h, host.cpp, Triton's plan.py, build.py, launch.py and launcher.py), where
#: another constant is another speed; and
#: csrc/cuda/seam.cuh, the hardware's own instructions, which only a
#: GPU executes.
FILES = {
    "triton": (
        "senet_kernels/backends/triton/pointwise.py",
        "senet_kernels/backends/triton/access.py",
        "senet_kernels/backends/triton/squeeze.py",
        "senet_kernels/backends/triton/excite.py",
        "senet_kernels/backends/triton/scale.py",
        "senet_kernels/backends/triton/bwd_reduce.py",
        "senet_kernels/backends/triton/excite_bwd.py",
        "senet_kernels/backends/triton/dx.py",
    ),
    "cuda": (
        "csrc/cuda/images.cuh",
        "csrc/cuda/slice.cuh",
        "csrc/cuda/sums.cuh",
        "csrc/cuda/units.cuh",
        "csrc/cuda/pointwise.cuh",
        "csrc/cuda/forward.cuh",
        "csrc/cuda/backward.cuh",
        "csrc/cuda/gradients.cuh",
    ),
    "cpu": (
        "csrc/cpu/elements.h",
        "csrc/cpu/vec.h",
        "csrc/cpu/pointwise.h",
        "csrc/cpu/lanes.h",
        "csrc/cpu/runs.h",
        "csrc/cpu/mlp.h",
        "csrc/cpu/forward.h",
        "csrc/cpu/backward.h",
        "csrc/cpu/squeeze_backward.h",
    ),
}

#: Lines whose mutants are equivalent by design: they steer speed, never a result.
SPEED_ONLY = (
    "prefetch", "launch_bounds", "kCachePerThread", "kSerialElements", "stream(", "_stream<",
    "num_stages", "eviction_policy",
)  # fmt: skip

#: Binary operators, and what takes their place.
SWAPS = {
    "+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "//": "*",
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
    "&&": "||", "||": "&&", "&": "|", "|": "&", "<<": ">>", ">>": "<<",
    "+=": "-=", "-=": "+=", "*=": "=", "|=": "=",
}  # fmt: skip
COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
#: What threads of a CUDA block or cluster wait for.
BARRIERS = (
    "__syncthreads", "__syncwarp", "cluster_sync", "grid_sync", "meet", "leave", "wait",
    "wait_at_least", "add_release", "async_commit", "mbarrier_wait", "fence_proxy_async",
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """``text[start:end]`` of ``path`` becomes ``after``."""

    backend: str
    path: str
    kind: str  # comparison, arithmetic, constant, logic, sum, mask, statement, barrier
    start: int
    end: int
    line: int
    column: int
    before: str
    after: str

    @property
    def id(self) -> str:
        def short(text: str) -> str:
            return re.sub(r"\s+", "", text)[:24] or "nothing"

        return f"{self.path}:{self.line}:{self.column}:{short(self.before)}>{short(self.after)}"

    def applied(self, text: str) -> str:
        assert text[self.start : self.end] == self.before
        return text[: self.start] + self.after + text[self.end :]


def text_hash(backend: str, root: Path = ROOT) -> str:
    """Of a backend's kernels as they are: what is recorded of others is stale."""
    return hashlib.sha256(
        b"".join((root / path).read_bytes() for path in FILES[backend])
    ).hexdigest()[:16]


def sites(backend: str, root: Path = ROOT) -> list[Mutant]:
    """All mutants of a backend's kernels, in the order of the text."""
    find = _in_triton if backend == "triton" else _in_cpp
    found = []
    for path in FILES[backend]:
        text = (root / path).read_text()
        lines = text.splitlines()
        for kind, start, end, after in sorted(set(find(text))):
            line = text.count("\n", 0, start)
            if any(word in lines[line] for word in SPEED_ONLY):
                continue
            column = start - (text.rfind("\n", 0, start) + 1)
            before = text[start:end]
            if kind == "statement" and re.match(_CALL_OF_BARRIER, before):
                kind = "barrier"
            found.append(
                Mutant(backend, path, kind, start, end, line + 1, column + 1, before, after)
            )
    return found


# A change: kind, start, end, what takes its place.
Change = tuple[str, int, int, str]

_NOT_CODE = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:[^\n\\]|\\.|\\\n)*|\btemplate <[^\n]*>$'
    r"|\bstatic_assert\([^;]*;|\benum\b[^;]*;|^namespace[^\n]*",
    re.MULTILINE | re.DOTALL,
)
_BINARY = re.compile(r"(?<= )(\+|-|\*|/|%|<<|>>|<=|>=|==|!=|<|>|&&|\|\||&|\||\+=|-=|\*=|\|=)(?= )")
_INTEGER = re.compile(r"(?<![\w.'])(\d+)(?![\w.'x])")
_FLOAT = re.compile(r"(?<![\w.])(\d+\.\d*(?:e[-+]?\d+)?)(f?)(?![\w.])")
# A call for its effect, and an assignment to what exists already: each a line of its own.
_STATEMENT = re.compile(
    r"(?<=\n)[ ]+((?:[\w.>-]+(?:<[^;\n]*>)?\([^;\n]*\)|[\w.>\[\]-]+ = [^;\n]*);)(?=\n)"
)
_GUARD = re.compile(r"(?<!else )\bif (?:constexpr )?\(([^\n]*)\) (?=[^\n]*(?:;|\{)$)", re.MULTILINE)
_CALL_OF_BARRIER = rf"(?:[\w.]+(?:\.|->))?(?:{'|'.join(BARRIERS)})\b"


def _blanked(text: str) -> str:
    """Text of the same length without comments, strings, directives and template heads."""
    return _NOT_CODE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def _kind_of(operator: str) -> str:
    if operator in COMPARISONS:
        return "comparison"
    if operator in ("&&", "||", "&", "|", "<<", ">>"):
        return "logic"
    return "sum" if operator.endswith("=") else "arithmetic"


def _in_cpp(text: str) -> Iterator[Change]:
    code = _blanked(text)
    for m in _BINARY.finditer(code):
        yield _kind_of(m[1]), m.start(1), m.end(1), SWAPS[m[1]]
        if m[1] == "+=":  # only the last term is left
            yield "sum", m.start(1), m.end(1), "="
    for m in _INTEGER.finditer(code):
        yield "constant", m.start(1), m.end(1), str(int(m[1]) + 1)
    for m in _FLOAT.finditer(code):
        yield "constant", m.start(1), m.end(1), _other_float(m[1])
    for m in _STATEMENT.finditer(code):
        if not m[1].startswith("return"):
            yield "statement", m.start(1), m.end(1), ";"
    for m in _GUARD.finditer(code):
        if m[1].count("(") == m[1].count(")"):
            yield "mask", m.start(1), m.end(1), "true"


def _other_float(digits: str) -> str:
    return "1.0" if float(digits) == 0 else f"(2 * {digits})"


_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%",
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
    ast.BitAnd: "&", ast.BitOr: "|", ast.LShift: "<<", ast.RShift: ">>",
}  # fmt: skip


def _in_triton(text: str) -> Iterator[Change]:
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    raw = text.encode()

    def at(line: int, column: int) -> int:  # ast counts bytes
        return len(raw[: starts[line - 1] + column].decode())

    def span(node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)

    def between(left: ast.expr, right: ast.expr, symbol: str) -> Iterator[Change]:
        """The operator that stands between two operands, parentheses aside."""
        begin, end = span(left)[1], span(right)[0]
        found = re.search(rf"(?<![<>=!/*]){re.escape(symbol)}(?![<>=/*])", text[begin:end])
        if found:
            start = begin + found.start()
            yield _kind_of(symbol), start, start + len(symbol), SWAPS[symbol]

    for function in ast.parse(text).body:
        if not isinstance(function, ast.FunctionDef) or not function.decorator_list:
            continue
        for node in _inside(function):
            if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
                yield from between(node.left, node.right, _OPERATORS[type(node.op)])
                if isinstance(node.op, ast.BitAnd):  # a mask without one of its terms
                    start, end = span(node)
                    for term in (node.left, node.right):
                        yield "mask", start, end, f"({text[slice(*span(term))]})"
            elif isinstance(node, ast.Compare) and len(node.ops) == 1:
                symbol = _OPERATORS.get(type(node.ops[0]))
                if symbol:
                    yield from between(node.left, node.comparators[0], symbol)
            elif isinstance(node, ast.AugAssign) and type(node.op) in _OPERATORS:
                start, end = span(node.target)[1], span(node.value)[0]
                symbol = _OPERATORS[type(node.op)] + "="
                where = start + text[start:end].index(symbol)
                yield "sum", where, where + len(symbol), "="
                if symbol in SWAPS:
                    yield "sum", where, where + len(symbol), SWAPS[symbol]
            elif isinstance(node, ast.Constant) and type(node.value) is int:
                yield "constant", *span(node), str(node.value + 1)
            elif isinstance(node, ast.Constant) and type(node.value) is float:
                yield "constant", *span(node), _other_float(text[slice(*span(node))])
            elif isinstance(node, ast.Call):
                yield from _of_call(node, text, span)
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                yield "statement", *span(node), "pass"


def _of_call(node: ast.Call, text: str, span: object) -> Iterator[Change]:
    """Memory accesses without their mask, selections the other way round."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    bounds = span
    assert callable(bounds)
    if name in ("load", "store"):
        for keyword in node.keywords:
            if keyword.arg == "mask":
                yield "mask", *bounds(keyword.value), "True"
    if name == "where" and len(node.args) == 3:
        condition, one, other = (text[slice(*bounds(a))] for a in node.args)
        yield "mask", *bounds(node), f"tl.where({condition}, {other}, {one})"


def _inside(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of the body, without its docstring and without annotations."""
    todo: list[ast.AST] = list(function.body)
    if isinstance(function.body[0], ast.Expr) and isinstance(function.body[0].value, ast.Constant):
        todo = todo[1:]
    while todo:
        node = todo.pop()
        yield node
        todo += [
            child
            for name, value in ast.iter_fields(node)
            if name != "annotation"
            for child in (value if isinstance(value, list) else [value])
            if isinstance(child, ast.AST)
        ]
