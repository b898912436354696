// Memory, warps, blocks and clusters, for translated PTX, over the scheduler of tests/simt.
#pragma once

#include <string>
#include <utility>

#include "conversions.h"

namespace ptx {

using simt::Where;

inline simt::Block& block() { return *simt::current->block; }

// ---- special registers ----

inline u32 cluster_size() { return simt::launch_of_current().cluster; }
// The driver's memory for barriers of the whole grid, which two registers point to.
inline u64 grid_workspace() { return reinterpret_cast<u64>(simt::grid_workspace()); }

// ---- addresses ----
//
// A generic address is the host's. A shared one is 24 bits into the window of a block: of the
// thread's own if the upper byte is 0, otherwise of the block with the rank before that.

inline char* at_generic(u64 address, size_t, Where = Where::current()) {
  return reinterpret_cast<char*>(address);
}
inline char* at_shared(u64 address, size_t bytes, Where where = Where::current()) {
  const u32 window = static_cast<u32>(address) >> 24, offset = static_cast<u32>(address) & 0xffffff;
  simt::Block* of = &block();
  if (offset + bytes > of->shared_bytes) {
    simt::fail("bytes " + std::to_string(offset) + " to " + std::to_string(offset + bytes) +
                   " of " + std::to_string(of->shared_bytes) + " of shared memory",
               where);
  }
  char* const own = of->shared + offset;
  return window ? static_cast<char*>(simt::in_peer(own, window - 1, where)) : own;
}
inline u64 generic_of_shared(u64 address, Where where = Where::current()) {
  return reinterpret_cast<u64>(at_shared(address, 0, where));
}
inline u64 shared_of_generic(u64 address, Where where = Where::current()) {
  const char* const at = reinterpret_cast<const char*>(address);
  const simt::Block& b = block();
  if (at < b.shared || at > b.shared + b.shared_bytes) {
    simt::fail("an address outside the block's shared memory taken as one in it", where);
  }
  return static_cast<u64>(at - b.shared);
}
inline u64 peers_generic(u64 address, u32 rank, Where where = Where::current()) {
  return reinterpret_cast<u64>(simt::in_peer(reinterpret_cast<void*>(address), rank, where));
}
inline u32 peers_shared(u32 address, u32 rank) { return (rank + 1) << 24 | (address & 0xffffff); }

// ---- loads and stores ----

// Told of every access, where somebody wants to know: see counts.h.
inline void (*watch)(const char* at, size_t bytes, const Where& where) = nullptr;

inline void check_alignment(const char* at, size_t bytes, const Where& where) {
  if (watch) watch(at, bytes, where);
  if (reinterpret_cast<u64>(at) % bytes) {
    simt::fail("an access of " + std::to_string(bytes) + " bytes to an address that is no multiple",
               where);
  }
}
template <class T, size_t kCount>
std::array<T, kCount> load(const char* from, Where where = Where::current()) {
  constexpr size_t kBytes = kCount * sizeof(T);
  check_alignment(from, kBytes, where);
  if (kBytes == 16) simt::accessed(simt::Access::read, from, 16);
  std::array<T, kCount> values;
  std::memcpy(values.data(), from, kBytes);
  return values;
}
template <class T, size_t kCount>
void store(char* to, const std::array<T, kCount>& values, Where where = Where::current()) {
  constexpr size_t kBytes = kCount * sizeof(T);
  check_alignment(to, kBytes, where);
  if (kBytes == 16) simt::accessed(simt::Access::write, to, 16);
  std::memcpy(to, values.data(), kBytes);
}
// A store that others may wait for: volatile, relaxed or release.
template <class T, size_t kCount>
void publish(char* to, const std::array<T, kCount>& values, Where where = Where::current()) {
  simt::yield();
  store(to, values, where);
  simt::written(to);
}
// A load that may be one of a loop: volatile, relaxed or acquire. The second time in a row that a
// thread finds the same, it waits for somebody to write there.
template <class T>
std::array<T, 1> poll(const char* from, Where where = Where::current()) {
  static_assert(std::is_integral_v<T>);
  check_alignment(from, sizeof(T), where);
  simt::yield();
  const auto read = [&] { return *reinterpret_cast<const volatile T*>(from); };
  simt::Fiber& me = *simt::current;
  T value = read();
  if (me.polled == from && me.found == static_cast<u64>(value)) {
    simt::wait_for_write(from, where);
    value = read();
  }
  me.polled = from;
  me.found = static_cast<u64>(value);
  return {value};
}
// With `polls` it may be one of a loop that waits: having found the same value at the same address
// before, it waits for a write.
template <class T, class F>
T atomic(char* at, F change, bool polls, Where where = Where::current()) {
  check_alignment(at, sizeof(T), where);
  simt::yield();
  T before;
  u64 found = 0;
  const auto look = [&] {
    std::memcpy(&before, at, sizeof(T));
    std::memcpy(&found, at, sizeof(T));
  };
  look();
  simt::Fiber& me = *simt::current;
  if (polls && me.polled == at && me.found == found) {
    simt::wait_for_write(at, where);
    look();
  }
  me.polled = polls ? at : nullptr;
  me.found = found;
  const T after = change(before);
  if (!std::memcmp(&after, &before, sizeof(T))) return before;
  std::memcpy(at, &after, sizeof(T));
  simt::written(at);
  return before;
}
// How an atomic operation changes the value; of inc and dec, and cas, see the manual.
#define PTX_CHANGE(name, after, polls)                                         \
  template <class T>                                                           \
  T atomic_##name(char* at, T operand, Where where = Where::current()) {       \
    const auto change = [&]([[maybe_unused]] T before) -> T { return after; }; \
    return atomic<T>(at, change, polls, where);                                \
  }
