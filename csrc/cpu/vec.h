// Vectors of the accumulation type (float or double), as wide as the instruction set has them.
//
// Compiler vector types carry the arithmetic; what they cannot say (partial loads, conversions,
// bit masks) is here. Everything is in an unnamed namespace inside the instruction set's own:
// code of one set must never be linked into another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "../se.h"
#include "elements.h"

#if defined(__AVX512F__)
#define SENET_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SENET_VECTOR_BYTES 32
#else
#define SENET_VECTOR_BYTES 16
#endif

namespace senet {
namespace SENET_ISA {
namespace {

typedef float VecF __attribute__((vector_size(SENET_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(SENET_VECTOR_BYTES)));
typedef int32_t VecF_int __attribute__((vector_size(SENET_VECTOR_BYTES)));
typedef int64_t VecD_int __attribute__((vector_size(SENET_VECTOR_BYTES)));

// The vector type for an accumulation type, and its integer twin (also its comparison mask).
template <class A>
struct Simd;
template <>
struct Simd<float> {
  using V = VecF;
  using I = VecF_int;
};
template <>
struct Simd<double> {
  using V = VecD;
  using I = VecD_int;
};
template <class A>
using Vec = typename Simd<A>::V;
template <class A>
constexpr int kLanes = SENET_VECTOR_BYTES / sizeof(A);

template <class A>
SENET_INLINE Vec<A> broadcast(A value) {
  return Vec<A>{} + value;
}

template <class A>
SENET_INLINE typename Simd<A>::I lane_index() {
  typename Simd<A>::I index;
  for (int i = 0; i < kLanes<A>; ++i) index[i] = i;
  return index;
}

// ---- vector load and store: load<T>, store, and their first-n-lanes forms ----

SENET_INLINE VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SENET_INLINE VecD load(const double* p) {
  VecD v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SENET_INLINE void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }
SENET_INLINE void store(double* p, VecD v) { std::memcpy(p, &v, sizeof v); }

typedef uint16_t Vec16 __attribute__((vector_size(SENET_VECTOR_BYTES / 2)));
typedef uint32_t Vec32u __attribute__((vector_size(SENET_VECTOR_BYTES)));

#if defined(__ARM_NEON)
SENET_INLINE VecF widen(Vec16 raw, bf16) { return (VecF)vshll_n_u16((uint16x4_t)raw, 16); }
SENET_INLINE Vec16 narrow(VecF v, bf16) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (Vec16)vcvt_bf16_f32((float32x4_t)v);
#else
  const uint32x4_t bits = (uint32x4_t)v;
  const uint32x4_t odd = vshrq_n_u32(vshlq_n_u32(bits, 15), 31);
  const uint16x4_t rounded = vaddhn_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint16x4_t quiet = vorr_u16(vshrn_n_u32(bits, 16), vdup_n_u16(0x0040));
  const uint16x4_t number = vmovn_u32(vceqq_f32((float32x4_t)v, (float32x4_t)v));
  return (Vec16)vbsl_u16(number, rounded, quiet);
#endif
}
#else
SENET_INLINE VecF widen(Vec16 raw, bf16) {
  const Vec32u bits = __builtin_convertvector(raw, Vec32u) << 16;
  return (VecF)bits;
}
SENET_INLINE Vec16 narrow(VecF v, bf16) {
  Vec32u bits = (Vec32u)v;
  const Vec32u rounded = bits + 0x7fff + ((bits >> 16) & 1);
  bits = (v != v) ? (bits | 0x00400000) : rounded;
  return __builtin_convertvector(bits >> 16, Vec16);
}
#endif
SENET_INLINE VecF widen(Vec16 raw, f16) {
#if defined(__AVX512F__)
  __m256i in;
  std::memcpy(&in, &raw, sizeof in);
  return (VecF)_mm512_cvtph_ps(in);
#elif defined(__F16C__)
  __m128i in;
  std::memcpy(&in, &raw, sizeof in);
  return (VecF)_mm256_cvtph_ps(in);
#elif defined(__ARM_NEON)
  return (VecF)vcvt_f32_f16((float16x4_t)raw);
#else
  VecF v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_acc(f16{raw[i]});
  return v;
#endif
}
SENET_INLINE Vec16 narrow(VecF v, f16) {
  Vec16 raw;
#if defined(__AVX512F__)
  const __m256i out = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(&raw, &out, sizeof out);
#elif defined(__F16C__)
  const __m128i out = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(&raw, &out, sizeof out);
#elif defined(__ARM_NEON)
  raw = (Vec16)vcvt_f16_f32((float32x4_t)v);
#else
  for (int i = 0; i < kLanes<float>; ++i) raw[i] = Narrow<f16>::from(v[i]).bits;
#endif
  return raw;
}
template <class T>
SENET_INLINE VecF load(const T* p) {  // bf16, f16
  Vec16 raw;
  std::memcpy(&raw, p, sizeof raw);
  return widen(raw, T{});
}
template <class T>
SENET_INLINE void store(T* p, VecF v) {
  const Vec16 raw = narrow(v, T{});
  std::memcpy(p, &raw, sizeof raw);
}

// The first n < lanes elements; the other lanes are zero.
#if defined(__AVX512F__)
SENET_INLINE VecF load_n(const float* p, int n) {
  return (VecF)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
SENET_INLINE VecD load_n(const double* p, int n) {
  return (VecD)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
}
template <class T>
SENET_INLINE VecF load_n(const T* p, int n) {
  Vec16 raw;
  const __m256i in = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  std::memcpy(&raw, &in, sizeof raw);
  return widen(raw, T{});
}
SENET_INLINE void store_n(float* p, VecF v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
}
SENET_INLINE void store_n(double* p, VecD v, int n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
}
template <class T>
SENET_INLINE void store_n(T* p, VecF v, int n) {
  const Vec16 raw = narrow(v, T{});
  __m256i out;
  std::memcpy(&out, &raw, sizeof out);
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), out);
}
#elif defined(__AVX2__)
// Masked loads, but stores and 16-bit elements in pieces of 4, 2 and 1: masked stores are slow on
// some processors, and a detour through memory stalls the load that follows.
SENET_INLINE __m256i first_n(int n) {  // n 32-bit lanes of ones, then zeros
  alignas(64) static constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - n));
}
SENET_INLINE VecF load_n(const float* p, int n) { return (VecF)_mm256_maskload_ps(p, first_n(n)); }
SENET_INLINE VecD load_n(const double* p, int n) {
  return (VecD)_mm256_maskload_pd(p, first_n(2 * n));
}
template <class T>
SENET_INLINE VecF load_n(const T* p, int n) {
  uint64_t four = 0, rest = 0;
  if (n & 4) std::memcpy(&four, p, 8), p += 4;
  if (n & 2) std::memcpy(&rest, p, 4), p += 2;
  if (n & 1) rest |= static_cast<uint64_t>(p->bits) << (n & 2 ? 32 : 0);
  typedef uint64_t Two __attribute__((vector_size(16)));
  return widen((Vec16)(n & 4 ? Two{four, rest} : Two{rest, 0}), T{});
}
SENET_INLINE void store_n(float* p, VecF v, int n) {
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps((__m256)v, 1), p += 4;
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
    part = _mm_movehl_ps(part, part), p += 2;
  }
  if (n & 1) _mm_store_ss(p, part);
}
SENET_INLINE void store_n(double* p, VecD v, int n) {
  __m128d part = _mm256_castpd256_pd128((__m256d)v);
  if (n & 2) {
    _mm_storeu_pd(p, part);
    part = _mm256_extractf128_pd((__m256d)v, 1), p += 2;
  }
  if (n & 1) _mm_store_sd(p, part);
}
template <class T>
SENET_INLINE void store_n(T* p, VecF v, int n) {
  const __m128i raw = (__m128i)narrow(v, T{});
  uint64_t part = static_cast<uint64_t>(_mm_cvtsi128_si64(raw));
  if (n & 4) {
    std::memcpy(p, &part, 8);
    part = static_cast<uint64_t>(_mm_extract_epi64(raw, 1)), p += 4;
  }
  if (n & 2) {
    std::memcpy(p, &part, 4);
    part >>= 32, p += 2;
  }
  if (n & 1) p->bits = static_cast<uint16_t>(part);
}
#elif defined(__ARM_NEON)
// In pieces of 2 and 1.
SENET_INLINE VecF load_n(const float* p, int n) {
  const float32x2_t none = vdup_n_f32(0);
  const float32x2_t two = n & 2 ? vld1_f32(p) : none;
  const float32x2_t one = n & 1 ? vset_lane_f32(p[n - 1], none, 0) : none;
  return (VecF)(n & 2 ? vcombine_f32(two, one) : vcombine_f32(one, none));
}
SENET_INLINE VecD load_n(const double* p, int n) { return VecD{n & 1 ? *p : 0.0, 0.0}; }
template <class T>
SENET_INLINE VecF load_n(const T* p, int n) {
  uint32_t two = 0;
  uint64_t raw = 0;
  if (n & 2) std::memcpy(&two, p, 4), p += 2;
  if (n & 1) raw = static_cast<uint64_t>(p->bits) << (n & 2 ? 32 : 0);
  return widen((Vec16)vcreate_u16(raw | two), T{});
}
SENET_INLINE void store_n(float* p, VecF v, int n) {
  float32x2_t part = vget_low_f32((float32x4_t)v);
  if (n & 2) {
    vst1_f32(p, part);
    part = vget_high_f32((float32x4_t)v), p += 2;
  }
  if (n & 1) vst1_lane_f32(p, part, 0);
}
SENET_INLINE void store_n(double* p, VecD v, int n) {
  if (n & 1) *p = v[0];
}
template <class T>
SENET_INLINE void store_n(T* p, VecF v, int n) {
  uint64_t part = vget_lane_u64((uint64x1_t)narrow(v, T{}), 0);
  if (n & 2) {
    std::memcpy(p, &part, 4);
    part >>= 32, p += 2;
  }
  if (n & 1) p->bits = static_cast<uint16_t>(part);
}
#else
template <class T>
SENET_INLINE Vec<Acc<T>> load_n(const T* p, int n) {
  Vec<Acc<T>> v{};
  for (int i = 0; i < kLanes<Acc<T>>; ++i) {
    if (i < n) v[i] = to_acc(p[i]);
  }
  return v;
}
template <class T>
SENET_INLINE void store_n(T* p, Vec<Acc<T>> v, int n) {
  for (int i = 0; i < kLanes<Acc<T>>; ++i) {
    if (i < n) p[i] = Narrow<T>::from(v[i]);
  }
}
#endif

