// Runs a grid of CUDA threads as fibers, one at a time, in an order drawn from a seed; and finds
// out what a GPU would not say: who waits for whom for ever, who uses what it may not.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include "fiber.h"

namespace simt {

using Where = std::source_location;  // of a kernel's call

// What a simulated device has.
struct Device {
  const char* name;
  int major, minor;
  int multiprocessors;
  int shared_per_block, shared_per_multiprocessor;
  int threads_per_multiprocessor;
  int largest_cluster;  // beyond 8 with the non-portable attribute; 1: no clusters
  int l2_bytes;
  bool refuses_cooperation = false;  // whatever its attributes say
};
const Device& device();  // the current one

// One launch.
struct Launch {
  std::array<unsigned, 3> grid{1, 1, 1}, block{1, 1, 1};
  unsigned cluster = 1;  // blocks, along x
  size_t shared_bytes = 0;
  bool cooperative = false;
  std::string kernel;
  std::vector<uint32_t> only;  // clusters that run, by their numbers; empty: all
};

struct Options {
  uint64_t seed = 0;
  // More switches than any launch of the tests needs: a loop that polls by itself never ends.
  uint64_t most_switches = 400'000'000;
  // Seed of the errors of approximate functions, where PTX is executed (tests/ptx).
  uint64_t approximations = 0;
};
extern Options options;

// Runs body() once per thread. Returns what went wrong; empty if nothing did.
std::string run(const Launch& launch, const std::function<void()>& body);

// ---- the state of a running launch ----

struct Block;
struct Cluster;
struct Warp;

struct Fiber {
  Context context;
  char* stack = nullptr;
  std::array<unsigned, 3> thread{};  // threadIdx
  unsigned linear = 0, lane = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  bool lags = false;  // runs only when nobody else can

  enum class State { ready, waits, exited } state = State::ready;
  const char* waits_at = nullptr;  // what it called
  const void* waits_for = nullptr;
  Where where;
  std::string (*describe)(const Fiber&) = nullptr;

  // A call that a warp makes together.
  int call = 0;
  unsigned mask = 0, source = 0;
  uint64_t value = 0, result = 0;

  uint64_t block_barriers = 0;  // __syncthreads executed
  bool proxy_fence = false;     // executed since the last of them
  uint32_t* counts = nullptr;   // of basic blocks, where translated PTX counts them
  bool arrived_at_cluster = false;
  uint64_t cluster_phase = 0;

  // What a load that may be one of a loop found, and how often it has tried an mbarrier.
  const void* polled = nullptr;
  uint64_t found = 0;
  unsigned tries = 0;

  // Asynchronous copies: those of the open group, and of groups that are closed.
  std::vector<std::shared_ptr<struct Copy>> open;
  std::deque<std::vector<std::shared_ptr<struct Copy>>> groups;
};

// Lanes that have called something with this mask and wait for the rest of it.
struct Meeting {
  unsigned mask = 0, arrived = 0;
};

struct Warp {
  std::array<Fiber*, 32> lanes{};
  unsigned there = 0, exited = 0;
  std::vector<Meeting> meetings;
};

struct Block {
  std::array<unsigned, 3> index{};  // blockIdx
  unsigned rank = 0;                // in the cluster
  Cluster* cluster = nullptr;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  std::unique_ptr<Fiber[]> fibers;
  std::vector<Warp> warps;
  unsigned threads = 0, alive = 0;
  // Of __syncthreads: who has arrived, and where.
  unsigned arrived = 0, first_arrived = 0;
  Where barrier;
  std::vector<Fiber*> waiting;
  std::vector<std::unique_ptr<struct MbarrierState>> mbarriers;
  // Of barriers that have a number of threads, by their own numbers.
  struct Named {
    unsigned arrived = 0, expected = 0;
    std::vector<Fiber*> waiting;
  };
  std::array<Named, 16> named;
  bool exit_seen = false;
  uint64_t barriers_of_exited = 0;
  unsigned first_exited = 0;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned alive = 0, arrived = 0;
  uint64_t phase = 0;
  std::vector<Fiber*> waiting;
};

// The thread that runs, and its launch.
extern Fiber* current;
const Launch& launch_of_current();

// ---- what simt.h builds upon; all are called by the running thread ----

[[noreturn]] void fail(const std::string& what, const Where& where);
void yield();  // lets any other thread go first

enum Call : int { kSync, kShuffle, kShuffleOr, kBallot, kAny, kAll };
// What all lanes of `mask` do together. kShuffle gives the value of lane `source`, which must be
// in the mask; kShuffleOr its own value where source is 32 or more.
uint64_t together(Call call, unsigned mask, uint64_t value, unsigned source, const char* name,
                  const Where& where);

void block_barrier(const Where& where);
// One of sixteen of a block, for so many of its threads. Who does not wait only arrives.
void named_barrier(unsigned number, unsigned threads, bool waits, const Where& where);
void cluster_arrive(const Where& where);
void cluster_wait(const Where& where);
void grid_barrier(const Where& where);  // of a cooperative launch
// Memory for such a barrier, zero at first: the driver's, where the barrier itself is executed.
// Null without a cooperative launch.
void* grid_workspace();
// The same place in the shared memory of another block of the cluster.
void* in_peer(const void* shared, unsigned rank, const Where& where);

void mbarrier_init(uint64_t* barrier, unsigned count, const Where& where);
void mbarrier_arrive(uint64_t* barrier, unsigned bytes, const Where& where);
void mbarrier_wait(uint64_t* barrier, unsigned parity, const Where& where);
uint64_t mbarrier_phase(uint64_t* barrier, const Where& where);  // how many are complete

void fence_proxy();
void bulk_load(void* shared, const void* global, size_t bytes, uint64_t* barrier,
               const Where& where);
// A value of at most 16 bytes into shared memory of the cluster.
void async_store(void* shared, const void* value, size_t bytes, uint64_t* barrier,
                 const Where& where);
// Shared memory that nobody may touch from now on; only AddressSanitizer sees to it.
void red_zone(void* shared, size_t bytes);
// The first `size` bytes, by default all; the rest is filled with zeros.
void async_copy(void* shared, const void* global, size_t bytes, const Where& where,
                size_t size = ~size_t{0});
void commit();
void wait_for_copies(unsigned but);  // of the closed groups may be under way

// Blocks until somebody calls `written` for the address, or nothing else can run.
void wait_for_write(const volatile void* address, const Where& where);
void written(const volatile void* address);

// Written down, where a test wants it: what 16-byte accesses and copies touch of global memory, and
// what L2 is asked for.
enum class Access : char { read = 'r', write = 'w', prefetch = 'p' };
void accessed(Access how, const void* address, size_t bytes);

}  // namespace simt
