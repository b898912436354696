// What all kernels are built from: units of eight elements, walks over a block's slice of an
// image, sums over it, and the exchange between the blocks that share an image.
//
// A slice is looked at as rows: `outer` rows of `inner` adjacent elements, `pitch` elements apart.
// With positions adjacent ("rows" layout) a row is a channel; with channels adjacent
// ("channels-last") a row is a position. Either way each thread takes a unit of eight elements at
// a time, and eight elements are one byte of the bit mask that after="relu" leaves for backward.
//
//   kVector: every unit is read and written in 16-byte accesses. In rows layout a slice is then one
//   flat run of elements, and a unit may reach over the end of a channel into the next ones.
//   Otherwise units start anew in each row, the last one of a row is shorter, and elements are
//   read one by one: for odd extents and misaligned tensors.
#pragma once

#include "plan.h"
#include "pointwise.cuh"

namespace senet {
namespace gpu {

constexpr int kUnit = 8;
constexpr int kChain = 64;  // at most so many additions in a row into one accumulator
constexpr int kForwardThreads = 256;
constexpr int kBackwardThreads = 384;  // at most
constexpr uint32_t kWholeWarp = 0xffffffffu;

// Accumulation type for elements of so many bytes.
template <int kBytes>
struct Accumulation {
  using Type = float;
};
template <>
struct Accumulation<8> {
  using Type = double;
};

// ---- units ----

SENET_DEVICE uint32_t low_half(float v, bool half) {
  return half ? to_half(v).bits : to_bf16(v).bits;
}
SENET_DEVICE float from_16(uint32_t bits, bool half) {
  const uint16_t low = static_cast<uint16_t>(bits);
  return half ? to_float(half_t{low}) : to_float(bf16_t{low});
}

// Eight 16-bit elements out of one 16-byte vector, and back.
SENET_DEVICE void unpack16(uint4 raw, bool half, float* v) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  if (half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = to_float(half_t{static_cast<uint16_t>(words[i])});
      v[2 * i + 1] = to_float(half_t{static_cast<uint16_t>(words[i] >> 16)});
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = __uint_as_float(words[i] << 16);
      v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}
SENET_DEVICE uint4 pack16(const float* v, bool half) {
  uint32_t words[4];
  if (half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = to_half(v[2 * i]).bits | (uint32_t(to_half(v[2 * i + 1]).bits) << 16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = to_bf16(v[2 * i]).bits | (uint32_t(to_bf16(v[2 * i + 1]).bits) << 16);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

enum class From { global, stream, shared };  // stream: global memory not read again

template <From kFrom>
SENET_DEVICE uint4 load16_from(const char* p) {
  return kFrom == From::stream ? load16_stream(p) : load16(p);
}

// v[0..count) from p on; count is 8 where kVector. `half` tells fp16 from bf16.
template <int kBytes, bool kVector, From kFrom, class A>
SENET_DEVICE void load_unit(const char* p, int count, bool half, A* v) {
  if constexpr (kVector && kBytes == 2) {
    unpack16(load16_from<kFrom>(p), half, v);
  } else if constexpr (kVector && kBytes == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 raw = load16_from<kFrom>(p + 16 * i);
      v[4 * i] = __uint_as_float(raw.x);
      v[4 * i + 1] = __uint_as_float(raw.y);
      v[4 * i + 2] = __uint_as_float(raw.z);
      v[4 * i + 3] = __uint_as_float(raw.w);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      v[j] = A(0);
      if (j < count) {
        if constexpr (kBytes == 2) {
          v[j] = from_16(reinterpret_cast<const uint16_t*>(p)[j], half);
        } else {
          v[j] = reinterpret_cast<const A*>(p)[j];
        }
      }
    }
  }
}

template <int kBytes, bool kVector, class A>
SENET_DEVICE void store_unit(char* p, int count, bool half, const A* v) {
  if constexpr (kVector && kBytes == 2) {
    store16_stream(p, pack16(v, half));
  } else if constexpr (kVector && kBytes == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store16_stream(p + 16 * i,
                     make_uint4(__float_as_uint(v[4 * i]), __float_as_uint(v[4 * i + 1]),
                                __float_as_uint(v[4 * i + 2]), __float_as_uint(v[4 * i + 3])));
    }
  } else {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      if (j < count) {
        if constexpr (kBytes == 2) {
          reinterpret_cast<uint16_t*>(p)[j] = static_cast<uint16_t>(low_half(v[j], half));
        } else {
          reinterpret_cast<A*>(p)[j] = v[j];
        }
      }
    }
  }
}

template <class A>
SENET_DEVICE A sum8(const A* v) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// ---- parameters, which may be float beside 16-bit images ----

template <class A>
SENET_DEVICE A parameter_at(DType dtype, const void* p, int64_t i) {
  if constexpr (sizeof(A) == 8) {
    return static_cast<const double*>(p)[i];
  } else {
    if (dtype == DType::f32) return static_cast<const float*>(p)[i];
    return from_16(static_cast<const uint16_t*>(p)[i], dtype == DType::f16);
  }
}
template <class A>
SENET_DEVICE A parameter_or(DType dtype, const void* p, int64_t i, A otherwise) {
  return p ? parameter_at<A>(dtype, p, i) : otherwise;
}
SENET_DEVICE int size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : (dtype == DType::f32 ? 4 : 2);
}

// A matrix of parameters, in global or shared memory.
struct Matrix {
  const char* p;
  DType dtype;
  int64_t pitch;  // elements from one row to the next
  bool vector;    // rows begin at multiples of 16 bytes
};

// A part of a dense matrix, `pitch` elements wide, that begins at element `first`.
SENET_DEVICE Matrix matrix_at(const void* data, DType dtype, int64_t pitch, int64_t first) {
  const char* p = static_cast<const char*>(data) + first * size_of(dtype);
  const bool vector = reinterpret_cast<uintptr_t>(p) % 16 == 0 && pitch % kUnit == 0;
  return {p, dtype, pitch, vector};
}

// The first rows and columns of m, copied into shared memory; a row's pitch is whole units.
inline __device__ __noinline__ void copy_weights(Matrix m, int rows, int columns, char* to) {
  const int size = size_of(m.dtype), pitch = (columns + kUnit - 1) / kUnit * kUnit;
  for (int64_t i = threadIdx.x; i < int64_t(rows) * columns; i += blockDim.x) {
    const int64_t r = i / columns, k = i % columns;
    const char* from = m.p + (r * m.pitch + k) * size;
    char* there = to + (r * pitch + k) * size;
    if (size == 2) {
      *reinterpret_cast<uint16_t*>(there) = *reinterpret_cast<const uint16_t*>(from);
    } else if (size == 4) {
      *reinterpret_cast<float*>(there) = *reinterpret_cast<const float*>(from);
    } else {
      *reinterpret_cast<double*>(there) = *reinterpret_cast<const double*>(from);
    }
  }
}
// Moves m there, and `to` behind it. To be read after a barrier.
SENET_DEVICE void keep(Matrix& m, int rows, int columns, char*& to) {
  copy_weights(m, rows, columns, to);
  m = {to, m.dtype, (columns + kUnit - 1) / kUnit * kUnit, true};
  to += (rows * m.pitch * size_of(m.dtype) + 15) / 16 * 16;
}

// w[0..8) from row r, columns k to k + count of it.
template <class A>
SENET_DEVICE void load_weights(const Matrix& m, int64_t r, int k, int count, A* w) {
  const char* p = m.p + (r * m.pitch + k) * size_of(m.dtype);
  const bool half = m.dtype == DType::f16;
  if constexpr (sizeof(A) == 8) {
    load_unit<8, false, From::global>(p, count, false, w);
  } else if (m.dtype == DType::f32) {
    if (m.vector && count == kUnit) {
      load_unit<4, true, From::global>(p, count, false, w);
    } else {
      load_unit<4, false, From::global>(p, count, false, w);
    }
  } else if (m.vector && count == kUnit) {
    load_unit<2, true, From::global>(p, count, half, w);
  } else {
    load_unit<2, false, From::global>(p, count, half, w);
  }
}

// ---- the slice ----

struct Range {
  int begin, end;
  SENET_DEVICE int size() const { return end - begin; }
};

// Part `rank` of [0, n) cut into `blocks` parts, multiples of `granule` but for the end.
SENET_DEVICE Range part_of(int n, int granule, int rank, int blocks) {
  const int64_t units = (int64_t(n) + granule - 1) / granule;
  const int64_t begin = units * rank / blocks * granule,
                end = units * (rank + 1) / blocks * granule;
  return {static_cast<int>(begin < n ? begin : n), static_cast<int>(end < n ? end : n)};
}

struct View {
  bool last;         // channels-last
  Range channels;    // of this block
  Range positions;   // of this block
  int outer, inner;  // rows, and elements in one
  int64_t pitch;     // of the image
  int64_t first;     // element of the image at which the slice begins
};

SENET_DEVICE View make_view(const Shape& s, const Plan& p, int rank) {
  View v;
  const int c = static_cast<int>(s.channels), n = static_cast<int>(s.positions);
  v.last = s.channels_last;
  const bool channels = p.axis == Axis::channels;
  v.channels = channels ? part_of(c, p.granule, rank, p.blocks) : Range{0, c};
  v.positions = channels ? Range{0, n} : part_of(n, p.granule, rank, p.blocks);
  v.outer = v.last ? v.positions.size() : v.channels.size();
  v.inner = v.last ? v.channels.size() : v.positions.size();
  v.pitch = v.last ? s.channels : s.positions;
  v.first = v.last ? v.positions.begin * v.pitch + v.channels.begin
                   : v.channels.begin * v.pitch + v.positions.begin;
  return v;
}

// A thread's way through a slice, unit by unit, together with the other threads of the block.
template <bool kVector>
struct Walk {
  uint32_t row, at;  // of the unit's first element
  uint32_t row_step, at_step, width;

