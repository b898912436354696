// Registers, and the arithmetic of PTX, as its manual defines it, in plain C++.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};

template <class A, class B>
struct Pair {
  A first;
  B second;
};
// Where a result goes that nobody wants: the operand `_`.
struct Sink {
} inline sink;

// ---- registers are bits; an instruction says what they mean ----

template <class T, class R>
T get(R bits) {
  if constexpr (std::is_same_v<T, bool>) {
    return static_cast<bool>(bits);
  } else if constexpr (std::is_same_v<T, f32>) {
    return std::bit_cast<f32>(static_cast<u32>(bits));
  } else if constexpr (std::is_same_v<T, f64>) {
    return std::bit_cast<f64>(static_cast<u64>(bits));
  } else if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>) {
    return T{static_cast<u16>(bits)};
  } else {
    return static_cast<T>(bits);
  }
}

// A register that is wider than the value is filled with its sign, or with zeros.
template <class T, class R>
void put(T value, R& to) {
  if constexpr (std::is_same_v<R, Sink>) {
  } else if constexpr (std::is_same_v<T, f32>) {
    to = static_cast<R>(std::bit_cast<u32>(value));
  } else if constexpr (std::is_same_v<T, f64>) {
    to = static_cast<R>(std::bit_cast<u64>(value));
  } else if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>) {
    to = static_cast<R>(value.bits);
  } else {
    to = static_cast<R>(value);
  }
}
template <class T, class R>
void put(const std::array<T, 1>& value, R& to) {
  put(value[0], to);
}
template <class T, size_t kCount, class... R>
void put(const std::array<T, kCount>& values, R&... to) {
  static_assert(sizeof...(R) == kCount);
  size_t i = 0;
  (put(values[i++], to), ...);
}
template <class A, class B, class R>
void put(const Pair<A, B>& value, R& to) {
  put(value.first, to);
}
template <class A, class B, class R, class S>
void put(const Pair<A, B>& value, R& to, S& second) {
  put(value.first, to);
  put(value.second, second);
}

// mov between a register and its parts, the lowest first.
template <class T, size_t kCount>
T packed(const std::array<T, kCount>& parts) {
  T whole = 0;
  for (size_t i = 0; i < kCount; ++i) {
    constexpr size_t kBits = 8 * sizeof(T) / kCount;
    const T mask = static_cast<T>(static_cast<T>(~T(0)) >> (8 * sizeof(T) - kBits));
    whole = static_cast<T>(whole | static_cast<T>((parts[i] & mask) << (i * kBits)));
  }
  return whole;
}
template <size_t kCount, class T>
std::array<T, kCount> unpacked(T whole) {
  std::array<T, kCount> parts;
  for (size_t i = 0; i < kCount; ++i) {
    constexpr size_t kBits = 8 * sizeof(T) / kCount;
    const T mask = static_cast<T>(static_cast<T>(~T(0)) >> (8 * sizeof(T) - kBits));
    parts[i] = static_cast<T>(whole >> (i * kBits)) & mask;
  }
  return parts;
}

// ---- integers: modulo 2^n ----

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
constexpr u32 kBitsOf = 8 * sizeof(T);
template <class T>
struct WideOf;
#define PTX_WIDE(narrow, wide) \
  template <>                  \
  struct WideOf<narrow> {      \
    using Type = wide;         \
  };
PTX_WIDE(u16, u32)
PTX_WIDE(s16, s32)
PTX_WIDE(u32, u64)
PTX_WIDE(s32, s64)
PTX_WIDE(u64, unsigned __int128)
PTX_WIDE(s64, __int128)
#undef PTX_WIDE
template <class T>
using Wide = typename WideOf<T>::Type;

