// The excitation: matrix times a few vectors, its transpose, and sums of outer products.
//
// Parameters may be stored in float, bf16, f16 or double; arithmetic is in the accumulation type.
// Each function takes `images` vectors at once, so that a weight is read once for all of them.
#pragma once

#include "runs.h"

namespace senet {
namespace SENET_ISA {
namespace {

// Calls body(p) with p of the parameters' storage type; A is the accumulation type.
template <class A, class Body>
SENET_INLINE void with_storage(DType dtype, const void* p, Body body) {
  if constexpr (sizeof(A) == 8) {
    body(static_cast<const double*>(p));
  } else {
    switch (dtype) {
      case DType::f32:
        return body(static_cast<const float*>(p));
      case DType::bf16:
        return body(static_cast<const bf16*>(p));
      default:
        return body(static_cast<const f16*>(p));
    }
  }
}

// Calls body with a value of the parameters' storage type.
template <class T, class Body>
void with_gradient_storage(DType parameters, Body body) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    body(T{});
  } else {
    parameters == DType::f32 ? body(float{}) : body(T{});
  }
}

template <class A>
SENET_OUTLINE A parameter_at(DType dtype, const void* p, int64_t i) {
  A out{};
  with_storage<A>(dtype, p, [&](auto* typed) { out = to_acc(typed[i]); });
  return out;
}

// Calls body(some, g) for images g, g + 1, ..., of which it takes `some` (a constant) at once:
// kMost of them, then two, then one.
template <int kMost, class Body>
SENET_INLINE void for_images(int64_t images, Body body) {
  int64_t g = 0;
  for (; g + kMost <= images; g += kMost) body(std::integral_constant<int, kMost>{}, g);
  if constexpr (kMost > 2) {
    if (g + 2 <= images) body(std::integral_constant<int, 2>{}, g), g += 2;
  }
  if (g < images) body(std::integral_constant<int, 1>{}, g);
}

// Up to four rows of w times kImages vectors; sums[g][j] is row j times vector g.
template <class A, int kImages, class W, int kRows>
SENET_INLINE void few_rows(const W* const (&w)[kRows], int64_t k, const A* in, int64_t in_stride,
                           A (*sums)[4]) {
  Vec<A> s[kImages][4] = {};
  for_vectors<A>(k, [&](int64_t i, auto lanes) SENET_LAMBDA {
    Vec<A> x[kImages];
    for (int g = 0; g < kImages; ++g) x[g] = get(in + g * in_stride + i, lanes);
    for (int j = 0; j < kRows; ++j) {
      const Vec<A> v = get(w[j] + i, lanes);
      for (int g = 0; g < kImages; ++g) s[g][j] += v * x[g];
    }
  });
  for (int g = 0; g < kImages; ++g) sum4(s[g][0], s[g][1], s[g][2], s[g][3], sums[g]);
}

// As many rows of w as a vector has lanes, each lane a row, times kImages vectors: for short rows,
// where adding up lanes at the end would be most of the work. `row(i)` is the address of row i.
template <class A, int kImages, class Row>
SENET_INLINE void rows_in_lanes(Row row, int64_t k, const A* in, int64_t in_stride,
                                Vec<A> (&sums)[kImages]) {
  constexpr int L = kLanes<A>;
  for_vectors<A>(k, [&](int64_t i, auto lanes) SENET_LAMBDA {
    Vec<A> v[L];
    for (int j = 0; j < L; ++j) v[j] = get(row(j) + i, lanes);
    transpose<A>(v);
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) {
      if (j >= count<A>(lanes)) break;
      for (int g = 0; g < kImages; ++g) sums[g] += v[j] * in[g * in_stride + i + j];
    }
  });
}

// linear() below, for rows of a few vectors.
template <class A, class W>
SENET_INLINE void linear_short(const W* w, const W* bias, int64_t r0, int64_t r1, int64_t k,
                               const A* in, int64_t in_stride, A* out, int64_t out_stride,
                               int64_t images) {
  for_vectors<A>(r1 - r0, [&](int64_t i, auto lanes) SENET_LAMBDA {
    const int64_t r = r0 + i, last = r + count<A>(lanes) - 1;
    const auto row = [&](int j) SENET_LAMBDA { return w + std::min(r + j, last) * k; };
    const Vec<A> b = bias ? get(bias + r, lanes) : Vec<A>{};
    for_images<4>(images, [&](auto some, int64_t g) SENET_LAMBDA {
      Vec<A> sums[some] = {};
      rows_in_lanes<A, some>(row, k, in + g * in_stride, in_stride, sums);
      for (int j = 0; j < some; ++j) put(out + (g + j) * out_stride + r, sums[j] + b, lanes);
    });
  });
}

