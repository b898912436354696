"""Every opcode that works on numbers alone, as a case with operands and what the manual says."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from . import manual
from .manual import FORMATS

MANY = 160  # operands of each case, some of them edges
_EDGES = {
    "f16": (0, 0x8000, 1, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0x7C00, 0xFC00, 0x7E00),
    "bf16": (0, 0x8000, 1, 0x7F, 0x80, 0x3F80, 0xBF80, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0),
    "f32": (0, 0x80000000, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x3F800000, 0xBF800000, 0x3F000000,
            0x3FC00000, 0x40200000, 0x4B000001, 0x4F000000, 0xCF000000, 0x4F800000, 0x5F000000,
            0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7E800000, 0xFE900000,
            0x477FF000, 0x477FEFFF, 0x33000000, 0x33000001, 0x38800000, 0x387FE000),
    "f64": (0, 1 << 63, 1, 0x3FF0000000000000, 0xBFF0000000000000, 0x3FE0000000000000,
            0x0010000000000000, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000, 0xFFF0000000000000,
            0x7FF8000000000000, 0x3FF8000000000000, 0x41DFFFFFFFE00000, 0xC3E0000000000000,
            0x47EFFFFFE0000000, 0x47EFFFFFF0000000, 0x36A0000000000000, 0x3810000000000000),
}  # fmt: skip


def width(kind: str) -> int:
    """In bits; of predicates as they are stored."""
    odd = {"pred": 8, "both": 8, "count": 32, "f16x2": 32, "bf16x2": 32, "tf32": 32}
    return odd.get(kind) or int("".join(c for c in kind if c.isdigit()))


def masked(value: int, kind: str) -> int:
    return value & (2 ** width(kind) - 1)


def as_integer(bits: int, kind: str) -> int:
    """With the sign that the type has."""
    n = width(kind)
    return bits - 2**n if kind.startswith("s") and bits >> (n - 1) else bits


def limits(kind: str) -> tuple[int, int]:
    n = width(kind)
    return (-(2 ** (n - 1)), 2 ** (n - 1) - 1) if kind.startswith("s") else (0, 2**n - 1)


class Case(NamedTuple):
    """An instruction: types of operands and of the result, and its function on bits. ``strict``:
    which bits a NaN has matters."""

    opcode: str
    operands: tuple[str, ...]
    result: str
    function: Callable[..., int]
    constant: str = ""  # the last operand, as text
    strict: bool = False

    @property
    def name(self) -> str:
        return f"{self.opcode} {self.constant}".strip()

    def inputs(self) -> list[tuple[int, ...]]:
        """Edges against each other, and numbers at random."""
        draw = random.Random(zlib.crc32(self.name.encode()))
        columns = [self._column(i, draw) for i in range(len(self.operands))]
        divides = self.opcode.startswith(("div", "rem")) and self.operands[0] not in FORMATS
        if divides:
            columns[1] = [x or 3 for x in columns[1]]
        return list(zip(*columns, strict=True))

    def _column(self, place: int, draw: random.Random) -> list[int]:
        return self._drawn(self.operands[place], place, draw)

    def _drawn(self, kind: str, place: int, draw: random.Random) -> list[int]:
        if kind in ("f16x2", "bf16x2"):
            low, high = (self._drawn(kind[:-2], place, draw) for _ in range(2))
            return [a | b << 16 for a, b in zip(low, high[::-1], strict=True)]
        n = width(kind)
        if kind == "pred":
            return [draw.randrange(2) for _ in range(MANY)]
        if kind in FORMATS:
            edges = list(_EDGES[kind])
            f = FORMATS[kind]
            # Near one, so that sums and products do not all overflow or vanish.
            near = [
                (f.bias + draw.randrange(-6, 7)) << f.mantissa
                | draw.getrandbits(f.mantissa)
                | draw.getrandbits(1) << (f.exponent + f.mantissa)
                for _ in range(MANY)
            ]
        elif kind == "count":
            return [draw.choice((0, 1, 5, 31, 32, 33, 63, 64, 255, 300)) for _ in range(MANY)]
        else:
            edges = [0, 1, 2**n - 1, 2 ** (n - 1), 2 ** (n - 1) - 1, 2 ** (n - 1) + 1, 7]
            near = [masked(draw.randrange(-100, 100), kind) for _ in range(MANY)]
        drawn = [draw.choice((draw.choice(edges), draw.getrandbits(n), draw.choice(near)))
                 for _ in range(MANY)]  # fmt: skip
        # Each edge of the first operand with the same one of the second, and with both neighbours.
        near_by = (0, 1, -1, 2, -2, 3, -3)
        return [edges[(i + near_by[i // len(edges) % 7] * place) % len(edges)]
                if i < MANY * 5 // 8 else x for i, x in enumerate(drawn)]  # fmt: skip


def _on_integers(opcode: str, kinds: tuple[str, ...], result: str, f: Callable[..., int]) -> Case:
    def function(*bits: int) -> int:
        return masked(f(*(as_integer(b, k) for b, k in zip(bits, kinds, strict=True))), result)

    return Case(opcode, kinds, result, function)


def _truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _wide(kind: str) -> str:
    return f"{kind[0]}{2 * width(kind)}"


def _bit(x: int, i: int) -> int:
    return x >> i & 1


def _shifted(x: int, n: int, kind: str) -> int:
    return masked(as_integer(x, kind) >> min(n, width(kind)), kind)


def _extracted(kind: str) -> Callable[[int, int, int], int]:
    def f(a: int, p: int, n: int) -> int:
        size = width(kind)
        p, n = p & 255, n & 255
        sign = _bit(a, min(p + n - 1, size - 1)) if kind[0] == "s" and n else 0
        bits = [_bit(a, p + i) if i < n and p + i < size else sign for i in range(size)]
        return sum(b << i for i, b in enumerate(bits))

    return f


def _inserted(kind: str) -> Callable[[int, int, int, int], int]:
    def f(a: int, b: int, p: int, n: int) -> int:
        field = ((1 << (n & 255)) - 1) << (p & 255)
        return masked((b & ~field) | (a << (p & 255) & field), kind)

    return f


def _permuted(a: int, b: int, c: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    chosen = []
    for i in range(4):
        selector = c >> 4 * i & 15
        byte = source[selector & 7]
        chosen.append((255 if byte & 128 else 0) if selector & 8 else byte)
    return int.from_bytes(bytes(chosen), "little")


def _integers() -> Iterator[Case]:
    for k in ("s16", "u16", "s32", "u32", "s64", "u64"):
        (low, high), size = limits(k), width(k)
        two, three = (k, k), (k, k, k)
        yield _on_integers(f"add.{k}", two, k, lambda a, b: a + b)
        yield _on_integers(f"sub.{k}", two, k, lambda a, b: a - b)
        yield _on_integers(f"mul.lo.{k}", two, k, lambda a, b: a * b)
        yield _on_integers(f"mul.hi.{k}", two, k, lambda a, b, n=size: a * b >> n)
        yield _on_integers(f"mad.lo.{k}", three, k, lambda a, b, c: a * b + c)
        yield _on_integers(f"mad.hi.{k}", three, k, lambda a, b, c, n=size: (a * b >> n) + c)
        yield _on_integers(f"div.{k}", two, k, _truncated)
        yield _on_integers(f"rem.{k}", two, k, lambda a, b: a - _truncated(a, b) * b)
        yield _on_integers(f"min.{k}", two, k, min)
        yield _on_integers(f"max.{k}", two, k, max)
        if k[0] == "s":
            yield _on_integers(f"neg.{k}", (k,), k, lambda a: -a)
            yield _on_integers(f"abs.{k}", (k,), k, abs)
        if width(k) < 64:
            w = _wide(k)
            yield _on_integers(f"mul.wide.{k}", two, w, lambda a, b: a * b)
            yield _on_integers(f"mad.wide.{k}", (k, k, w), w, lambda a, b, c: a * b + c)
        if k == "s32":
            for name, sign in (("add", 1), ("sub", -1)):
                yield _on_integers(f"{name}.sat.s32", two, k, lambda a, b, sign=sign, low=low,
                                   high=high: min(max(a + sign * b, low), high))  # fmt: skip
        yield Case(f"shr.{k}", (k, "count"), k, lambda x, n, k=k: _shifted(x, n, k))
    for k in ("b16", "b32", "b64", "pred"):
        yield Case(f"and.{k}", (k, k), k, lambda a, b: a & b)
        yield Case(f"or.{k}", (k, k), k, lambda a, b: a | b)
        yield Case(f"xor.{k}", (k, k), k, lambda a, b: a ^ b)
        yield Case(f"not.{k}", (k,), k, lambda a, k=k: 1 - a if k == "pred" else masked(~a, k))
        yield Case(f"mov.{k}", (k,), k, lambda a: a)
        if k != "pred":
            yield Case(f"shl.{k}", (k, "count"), k, lambda a, n, k=k: masked(a << n, k))
            yield Case(f"selp.{k}", (k, k, "pred"), k, lambda a, b, p: a if p else b)
            yield Case(f"setp.eq.{k}", (k, k), "pred", lambda a, b: a == b)
    for k in ("b32", "b64"):
        n = width(k)
        yield Case(f"popc.{k}", (k,), "u32", lambda a: a.bit_count())
        yield Case(f"clz.{k}", (k,), "u32", lambda a, n=n: n - a.bit_length())
        yield Case(f"brev.{k}", (k,), k, lambda a, n=n: int(f"{a:0{n}b}"[::-1], 2))
        yield Case(f"bfi.{k}", (k, k, "count", "count"), k, _inserted(k))
    for k in ("s32", "u32", "s64", "u64"):
        yield Case(f"bfe.{k}", (k, "count", "count"), k, _extracted(k))
    two, three = ("b32", "b32", "count"), ("b32", "b32", "b32")
    for mode, most in (("wrap", lambda n: n & 31), ("clamp", lambda n: min(n, 32))):
        yield Case(f"shf.l.{mode}.b32", two, "b32", lambda a, b, n, most=most:
                   masked((b << 32 | a) << most(n) >> 32, "b32"))  # fmt: skip
        yield Case(f"shf.r.{mode}.b32", two, "b32", lambda a, b, n, most=most:
                   masked((b << 32 | a) >> most(n), "b32"))  # fmt: skip
    yield Case("prmt.b32", three, "b32", _permuted)
    for table in (0xE8, 0x96, 0x1B):
        yield Case(
            "lop3.b32", three, "b32",
            lambda a, b, c, table=table: sum(
                _bit(table, _bit(a, i) << 2 | _bit(b, i) << 1 | _bit(c, i)) << i for i in range(32)
            ),
            f"{table}",
        )  # fmt: skip


def _floats() -> Iterator[Case]:
    for k, mode in itertools.product(("f32", "f64"), ("rn", "rz", "rm", "rp")):
        for name, count in (("add", 2), ("sub", 2), ("mul", 2), ("fma", 3), ("div", 2), ("rcp", 1),
                            ("sqrt", 1)):  # fmt: skip
            yield Case(f"{name}.{mode}.{k}", (k,) * count, k,
                       lambda *x, name=name, k=k, mode=mode: manual.arithmetic(name, k, mode, *x),
                       strict=k == "f32")  # fmt: skip
    for name, count in (("add", 2), ("sub", 2), ("mul", 2), ("fma", 3), ("div", 2), ("rcp", 1),
                        ("sqrt", 1)):  # fmt: skip

        def flushed(*x: int, name: str = name) -> int:
            return manual.ftz(manual.arithmetic(name, "f32", "rn", *map(manual.ftz, x)))

        yield Case(f"{name}.rn.ftz.f32", ("f32",) * count, "f32", flushed, strict=True)
        if name in ("add", "sub", "mul", "fma"):
            yield Case(f"{name}.rn.ftz.sat.f32", ("f32",) * count, "f32",
                       lambda *x, f=flushed: manual.saturated(f(*x)), strict=True)  # fmt: skip
    for k in ("f32", "f64"):
        sign = FORMATS[k].sign
        yield Case(f"add.{k}", (k, k), k, lambda a, b, k=k: manual.arithmetic("add", k, "rn", a, b))
        yield Case(f"mov.{k}", (k,), k, lambda a: a, strict=True)
        yield Case(f"neg.{k}", (k,), k, lambda a, sign=sign: a ^ sign)
        yield Case(f"abs.{k}", (k,), k, lambda a, sign=sign: a & ~sign)
        yield Case(f"selp.{k}", (k, k, "pred"), k, lambda a, b, p: a if p else b, strict=True)
        yield Case(f"copysign.{k}", (k, k), k, lambda a, b, s=sign: b & ~s | a & s, strict=True)
        for name in ("min", "max"):
            yield Case(f"{name}.{k}", (k, k), k,
                       lambda a, b, name=name, k=k: manual.extreme(name, False, k, a, b),
                       strict=k == "f32")  # fmt: skip
    yield Case("abs.ftz.f32", ("f32",), "f32", lambda a: manual.ftz(a) & 0x7FFFFFFF)
    for name in ("min", "max"):
        yield Case(f"{name}.NaN.f32", ("f32", "f32"), "f32",
                   lambda a, b, name=name: manual.extreme(name, True, "f32", a, b),
                   strict=True)  # fmt: skip


def _in_pairs(f: Callable[..., int]) -> Callable[..., int]:
    """Of the lower and of the upper half of each operand; of predicates one bit each."""

    def g(*words: int, shift: int = 16) -> int:
        return f(*(w & 0xFFFF for w in words)) | f(*(w >> 16 for w in words)) << shift

    return g


def _halves() -> Iterator[Case]:
    """Alone and in pairs; a NaN has always the same bits."""

    def each(opcode: str, kind: str, count: int, f: Callable[..., int]) -> Iterator[Case]:
        yield Case(f"{opcode}.{kind}", (kind,) * count, kind, f, strict=True)
        yield Case(f"{opcode}.{kind}x2", (f"{kind}x2",) * count, f"{kind}x2", _in_pairs(f))

    for k in ("f16", "bf16"):
        for name, count in (("add", 2), ("sub", 2), ("mul", 2), ("fma", 3)):
            mode = ".rn" if name == "fma" else ""

            def f(*x: int, name: str = name, k: str = k) -> int:
                return manual.arithmetic(name, k, "rn", *x)

            yield from each(f"{name}{mode}", k, count, f)
            if k == "f16":

                def flushed(*x: int, f: Callable[..., int] = f) -> int:
                    return manual.ftz(f(*(manual.ftz(v, "f16") for v in x)), "f16")

                yield from each(f"{name}{mode}.ftz.sat", k, count,
                                lambda *x, f=flushed: manual.saturated(f(*x), "f16"))  # fmt: skip
        yield from each("fma.rn.relu", k, 3, lambda *x, k=k: manual.relu(
            manual.arithmetic("fma", k, "rn", *x), k))  # fmt: skip
        yield from each("neg", k, 1, lambda a: a ^ 0x8000)
        yield from each("abs", k, 1, lambda a: a & 0x7FFF)
        for name in ("min", "max"):
            for suffix in ("", ".NaN"):
                yield from each(f"{name}{suffix}", k, 2,
                                lambda a, b, name=name, k=k, wins=bool(suffix):
                                manual.extreme(name, wins, k, a, b))  # fmt: skip
        for how in ("eq", "lt", "geu", "nan"):

            def compare(a: int, b: int, how: str = how, k: str = k) -> int:
                return int(manual.compare(how, k, a, b))

            yield Case(f"setp.{how}.{k}", (k, k), "pred", compare)
            yield Case(f"setp.{how}.{k}x2", (f"{k}x2", f"{k}x2"), "both",
                       lambda a, b, f=compare: _in_pairs(f)(a, b, shift=1))  # fmt: skip
        yield Case(f"setp.lt.and.{k}", (k, k, "pred"), "pred",
                   lambda a, b, p, k=k: manual.compare("lt", k, a, b) and p)  # fmt: skip


def _comparisons() -> Iterator[Case]:
    signs: dict[str, Callable[[int, int], bool]] = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    }  # fmt: skip
    unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    for k in ("s16", "u16", "s32", "u32", "s64", "u64"):
        names = list(signs) + (list(unsigned) if k == "u32" else [])
        for name in names:
            f = signs[unsigned.get(name, name)]
            yield Case(f"setp.{name}.{k}", (k, k), "pred",
                       lambda a, b, f=f, k=k: f(as_integer(a, k), as_integer(b, k)))  # fmt: skip
    for k in ("f32", "f64"):
        for how in ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu",
                    "num", "nan"):  # fmt: skip
            yield Case(f"setp.{how}.{k}", (k, k), "pred",
                       lambda a, b, how=how, k=k: manual.compare(how, k, a, b))  # fmt: skip
    joins: dict[str, Callable[[bool, int], int]] = {
        "and": lambda x, p: x & p, "or": lambda x, p: x | p, "xor": lambda x, p: x ^ p,
    }  # fmt: skip
    for name, join in joins.items():
        yield Case(f"setp.lt.{name}.s32", ("s32", "s32", "pred"), "pred",
                   lambda a, b, p, join=join: join(
                       as_integer(a, "s32") < as_integer(b, "s32"), p))  # fmt: skip
        yield Case(f"setp.gtu.{name}.ftz.f32", ("f32", "f32", "pred"), "pred",
                   lambda a, b, p, join=join: join(
                       manual.compare("gtu", "f32", manual.ftz(a), manual.ftz(b)), p))  # fmt: skip


def _to_float(to: str, mode: str, kind: str) -> Callable[[int], int]:
    def f(bits: int) -> int:
        value = as_integer(bits, kind)
        return manual.encode(manual.Fraction(abs(value)), value < 0, to, mode)

    return f


def _conversions() -> Iterator[Case]:
    every = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")
    for to, of in itertools.product(every, every):
        if to == of:
            continue
        low, high = limits(to)
        yield _on_integers(f"cvt.{to}.{of}", (of,), to, lambda a: a)
        if (to, of) in (("u8", "s32"), ("s16", "s32"), ("s32", "u32"), ("u32", "s64"),
                        ("s8", "u64"), ("u64", "s16")):  # fmt: skip
            yield _on_integers(f"cvt.sat.{to}.{of}", (of,), to,
                               lambda a, low=low, high=high: min(max(a, low), high))  # fmt: skip
    for to, of in itertools.product(("f32", "f64"), ("s32", "u32", "s64", "u64", "s16", "u8")):
        for mode in ("rn", "rz", "rm", "rp") if to == "f32" or of[1:] == "64" else ("rn",):
            yield Case(f"cvt.{mode}.{to}.{of}", (of,), to, _to_float(to, mode, of))
    for to, of in itertools.product(("f16", "bf16"), ("s16", "u16")):
        yield Case(f"cvt.rn.{to}.{of}", (of,), to, _to_float(to, "rn", of))
    for of, mode in itertools.product(("f32", "f64", "f16", "bf16"), ("rni", "rzi", "rmi", "rpi")):
        for to in ("s32", "u32", "s64", "u16") if of == "f32" else ("s32",):
            low, high = limits(to)
            yield Case(f"cvt.{mode}.{to}.{of}", (of,), to,
                       lambda a, mode=mode, of=of, to=to, low=low, high=high: masked(
                           manual.to_integer(mode, a, of, low, high), to))  # fmt: skip
        if of in ("f32", "f64"):
            yield Case(f"cvt.{mode}.{of}.{of}", (of,), of,
                       lambda a, mode=mode, of=of: manual.to_integral(mode, a, of))  # fmt: skip
    yield Case("cvt.sat.f32.f32", ("f32",), "f32", manual.saturated)
    yield Case("cvt.f64.f32", ("f32",), "f64", lambda a: manual.convert(a, "f32", "f64"))
    yield Case("cvt.f32.f16", ("f16",), "f32", lambda a: manual.convert(a, "f16", "f32"))
    yield Case("cvt.f32.bf16", ("bf16",), "f32", lambda a: manual.convert(a, "bf16", "f32"))
    for mode in ("rn", "rz", "rm", "rp"):
        yield Case(f"cvt.{mode}.f32.f64", ("f64",), "f32",
                   lambda a, mode=mode: manual.convert(a, "f64", "f32", mode))  # fmt: skip
    for to, mode in itertools.product(("f16", "bf16"), ("rn", "rz")):
        yield Case(f"cvt.{mode}.{to}.f32", ("f32",), to,
                   lambda a, to=to, mode=mode: manual.convert(a, "f32", to, mode))  # fmt: skip
        yield Case(f"cvt.{mode}.{to}x2.f32", ("f32", "f32"), f"{to}x2",
                   lambda a, b, to=to, mode=mode: manual.convert(a, "f32", to, mode) << 16
                   | manual.convert(b, "f32", to, mode))  # fmt: skip

    def tf32(a: int) -> int:
        n = manual.decode(a, "f32")
        if n.kind != "finite":
            return manual.NAN["f32"] if n.kind == "nan" else a
        # Half a unit more, cut off: halves away from zero.
        return (a + 0x1000) >> 13 << 13

    yield Case("cvt.rna.tf32.f32", ("f32",), "tf32", tf32)


def cases() -> list[Case]:
    return [*_integers(), *_floats(), *_halves(), *_comparisons(), *_conversions()]
