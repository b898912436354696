// What the ops need of the device their tensors are on. One for each kind of device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "se.h"

namespace senet {

struct Host {
  const char* a_tensor;  // for messages: "a CPU tensor"
  int32_t (*device_type)();
  bool (*holds)(const torch::stable::Tensor&, int32_t index);
  // At least `bytes` for z, h and u that nobody keeps, until the next call on this thread; or null:
  // the kernels need none.
  void* (*saved)(size_t bytes);
  void (*forward)(const ForwardArgs&, int32_t index);
  void (*backward)(const BackwardArgs&, int32_t index);
  void (*poison)(void* p, size_t bytes, int32_t index);
};

const Host& cpu_host();
const Host& cuda_host();
// How the CUDA kernels would be launched, in words. `call`: form, batch, channels, positions,
// hidden, outputs, channels-last, dtype, dtype of the parameters, backward. `device`: the members
// of gpu::Device, or the index of one that is there.
std::string cuda_plan(std::vector<int64_t> call, std::vector<int64_t> device);
// The one for x, which is on one of them.
const Host& host_of(const torch::stable::Tensor& x);

// SENET_KERNELS_POISON=1, for tests: all memory starts as NaN, scratch memory anew in each call,
// so that whatever a kernel reads or returns without having written it shows.
inline bool poisons() {
  static const bool on = [] {
    const char* value = std::getenv("SENET_KERNELS_POISON");
    return value && *value == '1';
  }();
  return on;
}

// How many ask, at this moment, that memory be allocated by PyTorch's dispatcher, where modes of
// Python see it: while kernels are proven. Usually it is past it, which a small call notices.
inline std::atomic<int> dispatching{0};
inline void dispatch_allocations(bool on) { dispatching += on ? 1 : -1; }

// An uninitialised tensor on a device: `index` of those of its type. Throws where memory is out.
torch::stable::Tensor new_strided(const int64_t* sizes, const int64_t* strides, int64_t dims,
                                  torch::headeronly::ScalarType dtype, int32_t device,
                                  int32_t index);

}  // namespace senet