template <class T>
T add(T a, T b) {
  return static_cast<T>(u64(a) + u64(b));
}
template <class T>
T sub(T a, T b) {
  return static_cast<T>(u64(a) - u64(b));
}
template <class T>
T add_sat(T a, T b) {
  const Wide<T> sum = Wide<T>(a) + b;
  return static_cast<T>(
      std::clamp<Wide<T>>(sum, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}
template <class T>
T sub_sat(T a, T b) {
  const Wide<T> sum = Wide<T>(a) - b;
  return static_cast<T>(
      std::clamp<Wide<T>>(sum, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}
template <class T>
Wide<T> product(T a, T b) {
  return static_cast<Wide<T>>(Wide<T>(a) * Wide<T>(b));
}
template <class T>
T product_lo(T a, T b) {
  return static_cast<T>(u64(a) * u64(b));
}
template <class T>
T product_hi(T a, T b) {
  return static_cast<T>(product(a, b) >> kBitsOf<T>);
}
// What a division by zero gives is not specified: a kernel that divides by zero is wrong.
template <class T>
T quotient(T a, T b) {
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return static_cast<T>(0 - u64(a));
  }
  return static_cast<T>(a / b);
}
template <class T>
T remainder(T a, T b) {
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return 0;
  }
  return static_cast<T>(a % b);
}
template <class T>
T negative(T a) {
  return static_cast<T>(0 - u64(a));
}
template <class T>
T absolute(T a) {
  return a < 0 ? negative(a) : a;
}
// Shifts by more than there are bits give what that many shifts by one would.
template <class T>
T shl(T a, u32 n) {
  return n < kBitsOf<T> ? static_cast<T>(u64(a) << n) : T(0);
}
template <class T>
T shr(T a, u32 n) {
  if (n < kBitsOf<T>) return static_cast<T>(a >> n);
  return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
}
inline u32 funnel_l(u32 low, u32 high, u32 n) {
  return static_cast<u32>(((u64{high} << 32 | low) << n) >> 32);
}
inline u32 funnel_r(u32 low, u32 high, u32 n) {
  return static_cast<u32>((u64{high} << 32 | low) >> n);
}
template <class T>
T reversed(T a) {
  T result = 0;
  for (u32 i = 0; i < kBitsOf<T>; ++i) result = static_cast<T>(result << 1 | (a >> i & 1));
  return result;
}
// Bit fields: position and length are bytes; a field that ends beyond the register is cut off, or
// filled with zeros or the sign.
template <class T>
T inserted(T field, T into, u32 position, u32 length) {
  position &= 0xff;
  length &= 0xff;
  for (u32 i = 0; i < length && position + i < kBitsOf<T>; ++i) {
    const T bit = T(1) << (position + i);
    into = (field >> i & 1) ? (into | bit) : (into & ~bit);
  }
  return into;
}
template <class T>
T extracted(T from, u32 position, u32 length) {
  position &= 0xff;
  length &= 0xff;
  const auto bit = [&](u32 i) { return static_cast<u64>(from) >> i & 1; };
  const u32 last = std::min(position + length - 1, kBitsOf<T> - 1);
  const u64 fill = std::is_signed_v<T> && length > 0 ? bit(last) : 0;
  u64 result = 0;
  for (u32 i = 0; i < kBitsOf<T>; ++i) {
    const bool inside = i < length && position + i < kBitsOf<T>;
    result |= (inside ? bit(position + i) : fill) << i;
  }
  return static_cast<T>(result);
}
// Four of eight bytes; the fourth bit of a selector asks for the byte's sign instead.
inline u32 permuted(u32 a, u32 b, u32 selectors) {
  const u64 bytes = u64{b} << 32 | a;
  u32 result = 0;
  for (u32 i = 0; i < 4; ++i) {
    const u32 selector = selectors >> (4 * i) & 15;
    u32 byte = bytes >> (8 * (selector & 7)) & 0xff;
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
// Any function of three bits, by its table.
inline u32 looked_up(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (u32 i = 0; i < 8; ++i) {
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}

// ---- floating point ----

enum Rounding { rn, rz, rm, rp };
constexpr int kHostRounding[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};

// What of single precision is NaN has these bits alone; of double precision a NaN keeps its own.
inline f32 canonical(f32 v) { return v == v ? v : std::bit_cast<f32>(0x7fffffffu); }
inline f64 canonical(f64 v) { return v; }
inline f16 canonical(f16 v) { return v; }

// Subnormal numbers become zeros of their sign.
inline f32 ftz(f32 v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }
template <class T>
T keep(T v) {
  return v;
}
// To [0, 1]; NaN and -0 become +0.
template <class T>
T sat(T v) {
  return v > T(0) ? std::min(v, T(1)) : T(0);
}

// f() with the host's rounding as asked for. Operands and result pass through memory, so that
// nothing is computed before or after.
template <Rounding kMode, class F, class... T>
auto rounded(F f, T... operands) {
  if constexpr (kMode == rn) {
    return canonical(f(operands...));
  } else {
    std::fesetround(kHostRounding[kMode]);
    const auto opaque = [](auto v) {
      volatile auto memory = v;
      return static_cast<decltype(v)>(memory);
    };
    const auto result = opaque(f(opaque(operands)...));
    std::fesetround(FE_TONEAREST);
    return canonical(result);
  }
}
template <Rounding kMode, class T>
T fadd(T a, T b) {
  return rounded<kMode>([](T x, T y) { return x + y; }, a, b);
}
template <Rounding kMode, class T>
T fsub(T a, T b) {
  return rounded<kMode>([](T x, T y) { return x - y; }, a, b);
}
template <Rounding kMode, class T>
T fmul(T a, T b) {
  return rounded<kMode>([](T x, T y) { return x * y; }, a, b);
}
template <Rounding kMode, class T>
T fdiv(T a, T b) {
  return rounded<kMode>([](T x, T y) { return x / y; }, a, b);
}
template <Rounding kMode, class T>
T frcp(T a) {
  return fdiv<kMode>(T(1), a);
}
template <Rounding kMode, class T>
T fsqrt(T a) {
  return rounded<kMode>([](T x) { return std::sqrt(x); }, a);
}
template <Rounding kMode, class T>
T ffma(T a, T b, T c) {
  return rounded<kMode>([](T x, T y, T z) { return std::fma(x, y, z); }, a, b, c);
}
template <class T>
T fneg(T a) {
  return -a;
}
template <class T>
T fabs(T a) {
  return std::fabs(a);
}
// NaN loses against a number, and -0 is below +0.
template <class T>
T fmin(T a, T b) {
  if (a != a || b != b) return canonical(a != a ? b : a);
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
T fmax(T a, T b) {
  if (a != a || b != b) return canonical(a != a ? b : a);
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}
// The variants where NaN wins.
template <class T>
T fmin_nan(T a, T b) {
  return a == a && b == b ? fmin(a, b) : canonical(std::numeric_limits<T>::quiet_NaN());
}
template <class T>
T fmax_nan(T a, T b) {
  return a == a && b == b ? fmax(a, b) : canonical(std::numeric_limits<T>::quiet_NaN());
}

// ---- comparisons ----

enum Comparison { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan };
constexpr Comparison lo = lt, ls = le, hi = gt, hs = ge;

template <Comparison kHow, class T>
bool compare(T a, T b) {
  const bool unordered = a != a || b != b;
  switch (kHow) {
    case eq:
      return a == b;
    case ne:
      return a != b && !unordered;
    case lt:
      return a < b;
    case le:
      return a <= b;
    case gt:
      return a > b;
    case ge:
      return a >= b;
    case equ:
      return a == b || unordered;
    case neu:
      return a != b;
    case ltu:
      return a < b || unordered;
    case leu:
      return a <= b || unordered;
    case gtu:
      return a > b || unordered;
    case geu:
      return a >= b || unordered;
    case num:
      return !unordered;
    case nan:
      return unordered;
  }
}
inline Pair<bool, bool> both(bool v) { return {v, !v}; }

}  // namespace ptx
