"""The table of pointwise functions for Triton kernels: value, and chain rule.

The twin of ``senet_kernels/pointwise.py``: a new function is one branch of ``evaluate``. Names are
compile-time constants, so one branch is left. Arguments are float32 or float64. Comparisons are
written so that NaN takes the branch that keeps it, and nothing comes from libdevice but what
``tl.exp`` and ``tl.erf`` stand for: the interpreter runs it.

``APPROX`` says how sigmoids are computed: "none" as PyTorch does; "ex2" by instructions of NVIDIA's
GPUs without range checks, relative error about 2^-22. (One of tanh.approx alone would have an
absolute error of 2^-12, more than bfloat16's rounding where a sigmoid is small.)
"""

import triton
import triton.language as tl

NONE = tl.constexpr("none")  # as a default: Triton 3.6 takes no plain string for one
_UNKNOWN = tl.constexpr("no pointwise function has this name")


@triton.jit
def _instruction(name: tl.constexpr, x):
    code: tl.constexpr = name + ".f32 $0, $1;"
    return tl.inline_asm_elementwise(code, "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _sigmoid(x, APPROX: tl.constexpr):
    if APPROX == "ex2":
        e = _instruction("ex2.approx.ftz", x * -1.4426950408889634)
        return _instruction("rcp.approx.ftz", 1.0 + e)
    else:
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
def evaluate(F: tl.constexpr, x, SLOPE: tl.constexpr, APPROX: tl.constexpr):
    """f(x), or f'(x) where ``SLOPE``; at a kink the side eager PyTorch takes."""
    zero = tl.zeros_like(x)  # of x's dtype: a constant alone would be float32
    one = zero + 1.0
    if F == "identity":
        y = one if SLOPE else x
    elif F == "relu":
        y = tl.where(x <= 0, zero, one if SLOPE else x)
    elif F == "relu6":
        y = tl.where((x <= 0) | (x >= 6), zero, one) if SLOPE else _clamp(x, 0.0, 6.0)
    elif F == "silu":
        if SLOPE:
            s = _sigmoid(x, APPROX)
            y = s + x * s * (1.0 - s)
        elif APPROX == "ex2":
            y = x * _sigmoid(x, APPROX)
        else:
            y = x / (1.0 + tl.exp(-x))
    elif F == "gelu":
        y = _normal_cdf(x)
        if SLOPE:
            y += x * (0.39894228040143268 * tl.exp(-0.5 * x * x))
        else:
            y = x * y
    elif F == "gelu_tanh":  # 1 + tanh(k) = 2 sigmoid(2 k)
        s = _sigmoid(_gelu_tanh_argument(x), APPROX)
        if SLOPE:
            y = s + x * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * (x * x)))
        else:
            y = x * s
    elif F == "hardswish":
        if SLOPE:
            y = tl.where(x <= -3, zero, tl.where(x >= 3, one, x * 0.3333333333333333 + 0.5))
        else:  # 6 times 1/6 is 1: large x come out as they are
            y = x * (_clamp(x + 3.0, 0.0, 6.0) * 0.16666666666666666)
    elif F == "leaky_relu":
        y = tl.where(x > 0, one if SLOPE else x, zero + 0.01 if SLOPE else x * 0.01)
    elif F == "mish":  # x t, and t + x (1 - t^2) sigmoid(x), t = tanh(softplus(x))
        t = _mish_tanh(x)
        if SLOPE:
            y = tl.where(x > 20.0, 1.0, t + x * (1.0 - t * t) * _sigmoid(x, APPROX))
        else:
            y = tl.where(x > 20.0, x, x * t)
    elif F == "sigmoid":
        s = _sigmoid(x, APPROX)
        y = s * (1.0 - s) if SLOPE else s
    elif F == "hardsigmoid":
        if SLOPE:
            y = tl.where((x > -3) & (x < 3), zero + 0.16666666666666666, zero)
        else:  # times 1/6 it is 1 at 6; a device's division is rounded to two units
            y = _clamp(x + 3.0, 0.0, 6.0) * 0.16666666666666666
    elif F == "hardsigmoid_02":
        y = x * 0.2 + 0.5
        # The slope at NaN is 0, as clamp's.
        y = tl.where((y >= 0) & (y <= 1), zero + 0.2, zero) if SLOPE else _clamp(y, 0.0, 1.0)
    elif F == "tanh":
        t = _tanh(x)
        y = 1.0 - t * t if SLOPE else t
    else:
        tl.static_assert(False, _UNKNOWN)
    return y


@triton.jit
def value(F: tl.constexpr, x, APPROX: tl.constexpr = NONE):
    """f(x)."""
    return evaluate(F, x, False, APPROX)


@triton.jit
def chain(F: tl.constexpr, x, m, APPROX: tl.constexpr = NONE):
    """m f'(x). Where a piecewise f' is 0 the result is 0, whatever m: never Inf * 0."""
    if F == "identity":
        y = m
    elif F == "relu":
        y = tl.where(x <= 0, 0.0, m)
    elif F == "hardswish":  # its derivative is 0 at -1.5 too, where NaN must pass
        y = tl.where(x <= -3, 0.0, m * evaluate(F, x, True, APPROX))
    elif (F == "relu6") | (F == "hardsigmoid") | (F == "hardsigmoid_02"):
        d = evaluate(F, x, True, APPROX)
        y = tl.where(d == 0, 0.0, m * d)
    else:
        y = m * evaluate(F, x, True, APPROX)
    return y
