// Loops over memory: what is done to a run of adjacent elements.
//
// In rows layout (positions adjacent) a run is one channel of one image and the channel's
// parameters are the same throughout; in channels-last layout a run is one position and each
// element has its own. `Uniform` and `PerElement` are the two kinds of parameter.
//
// Sums are kept short: at most 64 additions in a row into one accumulator, which then goes into
// a total.
#pragma once

#include "pointwise.h"

namespace senet {
namespace SENET_ISA {
namespace {

constexpr int kChain = 64;

// Lanes of a whole vector; a partial one is given by an int.
struct Full {};
struct None {};
template <class T>
SENET_INLINE Vec<Acc<T>> get(const T* p, Full) {
  return load(p);
}
template <class T>
SENET_INLINE Vec<Acc<T>> get(const T* p, int n) {
  return load_n(p, n);
}
template <class T>
SENET_INLINE void put(T* p, Vec<Acc<T>> v, Full) {
  store(p, v);
}
template <class T>
SENET_INLINE void put(T* p, Vec<Acc<T>> v, int n) {
  store_n(p, v, n);
}
template <class A>
SENET_INLINE int count(Full) {
  return kLanes<A>;
}
template <class A>
SENET_INLINE int count(int n) {
  return n;
}
// Lanes beyond the end hold before(0) after the prologue: take them out of sums.
template <class A>
SENET_INLINE Vec<A> keep(Vec<A> v, Full) {
  return v;
}
template <class A>
SENET_INLINE Vec<A> keep(Vec<A> v, int n) {
  typename Simd<A>::I limit = typename Simd<A>::I{} + n;
  return lane_index<A>() < limit ? v : Vec<A>{};
}

template <class A, class Body>
SENET_INLINE void for_vectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) body(i, Full{});
  if (i < n) body(i, static_cast<int>(n - i));
}

template <class A>
struct Uniform {
  Vec<A> v;
  template <class N>
  SENET_INLINE Vec<A> at(int64_t, N) const {
    return v;
  }
};
template <class A>
struct PerElement {
  const A* p;
  template <class N>
  SENET_INLINE Vec<A> at(int64_t i, N n) const {
    return get(p + i, n);
  }
};
// One value on elements before `end`, nothing after.
template <class A>
struct Prefix {
  Vec<A> v;
  int64_t end;
  template <class N>
  SENET_INLINE Vec<A> at(int64_t i, N) const {
    const int64_t left = end - i;
    return keep<A>(v, static_cast<int>(left < 0 ? 0 : (left < kLanes<A> ? left : kLanes<A>)));
  }
};

// Asks for memory that a loop will come to. Hardware prefetchers stop at page ends, follow few
// streams at once, and some do little for memory that is about to be written. The address may lie
// beyond the end: a prefetch does not fault.
constexpr int64_t kAhead = 2048;
SENET_INLINE void will_read(const void* p, int64_t bytes = kAhead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + bytes), 0);
}
SENET_INLINE void will_write(const void* p, int64_t bytes = kAhead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + bytes), 1);
}

// ---- squeeze ----

// Sum of before(x) over one run.
template <class T, Fn kBefore>
SENET_OUTLINE Acc<T> sum_run(const T* x, int64_t n, Fn before) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> total{};
  int64_t i = 0;
  while (i + 4 * L <= n) {
    const int64_t end = i + 4 * L * kChain < n ? i + 4 * L * kChain : n;
    Vec<A> s0{}, s1{}, s2{}, s3{};
    for (; i + 4 * L <= end; i += 4 * L) {
      s0 += before_value<kBefore, A>(before, load(x + i));
      s1 += before_value<kBefore, A>(before, load(x + i + L));
      s2 += before_value<kBefore, A>(before, load(x + i + 2 * L));
      s3 += before_value<kBefore, A>(before, load(x + i + 3 * L));
    }
    total += (s0 + s1) + (s2 + s3);
  }
  for_vectors<A>(n - i, [&](int64_t j, auto lanes) {
    total += keep<A>(before_value<kBefore, A>(before, get(x + i + j, lanes)), lanes);
  });
  return sum(total);
}

