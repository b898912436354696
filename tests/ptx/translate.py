"""PTX to C++: a statement for every instruction, on the line that the instruction has.

What an instruction does is in :mod:`.opcodes` and in the headers beside it; here is the rest of a
module: its functions, variables, parameters and labels.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

from .opcodes import OPCODES, TYPES, Opcode, in_order

_SIZES = {"pred": 1} | {t: int(re.sub(r"\D", "", t)) // 8 for t in TYPES if t[-1].isdigit()}
_SIZES |= {"f16x2": 4, "bf16x2": 4}
_REGISTERS = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}
# What a register has before anything is written to it: nothing that goes unnoticed.
_POISON = {"bool": "true", "u8": "0xcd", "u16": "0xcdcd", "u32": "0xcdcdcdcdu",
           "u64": "0xcdcdcdcdcdcdcdcdull"}  # fmt: skip

_LAUNCH = "simt::launch_of_current()"
_SPECIAL = {
    f"{name}.{axis}": f"{of}[{i}]"
    for name, of in {"tid": "simt::current->thread", "ntid": f"{_LAUNCH}.block",
                     "ctaid": "block().index", "nctaid": f"{_LAUNCH}.grid"}.items()
    for i, axis in enumerate("xyz")
}  # fmt: skip
_SPECIAL |= {
    "laneid": "simt::current->lane", "warpid": "simt::current->linear / 32",
    "cluster_ctarank": "block().rank", "cluster_nctarank": "cluster_size()",
    "cluster_ctaid.x": "block().rank", "cluster_nctaid.x": "cluster_size()",
    "clusterid.x": "block().index[0] / cluster_size()",
    "nclusterid.x": f"{_LAUNCH}.grid[0] / cluster_size()",
    "envreg1": "grid_workspace() >> 32", "envreg2": "grid_workspace()",
}  # fmt: skip

# Directives that end with their line, and change nothing here.
_LINES = re.compile(
    r"^[ \t]*\.(version|target|address_size|file|loc|maxntid|minnctapersm|reqntid|maxnreg|"
    r"explicitcluster|reqnctapercluster|maxclusterrank)\b.*$",
    re.M,
)
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)?\.(?P<state>shared|global|const|local|param)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?(?:\.ptr\b[\w.\s]*?)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr\b(?:\s*\.(?:global|shared|const|local|align\s+\d+))*\s+)?"
    r"(?P<name>[\w$]+)(?:\[(?P<count>\d*)\])?(?:\s*=\s*(?P<values>.*))?",
    re.S,
)
FUNCTION = re.compile(
    r"(?:\.(?:visible|extern|weak)\s+)*\.(?P<kind>entry|func)\s*(?:\.noreturn\s*)?"
    r"(?:\((?P<results>[^)]*)\)\s*)?(?P<name>[\w$]+)\s*(?:\((?P<parameters>[^)]*)\))?\s*(?P<body>\{)?",
)
#: Instructions after which a basic block begins.
_ENDS_BLOCK = re.compile(r"(?:@!?\s*[%\w$]+\s+)?(?:bra|brx|ret|exit|trap)\b")
_CALL = re.compile(r"(?:\(([^)]*)\)\s*,)?\s*([\w$]+)\s*(?:,\s*\(([^)]*)\))?")


class Untranslatable(ValueError):
    """What of a module is not known here, with its file and line."""


class Statement(NamedTuple):
    """``{``, ``}``, a label with its colon, the head of a function with the brace that opens it, or
    an instruction or directive without its semicolon."""

    text: str
    line: int


class Variable(NamedTuple):
    name: str
    state: str
    align: int
    type: str
    count: int
    values: str | None

    @property
    def size(self) -> int:
        return self.count * _SIZES[self.type]


def _without_comments(text: str) -> str:
    """The same lines, without what says nothing about what happens."""

    def blank(found: re.Match[str]) -> str:
        return "\n" * found[0].count("\n")

    for pattern in (r"/\*.*?\*/", r"//[^\n]*"):
        text = re.sub(pattern, blank, text, flags=re.S)
    text = re.sub(r"^[ \t]*\.section\b.*?^[ \t]*\}", blank, text, flags=re.S | re.M)
    return _LINES.sub("", text)


def statements(text: str) -> Iterator[Statement]:
    """A module's, in order. Braces count as blocks only where a statement may begin."""
    held, first, line = "", 1, 1
    for part in re.split(r"([{};:])", _without_comments(text)):
        if not held.strip():
            blank = len(part) - len(part.lstrip())
            first = line + part.count("\n", 0, blank)
        line += part.count("\n")
        so_far = " ".join(held.split())
        if part in ("{", "}") and not so_far:
            yield Statement(part, line)
        elif part == "{" and FUNCTION.fullmatch(so_far):
            yield Statement(f"{so_far} {{", first)
        elif part == ":" and re.fullmatch(r"[\w$]+", so_far):
            yield Statement(f"{so_far}:", first)
        elif part == ";":
            if so_far:
                yield Statement(so_far, first)
        else:
            held += part
            continue
        held = ""