  SENET_DEVICE explicit Walk(const View& v) {
    width = kVector ? v.inner : (v.inner + kUnit - 1) / kUnit * kUnit;
    if (width == 0) width = kUnit, row_step = 0;
    const uint32_t first = kUnit * threadIdx.x, step = kUnit * blockDim.x;
    row = v.inner ? first / width : v.outer;
    at = first % width;
    row_step = step / width;
    at_step = step % width;
  }
  SENET_DEVICE bool inside(const View& v) const { return row < static_cast<uint32_t>(v.outer); }
  SENET_DEVICE void advance() {
    row += row_step;
    at += at_step;
    if (at >= width) {
      at -= width;
      ++row;
    }
  }
  // Elements of the unit.
  SENET_DEVICE int count(const View& v) const {
    if constexpr (kVector) return kUnit;
    const int left = v.inner - static_cast<int>(at);
    return left < kUnit ? left : kUnit;
  }
  // Elements from the beginning of the image, and of the slice as it lies in shared memory.
  SENET_DEVICE int64_t in_image(const View& v) const { return v.first + row * v.pitch + at; }
  SENET_DEVICE int64_t in_slice(const View& v) const { return int64_t(row) * v.inner + at; }

  // Each element's value out of one per channel of the slice.
  template <class A>
  SENET_DEVICE void spread(const View& v, const A* per_channel, A* out) const {
    if (v.last) {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) out[j] = per_channel[at + j];  // arrays are padded to units
      return;
    }
    uint32_t channel = row, end = v.inner - at;
    A value = per_channel[channel];
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      if (kVector && j == static_cast<int>(end)) {
        ++channel;
        end += v.inner;
        value = per_channel[channel];
      }
      out[j] = value;
    }
  }
  // Takes the values of positions from `limit` on away.
  template <class A>
  SENET_DEVICE void only_below(const View& v, int limit, A instead, A* values) const {
    uint32_t position = v.last ? v.positions.begin + row : v.positions.begin + at;
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      if (position >= static_cast<uint32_t>(limit)) values[j] = instead;
      if (!v.last && ++position == static_cast<uint32_t>(v.positions.end)) position = 0;
    }
  }
};

