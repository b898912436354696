// Loops over memory: what is done to a run of adjacent elements.
//
// In rows layout (positions adjacent) a run is one channel of one image and the channel's
// parameters are the same throughout; in channels-last layout a run is one position and each
// element has its own (lanes.h).
//
// Sums are kept short: at most 64 additions in a row into one accumulator, which then goes into
// a total.
#pragma once

#include <algorithm>

#include "lanes.h"

namespace senet {
namespace SENET_ISA {
namespace {

constexpr int kChain = 64;
// Rows of fewer bytes than this are summed in panels, of at most so many bytes at a time.
constexpr int64_t kPanelRow = 2 << 10;
constexpr int64_t kPanelBytes = 64 << 10;

// Asks for memory that a loop will come to. Hardware prefetchers stop at page ends, follow few
// streams at once, and some do little for memory that is about to be written. Not with AVX-512: a
// vector is a cache line there, so that it is a prefetch or two for each of them, and processors
// that have it lose by it (docs/performance.md); nor with NEON, where a vector is a quarter of a
// line or an eighth, and nothing says yet that it gains. The address may lie beyond the end: a
// prefetch does not fault.
constexpr int64_t kAhead = 2048;
template <int kWrite>
SENET_INLINE void prefetch([[maybe_unused]] const void* p, [[maybe_unused]] int64_t bytes) {
#if !defined(__AVX512F__) && !defined(__ARM_NEON)
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + bytes), kWrite);
#endif
}
SENET_INLINE void will_read(const void* p, int64_t bytes = kAhead) { prefetch<0>(p, bytes); }
SENET_INLINE void will_write(const void* p, int64_t bytes = kAhead) { prefetch<1>(p, bytes); }

// ---- squeeze ----

// Sum of p over one run.
template <class T, class Q>
SENET_OUTLINE Acc<T> sum_run(const T* x, int64_t n, Q prologue) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> total{};
  int64_t i = 0;
  while (i + 4 * L <= n) {
    const int64_t end = i + 4 * L * kChain < n ? i + 4 * L * kChain : n;
    Vec<A> s0{}, s1{}, s2{}, s3{};
    for (; i + 4 * L <= end; i += 4 * L) {
      s0 += prologue.forward(i, Full{}, load(x + i));
      s1 += prologue.forward(i + L, Full{}, load(x + i + L));
      s2 += prologue.forward(i + 2 * L, Full{}, load(x + i + 2 * L));
      s3 += prologue.forward(i + 3 * L, Full{}, load(x + i + 3 * L));
    }
    total += (s0 + s1) + (s2 + s3);
  }
  for_vectors<A>(n - i, [&](int64_t j, auto lanes) {
    total += keep<A>(prologue.forward(i + j, lanes, get(x + i + j, lanes)), lanes);
  });
  return sum(total);
}

// Sum of p over one run of at most kChain vectors, lane by lane.
template <class T, class Q>
SENET_INLINE Vec<Acc<T>> lane_sums(const T* x, int64_t n, Q prologue) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    s0 += prologue.forward(i, Full{}, load(x + i));
    s1 += prologue.forward(i + L, Full{}, load(x + i + L));
  }
  for_vectors<A>(n - i, [&](int64_t j, auto lanes) SENET_LAMBDA {
    s0 += keep<A>(prologue.forward(i + j, lanes, get(x + i + j, lanes)), lanes);
  });
  return s0 + s1;
}

// out[r] = sum of p over n elements from x + r * stride, which is channel c + r. Short runs' lanes
// are added up for four runs at a time, which is most of the cost of the shortest. These are also
// read side by side; others one after the other, as prefetchers fetch.
template <class T, Fn kBefore>
SENET_OUTLINE void sum_rows(const T* x, int64_t rows, int64_t stride, int64_t n,
                            Prologue<Acc<T>, kBefore> prologue, int64_t c, Acc<T>* out) {
  using A = Acc<T>;
  int64_t r = 0;
  for (; r + 4 <= rows && n <= kChain * kLanes<A>; r += 4) {
    const T* p = x + r * stride;
    const auto q0 = prologue.of_channel(c + r), q1 = prologue.of_channel(c + r + 1);
    const auto q2 = prologue.of_channel(c + r + 2), q3 = prologue.of_channel(c + r + 3);
    Vec<A> s0{}, s1{}, s2{}, s3{};
    if (n < 8 * kLanes<A>) {
      for_vectors<A>(n, [&](int64_t i, auto lanes) SENET_LAMBDA {
        s0 += keep<A>(q0.forward(i, lanes, get(p + i, lanes)), lanes);
        s1 += keep<A>(q1.forward(i, lanes, get(p + stride + i, lanes)), lanes);
        s2 += keep<A>(q2.forward(i, lanes, get(p + 2 * stride + i, lanes)), lanes);
        s3 += keep<A>(q3.forward(i, lanes, get(p + 3 * stride + i, lanes)), lanes);
      });
    } else {
      s0 = lane_sums(p, n, q0);
      s1 = lane_sums(p + stride, n, q1);
      s2 = lane_sums(p + 2 * stride, n, q2);
      s3 = lane_sums(p + 3 * stride, n, q3);
    }
    sum4(s0, s1, s2, s3, out + r);
  }
  for (; r < rows; ++r) out[r] = sum_run(x + r * stride, n, prologue.of_channel(c + r));
}

