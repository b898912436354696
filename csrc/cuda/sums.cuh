// Sums over a slice by channel, and the products with the small matrices of the excitation.
#pragma once

#include "slice.cuh"

namespace senet {
namespace gpu {

// ---- sums over the slice ----

// sums[c] of each channel c of the slice. `term(in_image, in_slice, last, channel, t)` gives t[j]
// for elements j < last of a unit; the other ones are ignored. Positions from `limit` on do not
// count. All threads call it; when it returns the sums may be read after a barrier.
//
// Rows: `lanes` threads share a row and add up by shuffles; long and few rows are cut further,
// into `segments`, that meet in `scratch`.
template <bool kVector, class A, class Term>
SENET_DEVICE void sum_rows(const View& v, const Plan& p, int limit, A* scratch, A* sums,
                           Term term) {
  const int lanes = p.lanes, segments = p.segments;
  const int tasks = v.outer * segments, together = blockDim.x / lanes;
  const int lane = threadIdx.x % lanes, mine = threadIdx.x / lanes;
  for (int first_task = 0; first_task < tasks; first_task += together) {
    const int task = first_task + mine;
    const int row = task / segments, segment = task % segments;
    A total = A(0);
    if (task < tasks) {
      // In elements of the slice, which is flat where kVector.
      const int64_t begin = int64_t(row) * v.inner, end = begin + limit;
      const int64_t start = kVector ? begin / kUnit * kUnit : begin;
      const int64_t step = int64_t(kUnit) * lanes * segments;
      int64_t e = start + int64_t(kUnit) * (lane + segment * lanes);
      while (e < end) {
        A part = A(0);
#pragma unroll 2
        for (int i = 0; i < kChain && e < end; ++i, e += step) {
          const int first = e < begin ? static_cast<int>(begin - e) : 0;
          const int last = end - e < kUnit ? static_cast<int>(end - e) : kUnit;
          A t[kUnit];
          term(v.first + row * v.pitch + (e - begin), e, last, row, t);
#pragma unroll
          for (int j = 0; j < kUnit; ++j) {
            if (j < first || j >= last) t[j] = A(0);
          }
          part += sum8(t);
        }
        total += part;
      }
    }
    for (int o = lanes / 2; o > 0; o /= 2) total += __shfl_xor_sync(kWholeWarp, total, o);
    if (lane == 0 && task < tasks) (segments == 1 ? sums : scratch)[task] = total;
  }
  if (segments == 1) return;
  __syncthreads();
  for (int row = threadIdx.x; row < v.outer; row += blockDim.x) {
    A total = scratch[row * segments];
    for (int i = 1; i < segments; ++i) total += scratch[row * segments + i];
    sums[row] = total;
  }
}

// How the threads of a block share out columns: unit k of a row, and every parts-th row.
struct Columns {
  int units, parts, k, part;
  SENET_DEVICE explicit Columns(int inner) {
    units = (inner + kUnit - 1) / kUnit;
    const int threads = blockDim.x;
    parts = units && units < threads ? threads / units : 1;
    k = parts > 1 ? threadIdx.x % units : threadIdx.x;
    part = parts > 1 ? threadIdx.x / units : 0;
  }
  SENET_DEVICE bool mine() const { return k < units && part < parts; }
};

// to[i] = the parts' sums together, of `columns` columns; or is increased by them.
template <class A>
SENET_DEVICE void add_parts(const Columns& c, int columns, const A* scratch, A* to,
                            bool increase = false) {
  __syncthreads();
  const int width = c.units * kUnit;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    A total = A(0);
    for (int p0 = 0; p0 < c.parts; p0 += kChain) {
      A chain = A(0);
      for (int p = p0; p < c.parts && p < p0 + kChain; ++p) chain += scratch[p * width + i];
      total += chain;
    }
    to[i] = increase ? to[i] + total : total;
  }
}

// The same sums channels-last: each thread adds up eight columns over some of the rows.
template <bool kVector, class A, class Term>
SENET_DEVICE void sum_columns(const View& v, int limit, A* scratch, A* sums, Term term) {
  Columns c(v.inner);
  const int width = c.units * kUnit;
  const int left = limit - v.positions.begin;
  const int rows = left < 0 ? 0 : (left < v.outer ? left : v.outer);
  for (; c.mine(); c.k += c.parts > 1 ? c.units : static_cast<int>(blockDim.x)) {
    const int at = c.k * kUnit;
    const int count = kVector || v.inner - at >= kUnit ? kUnit : v.inner - at;
    A total[kUnit] = {};
    int row = c.part;
    while (row < rows) {
      A part[kUnit] = {};
#pragma unroll 2
      for (int i = 0; i < kChain && row < rows; ++i, row += c.parts) {
        A t[kUnit];
        term(v.first + row * v.pitch + at, int64_t(row) * v.inner + at, count, at, t);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) part[j] += t[j];
      }
#pragma unroll
      for (int j = 0; j < kUnit; ++j) total[j] += part[j];
    }
#pragma unroll
    for (int j = 0; j < kUnit; ++j) scratch[c.part * width + at + j] = total[j];
  }
  add_parts(Columns(v.inner), v.inner, scratch, sums);
}