// The affine map before `before`: q = a x + b with a and b of each channel of the slice, in shared
// memory. It stays there for all images.
template <class A>
struct Affine {
  const A *scale, *shift;
  bool there;

  SENET_DEVICE Affine(const Parameters& w, const Plan& p, Range channels) {
    A* a = reinterpret_cast<A*>(shared_memory() + p.at.affine);
    A* b = a + (p.local_channels + kUnit - 1) / kUnit * kUnit;
    there = w.affine_scale != nullptr;
    scale = a;
    shift = b;
    for (int c = threadIdx.x; there && c < channels.size(); c += blockDim.x) {
      a[c] = parameter_at<A>(w.dtype, w.affine_scale, channels.begin + c);
      b[c] = parameter_at<A>(w.dtype, w.affine_shift, channels.begin + c);
    }
  }
  // Of a unit in a sum: of one channel, or, channels-last, of eight from `channel` on.
  SENET_DEVICE void apply(const View& v, int channel, A* x) const {
    if (!there) return;
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      const int c = v.last ? channel + j : channel;
      x[j] = scale[c] * x[j] + shift[c];
    }
  }
  template <bool kVector>
  SENET_DEVICE void apply(const View& v, const Walk<kVector>& at, A* x) const {
    if (!there) return;
    A t[kUnit];
    at.spread(v, scale, t);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) x[j] *= t[j];
    at.spread(v, shift, t);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) x[j] += t[j];
  }
};