// Asks for memory from an address on, line by line, while something else is read in an order that
// hardware prefetchers do not follow. For null: for nothing.
class LinesAhead {
 public:
  explicit LinesAhead(const void* next) : next_(reinterpret_cast<uintptr_t>(next)) {}
  template <int kBytes>
  SENET_INLINE void take() {
    if (!next_) return;
    for (int at = 0; at < kBytes; at += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(next_ + at));
    }
    next_ += kBytes;
  }

 private:
  uintptr_t next_;
};

// Adds `rows` runs of n elements to `chain`, for columns c to c + kVectors vectors. The sums stay
// in registers.
template <int kVectors, class T, class Q, class Lanes>
SENET_INLINE void add_panel(const T* x, int64_t rows, int64_t n, int64_t c, Q prologue,
                            Acc<T>* chain, Lanes lanes, LinesAhead& ahead) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  constexpr int kRow = kVectors * L * sizeof(T);
  const auto p = [&](int64_t r, int v) SENET_LAMBDA {
    const int64_t i = c + v * L;
    return prologue.forward(i, lanes, get(x + r * n + i, lanes));
  };
  Vec<A> sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = get(chain + c + v * L, lanes);
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    ahead.take<4 * kRow>();
    for (int v = 0; v < kVectors; ++v) {
      sums[v] += (p(r, v) + p(r + 1, v)) + (p(r + 2, v) + p(r + 3, v));
    }
  }
  for (; r < rows; ++r) {
    ahead.take<kRow>();
    for (int v = 0; v < kVectors; ++v) sums[v] += p(r, v);
  }
  for (int v = 0; v < kVectors; ++v) put(chain + c + v * L, sums[v], lanes);
}

// The same for all columns, a panel at a time.
template <class T, class Q>
SENET_OUTLINE void add_panels(const T* x, int64_t rows, int64_t n, Q prologue, Acc<T>* chain,
                              LinesAhead& ahead) {
  constexpr int L = kLanes<Acc<T>>;
  const auto add = [&](auto vectors, int64_t c, auto lanes) SENET_LAMBDA {
    add_panel<vectors>(x, rows, n, c, prologue, chain, lanes, ahead);
  };
  int64_t c = 0;
  for (; c + 8 * L <= n; c += 8 * L) add(std::integral_constant<int, 8>{}, c, Full{});
  if (c + 4 * L <= n) add(std::integral_constant<int, 4>{}, c, Full{}), c += 4 * L;
  if (c + 2 * L <= n) add(std::integral_constant<int, 2>{}, c, Full{}), c += 2 * L;
  if (c + L <= n) add(std::integral_constant<int, 1>{}, c, Full{}), c += L;
  if (c < n) add(std::integral_constant<int, 1>{}, c, static_cast<int>(n - c));
}

// The same in the order of memory.
template <class T, class Q>
SENET_OUTLINE void add_rows(const T* x, int64_t rows, int64_t n, Q prologue, Acc<T>* chain) {
  using A = Acc<T>;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const T* p = x + r * n;
    for_vectors<A>(n, [&](int64_t i, auto lanes) {
      for (int j = 0; j < 4; ++j) will_read(p + j * n + i, 4 * n * sizeof(T));
      const Vec<A> a = prologue.forward(i, lanes, get(p + i, lanes)) +
                       prologue.forward(i, lanes, get(p + n + i, lanes));
      const Vec<A> b = prologue.forward(i, lanes, get(p + 2 * n + i, lanes)) +
                       prologue.forward(i, lanes, get(p + 3 * n + i, lanes));
      put(chain + i, get(chain + i, lanes) + (a + b), lanes);
    });
  }
  for (; r < rows; ++r) {
    for_vectors<A>(n, [&](int64_t i, auto lanes) {
      const Vec<A> p = prologue.forward(i, lanes, get(x + r * n + i, lanes));
      put(chain + i, get(chain + i, lanes) + p, lanes);
    });
  }
}

