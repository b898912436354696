// One element: what it is stored as, what it is added up in, and how one becomes the other.
#pragma once

#include <cstdint>
#include <cstring>

#define SENET_INLINE inline __attribute__((always_inline))
#define SENET_OUTLINE __attribute__((noinline))
#define SENET_LAMBDA __attribute__((always_inline))

namespace senet {
namespace SENET_ISA {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The accumulation type of a storage type.
template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <class T>
using Acc = typename AccumulateIn<T>::type;

SENET_INLINE float to_acc(float v) { return v; }
SENET_INLINE double to_acc(double v) { return v; }
SENET_INLINE float to_acc(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float to_acc(f16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t magnitude = v.bits & 0x7fff;
  float out;
  if (magnitude < 0x0400) {  // zero and subnormals: an exact small integer times 2^-24
    out = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    uint32_t bits;
    std::memcpy(&bits, &out, 4);
    bits |= sign;
    std::memcpy(&out, &bits, 4);
    return out;
  }
  const uint32_t exponent = magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u;
  const uint32_t bits = sign | ((magnitude << 13) + exponent);
  std::memcpy(&out, &bits, 4);
  return out;
}

template <class T>
struct Narrow;
template <>
struct Narrow<float> {
  static float from(float v) { return v; }
};
template <>
struct Narrow<double> {
  static double from(double v) { return v; }
};
template <>
struct Narrow<bf16> {
  static bf16 from(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (v != v) return {static_cast<uint16_t>((bits >> 16) | 0x0040)};
    bits += 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
    return {static_cast<uint16_t>(bits >> 16)};
  }
};
template <>
struct Narrow<f16> {
  static f16 from(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    bits &= 0x7fffffff;
    uint32_t out;
    if (bits > 0x7f800000) {
      out = 0x7e00;
    } else if (bits >= 0x477ff000) {  // 65520 and above round to infinity
      out = 0x7c00;
    } else if (bits < 0x38800000) {  // subnormal result: let the float adder round it
      float magnitude;
      std::memcpy(&magnitude, &bits, 4);
      magnitude += 0.5f;
      std::memcpy(&out, &magnitude, 4);
      out -= 0x3f000000;
    } else {
      out = (bits - 0x38000000 + 0x0fff + ((bits >> 13) & 1)) >> 13;
    }
    return {static_cast<uint16_t>(sign | out)};
  }
};

}  // namespace
}  // namespace SENET_ISA
}  // namespace senet
