// What loops over runs of adjacent elements (runs.h) are written in: whole and partial vectors, the
// parameters that go with a run's elements, and the prologue, which comes first wherever x is read.
//
// `Uniform`, `PerElement` and `Prefix` are the kinds of parameter.
#pragma once

#include "pointwise.h"

namespace senet {
namespace SENET_ISA {
namespace {

// Lanes of a whole vector; a partial one is given by an int.
struct Full {};
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
// Around the caches where `streams` says so; partial vectors never.
template <class T>
SENET_INLINE void put(T* p, Vec<Acc<T>> v, Full, bool streams) {
  streams ? stream(p, v) : store(p, v);
}
template <class T>
SENET_INLINE void put(T* p, Vec<Acc<T>> v, int n, bool) {
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

// Goes over `rows` rows of n elements, no fewer than a vector's, that lie one after the other, in
// whole vectors but for the last: calls body(at, count, of), where of(values) gives the vector of
// the rows' values for those elements. A vector across an end has values of two rows.
template <class A, class Body>
SENET_INLINE void for_rows_as_one(int64_t rows, int64_t n, Body body) {
  constexpr int L = kLanes<A>;
  int64_t at = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t end = (r + 1) * n, whole = r + 1 < rows ? end / L * L : end;
    body(at, whole - at, [r](const A* values) SENET_LAMBDA { return broadcast<A>(values[r]); });
    at = whole;
    if (at == end) continue;
    const auto edge = typename Simd<A>::I{} + static_cast<int>(end - at);
    body(at, L, [r, edge](const A* values) SENET_LAMBDA {
      return lane_index<A>() < edge ? broadcast<A>(values[r]) : broadcast<A>(values[r + 1]);
    });
    at += L;
  }
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

// ---- the prologue: p = before(q), where q is x or a x + b ----

// As a run applies it: to what stands at place i of the run. `backward` goes from dp to dq, and
// `to_x` from dq to dx.
template <class A, Fn kBefore>
struct PlainPrologue {
  static constexpr bool kReadsX = kBefore != Fn::identity;  // the derivative does
  Fn fn;
  template <class N>
  SENET_INLINE Vec<A> forward(int64_t, N, Vec<A> x) const {
    return before_value<kBefore, A>(fn, x);
  }
  template <class N>
  SENET_INLINE Vec<A> backward(int64_t, N, Vec<A> x, Vec<A> dp) const {
    return before_chain<kBefore, A>(fn, x, dp);
  }
  template <class N>
  SENET_INLINE Vec<A> to_x(int64_t, N, Vec<A> dq) const {
    return dq;
  }
};
template <class A, class P>
struct AffinePrologue {
  static constexpr bool kReadsX = true;
  Fn fn;
  P a, b;
  template <class N>
  SENET_INLINE Vec<A> forward(int64_t i, N lanes, Vec<A> x) const {
    const Vec<A> q = a.at(i, lanes) * x + b.at(i, lanes);
    return fn == Fn::identity ? q : fn == Fn::relu ? value<A>(Fn::relu, q) : value_of<A>(fn, q);
  }
  template <class N>
  SENET_INLINE Vec<A> backward(int64_t i, N lanes, Vec<A> x, Vec<A> dp) const {
    if (fn == Fn::identity) return dp;
    return chain_of<A>(fn, a.at(i, lanes) * x + b.at(i, lanes), dp);
  }
  template <class N>
  SENET_INLINE Vec<A> to_x(int64_t i, N lanes, Vec<A> dq) const {
    return a.at(i, lanes) * dq;
  }
};

// Of a whole image: gives the prologue of the run that is channel c, or that has channels c, c + 1,
// ... as its elements. a and b are null without an affine map.
template <class A, Fn kBefore>
struct Prologue {
  Fn fn;
  const A *a, *b;
  SENET_INLINE auto of_channel(int64_t c) const {
    if constexpr (kBefore == kAffine) {
      return AffinePrologue<A, Uniform<A>>{fn, {broadcast<A>(a[c])}, {broadcast<A>(b[c])}};
    } else {
      return PlainPrologue<A, kBefore>{fn};
    }
  }
  SENET_INLINE auto from_channel(int64_t c) const {
    if constexpr (kBefore == kAffine) {
      return AffinePrologue<A, PerElement<A>>{fn, {a + c}, {b + c}};
    } else {
      return PlainPrologue<A, kBefore>{fn};
    }
  }
};

}  // namespace
}  // namespace SENET_ISA
}  // namespace senet
