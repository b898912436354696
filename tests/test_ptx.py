"""PTX, executed on a CPU (``tests/ptx``): every opcode does what its manual says, and what is not
known is refused by name."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest

from ptx import compiling
from ptx.cases import MANY, Case, cases, width
from ptx.manual import FORMATS, decode
from ptx.opcodes import TYPES
from ptx.running import HEADER, Kernels
from ptx.translate import Module, Untranslatable, statements

pytestmark = pytest.mark.skipif(not compiling.build.compiler(), reason="no C++ compiler")

CASES = cases()
_REGISTERS = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}
_DTYPES = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def _kernel(name: str, opcode: str, operands: tuple[str, ...], result: str, constant: str) -> str:
    """Each thread loads its operands, executes the instruction, and stores the result."""
    count = len(operands)
    lines = [
        f".visible .entry {name}({', '.join(f'.param .u64 p{i}' for i in range(count + 1))})", "{",
        ".reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .b64 %rd<20>; .reg .pred %p<9>;",
        "mov.u32 %r7, %tid.x; mov.u32 %r8, %ctaid.x; mad.lo.s32 %r7, %r8, 32, %r7;",
    ]  # fmt: skip
    given = []
    for i, kind in enumerate((*operands, result)):
        lines.append(f"ld.param.u64 %rd1{i}, [p{i}];")
        lines.append(f"mad.wide.u32 %rd1{i}, %r7, {width(kind) // 8}, %rd1{i};")
        if i == count:
            break
        register = f"{_REGISTERS[width(kind)]}{i}"
        lines.append(f"ld.global.u{width(kind)} {register}, [%rd1{i}];")
        if kind == "pred":
            lines.append(f"setp.ne.u16 %p{i}, {register}, 0;")
        given.append(f"%p{i}" if kind == "pred" else register)
    to = {"pred": "%p6", "both": "%p6|%p7"}.get(result) or f"{_REGISTERS[width(result)]}6"
    lines.append(f"{opcode} {', '.join([to, *given, *filter(None, [constant])])};")
    if result in ("pred", "both"):
        lines.append("selp.u16 %rs6, 1, 0, %p6;")
        if result == "both":
            lines.append("selp.u16 %rs7, 2, 0, %p7; or.b16 %rs6, %rs6, %rs7;")
        to = "%rs6"
    lines += [f"st.global.u{width(result)} [%rd1{count}], {to};", "ret;", "}"]
    return "\n".join(lines)


_APPROXIMATE = ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh")


@functools.cache
def kernels() -> Kernels:
    texts = [_kernel(f"case{i}", c.opcode, c.operands, c.result, c.constant)
             for i, c in enumerate(CASES)]  # fmt: skip
    texts += [_kernel(f"{name}_approx", f"{name}.approx.f32", ("f32",), "f32", "")
              for name in _APPROXIMATE]  # fmt: skip
    texts += [_kernel("ex2_ftz", "ex2.approx.ftz.f32", ("f32",), "f32", ""),
              _kernel("div_approx", "div.approx.f32", ("f32", "f32"), "f32", ""),
              _kernel("div_full", "div.full.f32", ("f32", "f32"), "f32", ""),
              _kernel("rcp_f64", "rcp.approx.ftz.f64", ("f64",), "f64", "")]  # fmt: skip
    return Kernels("\n".join(texts), "numbers")


def _run(
    kernel: str, operands: tuple[str, ...], result: str, rows: list[tuple[int, ...]], **how: int
) -> list[int]:
    assert len(rows) % 32 == 0
    columns = [np.array(column, _DTYPES[width(kind)])
               for column, kind in zip(zip(*rows, strict=True), operands, strict=True)]  # fmt: skip
    out = np.zeros(len(rows), _DTYPES[width(result)])
    kernels().run(kernel, *columns, out, grid=len(rows) // 32, **how)
    return [int(x) for x in out]


def _is_nan(bits: int, kind: str) -> bool:
    return kind in FORMATS and decode(bits, kind).kind == "nan"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_numbers(case: Case) -> None:
    rows = case.inputs()
    assert len(rows) == MANY
    got = _run(f"case{CASES.index(case)}", case.operands, case.result, rows)
    wrong = []
    for row, have in zip(rows, got, strict=True):
        want = case.function(*row)
        both = _is_nan(want, case.result) and _is_nan(have, case.result)
        if have != want and not (both and not case.strict):
            wrong.append(f"{[hex(x) for x in row]}: {have:#x}, not {int(want):#x}")
    assert not wrong, f"{len(wrong)} of {MANY}: {wrong[:4]}"


# ---- approximate functions ----


def _ulp(y: float) -> float:
    """Of an f32 near y."""
    return 2.0 ** max(math.frexp(y)[1] - 24, -149)


# The exact function; and of an operand and its result what error the manual allows: PTX ISA 9.1,
# sections 9.7.3.21, .20, .13, .15, .16, .18, .19 and .22.
_BOUNDS: dict[str, Any] = {
    "ex2": (lambda x: 2.0**x, lambda x, y: max(y * 2**-22, 2.5 * _ulp(y))),
    "lg2": (math.log2, lambda x, y: 2**-22 * (1 if 0.5 < x < 2 else abs(y))),
    "rcp": (lambda x: 1 / x, lambda x, y: _ulp(y)),
    "sqrt": (math.sqrt, lambda x, y: y * 2**-23),
    "rsqrt": (lambda x: 1 / math.sqrt(x), lambda x, y: y * 2**-22.9),
    "sin": (math.sin, lambda x, y: 2**-20.5 if abs(x) <= 2 * math.pi else 2**-14.7),
    "cos": (math.cos, lambda x, y: 2**-20.5 if abs(x) <= 2 * math.pi else 2**-14.7),
    "tanh": (math.tanh, lambda x, y: abs(y) * 2**-11),
}


def _drawn(name: str, count: int = 640) -> list[float]:
    draw = np.random.default_rng(len(name))
    if name in ("ex2", "tanh", "sin", "cos"):
        most = {"ex2": 120.0, "tanh": 3.0}.get(name, 6.0)
        x = draw.uniform(-most, most, count)
        if name in ("sin", "cos"):
            x[: count // 2] *= 50
    else:
        x = np.exp2(draw.uniform(-60, 60, count))
        x[: count // 2] = draw.uniform(0.4, 2.5, count // 2)
    return [float(v) for v in x.astype(np.float32)]


def _bits(values: list[float]) -> list[tuple[int, ...]]:
    return [(int(b),) for b in np.array(values, np.float32).view(np.uint32)]


def _as_floats(bits: list[int]) -> list[float]:
    return [float(v) for v in np.array(bits, np.uint32).view(np.float32)]


@pytest.mark.parametrize("name", _BOUNDS)
def test_approximate_functions_err_as_far_as_they_may(name: str) -> None:
    """Within the bound, and to more than half of it somewhere; another seed, other errors; the
    same seed, the same ones."""
    exact, bound = _BOUNDS[name]
    values = _drawn(name)
    rows = _bits(values)
    results = {}
    for seed in range(5):
        got = _run(f"{name}_approx", ("f32",), "f32", rows, approximations=seed)
        assert got == _run(f"{name}_approx", ("f32",), "f32", rows, approximations=seed, seed=1)
        # Past the bound itself by what float64 rounds.
        errors = [(y - exact(x)) / bound(x, exact(x))
                  for x, y in zip(values, _as_floats(got), strict=True)]  # fmt: skip
        assert max(map(abs, errors)) <= 1 + 1e-6
        high, low = max(errors) > 0.5, min(errors) < -0.5
        assert (high, low) == {1: (True, False), 2: (False, True)}.get(seed % 4, (True, True))
        results[seed] = got
    assert len({tuple(got) for got in results.values()}) == 5


@pytest.mark.parametrize("name", ["div_approx", "div_full"])
def test_approximate_quotients(name: str) -> None:
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((2, 640)).astype(np.float32)
    rows = [(x[0], y[0]) for x, y in zip(_bits(list(a)), _bits(list(b)), strict=True)]
    errors = []
    for seed in range(4):
        got = _as_floats(_run(name, ("f32", "f32"), "f32", rows, approximations=seed))
        exact = [float(x) / float(y) for x, y in zip(a, b, strict=True)]
        errors += [(g - e) / _ulp(e) for g, e in zip(got, exact, strict=True)]
    assert 1.5 < max(map(abs, errors)) <= 2 + 1e-6


def test_what_approximate_functions_make_of_edges() -> None:
    """Zeros, infinities and NaN are exact."""
    inf, nan = math.inf, math.nan
    table = {
        "ex2_approx": [(-inf, 0.0), (-0.0, 1.0), (0.0, 1.0), (inf, inf), (nan, nan), (-200.0, 0.0),
                       (128.5, inf)],
        "ex2_ftz": [(-127.0, 0.0), (1e-40, 1.0)],
        "lg2_approx": [(-inf, nan), (-1.0, nan), (-0.0, -inf), (0.0, -inf), (inf, inf), (nan, nan)],
        "rcp_approx": [(-inf, -0.0), (-0.0, -inf), (0.0, inf), (inf, 0.0), (nan, nan)],
        "sqrt_approx": [(-inf, nan), (-1.0, nan), (-0.0, -0.0), (0.0, 0.0), (inf, inf), (nan, nan)],
        "rsqrt_approx": [(-inf, nan), (-1.0, nan), (-0.0, -inf), (0.0, inf), (inf, 0.0)],
        "sin_approx": [(-inf, nan), (-0.0, -0.0), (0.0, 0.0), (inf, nan), (nan, nan)],
        "cos_approx": [(-inf, nan), (inf, nan), (nan, nan)],
        "tanh_approx": [(-0.0, -0.0), (0.0, 0.0), (nan, nan)],
    }  # fmt: skip
    for (kernel, pairs), seed in itertools.product(table.items(), range(4)):
        values = [x for x, _ in pairs] + [0.0] * (32 - len(pairs))
        got = _as_floats(_run(kernel, ("f32",), "f32", _bits(values), approximations=seed))
        assert [(x, repr(y)) for x, y in zip(values, got[: len(pairs)], strict=False)] == [
            (x, repr(y)) for x, y in pairs
        ], kernel
    # A reciprocal that is subnormal is none.
    pairs = [(1.0, 2.0**127), (inf, -(2.0**127)), (0.0, 3.0), (1.0, 0.0)] * 8
    rows = [(_bits([x])[0][0], _bits([y])[0][0]) for x, y in pairs]
    assert [repr(x) for x in _as_floats(_run("div_approx", ("f32", "f32"), "f32", rows))][:4] == [
        "0.0", "nan", "0.0", "inf",
    ]  # fmt: skip


def test_powers_of_two_are_exact() -> None:
    """CUDA's erf(double) takes 2^n from ex2.approx, to twice as many bits: it has to be exact."""
    exponents = [float(n) for n in range(-126, 128)] + [0.0, 0.0]
    for kernel, seed in itertools.product(("ex2_approx", "ex2_ftz"), range(4)):
        got = _run(kernel, ("f32",), "f32", _bits(exponents), approximations=seed)
        assert _as_floats(got) == [2.0**n for n in exponents]