// out[r] = sum of before(x) over n elements from x + r * stride. Short runs go four at a time:
// their cost is in adding up the lanes.
template <class T, Fn kBefore>
SENET_OUTLINE void sum_rows(const T* x, int64_t rows, int64_t stride, int64_t n, Fn before,
                            Acc<T>* out) {
  using A = Acc<T>;
  int64_t r = 0;
  if (n <= kChain * kLanes<A>) {
    for (; r + 4 <= rows; r += 4) {
      const T* p = x + r * stride;
      Vec<A> s0{}, s1{}, s2{}, s3{};
      for_vectors<A>(n, [&](int64_t i, auto lanes) SENET_LAMBDA {
        s0 += keep<A>(before_value<kBefore, A>(before, get(p + i, lanes)), lanes);
        s1 += keep<A>(before_value<kBefore, A>(before, get(p + stride + i, lanes)), lanes);
        s2 += keep<A>(before_value<kBefore, A>(before, get(p + 2 * stride + i, lanes)), lanes);
        s3 += keep<A>(before_value<kBefore, A>(before, get(p + 3 * stride + i, lanes)), lanes);
      });
      sum4(s0, s1, s2, s3, out + r);
    }
  }
  for (; r < rows; ++r) out[r] = sum_run<T, kBefore>(x + r * stride, n, before);
}

// total[c] = sum of before(x) over `rows` runs of n elements; `chain` is scratch of n.
template <class T, Fn kBefore>
SENET_OUTLINE void sum_columns(const T* x, int64_t rows, int64_t n, Fn before, Acc<T>* total,
                               Acc<T>* chain) {
  using A = Acc<T>;
  for_vectors<A>(n, [&](int64_t i, auto lanes) { put(total + i, Vec<A>{}, lanes); });
  for (int64_t r0 = 0; r0 < rows; r0 += 4 * kChain) {
    const int64_t r1 = r0 + 4 * kChain < rows ? r0 + 4 * kChain : rows;
    for_vectors<A>(n, [&](int64_t i, auto lanes) { put(chain + i, Vec<A>{}, lanes); });
    int64_t r = r0;
    for (; r + 4 <= r1; r += 4) {
      const T* p = x + r * n;
      for_vectors<A>(n, [&](int64_t i, auto lanes) {
        for (int j = 0; j < 4; ++j) will_read(p + j * n + i, 4 * n * sizeof(T));
        const Vec<A> a = before_value<kBefore, A>(before, get(p + i, lanes)) +
                         before_value<kBefore, A>(before, get(p + n + i, lanes));
        const Vec<A> b = before_value<kBefore, A>(before, get(p + 2 * n + i, lanes)) +
                         before_value<kBefore, A>(before, get(p + 3 * n + i, lanes));
        put(chain + i, get(chain + i, lanes) + (a + b), lanes);
      });
    }
    for (; r < r1; ++r) {
      for_vectors<A>(n, [&](int64_t i, auto lanes) {
        put(chain + i,
            get(chain + i, lanes) + before_value<kBefore, A>(before, get(x + r * n + i, lanes)),
            lanes);
      });
    }
    for_vectors<A>(n, [&](int64_t i, auto lanes) {
      put(total + i, get(total + i, lanes) + get(chain + i, lanes), lanes);
    });
  }
}

// ---- forward: y = after(before(x) scale + shift + residual) ----

