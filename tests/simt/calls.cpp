// What the threads of a launch call.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "running.h"

namespace simt {
namespace {

// The eight bytes of an mbarrier hold this and an index into its block's list.
constexpr uint64_t kMagic = 0x6d62617272696572;

void wait(const char* what, const void* on, const Where& where,
          std::string (*describe)(const Fiber&) = nullptr) {
  current->state = Fiber::State::waits;
  current->waits_at = what;
  current->waits_for = on;
  current->where = where;
  current->describe = describe;
  running->switch_away();
}

bool in_shared(const Block& b, const void* p, size_t bytes) {
  const char* at = static_cast<const char*>(p);
  return at >= b.shared && at + bytes <= b.shared + b.shared_bytes;
}

MbarrierState& state_of(uint64_t* barrier, const Where& where) {
  for (const auto& b : current->block->cluster->blocks) {
    if (!in_shared(*b, barrier, 8)) continue;
    if (b->alive == 0) fail("an mbarrier of a block that has exited", where);
    const uint64_t index = *barrier ^ kMagic;
    if (index >= b->mbarriers.size()) fail("an mbarrier that is not initialised", where);
    return *b->mbarriers[index];
  }
  fail("an mbarrier outside the cluster's shared memory", where);
}

void need(int major, const char* what, const Where& where) {
  if (device().major < major) {
    fail(std::string(what) + " on a device of capability " + std::to_string(device().major) + "." +
             std::to_string(device().minor),
         where);
  }
}

void check_range(const void* p, [[maybe_unused]] size_t bytes, size_t alignment, const char* what,
                 const Where& where) {
  if (reinterpret_cast<uintptr_t>(p) % alignment) {
    fail(std::string(what) + " is not aligned to " + std::to_string(alignment) + " bytes", where);
  }
#if SIMT_ASAN
  if (void* bad = __asan_region_is_poisoned(const_cast<void*>(p), bytes)) {
    fail(std::string(what) + " is out of bounds from byte " +
             std::to_string(static_cast<const char*>(bad) - static_cast<const char*>(p)) + " of " +
             std::to_string(bytes),
         where);
  }
#endif
}

CopyPointer start(Copy copy) {
  // What is there until the copy arrives is nobody's business.
  std::memset(copy.to, 0xff, copy.bytes);
#if SIMT_ASAN
  __asan_poison_memory_region(copy.to, copy.bytes);
#endif
  running->in_flight.push_back(std::make_shared<Copy>(copy));
  return running->in_flight.back();
}

}  // namespace

void red_zone([[maybe_unused]] void* shared, [[maybe_unused]] size_t bytes) {
#if SIMT_ASAN
  __asan_poison_memory_region(shared, bytes);
#endif
}

const Launch& launch_of_current() { return running->launch; }

void fail(const std::string& what, const Where& where) {
  running->stop(name(*current) + ": " + what + " (" + site(where) + ")");
  running->leave();
}

void yield() {
  running->ready(current);
  running->switch_away();
}

uint64_t together(Call call, unsigned mask, uint64_t value, unsigned source, const char* what,
                  const Where& where) {
  Fiber& f = *current;
  Warp& w = *f.warp;
  const auto hex = [](unsigned m) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", m);
    return std::string(text);
  };
  const auto wrong = [&](const std::string& why) {
    fail(std::string(what) + " with mask " + hex(mask) + ": " + why, where);
  };
  if (!(mask >> f.lane & 1)) wrong("the calling lane " + std::to_string(f.lane) + " is not in it");
  if (mask & ~w.there) wrong("the warp has lanes " + hex(w.there) + " only");
  if (mask & w.exited) wrong("lanes " + hex(mask & w.exited) + " have exited");
  f.call = call;
  f.mask = mask;
  f.value = value;
  f.source = source;
  size_t at = 0;
  for (; at < w.meetings.size() && w.meetings[at].mask != mask; ++at) {
    if (w.meetings[at].mask & mask) {
      const Fiber* other = w.lanes[static_cast<size_t>(__builtin_ctz(w.meetings[at].arrived))];
      wrong("lane " + std::to_string(other->lane) + " waits at " + other->waits_at + " (" +
            site(other->where) + ") with mask " + hex(other->mask));
    }
  }
  if (at == w.meetings.size()) w.meetings.push_back({mask, 0});
  Meeting& m = w.meetings[at];
  if (m.arrived) {
    const Fiber* other = w.lanes[static_cast<size_t>(__builtin_ctz(m.arrived))];
    if (other->call != call || other->where.line() != where.line() ||
        other->where.column() != where.column()) {
      wrong("lane " + std::to_string(other->lane) + " of it is in another call, " +
            other->waits_at + " (" + site(other->where) + ")");
    }
  }
  m.arrived |= 1u << f.lane;
  if (m.arrived != mask) {
    wait(what, &w, where, [](const Fiber& self) {
      for (const Meeting& open : self.warp->meetings) {
        if (open.mask != self.mask) continue;
        char text[64];
        std::snprintf(text, sizeof text, " for lanes 0x%08x of mask 0x%08x",
                      open.mask & ~open.arrived, open.mask);
        return std::string(text);
      }
      return std::string();
    });
    return f.result;
  }
  w.meetings.erase(w.meetings.begin() + static_cast<std::ptrdiff_t>(at));
  uint64_t all = call == kAll ? ~uint64_t{0} : 0;
  for (unsigned left = mask; left; left &= left - 1) {
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(left));
    const uint64_t v = w.lanes[lane]->value;
    switch (call) {
      case kBallot:
        all |= v ? uint64_t{1} << lane : 0;
        break;
      case kAny:
        all |= v != 0;
        break;
      case kAll:
        all &= v != 0 ? ~uint64_t{0} : 0;
        break;
      default:
        break;
    }
  }
  for (unsigned left = mask; left; left &= left - 1) {
    Fiber& lane = *w.lanes[static_cast<size_t>(__builtin_ctz(left))];
    if (call == kShuffle || call == kShuffleOr) {
      const bool own = call == kShuffleOr && lane.source >= 32;
      if (!own && !(mask >> lane.source & 1)) {
        wrong("lane " + std::to_string(lane.lane) + " reads lane " + std::to_string(lane.source) +
              ", which is not in it");
      }
      lane.result = own ? lane.value : w.lanes[lane.source]->value;
    } else {
      lane.result = call == kAll ? all & 1 : all;
    }
    if (&lane != &f) running->ready(&lane);
  }
  yield();
  return f.result;
}

