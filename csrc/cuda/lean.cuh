// What the lean loops of both passes share: units as they lie in memory, and how threads share them
// out. The loops themselves are in passes_forward.cuh and passes_backward.cuh.
//
// A lean kernel is compiled for one dtype and one `before`; its calls have neither lengths, nor an
// affine map, nor a shift, and end in y = p scale or y = relu(p scale + residual). Everything else
// takes the general loops, in forward.cuh, backward.cuh and sums.cuh, which compute the same.
//
// Nothing is decided in a loop, and nothing divided: strides and edges are worked out once per
// image. Four 16-byte vectors are on their way before the first is used. Rows that are no whole
// vectors are still read and written as vectors, which then reach over the ends of rows:
//
//   sums    a thread, or eight of them for long rows, has a row. The vectors that it shares with
//           others are read by both; what is not its own is masked.
//   second  a band is the fewest rows that are whole vectors (8 of 49 elements, 2 of 196). A thread
//   pass    takes the same vector of every so many bands: which two rows it is of, and where one
//           ends, never changes.
#pragma once

#include "sums.cuh"

namespace senet {
namespace gpu {

constexpr int kLaneGroup = 8;  // threads side by side on a long row: 128 bytes
constexpr int kUnitShift = 3;  // log2(kUnit), for numbers that may be negative

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f(Constant<kTogether>{}) for each group of so many units, and f(Constant<1>{}) for those
// that are left over. No load depends on a condition: such a one leaves registers as they were
// where it does not hold, and ptxas then keeps them from the beginning of the kernel on.
template <int kTogether, class F>
SENET_DEVICE void each_group(int n, F f) {
#pragma unroll 1
  for (; n >= kTogether; n -= kTogether) f(Constant<kTogether>{});
  if constexpr (kTogether > 1) {
#pragma unroll 1
    for (; n > 0; --n) f(Constant<1>{});
  }
}

// What a lean kernel is compiled for. kHalf tells fp16 from bf16.
template <int kBytes_, bool kHalf_, Fn kBefore_>
struct Lean {
  static constexpr int kBytes = kBytes_;
  static constexpr bool kHalf = kHalf_;
  static constexpr Fn kBefore = kBefore_;
  static constexpr bool kFast = kBytes == 2;
  static constexpr int kVectors = kBytes / 2;  // of a unit
  static constexpr int kUnitBytes = kUnit * kBytes;
  static constexpr int kLoads = 4 / kVectors;  // units whose loads are on their way together
};

// A unit as it lies in memory.
template <class K>
struct Raw {
  uint4 v[K::kVectors];