// ---- sums over the slice ----

// sums[k][c] of each channel c of the slice, for kSums quantities. `term(row, in_image, in_slice,
// first, last, channel, t)` gives t[k * 8 + j] for elements first <= j < last of a unit; the other
// ones are ignored. Positions from `limit` on do not count. All threads call it; when it returns
// the sums may be read after a barrier.
//
// Rows: `lanes` threads share a row and add up by shuffles; long and few rows are cut further,
// into `segments`, that meet in `scratch`.
template <bool kVector, int kSums, class A, class Term>
SENET_DEVICE void sum_rows(const View& v, const Plan& p, int limit, A* scratch, A* const* sums,
                           Term term) {
  const int lanes = p.lanes, segments = p.segments;
  const int tasks = v.outer * segments, together = blockDim.x / lanes;
  const int lane = threadIdx.x % lanes, mine = threadIdx.x / lanes;
  for (int first_task = 0; first_task < tasks; first_task += together) {
    const int task = first_task + mine;
    const int row = task / segments, segment = task % segments;
    A total[kSums] = {};
    if (task < tasks) {
      // In elements of the slice, which is flat where kVector.
      const int64_t begin = int64_t(row) * v.inner, end = begin + limit;
      const int64_t start = kVector ? begin / kUnit * kUnit : begin;
      const int64_t step = int64_t(kUnit) * lanes * segments;
      int64_t e = start + int64_t(kUnit) * (lane + segment * lanes);
      while (e < end) {
        A part[kSums] = {};
#pragma unroll 2
        for (int i = 0; i < kChain && e < end; ++i, e += step) {
          const int first = e < begin ? static_cast<int>(begin - e) : 0;
          const int last = end - e < kUnit ? static_cast<int>(end - e) : kUnit;
          A t[kSums * kUnit];
          term(v.first + row * v.pitch + (e - begin), e, first, last, row, t);
#pragma unroll
          for (int k = 0; k < kSums; ++k) {
#pragma unroll
            for (int j = 0; j < kUnit; ++j) {
              if (j < first || j >= last) t[k * kUnit + j] = A(0);
            }
            part[k] += sum8(t + k * kUnit);
          }
        }
#pragma unroll
        for (int k = 0; k < kSums; ++k) total[k] += part[k];
      }
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      for (int o = lanes / 2; o > 0; o /= 2) total[k] += __shfl_xor_sync(kWholeWarp, total[k], o);
      if (lane == 0 && task < tasks) {
        if (segments == 1) {
          sums[k][row] = total[k];
        } else {
          scratch[k * tasks + task] = total[k];
        }
      }
    }
  }
  if (segments == 1) return;
  __syncthreads();
  for (int row = threadIdx.x; row < v.outer; row += blockDim.x) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      A total = scratch[k * tasks + row * segments];
      for (int i = 1; i < segments; ++i) total += scratch[k * tasks + row * segments + i];
      sums[k][row] = total;
    }
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