void block_barrier(const Where& where) {
  Fiber& f = *current;
  Block& b = *f.block;
  if (b.arrived == 0) {
    b.barrier = where;
    b.first_arrived = f.linear;
  } else if (b.barrier.line() != where.line() || b.barrier.column() != where.column()) {
    fail("__syncthreads in divergent code: thread " + std::to_string(b.first_arrived) +
             " waits at another one, " + site(b.barrier),
         where);
  }
  ++b.arrived;
  ++f.block_barriers;
  if (b.arrived == b.alive) {
    b.arrived = 0;
    running->ready_all(b.waiting);
    yield();
  } else {
    b.waiting.push_back(&f);
    wait("__syncthreads", nullptr, where);
  }
}

void named_barrier(unsigned number, unsigned threads, bool waits, const Where& where) {
  Fiber& f = *current;
  Block& b = *f.block;
  if (number >= b.named.size()) fail("barrier " + std::to_string(number) + " of 16", where);
  if (threads == 0 || threads % 32 || threads > b.threads) {
    fail("a barrier for " + std::to_string(threads) + " threads of " + std::to_string(b.threads) +
             ": they are no whole warps of the block",
         where);
  }
  Block::Named& barrier = b.named[number];
  if (barrier.arrived && barrier.expected != threads) {
    fail("barrier " + std::to_string(number) + " for " + std::to_string(threads) +
             " threads, which others use for " + std::to_string(barrier.expected),
         where);
  }
  barrier.expected = threads;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    running->ready_all(barrier.waiting);
    yield();
  } else if (waits) {
    barrier.waiting.push_back(&f);
    wait("a named barrier", nullptr, where);
  } else {
    yield();
  }
}

