// The simulation's proof of itself: small kernels, each right and with one fault planted.
//
//   faults NAME right|faulty SEEDS
//
// prints a line per seed: "right", "wrong" (the numbers), or the error the simulation reports.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "simt.h"

using namespace senet::gpu;

namespace {

constexpr int kThreads = 96;

struct Data {
  const float* in;
  float* out;
  uint32_t* flags;
};

// A tree of additions over the block, or its beginning.
template <bool kFault>
__global__ void missing_barrier(const __grid_constant__ Data d) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  float sum = d.in[threadIdx.x];
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  if (!kFault) __syncthreads();
  d.out[threadIdx.x] = (sums[0] + sums[1]) + sums[2];
}

// Memory used again before everybody is done with it.
template <bool kFault>
__global__ void missing_second_barrier(const __grid_constant__ Data d) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  float total = 0;
  for (int i = 0; i < 4; ++i) {
    shared[threadIdx.x] = d.in[threadIdx.x] + static_cast<float>(i);
    __syncthreads();
    total += shared[(threadIdx.x + 32) % kThreads];
    if (!kFault) __syncthreads();
  }
  d.out[threadIdx.x] = total;
}

template <bool kFault>
__global__ void missing_cluster_sync(const __grid_constant__ Data d) {
  float* mine = reinterpret_cast<float*>(shared_memory());
  cluster_sync();
  for (int i = 0; i < 3; ++i) {
    if (threadIdx.x == 0) *mine = static_cast<float>(i + 1) * d.in[blockIdx.x];
    if (kFault) {
      __syncthreads();
    } else {
      cluster_sync();
    }
    float sum = 0;
    for (uint32_t r = 0; r < 4; ++r) sum += *peer(mine, r);
    if (threadIdx.x == 0) d.out[4 * i + blockIdx.x % 4] = sum;
    cluster_sync();
  }
}

template <bool kFault>
__global__ void out_of_bounds_write(const __grid_constant__ Data d) {
  const int last = kFault ? kThreads / 4 + 1 : kThreads / 4;
  for (int i = threadIdx.x; i < last; i += kThreads) store16(d.out + 4 * i, load16(d.in + 4 * i));
}

template <bool kFault>
__global__ void past_shared_memory(const __grid_constant__ Data d) {
  float* shared = reinterpret_cast<float*>(shared_memory());  // of kThreads floats
  shared[threadIdx.x + (kFault ? 1 : 0)] = d.in[threadIdx.x];
  __syncthreads();
  d.out[threadIdx.x] = shared[threadIdx.x + (kFault ? 1 : 0)];
}

struct Arrays {
  float first[kThreads / 2], second[kThreads / 2];
};
template <bool kFault>
__global__ void past_an_array(const __grid_constant__ Data d) {
  Arrays& shared = *reinterpret_cast<Arrays*>(shared_memory());
  const int i = threadIdx.x, half = kThreads / 2;
  if (kFault || i < half) {
    shared.first[i] = d.in[i];
  } else {
    shared.second[i - half] = d.in[i];
  }
  __syncthreads();
  d.out[i] = i < half ? shared.first[i] : shared.second[i - half];
}

template <bool kFault>
__global__ void into_a_red_zone(const __grid_constant__ Data d) {
  float* first = reinterpret_cast<float*>(shared_memory());  // of kThreads floats
  float* second = first + kThreads + 8;
  if (threadIdx.x == 0) red_zone(reinterpret_cast<char*>(first + kThreads), 8 * sizeof(float));
  __syncthreads();
  first[threadIdx.x + (kFault ? 1 : 0)] = 0;
  second[threadIdx.x] = d.in[threadIdx.x];
  d.out[threadIdx.x] = second[threadIdx.x];
}

template <bool kFault>
__global__ void misaligned_access(const __grid_constant__ Data d) {
  const int i = threadIdx.x;
  if (i >= kThreads / 4) return;
  const float* from = d.in + 4 * i;
  // Through a pointer the compiler may believe in; load16 checks by itself.
  if (kFault) from = reinterpret_cast<const float*>(reinterpret_cast<const char*>(from) + 4);
  const float4 v = *reinterpret_cast<const float4*>(from);
  d.out[4 * i] = v.x, d.out[4 * i + 1] = v.y, d.out[4 * i + 2] = v.z, d.out[4 * i + 3] = v.w;
}

