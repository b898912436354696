// The lean loops of the backward pass, over dy and x: ds, the sum over
// positions of m p, and dx = before'(x) (m scale + dz / S), with m = dy or,
// behind y = relu(...), dy where its bit of the mask is set. See lean.cuh.
#pragma once

#include "lean.cuh"

namespace senet {
namespace gpu {

// What the passes read and write, from the beginning of a slice on. mask is
// null where nothing follows the scaling, dresidual where it is not wanted.
struct BackwardStreams {
  Slice dy;
  const char* x;
  const uint8_t* mask;  // a byte for each unit
  char *dx, *dresidual;
};

// m out of dy, in place.
SENET_DEVICE void keep_bits(uint32_t bits, float* dy) {
#pragma unroll
  for (int j = 0; j < kUnit; ++j) dy[j] = bits >> j & 1 ? dy[j] : 0.0f;
}

// ---- ds ----

// total[j % kSums] += m p for element j of each of n units.
template <class K, From kFrom, bool kMask, int kSums>
SENET_DEVICE void add_products(const BackwardStreams& s, const Place& at, const Steps& steps, int n,
                               float* total) {
  constexpr int kTogether = K::kLoads / 2;                      // four vectors, of dy and of x
  constexpr int kTurns = kChain * kSums / (kUnit * kTogether);  // chains of at most kChain
  const int dy_step = kFrom == From::shared ? steps.in_slot : steps.in_image;
  const char* from = kFrom == From::shared ? s.dy.slot + at.in_slot : s.dy.x + at.in_image;
  const char* other = s.x + at.in_image;
  const uint8_t* mask = kMask ? s.mask + at.unit : nullptr;
  const auto add = [&](auto together, float* sums) SENET_INLINE {
    constexpr int kUnits = decltype(together)::value;
    Raw<K> dy[kUnits], x[kUnits];
    uint32_t bits[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      x[u].template load<From::global>(other + u * steps.in_image);
      dy[u].template load<kFrom>(from + u * dy_step);
      if (kMask) bits[u] = mask[u * steps.unit];
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float m[kUnit], p[kUnit];
      dy[u].unpack(m);
      if (kMask) keep_bits(bits[u], m);
      x[u].values(p);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) sums[j % kSums] += m[j] * p[j];
    }
    from += kUnits * dy_step;
    other += kUnits * steps.in_image;
    if (kMask) mask += kUnits * steps.unit;
  };
  while (n >= kTogether) {
    float part[kSums] = {};
    int turns = n / kTogether < kTurns ? n / kTogether : kTurns;
    n -= turns * kTogether;
#pragma unroll 1
    do {
      add(Constant<kTogether>{}, part);
    } while (--turns > 0);
#pragma unroll
    for (int j = 0; j < kSums; ++j) total[j] += part[j];
  }
#pragma unroll 1
  for (; n > 0; --n) add(Constant<1>{}, total);
}

template <class K, int kSums>
SENET_DEVICE void lean_products(const BackwardStreams& s, const Place& at, const Steps& step, int n,
                                float* total) {
  if (s.dy.slot) {
    s.mask ? add_products<K, From::shared, true, kSums>(s, at, step, n, total)
           : add_products<K, From::shared, false, kSums>(s, at, step, n, total);
  } else {
    s.mask ? add_products<K, From::global, true, kSums>(s, at, step, n, total)
           : add_products<K, From::global, false, kSums>(s, at, step, n, total);
  }
}

// Sums of channels. Rows of odd length have no mask here.
template <class K>
SENET_DEVICE void lean_ds(const View& v, const Plan& p, const BackwardStreams& s, float* scratch,
                          float* sums) {
  const auto units = [&s](int at, int n, auto bytes) SENET_INLINE {
    constexpr int kStep = decltype(bytes)::value;
    float total[4] = {};
    lean_products<K, 4>(s, {at, at, at / K::kUnitBytes}, {kStep, kStep, kStep / K::kUnitBytes}, n,
                        total);
    return (total[0] + total[1]) + (total[2] + total[3]);
  };
  // The elements of a neighbour count in neither factor: they may be infinite.
  const auto edge = [&s](int at, const Raw<K>& mask) SENET_INLINE {
    Raw<K> dy, x;
    x.template load<From::global>(s.x + at);
    dy.template load<From::global>((s.dy.slot ? s.dy.slot : s.dy.x) + at);
    x.keep(mask);
    dy.keep(mask);
    float m[kUnit], p[kUnit];
    dy.unpack(m);
    x.values(p);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) m[j] *= p[j];
    return sum8(m);
  };
  if (v.last) {
    const int slot_row = v.inner * K::kBytes, row = static_cast<int>(v.pitch) * K::kBytes;
    const int bit_row = static_cast<int>(v.pitch) >> kUnitShift;
    lean_sum_columns<K>(
        v, scratch, sums, [&](int part, int column, int n, int parts, float* total) SENET_INLINE {
          lean_products<K, kUnit>(s,
                                  {part * slot_row + column, part * row + column,
                                   part * bit_row + column / K::kUnitBytes},
                                  {parts * slot_row, parts * row, parts * bit_row}, n, total);
        });
  } else if (p.lanes == kLaneGroup) {
    lean_sum_rows<K, kLaneGroup>(v, p, scratch, sums, units, edge);
  } else {
    lean_sum_rows<K, 1>(v, p, scratch, sums, units, edge);
  }
}