void cluster_arrive(const Where& where) {
  need(9, "clusters", where);
  Fiber& f = *current;
  Cluster& c = *f.block->cluster;
  if (f.arrived_at_cluster) fail("a second arrival at the cluster barrier without a wait", where);
  f.arrived_at_cluster = true;
  f.cluster_phase = c.phase;
  ++c.arrived;
  if (c.arrived == c.alive) running->complete(c);
  yield();
}

void cluster_wait(const Where& where) {
  Fiber& f = *current;
  Cluster& c = *f.block->cluster;
  if (!f.arrived_at_cluster) fail("a wait at the cluster barrier without an arrival", where);
  if (c.phase == f.cluster_phase) {
    c.waiting.push_back(&f);
    wait("the cluster barrier", &c, where);
  }
  f.arrived_at_cluster = false;
}

void grid_barrier(const Where& where) {
  const Launch& launch = running->launch;
  if (!launch.cooperative) fail("a grid-wide barrier without a cooperative launch", where);
  block_barrier(where);
  if (current->linear == 0) {
    const unsigned blocks = launch.grid[0] * launch.grid[1] * launch.grid[2];
    if (++running->blocks_at_grid_barrier == blocks) {
      running->blocks_at_grid_barrier = 0;
      running->ready_all(running->at_grid_barrier);
      yield();
    } else {
      running->at_grid_barrier.push_back(current);
      wait("the grid-wide barrier", nullptr, where);
    }
  }
  block_barrier(where);
}

void* grid_workspace() {
  return running->launch.cooperative ? running->grid_workspace.data() : nullptr;
}

void* in_peer(const void* shared, unsigned rank, const Where& where) {
  const Block& b = *current->block;
  if (rank >= b.cluster->blocks.size()) {
    fail("rank " + std::to_string(rank) + " in a cluster of " +
             std::to_string(b.cluster->blocks.size()),
         where);
  }
  if (!in_shared(b, shared, 1)) fail("a peer's address of what is not in shared memory", where);
  const Block& peer = *b.cluster->blocks[rank];
  if (&peer != &b && b.cluster->phase == 0) {
    fail("a peer's shared memory before the first cluster barrier: it may not have started", where);
  }
  if (peer.alive == 0) fail("shared memory of " + name(peer) + ", which has exited", where);
  return peer.shared + (static_cast<const char*>(shared) - b.shared);
}

void mbarrier_init(uint64_t* barrier, unsigned count, const Where& where) {
  need(9, "mbarriers", where);
  Block& b = *current->block;
  if (!in_shared(b, barrier, 8)) fail("an mbarrier outside shared memory", where);
  if (reinterpret_cast<uintptr_t>(barrier) % 8) fail("a misaligned mbarrier", where);
  if (count == 0 || count >= 1u << 20)
    fail("an mbarrier's count of " + std::to_string(count), where);
  *barrier = b.mbarriers.size() ^ kMagic;
  b.mbarriers.push_back(std::make_unique<MbarrierState>());
  b.mbarriers.back()->expected = b.mbarriers.back()->pending = count;
}

void mbarrier_arrive(uint64_t* barrier, unsigned bytes, const Where& where) {
  MbarrierState& state = state_of(barrier, where);
  if (state.pending == 0) fail("more arrivals at an mbarrier than it expects", where);
  state.bytes += bytes;
  --state.pending;
  running->complete(state);
  yield();
}