// The same as store, around the caches: for memory that nobody reads before it has left them
// anyway. p is aligned to what is stored. An ordinary store where there is no such instruction.
// Before another thread may look, end_streams.
#if defined(__AVX512F__)
constexpr bool kStreams = true;
SENET_INLINE void stream(float* p, VecF v) { _mm512_stream_ps(p, (__m512)v); }
SENET_INLINE void stream(double* p, VecD v) { _mm512_stream_pd(p, (__m512d)v); }
template <class T>
SENET_INLINE void stream(T* p, VecF v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(v, T{}));
}
SENET_INLINE void end_streams() { _mm_sfence(); }
#elif defined(__AVX2__)
constexpr bool kStreams = true;
SENET_INLINE void stream(float* p, VecF v) { _mm256_stream_ps(p, (__m256)v); }
SENET_INLINE void stream(double* p, VecD v) { _mm256_stream_pd(p, (__m256d)v); }
template <class T>
SENET_INLINE void stream(T* p, VecF v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrow(v, T{}));
}
SENET_INLINE void end_streams() { _mm_sfence(); }
#else
constexpr bool kStreams = false;
template <class T>
SENET_INLINE void stream(T* p, Vec<Acc<T>> v) {
  store(p, v);
}
SENET_INLINE void end_streams() {}
#endif