// total[c] = sum of p over `rows` runs of n elements; `chain` is scratch of n. from_memory: x is
// in no cache.
template <class T, class Q>
SENET_OUTLINE void sum_columns(const T* x, int64_t rows, int64_t n, bool from_memory, Q prologue,
                               Acc<T>* total, Acc<T>* chain) {
  using A = Acc<T>;
  // Short rows in panels: sums that are stored and loaded again for every few rows come in the way
  // of x, of which some lie at the same places of a page. Long ones keep to the order in which
  // prefetchers fetch; panels do not, so that from memory they ask for the next block in that
  // order.
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  const bool panels = bytes < kPanelRow;
  const int64_t block = panels ? std::min<int64_t>(kPanelBytes / bytes, 4 * kChain) : 4 * kChain;
  // Half a block at a time then, of whole fours so that the order of additions is the same.
  const int64_t part = from_memory ? block / 8 * 4 : block;
  LinesAhead ahead(from_memory ? x + part * n : nullptr);
  for_vectors<A>(n, [&](int64_t i, auto lanes) { put(total + i, Vec<A>{}, lanes); });
  for (int64_t r = 0; r < rows; r += block) {
    const int64_t end = std::min(r + block, rows);
    for_vectors<A>(n, [&](int64_t i, auto lanes) { put(chain + i, Vec<A>{}, lanes); });
    if (panels) {
      for (int64_t s = r; s < end; s += part) {
        add_panels(x + s * n, std::min(part, end - s), n, prologue, chain, ahead);
      }
    } else {
      add_rows(x + r * n, end - r, n, prologue, chain);
    }
    for_vectors<A>(n, [&](int64_t i, auto lanes) {
      put(total + i, get(total + i, lanes) + get(chain + i, lanes), lanes);
    });
  }
}

// ---- forward: y = after(p scale + shift + residual) ----

