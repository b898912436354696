#include "scheduler.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <utility>

namespace simt {

Options options;
Fiber* current = nullptr;

// An mbarrier's eight bytes in shared memory hold kMagic and an index into its block's list.
struct MbarrierState {
  unsigned expected = 0, pending = 0;
  int64_t bytes = 0;  // still to come; may be negative for a moment
  uint64_t phase = 0;
  std::vector<Fiber*> waiting;
};

namespace {

constexpr uint64_t kMagic = 0x6d62617272696572;
constexpr size_t kCanary = 64;

}  // namespace

// A copy under way: reads and writes when it is done, not before.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  MbarrierState* barrier;  // of a bulk copy
  bool done = false;
};
using CopyPointer = std::shared_ptr<Copy>;

namespace {

class Scheduler {
 public:
  Scheduler(const Launch& launch, const std::function<void()>& body)
      : launch(launch), body(body), random_(options.seed * 0x9e3779b97f4a7c15 + 1) {
    // Three kinds of order: anybody next; who stopped last goes on; some warps lag behind.
    style_ = options.seed % 3;
    lazy_copies_ = options.seed / 3 % 2;
  }

  std::string run();

  Context main;
  const Launch& launch;
  const std::function<void()>& body;
  std::string error;
  std::vector<Fiber*> for_writes;  // wait for a write to global memory
  std::vector<CopyPointer> in_flight;
  uint64_t progress = 0;  // counts what may have changed memory
  unsigned blocks_at_grid_barrier = 0;
  std::vector<Fiber*> at_grid_barrier;

  unsigned below(size_t n) { return static_cast<unsigned>(random_() % n); }

  void ready(Fiber* f) {
    f->state = Fiber::State::ready;
    f->waits_at = nullptr;
    (f->lags ? lagging_ : ready_).push_back(f);
  }
  void ready_all(std::vector<Fiber*>& waiting) {
    for (Fiber* f : std::exchange(waiting, {})) ready(f);
    ++progress;
  }

  // Gives way to some other thread; returns when this one's turn comes again.
  void switch_away(bool last = false) {
    Fiber* me = current;
    if (!lazy_copies_ && !in_flight.empty() && below(16) == 0) deliver(below(in_flight.size()));
    Fiber* next = stop_ ? nullptr : pick();
    if (next == me) return;
    if (++switches_ > options.most_switches && error.empty()) {
      error = "the launch does not end: a loop polls without waiting";
      stop_ = true;
      next = nullptr;
    }
    current = next;
    me->context.switch_to(next ? next->context : main, last);
  }
  [[noreturn]] void leave() {
    switch_away(true);
    std::abort();  // nobody comes back here
  }

  void stop(const std::string& what) {
    if (error.empty()) error = what;
    stop_ = true;
  }

  void deliver(size_t i) {
    CopyPointer copy = in_flight[i];
    in_flight.erase(in_flight.begin() + static_cast<std::ptrdiff_t>(i));
    finish(*copy);
  }
  void finish(Copy& copy);
  void complete(MbarrierState& state);
  void complete(Cluster& cluster) {
    cluster.arrived = 0;
    ++cluster.phase;
    ready_all(cluster.waiting);
  }
  void cluster_finished() { finished_ = true; }

 private:
  Fiber* pick() {
    if (finished_) return nullptr;  // the scheduler has a cluster to clear away
    std::vector<Fiber*>& from = ready_.empty() ? lagging_ : ready_;
    if (from.empty()) return nullptr;
    if (style_ != 1 || below(8) == 0) std::swap(from[below(from.size())], from.back());
    Fiber* f = from.back();
    from.pop_back();
    return f;
  }

  void start_cluster(uint64_t number);
  void clear(Cluster& cluster);
  void release(Cluster& cluster);
  std::string deadlock() const;

