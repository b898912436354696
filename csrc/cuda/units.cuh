// Units of eight elements, which is what a thread takes at a time of an image or of a row of
// weights: eight elements are one byte of the bit mask that after="relu" leaves for backward.
//
//   kVector: every unit is read and written in 16-byte accesses. In rows layout (see slice.cuh) a
//   slice is then one flat run of elements, and a unit may reach over the end of a channel into the
//   next ones. Otherwise units start anew in each row, the last one of a row is shorter, and
//   elements are read one by one: for odd extents and misaligned tensors.
#pragma once

#include "plan.h"
#include "pointwise.cuh"

namespace senet {
namespace gpu {

constexpr int kUnit = 8;
constexpr int kChain = 64;  // at most so many additions in a row into one accumulator
constexpr int kForwardThreads = 256;
constexpr int kBackwardThreads = 384;  // at most
constexpr uint32_t kWholeWarp = 0xffffffffu;

// Accumulation type for elements of so many bytes.
template <int kBytes>
struct Accumulation {
  using Type = float;
};
template <>
struct Accumulation<8> {
  using Type = double;
};

// ---- units ----

SENET_DEVICE uint32_t low_half(float v, bool half) {
  return half ? to_half(v).bits : to_bf16(v).bits;
}
SENET_DEVICE float from_16(uint32_t bits, bool half) {
  const uint16_t low = static_cast<uint16_t>(bits);
  return half ? to_float(half_t{low}) : to_float(bf16_t{low});
}

// Eight 16-bit elements out of one 16-byte vector, and back.
SENET_DEVICE void unpack16(uint4 raw, bool half, float* v) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  if (half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = to_float(half_t{static_cast<uint16_t>(words[i])});
      v[2 * i + 1] = to_float(half_t{static_cast<uint16_t>(words[i] >> 16)});
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = __uint_as_float(words[i] << 16);
      v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}
SENET_DEVICE uint4 pack16(const float* v, bool half) {
  uint32_t words[4];
  if (half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = to_half(v[2 * i]).bits | (uint32_t(to_half(v[2 * i + 1]).bits) << 16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = to_bf16(v[2 * i]).bits | (uint32_t(to_bf16(v[2 * i + 1]).bits) << 16);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

enum class From { global, stream, shared };  // stream: global memory not read again

template <From kFrom>
SENET_DEVICE uint4 load16_from(const char* p) {
  return kFrom == From::stream ? load16_stream(p) : load16(p);
}

// v[0..count) from p on; count is 8 where kVector. `half` tells fp16 from bf16.
template <int kBytes, bool kVector, From kFrom, class A>
SENET_DEVICE void load_unit(const char* p, int count, bool half, A* v) {
  if constexpr (kVector && kBytes == 2) {
    unpack16(load16_from<kFrom>(p), half, v);
  } else if constexpr (kVector && kBytes == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 raw = load16_from<kFrom>(p + 16 * i);
      v[4 * i] = __uint_as_float(raw.x);
      v[4 * i + 1] = __uint_as_float(raw.y);
      v[4 * i + 2] = __uint_as_float(raw.z);
      v[4 * i + 3] = __uint_as_float(raw.w);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      v[j] = A(0);
      if (j < count) {
        if constexpr (kBytes == 2) {
          v[j] = from_16(reinterpret_cast<const uint16_t*>(p)[j], half);
        } else {
          v[j] = reinterpret_cast<const A*>(p)[j];
        }
      }
    }
  }
}

template <int kBytes, bool kVector, class A>
SENET_DEVICE void store_unit(char* p, int count, bool half, const A* v) {
  if constexpr (kVector && kBytes == 2) {
    store16_stream(p, pack16(v, half));
  } else if constexpr (kVector && kBytes == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store16_stream(p + 16 * i,
                     make_uint4(__float_as_uint(v[4 * i]), __float_as_uint(v[4 * i + 1]),
                                __float_as_uint(v[4 * i + 2]), __float_as_uint(v[4 * i + 3])));
    }
  } else {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      if (j < count) {
        if constexpr (kBytes == 2) {
          reinterpret_cast<uint16_t*>(p)[j] = static_cast<uint16_t>(low_half(v[j], half));
        } else {
          reinterpret_cast<A*>(p)[j] = v[j];
        }
      }
    }
  }
}

// Bits `from` .. `from` + 7 of a row of the mask; those outside of it are 0 or another row's.
SENET_DEVICE uint32_t row_bits(const uint8_t* row, int64_t bytes, int from) {
  const int byte = from >> 3, shift = from & 7;
  uint32_t bits = byte >= 0 && byte < bytes ? row[byte] : 0u;
  if (shift && byte + 1 >= 0 && byte + 1 < bytes) bits |= uint32_t(row[byte + 1]) << 8;
  return bits >> shift;
}

// v[0..8) from an array in shared memory, at a multiple of 16 bytes: as threads read units side by
// side, 32 bytes apart, in whole vectors, since single words would all be in four of the 32 banks.
template <class A>
SENET_DEVICE void load_eight(const A* p, A* v) {
  if constexpr (sizeof(A) == 4) {
    load_unit<4, true, From::shared>(reinterpret_cast<const char*>(p), kUnit, false, v);
  } else {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) v[j] = p[j];
  }
}

template <class A>
SENET_DEVICE A sum8(const A* v) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// ---- parameters, which may be float beside 16-bit images ----

template <class A>
SENET_DEVICE A parameter_at(DType dtype, const void* p, int64_t i) {
  if constexpr (sizeof(A) == 8) {
    return static_cast<const double*>(p)[i];
  } else {
    if (dtype == DType::f32) return static_cast<const float*>(p)[i];
    return from_16(static_cast<const uint16_t*>(p)[i], dtype == DType::f16);
  }
}
template <class A>
SENET_DEVICE A parameter_or(DType dtype, const void* p, int64_t i, A otherwise) {
  return p ? parameter_at<A>(dtype, p, i) : otherwise;
}
SENET_DEVICE int size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : (dtype == DType::f32 ? 4 : 2);
}