// linear() below, for rows of many vectors.
template <class A, int kRows, int kImages, class W>
SENET_INLINE void linear_long(const W* w, const W* bias, int64_t r0, int64_t r1, int64_t k,
                              const A* in, int64_t in_stride, A* out, int64_t out_stride,
                              int64_t images) {
  for (int64_t r = r0; r < r1; r += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(r1 - r, kRows));
    const W* row[kRows];
    A biases[kRows] = {};
    for (int j = 0; j < kRows; ++j) row[j] = w + std::min(r + j, r1 - 1) * k;
    for (int j = 0; bias && j < rows; ++j) biases[j] = to_acc(bias[r + j]);
    for_images<kImages>(images, [&](auto some, int64_t g) SENET_LAMBDA {
      A sums[some][4];
      few_rows<A, some>(row, k, in + g * in_stride, in_stride, sums);
      for (int i = 0; i < some; ++i) {
        for (int j = 0; j < rows; ++j) out[(g + i) * out_stride + r + j] = sums[i][j] + biases[j];
      }
    });
  }
}

// out[g][r] = bias[r] + sum over k of w[r][k] in[g][k], for rows r0 <= r < r1.
template <class A>
SENET_OUTLINE void linear(DType dtype, const void* weight, const void* bias, int64_t r0, int64_t r1,
                          int64_t k, const A* in, int64_t in_stride, A* out, int64_t out_stride,
                          int64_t images) {
  with_storage<A>(dtype, weight, [&](auto* w) {
    auto* b = static_cast<decltype(w)>(bias);
    // As many accumulators as there are registers for. How many images there are changes the order
    // of no sum: an image has the same bits in any batch.
    constexpr bool kWide = SENET_VECTOR_BYTES == 64;
    if (k <= (kWide ? 3 : 6) * kLanes<A>) {
      linear_short<A>(w, b, r0, r1, k, in, in_stride, out, out_stride, images);
    } else if constexpr (kWide) {
      linear_long<A, 4, 4>(w, b, r0, r1, k, in, in_stride, out, out_stride, images);
    } else if (images < 4) {
      linear_long<A, 4, 2>(w, b, r0, r1, k, in, in_stride, out, out_stride, images);
    } else {
      linear_long<A, 3, 4>(w, b, r0, r1, k, in, in_stride, out, out_stride, images);
    }
  });
}

// A few vectors of columns of w times kImages vectors from the left.
template <class A, int kVectors, int kImages, class W, class Lanes>
SENET_INLINE void columns(const W* w, int64_t rows, int64_t k, const A* in, int64_t in_stride,
                          A* out, int64_t out_stride, Lanes lanes) {
  constexpr int L = kLanes<A>;
  Vec<A> total[kImages][kVectors] = {};
  for (int64_t r0 = 0; r0 < rows; r0 += kChain) {
    const int64_t r1 = r0 + kChain < rows ? r0 + kChain : rows;
    Vec<A> s[kImages][kVectors] = {};
    for (int64_t r = r0; r < r1; ++r) {
      Vec<A> row[kVectors];
      for (int v = 0; v < kVectors; ++v) row[v] = get(w + r * k + v * L, lanes);
      for (int g = 0; g < kImages; ++g) {
        const A left = in[g * in_stride + r];
        for (int v = 0; v < kVectors; ++v) s[g][v] += row[v] * left;
      }
    }
    for (int g = 0; g < kImages; ++g) {
      for (int v = 0; v < kVectors; ++v) total[g][v] += s[g][v];
    }
  }
  for (int g = 0; g < kImages; ++g) {
    for (int v = 0; v < kVectors; ++v) put(out + g * out_stride + v * L, total[g][v], lanes);
  }
}

// linear_transposed() below, kVectors by kImages at a time.
template <class A, int kVectors, int kImages, class W>
SENET_INLINE void columns_of_images(const W* w, int64_t rows, int64_t k, int64_t k0, int64_t k1,
                                    const A* in, int64_t in_stride, A* out, int64_t out_stride,
                                    int64_t images) {
  constexpr int L = kLanes<A>;
  const auto all_images = [&](auto vectors, int64_t c, auto lanes) SENET_LAMBDA {
    for_images<kImages>(images, [&](auto some, int64_t g) SENET_LAMBDA {
      columns<A, vectors, some>(w + c, rows, k, in + g * in_stride, in_stride,
                                out + g * out_stride + c, out_stride, lanes);
    });
  };
  constexpr std::integral_constant<int, kVectors> few;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 1> one;
  int64_t c = k0;
  for (; c + kVectors * L <= k1; c += kVectors * L) all_images(few, c, Full{});
  if (kVectors > 2 && c + 2 * L <= k1) all_images(two, c, Full{}), c += 2 * L;
  if (c + L <= k1) all_images(one, c, Full{}), c += L;
  if (c < k1) all_images(one, c, static_cast<int>(k1 - c));
}

