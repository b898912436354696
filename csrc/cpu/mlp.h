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

template <class A>
SENET_OUTLINE A parameter_at(DType dtype, const void* p, int64_t i) {
  A out{};
  with_storage<A>(dtype, p, [&](auto* typed) { out = to_acc(typed[i]); });
  return out;
}

// out[g][r] = bias[r] + sum over k of w[r][k] in[g][k], for rows r0 <= r < r1.
template <class A>
SENET_OUTLINE void linear(DType dtype, const void* weight, const void* bias, int64_t r0, int64_t r1, int64_t k,
            const A* in, int64_t in_stride, A* out, int64_t out_stride, int64_t images) {
  with_storage<A>(dtype, weight, [&](auto* w) {
    for (int64_t r = r0; r < r1; r += 4) {
      const int rows = static_cast<int>(r1 - r < 4 ? r1 - r : 4);
      auto* w0 = w + r * k;
      auto* w1 = w + (rows > 1 ? r + 1 : r) * k;
      auto* w2 = w + (rows > 2 ? r + 2 : r) * k;
      auto* w3 = w + (rows > 3 ? r + 3 : r) * k;
      for (int64_t g = 0; g < images; ++g) {
        const A* v = in + g * in_stride;
        Vec<A> s0{}, s1{}, s2{}, s3{};
        for_vectors<A>(k, [&](int64_t i, auto lanes) {
          const Vec<A> x = get(v + i, lanes);
          s0 += get(w0 + i, lanes) * x;
          s1 += get(w1 + i, lanes) * x;
          s2 += get(w2 + i, lanes) * x;
          s3 += get(w3 + i, lanes) * x;
        });
        const A sums[4] = {sum(s0), sum(s1), sum(s2), sum(s3)};
        for (int j = 0; j < rows; ++j) {
          out[g * out_stride + r + j] =
              sums[j] + (bias ? parameter_at<A>(dtype, bias, r + j) : A(0));
        }
      }
    }
  });
}

// out[g][k] = sum over rows r of w[r][k] in[g][r], for columns k0 <= k < k1 of w[rows][k].
template <class A>
SENET_OUTLINE void linear_transposed(DType dtype, const void* weight, int64_t rows, int64_t k, int64_t k0,
                       int64_t k1, const A* in, int64_t in_stride, A* out, int64_t out_stride,
                       int64_t images) {
  constexpr int L = kLanes<A>;
  with_storage<A>(dtype, weight, [&](auto* w) {
    const auto columns = [&](int64_t c, auto lanes0, auto lanes1) SENET_LAMBDA {
      for (int64_t g = 0; g < images; ++g) {
        Vec<A> t0{}, t1{};
        for (int64_t r0 = 0; r0 < rows; r0 += kChain) {
          const int64_t r1 = r0 + kChain < rows ? r0 + kChain : rows;
          Vec<A> s0{}, s1{};
          for (int64_t r = r0; r < r1; ++r) {
            const A v = in[g * in_stride + r];
            s0 += get(w + r * k + c, lanes0) * v;
            if constexpr (!std::is_same_v<decltype(lanes1), None>) {
              s1 += get(w + r * k + c + L, lanes1) * v;
            }
          }
          t0 += s0;
          t1 += s1;
        }
        put(out + g * out_stride + c, t0, lanes0);
        if constexpr (!std::is_same_v<decltype(lanes1), None>) {
          put(out + g * out_stride + c + L, t1, lanes1);
        }
      }
    };
    int64_t c = k0;
    for (; c + 2 * L <= k1; c += 2 * L) columns(c, Full{}, Full{});
    for (; c + L <= k1; c += L) columns(c, Full{}, None{});
    if (c < k1) columns(c, static_cast<int>(k1 - c), None{});
  });
}

// dw[r][k] = sum over images of left[g][r] right[g][k], rows r0 <= r < r1; stored as T.
template <class T>
SENET_OUTLINE void outer_products(T* dw, int64_t r0, int64_t r1, int64_t k, const Acc<T>* left,
                    int64_t left_stride, const Acc<T>* right, int64_t right_stride,
                    int64_t images) {
  using A = Acc<T>;
  for (int64_t r = r0; r < r1; ++r) {
    for_vectors<A>(k, [&](int64_t i, auto lanes) {
      Vec<A> total{};
      for (int64_t g0 = 0; g0 < images; g0 += kChain) {
        const int64_t g1 = g0 + kChain < images ? g0 + kChain : images;
        Vec<A> s{};
        for (int64_t g = g0; g < g1; ++g) {
          s += left[g * left_stride + r] * get(right + g * right_stride + i, lanes);
        }
        total += s;
      }
      put(dw + r * k + i, total, lanes);
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
