#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>

#include "running.h"

namespace simt {

Options options;
Fiber* current = nullptr;
Scheduler* running = nullptr;

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

namespace {

Stacks stacks;
constexpr size_t kCanary = 64;

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
  ++running->ended;
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
#if SIMT_ASAN
    if (b.shared) __asan_unpoison_memory_region(b.shared, b.shared_bytes);  // red zones
#endif
    if (b.shared) std::memset(b.shared, 0xff, b.shared_bytes);
#if SIMT_ASAN
    if (b.shared) __asan_poison_memory_region(b.shared, b.shared_bytes);
#endif
  }
  if (c.alive && c.arrived == c.alive) running->complete(c);
  if (!c.alive) running->cluster_finished();
  running->leave();
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

}  // namespace

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
  const uint64_t clusters = launch.only.empty() ? blocks / launch.cluster : launch.only.size();
  // How many are resident at a time. Without a cooperative launch nothing promises more than one.
  uint64_t window = clusters;
  if (!launch.cooperative) {
    const uint64_t most = std::max<uint64_t>(1, 2048 / (threads * launch.cluster));
    window = 1 + below(std::min<uint64_t>(most, 6));
  }
  std::vector<uint32_t> order(clusters);
  for (uint64_t i = 0; i < clusters; ++i) {
    order[i] = launch.only.empty() ? static_cast<uint32_t>(i) : launch.only[i];
  }
  if (style_ != 1) std::shuffle(order.begin(), order.end(), random_);

  uint64_t started = 0, rechecked_at = 0, ended_before = 0, in_vain = 0;
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
      // Somebody may have written without saying so: once more, unless that was in vain already;
      // or a thousand times, where all that happens in between is that a block meets.
      in_vain = ended == ended_before ? in_vain + 1 : 0;
      ended_before = ended;
      std::vector<std::pair<Fiber*, const void*>> waiting;
      for (Fiber* f : for_writes) waiting.emplace_back(f, f->waits_for);
      std::sort(waiting.begin(), waiting.end());
      if (in_vain == 1000 || (rechecked_at == progress && rechecked == waiting)) {
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

}  // namespace simt
