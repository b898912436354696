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

// Four rows of w times kImages vectors; sums[g][j] is row j times vector g.
template <class A, int kImages, class W>
SENET_INLINE void four_rows(const W* w0, const W* w1, const W* w2, const W* w3, int64_t k,
                            const A* in, int64_t in_stride, A (*sums)[4]) {
  Vec<A> s[kImages][4] = {};
  for_vectors<A>(k, [&](int64_t i, auto lanes) SENET_LAMBDA {
    const Vec<A> v0 = get(w0 + i, lanes), v1 = get(w1 + i, lanes);
    const Vec<A> v2 = get(w2 + i, lanes), v3 = get(w3 + i, lanes);
    for (int g = 0; g < kImages; ++g) {
      const Vec<A> x = get(in + g * in_stride + i, lanes);
      s[g][0] += v0 * x;
      s[g][1] += v1 * x;
      s[g][2] += v2 * x;
      s[g][3] += v3 * x;
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
  constexpr int kImages = 4;
  for_vectors<A>(r1 - r0, [&](int64_t i, auto lanes) SENET_LAMBDA {
    const int64_t r = r0 + i, last = r + count<A>(lanes) - 1;
    const auto row = [&](int j) SENET_LAMBDA { return w + std::min(r + j, last) * k; };
    const Vec<A> b = bias ? get(bias + r, lanes) : Vec<A>{};
    int64_t g = 0;
    for (; g + kImages <= images; g += kImages) {
      Vec<A> sums[kImages] = {};
      rows_in_lanes<A, kImages>(row, k, in + g * in_stride, in_stride, sums);
      for (int j = 0; j < kImages; ++j) put(out + (g + j) * out_stride + r, sums[j] + b, lanes);
    }
    for (; g < images; ++g) {
      Vec<A> sums[1] = {};
      rows_in_lanes<A, 1>(row, k, in + g * in_stride, in_stride, sums);
      put(out + g * out_stride + r, sums[0] + b, lanes);
    }
  });
}

// out[g][r] = bias[r] + sum over k of w[r][k] in[g][k], for rows r0 <= r < r1.
template <class A>
SENET_OUTLINE void linear(DType dtype, const void* weight, const void* bias, int64_t r0, int64_t r1,
                          int64_t k, const A* in, int64_t in_stride, A* out, int64_t out_stride,
                          int64_t images) {
  // As many accumulators as there are registers for.
  constexpr int kImages = SENET_VECTOR_BYTES == 64 ? 4 : 2;
  with_storage<A>(dtype, weight, [&](auto* w) {
    auto* b = static_cast<decltype(w)>(bias);
    if (k <= 3 * kLanes<A>) {
      return linear_short<A>(w, b, r0, r1, k, in, in_stride, out, out_stride, images);
    }
    for (int64_t r = r0; r < r1; r += 4) {
      const int rows = static_cast<int>(r1 - r < 4 ? r1 - r : 4);
      auto* w0 = w + r * k;
      auto* w1 = w + (rows > 1 ? r + 1 : r) * k;
      auto* w2 = w + (rows > 2 ? r + 2 : r) * k;
      auto* w3 = w + (rows > 3 ? r + 3 : r) * k;
      A biases[4] = {};
      for (int j = 0; b && j < rows; ++j) biases[j] = to_acc(b[r + j]);
      for (int64_t g = 0; g < images;) {
        A sums[kImages][4];
        int done = 1;
        if (images - g >= kImages) {
          done = kImages;
          four_rows<A, kImages>(w0, w1, w2, w3, k, in + g * in_stride, in_stride, sums);
        } else {
          four_rows<A, 1>(w0, w1, w2, w3, k, in + g * in_stride, in_stride, sums);
        }
        for (int i = 0; i < done; ++i, ++g) {
          for (int j = 0; j < rows; ++j) out[g * out_stride + r + j] = sums[i][j] + biases[j];
        }
      }
    }
  });
}

// One or two vectors of columns of w, from column c, times kImages vectors from the left.
template <class A, int kImages, class W, class Lanes0, class Lanes1>
SENET_INLINE void columns(const W* w, int64_t rows, int64_t k, const A* in, int64_t in_stride,
                          A* out, int64_t out_stride, Lanes0 lanes0, Lanes1 lanes1) {
  constexpr bool kTwo = !std::is_same_v<Lanes1, None>;
  constexpr int L = kLanes<A>;
  Vec<A> t0[kImages] = {}, t1[kImages] = {};
  for (int64_t r0 = 0; r0 < rows; r0 += kChain) {
    const int64_t r1 = r0 + kChain < rows ? r0 + kChain : rows;
    Vec<A> s0[kImages] = {}, s1[kImages] = {};
    for (int64_t r = r0; r < r1; ++r) {
      const Vec<A> w0 = get(w + r * k, lanes0);
      Vec<A> w1{};
      if constexpr (kTwo) w1 = get(w + r * k + L, lanes1);
      for (int g = 0; g < kImages; ++g) {
        const A v = in[g * in_stride + r];
        s0[g] += w0 * v;
        if constexpr (kTwo) s1[g] += w1 * v;
      }
    }
    for (int g = 0; g < kImages; ++g) {
      t0[g] += s0[g];
      t1[g] += s1[g];
    }
  }
  for (int g = 0; g < kImages; ++g) {
    put(out + g * out_stride, t0[g], lanes0);
    if constexpr (kTwo) put(out + g * out_stride + L, t1[g], lanes1);
  }
}

// out[g][k] = sum over rows r of w[r][k] in[g][r], for columns k0 <= k < k1 of w[rows][k].
template <class A>
SENET_OUTLINE void linear_transposed(DType dtype, const void* weight, int64_t rows, int64_t k,
                                     int64_t k0, int64_t k1, const A* in, int64_t in_stride, A* out,
                                     int64_t out_stride, int64_t images) {
  constexpr int L = kLanes<A>;
  constexpr int kImages = SENET_VECTOR_BYTES == 64 ? 4 : 2;
  with_storage<A>(dtype, weight, [&](auto* w) {
    const auto all_images = [&](int64_t c, auto lanes0, auto lanes1) SENET_LAMBDA {
      int64_t g = 0;
      for (; g + kImages <= images; g += kImages) {
        columns<A, kImages>(w + c, rows, k, in + g * in_stride, in_stride, out + g * out_stride + c,
                            out_stride, lanes0, lanes1);
      }
      for (; g < images; ++g) {
        columns<A, 1>(w + c, rows, k, in + g * in_stride, in_stride, out + g * out_stride + c,
                      out_stride, lanes0, lanes1);
      }
    };
    int64_t c = k0;
    for (; c + 2 * L <= k1; c += 2 * L) all_images(c, Full{}, Full{});
    for (; c + L <= k1; c += L) all_images(c, Full{}, None{});
    if (c < k1) all_images(c, static_cast<int>(k1 - c), None{});
  });
}

// Rows r .. r + kRows - 1 of dw; see outer_products.
template <int kRows, class T, class Lanes>
SENET_INLINE void outer_rows(T* dw, int64_t k, const Acc<T>* left, int64_t left_stride,
                             const Acc<T>* right, int64_t right_stride, int64_t images,
                             Lanes lanes) {
  using A = Acc<T>;
  Vec<A> total[kRows] = {};
  for (int64_t g0 = 0; g0 < images; g0 += kChain) {
    const int64_t g1 = g0 + kChain < images ? g0 + kChain : images;
    Vec<A> s[kRows] = {};
    for (int64_t g = g0; g < g1; ++g) {
      const Vec<A> v = get(right + g * right_stride, lanes);
      for (int j = 0; j < kRows; ++j) s[j] += left[g * left_stride + j] * v;
    }
    for (int j = 0; j < kRows; ++j) total[j] += s[j];
  }
  for (int j = 0; j < kRows; ++j) put(dw + j * k, total[j], lanes);
}

// dw[r][k] = sum over images of left[g][r] right[g][k], rows r0 <= r < r1; stored as T.
template <class T>
SENET_OUTLINE void outer_products(T* dw, int64_t r0, int64_t r1, int64_t k, const Acc<T>* left,
                                  int64_t left_stride, const Acc<T>* right, int64_t right_stride,
                                  int64_t images) {
  int64_t r = r0;
  for (; r + 4 <= r1; r += 4) {
    for_vectors<Acc<T>>(k, [&](int64_t i, auto lanes) {
      outer_rows<4>(dw + r * k + i, k, left + r, left_stride, right + i, right_stride, images,
                    lanes);
    });
  }
  for (; r < r1; ++r) {
    for_vectors<Acc<T>>(k, [&](int64_t i, auto lanes) {
      outer_rows<1>(dw + r * k + i, k, left + r, left_stride, right + i, right_stride, images,
                    lanes);
    });
  }
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