def test_approximate_reciprocals_of_doubles() -> None:
    """Twenty bits of mantissa of either, and zeros below."""
    values = [*np.random.default_rng(0).standard_normal(28), 0.0, -0.0, math.inf, 1e-310]
    rows = [(int(b),) for b in np.array(values, np.float64).view(np.uint64)]
    got = _run("rcp_f64", ("f64",), "f64", rows)
    assert all(not bits & 0xFFFFFFFF for bits in got)
    results = np.array(got, np.uint64).view(np.float64)
    assert np.all(np.abs(results[:28] * np.array(values[:28]) - 1) <= 2.0**-19)
    assert [repr(float(x)) for x in results[28:]] == ["inf", "-inf", "0.0", "inf"]


# ---- the translator itself ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("frobnicate.s32 %r1, %r2;", r"m.ptx:6: unknown opcode frobnicate.s32, in `frobnicate"),
        ("add.s33 %r1, %r2, %r3;", "m.ptx:6: unknown opcode add.s33"),
        ("@%p0 add.s32 %r1, %r9, %r3;", "m.ptx:6: unknown register %r9"),
        ("add.s32 %r9, %r1, %r3;", "m.ptx:6: unknown register %r9"),
        ("mov.u32 %r1, %smid;", "m.ptx:6: unknown register %smid"),
        ("add.s32 %r1, %r2;", "m.ptx:6: operands of add.s32 that are not as in its definition"),
        ("bar.sync 1;", "m.ptx:6: a barrier of all threads that is not number 0"),
        ("call.uni (r), elsewhere, (p);", "m.ptx:6: a call of what is no function of the module"),
        (".tex .u64 t;", "m.ptx:6: unknown directive .tex"),
        ("ld.global.u32 %r1, [nowhere];", "m.ptx:6: unknown operand .nowhere."),
    ],
)
def test_what_is_not_known_is_named(line: str, message: str) -> None:
    text = f"{HEADER}.entry k() {{ .reg .pred %p<2>;\n.reg .b32 %r<4>; /* two\n*/ {line} ret; }}"
    with pytest.raises(Untranslatable, match=message):
        Module(text, "m.ptx")


