// What cvt does, and the approximate functions with errors that their definition allows.
#pragma once

#include "scheduler.h"
#include "values.h"

namespace ptx {

// ---- 16-bit formats ----

inline f32 widened(f32 v) { return v; }
inline f64 widened(f64 v) { return v; }
inline f32 widened(f16 v) { return static_cast<f32>(std::bit_cast<_Float16>(v.bits)); }
inline f32 widened(bf16 v) { return std::bit_cast<f32>(u32{v.bits} << 16); }

// To fewer bits of mantissa; `kept` are those of an f32 that remain. Only bits are looked at.
template <Rounding kMode>
u32 shortened(u32 bits, u32 dropped) {
  static_assert(kMode == rn || kMode == rz);
  if (kMode == rz) return bits >> dropped;
  return (bits + ((1u << (dropped - 1)) - 1) + (bits >> dropped & 1)) >> dropped;
}

template <class To, Rounding kMode>
struct Narrow;
template <Rounding kMode>
struct Narrow<bf16, kMode> {
  static bf16 from(f32 v) {
    if (v != v) return {0x7fff};
    return {static_cast<u16>(shortened<kMode>(std::bit_cast<u32>(v), 16))};
  }
};
template <Rounding kMode>
struct Narrow<f16, kMode> {
  static f16 from(f32 v) {
    if (v != v) return {0x7fff};
    const u32 bits = std::bit_cast<u32>(v), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    u32 half;
    if (size >= 0x7f800000u) {
      half = 0x7c00;
    } else if (size < 0x38800000u) {  // subnormal: units of 2^-24
      const f32 units = std::bit_cast<f32>(size) * 0x1p24f;
      half = static_cast<u32>(kMode == rz ? std::trunc(units) : std::nearbyint(units));
    } else {
      half = std::min(shortened<kMode>(size - (112u << 23), 13), kMode == rz ? 0x7bffu : 0x7c00u);
    }
    return {static_cast<u16>(sign | half)};
  }
};
template <Rounding kMode>
struct Narrow<f32, kMode> {
  template <class T>
  static f32 from(T v) {
    return rounded<kMode>([](T x) { return static_cast<f32>(x); }, v);
  }
};
template <Rounding kMode>
struct Narrow<f64, kMode> {
  template <class T>
  static f64 from(T v) {
    return rounded<kMode>([](T x) { return static_cast<f64>(x); }, v);
  }
};
template <class To, Rounding kMode, class From>
To to_float(From v) {
  if constexpr (std::is_integral_v<From> && sizeof(To) == 2) {
    static_assert(sizeof(From) <= 2, "two roundings");
    return Narrow<To, kMode>::from(static_cast<f32>(v));
  } else {
    return Narrow<To, kMode>::from(v);
  }
}
template <class To, Rounding kMode>
u32 pair_of_halves(f32 high, f32 low) {
  return u32{Narrow<To, kMode>::from(high).bits} << 16 | Narrow<To, kMode>::from(low).bits;
}

// ---- arithmetic on 16-bit formats, rounded once ----
//
// A wider result that is not exact is given an odd last bit: rounded again, to a format with at
// least two bits less, it is what the exact one would have been.
inline f64 odd_sum(f64 a, f64 b) {
  const f64 sum = a + b, of_b = sum - a, error = (a - (sum - of_b)) + (b - of_b);
  u64 bits = std::bit_cast<u64>(sum);
  if (!std::isfinite(sum) || error == 0 || (bits & 1)) return sum;
  return std::bit_cast<f64>((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
}
inline f32 odd_f32(f64 v) {
  if (!std::isfinite(v)) return static_cast<f32>(v);
  f32 cut = std::min(static_cast<f32>(std::fabs(v)), std::numeric_limits<f32>::max());
  if (f64{cut} > std::fabs(v)) cut = std::nextafter(cut, 0.0f);
  const u32 bits = std::bit_cast<u32>(cut) | (f64{cut} != std::fabs(v));
  return std::copysign(std::bit_cast<f32>(bits), static_cast<f32>(v));
}
template <class T>
T to_half(f64 v) {
  return Narrow<T, rn>::from(odd_f32(v));
}
template <class T>
T half_add(T a, T b) {
  return to_half<T>(odd_sum(widened(a), widened(b)));
}
template <class T>
T half_sub(T a, T b) {
  return to_half<T>(odd_sum(widened(a), -widened(b)));
}
template <class T>
T half_mul(T a, T b) {
  return to_half<T>(f64{widened(a)} * widened(b));
}
template <class T>
T half_fma(T a, T b, T c) {
  return to_half<T>(odd_sum(f64{widened(a)} * widened(b), widened(c)));
}
template <class T>
T half_neg(T a) {
  return {static_cast<u16>(a.bits ^ 0x8000)};
}
template <class T>
T half_abs(T a) {
  return {static_cast<u16>(a.bits & 0x7fff)};
}
template <bool kNaNWins, class T>
T half_min(T a, T b) {
  const f32 x = widened(a), y = widened(b);
  return Narrow<T, rn>::from(kNaNWins ? fmin_nan(x, y) : fmin(x, y));
}
template <bool kNaNWins, class T>
T half_max(T a, T b) {
  const f32 x = widened(a), y = widened(b);
  return Narrow<T, rn>::from(kNaNWins ? fmax_nan(x, y) : fmax(x, y));
}
inline f16 ftz(f16 v) { return {static_cast<u16>(v.bits & 0x7c00 ? v.bits : v.bits & 0x8000)}; }
inline f16 sat(f16 v) { return Narrow<f16, rn>::from(sat(widened(v))); }
inline bf16 sat(bf16 v) { return Narrow<bf16, rn>::from(sat(widened(v))); }
// Negative numbers, and -0, become +0; NaN stays.
template <class T>
T relu(T v) {
  return v.bits >> 15 && widened(v) == widened(v) ? T{0} : v;
}

// f of the lower halves of registers, and of the upper ones.
template <class T, class F, class... R>
auto of_pairs(F f, R... bits) {
  const auto low = [](u32 r) { return T{static_cast<u16>(r)}; };
  const auto high = [](u32 r) { return T{static_cast<u16>(r >> 16)}; };
  using Result = decltype(f(low(bits)...));
  return Pair<Result, Result>{f(low(bits)...), f(high(bits)...)};
}
template <class T, class F, class... R>
u32 in_pairs(F f, R... bits) {
  const Pair<T, T> found = of_pairs<T>(f, bits...);
  return u32{found.second.bits} << 16 | found.first.bits;
}
// Ten bits of mantissa, halves away from zero.
inline u32 to_tf32(f32 v) {
  const u32 bits = std::bit_cast<u32>(v);
  if (v != v) return 0x7fffffffu;
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

// ---- integers ----

// To an integer as a floating-point number.
template <class T>
T rni(T v) {
  return std::nearbyint(v);
}
template <class T>
T rzi(T v) {
  return std::trunc(v);
}
template <class T>
T rmi(T v) {
  return std::floor(v);
}
template <class T>
T rpi(T v) {
  return std::ceil(v);
}
// Of such a number. What does not fit becomes the nearest that does; NaN becomes 0.
template <class To, class From>
To to_integer(From v) {
  using Limits = std::numeric_limits<To>;
  if (v != v) return 0;
  if (v <= static_cast<From>(Limits::min())) return Limits::min();
  if (v >= static_cast<From>(Limits::max())) return Limits::max();
  return static_cast<To>(v);
}
template <class To, class From>
To resized(From v) {
  return static_cast<To>(v);
}
template <class To, class From>
To resized_sat(From v) {
  using Limits = std::numeric_limits<To>;
  if (std::cmp_less(v, Limits::min())) return Limits::min();
  return std::cmp_greater(v, Limits::max()) ? Limits::max() : static_cast<To>(v);
}

// ---- approximate functions ----
//
// A device computes them to a documented error, but which one is its own affair. Here the result is
// off by as much as is allowed, drawn from a seed, the function and the operand: the same operand
// always gives the same result, as on a device. The seed's remainder by four is the kind of error.

enum Kind { kUniform, kUpward, kDownward, kExtreme };

inline f64 deviation(u64 function, u64 operand) {
  u64 x = simt::options.approximations * 0x9e3779b97f4a7c15u + function * 0xd1342543de82ef95u;
  x ^= operand;
  for (int i = 0; i < 3; ++i) x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
  const f64 unit = static_cast<f64>(x >> 11) * 0x1p-52 - 1;
  switch (simt::options.approximations % 4) {
    case kUpward:
      return 1;
    case kDownward:
      return -1;
    case kExtreme:
      return unit < 0 ? -1 : 1;
    default:
      return unit;
  }
}

// A float no further from `exact` than `bound`, which leaves room for one. What is not finite, or
// zero, is itself.
inline f32 perturbed(f64 exact, f64 bound, u64 function, u64 operand) {
  if (!(std::fabs(exact) <= std::numeric_limits<f32>::max()) || exact == 0) {
    return canonical(static_cast<f32>(exact));
  }
  f32 result = static_cast<f32>(exact + bound * deviation(function, operand));
  while (std::fabs(f64{result} - exact) > bound) {
    const f32 nearer = std::nextafter(result, static_cast<f32>(exact));
    if (nearer == result) break;
    result = nearer;
  }
  return result;
}
inline u64 bits_of(f32 v) { return std::bit_cast<u32>(v); }

// One unit in the last place of an f32 near v.
inline f64 ulp(f64 v) {
  int exponent = 0;
  std::frexp(v, &exponent);
  return std::ldexp(1.0, std::max(exponent - 24, -149));
}

// The bounds are those of the PTX manual (PTX ISA 9.1, sections 9.7.3.8 and 9.7.3.13 to 9.7.3.22);
// tests/test_ptx.py has them again.
//
// 9.7.3.21: 2 ulp from the correctly rounded result; 2^-22 of it is allowed here, too. Of 2^a there
// is one thing that the manual does not say and CUDA's own functions rely on, such as erf(double):
// that powers of two are exact.
inline f32 approx_ex2(f32 a) {
  const f64 exact = std::exp2(f64{a});
  if (a == std::trunc(a)) return static_cast<f32>(exact);
  const f64 least = exact < 0x1p-149 ? 0 : 2.5 * ulp(exact);  // and 0 is no number below it
  return perturbed(exact, std::max(std::ldexp(exact, -22), least), 1, bits_of(a));
}
// 9.7.3.20: absolute within (0.5, 2), else relative.
inline f32 approx_lg2(f32 a) {
  const f64 exact = std::log2(f64{a});
  const bool near_one = a > 0.5f && a < 2;
  return perturbed(exact, near_one ? 0x1p-22 : std::fabs(exact) * 0x1p-22, 2, bits_of(a));
}
// 9.7.3.13: 1 ulp.
inline f32 approx_rcp(f32 a) {
  const f64 exact = 1 / f64{a};
  return perturbed(exact, ulp(exact), 3, bits_of(a));
}
// 9.7.3.15.
inline f32 approx_sqrt(f32 a) {
  const f64 exact = std::sqrt(f64{a});
  return perturbed(exact, std::ldexp(exact, -23), 4, bits_of(a));
}
// 9.7.3.16.
inline f32 approx_rsqrt(f32 a) {
  const f64 exact = 1 / std::sqrt(f64{a});
  return perturbed(exact, exact * 0x1.125fbee250664p-23, 5, bits_of(a));  // 2^-22.9
}
// 9.7.3.18 and 9.7.3.19: 2^-20.5 within two pi, 2^-14.7 within a hundred, and beyond no promise.
inline f64 bound_of_circle(f32 a) {
  constexpr f64 kPi = 3.141592653589793;
  if (std::fabs(a) <= 2 * kPi) return std::exp2(-20.5);
  return std::fabs(a) <= 100 * kPi ? std::exp2(-14.7) : 1;
}
inline f32 approx_sin(f32 a) {
  return perturbed(std::sin(f64{a}), bound_of_circle(a), 6, bits_of(a));
}
inline f32 approx_cos(f32 a) {
  return perturbed(std::cos(f64{a}), bound_of_circle(a), 7, bits_of(a));
}
// 9.7.3.22.
inline f32 approx_tanh(f32 a) {
  const f64 exact = std::tanh(f64{a});
  return std::clamp(perturbed(exact, std::fabs(exact) * 0x1p-11, 8, bits_of(a)), -1.0f, 1.0f);
}
// 9.7.3.8: 2 ulp. By way of the reciprocal: nothing where that would be subnormal.
inline f32 approx_div(f32 a, f32 b) {
  const f32 size = std::fabs(b);
  if (size > 0x1p126f && size < INFINITY) return canonical(a * std::copysign(0.0f, b));
  const f64 exact = f64{a} / f64{b};
  return perturbed(exact, 2 * ulp(exact), 9, bits_of(a) << 32 | bits_of(b));
}
inline f32 full_div(f32 a, f32 b) {
  const f64 exact = f64{a} / f64{b};
  return perturbed(exact, 2 * ulp(exact), 10, bits_of(a) << 32 | bits_of(b));
}
// 9.7.3.14: of the operand and of the result the upper 20 bits of the mantissa; the lower word is
// not looked at, and zero.
inline f64 approx_rcp(f64 a) {
  if (a != a) return std::bit_cast<f64>(0x7fffffff00000000);
  a = std::bit_cast<f64>(std::bit_cast<u64>(a) & ~u64{0xffffffff});
  if (std::fabs(a) < 0x1p-1022) return std::copysign(INFINITY, a);
  const u64 bits = std::bit_cast<u64>(1 / a) & ~u64{0xffffffff};
  const f64 result = std::bit_cast<f64>(bits);
  return std::fabs(result) < 0x1p-1022 ? std::copysign(0.0, a) : result;
}

}  // namespace ptx
