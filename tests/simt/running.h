// A running launch, for the two files that make it: scheduler.cpp, and calls.cpp with what its
// threads call.
#pragma once

#include <random>
#include <utility>

#include "scheduler.h"

namespace simt {

// What an mbarrier in shared memory stands for.
struct MbarrierState {
  unsigned expected = 0, pending = 0;
  int64_t bytes = 0;  // still to come; may be negative for a moment
  uint64_t phase = 0;
  std::vector<Fiber*> waiting;
};

// A copy under way: reads and writes when it is done, not before.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  MbarrierState* barrier;  // of a bulk copy
  bool done = false;
  std::array<char, 16> value{};  // what a store brings, which is nowhere else
};
using CopyPointer = std::shared_ptr<Copy>;

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
  uint64_t ended = 0;     // counts writes that were told of, and threads that have exited
  unsigned blocks_at_grid_barrier = 0;
  std::vector<Fiber*> at_grid_barrier;
  alignas(64) std::array<uint64_t, 8> grid_workspace{};

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

extern Scheduler* running;

// For messages.
std::string site(const Where& where);
std::string name(const Block& b);
std::string name(const Fiber& f);

}  // namespace simt