  std::mt19937_64 random_;
  unsigned style_, lazy_copies_;
  std::vector<Fiber*> ready_, lagging_;
  std::vector<std::unique_ptr<Cluster>> resident_;
  uint64_t switches_ = 0;
  bool stop_ = false, finished_ = false;
};

Scheduler* running = nullptr;
Stacks stacks;

std::string site(const Where& where) {
  std::string file = where.file_name();
  file = file.substr(file.rfind('/') + 1);
  return file + ":" + std::to_string(where.line());
}

std::string name(const Block& b) {
  const auto& i = b.index;
  std::string text = std::to_string(i[0]);
  if (i[1] || i[2]) text += "," + std::to_string(i[1]) + "," + std::to_string(i[2]);
  return "block " + text;
}

std::string name(const Fiber& f) { return name(*f.block) + ", thread " + std::to_string(f.linear); }

void fiber_entry() {
  current->context.arrived(&running->main);
  running->body();
  Fiber* f = current;
  Block& b = *f->block;
  if (f->warp->meetings.size()) {
    for (const Meeting& m : f->warp->meetings) {
      if (m.mask >> f->lane & 1) {
        running->stop(name(*f) +
                      " exits while others of its warp wait for it in a call whose mask "
                      "names lane " +
                      std::to_string(f->lane));
      }
    }
  }
  f->state = Fiber::State::exited;
  f->warp->exited |= 1u << f->lane;
  if (!b.exit_seen) {
    b.exit_seen = true;
    b.barriers_of_exited = f->block_barriers;
    b.first_exited = f->linear;
  } else if (b.barriers_of_exited != f->block_barriers) {
    running->stop(name(b) + ": __syncthreads in divergent code: thread " +
                  std::to_string(b.first_exited) + " executed " +
                  std::to_string(b.barriers_of_exited) + " of them, thread " +
                  std::to_string(f->linear) + " " + std::to_string(f->block_barriers));
  }
  Cluster& c = *b.cluster;
  if (f->arrived_at_cluster && f->cluster_phase == c.phase) --c.arrived;
  --b.alive;
  --c.alive;
  ++running->progress;
  if (b.alive) {
    if (b.arrived == b.alive) {
      b.arrived = 0;
      running->ready_all(b.waiting);
    }
  } else {
    for (const CopyPointer& c : running->in_flight) {
      const char* to = static_cast<const char*>(c->to);
      if (to >= b.shared && to < b.shared + b.shared_bytes) {
        running->stop(name(b) + " exits while copies into its shared memory are under way");
      }
    }
    // Whoever still looks gets NaN, or AddressSanitizer's message.
    if (b.shared) std::memset(b.shared, 0xff, b.shared_bytes);
#if SIMT_ASAN
    if (b.shared) __asan_poison_memory_region(b.shared, b.shared_bytes);
#endif
  }
  if (c.alive && c.arrived == c.alive) running->complete(c);
  if (!c.alive) running->cluster_finished();
  running->leave();
}

void Scheduler::start_cluster(uint64_t number) {
  auto cluster = std::make_unique<Cluster>();
  const unsigned threads = launch.block[0] * launch.block[1] * launch.block[2];
  cluster->alive = launch.cluster * threads;
  const bool blocks_lag = below(2);
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    auto b = std::make_unique<Block>();
    const uint64_t linear = number * launch.cluster + rank;
    b->index = {static_cast<unsigned>(linear % launch.grid[0]),
                static_cast<unsigned>(linear / launch.grid[0] % launch.grid[1]),
                static_cast<unsigned>(linear / launch.grid[0] / launch.grid[1])};
    b->rank = rank;
    b->cluster = cluster.get();
    b->threads = b->alive = threads;
    b->shared_bytes = launch.shared_bytes;
    if (launch.shared_bytes) {
      // A block of the heap each, so that AddressSanitizer knows where it ends.
      const size_t bytes = launch.shared_bytes + (SIMT_ASAN ? 0 : kCanary);
      void* memory = nullptr;
      if (posix_memalign(&memory, 1024, bytes)) std::abort();
      std::memset(memory, 0xff, launch.shared_bytes);
      if (!SIMT_ASAN) std::memset(static_cast<char*>(memory) + launch.shared_bytes, 0x5a, kCanary);
      b->shared = static_cast<char*>(memory);
    }
    b->fibers = std::make_unique<Fiber[]>(threads);
    const uint64_t lagging = blocks_lag ? (below(2) ? ~uint64_t{0} : 0) : random_();
    b->warps.resize((threads + 31) / 32);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& f = b->fibers[t];
      f.linear = t;
      f.lane = t % 32;
      f.thread = {t % launch.block[0], t / launch.block[0] % launch.block[1],
                  t / launch.block[0] / launch.block[1]};
      f.block = b.get();
      f.warp = &b->warps[t / 32];
      f.warp->lanes[f.lane] = &f;
      f.warp->there |= 1u << f.lane;
      f.lags = style_ == 2 && (lagging >> (t / 32) & 1);
      f.stack = stacks.take();
      f.context.prepare(f.stack, fiber_entry);
      ready(&f);
    }
    cluster->blocks.push_back(std::move(b));
  }
  resident_.push_back(std::move(cluster));
}

void Scheduler::release(Cluster& cluster) {
  for (auto& b : cluster.blocks) {
    for (unsigned t = 0; t < b->threads; ++t) stacks.give(b->fibers[t].stack);
#if SIMT_ASAN
    if (b->shared) __asan_unpoison_memory_region(b->shared, b->shared_bytes);
#endif
    std::free(b->shared);
  }
}

void Scheduler::clear(Cluster& cluster) {
#if !SIMT_ASAN
  for (auto& b : cluster.blocks) {
    if (!b->shared) continue;
    const auto all = [](const char* p, size_t n, unsigned char value) {
      return static_cast<unsigned char>(*p) == value && std::memcmp(p, p + 1, n - 1) == 0;
    };
    if (!all(b->shared, b->shared_bytes, 0xff)) {
      stop(name(*b) + ": its shared memory was written after it had exited");
    } else if (!all(b->shared + b->shared_bytes, kCanary, 0x5a)) {
      stop(name(*b) + ": written past the end of its shared memory");
    }
  }
#endif
  release(cluster);
}

