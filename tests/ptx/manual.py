"""What the PTX manual says of instructions on numbers: in Python's integers and fractions, apart
from the translator. Floating-point values are given and returned as bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple


class Format(NamedTuple):
    """A floating-point format."""

    exponent: int  # bits
    mantissa: int  # bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def infinity(self) -> int:
        return (2**self.exponent - 1) << self.mantissa

    @property
    def sign(self) -> int:
        return 1 << (self.exponent + self.mantissa)


FORMATS = {"f16": Format(5, 10), "bf16": Format(8, 7), "f32": Format(8, 23), "f64": Format(11, 52)}
#: The bits of a NaN that comes out of an instruction; of f64 any NaN will do.
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FF8000000000000}


class Number(NamedTuple):
    """A decoded value: ``kind`` is ``nan``, ``inf`` or ``finite``."""

    kind: str
    negative: bool
    size: Fraction = Fraction(0)

    @property
    def value(self) -> Fraction:
        return -self.size if self.negative else self.size


def decode(bits: int, of: str) -> Number:
    f = FORMATS[of]
    negative, size = bool(bits & f.sign), bits & (f.sign - 1)
    if size >= f.infinity:
        return Number("inf" if size == f.infinity else "nan", negative)
    exponent, mantissa = size >> f.mantissa, size & ((1 << f.mantissa) - 1)
    if exponent:
        mantissa |= 1 << f.mantissa
    scale = max(exponent, 1) - f.bias - f.mantissa
    return Number("finite", negative, Fraction(mantissa) * Fraction(2) ** scale)


def encode(size: Fraction, negative: bool, of: str, mode: str = "rn") -> int:
    """The bits of a number rounded to the format: to nearest and even, to zero, down or up."""
    f = FORMATS[of]
    sign = f.sign if negative else 0
    if size == 0:
        return sign
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    exponent = max(exponent, 1 - f.bias)
    units = size / Fraction(2) ** (exponent - f.mantissa)
    whole, rest = divmod(units.numerator, units.denominator)
    fraction = Fraction(rest, units.denominator)
    away = {"rz": False, "rm": negative, "rp": not negative}
    if mode == "rn":
        up = fraction > Fraction(1, 2) or (fraction == Fraction(1, 2) and whole % 2 == 1)
    else:
        up = away[mode] and fraction > 0
    whole += up
    # The implicit bit carries into the exponent.
    bits = ((exponent + f.bias - 1) << f.mantissa) + whole
    if bits >= f.infinity:
        bits = f.infinity if mode == "rn" or away[mode] else f.infinity - 1
    return sign | bits


def _signed_sum(a: Number, b: Number, of: str, mode: str) -> int:
    if "inf" in (a.kind, b.kind):
        if a.kind == b.kind and a.negative != b.negative:
            return NAN[of]
        negative = a.negative if a.kind == "inf" else b.negative
        return FORMATS[of].infinity | (FORMATS[of].sign if negative else 0)
    total = a.value + b.value
    if total == 0:
        same = a.size == 0 and a.negative == b.negative
        negative = a.negative if same else mode == "rm"
        return FORMATS[of].sign if negative else 0
    return encode(abs(total), total < 0, of, mode)


def _opposite(a: Number) -> Number:
    return a._replace(negative=not a.negative)


def _product(a: Number, b: Number) -> Number:
    negative = a.negative != b.negative
    if "nan" in (a.kind, b.kind):
        return Number("nan", False)
    if "inf" in (a.kind, b.kind):
        other = b if a.kind == "inf" else a
        nothing = other.kind == "finite" and other.size == 0
        return Number("nan" if nothing else "inf", negative)
    return Number("finite", negative, a.size * b.size)


def _rounded(a: Number, of: str, mode: str) -> int:
    if a.kind == "nan":
        return NAN[of]
    if a.kind == "inf":
        return FORMATS[of].infinity | (FORMATS[of].sign if a.negative else 0)
    return encode(a.size, a.negative, of, mode)


def arithmetic(name: str, of: str, mode: str, *bits: int) -> int:
    """``add``, ``sub``, ``mul``, ``div``, ``fma``, ``rcp`` or ``sqrt``, rounded once."""
    a, b, c = ([decode(x, of) for x in bits] + [Number("finite", False)] * 2)[:3]
    if any(decode(x, of).kind == "nan" for x in bits):
        return NAN[of]
    if name == "add":
        return _signed_sum(a, b, of, mode)
    if name == "sub":
        return _signed_sum(a, _opposite(b), of, mode)
    if name == "mul":
        return _rounded(_product(a, b), of, mode)
    if name == "fma":
        product = _product(a, b)
        return NAN[of] if product.kind == "nan" else _signed_sum(product, c, of, mode)
    if name == "rcp":
        a, b = Number("finite", False, Fraction(1)), a
        name = "div"
    if name == "div":
        if b.kind == "inf":
            inverse = Number("finite", b.negative)
            return NAN[of] if a.kind == "inf" else _rounded(_product(a, inverse), of, mode)
        if b.size == 0:
            return NAN[of] if a == a._replace(kind="finite", size=Fraction(0)) else _rounded(
                Number("inf", a.negative != b.negative), of, mode)  # fmt: skip
        return _rounded(_product(a, Number("finite", b.negative, 1 / b.size)), of, mode)
    assert name == "sqrt"
    if a.kind == "finite" and a.size == 0:
        return bits[0]
    if a.negative:
        return NAN[of]
    if a.kind == "inf":
        return bits[0]
    # Far more bits than any format has, and one that says whether something is left.
    scale = 300
    while a.size * Fraction(4) ** scale < 2**200:
        scale += 100
    scaled = a.size * Fraction(4) ** scale
    root = math.isqrt(scaled.numerator // scaled.denominator)
    exact = Fraction(root * root) == scaled
    return encode(Fraction(2 * root + (not exact)) / 2 / Fraction(2) ** scale, False, of, mode)


def ftz(bits: int, of: str = "f32") -> int:
    """Subnormals are zeros."""
    f = FORMATS[of]
    return bits & f.sign if not bits & f.infinity else bits


def saturated(bits: int, of: str = "f32") -> int:
    """To [0, 1], NaN to 0."""
    a = decode(bits, of)
    if a.kind == "nan" or a.negative or (a.size == 0 and a.kind == "finite"):
        return 0
    return encode(Fraction(1), False, of) if a.kind == "inf" or a.size > 1 else bits


def relu(bits: int, of: str) -> int:
    """Of ``fma.relu``: what is below 0 is 0, NaN stays NaN."""
    a = decode(bits, of)
    return NAN[of] if a.kind == "nan" else 0 if a.negative else bits


def convert(bits: int, of: str, to: str, mode: str = "rn") -> int:
    """Between floating-point formats."""
    return _rounded(decode(bits, of), to, mode)


def integral(mode: str, bits: int, of: str) -> Fraction | None:
    """A finite number rounded to an integer; None of the others."""
    a = decode(bits, of)
    if a.kind != "finite":
        return None
    pick: dict[str, Callable[[Fraction], int]] = {
        "rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil,
    }  # fmt: skip
    return Fraction(pick[mode](a.value))


def to_integer(mode: str, bits: int, of: str, low: int, high: int) -> int:
    a, whole = decode(bits, of), integral(mode, bits, of)
    if a.kind == "nan":
        return 0
    if whole is None:
        return low if a.negative else high
    return min(max(int(whole), low), high)


def to_integral(mode: str, bits: int, of: str) -> int:
    """A number rounded to an integer, in its own format, with its sign."""
    whole = integral(mode, bits, of)
    if whole is None:
        return NAN[of] if decode(bits, of).kind == "nan" else bits
    return encode(abs(whole), decode(bits, of).negative, of)


def extreme(name: str, nan_wins: bool, of: str, x: int, y: int) -> int:
    """``min`` or ``max``."""
    a, b = decode(x, of), decode(y, of)
    if "nan" in (a.kind, b.kind):
        if nan_wins or a.kind == b.kind:
            return NAN[of]
        return y if a.kind == "nan" else x

    def place(n: Number) -> Any:
        infinite = (-1 if n.negative else 1) if n.kind == "inf" else 0
        return infinite, n.value, not n.negative

    return (min if name == "min" else max)((x, a), (y, b), key=lambda pair: place(pair[1]))[0]


def compare(how: str, of: str, x: int, y: int) -> bool:
    """setp on floating-point numbers."""
    a, b = decode(x, of), decode(y, of)
    unordered = "nan" in (a.kind, b.kind)
    if how in ("num", "nan"):
        return unordered == (how == "nan")
    if unordered:
        return len(how) == 3

    def place(n: Number) -> Any:
        return ((-1 if n.negative else 1) if n.kind == "inf" else 0), n.value

    p, q = place(a), place(b)
    return {"eq": p == q, "ne": p != q, "lt": p < q, "le": p <= q, "gt": p > q,
            "ge": p >= q}[how[:2]]  # fmt: skip
