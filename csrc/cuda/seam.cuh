// All that the kernels need of the machine, behind plain functions.
//
// Everything architecture-specific (inline PTX, cluster and bulk-copy instructions, memory order)
// is in this one file, so that the kernels read as C++ and can be compiled twice: by nvcc, and by
// an ordinary C++ compiler against tests/simt/simt.h, which runs them thread by thread on a CPU.
// Beside these functions the kernels use threadIdx.x, blockIdx.x, blockDim.x, gridDim.x,
// __syncthreads, __syncwarp and __shfl_xor_sync with an explicit mask; blocks are one-dimensional.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(SENET_SIMT)
#include "simt.h"
#else

#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace senet {
namespace gpu {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;  // and bulk copies
#else
constexpr bool kHasClusters = false;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
constexpr bool kHasAsyncCopies = true;
#else
constexpr bool kHasAsyncCopies = false;
#endif

#define SENET_DEVICE __device__ __forceinline__
// The same for a lambda, behind its parameters. One that is not inlined needs what it captures in
// memory.
#define SENET_INLINE __attribute__((always_inline))

// ---- 16-bit floating point, as bits ----
// Own types rather than cuda_fp16.h and cuda_bf16.h, which take longer to compile than the kernels.

struct half_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};

SENET_DEVICE float to_float(float v) { return v; }
SENET_DEVICE float to_float(bf16_t v) { return __uint_as_float(uint32_t(v.bits) << 16); }
SENET_DEVICE float to_float(half_t v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
SENET_DEVICE half_t to_half(float v) {  // to nearest, ties to even
  half_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(v));
  return h;
}
SENET_DEVICE bf16_t to_bf16(float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bf16_t b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b.bits) : "f"(v));
  return b;
#else
  const uint32_t bits = __float_as_uint(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

// ---- arithmetic to about two units in the last place, on the special-function unit ----

SENET_DEVICE float fast_exp(float v) { return __expf(v); }
SENET_DEVICE float fast_divide(float a, float b) { return __fdividef(a, b); }

// The same bits, of which the compiler knows nothing: what is made of them before a loop it does
// not work out anew in it.
SENET_DEVICE uint32_t opaque(uint32_t bits) {
  uint32_t same;
  asm volatile("mov.b32 %0, %1;" : "=r"(same) : "r"(bits));
  return same;
}

// ---- 16 bytes at a time; addresses are multiples of 16 ----

SENET_DEVICE uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
// Global memory that this kernel reads no second time.
SENET_DEVICE uint4 load16_stream(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
SENET_DEVICE void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
// Global memory that nobody reads soon: first to leave the cache.
SENET_DEVICE void store16_stream(void* p, uint4 v) { __stcs(static_cast<uint4*>(p), v); }

// Asks for the 32 bytes around p to be brought into L2: a hint, which takes no register and nobody
// waits for.
SENET_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- shared memory ----

// The dynamic shared memory of the block, as much as the launch asked for.
SENET_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char senet_shared_memory[];
  return senet_shared_memory;
}

// Bytes there that belong to no array; what the simulation is told, no hardware knows.
SENET_DEVICE void red_zone(char*, int64_t) {}

SENET_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- asynchronous copies of 16 bytes from global to shared memory (sm_80 on) ----

SENET_DEVICE void async_copy16(void* shared, const void* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
#else
  store16(shared, load16(global));
#endif
}
SENET_DEVICE void async_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most kPending of this thread's committed groups are under way.
template <int kPending>
SENET_DEVICE void async_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- bulk copies, whose arrival a barrier in shared memory counts (sm_90 on) ----

struct Mbarrier {
  uint64_t state;
};

SENET_DEVICE void mbarrier_init(Mbarrier* b, uint32_t count) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count)
               : "memory");
#endif
}
// Makes initialised barriers visible to bulk copies; before the __syncthreads that follows.
SENET_DEVICE void fence_mbarrier_init() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// Arrives, and announces so many bytes that bulk copies will bring in this phase.
SENET_DEVICE void mbarrier_arrive_expect(Mbarrier* b, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
               "r"(bytes)
               : "memory");
#endif
}
// Until the phase of this parity is complete.
SENET_DEVICE void mbarrier_wait(Mbarrier* b, uint32_t parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(b)), "r"(parity)
        : "memory");
  }
#endif
}
// Both addresses and the number of bytes are multiples of 16.
SENET_DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, Mbarrier* b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(b))
      : "memory");
#endif
}
// Orders this thread's ordinary accesses to shared memory before the bulk copies that follow.
SENET_DEVICE void fence_proxy_async() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- clusters: blocks that read each other's shared memory (sm_90 on) ----

SENET_DEVICE uint32_t cluster_rank() {
  uint32_t rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
SENET_DEVICE void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
SENET_DEVICE void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
SENET_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// The same place in the shared memory of the cluster's block `rank`.
template <class T>
SENET_DEVICE T* peer(T* shared, uint32_t rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return shared;
#endif
}

// ---- the whole grid, under a cooperative launch ----

SENET_DEVICE void add_release(uint32_t* p, uint32_t v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
SENET_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// Until *p, which only ever grows, has reached `value`.
SENET_DEVICE void wait_at_least(const uint32_t* p, uint32_t value) {
  while (load_acquire(p) < value) {
  }
}
// A barrier of all blocks. The driver keeps its state: no memory of ours has to be zero beforehand.
SENET_DEVICE void grid_sync() { cooperative_groups::this_grid().sync(); }

}  // namespace gpu
}  // namespace senet

#endif  // SENET_SIMT
