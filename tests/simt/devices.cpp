// csrc/cuda/host.cpp as it is for a GPU, on a machine of several pretended ones: torch's device
// guard, allocator and streams, and the launches, write down on which device they happen.
//
// A line per event; test_cuda_on_cpu.py knows what they must be.
#include <dlfcn.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "host.h"
#include "kernels.h"
#include "tensors.h"

namespace {

int current = 0;                // the device
const char* failure = nullptr;  // of the next launch
bool out_of_memory = false;
int64_t wanted = 0;  // bytes of scratch memory

void event(const char* what, int64_t device) {
  std::printf("%s %d", what, static_cast<int>(device));
  std::printf(device == current ? "\n" : ", the current one is %d\n", current);
}

AOTITorchError stream_of(int32_t device, void** stream) {
  event("stream", device);
  *stream = &current;
  return AOTI_TORCH_SUCCESS;
}

}  // namespace

// ---- torch, as far as host.cpp needs it ----

// Whatever is looked up in libtorch_cuda.so is the current stream.
void* dlopen(const char*, int) noexcept { return &current; }
void* dlsym(void*, const char* name) noexcept {
  const bool known = !std::strcmp(name, "aoti_torch_get_current_cuda_stream");
  return known ? reinterpret_cast<void*>(stream_of) : nullptr;
}

extern "C" {
int32_t aoti_torch_device_type_cuda() { return 1; }
int32_t aoti_torch_device_type_cpu() { return 0; }
int32_t aoti_torch_dtype_uint8() { return 0; }
uint64_t aoti_torch_abi_version() { return 0; }  // of a torch without any of the newer functions
AOTITorchError aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(new int(current));
  current = device;
  event("enter", device);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  int* const before = reinterpret_cast<int*>(guard);
  event("leave", current);
  current = *before;
  delete before;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  delete reinterpret_cast<int64_t*>(tensor);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  *index = static_cast<int32_t>(*reinterpret_cast<int64_t*>(tensor));
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  *data = tensor;
  return AOTI_TORCH_SUCCESS;
}
}

// ---- the kernels' side ----

namespace senet {

const Host& host_of(const torch::stable::Tensor&) { return cuda_host(); }

torch::stable::Tensor new_strided(const int64_t*, const int64_t*, int64_t,
                                  torch::headeronly::ScalarType, int32_t, int32_t device) {
  event("memory", device);
  if (out_of_memory) throw std::runtime_error("out of memory");
  return torch::stable::Tensor(reinterpret_cast<AtenTensorHandle>(new int64_t(device)));
}

namespace gpu {

Plan plan_of(const Task&, int device) {
  event("plan", device);
  Plan plan;
  plan.scratch = wanted;
  return plan;
}
Task task_of(const ForwardArgs&) { return {}; }
Task task_of(const BackwardArgs&) { return {}; }
const char* forward(const ForwardArgs&, const Plan&, void*, int device, void*) {
  event("forward", device);
  return failure;
}
const char* backward(const BackwardArgs&, const Plan&, void*, int device, void*) {
  event("backward", device);
  return failure;
}
void poison(void*, size_t, int device, void*) { event("poison", device); }
Plan make_plan(const Task&, const Device&, const Policy&) { return {}; }
std::optional<Policy> named_policy() { return std::nullopt; }
std::string describe(const Plan&) { return {}; }

}  // namespace gpu
}  // namespace senet

int main() {
  using namespace senet;
  for (const int before : {0, 2}) {
    for (const int of_x : {0, 3}) {
      for (const int how : {0, 1, 2, 3}) {
        wanted = how == 0 ? 0 : 64;
        failure = how == 2 ? "planted" : nullptr;
        out_of_memory = how == 3;
        const auto call = [&](const char* name, auto f) {
          current = before;
          std::printf("call %s x=%d current=%d %s\n", name, of_x, before,
                      failure         ? "fails"
                      : out_of_memory ? "out_of_memory"
                                      : "works");
          try {
            const torch::stable::Tensor x(reinterpret_cast<AtenTensorHandle>(new int64_t(of_x)));
            const Place at = place_of(x);
            f(*at.host, at.index);
            std::puts("returned");
          } catch (const std::runtime_error&) {
            std::puts("threw");
          }
          std::printf("after %d\n", current);
        };
        call("forward", [](const Host& h, int32_t i) { h.forward(ForwardArgs{}, i); });
        call("backward", [](const Host& h, int32_t i) { h.backward(BackwardArgs{}, i); });
        call("poison", [](const Host& h, int32_t i) { h.poison(nullptr, 64, i); });
        call("plan", [](const Host&, int32_t i) {
          cuda_plan(std::vector<int64_t>(15), std::vector<int64_t>{i});
        });
      }
    }
  }
}
