// The images of a block one after another: the blocks that share one, the slices that stay in
// shared memory, and the loop.
#pragma once

#include "sums.cuh"

namespace senet {
namespace gpu {

// ---- a block ----

// What a block knows of itself, for all its images. It is in shared memory, and read where it is
// needed: no register keeps it from one step to the next.
struct Self {
  View view;
  int rank, group;  // of the block among those that share an image; of these among all
};
static_assert(sizeof(Self) <= kSelfBytes);

SENET_DEVICE Self& self() { return *reinterpret_cast<Self*>(shared_memory()); }

// Between the arrays of a block.
SENET_DEVICE void guard_arrays(const Plan& p) {
  if (kRedZone == 0 || threadIdx.x != 0) return;
  const Carving& at = p.at;
  const int begins[] = {at.sums,     at.scale,   at.shift, at.mean,    at.affine,   at.hidden,
                        at.exchange, at.scratch, at.bits,  at.weights, at.barriers, at.slots};
  for (int begin : begins) red_zone(shared_memory() + begin - kRedZone, kRedZone);
}

// ---- the blocks that share an image ----

// Each publishes a vector, waits for the others, and adds up all the vectors in the order of their
// ranks, so that all blocks come to the same bits. Two buffers take turns: a block that is back
// here for the next image but one knows that the others have long read this one.
template <class A>
struct Team {
  const Plan& p;
  char* const& scratch;  // of the launch, in global memory
  uint32_t images = 0;   // so far

  SENET_DEVICE int rank() const { return self().rank; }
  // In shared memory: two vectors of ours; in global memory: two of every rank.
  SENET_DEVICE A* mine() const {
    if (p.exchange == Exchange::grid) return published() + int64_t(rank()) * p.exchanged;
    return kept();
  }
  // After every thread has written its share of mine().
  SENET_DEVICE void meet() const {
    if (p.exchange == Exchange::cluster) {
      cluster_sync();
      return;
    }
    __syncthreads();
    if (p.exchange == Exchange::none) return;
    if (threadIdx.x == 0) {
      add_release(counter(), 1);
      wait_at_least(counter(), (images + 1) * p.blocks);
    }
    __syncthreads();
  }
  SENET_DEVICE A total(int i) const {
    if (p.exchange == Exchange::none) return kept()[i];
    const int blocks = p.blocks;
    A sum = A(0);
    if (p.exchange == Exchange::cluster) {
      A* const at = kept() + i;
#pragma unroll 4
      for (int r = 0; r < blocks; ++r) sum += *peer(at, r);
    } else {
      const A* at = published() + i;
      const int64_t next = p.exchanged;
#pragma unroll 4
      for (int r = 0; r < blocks; ++r, at += next) sum += __ldcg(at);
    }
    return sum;
  }
  SENET_DEVICE void next_image() { ++images; }
  // Before the block exits: others may still be reading its shared memory.
  SENET_DEVICE void leave() const {
    if (p.exchange == Exchange::cluster) cluster_sync();
  }

  SENET_DEVICE A* kept() const {
    return reinterpret_cast<A*>(shared_memory() + p.at.exchange) + (images & 1) * p.exchanged;
  }
  SENET_DEVICE A* published() const {
    const int64_t vectors = (int64_t(2) * self().group + (images & 1)) * p.blocks;
    return reinterpret_cast<A*>(scratch + p.of_exchange) + vectors * p.exchanged;
  }
  SENET_DEVICE uint32_t* counter() const {
    return reinterpret_cast<uint32_t*>(scratch + p.of_counters) + 32 * self().group;
  }
};

// Before anything else that a block does.
template <class A>
SENET_DEVICE Team<A> make_team(const Shape& s, const Plan& p, char* const& scratch) {
  guard_arrays(p);
  const Team<A> team{p, scratch};
  if (threadIdx.x == 0) {
    const int rank = blockIdx.x % p.blocks, group = blockIdx.x / p.blocks;
    self() = {make_view(s, p, rank), rank, group};
    // The scratch memory is as it came.
    if (p.exchange == Exchange::grid && rank == 0) *team.counter() = 0;
  }
  if (p.exchange == Exchange::grid) {
    grid_sync();
  } else {
    __syncthreads();
  }
  return team;
}

// ---- slices that stay in shared memory ----

// A ring of slots: while one image's slice is worked on, the next ones' are on their way.
template <int kBytes>
struct Ring {
  const Plan& p;