template <bool kFault>
__global__ void misaligned_vector(const __grid_constant__ Data d) {
  const int i = threadIdx.x;
  if (i < kThreads / 4 - 1) store16(d.out + 4 * i, load16(d.in + 4 * i + (kFault ? 1 : 0)));
  if (i >= kThreads - 4) d.out[i] = d.in[i];
}

template <bool kFault>
__global__ void barrier_in_divergent_code(const __grid_constant__ Data d) {
  if (!kFault || threadIdx.x < 32) __syncthreads();
  d.out[threadIdx.x] = d.in[threadIdx.x];
}

template <bool kFault>
__global__ void barriers_in_two_branches(const __grid_constant__ Data d) {
  if (kFault && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  d.out[threadIdx.x] = d.in[threadIdx.x];
}

template <bool kFault>
__global__ void wrong_shuffle_mask(const __grid_constant__ Data d) {
  const int i = threadIdx.x, lane = i % 32;
  float v = d.in[i];
  if (lane < 16) v = __shfl_xor_sync(kFault ? 0xffffffffu : 0xffffu, v, 1);
  if (lane < 16) v = __shfl_xor_sync(0xffffu, v, 1);
  d.out[i] = v;
}

template <bool kFault>
__global__ void shuffle_mask_without_caller(const __grid_constant__ Data d) {
  d.out[threadIdx.x] = __shfl_xor_sync(kFault ? 0x7fffffffu : 0xffffffffu,
                                       __shfl_xor_sync(0xffffffffu, d.in[threadIdx.x], 3), 3);
}

template <bool kFault>
__global__ void shuffle_from_outside_the_mask(const __grid_constant__ Data d) {
  const int i = threadIdx.x;
  float v = d.in[i];
  if (i % 32 < 8) v = __shfl_xor_sync(0xffu, __shfl_xor_sync(0xffu, v, kFault ? 8 : 4), 4);
  d.out[i] = v;
}

template <bool kFault>
__global__ void vote_in_divergent_code(const __grid_constant__ Data d) {
  const int i = threadIdx.x;
  const bool odd = i % 2 != 0;
  bool right = __any_sync(0xffffffffu, i % 32 == 7) && !__all_sync(0xffffffffu, odd);
  if (!kFault || odd) right &= __ballot_sync(0xffffffffu, odd) == 0xaaaaaaaau;
  __syncwarp();
  d.out[i] = right ? 1.0f : 0.0f;
}

template <bool kFault>
__global__ void exit_while_a_peer_reads(const __grid_constant__ Data d) {
  float* mine = reinterpret_cast<float*>(shared_memory());
  mine[threadIdx.x] = d.in[threadIdx.x];
  cluster_sync();
  const float* other = peer(mine, (cluster_rank() + 1) % 4);
  float sum = 0;
  for (int i = 0; i < 3; ++i) {
    __syncwarp();  // where the other block may get ahead
    sum = other[threadIdx.x];
  }
  if (cluster_rank() == 0) d.out[threadIdx.x] = sum;
  if (!kFault) cluster_sync();
}

template <bool kFault>
__global__ void bulk_copy_not_awaited(const __grid_constant__ Data d) {
  char* shared = shared_memory();
  Mbarrier* barrier = reinterpret_cast<Mbarrier*>(shared + 4 * kThreads);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  for (uint32_t i = 0; i < 3; ++i) {
    if (threadIdx.x == 0) {
      fence_proxy_async();
      mbarrier_arrive_expect(barrier, 4 * kThreads);
      bulk_load(shared, d.in, 2 * kThreads, barrier);
      bulk_load(shared + 2 * kThreads, d.in + kThreads / 2, 2 * kThreads, barrier);
    }
    if (!kFault || i < 2) mbarrier_wait(barrier, i & 1);
    if (kFault) __syncthreads();
    d.out[threadIdx.x] = reinterpret_cast<float*>(shared)[threadIdx.x];
    __syncthreads();
  }
}

// Two lanes copy, into memory that was written otherwise before.
template <bool kFault>
__global__ void missing_proxy_fence(const __grid_constant__ Data d) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  Mbarrier* barrier = reinterpret_cast<Mbarrier*>(shared + kThreads);
  shared[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    if (!kFault || threadIdx.x == 0) fence_proxy_async();
    if (threadIdx.x == 0) mbarrier_arrive_expect(barrier, 4 * kThreads);
    __syncwarp();
    const int half = kThreads / 2 * static_cast<int>(threadIdx.x);
    if (threadIdx.x < 2) bulk_load(shared + half, d.in + half, 2 * kThreads, barrier);
  }
  mbarrier_wait(barrier, 0);
  d.out[threadIdx.x] = shared[threadIdx.x];
}

