// The table of pointwise functions, per element: value and derivative.
//
// The twin of senet_kernels/pointwise.py and csrc/cpu/pointwise.h: a new function is one `case` of
// `evaluate`. `f` is a constant wherever speed matters, so that the switch folds away; elsewhere it
// is the same for the whole launch, and all threads branch alike.
#pragma once

#include <cmath>

#include "plan.h"
#include "seam.cuh"

namespace senet {
namespace gpu {

// kFast: to a few units in the last place of float, for results that are rounded to 16 bits.
template <bool kFast, class A>
SENET_DEVICE A exponential(A x) {
  if constexpr (kFast) {
    return fast_exp(x);
  } else if constexpr (sizeof(A) == 4) {
    return expf(x);
  } else {
    return exp(x);
  }
}
template <bool kFast, class A>
SENET_DEVICE A quotient(A a, A b) {
  if constexpr (kFast) {
    return fast_divide(a, b);
  } else {
    return a / b;
  }
}
SENET_DEVICE float error_function(float x) { return erff(x); }
SENET_DEVICE double error_function(double x) { return erf(x); }
SENET_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
SENET_DEVICE double hyperbolic_tangent(double x) { return tanh(x); }

template <bool kFast, class A>
SENET_DEVICE A sigmoid(A x) {
  return quotient<kFast>(A(1), A(1) + exponential<kFast>(-x));
}

// Comparisons are written so that NaN takes the branch that keeps it.
template <class A>
SENET_DEVICE A clamp(A x, A low, A high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <class A>
SENET_DEVICE A gelu_tanh_argument(A x) {  // twice tanh's argument
  return A(1.5957691216057308) * (x + A(0.044715) * (x * x * x));
}

// e^x (e^x + 2), so that tanh(softplus(x)) = w / (w + 2).
template <bool kFast, class A>
SENET_DEVICE A mish_w(A x) {
  const A e = exponential<kFast>(x);
  return e * (e + A(2));
}

// f(x), or f'(x) where kSlope; at a kink the side eager PyTorch takes.
template <bool kFast, bool kSlope, class A>
SENET_DEVICE A evaluate(Fn f, A x) {
  switch (f) {
    case Fn::identity:
      return kSlope ? A(1) : x;
    case Fn::relu:
      return x <= A(0) ? A(0) : (kSlope ? A(1) : x);
    case Fn::relu6:
      if (kSlope) return x <= A(0) ? A(0) : (x >= A(6) ? A(0) : A(1));
      return clamp<A>(x, 0, 6);
    case Fn::silu: {
      if (!kSlope) return quotient<kFast>(x, A(1) + exponential<kFast>(-x));
      const A s = sigmoid<kFast>(x);
      return s * (A(1) + x * (A(1) - s));
    }
    case Fn::gelu: {
      if (!kSlope) return A(0.5) * x * (A(1) + error_function(x * A(0.70710678118654752)));
      const A cdf = A(0.5) * (A(1) + error_function(x * A(0.70710678118654752)));
      return cdf + x * (A(0.39894228040143268) * exponential<kFast>(A(-0.5) * x * x));
    }
    case Fn::gelu_tanh: {  // 1 + tanh(k) = 2 sigmoid(2 k)
      const A s = sigmoid<kFast>(gelu_tanh_argument<A>(x));
      if (!kSlope) return x * s;
      const A slope = A(1.5957691216057308) * (A(1) + A(3 * 0.044715) * (x * x));
      return s + x * s * (A(1) - s) * slope;
    }
    case Fn::hardswish:
      if (kSlope) {
        const A rise = (kFast ? x * A(1. / 3) : x / A(3)) + A(0.5);
        return x <= A(-3) ? A(0) : (x >= A(3) ? A(1) : rise);
      }
      return kFast ? x * clamp<A>(x + A(3), 0, 6) * A(1. / 6) : x * clamp<A>(x + A(3), 0, 6) / A(6);
    case Fn::leaky_relu:
      if (kSlope) return x > A(0) ? A(1) : A(0.01);
      return x > A(0) ? x : x * A(0.01);
    case Fn::mish: {  // x t, and t + x (1 - t^2) sigmoid(x), t = tanh(softplus(x))
      const A w = mish_w<kFast>(x);
      const A t = quotient<kFast>(w, w + A(2));
      if (!kSlope) return x > A(20) ? x : x * t;
      return x > A(20) ? A(1) : t + x * (A(1) - t * t) * sigmoid<kFast>(x);
    }
    case Fn::sigmoid: {
      const A s = sigmoid<kFast>(x);
      return kSlope ? s * (A(1) - s) : s;
    }
    case Fn::hardsigmoid:
      if (kSlope) return x > A(-3) ? (x < A(3) ? A(1) / A(6) : A(0)) : A(0);
      return clamp<A>(x + A(3), 0, 6) / A(6);
    case Fn::hardsigmoid_02:  // the ends count, NaN does not: clamp's derivative
      if (kSlope) return x >= A(-2.5) ? (x <= A(2.5) ? A(0.2) : A(0)) : A(0);
      return clamp<A>(x * A(0.2) + A(0.5), 0, 1);
    case Fn::tanh: {
      const A t = hyperbolic_tangent(x);
      return kSlope ? A(1) - t * t : t;
    }
  }
  return x;
}

template <bool kFast, class A>
SENET_DEVICE A value(Fn f, A x) {
  return evaluate<kFast, false>(f, x);
}
template <bool kFast, class A>
SENET_DEVICE A derivative(Fn f, A x) {
  return evaluate<kFast, true>(f, x);
}

// m f'(x). Piecewise functions must not compute Inf * 0: where f' is 0 the result is 0.
template <bool kFast, class A>
SENET_DEVICE A chain(Fn f, A x, A m) {
  switch (f) {
    case Fn::identity:
      return m;
    case Fn::relu:
      return x <= A(0) ? A(0) : m;
    case Fn::hardswish:  // its derivative is 0 at -1.5 too, where NaN must pass
      return x <= A(-3) ? A(0) : m * derivative<kFast>(f, x);
    case Fn::relu6:
    case Fn::hardsigmoid:
    case Fn::hardsigmoid_02: {
      const A d = derivative<kFast>(f, x);
      return d == A(0) ? A(0) : m * d;
    }
    default:
      return m * derivative<kFast>(f, x);
  }
}

// The same as calls: the whole switch once per program instead of once per use.
template <class A>
__device__ __noinline__ A value_of(Fn f, A x) {
  return value<false>(f, x);
}
template <class A>
__device__ __noinline__ A chain_of(Fn f, A x, A m) {
  return chain<false>(f, x, m);
}

template <Fn kFn>
struct FnConstant {
  static constexpr Fn value = kFn;
};

// `before` as a template argument: one of the common functions, or kAny.
template <Fn kFn, bool kFast, class A>
SENET_DEVICE A before_value(Fn f, A x) {
  if constexpr (kFn == kAny) {
    return f == Fn::identity ? x : value_of<A>(f, x);
  } else {
    return value<kFast>(kFn, x);
  }
}
// In place, of the eight elements that a thread takes at a time. Of any function: those that
// networks have in front are inlined.
template <Fn kFn, bool kFast, class A>
SENET_DEVICE void before_values(Fn f, A* x) {
  constexpr int kElements = 8;
  const auto inlined = [x](auto fn) {
#pragma unroll
    for (int j = 0; j < kElements; ++j) x[j] = value<kFast>(decltype(fn)::value, x[j]);
  };
  if constexpr (kFn != kAny) {
    inlined(FnConstant<kFn>{});
  } else if (f == Fn::identity) {
  } else if (f == Fn::relu) {
    inlined(FnConstant<Fn::relu>{});
  } else if (f == Fn::silu) {
    inlined(FnConstant<Fn::silu>{});
  } else if (f == Fn::hardswish) {
    inlined(FnConstant<Fn::hardswish>{});
  } else {
#pragma unroll
    for (int j = 0; j < kElements; ++j) x[j] = value_of<A>(f, x[j]);
  }
}
template <Fn kFn, bool kFast, class A>
SENET_DEVICE void before_chains(Fn f, const A* x, A* m) {
  constexpr int kElements = 8;
  const auto inlined = [x, m](auto fn) {
#pragma unroll
    for (int j = 0; j < kElements; ++j) m[j] = chain<kFast>(decltype(fn)::value, x[j], m[j]);
  };
  if constexpr (kFn != kAny) {
    inlined(FnConstant<kFn>{});
  } else if (f == Fn::identity) {
  } else if (f == Fn::relu) {
    inlined(FnConstant<Fn::relu>{});
  } else if (f == Fn::silu) {
    inlined(FnConstant<Fn::silu>{});
  } else if (f == Fn::hardswish) {
    inlined(FnConstant<Fn::hardswish>{});
  } else {
#pragma unroll
    for (int j = 0; j < kElements; ++j) m[j] = chain_of<A>(f, x[j], m[j]);
  }
}
template <Fn kFn, bool kFast, class A>
SENET_DEVICE A before_chain(Fn f, A x, A m) {
  if constexpr (kFn == kAny) {
    return f == Fn::identity ? m : chain_of<A>(f, x, m);
  } else {
    return chain<kFast>(kFn, x, m);
  }
}

}  // namespace gpu
}  // namespace senet
