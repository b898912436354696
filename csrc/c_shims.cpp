// The public ops as functions of C, which AOTInductor's generated code can call without a
// dispatcher: aoti_torch_<device>_<op>, declared to it by `c_shims` in senet_kernels/public_ops.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdio>
#include <exception>
#include <type_traits>
#include <utility>

#include "public_ops.h"

namespace {

using torch::stable::Tensor;

// An argument as C++ has it. Tensors are borrowed; the shim owns handles of its own.
Tensor from_c(AtenTensorHandle handle) {
  AtenTensorHandle owned = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &owned));
  return Tensor(owned);
}
std::optional<Tensor> from_c(AtenTensorHandle* handle) {
  return handle ? std::optional<Tensor>(from_c(*handle)) : std::nullopt;
}
std::string from_c(const char* text) { return text; }

template <class Function, class... Arguments>
AOTITorchError call(const char* name, Function function, AtenTensorHandle* result,
                    Arguments... arguments) {
  try {
    const Tensor y = function(from_c(arguments)...);
    return aoti_torch_new_tensor_handle(y.get(), result);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "senet_kernels::%s: %s\n", name, error.what());
    return AOTI_TORCH_FAILURE;
  }
}

using Handle = AtenTensorHandle;

}  // namespace

#define SENET_SHIMS(device)                                                                       \
  extern "C" __attribute__((visibility("default"))) AOTITorchError                                \
  aoti_torch_##device##_squeeze_excite(                                                           \
      Handle x, Handle* w1, Handle* b1, Handle w2, Handle* b2, const char* activation,            \
      const char* gate, const char* before, Handle* affine_scale, Handle* affine_shift,           \
      const char* after, Handle* residual, Handle* alpha, Handle* beta, Handle* lengths,          \
      Handle* mask, const char* pool, Handle* result) {                                           \
    return call("squeeze_excite", senet::public_squeeze_excite, result, x, w1, b1, w2, b2,        \
                activation, gate, before, affine_scale, affine_shift, after, residual, alpha,     \
                beta, lengths, mask, pool);                                                       \
  }                                                                                               \
  extern "C" __attribute__((visibility("default"))) AOTITorchError aoti_torch_##device##_squeeze( \
      Handle x, const char* before, Handle* affine_scale, Handle* affine_shift, Handle* lengths,  \
      Handle* mask, const char* pool, Handle* result) {                                           \
    return call("squeeze", senet::public_squeeze, result, x, before, affine_scale, affine_shift,  \
                lengths, mask, pool);                                                             \
  }                                                                                               \
  extern "C" __attribute__((visibility("default"))) AOTITorchError                                \
  aoti_torch_##device##_channel_scale(Handle x, Handle u, const char* gate, const char* before,   \
                                      Handle* affine_scale, Handle* affine_shift,                 \
                                      const char* after, Handle* residual, Handle* alpha,         \
                                      Handle* beta, Handle* result) {                             \
    return call("channel_scale", senet::public_channel_scale, result, x, u, gate, before,         \
                affine_scale, affine_shift, after, residual, alpha, beta);                        \
  }

SENET_SHIMS(cpu)
#if SENET_CUDA
SENET_SHIMS(cuda)
#endif