// Tells the processor that this is a loop that waits.
SENET_INLINE void pause() {
#if defined(__SSE2__)
  _mm_pause();
#elif defined(__ARM_NEON)
  __asm__ volatile("yield");
#endif
}

// ---- horizontal sum, bit masks ----

SENET_INLINE float sum(VecF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#elif defined(__ARM_NEON)
  return vaddvq_f32((float32x4_t)v);
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
SENET_INLINE double sum(VecD v) {
  double s = 0;
  for (int i = 0; i < kLanes<double>; ++i) s += v[i];
  return s;
}

// The horizontal sums of four vectors at once: a quarter of the shuffles.
SENET_INLINE void sum4(VecF a, VecF b, VecF c, VecF d, float* out) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const auto halve = [](VecF v) {
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  };
#else
  const auto halve = [](VecF v) { return (__m256)v; };
#endif
  const __m256 pairs =
      _mm256_hadd_ps(_mm256_hadd_ps(halve(a), halve(b)), _mm256_hadd_ps(halve(c), halve(d)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#elif defined(__ARM_NEON)
  const float32x4_t ab = vpaddq_f32((float32x4_t)a, (float32x4_t)b);
  vst1q_f32(out, vpaddq_f32(ab, vpaddq_f32((float32x4_t)c, (float32x4_t)d)));
#else
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}
SENET_INLINE void sum4(VecD a, VecD b, VecD c, VecD d, double* out) {
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}

// Exchanges blocks of kHalf lanes between vectors that are kHalf apart; all sizes make a transposed
// matrix.
template <int kHalf, class V, int... kLane>
SENET_INLINE void exchange(V& low, V& high, std::integer_sequence<int, kLane...>) {
  constexpr int L = sizeof...(kLane);
  const V a = low, b = high;
  low = __builtin_shufflevector(a, b, (kLane & kHalf ? L + kLane - kHalf : kLane)...);
  high = __builtin_shufflevector(a, b, (kLane & kHalf ? L + kLane : kLane + kHalf)...);
}
template <class A, int kHalf = kLanes<A> / 2>
SENET_INLINE void transpose(Vec<A> (&v)[kLanes<A>]) {
  constexpr int L = kLanes<A>;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i & kHalf) continue;
    exchange<kHalf>(v[i], v[i + kHalf], std::make_integer_sequence<int, L>{});
  }
  if constexpr (kHalf > 1) transpose<A, kHalf / 2>(v);
}