// to[k][i] = the parts' sums together, of `columns` columns; or is increased by them.
template <int kSums, class A>
SENET_DEVICE void add_parts(const Columns& c, int columns, const A* scratch, A* const* to,
                            bool increase = false) {
  __syncthreads();
  const int width = c.units * kUnit;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      A total = A(0);
      for (int p0 = 0; p0 < c.parts; p0 += kChain) {
        A chain = A(0);
        for (int p = p0; p < c.parts && p < p0 + kChain; ++p) {
          chain += scratch[(k * c.parts + p) * width + i];
        }
        total += chain;
      }
      to[k][i] = increase ? to[k][i] + total : total;
    }
  }
}

// The same sums channels-last: each thread adds up eight columns over some of the rows.
template <bool kVector, int kSums, class A, class Term>
SENET_DEVICE void sum_columns(const View& v, int limit, A* scratch, A* const* sums, Term term) {
  Columns c(v.inner);
  const int width = c.units * kUnit;
  const int left = limit - v.positions.begin;
  const int rows = left < 0 ? 0 : (left < v.outer ? left : v.outer);
  for (; c.mine(); c.k += c.parts > 1 ? c.units : static_cast<int>(blockDim.x)) {
    const int at = c.k * kUnit;
    const int count = kVector || v.inner - at >= kUnit ? kUnit : v.inner - at;
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) scratch[(k * c.parts + c.part) * width + at + j] = A(0);
    }
    int row = c.part;
    while (row < rows) {
      A part[kSums * kUnit] = {};
#pragma unroll 2
      for (int i = 0; i < kChain && row < rows; ++i, row += c.parts) {
        A t[kSums * kUnit];
        term(v.first + row * v.pitch + at, int64_t(row) * v.inner + at, 0, count, at, t);
#pragma unroll
        for (int j = 0; j < kSums * kUnit; ++j) part[j] += t[j];
      }
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          scratch[(k * c.parts + c.part) * width + at + j] += part[k * kUnit + j];
        }
      }
    }
  }
  add_parts<kSums>(Columns(v.inner), v.inner, scratch, sums);
}

// ---- the small matrix products ----

// Calls, not inlined: they are much code, and take their time once per image.

// out[r] = sum over k of m[r][k] in[k] for rows [0, rows); `in` is in shared memory. Some lanes of
// a warp share a row. `out` may be read after a barrier.
template <class A>
__device__ __noinline__ void rows_product(Matrix m, int rows, int columns, const A* in, A* out) {
  int lanes = 1;
  while (lanes < 32 && lanes * kUnit < columns) lanes *= 2;
  const int together = blockDim.x / lanes, lane = threadIdx.x % lanes;
  for (int first = 0; first < rows; first += together) {
    const int r = first + threadIdx.x / lanes;
    A total = A(0);
    if (r < rows) {
      int k = lane * kUnit;
      while (k < columns) {
        A part = A(0);
#pragma unroll 1
        for (int i = 0; i < kChain && k < columns; ++i, k += lanes * kUnit) {
          const int count = columns - k < kUnit ? columns - k : kUnit;
          A w[kUnit];
          load_weights(m, r, k, count, w);
#pragma unroll
          for (int j = 0; j < kUnit; ++j) w[j] = j < count ? w[j] * in[k + j] : A(0);
          part += sum8(w);
        }
        total += part;
      }
    }
    for (int o = lanes / 2; o > 0; o /= 2) total += __shfl_xor_sync(kWholeWarp, total, o);
    if (lane == 0 && r < rows) out[r] = total;
  }
}