// ---- the small matrix products ----

// Calls, not inlined: they are much code, and take their time once per image.

// Rows whose loads are on their way together: as many as there are registers for.
constexpr int kAtATime = 2;
constexpr int kAtATimeTransposed = 4;

// out[r] = sum over k of m[r][k] in[k] for rows [0, rows); `in` is in shared memory. Some lanes of
// a warp share a row. `out` may be read after a barrier.
template <class A>
__device__ __noinline__ void rows_product(Matrix m, int rows, int columns, const A* in, A* out) {
  int lanes = 1;
  while (lanes < 32 && lanes * kUnit < columns) lanes *= 2;
  const int together = blockDim.x / lanes, lane = threadIdx.x % lanes;
  with_reader<A>(m, [&](auto read) {
    for (int first = 0; first < rows; first += kAtATime * together) {
      const int mine = first + threadIdx.x / lanes;
      A total[kAtATime] = {};
      int k = lane * kUnit;
      while (k < columns) {
        A part[kAtATime] = {};
#pragma unroll 1
        for (int i = 0; i < kChain && k < columns; ++i, k += lanes * kUnit) {
          const int count = columns - k < kUnit ? columns - k : kUnit;
          A w[kAtATime][kUnit], factors[kUnit];
#pragma unroll
          for (int q = 0; q < kAtATime; ++q) {
            // Of a row that is not there the last one's in its place: no branch, no bounds passed.
            const int r = mine + q * together;
            read(m, r < rows ? r : rows - 1, k, count, w[q]);
          }
          load_eight(in + k, factors);
#pragma unroll
          for (int q = 0; q < kAtATime; ++q) {
#pragma unroll
            for (int j = 0; j < kUnit; ++j) w[q][j] = j < count ? w[q][j] * factors[j] : A(0);
            part[q] += sum8(w[q]);
          }
        }
#pragma unroll
        for (int q = 0; q < kAtATime; ++q) total[q] += part[q];
      }
#pragma unroll
      for (int q = 0; q < kAtATime; ++q) {
        for (int o = lanes / 2; o > 0; o /= 2) total[q] += __shfl_xor_sync(kWholeWarp, total[q], o);
        const int r = mine + q * together;
        if (lane == 0 && r < rows) out[r] = total[q];
      }
    }
  });
}

// to[k] = sum over rows r of m[r][k] in[r], for columns [0, columns); or is increased by it.
template <class A>
__device__ __noinline__ void columns_product(Matrix m, int rows, int columns, const A* in,
                                             A* scratch, A* to, bool increase) {
  __syncthreads();  // scratch may be in use
  Columns c(columns);
  const int width = c.units * kUnit;
  with_reader<A>(m, [&](auto read) {
    for (; c.mine(); c.k += c.parts > 1 ? c.units : static_cast<int>(blockDim.x)) {
      const int at = c.k * kUnit;
      const int count = columns - at < kUnit ? columns - at : kUnit;
      A total[kUnit] = {};
      int row = c.part;
      while (row < rows) {
        A part[kUnit] = {};
#pragma unroll kAtATimeTransposed
        for (int i = 0; i < kChain && row < rows; ++i, row += c.parts) {
          A w[kUnit];
          read(m, row, at, count, w);
          const A factor = in[row];
#pragma unroll
          for (int j = 0; j < kUnit; ++j) part[j] += w[j] * factor;
        }
#pragma unroll
        for (int j = 0; j < kUnit; ++j) total[j] += part[j];
      }
#pragma unroll
      for (int j = 0; j < kUnit; ++j) scratch[c.part * width + at + j] = total[j];
    }
  });
  add_parts(Columns(columns), columns, scratch, to, increase);
}

}  // namespace gpu
}  // namespace senet
