// The gradients of the parameters: sums over images of outer products of the vectors that the
// other kernels left. At most one launch.
//
// A block computes a tile of 32 rows by 32 columns of one of them. Its warps share out the images;
// a thread has a column, and 32 rows in registers; the left factors go round by shuffles. Then the
// warps' sums are added one after the other: the same order, and the same bits, every time.
#pragma once

#include "units.cuh"

namespace senet {
namespace gpu {

constexpr int kTile = 32;
constexpr int kGradientThreads = 256;

// out[r][k] = sum over images of left[b][r] right[b][k]. Without `left` there is one row, of ones.
struct OuterProduct {
  void* out;  // dense, of the parameters' dtype; null: not wanted
  const void *left, *right;
  int64_t left_pitch, right_pitch;  // elements from one image to the next
  int rows, columns;
  Fn of_right;  // applied to right[b][k] where apply is set...
  bool apply;
  const void* gates;  // ... or right is multiplied by of_right(gates[b][k])
  int64_t gates_pitch;
  int64_t images;
  constexpr int64_t tiles() const {
    if (!out) return 0;
    return int64_t((rows + kTile - 1) / kTile) * ((columns + kTile - 1) / kTile);
  }
};

struct GradientsLaunch {
  static constexpr int kProducts = 8;
  OuterProduct products[kProducts];
  DType dtype;  // of the parameters
};

template <class A>
SENET_DEVICE void store_parameter(DType dtype, void* p, int64_t i, A v) {
  if constexpr (sizeof(A) == 8) {
    static_cast<double*>(p)[i] = v;
  } else if (dtype == DType::f32) {
    static_cast<float*>(p)[i] = v;
  } else {
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(low_half(v, dtype == DType::f16));
  }
}

template <class A>
SENET_DEVICE void outer_tile(const OuterProduct& o, int64_t tile, DType dtype) {
  const int64_t batch = o.images;
  A* const sums = reinterpret_cast<A*>(shared_memory());  // [kTile][kTile]
  const int across = (o.columns + kTile - 1) / kTile;
  const int r0 = static_cast<int>(tile / across) * kTile;
  const int k0 = static_cast<int>(tile % across) * kTile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int k = k0 + lane, r = r0 + lane;
  const A* left = static_cast<const A*>(o.left);
  const A* right = static_cast<const A*>(o.right);
  const A* gates = static_cast<const A*>(o.gates);
  for (int i = threadIdx.x; i < kTile * kTile; i += blockDim.x) sums[i] = A(0);
  __syncthreads();
  for (int64_t first = 0; first < batch; first += int64_t(kChain) * warps) {
    A part[kTile] = {};
    const int64_t end =
        first + int64_t(kChain) * warps < batch ? first + int64_t(kChain) * warps : batch;
    for (int64_t b = first + warp; b < end; b += warps) {
      A value = k < o.columns ? right[b * o.right_pitch + k] : A(0);
      if (o.apply) {
        value = gates ? value * value_of<A>(o.of_right,
                                            k < o.columns ? gates[b * o.gates_pitch + k] : A(0))
                      : value_of<A>(o.of_right, value);
      }
      if (!left) {
        part[0] += value;
        continue;
      }
      const A mine = r < o.rows ? left[b * o.left_pitch + r] : A(0);
#pragma unroll
      for (int i = 0; i < kTile; ++i) part[i] += __shfl_sync(kWholeWarp, mine, i) * value;
    }
    for (int turn = 0; turn < warps; ++turn) {
      if (turn == warp) {
#pragma unroll
        for (int i = 0; i < kTile; ++i) sums[i * kTile + lane] += part[i];
      }
      __syncthreads();
    }
  }
  if (k >= o.columns) return;
  for (int i = warp; i < kTile && r0 + i < o.rows; i += warps) {
    store_parameter<A>(dtype, o.out, int64_t(r0 + i) * o.columns + k, sums[i * kTile + lane]);
  }
}

template <class A>
__global__ void __launch_bounds__(kGradientThreads, 2)
    gradients_kernel(const __grid_constant__ GradientsLaunch launch) {
  int64_t tile = blockIdx.x;
#pragma unroll 1
  for (int i = 0; i < GradientsLaunch::kProducts; ++i) {
    const OuterProduct& o = launch.products[i];
    const int64_t tiles = o.tiles();
    if (tile < tiles) {
      outer_tile<A>(o, tile, launch.dtype);
      return;
    }
    tile -= tiles;
  }
}

}  // namespace gpu
}  // namespace senet