def split(text: str) -> list[str]:
    """At commas that are in no brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "[{(") - (c in "]})")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def _variable(text: str) -> Variable | None:
    found = _VARIABLE.match(text)
    if not found or found["type"] not in _SIZES:
        return None
    count = int(found["count"] or 0) if found["count"] is not None else 1
    return Variable(found["name"], found["state"], int(found["align"] or _SIZES[found["type"]]),
                    found["type"], count, found["values"])  # fmt: skip


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name.replace("$", "S_"))


@functools.cache
def _rows(mnemonic: str) -> list[tuple[Opcode, dict[str, str]]]:
    found = ((row, row.matches(mnemonic)) for row in OPCODES)
    return [(row, names) for row, names in found if names is not None]


class _Function:
    """The statements of one."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.registers: dict[str, str] = {}
        self.symbols: dict[str, str] = dict(module.symbols)
        self.depth = 1

    # ---- operands ----

    def register(self, name: str) -> str:
        if name == "_":
            return "sink"
        if name not in self.registers:
            raise Untranslatable(f"unknown register {name}")
        return self.registers[name]

    def value(self, text: str, kind: str) -> str:
        """A C++ expression of type ``kind``."""
        if text.startswith("!"):
            return f"!{self.value(text[1:], kind)}"
        if text in self.registers:
            return f"get<{kind}>({self.registers[text]})"
        if text.startswith("%"):
            if text[1:] not in _SPECIAL:
                raise Untranslatable(f"unknown register {text}")
            return f"static_cast<{kind}>({_SPECIAL[text[1:]]})"
        if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            return f"get<{kind}>(0x{found[1]}u)"
        if found := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            return f"get<{kind}>(0x{found[1]}ull)"
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return f"get<{kind}>(0x{int(text.rstrip('U'), 0) & (2**64 - 1):x}ull)"
        if kind in ("f32", "f64") and re.fullmatch(r"-?\d+\.\d*", text):
            return f"static_cast<{kind}>({float(text)!r})"
        return f"static_cast<{kind}>({self.address(f'[{text}]')})"

    def address(self, text: str) -> str:
        """A u64 of ``[register or symbol or number + offset]``."""
        found = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if not found:
            raise Untranslatable(f"unknown operand {text}")
        base, offset = found[1], int(found[2] or "0", 0)
        if base in self.registers:
            base = f"u64{{{self.registers[base]}}}"
        elif base in self.symbols:
            base = self.symbols[base]
        elif base.isdigit():
            base = f"u64{{{base}}}"
        else:
            raise Untranslatable(f"unknown operand {text}")
        return f"{base} + {offset}" if offset >= 0 else f"{base} - {-offset}"

    def values(self, text: str, kind: str) -> str:
        items = split(text[1:-1]) if text.startswith("{") else [text]
        each = ", ".join(self.value(item, kind) for item in items)
        return f"std::array<{kind}, {len(items)}>{{{each}}}"

    # ---- instructions ----

    def instruction(self, text: str) -> str:
        guard = ""
        if found := re.match(r"@(!?)\s*([%\w$]+)\s+", text):
            guard = f"if ({found[1]}{self.register(found[2])}) "
            text = text[found.end() :]
        mnemonic, _, rest = text.partition(" ")
        written, mnemonic = mnemonic, in_order(mnemonic)
        if mnemonic in ("bra", "bra.uni"):
            return f"{guard}goto {_identifier(rest.strip())};"
        if mnemonic in ("call", "call.uni"):
            return guard + self.call(rest)
        operands = split(rest)
        rows = _rows(mnemonic)
        if not rows:
            raise Untranslatable(f"unknown opcode {written}")
        for row, names in rows:
            code = self.apply(row, names, mnemonic, operands)
            if code is not None:
                self.module.used.add(row)
                return f"{guard}{{ {code} }}"
        raise Untranslatable(f"operands of {mnemonic} that are not as in its definition")

    def apply(
        self, row: Opcode, names: dict[str, str], mnemonic: str, operands: list[str]
    ) -> str | None:
        """C++ for an instruction; None where the row is of other operands."""
        wanted = row.operands.split()
        least = sum(not w.endswith("?") for w in wanted)
        if not least <= len(operands) <= len(wanted):
            return None
        fields = dict(names)
        results: list[str] = []
        for want, text in zip(wanted, [*operands, ""][: len(wanted)], strict=False):
            name, _, kind = want.rstrip("?").partition(":")
            if want == "d":
                results = [self.register(r.strip()) for r in re.split("[,|]", text.strip("{}"))]
            elif want.startswith("["):
                fields[want[1:-1]] = self.address(text)
            elif want.startswith("#"):
                if want == "#zero" and text != "0":
                    raise Untranslatable("a barrier of all threads that is not number 0")
                fields[want[1:]] = str(int(text, 0))
            elif not text:
                fields[name] = "1"
            elif kind == "array":
                fields[name] = self.values(text, names["T"])
            elif kind in ("u32s", "f32s"):
                fields[name] = self.values(text, kind[:-1])
            elif text.startswith("{"):
                fields[name] = f"packed({self.values(text, names['T'])})"
            elif kind == "wide":
                fields[name] = self.value(text, f"Wide<{names['T']}>")
            else:
                fields[name] = self.value(text, names.get(kind) or TYPES[kind])
        code = row.code.format(**fields)
        if not results:
            return f"{code};" if code else ""
        if len(results) > 1 and mnemonic.startswith("mov"):
            code = f"unpacked<{len(results)}>({code})"
        return f"put({code}, {', '.join(results)});"

    def call(self, rest: str) -> str:
        found = _CALL.fullmatch(rest.strip())
        if not found or found[2] not in self.module.functions:
            raise Untranslatable(f"a call of what is no function of the module: {rest}")
        given = [*split(found[1] or ""), *split(found[3] or "")]
        return f"F_{_identifier(found[2])}({', '.join(f'P_{_identifier(a)}' for a in given)});"

    # ---- declarations ----

    def declare_registers(self, text: str) -> str:
        found = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", text)
        if not found or found[1] not in _SIZES:
            raise Untranslatable(f"unknown declaration {text}")
        kind = "bool" if found[1] == "pred" else _REGISTERS[_SIZES[found[1]]]
        names: list[str] = []
        for item in split(found[2]):
            if many := re.fullmatch(r"([%\w$]+)<(\d+)>", item):
                names += [f"{many[1]}{i}" for i in range(int(many[2]))]
            else:
                names.append(item)
        self.registers |= {name: f"r_{_identifier(name.lstrip('%'))}" for name in names}
        # A goto may pass an inner block's declarations, if they set nothing.
        start = f" = {_POISON[kind]}" if self.depth == 1 else ""
        return f"{kind} {', '.join(self.registers[name] + start for name in names)};"

    def declare_variable(self, v: Variable) -> str:
        name = _identifier(v.name)
        if v.state == "shared":
            self.symbols[v.name] = self.module.place(v)
            return ""
        letter = "P" if v.state == "param" else "L"
        self.symbols[v.name] = f"reinterpret_cast<u64>({letter}_{name})"
        declared = f"alignas({max(16, v.align)}) char {letter}_{name}[{v.size}];"
        return declared if letter == "P" else f"{declared} std::memset(L_{name}, 0xcd, {v.size});"

    def statement(self, text: str) -> str:
        if text in "{}":
            self.depth += 1 if text == "{" else -1
            return text
        if text.endswith(":"):
            return f"{_identifier(text[:-1])}:;"
        if text.startswith(".reg"):
            return self.declare_registers(text)
        if text.startswith(".pragma"):
            return ""
        if text.startswith("."):
            variable = _variable(text)
            if variable is None:
                raise Untranslatable(f"unknown directive {text.split()[0]}")
            return self.declare_variable(variable)
        return self.instruction(text)