  template <From kFrom>
  SENET_DEVICE void load(const char* p) {
#pragma unroll
    for (int i = 0; i < K::kVectors; ++i) v[i] = load16_from<kFrom>(p + 16 * i);
  }
  SENET_DEVICE void keep(const Raw& mask) {
#pragma unroll
    for (int i = 0; i < K::kVectors; ++i) {
      v[i] = make_uint4(v[i].x & mask.v[i].x, v[i].y & mask.v[i].y, v[i].z & mask.v[i].z,
                        v[i].w & mask.v[i].w);
    }
  }
  SENET_DEVICE void unpack(float* to) const {
    if constexpr (K::kBytes == 2) {
      unpack16(v[0], K::kHalf, to);
    } else {
#pragma unroll
      for (int i = 0; i < K::kVectors; ++i) {
        to[4 * i] = __uint_as_float(v[i].x);
        to[4 * i + 1] = __uint_as_float(v[i].y);
        to[4 * i + 2] = __uint_as_float(v[i].z);
        to[4 * i + 3] = __uint_as_float(v[i].w);
      }
    }
  }
  // before(x). Of zero it is zero, whichever of the lean functions it is.
  SENET_DEVICE void values(float* to) const {
    unpack(to);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) to[j] = value<K::kFast>(K::kBefore, to[j]);
  }
};

// All bits of the elements [first, last) of a unit.
template <class K>
SENET_DEVICE Raw<K> elements_mask(int first, int last) {
  uint32_t words[kUnit];
#pragma unroll
  for (int w = 0; w < K::kVectors * 4; ++w) {
    if constexpr (K::kBytes == 2) {
      const bool low = 2 * w >= first && 2 * w < last,
                 high = 2 * w + 1 >= first && 2 * w + 1 < last;
      words[w] = (low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u);
    } else {
      words[w] = w >= first && w < last ? ~0u : 0u;
    }
  }
  Raw<K> mask;
#pragma unroll
  for (int i = 0; i < K::kVectors; ++i) {
    mask.v[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  }
  return mask;
}

// ---- sums ----

// Where a lean kernel finds its slice of x: on chip, at `slot`, or in the image.
struct Slice {
  const char* slot;  // null: in the image
  const char* x;
};

// sums[row] over the rows of a slice that lies flat. kLanes threads have a row, or one of the
// plan's `segments` of it; with one, rows need not be whole units. `units(at, n, step)` is the sum
// of n units from byte `at` of the slice on, and `edge(at, mask)` of what a mask keeps of one. To
// be read after a barrier.
template <class K, int kLanes, class Units, class Edge>
SENET_DEVICE void lean_sum_rows(const View& v, const Plan& p, float* scratch, float* sums,
                                Units units, Edge edge) {
  const int groups = blockDim.x / kLanes, lane = threadIdx.x % kLanes;
  const int mine = threadIdx.x / kLanes;
  int shift = 0;
  while (1 << shift < p.segments) ++shift;
  const int tasks = v.outer << shift, segment = mine & (p.segments - 1);
  // Where a row begins in its first unit and ends in its last one. The plan has threads come to
  // rows of which that is the same.
  const int begins = (mine >> shift) * v.inner & (kUnit - 1);
  const int ends = (begins + v.inner) & (kUnit - 1);
  const bool odd = kLanes == 1 && (v.inner & (kUnit - 1)) != 0;
  const Raw<K> head = elements_mask<K>(begins, kUnit);
  const Raw<K> tail = elements_mask<K>(0, ends);
  for (int first_task = 0; first_task < tasks; first_task += groups) {
    const int task = first_task + mine;
    float total = 0;
    if (task < tasks) {
      const int begin = (task >> shift) * v.inner, end = begin + v.inner;
      const int first = (begin + kUnit - 1) >> kUnitShift, last = end >> kUnitShift;
      int each = (last - first + p.segments - 1) >> shift;
      each = (each + kLanes - 1) & -kLanes;
      const int from = first + segment * each, to = from + each < last ? from + each : last;
      const int n = (to - from - lane + kLanes - 1) >> (kLanes == 1 ? 0 : kUnitShift);
      total = units((from + lane) * K::kUnitBytes, n, Constant<kLanes * K::kUnitBytes>{});
      if (odd && segment == 0) {
        if (begins) total += edge((first - 1) * K::kUnitBytes, head);
        if (ends) total += edge(last * K::kUnitBytes, tail);
      }
    }
#pragma unroll
    for (int o = kLanes / 2; o > 0; o /= 2) total += __shfl_xor_sync(kWholeWarp, total, o);
    if (lane == 0 && task < tasks) (shift ? scratch : sums)[task] = total;
  }
  if (!shift) return;
  __syncthreads();
  for (int row = threadIdx.x; row < v.outer; row += blockDim.x) {
    float total = 0;
    for (int i = 0; i < p.segments; ++i) total += scratch[(row << shift) + i];
    sums[row] = total;
  }
}

// The same channels-last: a thread has eight columns of some rows. `units(part, column, n, parts,
// total)` adds up n units of every parts-th row from row `part` on, at byte `column` of a row.
template <class K, class Units>
SENET_DEVICE void lean_sum_columns(const View& v, float* scratch, float* sums, Units units) {
  const Columns columns(v.inner);
  Columns c = columns;
  const int width = c.units * kUnit;
  const int n = c.part < v.outer ? (v.outer - c.part + c.parts - 1) / c.parts : 0;
#pragma unroll 1
  for (; c.mine(); c.k += c.parts > 1 ? c.units : static_cast<int>(blockDim.x)) {
    float total[kUnit] = {};
    units(c.part, c.k * K::kUnitBytes, n, c.parts, total);
    float* const to = scratch + c.part * width + c.k * kUnit;
#pragma unroll
    for (int j = 0; j < kUnit; j += 4) {
      store16(to + j, make_uint4(__float_as_uint(total[j]), __float_as_uint(total[j + 1]),
                                 __float_as_uint(total[j + 2]), __float_as_uint(total[j + 3])));
    }
  }
  add_parts(columns, v.inner, scratch, sums);
}

// ---- a thread's units in the second pass ----

// Where a thread's units begin: bytes of the slice on chip and in the image, and units of the
// image, which has a byte of the mask for each; and from one unit to the next. Rows of the slice
// and of the image are apart channels-last.
struct Place {
  int in_slot, in_image, unit;
};
using Steps = Place;

// The factor of all units of a thread; or its eight columns' factors.
struct OneFactor {
  float factor;
  SENET_DEVICE void of(int, float* f) const {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) f[j] = factor;
  }
  SENET_DEVICE void advance(int) {}
};
struct ColumnFactors {
  float factors[kUnit];
  SENET_DEVICE void of(int, float* f) const {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) f[j] = factors[j];
  }
  SENET_DEVICE void advance(int) {}
};
// Of two rows, `second` elements apart, the factors of which are `step` apart from one unit to the
// next. The second row begins in the middle (kMiddle), or at element `split` or not at all.
template <bool kMiddle>
struct BandFactors {
  const float* rows;
  int second, step;
  uint32_t of_first[kUnit];  // all ones for elements of the first row, as element 0 is