template <class T>
T sum_of(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    return fadd<rn>(a, b);
  } else {
    return add(a, b);
  }
}
PTX_CHANGE(add, sum_of(before, operand), operand == T(0))
PTX_CHANGE(exch, operand, false)
PTX_CHANGE(min, std::min(before, operand), false)
PTX_CHANGE(max, std::max(before, operand), false)
PTX_CHANGE(and, before& operand, false)
PTX_CHANGE(or, before | operand, operand == T(0))
PTX_CHANGE(xor, before ^ operand, operand == T(0))
PTX_CHANGE(inc, before >= operand ? 0 : before + 1, false)
PTX_CHANGE(dec, before == 0 || before > operand ? operand : before - 1, false)
#undef PTX_CHANGE
template <class T>
T atomic_cas(char* at, T expected, T operand, Where where = Where::current()) {
  const auto change = [&](T before) { return before == expected ? operand : before; };
  return atomic<T>(at, change, true, where);
}
inline void prefetch(u64 address) {
  simt::accessed(simt::Access::prefetch, reinterpret_cast<const char*>(address), 32);
}

// ---- asynchronous copies ----

// The first `size` of so many bytes; what is left is zero.
inline void copy_async(char* to, const char* from, u32 bytes, u32 size,
                       Where where = Where::current()) {
  if (size == 16) simt::accessed(simt::Access::read, from, 16);
  simt::async_copy(to, from, bytes, where, size);
}
inline void copy_async(char* to, const char* from, u32 bytes, Where where = Where::current()) {
  copy_async(to, from, bytes, bytes, where);
}
inline void copy_bulk(char* to, const char* from, u32 bytes, char* barrier,
                      Where where = Where::current()) {
  simt::accessed(simt::Access::read, from, bytes);
  simt::bulk_load(to, from, bytes, reinterpret_cast<u64*>(barrier), where);
}
template <class T, size_t kCount>
void store_async(char* to, const std::array<T, kCount>& values, char* barrier,
                 Where where = Where::current()) {
  check_alignment(to, sizeof values, where);
  simt::async_store(to, values.data(), sizeof values, reinterpret_cast<u64*>(barrier), where);
}

// ---- mbarriers ----

inline void mbarrier_init(char* at, u32 count, Where where = Where::current()) {
  simt::mbarrier_init(reinterpret_cast<u64*>(at), count, where);
}
// The phase that is under way: what `arrive` returns.
inline u64 mbarrier_arrive(char* at, u32 count, u32 bytes, Where where = Where::current()) {
  u64* const barrier = reinterpret_cast<u64*>(at);
  const u64 phase = simt::mbarrier_phase(barrier, where);
  for (u32 i = 0; i < count; ++i) simt::mbarrier_arrive(barrier, i ? 0 : bytes, where);
  return phase;
}
inline bool mbarrier_test(char* at, u64 phase, Where where = Where::current()) {
  simt::yield();
  return (simt::mbarrier_phase(reinterpret_cast<u64*>(at), where) & 1) != (phase & 1);
}
// May give up after a while: here now and then at once.
inline bool mbarrier_try(char* at, u64 phase, Where where = Where::current()) {
  if (++simt::current->tries % 4 == 0) return mbarrier_test(at, phase, where);
  simt::mbarrier_wait(reinterpret_cast<u64*>(at), static_cast<u32>(phase & 1), where);
  return true;
}

