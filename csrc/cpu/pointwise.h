// The table of pointwise functions, on vectors: value and derivative.
//
// The twin of senet_kernels/pointwise.py: a new function is one `case` of `evaluate`. `f` is a
// constant wherever speed matters, so that the switch folds away.
#pragma once

#include "vec.h"

namespace senet {
namespace SENET_ISA {
namespace {

// One lane at a time; kept out of line, or 16 copies of a call end up in every loop.
SENET_OUTLINE VecD exp(VecD x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// e^x to about one ulp: x = n ln 2 + r, a polynomial for e^r (Cephes' coefficients), times 2^n in
// two halves so that overflow and subnormals come out right. NaN passes through.
SENET_INLINE VecF exp(VecF x) {
  x = x > 89.0f ? broadcast(89.0f) : x;
  x = x < -105.0f ? broadcast(-105.0f) : x;
  const float magic = 12582912.0f;  // adding it rounds to an integer
  const VecF n = (x * 1.44269504088896341f + magic) - magic;
  const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  VecF p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecF_int whole = __builtin_convertvector(x != x ? VecF{} : n, VecF_int);
  const VecF_int half = whole >> 1;
  const VecF low = (VecF)((half + 127) << 23), high = (VecF)((whole - half + 127) << 23);
  return p * low * high;
}

template <class V>
SENET_OUTLINE V erf(V x) {
  for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = std::erf(x[i]);
  return x;
}
template <class V>
SENET_OUTLINE V tanh(V x) {
  for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = std::tanh(x[i]);
  return x;
}

template <class A>
SENET_INLINE Vec<A> sigmoid(Vec<A> x) {
  return A(1) / (A(1) + exp(-x));
}

// Comparisons are written so that NaN takes the branch that keeps it.
template <class A>
SENET_INLINE Vec<A> clamp(Vec<A> x, A low, A high) {
  x = x < low ? broadcast<A>(low) : x;
  return x > high ? broadcast<A>(high) : x;
}

template <class A>
SENET_INLINE Vec<A> gelu_tanh_argument(Vec<A> x) {  // twice tanh's argument
  return A(1.5957691216057308) * (x + A(0.044715) * (x * x * x));
}

// e^x (e^x + 2), so that tanh(softplus(x)) = w / (w + 2).
template <class A>
SENET_INLINE Vec<A> mish_w(Vec<A> x) {
  const Vec<A> e = exp(x);
  return e * (e + A(2));
}

// f(x), or f'(x) where kSlope; at a kink the side eager PyTorch takes.
template <bool kSlope, class A>
SENET_INLINE Vec<A> evaluate(Fn f, Vec<A> x) {
  using V = Vec<A>;
  const V one = broadcast<A>(1);
  switch (f) {
    case Fn::identity:
      return kSlope ? one : x;
    case Fn::relu:
      return x <= A(0) ? V{} : (kSlope ? one : x);
    case Fn::relu6:
      if (kSlope) return x <= A(0) ? V{} : (x >= A(6) ? V{} : one);
      return clamp<A>(x, 0, 6);
    case Fn::silu: {
      if (!kSlope) return x / (A(1) + exp(-x));
      const V s = sigmoid<A>(x);
      return s * (A(1) + x * (A(1) - s));
    }
    case Fn::gelu: {
      if (!kSlope) return A(0.5) * x * (A(1) + erf(x * A(0.70710678118654752)));
      const V cdf = A(0.5) * (A(1) + erf(x * A(0.70710678118654752)));
      return cdf + x * (A(0.39894228040143268) * exp(A(-0.5) * x * x));
    }
    case Fn::gelu_tanh: {  // 1 + tanh(k) = 2 sigmoid(2 k)
      const V s = sigmoid<A>(gelu_tanh_argument<A>(x));
      if (!kSlope) return x * s;
      const V slope = A(1.5957691216057308) * (A(1) + A(3 * 0.044715) * (x * x));
      return s + x * s * (A(1) - s) * slope;
    }
    case Fn::hardswish:
      if (kSlope) return x <= A(-3) ? V{} : (x >= A(3) ? one : x / A(3) + A(0.5));
      return x * clamp<A>(x + A(3), 0, 6) / A(6);
    case Fn::leaky_relu:
      if (kSlope) return x > A(0) ? one : broadcast<A>(A(0.01));
      return x > A(0) ? x : x * A(0.01);
    case Fn::mish: {  // x t, and t + x (1 - t^2) sigmoid(x), t = tanh(softplus(x))
      const V w = mish_w<A>(x);
      const V t = w / (w + A(2));
      if (!kSlope) return x > A(20) ? x : x * t;
      return x > A(20) ? one : t + x * (A(1) - t * t) * sigmoid<A>(x);
    }
    case Fn::sigmoid: {
      const V s = sigmoid<A>(x);
      return kSlope ? s * (A(1) - s) : s;
    }
    case Fn::hardsigmoid:
      if (kSlope) return x > A(-3) ? (x < A(3) ? broadcast<A>(A(1) / A(6)) : V{}) : V{};
      return clamp<A>(x + A(3), 0, 6) / A(6);
    case Fn::hardsigmoid_02:  // the ends count, NaN does not: clamp's derivative
      if (kSlope) return x >= A(-2.5) ? (x <= A(2.5) ? broadcast<A>(A(0.2)) : V{}) : V{};
      return clamp<A>(x * A(0.2) + A(0.5), 0, 1);
    case Fn::tanh: {
      const V t = tanh(x);
      return kSlope ? A(1) - t * t : t;
    }
  }
  return x;
}

template <class A>
SENET_INLINE Vec<A> value(Fn f, Vec<A> x) {
  return evaluate<false, A>(f, x);
}
template <class A>
SENET_INLINE Vec<A> derivative(Fn f, Vec<A> x) {
  return evaluate<true, A>(f, x);
}

// m * f'(x) for piecewise functions must not compute Inf * 0: where f' is 0 the result is 0.
template <class A>
SENET_INLINE Vec<A> chain(Fn f, Vec<A> x, Vec<A> m) {
  switch (f) {
    case Fn::identity:
      return m;
    case Fn::relu:
      return x <= A(0) ? Vec<A>{} : m;
    case Fn::hardswish:  // its derivative is 0 at -1.5 too, where NaN must pass
      return x <= A(-3) ? Vec<A>{} : m * derivative<A>(f, x);
    case Fn::relu6:
    case Fn::hardsigmoid:
    case Fn::hardsigmoid_02: {
      const Vec<A> d = derivative<A>(f, x);
      return d == A(0) ? Vec<A>{} : m * d;
    }
    default:
      return m * derivative<A>(f, x);
  }
}

// The same for a function known at run time only: one call per vector instead of the whole switch
// in every loop.
template <class A>
SENET_OUTLINE Vec<A> value_of(Fn f, Vec<A> x) {
  return value<A>(f, x);
}
template <class A>
SENET_OUTLINE Vec<A> chain_of(Fn f, Vec<A> x, Vec<A> m) {
  return chain<A>(f, x, m);
}

// `before` as a template argument: one of the common functions; kAny, known at run time only; or
// kAffine, the affine map and then a function known at run time.
constexpr Fn kAny = static_cast<Fn>(-1);
constexpr Fn kAffine = static_cast<Fn>(-2);
template <Fn kFn, class A>
SENET_INLINE Vec<A> before_value(Fn f, Vec<A> x) {
  if constexpr (kFn == kAny) {
    return value_of<A>(f, x);
  } else {
    return value<A>(kFn, x);
  }
}
template <Fn kFn, class A>
SENET_INLINE Vec<A> before_chain(Fn f, Vec<A> x, Vec<A> m) {
  if constexpr (kFn == kAny) {
    return chain_of<A>(f, x, m);
  } else {
    return chain<A>(kFn, x, m);
  }
}

}  // namespace
}  // namespace SENET_ISA
}  // namespace senet