def test_what_is_no_directive_of_a_module_is_named() -> None:
    with pytest.raises(Untranslatable, match=r"m.ptx:2: unknown directive of a module, in `.tex"):
        Module(".version 9.0\n.tex .u64 t;", "m.ptx")


def test_statements_have_the_lines_of_the_text() -> None:
    text = "// a\n.entry k(\n.param .u64 p) // b\n{\n\n  mov.b64 {%r1,\n%r2}, %rd1; L: bra\nL;\n}"
    assert [(s.line, s.text) for s in statements(text)] == [
        (2, ".entry k( .param .u64 p) {"), (6, "mov.b64 {%r1, %r2}, %rd1"), (7, "L:"),
        (7, "bra L"), (9, "}"),
    ]  # fmt: skip


def test_types_are_those_of_the_manual() -> None:
    assert {kind for kind in TYPES if not kind.startswith(("f", "bf", "pred"))} == {
        f"{letter}{bits}" for letter in "bsu" for bits in (8, 16, 32, 64)
    }


def test_blank_lines_before_what_is_left_out_are_lines() -> None:
    text = (
        ".entry k()\n{\n\n\n.loc 1 2 3\n\nret;\n}\n\n.section .debug_str\n{\n}\n\n.entry l()\n{\n}"
    )
    assert [(s.line, s.text) for s in statements(text)] == [
        (1, ".entry k() {"), (7, "ret"), (8, "}"), (14, ".entry l() {"), (16, "}"),
    ]  # fmt: skip


def test_nothing_is_counted_unless_asked_for() -> None:
    text = f"{HEADER}.entry k()\n{{\n.reg .pred %p<2>;\nL: @%p1 bra L;\nret;\n}}"
    assert "count" not in Module(text).cpp()
    module = Module(text, counts=True)
    assert module.leaders == [7, 8]
    assert module.cpp().count("count(") == 3  # its definition, and the two