// ---- what a warp does together ----

inline void warp_sync(u32 mask, Where where = Where::current()) {
  simt::together(simt::kSync, mask, 0, 0, "bar.warp.sync", where);
}
inline u32 vote_ballot(bool p, u32 mask, Where where = Where::current()) {
  return static_cast<u32>(simt::together(simt::kBallot, mask, p, 0, "vote.sync.ballot", where));
}
inline bool vote_any(bool p, u32 mask, Where where = Where::current()) {
  return simt::together(simt::kAny, mask, p, 0, "vote.sync.any", where) != 0;
}
inline bool vote_all(bool p, u32 mask, Where where = Where::current()) {
  return simt::together(simt::kAll, mask, p, 0, "vote.sync.all", where) != 0;
}

// What a function that takes a lane's number and its value finds in the lanes of a mask, in order.
template <class T, class F>
void for_lanes(T value, u32 mask, const char* what, const Where& where, F f) {
  for (u32 left = mask; left; left &= left - 1) {
    const u32 lane = static_cast<u32>(std::countr_zero(left));
    f(lane, static_cast<T>(simt::together(simt::kShuffle, mask, value, lane, what, where)));
  }
}
#define PTX_REDUX(name, after)                                                          \
  template <class T>                                                                    \
  T redux_##name(T value, u32 mask, Where where = Where::current()) {                   \
    T total = 0;                                                                        \
    bool first = true;                                                                  \
    for_lanes(static_cast<u32>(value), mask, "redux.sync", where, [&](u32, u32 found) { \
      const T next = static_cast<T>(found);                                             \
      total = first ? next : static_cast<T>(after);                                     \
      first = false;                                                                    \
    });                                                                                 \
    return total;                                                                       \
  }
PTX_REDUX(add, add(total, next))
PTX_REDUX(min, std::min(total, next))
PTX_REDUX(max, std::max(total, next))
PTX_REDUX(and, total& next)
PTX_REDUX(or, total | next)
PTX_REDUX(xor, total ^ next)
#undef PTX_REDUX
// The lanes that have the same value.
template <class T>
u32 match_any(T value, u32 mask, Where where = Where::current()) {
  u32 same = 0;
  for_lanes(value, mask, "match.any.sync", where,
            [&](u32 lane, T found) { same |= u32{found == value} << lane; });
  return same;
}
// The mask, and whether all of it have the same value; otherwise no lanes.
template <class T>
Pair<u32, bool> match_all(T value, u32 mask, Where where = Where::current()) {
  const bool all = match_any(value, mask, where) == mask;
  const bool each = vote_all(all, mask, where);
  return {each ? mask : 0, each};
}
// A lane of the mask, and whether it is this one. Which one is the device's affair; the highest
// here, since code that wrongly expects the lowest shall fail.
inline Pair<u32, bool> elect(u32 mask, Where where = Where::current()) {
  const u32 leader = 31 - static_cast<u32>(std::countl_zero(mask));
  simt::together(simt::kSync, mask, 0, 0, "elect.sync", where);
  return {leader, simt::current->lane == leader};
}

enum Shuffle { idx, up, down, bfly };
// `c` has the last lane of a segment in its lower bits, and above them which bits of a lane's
// number its segment has. A lane whose source is outside its segment gets its own value.
template <Shuffle kHow>
Pair<u32, bool> shuffle(u32 value, u32 b, u32 c, u32 mask, Where where = Where::current()) {
  const u32 lane = simt::current->lane, segment = c >> 8 & 31, clamp = c & 31;
  const u32 first = lane & segment, last = first | (clamp & ~segment);
  b &= 31;
  u32 source = 0;
  bool inside = true;
  switch (kHow) {
    case idx:
      source = first | (b & ~segment);
      inside = source <= last;
      break;
    case up:
      source = lane - b;
      inside = static_cast<s32>(source) >= static_cast<s32>(last);
      break;
    case down:
      source = lane + b;
      inside = source <= last;
      break;
    case bfly:
      source = lane ^ b;
      inside = source <= last;
      break;
  }
  if (!inside) source = lane;
  const u64 got = simt::together(simt::kShuffle, mask, value, source, "shfl.sync", where);
  return {static_cast<u32>(got), inside};
}

}  // namespace ptx