template <bool kFault>
__global__ void wrong_number_of_bytes(const __grid_constant__ Data d) {
  char* shared = shared_memory();
  Mbarrier* barrier = reinterpret_cast<Mbarrier*>(shared + 4 * kThreads);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_proxy_async();
    mbarrier_arrive_expect(barrier, (kFault ? 8 : 4) * kThreads);
    bulk_load(shared, d.in, 4 * kThreads, barrier);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  d.out[threadIdx.x] = reinterpret_cast<float*>(shared)[threadIdx.x];
}

template <bool kFault>
__global__ void mbarrier_not_initialised(const __grid_constant__ Data d) {
  char* shared = shared_memory();
  Mbarrier* barrier = reinterpret_cast<Mbarrier*>(shared + 4 * kThreads);
  if (threadIdx.x == 0) mbarrier_init(barrier, kThreads);
  if (!kFault) __syncthreads();
  mbarrier_arrive_expect(barrier, 0);
  mbarrier_wait(barrier, 0);
  d.out[threadIdx.x] = d.in[threadIdx.x];
}

template <bool kFault>
__global__ void async_copy_not_awaited(const __grid_constant__ Data d) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x < kThreads / 4) async_copy16(shared + 4 * threadIdx.x, d.in + 4 * threadIdx.x);
  async_commit();
  async_commit();
  if (kFault) {
    async_wait<2>();
  } else {
    async_wait<1>();
  }
  __syncthreads();
  d.out[threadIdx.x] = shared[threadIdx.x];
  __syncthreads();
  async_wait<0>();
}

// Block i waits for block i - 1; flags in global memory.
template <bool kFault>
__global__ void flag_not_awaited(const __grid_constant__ Data d) {
  const uint32_t b = blockIdx.x;
  if (threadIdx.x == 0) {
    if (b > 0 && !kFault) wait_at_least(d.flags + b - 1, 1);
    d.out[b] = b > 0 ? d.out[b - 1] + d.in[b] : d.in[0];
    add_release(d.flags + b, 1);
  }
}

template <bool kFault>
__global__ void flag_never_set(const __grid_constant__ Data d) {
  const uint32_t b = blockIdx.x;
  if (threadIdx.x == 0) {
    if (!kFault || b != 2) add_release(d.flags, 1);
    wait_at_least(d.flags, 4);
    d.out[b] = d.in[b];
  }
}

template <bool kFault>
__global__ void missing_grid_sync(const __grid_constant__ Data d) {
  d.out[4 * threadIdx.x + blockIdx.x] = d.in[threadIdx.x];
  if (kFault) {
    __syncthreads();
  } else {
    grid_sync();
  }
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += d.out[4 * threadIdx.x + i];
  if (blockIdx.x == 1) d.out[4 * kThreads + threadIdx.x] = sum;
}

// Not every thread of the block gets to the end alike.
template <bool kFault>
__global__ void early_exit_before_barrier(const __grid_constant__ Data d) {
  if (kFault && threadIdx.x >= 64) return;
  d.out[threadIdx.x] = d.in[threadIdx.x];
  __syncthreads();
}

struct Case {
  const char* name;
  void (*right)(Data);
  void (*faulty)(Data);
  unsigned blocks, cluster;
  bool cooperative;
  size_t shared_bytes;
  int outputs;
};