class Module:
    """A translated module. With ``counts`` every thread counts how often it begins each basic
    block; ``leaders`` are the lines at which these begin, in the order of the counters.

    Raises:
        Untranslatable: with what is not known, the name given and the line.
    """

    def __init__(self, text: str, name: str = "module.ptx", *, counts: bool = False) -> None:
        self.name = name
        self.counts = counts
        self.leaders: list[int] = []
        self._leads = True  # the next instruction begins a basic block
        self.symbols: dict[str, str] = {}
        self.functions: set[str] = set()
        self.entries: dict[str, int] = {}
        self.used: set[Opcode] = set()
        self.shared_bytes = 0
        self._lines: dict[int, list[str]] = {}
        self._before: list[str] = []
        function: _Function | None = None
        for statement in statements(text):
            function = self._take(function, statement)

    def _take(self, function: _Function | None, statement: Statement) -> _Function | None:
        """The function that the next statement is in."""
        try:
            if function is None:
                return self._at_module_level(statement)
            if self.counts:
                self._count(statement)
            self._emit(statement.line, function.statement(statement.text))
        except Untranslatable as error:
            where = f"{self.name}:{statement.line}"
            raise Untranslatable(f"{where}: {error}, in `{statement.text}`") from None
        return function if function.depth else None

    def _count(self, statement: Statement) -> None:
        text = statement.text
        if text.endswith(":"):
            self._leads = True
        elif text not in "{}" and not text.startswith("."):
            if self._leads:
                self._emit(statement.line, f"count({len(self.leaders)});")
                self.leaders.append(statement.line)
            self._leads = bool(_ENDS_BLOCK.match(text))

    def _emit(self, line: int, code: str) -> None:
        self._lines.setdefault(line, []).append(code)

    def place(self, v: Variable) -> str:
        """Where a variable is in shared memory; one without a size is what the launch asks for."""
        if v.count:
            at = -(-self.shared_bytes // v.align) * v.align
            self.shared_bytes = at + v.size
            return f"u64{{{at}}}"
        return "kDynamicShared"

    def _at_module_level(self, statement: Statement) -> _Function | None:
        text, line = statement
        if found := FUNCTION.match(text):
            return self._begin(found, line)
        if text.startswith(".pragma"):
            return None
        variable = _variable(text)
        if variable is None:
            raise Untranslatable("unknown directive of a module")
        if variable.state == "shared":
            self.symbols[variable.name] = self.place(variable)
        else:
            self._declare_global(variable)
        return None

    def _declare_global(self, v: Variable) -> None:
        kind, name = TYPES[v.type], f"G_{_identifier(v.name)}"
        values = split((v.values or "").strip("{}"))
        if any(not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", value) for value in values):
            raise Untranslatable("unknown initial values")
        numbers = ", ".join(f"static_cast<{kind}>({value})" for value in values)
        declared = f"alignas({max(16, v.align)}) static {kind} {name}[{v.count}] = {{{numbers}}};"
        self._before.append(declared)
        self.symbols[v.name] = f"reinterpret_cast<u64>({name})"

    def _begin(self, found: re.Match[str], line: int) -> _Function | None:
        """A function, whose body follows unless this only declares it."""
        name = found["name"]
        texts = [*split(found["results"] or ""), *split(found["parameters"] or "")]
        parameters = [v for text in texts if (v := _variable(text))]
        if len(parameters) < len(texts):
            raise Untranslatable("unknown parameters")
        pointers = [f"[[maybe_unused]] char* P_{_identifier(v.name)}" for v in parameters]
        head = f"static void F_{_identifier(name)}({', '.join(pointers)})"
        if found["kind"] == "entry":
            self.entries[name] = len(parameters)
            given = "[[maybe_unused]] const void* const* parameters"
            head = f"static void E_{_identifier(name)}({given})"
        elif name not in self.functions:
            self._before.append(f"{head};")
            self.functions.add(name)
        if not found["body"]:
            return None
        self._emit(line, f"{head} {{")
        self._leads = True
        function = _Function(self)
        for i, v in enumerate(parameters):
            function.symbols[v.name] = f"reinterpret_cast<u64>(P_{_identifier(v.name)})"
            if found["kind"] == "entry":
                self._emit(line, f"{pointers[i]} = parameter(parameters[{i}]);")
        return function

    def cpp(self, table: str = "ptx_entries") -> str:
        """The C++, with a null-terminated ``table`` of kernels at its end."""
        dynamic = -(-self.shared_bytes // 128) * 128
        last = max(self._lines, default=0)
        entries = [f'{{"{name}", ptx::E_{_identifier(name)}, {count}, {dynamic}}},'
                   for name, count in self.entries.items()]  # fmt: skip
        counter = f"inline void count(u32 i) {{ count<{len(self.leaders)}>(i); }}"
        counting = ['#include "counts.h"', counter] if self.counts else []
        exported = 'extern "C" [[gnu::visibility("default")]]'
        lines = [
            '#include "ptx.h"', *counting[:1], "namespace ptx {", *counting[1:],
            f"[[maybe_unused]] constexpr u64 kDynamicShared = {dynamic};",
            *self._before, f'#line 1 "{self.name}"',
            *(" ".join(self._lines.get(i, ())) for i in range(1, last + 1)),
            "}  // namespace ptx", f"{exported} const ptx::Entry {table}[];",
            f"const ptx::Entry {table}[] = {{", *entries, "{nullptr, nullptr, 0, 0}};", "",
        ]  # fmt: skip
        return "\n".join(lines)