  SENET_DEVICE BandFactors(const float* scale, int apart, int stride, int split)
      : rows(scale), second(apart), step(stride) {
#pragma unroll
    for (int j = 1; j < kUnit; ++j) of_first[j] = opaque(j < split ? ~0u : 0u);
  }
  SENET_DEVICE void of(int u, float* f) const {
    const float a = rows[u * step], b = rows[u * step + second];
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      if constexpr (kMiddle) {
        f[j] = j < kUnit / 2 ? a : b;
      } else if (j == 0) {
        f[j] = a;
      } else {
        f[j] = __uint_as_float((__float_as_uint(a) & of_first[j]) |
                               (__float_as_uint(b) & ~of_first[j]));
      }
    }
  }
  SENET_DEVICE void advance(int units) { rows += units * step; }
};

// visit(place, steps, n, factors) for the units of a thread, so many that their channels' factors,
// which factors(array) takes out of one per channel, can be at hand.
//
// Long rows of whole units; tasks as in the sum.
template <class K, class Visit>
SENET_DEVICE void visit_rows(const View& v, const Plan& p, Visit visit) {
  const int groups = blockDim.x / kLaneGroup, lane = threadIdx.x % kLaneGroup;
  int shift = 0;
  while (1 << shift < p.segments) ++shift;
  const int units = v.inner >> kUnitShift, tasks = v.outer << shift;
  const int each = (((units + p.segments - 1) >> shift) + kLaneGroup - 1) & -kLaneGroup;
  constexpr int kStep = kLaneGroup * K::kUnitBytes;
#pragma unroll 1
  for (int task = threadIdx.x / kLaneGroup; task < tasks; task += groups) {
    const int row = task >> shift, from = (task & (p.segments - 1)) * each;
    const int to = from + each < units ? from + each : units;
    const int n = (to - from - lane + kLaneGroup - 1) >> kUnitShift;
    const int unit = row * units + from + lane, offset = unit * K::kUnitBytes;
    visit(Place{offset, offset, unit}, Steps{kStep, kStep, kLaneGroup}, n,
          [&](const float* array) { return OneFactor{array[row]}; });
  }
}

// The bands of units [first, end); both are where a band begins.
template <class K, class Visit>
SENET_DEVICE void visit_bands(const View& v, const Plan& p, uint32_t first, uint32_t end,
                              Visit visit) {
  const uint32_t threads = blockDim.x, inner = v.inner;
  const uint32_t width = p.band * inner / kUnit;  // units of a band
  const uint32_t together = width < threads ? threads / width : 1;
  const uint32_t mine = together > 1 ? threadIdx.x / width : 0;
  const int units = static_cast<int>(together * width), bytes = units * K::kUnitBytes;
  const uint32_t bands = (first ? first / width : 0) + mine;
#pragma unroll 1
  for (uint32_t at = threadIdx.x - mine * width; at < width && mine < together; at += threads) {
    const uint32_t unit = first + mine * width + at;
    const int n = unit < end ? static_cast<int>((end - unit + units - 1) / units) : 0;
    const uint32_t row = at * kUnit / inner;
    const int split = static_cast<int>((row + 1) * inner - at * kUnit);
    const int of_row = static_cast<int>(bands * p.band + row), second = split < kUnit ? 1 : 0;
    const int stride = static_cast<int>(together) * p.band;
    const int offset = static_cast<int>(unit) * K::kUnitBytes;
    const Place place = {offset, offset, static_cast<int>(unit)};
    const Steps step = {bytes, bytes, units};
    if (inner % (kUnit / 2) == 0) {
      visit(place, step, n, [&](const float* array) SENET_INLINE {
        return BandFactors<true>(array + of_row, second, stride, split);
      });
    } else {
      visit(place, step, n, [&](const float* array) SENET_INLINE {
        return BandFactors<false>(array + of_row, second, stride, split);
      });
    }
  }
}

// Channels-last.
template <class K, class Visit>
SENET_DEVICE void visit_columns(const View& v, Visit visit) {
  Columns c(v.inner);
  const int row = static_cast<int>(v.pitch) * K::kBytes, slot_row = v.inner * K::kBytes;
  const int bit_row = static_cast<int>(v.pitch) >> kUnitShift;
  const Steps step = {c.parts * slot_row, c.parts * row, c.parts * bit_row};
  const int n = c.part < v.outer ? (v.outer - c.part + c.parts - 1) / c.parts : 0;
#pragma unroll 1
  for (; c.mine(); c.k += c.parts > 1 ? c.units : static_cast<int>(blockDim.x)) {
    const int column = c.k * K::kUnitBytes;
    visit(Place{c.part * slot_row + column, c.part * row + column, c.part * bit_row + c.k}, step, n,
          [&](const float* array) SENET_INLINE {
            ColumnFactors factors;
            load_eight(array + c.k * kUnit, factors.factors);
            return factors;
          });
  }
}

}  // namespace gpu
}  // namespace senet
