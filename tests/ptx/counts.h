// How often basic blocks of a translated module run, where it was translated to count them.
#pragma once

#include <algorithm>
#include <deque>
#include <map>
#include <vector>

#include "threads.h"

namespace ptx {

// Counters of each thread, by its block's number in the grid and its own in the block.
inline std::map<std::pair<u64, unsigned>, std::vector<u32>> counters;

// Thread `current` begins basic block i of kBlocks.
template <u32 kBlocks>
void count(u32 i) {
  simt::Fiber& me = *simt::current;
  if (!me.counts) {
    const auto& at = block().index;
    const auto& grid = simt::launch_of_current().grid;
    const u64 number = at[0] + u64{grid[0]} * (at[1] + u64{grid[1]} * at[2]);
    std::vector<u32>& row = counters[{number, me.linear}];
    row.resize(kBlocks);
    me.counts = row.data();
  }
  ++me.counts[i];
}

}  // namespace ptx

// Adds up, over all launches since the last call: for each basic block, the warps that ran it (each
// as often as the lane of it that did so most) and the threads. Lanes that go different ways each
// cost the warp an issue of their own.
extern "C" [[gnu::visibility("default")]] void ptx_take_counts(uint64_t* warps, uint64_t* threads,
                                                               uint64_t blocks) {
  using Row = std::pair<const std::pair<ptx::u64, unsigned>, std::vector<ptx::u32>>;
  std::map<std::pair<ptx::u64, unsigned>, std::vector<ptx::u32>> most;
  for (const Row& row : ptx::counters) {
    std::vector<ptx::u32>& of_warp = most[{row.first.first, row.first.second / 32}];
    of_warp.resize(blocks);
    for (uint64_t i = 0; i < blocks; ++i) {
      of_warp[i] = std::max(of_warp[i], row.second[i]);
      threads[i] += row.second[i];
    }
  }
  for (const Row& row : most) {
    for (uint64_t i = 0; i < blocks; ++i) warps[i] += row.second[i];
  }
  ptx::counters.clear();
}