// Bit i says not(v[i] <= 0): true for NaN, as eager's relu passes NaN on.
SENET_INLINE uint32_t positive_bits(VecF v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NLE_UQ);
#elif defined(__AVX2__)
  const __m256 m = _mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_NLE_UQ);
  return static_cast<uint32_t>(_mm256_movemask_ps(m));
#elif defined(__ARM_NEON)
  const uint32x4_t lane_bits = {1, 2, 4, 8};
  return vaddvq_u32(vbicq_u32(lane_bits, vcleq_f32((float32x4_t)v, vdupq_n_f32(0))));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<float>; ++i) bits |= static_cast<uint32_t>(!(v[i] <= 0)) << i;
  return bits;
#endif
}
SENET_INLINE uint32_t positive_bits(VecD v) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<double>; ++i) bits |= static_cast<uint32_t>(!(v[i] <= 0)) << i;
  return bits;
}

// Bits of elements [i, i + n) of a row of bits; i is a multiple of the lanes.
template <class A>
SENET_INLINE void store_bits(uint8_t* row, int64_t i, uint32_t bits, int n) {
  if (n < 32) bits &= (1u << n) - 1;
  if (kLanes<A> >= 8) {
    for (int byte = 0; byte * 8 < n; ++byte)
      row[i / 8 + byte] = static_cast<uint8_t>(bits >> (8 * byte));
  } else if (i % 8 == 0) {
    row[i / 8] = static_cast<uint8_t>(bits);
  } else {
    row[i / 8] = static_cast<uint8_t>(row[i / 8] | (bits << (i % 8)));
  }
}
template <class A>
SENET_INLINE uint32_t load_bits(const uint8_t* row, int64_t i, int n) {
  uint32_t bits = 0;
  for (int byte = 0; byte * 8 < n; ++byte)
    bits |= static_cast<uint32_t>(row[i / 8 + byte]) << (8 * byte);
  return kLanes<A> >= 8 ? bits : bits >> (i % 8);
}
// v where the bit is set, zero elsewhere: selects, so that Inf and NaN do not leak.
template <class A>
SENET_INLINE Vec<A> select_bits(uint32_t bits, Vec<A> v) {
  using I = typename Simd<A>::I;
  I lane_bit;
  for (int i = 0; i < kLanes<A>; ++i) lane_bit[i] = 1 << i;
  const I on = ((I{} + static_cast<int>(bits)) & lane_bit) != 0;
  return on ? v : Vec<A>{};
}

}  // namespace
}  // namespace SENET_ISA
}  // namespace senet
