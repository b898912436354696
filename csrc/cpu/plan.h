// How the work is shared out: one readable decision, taken per call.
#pragma once

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <thread>
#include <type_traits>

#include "mlp.h"

namespace senet {
namespace SENET_ISA {
namespace {

// Bytes of x that a group of images may have per thread, so that the second read finds them in
// the core's own cache (1 to 2 MB of L2 on current servers).
constexpr int64_t kCachePerThread = 1 << 20;
constexpr int64_t kLine = 64;
// Below this many elements waking the thread team costs more than it brings.
constexpr int64_t kSerialElements = 1 << 15;
// Below this many products a team that is awake does not share out a layer of the MLP.
constexpr int64_t kSerialProducts = 1 << 12;
// What the further parallel regions of a team cost, in bytes that a thread could have read instead.
constexpr int64_t kTeamBytes = 1 << 20;

struct Plan {
  int threads;
  // Images [0, alone): each start to end on one thread. The rest in groups: the team squeezes the
  // group's images in slices, computes their MLP reading the weights once, then scales.
  int64_t alone;
  int64_t group;
  // How many of the images alone a thread takes at a time, so that a weight is read once for all.
  int64_t together;
  // Into how many parts a team cuts a layer of the MLP.
  int64_t parts(const Shape& s, int64_t images) const {
    return s.weights() * images >= kSerialProducts ? threads : 1;
  }
  // Into how many slices each image of a group of this many is cut: none where whole images
  // share out evenly.
  int64_t slices(int64_t images) const { return images % threads == 0 ? 1 : threads; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Plan make_plan(const Shape& s, size_t element, size_t parameter, int max_threads) {
  const bool small = s.batch * s.image() <= kSerialElements;
  const int threads = small ? 1 : std::max(1, max_threads);
  const int64_t image_bytes = s.image() * static_cast<int64_t>(element);
  const int64_t weight_bytes = s.weights() * static_cast<int64_t>(parameter);
  const int64_t fits =
      std::max<int64_t>(1, threads * kCachePerThread / std::max<int64_t>(1, image_bytes));
  const int64_t together = std::clamp<int64_t>(fits / threads, 1, 4);
  // How often a thread that takes its images alone reads the weights, and how much that is more
  // than its share of them, which is what it reads as one of a team. In groups of enough images at
  // once that reading the weights hardly counts there.
  const int64_t times = ceil_div(ceil_div(s.batch, threads), together);
  const int64_t more = weight_bytes * times - weight_bytes / threads;
  const int64_t enough = 4 * weight_bytes / std::max<int64_t>(1, image_bytes);
  const int64_t group = std::min(s.batch, std::max(fits, enough));
  if (weight_bytes > image_bytes && s.batch > 1 && more > kTeamBytes * ceil_div(s.batch, group)) {
    return {threads, 0, group, 1};
  }
  const int64_t alone = s.batch - s.batch % threads;
  return {threads, alone, std::max<int64_t>(1, std::min(s.batch - alone, fits)), together};
}

// How many positions of image b count in its mean; none where a length makes no sense.
inline int64_t counted(const Shape& s, const int64_t* lengths, int64_t b) {
  if (!lengths) return s.positions;
  return lengths[b] < 0 || lengths[b] > s.positions ? 0 : lengths[b];
}

// Slice i of n things cut into `slices` parts, as even as can be.
struct Range {
  int64_t begin, end;
};
SENET_INLINE Range slice(int64_t n, int64_t i, int64_t slices) {
  return {n * i / slices, n * (i + 1) / slices};
}

// Runs body(begin, end, slot) over [0, n): on the team, or here when one thread is enough. A slot
// is a number below plan.threads that no other running body has, for scratch memory.
template <class Body>
void share(const Runtime& runtime, const Plan& plan, int64_t n, const Body& body) {
  if (plan.threads == 1 || n <= 1) {
    if (n > 0) body(int64_t{0}, n, 0);
    return;
  }
  struct Context {
    const Body& body;
    std::atomic<int> next{0};
  } context{body};
  runtime.parallel_for(
      n,
      [](int64_t begin, int64_t end, void* p) {
        auto* c = static_cast<Context*>(p);
        c->body(begin, end, c->next.fetch_add(1, std::memory_order_relaxed));
      },
      &context);
}

// One of the phases below: body(begin, end, slot) over [0, n), as for `share`.
struct Phase {
  template <class Body>
  Phase(int64_t n, const Body& body)
      : n(n), body(&body), run([](const void* p, int64_t begin, int64_t end, int slot) {
          (*static_cast<const Body*>(p))(begin, end, slot);
        }) {}
  int64_t n;
  const void* body;  // which must outlive this
  void (*run)(const void*, int64_t, int64_t, int);
};

// Runs phases one after the other, each over the team, in a single parallel region: waiting for the
// others costs a fraction of what ending a region and beginning the next does. Each phase is cut
// into a chunk for each thread, which takes its own first (what it read before is in its cache) and
// then those that nobody has begun. So a thread waits for running ones alone, never for one that is
// yet to come: nothing hangs where the host gives fewer threads than it said.
inline void share_phases(const Runtime& runtime, const Plan& plan,
                         std::initializer_list<Phase> phases) {
  if (plan.threads == 1) {
    for (const Phase& phase : phases) {
      if (phase.n > 0) phase.run(phase.body, 0, phase.n, 0);
    }
    return;
  }
  struct alignas(kLine) Progress {
    std::atomic<uint64_t> taken{0};  // a bit for each chunk
    std::atomic<int> done{0};
  };
  constexpr size_t kMaxPhases = 8;
  struct Context {
    std::initializer_list<Phase> phases;
    int chunks;
    Progress progress[kMaxPhases];
  } context{phases, std::min(plan.threads, 64), {}};
  runtime.parallel_for(
      context.chunks,
      [](int64_t begin, int64_t, void* p) {
        Context& c = *static_cast<Context*>(p);
        const int slot = static_cast<int>(begin);
        Progress* progress = c.progress;
        for (const Phase& phase : c.phases) {
          if (phase.n == 0) continue;
          for (int i = 0; i < c.chunks; ++i) {
            const int chunk = (slot + i) % c.chunks;
            const uint64_t bit = uint64_t{1} << chunk;
            if (progress->taken.load(std::memory_order_relaxed) & bit) continue;
            if (progress->taken.fetch_or(bit, std::memory_order_relaxed) & bit) continue;
            const Range range = slice(phase.n, chunk, c.chunks);
            if (range.begin < range.end) phase.run(phase.body, range.begin, range.end, slot);
            progress->done.fetch_add(1, std::memory_order_release);
          }
          for (int spins = 0; progress->done.load(std::memory_order_acquire) < c.chunks; ++spins) {
            spins < 1024 ? pause() : std::this_thread::yield();
          }
          ++progress;
        }
      },
      &context);
}

// Whether a second reading of so many bytes begins with what was read last, which the cache still
// holds. With AVX-512 it was measured to gain only where the cache is large and the bytes are half
// of it or more (docs/performance.md).
SENET_INLINE bool in_reverse([[maybe_unused]] int64_t bytes, [[maybe_unused]] int64_t core_cache) {
#if defined(__AVX512F__)
  return core_cache >= (2 << 20) && bytes > core_cache / 2;
#else
  return true;
#endif
}

// Calls body(r) for the runs of a range in a second reading. In reverse, blocks of runs at a time.
template <class Body>
SENET_INLINE void second_reading(Range range, int64_t run_bytes, int64_t core_cache, Body body) {
  const int64_t runs = range.end - range.begin;
  const int64_t block = in_reverse(runs * run_bytes, core_cache)
                            ? std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, run_bytes))
                            : runs;
  for (int64_t end = range.end; end > range.begin; end -= block) {
    for (int64_t r = std::max(range.begin, end - block); r < end; ++r) body(r);
  }
}

// Whether a call that reads and writes so many bytes finds part of x in memory: the last cache is
// not its alone.
inline bool comes_from_memory(const Runtime& runtime, int64_t bytes) {
  return runtime.last_cache > 0 && bytes > runtime.last_cache / 2;
}

// Whether they are so many that most of a result is out of the last cache before anyone reads it.
// From four fifths on the call gains, and so do the call and a reader of its result together.
inline bool exceeds_caches(const Runtime& runtime, int64_t bytes) {
  return runtime.last_cache > 0 && bytes > runtime.last_cache / 5 * 4;
}

// Whether a result of a call that exceeds the caches is written around them, which spares fetching
// each line of it. Not where runs share a line; nor in pages that are yet to come from the system,
// which brings them cleared, in the cache.
inline bool is_line_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kLine == 0; }
inline bool streams_to(const Runtime& runtime, const void* result, int64_t bytes,
                       int64_t run_bytes) {
  return kStreams && is_line_aligned(result) && run_bytes % kLine == 0 &&
         !runtime.is_untouched(result, bytes);
}

// How many rows of so many bytes make whole cache lines; 1 where it takes more than four, and for
// long rows, of which the lines that two of them share are a small part.
inline int64_t rows_of_whole_lines(int64_t row_bytes) {
  for (int64_t rows : {1, 2, 4}) {
    if (rows * row_bytes % kLine == 0 && row_bytes < kPanelRow) return rows;
  }
  return 1;
}

// Whether rows are better gone through as one run: else each ends in part of a vector, and the next
// begins off a cache line. A mask has its rows padded to bytes.
inline bool rows_as_one(const Shape& s, const void* mask) {
  constexpr int L = kLanes<float>;
  return !s.channels_last && !mask && s.positions >= L && s.positions % L != 0;
}

// Carves scratch memory into arrays, each on its own cache lines.
template <class A>
class Carver {
 public:
  int64_t reserve(int64_t n) {
    const int64_t at = used_;
    used_ += (n + 15) / 16 * 16;
    return at;
  }
  size_t bytes() const { return static_cast<size_t>(used_) * sizeof(A) + 64; }

