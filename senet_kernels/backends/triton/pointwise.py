"""The table of pointwise functions for Triton kernels: value, and chain rule.

The twin of ``senet_kernels/pointwise.py``: a new function is one branch in each of ``value`` and
``derivative``. Codes are compile-time constants, so one branch is left of each. Arguments are
float32 or float64. Comparisons are written so that NaN takes the branch that keeps it, and
nothing comes from libdevice but what ``tl.exp`` and ``tl.erf`` stand for: the interpreter runs it.
"""

import triton
import triton.language as tl

from senet_kernels.pointwise import POINTWISE

IDENTITY = tl.constexpr(POINTWISE["identity"].code)
RELU = tl.constexpr(POINTWISE["relu"].code)
RELU6 = tl.constexpr(POINTWISE["relu6"].code)
SILU = tl.constexpr(POINTWISE["silu"].code)
GELU = tl.constexpr(POINTWISE["gelu"].code)
GELU_TANH = tl.constexpr(POINTWISE["gelu_tanh"].code)
HARDSWISH = tl.constexpr(POINTWISE["hardswish"].code)
LEAKY_RELU = tl.constexpr(POINTWISE["leaky_relu"].code)
MISH = tl.constexpr(POINTWISE["mish"].code)
SIGMOID = tl.constexpr(POINTWISE["sigmoid"].code)
HARDSIGMOID = tl.constexpr(POINTWISE["hardsigmoid"].code)
HARDSIGMOID_02 = tl.constexpr(POINTWISE["hardsigmoid_02"].code)
TANH = tl.constexpr(POINTWISE["tanh"].code)

_UNKNOWN = tl.constexpr("no pointwise function has this code")


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _clamp(x, low: tl.constexpr, high: tl.constexpr):
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _tanh(x):
    # Cephes: a rational function near 0, where the exponentials would cancel.
    z = x * x
    p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
    q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z
    near = x + x * z * (p / (q + 4.84406305325125486048e3))
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _gelu_tanh_argument(x):  # twice tanh's argument
    return 1.5957691216057308 * (x + 0.044715 * (x * x * x))


@triton.jit
def _mish_tanh(x):  # tanh(softplus(x)) = w / (w + 2)
    e = tl.exp(x)
    w = e * (e + 2.0)
    return w / (w + 2.0)


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.70710678118654752))


@triton.jit
def value(F: tl.constexpr, x):
    """f(x)."""
    if F == IDENTITY:
        y = x
    elif F == RELU:
        y = tl.where(x <= 0, 0.0, x)
    elif F == RELU6:
        y = _clamp(x, 0.0, 6.0)
    elif F == SILU:
        y = x / (1.0 + tl.exp(-x))
    elif F == GELU:
        y = x * _normal_cdf(x)
    elif F == GELU_TANH:  # 1 + tanh(k) = 2 sigmoid(2 k)
        y = x * _sigmoid(_gelu_tanh_argument(x))
    elif F == HARDSWISH:
        y = x * _clamp(x + 3.0, 0.0, 6.0) / 6.0
    elif F == LEAKY_RELU:
        y = tl.where(x > 0, x, x * 0.01)
    elif F == MISH:
        y = tl.where(x > 20.0, x, x * _mish_tanh(x))
    elif F == SIGMOID:
        y = _sigmoid(x)
    elif F == HARDSIGMOID:
        y = _clamp(x + 3.0, 0.0, 6.0) / 6.0
    elif F == HARDSIGMOID_02:
        y = _clamp(x * 0.2 + 0.5, 0.0, 1.0)
    elif F == TANH:
        y = _tanh(x)
    else:
        tl.static_assert(False, _UNKNOWN)
    return y


@triton.jit
def derivative(F: tl.constexpr, x):
    """f'(x); at a kink the side eager PyTorch takes."""
    zero = tl.zeros_like(x)  # of x's dtype: a constant alone would be float32
    one = zero + 1.0
    if F == IDENTITY:
        d = one
    elif F == RELU:
        d = tl.where(x <= 0, zero, one)
    elif F == RELU6:
        d = tl.where((x <= 0) | (x >= 6), zero, one)
    elif F == SILU:
        s = _sigmoid(x)
        d = s * (1.0 + x * (1.0 - s))
    elif F == GELU:
        d = _normal_cdf(x) + x * (0.39894228040143268 * tl.exp(-0.5 * x * x))
    elif F == GELU_TANH:
        s = _sigmoid(_gelu_tanh_argument(x))
        d = s + x * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * (x * x)))
    elif F == HARDSWISH:
        d = tl.where(x <= -3, zero, tl.where(x >= 3, one, x / 3.0 + 0.5))
    elif F == LEAKY_RELU:
        d = tl.where(x > 0, one, zero + 0.01)
    elif F == MISH:  # t + x (1 - t^2) sigmoid(x), t = tanh(softplus(x))
        t = _mish_tanh(x)
        d = tl.where(x > 20.0, 1.0, t + x * (1.0 - t * t) * _sigmoid(x))
    elif F == SIGMOID:
        s = _sigmoid(x)
        d = s * (1.0 - s)
    elif F == HARDSIGMOID:
        d = tl.where((x > -3) & (x < 3), zero + 0.16666666666666666, zero)
    elif F == HARDSIGMOID_02:
        inner = x * 0.2 + 0.5
        d = tl.where((inner >= 0) & (inner <= 1), zero + 0.2, zero)  # 0 at NaN, as clamp's
    elif F == TANH:
        t = _tanh(x)
        d = 1.0 - t * t
    else:
        tl.static_assert(False, _UNKNOWN)
    return d


@triton.jit
def chain(F: tl.constexpr, x, m):
    """m f'(x). Where a piecewise f' is 0 the result is 0, whatever m: never Inf * 0."""
    if F == IDENTITY:
        y = m
    elif F == RELU:
        y = tl.where(x <= 0, 0.0, m)
    elif F == HARDSWISH:  # its derivative is 0 at -1.5 too, where NaN must pass
        y = tl.where(x <= -3, 0.0, m * derivative(F, x))
    elif (F == RELU6) | (F == HARDSIGMOID) | (F == HARDSIGMOID_02):
        d = derivative(F, x)
        y = tl.where(d == 0, 0.0, m * d)
    else:
        y = m * derivative(F, x)
    return y