// to[k] = sum over rows r of m[r][k] in[r], for columns [0, columns); or is increased by it.
template <class A>
__device__ __noinline__ void columns_product(Matrix m, int rows, int columns, const A* in,
                                             A* scratch, A* to, bool increase) {
  __syncthreads();  // scratch may be in use
  Columns c(columns);
  const int width = c.units * kUnit;
  for (; c.mine(); c.k += c.parts > 1 ? c.units : static_cast<int>(blockDim.x)) {
    const int at = c.k * kUnit;
    const int count = columns - at < kUnit ? columns - at : kUnit;
    A total[kUnit] = {};
    int row = c.part;
    while (row < rows) {
      A part[kUnit] = {};
#pragma unroll 2
      for (int i = 0; i < kChain && row < rows; ++i, row += c.parts) {
        A w[kUnit];
        load_weights(m, row, at, count, w);
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
  A* const sums[1] = {to};
  add_parts<1>(Columns(columns), columns, scratch, sums, increase);
}

// ---- the blocks that share an image ----

// Each publishes a vector, waits for the others, and adds up all the vectors in the order of their
// ranks, so that all blocks come to the same bits. Two buffers take turns: a block that is back
// here for the next image but one knows that the others have long read this one.
template <class A>
struct Team {
  Exchange exchange;
  int blocks, rank, length;
  A* buffers;           // in shared memory: two of ours; in global memory: two of every rank
  uint32_t* counter;    // of the group, in global memory
  uint32_t images = 0;  // so far

  SENET_DEVICE A* mine() const {
    if (exchange == Exchange::grid) return buffers + ((images & 1) * blocks + rank) * length;
    return buffers + (images & 1) * length;
  }
  // After every thread has written its share of mine().
  SENET_DEVICE void meet() const {
    if (exchange == Exchange::cluster) {
      cluster_sync();
      return;
    }
    __syncthreads();
    if (exchange == Exchange::none) return;
    if (threadIdx.x == 0) {
      add_release(counter, 1);
      wait_at_least(counter, (images + 1) * blocks);
    }
    __syncthreads();
  }
  SENET_DEVICE A total(int i) const {
    if (exchange == Exchange::none) return mine()[i];
    A sum = A(0);
    for (int r = 0; r < blocks; ++r) {
      if (exchange == Exchange::cluster) {
        sum += *peer(mine() + i, r);
      } else {
        sum += __ldcg(buffers + ((images & 1) * blocks + r) * length + i);
      }
    }
    return sum;
  }
  SENET_DEVICE void next_image() { ++images; }
  // Before the block exits: others may still be reading its shared memory.
  SENET_DEVICE void leave() const {
    if (exchange == Exchange::cluster) cluster_sync();
  }
};

template <class A>
SENET_DEVICE Team<A> make_team(const Plan& p, char* scratch) {
  const int rank = blockIdx.x % p.blocks, group = blockIdx.x / p.blocks;
  Team<A> team{p.exchange, p.blocks, rank, p.exchanged, nullptr, nullptr};
  if (p.exchange == Exchange::grid) {
    team.buffers =
        reinterpret_cast<A*>(scratch + p.of_exchange) + int64_t(2) * group * p.blocks * p.exchanged;
    team.counter = reinterpret_cast<uint32_t*>(scratch + p.of_counters) + 32 * group;
    // The scratch memory is as it came.
    if (rank == 0 && threadIdx.x == 0) *team.counter = 0;
    grid_sync();
  } else {
    team.buffers = reinterpret_cast<A*>(shared_memory() + p.at.exchange);
  }
  return team;
}

// ---- slices that stay in shared memory ----

// A ring of slots: while one image's slice is worked on, the next ones' are on their way.
template <int kBytes>
struct Ring {
  const Plan& p;
  const View& v;
  int64_t bytes;  // of the slice

  SENET_DEVICE char* slot(uint32_t i) const {
    return shared_memory() + p.at.slots + (i % p.slots) * slot_bytes();
  }
  SENET_DEVICE int64_t slot_bytes() const { return (p.shared - p.at.slots) / p.slots; }
  SENET_DEVICE Mbarrier* arrival(uint32_t i) const {
    return reinterpret_cast<Mbarrier*>(shared_memory() + p.at.barriers) + i % p.slots;
  }

  SENET_DEVICE Ring(const Plan& plan, const View& view)
      : p(plan), v(view), bytes(int64_t(view.outer) * view.inner * kBytes) {}

  SENET_DEVICE void prepare() const {
    if constexpr (kHasClusters) {
      if (!p.bulk) return;
      if (threadIdx.x == 0) {
        for (int i = 0; i < p.slots; ++i) mbarrier_init(arrival(i), 1);
        fence_mbarrier_init();
      }
      __syncthreads();
    }
  }
  // Starts to bring in the i-th image of this block, which begins at `image`; null: there is none.
  // All threads are done with the slot.
  SENET_DEVICE void start(uint32_t i, const char* image) const {
    char* to = slot(i);
    const char* from = image ? image + v.first * kBytes : nullptr;
    const int64_t row = int64_t(v.inner) * kBytes, pitch = v.pitch * kBytes;
    const bool flat = !v.last || v.inner == v.pitch;
    if constexpr (kHasClusters) {
      if (p.bulk) {
        if (!from || threadIdx.x >= 32) return;
        const int64_t piece = flat ? 16384 : row;
        if (threadIdx.x == 0) {
          fence_proxy_async();
          mbarrier_arrive_expect(arrival(i), static_cast<uint32_t>(bytes));
        }
        __syncwarp();
        for (int64_t k = threadIdx.x; k * piece < bytes; k += 32) {
          const int64_t left = bytes - k * piece;
          bulk_load(to + k * piece, from + (flat ? k * piece : k * pitch),
                    static_cast<uint32_t>(left < piece ? left : piece), arrival(i));
        }
        return;
      }
    }
    if (from) {
      if (flat) {
        for (int64_t k = 16 * threadIdx.x; k < bytes; k += 16 * blockDim.x) {
          async_copy16(to + k, from + k);
        }
      } else {
        const int per_row = static_cast<int>(row / 16);
        for (int k = threadIdx.x; k < per_row * v.outer; k += blockDim.x) {
          async_copy16(to + int64_t(16) * k, from + (k / per_row) * pitch + 16 * (k % per_row));
        }
      }
    }
    async_commit();
  }
  // Until image i is there, for all threads.
  SENET_DEVICE void wait(uint32_t i) const {
    if constexpr (kHasClusters) {
      if (p.bulk) {
        mbarrier_wait(arrival(i), (i / p.slots) & 1);
        return;
      }
    }
    if (p.slots == 1) {
      async_wait<0>();
    } else if (p.slots == 2) {
      async_wait<1>();
    } else {
      async_wait<2>();
    }
    __syncthreads();
  }
};

// How many positions of image b count in its mean; none where a length makes no sense.
SENET_DEVICE int counted(const Shape& s, const int64_t* lengths, int64_t b) {
  if (!lengths) return static_cast<int>(s.positions);
  return lengths[b] < 0 || lengths[b] > s.positions ? 0 : static_cast<int>(lengths[b]);
}

}  // namespace gpu
}  // namespace senet