// kPlain: no shift, no residual, after is identity. y may be x: each vector is read before it is
// written, none twice.
template <class T, bool kPlain, class Q, class P>
SENET_INLINE void scale_run(const T* x, const T* residual, T* y, uint8_t* bits, int64_t n,
                            Q prologue, P scale, P shift, bool has_shift, Fn after, bool streams) {
  using A = Acc<T>;
  for_vectors<A>(n, [&](int64_t i, auto lanes) {
    will_read(x + i);
    if (!streams) will_write(y + i);
    Vec<A> v = prologue.forward(i, lanes, get(x + i, lanes)) * scale.at(i, lanes);
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
    put(y + i, v, lanes, streams);
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
template <class T, bool kPlain, class Q, class P>
SENET_OUTLINE void dot_run(const BackRun<T>& in, int64_t n, Q prologue, P scale, P shift,
                           bool has_shift, Fn after, Acc<T>* ds, Acc<T>* dm) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> total{}, total_m{};
  int64_t i = 0;
  const auto step = [&](int64_t j, auto lanes, Vec<A>& s, Vec<A>& sm) SENET_LAMBDA {
    const Vec<A> p = prologue.forward(j, lanes, get(in.x + j, lanes));
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
template <class T, bool kPlain, class Q, class Row>
SENET_OUTLINE void dot_columns(Row row, int64_t rows, int64_t n, Q prologue,
                               PerElement<Acc<T>> scale, PerElement<Acc<T>> shift, bool has_shift,
                               Fn after, Acc<T>* total, Acc<T>* chained) {
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
        const Vec<A> pa = prologue.forward(i, lanes, get(a.x + i, lanes));
        const Vec<A> ma = through_after<T, kPlain>(a, i, lanes, pa, scale, shift, has_shift, after);
        Vec<A> s = ma * pa, sm = ma;
        if (pair) {
          const Vec<A> pb = prologue.forward(i, lanes, get(b.x + i, lanes));
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

// What the affine map's gradients add up, besides dx: da from dq x, db from dq. Of a run that is
// one channel, or of runs whose elements are channels; nothing, where there is no affine map.
template <class A>
struct NoSums {
  SENET_INLINE NoSums() {}
  SENET_INLINE NoSums(A*, A*, int64_t) {}
  template <class N>
  SENET_INLINE void add(int64_t, N, Vec<A>, Vec<A>) {}
  SENET_INLINE void end_run() {}
  SENET_INLINE void finish() {}
  SENET_INLINE void finish(A*, A*) {}
};
template <class A>
class ChannelSums {
 public:
  template <class N>
  SENET_INLINE void add(int64_t, N lanes, Vec<A> dq, Vec<A> x) {
    a_.add(keep<A>(dq * x, lanes));
    b_.add(keep<A>(dq, lanes));
    if (++length_ % kChain == 0) fold();
  }
  SENET_INLINE void finish(A* da, A* db) {
    *da = a_.total();
    *db = b_.total();
  }

 private:
  // A sum of sums of sums: of large maps, and of all images.
  struct Sum {
    Vec<A> chain{}, middle{}, top{};
    SENET_INLINE void add(Vec<A> v) { chain += v; }
    SENET_INLINE void fold(bool far) {
      middle += chain;
      chain = Vec<A>{};
      if (far) top += middle, middle = Vec<A>{};
    }
    SENET_INLINE A total() const { return sum(top + (middle + chain)); }
  };
  SENET_OUTLINE void fold() {
    const bool far = length_ % (kChain * kChain) == 0;
    a_.fold(far);
    b_.fold(far);
  }
  Sum a_, b_;
  int64_t length_ = 0;
};
// total: 2n, [0..n) for da and [n..2n) for db; chain: scratch of 4n.
template <class A>
class ColumnSums {
 public:
  SENET_INLINE ColumnSums(A* total, A* chain, int64_t n)
      : total_(total), chain_(chain), middle_(chain + 2 * n), n_(n) {
    std::fill(total, total + 2 * n, A(0));
    std::fill(chain, chain + 4 * n, A(0));
  }
  template <class N>
  SENET_INLINE void add(int64_t i, N lanes, Vec<A> dq, Vec<A> x) {
    put(chain_ + i, get(chain_ + i, lanes) + dq * x, lanes);
    put(chain_ + n_ + i, get(chain_ + n_ + i, lanes) + dq, lanes);
  }
  SENET_INLINE void end_run() {
    if (++length_ % kChain == 0) fold(length_ % (kChain * kChain) == 0);
  }
  SENET_INLINE void finish() { fold(true); }

 private:
  SENET_OUTLINE void fold(bool far) {
    for_vectors<A>(2 * n_, [&](int64_t i, auto lanes) {
      const Vec<A> middle = get(middle_ + i, lanes) + get(chain_ + i, lanes);
      put(chain_ + i, Vec<A>{}, lanes);
      put(middle_ + i, far ? Vec<A>{} : middle, lanes);
      if (far) put(total_ + i, get(total_ + i, lanes) + middle, lanes);
    });
  }
  A *total_, *chain_, *middle_;
  int64_t n_, length_ = 0;
};

template <class A, Fn kBefore>
using ChannelSink = std::conditional_t<kBefore == kAffine, ChannelSums<A>, NoSums<A>>;
template <class A, Fn kBefore>
using ColumnSink = std::conditional_t<kBefore == kAffine, ColumnSums<A>, NoSums<A>>;

// dx = a dq, dq = (m scale + dmean) before'(q), and dresidual = m; either may be null. a is 1
// without an affine map, whose own gradients go into `sums`.
template <class T, bool kPlain, class Q, class P, class D, class Sums>
SENET_INLINE void dx_run(const BackRun<T>& in, T* dx, T* dresidual, int64_t n, Q prologue, P scale,
                         P shift, bool has_shift, D dmean, Fn after, Sums& sums, bool streams) {
  using A = Acc<T>;
  constexpr bool kSums = !std::is_same_v<Sums, NoSums<A>>;
  for_vectors<A>(n, [&](int64_t i, auto lanes) SENET_LAMBDA {
    will_read(in.dy + i);
    if (dx && !streams) will_write(dx + i);
    Vec<A> x{}, p{};
    if (Q::kReadsX || !kPlain || kSums) x = get(in.x + i, lanes);
    if (!kPlain) p = prologue.forward(i, lanes, x);
    const Vec<A> m = through_after<T, kPlain>(in, i, lanes, p, scale, shift, has_shift, after);
    if (!kPlain && dresidual) put(dresidual + i, m, lanes, streams);
    if (!kSums && !dx) return;
    const Vec<A> dp = m * scale.at(i, lanes) + dmean.at(i, lanes);
    const Vec<A> dq = prologue.backward(i, lanes, x, dp);
    sums.add(i, lanes, dq, x);
    if (dx) put(dx + i, prologue.to_x(i, lanes, dq), lanes, streams);
  });
}

// The same for what comes back through the mean alone: dq = dmean before'(q).
template <class T, class Q, class D, class Sums>
SENET_INLINE void mean_run(const T* x, T* dx, int64_t n, Q prologue, D dmean, Sums& sums) {
  using A = Acc<T>;
  for_vectors<A>(n, [&](int64_t i, auto lanes) SENET_LAMBDA {
    if (dx) will_write(dx + i);
    Vec<A> at{};
    if (Q::kReadsX) at = get(x + i, lanes);
    const Vec<A> dq = prologue.backward(i, lanes, at, dmean.at(i, lanes));
    sums.add(i, lanes, dq, at);
    if (dx) put(dx + i, prologue.to_x(i, lanes, dq), lanes);
  });
}

}  // namespace
}  // namespace SENET_ISA
}  // namespace senet