// ---- dx ----

// before'(x) (m scale + shift) of one unit, in place of m.
template <class K>
SENET_DEVICE void unit_dx(const Raw<K>* x, const float* scale, const float* shift, float* m) {
#pragma unroll
  for (int j = 0; j < kUnit; ++j) m[j] = m[j] * scale[j] + shift[j];
  if constexpr (K::kBefore != Fn::identity) {
    float v[kUnit];
    x->unpack(v);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) m[j] = chain<K::kFast>(K::kBefore, v[j], m[j]);
  }
}

template <class K, From kFrom, bool kMask, class Factors>
SENET_DEVICE void write_units(const BackwardStreams& s, const Place& at, const Steps& steps, int n,
                              Factors scale, Factors shift) {
  constexpr bool kReadsX = K::kBefore != Fn::identity;
  constexpr int kTogether = K::kLoads / 2;
  const int dy_step = kFrom == From::shared ? steps.in_slot : steps.in_image;
  const int step = steps.in_image;
  const char* from = kFrom == From::shared ? s.dy.slot + at.in_slot : s.dy.x + at.in_image;
  const char* other = s.x + at.in_image;
  const uint8_t* mask = kMask ? s.mask + at.unit : nullptr;
  char* dx = s.dx + at.in_image;
  char* dresidual = kMask && s.dresidual ? s.dresidual + at.in_image : nullptr;
  each_group<kTogether>(n, [&](auto together) SENET_INLINE {
    constexpr int kUnits = decltype(together)::value;
    Raw<K> dy[kUnits], x[kUnits];
    uint32_t bits[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (kReadsX) x[u].template load<From::stream>(other + u * step);
      dy[u].template load<kFrom>(from + u * dy_step);
      if (kMask) bits[u] = mask[u * steps.unit];
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float m[kUnit], f[kUnit], g[kUnit];
      dy[u].unpack(m);
      if (kMask) {
        keep_bits(bits[u], m);
        if (dresidual) store_unit<K::kBytes, true>(dresidual + u * step, kUnit, K::kHalf, m);
      }
      scale.of(u, f);
      shift.of(u, g);
      unit_dx<K>(kReadsX ? &x[u] : nullptr, f, g, m);
      store_unit<K::kBytes, true>(dx + u * step, kUnit, K::kHalf, m);
    }
    from += kUnits * dy_step;
    other += kUnits * step;
    dx += kUnits * step;
    if (kMask) mask += kUnits * steps.unit;
    if (dresidual) dresidual += kUnits * step;
    scale.advance(kUnits);
    shift.advance(kUnits);
  });
}

template <class K>
SENET_DEVICE void lean_dx(const View& v, const Plan& p, const BackwardStreams& s,
                          const float* scale, const float* shift) {
  const auto visit = [&](const Place& at, const Steps& step, int n, auto factors) SENET_INLINE {
    const auto a = factors(scale), b = factors(shift);
    if (s.dy.slot) {
      s.mask ? write_units<K, From::shared, true>(s, at, step, n, a, b)
             : write_units<K, From::shared, false>(s, at, step, n, a, b);
    } else {
      s.mask ? write_units<K, From::stream, true>(s, at, step, n, a, b)
             : write_units<K, From::stream, false>(s, at, step, n, a, b);
    }
  };
  if (v.last) {
    visit_columns<K>(v, visit);
  } else if (p.lanes == kLaneGroup) {
    visit_rows<K>(v, p, visit);
  } else {
    visit_bands<K>(v, p, 0, static_cast<uint32_t>(v.outer) * v.inner / kUnit, visit);
  }
}

}  // namespace gpu
}  // namespace senet