#define CASE(kernel, ...) {#kernel, kernel<false>, kernel<true>, __VA_ARGS__}
const Case kCases[] = {
    CASE(missing_barrier, 1, 1, false, 12, kThreads),
    CASE(missing_second_barrier, 1, 1, false, 4 * kThreads, kThreads),
    CASE(missing_cluster_sync, 4, 4, false, 4, 12),
    CASE(out_of_bounds_write, 1, 1, false, 0, kThreads),
    CASE(past_shared_memory, 1, 1, false, 4 * kThreads, kThreads),
    CASE(past_an_array, 1, 1, false, sizeof(Arrays), kThreads),
    CASE(into_a_red_zone, 1, 1, false, 8 * kThreads + 32, kThreads),
    CASE(misaligned_access, 1, 1, false, 0, kThreads),
    CASE(misaligned_vector, 1, 1, false, 0, kThreads),
    CASE(barrier_in_divergent_code, 1, 1, false, 0, kThreads),
    CASE(barriers_in_two_branches, 1, 1, false, 0, kThreads),
    CASE(wrong_shuffle_mask, 1, 1, false, 0, kThreads),
    CASE(shuffle_mask_without_caller, 1, 1, false, 0, kThreads),
    CASE(shuffle_from_outside_the_mask, 1, 1, false, 0, kThreads),
    CASE(vote_in_divergent_code, 1, 1, false, 0, kThreads),
    CASE(exit_while_a_peer_reads, 4, 4, false, 4 * kThreads, kThreads),
    CASE(bulk_copy_not_awaited, 1, 1, false, 4 * kThreads + 8, kThreads),
    CASE(missing_proxy_fence, 1, 1, false, 4 * kThreads + 8, kThreads),
    CASE(wrong_number_of_bytes, 1, 1, false, 4 * kThreads + 8, kThreads),
    CASE(mbarrier_not_initialised, 1, 1, false, 4 * kThreads + 8, kThreads),
    CASE(async_copy_not_awaited, 1, 1, false, 4 * kThreads, kThreads),
    CASE(flag_not_awaited, 4, 1, true, 0, 4),
    CASE(flag_never_set, 4, 1, true, 0, 4),
    CASE(missing_grid_sync, 4, 1, true, 0, 5 * kThreads),
    CASE(early_exit_before_barrier, 1, 1, false, 0, kThreads),
};

// What the kernels make of in[i] = i + 1, by the right one run in the plainest order: the tests
// compare whole runs, and these against plain sums below.
std::string run_once(const Case& c, bool faulty, uint64_t seed, std::vector<float>* result) {
  simt::options.seed = seed;
  const auto in = std::make_unique<float[]>(kThreads);
  const auto out = std::make_unique<float[]>(static_cast<size_t>(c.outputs));
  std::vector<uint32_t> flags(4, 0);
  for (int i = 0; i < kThreads; ++i) in[i] = static_cast<float>(i + 1);
  std::memset(out.get(), 0xff, sizeof(float) * static_cast<size_t>(c.outputs));
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config;
  config.gridDim = c.blocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = c.shared_bytes;
  config.attrs = attributes;
  if (c.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {c.cluster, 1, 1};
  }
  if (c.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, faulty ? c.faulty : c.right,
                                               Data{in.get(), out.get(), flags.data()});
  result->assign(out.get(), out.get() + c.outputs);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 1) {
    for (const Case& c : kCases) std::puts(c.name);
    return 0;
  }
  if (count != 4) return 2;
  const bool faulty = std::strcmp(arguments[2], "faulty") == 0;
  for (const Case& c : kCases) {
    if (std::strcmp(c.name, arguments[1])) continue;
    std::vector<float> expected, got;
    const std::string failed = run_once(c, false, 1, &expected);
    if (!failed.empty()) std::printf("%s\n", failed.c_str());
    for (float v : expected) {
      if (!(v > 0)) std::puts("the right kernel left something out");
    }
    for (uint64_t seed = 0; seed < std::strtoull(arguments[3], nullptr, 10); ++seed) {
      const std::string error = run_once(c, faulty, seed, &got);
      const bool same = std::memcmp(got.data(), expected.data(), 4 * got.size()) == 0;
      std::puts(!error.empty() ? error.c_str() : same ? "right" : "wrong");
    }
    return 0;
  }
  return 2;
}
