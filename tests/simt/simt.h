// The seam of csrc/cuda/seam.cuh, over the scheduler: what the kernels see when they run on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstring>

#include "scheduler.h"

// ---- CUDA's own names ----

namespace simt {

struct Index {
  unsigned x, y, z;
};
inline Index index(const std::array<unsigned, 3>& of) { return {of[0], of[1], of[2]}; }

// Of the running launch.
template <std::array<unsigned, 3> Launch::* kOf, int kAt>
struct Coordinate {
  operator unsigned() const { return (launch_of_current().*kOf)[kAt]; }
};
template <std::array<unsigned, 3> Launch::* kOf>
struct Extent {
  Coordinate<kOf, 0> x;
  Coordinate<kOf, 1> y;
  Coordinate<kOf, 2> z;
};

}  // namespace simt

#define threadIdx (::simt::index(::simt::current->thread))
#define blockIdx (::simt::index(::simt::current->block->index))
// Launch code has members of these names: no macros.
inline constexpr simt::Extent<&simt::Launch::block> blockDim{};
inline constexpr simt::Extent<&simt::Launch::grid> gridDim{};

inline void __syncthreads(simt::Where where = simt::Where::current()) {
  simt::block_barrier(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Where where = simt::Where::current()) {
  simt::together(simt::kSync, mask, 0, 0, "__syncwarp", where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              simt::Where where = simt::Where::current()) {
  return static_cast<unsigned>(
      simt::together(simt::kBallot, mask, predicate != 0, 0, "__ballot_sync", where));
}
inline int __any_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  return simt::together(simt::kAny, mask, predicate != 0, 0, "__any_sync", where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  return simt::together(simt::kAll, mask, predicate != 0, 0, "__all_sync", where) != 0;
}

namespace simt {

template <class T>
T shuffle(Call call, unsigned mask, T value, unsigned source, const char* name,
          const Where& where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = together(call, mask, bits, source, name, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              simt::Where where = simt::Where::current()) {
  const unsigned w = static_cast<unsigned>(width), lane = simt::current->lane;
  return simt::shuffle(simt::kShuffle, mask, value,
                       lane / w * w + (static_cast<unsigned>(source) % w), "__shfl_sync", where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  simt::Where where = simt::Where::current()) {
  const unsigned lane = simt::current->lane, w = static_cast<unsigned>(width);
  const unsigned source = lane ^ static_cast<unsigned>(lanes);
  return simt::shuffle(simt::kShuffleOr, mask, value, source / w > lane / w ? 32 : source,
                       "__shfl_xor_sync", where);
}
template <class T>
T atomicAdd(T* address, T value) {
  simt::yield();
  const T old = *address;
  *address = old + value;
  simt::written(address);
  return old;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// ---- the seam ----

#define SENET_DEVICE inline
#define SENET_INLINE

namespace senet {
namespace gpu {

using simt::Where;

// Both paths are compiled; the plan for the simulated device says which one runs.
constexpr bool kHasClusters = true;
constexpr bool kHasAsyncCopies = true;

struct half_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(bf16_t v) { return __uint_as_float(uint32_t{v.bits} << 16); }
inline bf16_t to_bf16(float v) {
  const uint32_t bits = __float_as_uint(v);
  if (std::isnan(v)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline float to_float(half_t v) {
  _Float16 h;
  std::memcpy(&h, &v.bits, 2);
  return static_cast<float>(h);
}
inline half_t to_half(float v) {
  const _Float16 h = static_cast<_Float16>(v);
  half_t bits;
  std::memcpy(&bits.bits, &h, 2);
  return bits;
}

// As the hardware does them, in steps that round alike: 2^(v log2 e), and a quotient that is zero
// where the divisor's reciprocal would be subnormal.
inline float fast_exp(float v) { return std::exp2(v * 1.44269504f); }
inline float fast_divide(float a, float b) {
  const float size = std::fabs(b);
  return size > 0x1p126f && size < INFINITY ? a * (b < 0 ? -0.0f : 0.0f) : a / b;
}

inline uint32_t opaque(uint32_t bits) { return bits; }

inline void check_alignment(const void* p, const Where& where) {
  if (reinterpret_cast<uintptr_t>(p) % 16) {
    simt::fail("a 16-byte access to an address that is no multiple of 16", where);
  }
}
inline uint4 load16(const void* p, Where where = Where::current()) {
  check_alignment(p, where);
  simt::accessed(simt::Access::read, p, 16);
  return *static_cast<const uint4*>(p);
}
inline uint4 load16_stream(const void* p, Where where = Where::current()) {
  return load16(p, where);
}
inline void store16(void* p, uint4 v, Where where = Where::current()) {
  check_alignment(p, where);
  simt::accessed(simt::Access::write, p, 16);
  *static_cast<uint4*>(p) = v;
}
inline void store16_stream(void* p, uint4 v, Where where = Where::current()) {
  store16(p, v, where);
}

// Hardware ignores a bad address here; sanitizers must not.
inline void prefetch_l2(const void* p) {
  [[maybe_unused]] const char byte = *static_cast<const volatile char*>(p);
  simt::accessed(simt::Access::prefetch, p, 32);
}

inline char* shared_memory() { return simt::current->block->shared; }
inline void red_zone(char* p, int64_t bytes) { simt::red_zone(p, static_cast<size_t>(bytes)); }

inline void async_copy16(void* shared, const void* global, Where where = Where::current()) {
  if (simt::device().major >= 8) {
    simt::accessed(simt::Access::read, global, 16);
    simt::async_copy(shared, global, 16, where);
  } else {
    store16(shared, load16(global, where), where);
  }
}
inline void async_commit() { simt::commit(); }
template <int kPending>
void async_wait() {
  simt::wait_for_copies(kPending);
}

struct Mbarrier {
  uint64_t state;
};
inline void mbarrier_init(Mbarrier* b, uint32_t count, Where where = Where::current()) {
  simt::mbarrier_init(&b->state, count, where);
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect(Mbarrier* b, uint32_t bytes, Where where = Where::current()) {
  simt::mbarrier_arrive(&b->state, bytes, where);
}
inline void mbarrier_wait(Mbarrier* b, uint32_t parity, Where where = Where::current()) {
  simt::mbarrier_wait(&b->state, parity, where);
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, Mbarrier* b,
                      Where where = Where::current()) {
  simt::accessed(simt::Access::read, global, bytes);
  simt::bulk_load(shared, global, bytes, &b->state, where);
}
inline void fence_proxy_async() { simt::fence_proxy(); }

inline uint32_t cluster_rank() { return simt::current->block->rank; }
inline void cluster_arrive(Where where = Where::current()) { simt::cluster_arrive(where); }
inline void cluster_wait(Where where = Where::current()) { simt::cluster_wait(where); }
inline void cluster_sync(Where where = Where::current()) {
  cluster_arrive(where);
  cluster_wait(where);
}
template <class T>
T* peer(T* shared, uint32_t rank, Where where = Where::current()) {
  return static_cast<T*>(simt::in_peer(shared, rank, where));
}

inline void add_release(uint32_t* p, uint32_t v) { atomicAdd(p, v); }
inline uint32_t load_acquire(const uint32_t* p) {
  simt::yield();
  return *static_cast<const volatile uint32_t*>(p);
}
inline void wait_at_least(const uint32_t* p, uint32_t value, Where where = Where::current()) {
  while (load_acquire(p) < value) simt::wait_for_write(p, where);
}
inline void grid_sync(Where where = Where::current()) { simt::grid_barrier(where); }

}  // namespace gpu
}  // namespace senet

// At the end, because headers of the C++ library use the word otherwise.
#define __noinline__ __attribute__((noinline))