void mbarrier_wait(uint64_t* barrier, unsigned parity, const Where& where) {
  yield();
  MbarrierState& state = state_of(barrier, where);
  while ((state.phase & 1) == (parity & 1)) {
    state.waiting.push_back(current);
    wait("an mbarrier", &state, where, [](const Fiber& self) {
      const auto* on = static_cast<const MbarrierState*>(self.waits_for);
      return " with " + std::to_string(on->pending) + " arrivals and " + std::to_string(on->bytes) +
             " bytes to come";
    });
  }
}

uint64_t mbarrier_phase(uint64_t* barrier, const Where& where) {
  return state_of(barrier, where).phase;
}

void fence_proxy() { current->proxy_fence = true; }

void bulk_load(void* shared, const void* global, size_t bytes, uint64_t* barrier,
               const Where& where) {
  // What the memory was used for until the barrier that freed it.
  if (!current->proxy_fence) {
    fail("a bulk copy by a thread that has not executed the proxy fence since its last barrier",
         where);
  }
  MbarrierState& state = state_of(barrier, where);
  if (bytes == 0 || bytes % 16) fail("a bulk copy of " + std::to_string(bytes) + " bytes", where);
  check_range(shared, bytes, 16, "a bulk copy's destination", where);
  check_range(global, bytes, 16, "a bulk copy's source", where);
  if (!in_shared(*current->block, shared, bytes)) {
    fail("a bulk load to outside the block's shared memory", where);
  }
  start({shared, global, bytes, &state});
  yield();
}

void async_store(void* shared, const void* value, size_t bytes, uint64_t* barrier,
                 const Where& where) {
  MbarrierState& state = state_of(barrier, where);
  const auto& blocks = current->block->cluster->blocks;
  if (std::none_of(blocks.begin(), blocks.end(),
                   [&](const auto& b) { return in_shared(*b, shared, bytes); })) {
    fail("an asynchronous store to outside the cluster's shared memory", where);
  }
  CopyPointer copy = start({shared, nullptr, bytes, &state});
  std::memcpy(copy->value.data(), value, bytes);
  copy->from = copy->value.data();
  yield();
}

void async_copy(void* shared, const void* global, size_t bytes, const Where& where, size_t size) {
  static constexpr char kZeros[16] = {};
  size = std::min(size, bytes);
  need(8, "asynchronous copies", where);
  check_range(shared, bytes, bytes, "an asynchronous copy's destination", where);
  if (size) check_range(global, size, bytes, "an asynchronous copy's source", where);
  if (!in_shared(*current->block, shared, bytes)) {
    fail("an asynchronous copy to outside the block's shared memory", where);
  }
  if (size) current->open.push_back(start({shared, global, size, nullptr}));
  if (size == bytes) return;
  current->open.push_back(
      start({static_cast<char*>(shared) + size, kZeros, bytes - size, nullptr}));
}

void commit() {
  Fiber& f = *current;
  f.groups.push_back(std::exchange(f.open, {}));
}

void wait_for_copies(unsigned but) {
  auto& groups = current->groups;
  while (groups.size() > but) {
    for (const CopyPointer& copy : groups.front()) {
      auto& flying = running->in_flight;
      flying.erase(std::remove(flying.begin(), flying.end(), copy), flying.end());
      running->finish(*copy);
    }
    groups.pop_front();
  }
  yield();
}

void wait_for_write(const volatile void* address, const Where& where) {
  running->for_writes.push_back(current);
  wait("a flag in global memory", const_cast<const void*>(address), where);
}

void written(const volatile void* address) {
  auto& waiting = running->for_writes;
  for (size_t i = waiting.size(); i-- > 0;) {
    if (waiting[i]->waits_for != const_cast<const void*>(address)) continue;
    running->ready(waiting[i]);
    waiting.erase(waiting.begin() + static_cast<std::ptrdiff_t>(i));
  }
  ++running->progress;
  ++running->ended;
}

}  // namespace simt