// out[g][k] = sum over rows r of w[r][k] in[g][r], for columns k0 <= k < k1 of w[rows][k].
template <class A>
SENET_OUTLINE void linear_transposed(DType dtype, const void* weight, int64_t rows, int64_t k,
                                     int64_t k0, int64_t k1, const A* in, int64_t in_stride, A* out,
                                     int64_t out_stride, int64_t images) {
  with_storage<A>(dtype, weight, [&](auto* w) {
    // As many accumulators as there are registers for.
    if constexpr (SENET_VECTOR_BYTES == 64) {
      columns_of_images<A, 2, 4>(w, rows, k, k0, k1, in, in_stride, out, out_stride, images);
    } else if (images < 4) {
      columns_of_images<A, 4, 2>(w, rows, k, k0, k1, in, in_stride, out, out_stride, images);
    } else {
      columns_of_images<A, 3, 4>(w, rows, k, k0, k1, in, in_stride, out, out_stride, images);
    }
  });
}

// kRows rows of dw, and a few vectors of their columns; see outer_products.
template <int kRows, int kVectors, class T, class Lanes>
SENET_INLINE void outer_block(T* dw, int64_t k, const Acc<T>* left, int64_t left_stride,
                              const Acc<T>* right, int64_t right_stride, int64_t images,
                              Lanes lanes) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> total[kRows][kVectors] = {};
  for (int64_t g0 = 0; g0 < images; g0 += kChain) {
    const int64_t g1 = g0 + kChain < images ? g0 + kChain : images;
    Vec<A> s[kRows][kVectors] = {};
    for (int64_t g = g0; g < g1; ++g) {
      Vec<A> of_image[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        of_image[v] = get(right + g * right_stride + v * L, lanes);
      }
      for (int j = 0; j < kRows; ++j) {
        const A by = left[g * left_stride + j];
        for (int v = 0; v < kVectors; ++v) s[j][v] += by * of_image[v];
      }
    }
    for (int j = 0; j < kRows; ++j) {
      for (int v = 0; v < kVectors; ++v) total[j][v] += s[j][v];
    }
  }
  for (int j = 0; j < kRows; ++j) {
    for (int v = 0; v < kVectors; ++v) put(dw + j * k + v * L, total[j][v], lanes);
  }
}

// dw[r][k] = sum over images of left[g][r] right[g][k], rows r0 <= r < r1; stored as T.
template <class T>
SENET_OUTLINE void outer_products(T* dw, int64_t r0, int64_t r1, int64_t k, const Acc<T>* left,
                                  int64_t left_stride, const Acc<T>* right, int64_t right_stride,
                                  int64_t images) {
  constexpr int L = kLanes<Acc<T>>;
  const auto all_columns = [&](auto rows, int64_t r) SENET_LAMBDA {
    const auto block = [&](auto vectors, int64_t c, auto lanes) SENET_LAMBDA {
      outer_block<rows, vectors>(dw + r * k + c, k, left + r, left_stride, right + c, right_stride,
                                 images, lanes);
    };
    constexpr std::integral_constant<int, 3> three;
    constexpr std::integral_constant<int, 1> one;
    int64_t c = 0;
    // Of few images writing dw is most of it.
    for (; images >= 16 && c + 3 * L <= k; c += 3 * L) block(three, c, Full{});
    for (; c + L <= k; c += L) block(one, c, Full{});
    if (c < k) block(one, c, static_cast<int>(k - c));
  };
  int64_t r = r0;
  for (; r + 4 <= r1; r += 4) all_columns(std::integral_constant<int, 4>{}, r);
  for (; r < r1; ++r) all_columns(std::integral_constant<int, 1>{}, r);
}

// out[i] = sum over images of a[g][i], or of a[g][i] b[g][i]; stored as T.
template <class T>
SENET_OUTLINE void sum_images(T* out, int64_t n, const Acc<T>* a, const Acc<T>* b, int64_t stride,
                              int64_t images) {
  using A = Acc<T>;
  for_vectors<A>(n, [&](int64_t i, auto lanes) {
    Vec<A> total{};
    for (int64_t g0 = 0; g0 < images; g0 += kChain) {
      const int64_t g1 = g0 + kChain < images ? g0 + kChain : images;
      Vec<A> s{};
      for (int64_t g = g0; g < g1; ++g) {
        const Vec<A> v = get(a + g * stride + i, lanes);
        s += b ? v * get(b + g * stride + i, lanes) : v;
      }
      total += s;
    }
    put(out + i, total, lanes);
  });
}

}  // namespace
}  // namespace SENET_ISA
}  // namespace senet