 private:
  int64_t used_ = 0;
};

// to[i] = f(from[i]).
template <class A>
SENET_OUTLINE void map(const A* from, A* to, int64_t n, Fn f) {
  for_vectors<A>(
      n, [&](int64_t i, auto lanes) { put(to + i, value_of<A>(f, get(from + i, lanes)), lanes); });
}

// values[i] *= f'(at[i]), elementwise.
template <class A>
SENET_OUTLINE void chain_map(Fn f, const A* at, A* values, int64_t n) {
  for_vectors<A>(n, [&](int64_t i, auto lanes) {
    put(values + i, chain_of<A>(f, get(at + i, lanes), get(values + i, lanes)), lanes);
  });
}

// to[i] = parameter i, in the accumulation type.
template <class A>
SENET_OUTLINE void widen(DType dtype, const void* from, A* to, int64_t n) {
  with_storage<A>(dtype, from, [&](auto* typed) {
    for_vectors<A>(n, [&](int64_t i, auto lanes) { put(to + i, get(typed + i, lanes), lanes); });
  });
}

// The prologue of a call; `memory` is scratch of 2C.
template <class A, Fn kBefore>
Prologue<A, kBefore> make_prologue(Fn before, const Parameters& p, int64_t channels, A* memory) {
  if constexpr (kBefore == kAffine) {
    widen(p.dtype, p.affine_scale, memory, channels);
    widen(p.dtype, p.affine_shift, memory + channels, channels);
  }
  return {before, memory, memory + channels};
}

// Turns gates of channels [c0, c1) into the factors of the scaling step: alpha + beta gate.
template <class A>
SENET_OUTLINE void gates_to_scale(const Parameters& p, int64_t c0, int64_t c1, A* scale) {
  for (int64_t c = c0; (p.beta || p.alpha) && c < c1; ++c) {
    if (p.beta) scale[c] *= parameter_at<A>(p.dtype, p.beta, c);
    if (p.alpha) scale[c] += parameter_at<A>(p.dtype, p.alpha, c);
  }
}

}  // namespace
}  // namespace SENET_ISA
}  // namespace senet
