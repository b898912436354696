// Matrices that a warp holds together: 8x8 loads, and products.
#pragma once

#include "threads.h"

namespace ptx {

inline u32 from_lane(u32 value, u32 lane, const char* what, const Where& where) {
  return static_cast<u32>(simt::together(simt::kShuffle, ~0u, value, lane, what, where));
}

// Matrices of 8x8 halves. Lanes 8 i to 8 i + 7 have the addresses of the i-th one's rows; a lane
// gets two neighbours of row lane / 4, or, transposed, of column lane / 4.
template <size_t kCount, bool kTransposed>
std::array<u32, kCount> ldmatrix(u32 address, Where where = Where::current()) {
  const u32 lane = simt::current->lane, across = lane / 4, along = 2 * (lane % 4);
  const auto half = [&](u32 row, u32 column) {
    const char* const at = at_shared(row, 16, where);
    check_alignment(at, 16, where);
    u16 value;
    std::memcpy(&value, at + 2 * column, 2);
    return value;
  };
  std::array<u32, kCount> result{};
  for (u32 i = 0; i < kCount; ++i) {
    for (u32 k = 0; k < 2; ++k) {
      const u32 row = kTransposed ? along + k : across, column = kTransposed ? across : along + k;
      const u32 at = from_lane(address, 8 * i + row, "ldmatrix", where);
      result[i] |= u32{half(at, column)} << (16 * k);
    }
  }
  warp_sync(~0u, where);
  return result;
}

// The reverse: a lane stores what ldmatrix would give it.
template <size_t kCount, bool kTransposed>
void stmatrix(u32 address, const std::array<u32, kCount>& values, Where where = Where::current()) {
  const u32 lane = simt::current->lane, across = lane / 4, along = 2 * (lane % 4);
  for (u32 i = 0; i < kCount; ++i) {
    for (u32 k = 0; k < 2; ++k) {
      const u32 row = kTransposed ? along + k : across, column = kTransposed ? across : along + k;
      char* const at = at_shared(from_lane(address, 8 * i + row, "stmatrix", where), 16, where);
      check_alignment(at, 16, where);
      const u16 value = static_cast<u16>(values[i] >> (16 * k));
      std::memcpy(at + 2 * column, &value, 2);
    }
  }
  warp_sync(~0u, where);
}

// The elements of a 32-bit register.
struct tf32 {};
inline f64 element(f16, u32 bits, u32 i) { return widened(f16{static_cast<u16>(bits >> 16 * i)}); }
inline f64 element(bf16, u32 bits, u32 i) {
  return widened(bf16{static_cast<u16>(bits >> 16 * i)});
}
inline f64 element(tf32, u32 bits, u32) { return std::bit_cast<f32>(bits & ~0x1fffu); }

// C + A B of 16 rows and 8 columns. Lane 4 g + t has of C rows g and g + 8, columns 2 t and 2 t +
// 1; of A, in those rows, and of B, in column g, what four such lanes need of k in each register.
//
// Products are exact here and their sum is rounded once. On a device order and precision are its
// own affair: this is one of the results that are allowed.
template <class T, size_t kA, size_t kB>
std::array<f32, 4> mma(const std::array<u32, kA>& a, const std::array<u32, kB>& b,
                       const std::array<f32, 4>& c, Where where = Where::current()) {
  static_assert(kA == 2 * kB);
  constexpr u32 kElements = std::is_same_v<T, tf32> ? 1 : 2;
  const u32 lane = simt::current->lane, g = lane / 4, t = lane % 4;
  f64 sums[4] = {c[0], c[1], c[2], c[3]};
  for (u32 step = 0; step < kB; ++step) {
    for (u32 i = 0; i < 4; ++i) {
      u32 rows[2], columns[2];
      for (u32 j = 0; j < 2; ++j) {
        rows[j] = from_lane(a[2 * step + j], 4 * g + i, "mma", where);
        columns[j] = from_lane(b[step], 4 * (2 * t + j) + i, "mma", where);
      }
      for (u32 e = 0; e < kElements; ++e) {
        for (u32 j = 0; j < 4; ++j) {
          sums[j] += element(T{}, rows[j / 2], e) * element(T{}, columns[j % 2], e);
        }
      }
    }
  }
  std::array<f32, 4> result;
  for (u32 j = 0; j < 4; ++j) result[j] = canonical(static_cast<f32>(sums[j]));
  return result;
}

}  // namespace ptx