  SENET_DEVICE char* slot(uint32_t i) const {
    return shared_memory() + p.at.slots + static_cast<int>(i - round(i) * p.slots) * slot_bytes();
  }
  SENET_DEVICE int slot_bytes() const { return per_slot(p.shared - p.at.slots); }
  SENET_DEVICE Mbarrier* arrival(uint32_t i) const {
    return reinterpret_cast<Mbarrier*>(shared_memory() + p.at.barriers) + (i - round(i) * p.slots);
  }
  // How often the ring has gone round before image i.
  SENET_DEVICE uint32_t round(uint32_t i) const { return per_slot(i); }
  // n / p.slots, of which a plan has three at most: a division by any number takes 20 instructions.
  template <class T>
  SENET_DEVICE T per_slot(T n) const {
    return p.slots == 1 ? n : (p.slots == 2 ? n / 2 : n / 3);
  }

  // Of the slice.
  SENET_DEVICE int64_t bytes_of(const View& v) const { return int64_t(v.outer) * v.inner * kBytes; }

  SENET_DEVICE void prepare() const {
    const int64_t bytes = bytes_of(self().view);
    for (int i = 0; kRedZone > 0 && threadIdx.x == 0 && i < p.slots; ++i) {
      red_zone(slot(i) + bytes, slot_bytes() - bytes);
    }
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
    const View v = self().view;
    const int64_t bytes = bytes_of(v);
    char* to = slot(i);
    const char* from = image ? image + v.first * kBytes : nullptr;
    const int64_t row = int64_t(v.inner) * kBytes, pitch = v.pitch * kBytes;
    const bool flat = !v.last || v.inner == v.pitch;
    if constexpr (kHasClusters) {
      if (p.bulk) {
        if (!from || threadIdx.x >= 32) return;
        const int64_t piece = flat ? 16384 : row;
        fence_proxy_async();  // each lane, for its own copies
        if (threadIdx.x == 0) mbarrier_arrive_expect(arrival(i), static_cast<uint32_t>(bytes));
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
        // A thread has a column of vectors, or some: nothing is divided in the loop.
        Columns c(static_cast<int>(row / 16) * kUnit);
        for (; c.mine(); c.k += c.parts > 1 ? c.units : static_cast<int>(blockDim.x)) {
          char* there = to + c.part * row + 16 * c.k;
          const char* here = from + c.part * pitch + 16 * c.k;
          const int64_t step = c.parts * row, image_step = c.parts * pitch;
          int n = c.part < v.outer ? (v.outer - c.part + c.parts - 1) / c.parts : 0;
#pragma unroll 4
          for (; n > 0; --n) {
            async_copy16(there, here);
            there += step;
            here += image_step;
          }
        }
      }
    }
    async_commit();
  }
  // Until image i is there, for all threads.
  SENET_DEVICE void wait(uint32_t i) const {
    if constexpr (kHasClusters) {
      if (p.bulk) {
        mbarrier_wait(arrival(i), round(i) & 1);
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

// ---- slices on their way to L2 ----

constexpr int kSector = 32;  // bytes that L2 fetches at least

// The sectors of rows of so many bytes, as threads share them out: every so many-th is a thread's.
// A row may have more sectors than an int counts.
struct Sectors {
  int64_t in_row, column;
  int row, rows_per_step;

  constexpr Sectors(int thread, int threads, int64_t bytes)
      : in_row((bytes + kSector - 1) / kSector), column(thread), row(0), rows_per_step(0) {
    if (in_row >= threads) return;
    const int few = static_cast<int>(in_row);
    row = thread / few;
    column = thread % few;
    rows_per_step = threads / few;
  }
  constexpr void next(int threads) {
    row += rows_per_step;
    column += threads - rows_per_step * in_row;
    if (column >= in_row) {
      column -= in_row;
      ++row;
    }
  }
};

// Asks for `rows` rows of so many bytes, `pitch` bytes apart. A call, so that it takes no registers
// from the passes.
inline __device__ __noinline__ void prefetch_rows(const char* from, int rows, int64_t row,
                                                  int64_t pitch) {
  const int threads = static_cast<int>(blockDim.x);
  if (rows == 1) {
    const char* const end = from + row;
    for (from += kSector * threadIdx.x; from < end; from += kSector * threads) prefetch_l2(from);
    return;
  }
  for (Sectors s(static_cast<int>(threadIdx.x), threads, row); s.row < rows; s.next(threads)) {
    prefetch_l2(from + s.row * pitch + int64_t(kSector) * s.column);
  }
}

// Asks for the block's slice of an image, before a loop that reads it. A thread of such a loop has
// one or two loads under way, and a multiprocessor fewer of them than memory needs to be busy.
template <int kBytes>
SENET_DEVICE void prefetch_slice(const char* image) {
  const View v = self().view;
  if (!image || v.outer == 0 || v.inner == 0) return;
  const int64_t row = int64_t(v.inner) * kBytes;
  const bool flat = !v.last || v.inner == v.pitch;
  prefetch_rows(image + v.first * kBytes, flat ? 1 : v.outer, flat ? v.outer * row : row,
                v.pitch * kBytes);
}

// work(b, slot) for each image b of this block, one after another; `slot` is its slice in shared
// memory, or null where it does not stay there. `from` are the images that stay; `ask(b)`
// prefetches what else is read of image b. The plan has none stay that is read element by element:
// that kernel has no code for it, which spares it registers.
//
// What stays is on its way images ahead, and so is what is read beside it. Otherwise only the image
// at hand is asked for: it is read twice, and L2 need not have room for a second one.
template <int kBytes, bool kVector, class A, class Ask, class Work>
SENET_DEVICE void each_image(const Shape& s, const Plan& p, const Images& from, Team<A>& team,
                             Ask ask, Work work) {
  const Ring<kBytes> ring{p};
  const int64_t group = self().group;
  const bool resident = kVector && p.resident;
  const int ahead = resident ? p.slots - 1 : 0;
  // Image b, the i-th of this block.
  const auto start = [&](uint32_t i, int64_t b) {
    const char* image = nullptr;
    if (b < s.batch) image = static_cast<const char*>(from.data) + b * from.stride * kBytes;
    if (resident) {
      ring.start(i, image);
    } else if (from.data) {
      prefetch_slice<kBytes>(image);
    }
    if (b < s.batch) ask(b);
  };
  if (resident) {
    ring.prepare();
    for (int i = 0; i < ahead; ++i) start(i, group + int64_t(i) * p.groups);
  }
  __syncthreads();  // what the constructors wrote
  for (int64_t b = group; b < s.batch; b += p.groups) {
    const char* slot = nullptr;
    start(team.images + ahead, b + int64_t(ahead) * p.groups);
    if (resident) {
      ring.wait(team.images);
      slot = ring.slot(team.images);
    }
    work(b, slot);
    team.next_image();
    __syncthreads();  // the arrays, and the slot, are free again
  }
  team.leave();
}

// How many positions of image b count in its mean; none where a length makes no sense.
SENET_DEVICE int counted(const Shape& s, const int64_t* lengths, int64_t b) {
  if (!lengths) return static_cast<int>(s.positions);
  return lengths[b] < 0 || lengths[b] > s.positions ? 0 : static_cast<int>(lengths[b]);
}

}  // namespace gpu
}  // namespace senet
