// CUDA as the ops see it: PyTorch's current stream and allocator, then the kernels.
//
// Needs torch's stable ABI, and nothing of CUDA's headers. The library also loads where torch was
// built without CUDA, so what only libtorch_cuda has is looked up when it is first wanted.
#include "../host.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>

#include "kernels.h"

namespace senet {
namespace {

using torch::stable::Tensor;

#if defined(SENET_SIMT)
// Run on the CPU by tests/simt: no streams, and CPU tensors, which lie on the simulated device that
// the test chose.
extern "C" int simt_device_of_tensors();
int device_index(int32_t) { return simt_device_of_tensors(); }
void* current_stream(int32_t) { return nullptr; }
int32_t device_type() { return aoti_torch_device_type_cpu(); }
bool holds(const Tensor& t, int32_t) { return t.is_cpu(); }
struct OnDevice {
  explicit OnDevice(int32_t) {}
};
#else
int device_index(int32_t index) { return index; }
void* current_stream(int32_t index) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Get>(symbol);
  }();
  STD_TORCH_CHECK(get, "this PyTorch has no CUDA streams: it was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(index, &stream));
  return stream;
}
int32_t device_type() { return aoti_torch_device_type_cuda(); }
bool holds(const Tensor& t, int32_t index) { return t.is_cuda() && t.get_device_index() == index; }
using OnDevice = torch::stable::accelerator::DeviceGuard;
#endif

// Memory for one launch. The allocator hands it out again in the order of the stream.
std::optional<Tensor> scratch(int64_t bytes, int32_t index) {
  if (bytes == 0) return std::nullopt;
  const int64_t stride = 1;
  return new_strided(&bytes, &stride, 1, torch::headeronly::ScalarType::Byte, device_type(), index);
}

// Plans a call and launches it.
template <class Args>
void run(const Args& args, int32_t index,
         const char* (*kernels)(const Args&, const gpu::Plan&, void*, int, void*)) {
  const OnDevice guard(index);
  const int device = device_index(index);
  const auto launch = [&](const gpu::Plan& plan) {
    const std::optional<Tensor> memory = scratch(plan.scratch, index);
    void* const p = memory ? memory->mutable_data_ptr() : nullptr;
    void* const stream = current_stream(index);
    if (memory && poisons()) gpu::poison(p, static_cast<size_t>(plan.scratch), device, stream);
    return kernels(args, plan, p, device, stream);
  };
  const gpu::Task task = gpu::task_of(args);
  const gpu::Plan plan = gpu::plan_of(task, device);
  const char* error = launch(plan);
  if (error && plan.exchange == gpu::Exchange::grid) {
    // Where the device refused the cooperative launch, its plans have none from now on.
    const gpu::Plan other = gpu::plan_of(task, device);
    if (!other.error && other.exchange != plan.exchange) error = launch(other);
  }
  STD_TORCH_CHECK(!error, "senet_kernels on CUDA: ", error);
}

}  // namespace

const Host& cuda_host() {
  static const Host host = {
      "a CUDA tensor on the device of x",
      device_type,
      holds,
      [](size_t) -> void* { return nullptr; },
      [](const ForwardArgs& args, int32_t index) { run(args, index, gpu::forward); },
      [](const BackwardArgs& args, int32_t index) { run(args, index, gpu::backward); },
      [](void* p, size_t bytes, int32_t index) {
        const OnDevice guard(index);
        gpu::poison(p, bytes, device_index(index), current_stream(index));
      }};
  return host;
}

std::string cuda_plan(std::vector<int64_t> call, std::vector<int64_t> device) {
  STD_TORCH_CHECK(call.size() == 15 && (device.size() == 1 || device.size() == 8),
                  "native_plan: expected 15 numbers for the call, and 1 or 8 for the device");
  const auto number = [](int64_t v) { return static_cast<int>(v); };
  const Options options = unpack_options(call[10]);
  gpu::Task task{};
  task.shape = {
      static_cast<Form>(call[0]), call[1], call[2], call[3], call[4], call[5], call[6] != 0};
  task.dtype = static_cast<DType>(call[7]);
  task.parameter_dtype = static_cast<DType>(call[8]);
  task.before = options.before;
  task.backward = task.needs_dx = call[9] != 0;
  task.masks = !task.backward && options.after == Fn::relu;
  task.affine = call[11] != 0;
  task.needs_daffine = task.backward && task.affine;
  task.aligned = call[12] != 0;
  // As task_of in device.cpp has it, of a backward pass that the gradient of x is wanted of.
  const bool lengths = call[13] != 0, residual = call[14] != 0;
  const bool follows = task.backward
                           ? options.after == Fn::identity ||
                                 (options.after == Fn::relu &&
                                  (task.shape.channels_last || task.shape.positions % 8 == 0))
                           : options.after == (residual ? Fn::relu : Fn::identity);
  task.plain = !task.affine && !lengths && task.shape.outputs <= task.shape.channels && follows;
  if (device.size() == 1) {
    const OnDevice guard(number(device[0]));
    return gpu::describe(gpu::plan_of(task, device_index(number(device[0]))));
  }
  gpu::Device absent;
  absent.capability = number(device[0]);
  absent.multiprocessors = number(device[1]);
  absent.shared_per_block = device[2];
  absent.shared_per_multiprocessor = device[3];
  absent.threads_per_multiprocessor = number(device[4]);
  absent.registers_per_multiprocessor = number(device[5]);
  absent.largest_cluster = number(device[6]);
  absent.cooperative = device[7] != 0;
  const gpu::Policy policy = gpu::named_policy().value_or(gpu::Policy{});
  return gpu::describe(gpu::make_plan(task, absent, policy));
}

}  // namespace senet