// A matrix of parameters, in global or shared memory.
struct Matrix {
  const char* p;
  DType dtype;
  int64_t pitch;  // elements from one row to the next
  bool vector;    // rows consist of whole units, which begin at multiples of 16 bytes
};

// A part of a dense matrix, `pitch` elements wide, that begins at element `first`.
SENET_DEVICE Matrix matrix_at(const void* data, DType dtype, int64_t pitch, int64_t first) {
  const char* p = static_cast<const char*>(data) + first * size_of(dtype);
  const bool vector =
      reinterpret_cast<uintptr_t>(p) % 16 == 0 && pitch % kUnit == 0 && first % kUnit == 0;
  return {p, dtype, pitch, vector};
}

// The first rows and columns of m, copied into shared memory; a row's pitch is whole units.
inline __device__ __noinline__ void copy_weights(Matrix m, int rows, int columns, char* to) {
  const int size = size_of(m.dtype), pitch = (columns + kUnit - 1) / kUnit * kUnit;
  for (int64_t i = threadIdx.x; i < int64_t(rows) * columns; i += blockDim.x) {
    const int64_t r = i / columns, k = i % columns;
    const char* from = m.p + (r * m.pitch + k) * size;
    char* there = to + (r * pitch + k) * size;
    if (size == 2) {
      *reinterpret_cast<uint16_t*>(there) = *reinterpret_cast<const uint16_t*>(from);
    } else if (size == 4) {
      *reinterpret_cast<float*>(there) = *reinterpret_cast<const float*>(from);
    } else {
      *reinterpret_cast<double*>(there) = *reinterpret_cast<const double*>(from);
    }
  }
}
// What was copied there, to be read after a barrier; and how many bytes it takes.
SENET_DEVICE Matrix kept_matrix(const char* p, DType dtype, int columns) {
  return {p, dtype, (columns + kUnit - 1) / kUnit * kUnit, true};
}
SENET_DEVICE int kept_bytes(DType dtype, int rows, int columns) {
  return (rows * ((columns + kUnit - 1) / kUnit * kUnit) * size_of(dtype) + 15) / 16 * 16;
}

// How the elements of a matrix are read: the size of one, and whether in whole vectors.
template <int kSize, bool kWhole>
struct Reader {
  // w[0..count) from row r, columns k to k + count of it; what is beyond is without meaning.
  template <class A>
  SENET_DEVICE void operator()(const Matrix& m, int64_t r, int k, int count, A* w) const {
    const char* p = m.p + (r * m.pitch + k) * kSize;
    load_unit<kSize, kWhole, From::global>(p, count, m.dtype == DType::f16, w);
  }
};

// Calls f(reader) with the one for m: once for a whole product, so that in its loops nothing stands
// between one load and the next.
template <class A, class F>
SENET_DEVICE void with_reader(const Matrix& m, F f) {
  if constexpr (sizeof(A) == 8) {
    f(Reader<8, false>{});
  } else if (m.dtype == DType::f32) {
    m.vector ? f(Reader<4, true>{}) : f(Reader<4, false>{});
  } else {
    m.vector ? f(Reader<2, true>{}) : f(Reader<2, false>{});
  }
}

}  // namespace gpu
}  // namespace senet
