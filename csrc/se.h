// The operation's arguments as plain structs. No torch header: registration.cpp fills them in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pointwise_codes.h"

namespace senet {

enum class DType : int { f32, bf16, f16, f64 };

// The four pointwise choices, packed by senet_kernels/pointwise.py in this order.
struct Options {
  Fn activation, gate, before, after;
};

inline Options unpack_options(int64_t code) {
  const auto at = [code](int position) { return static_cast<Fn>((code >> (4 * position)) & 15); };
  return {at(0), at(1), at(2), at(3)};
}

// What a call computes: the whole operation, by either excitation, or one half of it.
enum class Form : int { two_layers, one_layer, squeeze, scale };

struct Shape {
  Form form;
  int64_t batch, channels, positions;
  int64_t hidden;      // R; 0 without a hidden layer
  int64_t outputs;     // columns of u: C, or 2C for scale-and-shift
  bool channels_last;  // channels adjacent; otherwise positions adjacent
  constexpr int64_t image() const { return channels * positions; }
  // Columns of W2, and elements of all weights; for the whole operation.
  constexpr int64_t inner() const { return form == Form::two_layers ? hidden : channels; }
  constexpr int64_t weights() const {
    if (form == Form::two_layers) return hidden * (channels + outputs);
    return form == Form::one_layer ? channels * outputs : 0;
  }
};

// A full-size tensor: each image dense in the layout of Shape, images `stride` elements apart.
struct Images {
  const void* data = nullptr;
  int64_t stride = 0;
};

// The parameters, all of one dtype. Biases, alpha and beta may be null, and the two of the affine
// map before `before` together.
struct Parameters {
  DType dtype;
  const void *w1, *b1, *w2, *b2, *alpha, *beta, *affine_scale, *affine_shift;
};

struct ForwardArgs {
  Shape shape;
  DType dtype;
  Options options;
  Parameters parameters;
  Images x, residual;
  const int64_t* lengths;  // [B]: how many positions count in the mean; null is all of them
  void* y;                 // each image dense, images y_stride apart; may be x itself
  int64_t y_stride;
  uint8_t* mask;  // bits of not(pre <= 0), rows padded to bytes; may be null
  // [B, C], [B, R], [B, outputs] in the accumulation type; h before activation. Of a half there is
  // z alone, or u alone, which is then given.
  void *z, *h, *u;
};

struct BackwardArgs {
  Shape shape;
  DType dtype;
  Options options;
  Parameters parameters;
  Images dy, x, residual;
  const int64_t* lengths;
  const uint8_t* mask;
  const void *z, *h, *u;
  const void* dz;  // [B, C] in the accumulation type: of the squeeze alone, instead of dy
  // Results, dense; null where not asked for. Parameter gradients have the parameters' dtype.
  void *dx, *dresidual;
  void *dw1, *db1, *dw2, *db2, *dalpha, *dbeta, *daffine_scale, *daffine_shift;
  void* du;  // [B, outputs] in the accumulation type: of the scaling alone
};

// What the kernels need from their host: threads, and scratch memory that outlives the call.
struct Runtime {
  int threads;
  int64_t core_cache;  // bytes of the largest cache that is a core's own; 0 where nothing says
  int64_t last_cache;  // bytes of the last caches before memory that the threads reach; 0 likewise
  // Whether memory has never been touched, so that its pages are yet to come from the system.
  bool (*is_untouched)(const void* p, int64_t bytes);
  // Calls body(begin, end, context) for disjoint ranges that cover [0, n), at most one per thread.
  void (*parallel_for)(int64_t n, void (*body)(int64_t, int64_t, void*), void* context);
  // At least `bytes` of 64-byte aligned memory, valid until the next call on the same thread.
  void* (*scratch)(size_t bytes);
};

// One pair per instruction set the library was built for; see cpu/kernels.cpp.
namespace baseline {
void forward(const ForwardArgs&, const Runtime&);
void backward(const BackwardArgs&, const Runtime&);
}  // namespace baseline
namespace avx2 {
void forward(const ForwardArgs&, const Runtime&);
void backward(const BackwardArgs&, const Runtime&);
}  // namespace avx2
namespace avx512 {
void forward(const ForwardArgs&, const Runtime&);
void backward(const BackwardArgs&, const Runtime&);
}  // namespace avx512
namespace neon {
void forward(const ForwardArgs&, const Runtime&);
void backward(const BackwardArgs&, const Runtime&);
}  // namespace neon
namespace neon_bf16 {
void forward(const ForwardArgs&, const Runtime&);
void backward(const BackwardArgs&, const Runtime&);
}  // namespace neon_bf16

}  // namespace senet