// kPlain: no shift, no residual, after is identity. y may be x: each vector is read before it is
// written, none twice.
template <class T, Fn kBefore, bool kPlain, class P>
SENET_INLINE void scale_run(const T* x, const T* residual, T* y, uint8_t* bits, int64_t n, P scale,
                            P shift, bool has_shift, Fn before, Fn after) {
  using A = Acc<T>;
  for_vectors<A>(n, [&](int64_t i, auto lanes) {
    will_read(x + i);
    will_write(y + i);
    Vec<A> v = before_value<kBefore, A>(before, get(x + i, lanes)) * scale.at(i, lanes);
    if constexpr (!kPlain) {
      if (has_shift) v += shift.at(i, lanes);
      if (residual) v += get(residual + i, lanes);
      if (bits) store_bits<A>(bits, i, positive_bits(v), count<A>(lanes));
      if (after == Fn::relu) {
        v = value<A>(Fn::relu, v);
      } else if (after != Fn::identity) {
        v = value_of<A>(after, v);
      }
    }
    put(y + i, v, lanes);
  });
}

// ---- backward ----

// One run of what backward reads. `residual` is there where after needs its argument again.
template <class T>
struct BackRun {
  const T* dy;
  const T* x;
  const T* residual;
  const uint8_t* bits;
};

// The gradient before `after`: m = dy after'(pre). kPlain: after is identity.
template <class T, bool kPlain, class P, class N>
SENET_INLINE Vec<Acc<T>> through_after(const BackRun<T>& in, int64_t i, N lanes, Vec<Acc<T>> p,
                                       P scale, P shift, bool has_shift, Fn after) {
  using A = Acc<T>;
  const Vec<A> dy = get(in.dy + i, lanes);
  if constexpr (kPlain) return dy;
  if (after == Fn::identity) return dy;
  if (in.bits) return select_bits<A>(load_bits<A>(in.bits, i, count<A>(lanes)), dy);
  Vec<A> pre = p * scale.at(i, lanes);
  if (has_shift) pre += shift.at(i, lanes);
  if (in.residual) pre += get(in.residual + i, lanes);
  return chain_of<A>(after, pre, dy);
}

// Over one run: sum of m p, and of m.
template <class T, Fn kBefore, bool kPlain, class P>
SENET_OUTLINE void dot_run(const BackRun<T>& in, int64_t n, P scale, P shift, bool has_shift,
                           Fn before, Fn after, Acc<T>* ds, Acc<T>* dm) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> total{}, total_m{};
  int64_t i = 0;
  const auto step = [&](int64_t j, auto lanes, Vec<A>& s, Vec<A>& sm) SENET_LAMBDA {
    const Vec<A> p = before_value<kBefore, A>(before, get(in.x + j, lanes));
    const Vec<A> m = through_after<T, kPlain>(in, j, lanes, p, scale, shift, has_shift, after);
    s += keep<A>(m * p, lanes);
    if (has_shift) sm += keep<A>(m, lanes);
  };
  while (i + 4 * L <= n) {
    const int64_t end = i + 4 * L * kChain < n ? i + 4 * L * kChain : n;
    Vec<A> s0{}, s1{}, s2{}, s3{}, m0{}, m1{};
    for (; i + 4 * L <= end; i += 4 * L) {
      for (int j = 0; j < 4 * L; j += 64 / sizeof(T)) {
        will_read(in.x + i + j);
        will_read(in.dy + i + j);
      }
      step(i, Full{}, s0, m0);
      step(i + L, Full{}, s1, m1);
      step(i + 2 * L, Full{}, s2, m0);
      step(i + 3 * L, Full{}, s3, m1);
    }
    total += (s0 + s1) + (s2 + s3);
    total_m += m0 + m1;
  }
  for (; i + L <= n; i += L) step(i, Full{}, total, total_m);
  if (i < n) step(i, static_cast<int>(n - i), total, total_m);
  *ds = sum(total);
  if (has_shift) *dm = sum(total_m);
}

