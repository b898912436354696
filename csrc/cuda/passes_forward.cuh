// The lean loops of the forward pass: the sum over positions, and the scaling. See lean.cuh.
#pragma once

#include "lean.cuh"

namespace senet {
namespace gpu {

// ---- the sum ----

// Of n units, `step` bytes apart.
template <class K, From kFrom>
SENET_DEVICE float units_sum(const char* p, int n, int step) {
  constexpr int kTogether = K::kLoads;
  float total = 0;
  while (n >= kTogether) {
    float part = 0;
    int turns = n / kTogether < kChain ? n / kTogether : kChain;
    n -= turns * kTogether;
#pragma unroll 1
    do {
      Raw<K> raw[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) raw[u].template load<kFrom>(p + u * step);
      p += kTogether * step;
      float of_units[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        float t[kUnit];
        raw[u].values(t);
        of_units[u] = sum8(t);
      }
      if constexpr (kTogether == 4) {
        part += (of_units[0] + of_units[1]) + (of_units[2] + of_units[3]);
      } else {
        part += of_units[0] + of_units[1];
      }
    } while (--turns > 0);
    total += part;
  }
#pragma unroll 1
  for (; n > 0; --n, p += step) {
    Raw<K> raw;
    float t[kUnit];
    raw.template load<kFrom>(p);
    raw.values(t);
    total += sum8(t);
  }
  return total;
}

// Of the elements of a unit that the mask keeps.
template <class K>
SENET_DEVICE float edge_sum(const char* p, const Raw<K>& mask) {
  Raw<K> raw;
  raw.template load<From::global>(p);
  raw.keep(mask);
  float t[kUnit];
  raw.values(t);
  return sum8(t);
}

// total[j] of n units, `step` bytes apart.
template <class K, From kFrom>
SENET_DEVICE void columns_sum(const char* p, int n, int step, float* total) {
  while (n >= K::kLoads) {
    float part[kUnit] = {};
    int turns = n / K::kLoads < kChain / K::kLoads ? n / K::kLoads : kChain / K::kLoads;
    n -= turns * K::kLoads;
#pragma unroll 1
    do {
      Raw<K> raw[K::kLoads];
#pragma unroll
      for (int u = 0; u < K::kLoads; ++u) raw[u].template load<kFrom>(p + u * step);
      p += K::kLoads * step;
#pragma unroll
      for (int u = 0; u < K::kLoads; ++u) {
        float t[kUnit];
        raw[u].values(t);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) part[j] += t[j];
      }
    } while (--turns > 0);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) total[j] += part[j];
  }
#pragma unroll 1
  for (; n > 0; --n, p += step) {
    Raw<K> raw;
    float t[kUnit];
    raw.template load<kFrom>(p);
    raw.values(t);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) total[j] += t[j];
  }
}

// The sum over positions of before(x).
template <class K>
SENET_DEVICE void lean_squeeze(const View& v, const Plan& p, const Slice& x, float* scratch,
                               float* sums) {
  const auto units = [&x](int at, int n, auto step) SENET_INLINE {
    constexpr int kStep = decltype(step)::value;
    return x.slot ? units_sum<K, From::shared>(x.slot + at, n, kStep)
                  : units_sum<K, From::global>(x.x + at, n, kStep);
  };
  const auto edge = [&x](int at, const Raw<K>& mask)
                        SENET_INLINE { return edge_sum<K>((x.slot ? x.slot : x.x) + at, mask); };
  if (v.last) {
    const int pitch = (x.slot ? v.inner : static_cast<int>(v.pitch)) * K::kBytes;
    lean_sum_columns<K>(v, scratch, sums,
                        [&](int part, int column, int n, int parts, float* total) SENET_INLINE {
                          const int at = part * pitch + column, step = parts * pitch;
                          x.slot ? columns_sum<K, From::shared>(x.slot + at, n, step, total)
                                 : columns_sum<K, From::global>(x.x + at, n, step, total);
                        });
  } else if (p.lanes == kLaneGroup) {
    lean_sum_rows<K, kLaneGroup>(v, p, scratch, sums, units, edge);
  } else {
    lean_sum_rows<K, 1>(v, p, scratch, sums, units, edge);
  }
}

// ---- the scaling ----

// ---- forward ----

// What the scaling reads and writes, from the beginning of a slice on. All but x and y may be null.
struct Streams {
  Slice x;
  const char* residual;
  char* y;
  uint8_t* mask;  // a byte for each unit
};

// y = p f, or relu(p f + residual), of one unit that has been read; writes what belongs to it.
template <class K, bool kResidual>
SENET_DEVICE void scale_unit(const Raw<K>& x, const Raw<K>* residual, const float* f, char* y,
                             uint8_t* mask) {
  float v[kUnit];
  x.values(v);
#pragma unroll
  for (int j = 0; j < kUnit; ++j) v[j] *= f[j];
  if constexpr (kResidual) {
    float r[kUnit];
    residual->unpack(r);
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      v[j] += r[j];
      const bool off = v[j] <= 0.0f;
      bits |= off ? 0u : 1u << j;
      v[j] = off ? 0.0f : v[j];
    }
    if (mask) *mask = static_cast<uint8_t>(bits);
  }
  store_unit<K::kBytes, true>(y, kUnit, K::kHalf, v);
}

// n units of a thread.
template <class K, From kFrom, bool kResidual, class Factors>
SENET_DEVICE void scale_units(const Streams& s, const Place& at, const Steps& steps, int n,
                              Factors factors) {
  // With a residual half of the loads are of it.
  constexpr int kTogether = kResidual ? K::kLoads / 2 : K::kLoads;
  const int step_x = kFrom == From::shared ? steps.in_slot : steps.in_image;
  const int step = steps.in_image;
  const char* from = kFrom == From::shared ? s.x.slot + at.in_slot : s.x.x + at.in_image;
  const char* added = kResidual ? s.residual + at.in_image : nullptr;
  char* y = s.y + at.in_image;
  uint8_t* mask = kResidual && s.mask ? s.mask + at.unit : nullptr;
  each_group<kTogether>(n, [&](auto together) SENET_INLINE {
    constexpr int kUnits = decltype(together)::value;
    Raw<K> x[kUnits], residual[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      x[u].template load<kFrom>(from + u * step_x);
      if (kResidual) residual[u].template load<From::stream>(added + u * step);
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float f[kUnit];
      factors.of(u, f);
      scale_unit<K, kResidual>(x[u], kResidual ? &residual[u] : nullptr, f, y + u * step,
                               kResidual && mask ? mask + u * steps.unit : nullptr);
    }
    from += kUnits * step_x;
    y += kUnits * step;
    if (kResidual) {
      added += kUnits * step;
      if (mask) mask += kUnits * steps.unit;
    }
    factors.advance(kUnits);
  });
}

template <class K, class Factors>
SENET_DEVICE void lean_scale(const Streams& s, const Place& at, const Steps& step, int n,
                             const Factors& factors) {
  if (s.x.slot) {
    s.residual ? scale_units<K, From::shared, true>(s, at, step, n, factors)
               : scale_units<K, From::shared, false>(s, at, step, n, factors);
  } else {
    s.residual ? scale_units<K, From::stream, true>(s, at, step, n, factors)
               : scale_units<K, From::stream, false>(s, at, step, n, factors);
  }
}

}  // namespace gpu
}  // namespace senet
