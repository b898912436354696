// A block's slice of an image, and a thread's way through it.
//
// A slice is looked at as rows: `outer` rows of `inner` adjacent elements, `pitch` elements apart.
// With positions adjacent ("rows" layout) a row is a channel; with channels adjacent
// ("channels-last") a row is a position.
#pragma once

#include "units.cuh"

namespace senet {
namespace gpu {

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
      load_eight(per_channel + at, out);  // arrays are padded to units
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

  // `possible`: whether the kernel has calls with one at all.
  SENET_DEVICE Affine(const Parameters& w, const Plan& p, Range channels, bool possible = true) {
    A* a = reinterpret_cast<A*>(shared_memory() + p.at.affine);
    A* b = a + (p.local_channels + kUnit - 1) / kUnit * kUnit;
    there = possible && w.affine_scale != nullptr;
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

}  // namespace gpu
}  // namespace senet