std::string Scheduler::run() {
  const uint64_t blocks = uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2];
  const unsigned threads = launch.block[0] * launch.block[1] * launch.block[2];
  const uint64_t clusters = blocks / launch.cluster;
  // How many are resident at a time. Without a cooperative launch nothing promises more than one.
  uint64_t window = clusters;
  if (!launch.cooperative) {
    const uint64_t most = std::max<uint64_t>(1, 2048 / (threads * launch.cluster));
    window = 1 + below(std::min<uint64_t>(most, 6));
  }
  std::vector<uint32_t> order(clusters);
  for (uint64_t i = 0; i < clusters; ++i) order[i] = static_cast<uint32_t>(i);
  if (style_ != 1) std::shuffle(order.begin(), order.end(), random_);

  uint64_t started = 0, rechecked_at = 0;
  std::vector<std::pair<Fiber*, const void*>> rechecked;
  while (!stop_) {
    if (finished_) {
      finished_ = false;
      for (size_t i = resident_.size(); i-- > 0;) {
        if (resident_[i]->alive) continue;
        clear(*resident_[i]);
        resident_.erase(resident_.begin() + static_cast<std::ptrdiff_t>(i));
      }
    }
    while (started < clusters && resident_.size() < window) start_cluster(order[started++]);
    if (resident_.empty() || stop_) break;
    if (Fiber* next = pick()) {
      current = next;
      main.switch_to(next->context);
      current = nullptr;
    } else if (!in_flight.empty()) {
      deliver(below(in_flight.size()));
    } else if (!for_writes.empty()) {
      // Somebody may have written without saying so: once more, unless that was in vain already.
      std::vector<std::pair<Fiber*, const void*>> waiting;
      for (Fiber* f : for_writes) waiting.emplace_back(f, f->waits_for);
      std::sort(waiting.begin(), waiting.end());
      if (rechecked_at == progress && rechecked == waiting) {
        stop(deadlock());
      } else {
        ready_all(for_writes);
        rechecked = std::move(waiting);
        rechecked_at = progress;
      }
    } else {
      stop(deadlock());
    }
  }
  for (auto& c : resident_) release(*c);
  return error;
}

void Scheduler::finish(Copy& copy) {
  if (copy.done) return;
#if SIMT_ASAN
  __asan_unpoison_memory_region(copy.to, copy.bytes);
#endif
  std::memcpy(copy.to, copy.from, copy.bytes);
  copy.done = true;
  ++progress;
  if (copy.barrier) {
    copy.barrier->bytes -= static_cast<int64_t>(copy.bytes);
    complete(*copy.barrier);
  }
}

void Scheduler::complete(MbarrierState& state) {
  if (state.pending || state.bytes) return;
  ++state.phase;
  state.pending = state.expected;
  ready_all(state.waiting);
}

// "0-31, 64" for the threads of a list.
std::string ranges(const std::vector<unsigned>& threads) {
  std::ostringstream text;
  for (size_t i = 0; i < threads.size();) {
    size_t j = i;
    while (j + 1 < threads.size() && threads[j + 1] == threads[j] + 1) ++j;
    text << (i ? ", " : "") << threads[i];
    if (j > i) text << "-" << threads[j];
    i = j + 1;
  }
  return text.str();
}

std::string Scheduler::deadlock() const {
  std::ostringstream text;
  text << "deadlock";
  int shown = 0;
  for (const auto& c : resident_) {
    for (const auto& b : c->blocks) {
      std::map<std::string, std::vector<unsigned>> groups;
      for (unsigned t = 0; t < b->threads; ++t) {
        const Fiber& f = b->fibers[t];
        if (f.state == Fiber::State::exited) {
          groups["exited"].push_back(t);
        } else {
          const std::string at = std::string(f.waits_at) + " (" + site(f.where) + ")";
          groups["wait at " + at + (f.describe ? f.describe(f) : "")].push_back(t);
        }
      }
      if (b->alive == 0 || ++shown > 8) continue;
      text << "; " << name(*b) << ": ";
      const char* between = "";
      for (const auto& [what, threads] : groups) {
        text << between << "threads " << ranges(threads) << " " << what;
        between = ", ";
      }
    }
  }
  return text.str();
}

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

std::string run(const Launch& launch, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  Scheduler scheduler(launch, body);
  running = &scheduler;
  std::string error = scheduler.run();
  running = nullptr;
  current = nullptr;
  return error.empty() ? error : launch.kernel + ": " + error;
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

void bulk_load(void* shared, const void* global, size_t bytes, uint64_t* barrier,
               const Where& where) {
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

void async_copy(void* shared, const void* global, size_t bytes, const Where& where) {
  need(8, "asynchronous copies", where);
  check_range(shared, bytes, bytes, "an asynchronous copy's destination", where);
  check_range(global, bytes, bytes, "an asynchronous copy's source", where);
  if (!in_shared(*current->block, shared, bytes)) {
    fail("an asynchronous copy to outside the block's shared memory", where);
  }
  current->open.push_back(start({shared, global, bytes, nullptr}));
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
}

}  // namespace simt