// The same per element, over `rows` runs of n: total[0..n) for m p, and [n..2n) for m.
// `row(r)` gives run r; `chained` is scratch of 2n.
template <class T, Fn kBefore, bool kPlain, class Row>
SENET_OUTLINE void dot_columns(Row row, int64_t rows, int64_t n, PerElement<Acc<T>> scale,
                               PerElement<Acc<T>> shift, bool has_shift, Fn before, Fn after,
                               Acc<T>* total, Acc<T>* chained) {
  using A = Acc<T>;
  const int64_t width = has_shift ? 2 * n : n;
  for_vectors<A>(width, [&](int64_t i, auto lanes) { put(total + i, Vec<A>{}, lanes); });
  for (int64_t r0 = 0; r0 < rows; r0 += 2 * kChain) {
    const int64_t r1 = r0 + 2 * kChain < rows ? r0 + 2 * kChain : rows;
    for_vectors<A>(width, [&](int64_t i, auto lanes) { put(chained + i, Vec<A>{}, lanes); });
    for (int64_t r = r0; r < r1; r += 2) {
      const BackRun<T> a = row(r), b = row(r + 1 < r1 ? r + 1 : r);
      const bool pair = r + 1 < r1;
      for_vectors<A>(n, [&](int64_t i, auto lanes) {
        for (const T* p : {a.x, b.x, a.dy, b.dy}) will_read(p + i, 2 * n * sizeof(T));
        const Vec<A> pa = before_value<kBefore, A>(before, get(a.x + i, lanes));
        const Vec<A> ma = through_after<T, kPlain>(a, i, lanes, pa, scale, shift, has_shift, after);
        Vec<A> s = ma * pa, sm = ma;
        if (pair) {
          const Vec<A> pb = before_value<kBefore, A>(before, get(b.x + i, lanes));
          const Vec<A> mb =
              through_after<T, kPlain>(b, i, lanes, pb, scale, shift, has_shift, after);
          s += mb * pb;
          sm += mb;
        }
        put(chained + i, get(chained + i, lanes) + s, lanes);
        if (has_shift) put(chained + n + i, get(chained + n + i, lanes) + sm, lanes);
      });
    }
    for_vectors<A>(width, [&](int64_t i, auto lanes) {
      put(total + i, get(total + i, lanes) + get(chained + i, lanes), lanes);
    });
  }
}

// dx = (m scale + dmean) before'(x), and dresidual = m; either may be null.
template <class T, Fn kBefore, bool kPlain, class P, class D>
SENET_INLINE void dx_run(const BackRun<T>& in, T* dx, T* dresidual, int64_t n, P scale, P shift,
                         bool has_shift, D dmean, Fn before, Fn after) {
  using A = Acc<T>;
  for_vectors<A>(n, [&](int64_t i, auto lanes) {
    will_read(in.dy + i);
    if (dx) will_write(dx + i);
    Vec<A> x{}, p{};
    if (kBefore != Fn::identity || !kPlain) x = get(in.x + i, lanes);
    if (!kPlain) p = before_value<kBefore, A>(before, x);
    const Vec<A> m = through_after<T, kPlain>(in, i, lanes, p, scale, shift, has_shift, after);
    if (!kPlain && dresidual) put(dresidual + i, m, lanes);
    if (dx) {
      const Vec<A> dp = m * scale.at(i, lanes) + dmean.at(i, lanes);
      put(dx + i, before_chain<kBefore, A>(before, x, dp), lanes);
    }
  });
}

// dx = dmean before'(x): what comes back through the mean alone.
template <class T, Fn kBefore, class D>
SENET_INLINE void mean_run(const T* x, T* dx, int64_t n, D dmean, Fn before) {
  using A = Acc<T>;
  for_vectors<A>(n, [&](int64_t i, auto lanes) {
    will_write(dx + i);
    Vec<A> at{};
    if (kBefore != Fn::identity) at = get(x + i, lanes);
    put(dx + i, before_chain<kBefore, A>(before, at, dmean.at(i, lanes)), lanes);
  });
}

}  // namespace
}  // namespace SENET_ISA
}  // namespace senet
