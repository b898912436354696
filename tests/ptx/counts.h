// How often basic blocks of a translated module run, where it was translated to count them.
#pragma once

#include <algorithm>
#include <deque>
#include <map>
#include <vector>

#include "threads.h"

namespace ptx {

inline u64 number_of_block() {
  const auto& at = block().index;
  const auto& grid = simt::launch_of_current().grid;
  return at[0] + u64{grid[0]} * (at[1] + u64{grid[1]} * at[2]);
}

// Counters of each thread, by its block's number in the grid and its own in the block.
inline std::map<std::pair<u64, unsigned>, std::vector<u32>> counters;

// Thread `current` begins basic block i of kBlocks.
template <u32 kBlocks>
void count(u32 i) {
  simt::Fiber& me = *simt::current;
  if (!me.counts) {
    std::vector<u32>& row = counters[{number_of_block(), me.linear}];
    row.resize(kBlocks);
    me.counts = row.data();
  }
  ++me.counts[i];
}

// An access of a thread to memory: on which line of PTX, and where.
struct Access {
  u32 line, bytes;
  u64 address;
  bool shared;
};
inline std::map<std::pair<u64, unsigned>, std::vector<Access>> accesses;

inline void record_access(const char* at, size_t bytes, const Where& where) {
  const simt::Block& b = block();
  const bool shared = at >= b.shared && at < b.shared + b.shared_bytes;
  const u64 address = shared ? static_cast<u64>(at - b.shared) : reinterpret_cast<u64>(at);
  accesses[{number_of_block(), simt::current->linear}].push_back(
      {where.line(), static_cast<u32>(bytes), address, shared});
}

// What the requests of a line of PTX touch: one request is what the lanes of a warp ask for the
// same time.
struct Touched {
  u64 line, shared, requests, bytes;
  u64 sectors;            // of 32 bytes, in each request
  u64 wavefronts, least;  // of shared memory: 32 banks of 4 bytes; and without conflicts
};

// Of the requests of a line: `lanes` has each lane's accesses in their order.
inline void add_requests(Touched& t, const std::vector<std::vector<Access>>& lanes) {
  size_t most = 0;
  for (const auto& lane : lanes) most = std::max(most, lane.size());
  for (size_t k = 0; k < most; ++k) {
    std::vector<u64> sectors;
    // Lanes whose accesses are wide take turns: 8 of them at 16 bytes, 16 at 8.
    std::map<unsigned, std::vector<u64>> words;
    for (unsigned lane = 0; lane < lanes.size(); ++lane) {
      if (k >= lanes[lane].size()) continue;
      const Access& a = lanes[lane][k];
      t.bytes += a.bytes;
      for (u64 s = a.address / 32; s <= (a.address + a.bytes - 1) / 32; ++s) sectors.push_back(s);
      const unsigned turn = a.bytes == 16 ? lane / 8 : a.bytes == 8 ? lane / 16 : 0;
      for (u64 w = a.address / 4; w <= (a.address + a.bytes - 1) / 4; ++w) words[turn].push_back(w);
    }
    ++t.requests;
    std::sort(sectors.begin(), sectors.end());
    t.sectors += static_cast<u64>(std::unique(sectors.begin(), sectors.end()) - sectors.begin());
    if (!t.shared) continue;
    for (auto& [turn, of_turn] : words) {
      std::sort(of_turn.begin(), of_turn.end());
      of_turn.erase(std::unique(of_turn.begin(), of_turn.end()), of_turn.end());
      std::array<u64, 32> banks{};
      for (const u64 w : of_turn) ++banks[w % 32];
      t.wavefronts += *std::max_element(banks.begin(), banks.end());
      ++t.least;
    }
  }
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

// Whether accesses are written down from now on.
extern "C" [[gnu::visibility("default")]] void ptx_watch(int on) {
  ptx::watch = on ? ptx::record_access : nullptr;
}

// Of each line with accesses, those since the last call; returns how many lines there are, of which
// at most `most` are written.
extern "C" [[gnu::visibility("default")]] uint64_t ptx_take_accesses(ptx::Touched* out,
                                                                     uint64_t most) {
  using Key = std::pair<ptx::u64, unsigned>;
  using Lanes = std::vector<std::vector<ptx::Access>>;
  std::map<Key, std::map<std::pair<ptx::u32, bool>, Lanes>> warps;
  for (const auto& [thread, list] : ptx::accesses) {
    auto& of_warp = warps[{thread.first, thread.second / 32}];
    for (const ptx::Access& a : list) {
      Lanes& lanes = of_warp[{a.line, a.shared}];
      lanes.resize(32);
      lanes[thread.second % 32].push_back(a);
    }
  }
  ptx::accesses.clear();
  std::map<std::pair<ptx::u32, bool>, ptx::Touched> found;
  for (const auto& [warp, lines] : warps) {
    for (const auto& [line, lanes] : lines) {
      ptx::Touched& t = found[line];
      t.line = line.first;
      t.shared = line.second;
      ptx::add_requests(t, lanes);
    }
  }
  uint64_t n = 0;
  for (const auto& [line, t] : found) {
    if (n++ < most) out[n - 1] = t;
  }
  return n;
}
