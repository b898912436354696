// What the kernels run on, and the plans made for it so far.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "launch.h"

namespace senet {
namespace gpu {
namespace {

constexpr int kDevices = 64;

Device query(int ordinal) {
  const auto attribute = [ordinal](cudaDeviceAttr which) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, which, ordinal) == cudaSuccess ? value : 0;
  };
  Device d;
  d.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                 attribute(cudaDevAttrComputeCapabilityMinor);
  d.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  d.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  d.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  d.threads_per_multiprocessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  d.registers_per_multiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
  d.largest_cluster = d.capability >= 90 ? largest_cluster(d) : 1;
  d.cooperative = attribute(cudaDevAttrCooperativeLaunch) != 0;
  return d;
}

int current_ordinal() {
  int ordinal = 0;
  return cudaGetDevice(&ordinal) == cudaSuccess ? ordinal : -1;
}

bool is_aligned(const Images& images, int64_t element) {
  return reinterpret_cast<uintptr_t>(images.data) % 16 == 0 && images.stride % 8 == 0 &&
         (element * images.stride) % 16 == 0;
}
bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Plans by what they depend on. Never thrown away: a program has few kinds of calls.
const Plan& cached(const Task& task) {
  struct Hash {
    size_t operator()(const std::string& key) const { return std::hash<std::string>()(key); }
  };
  static std::mutex mutex;
  static std::unordered_map<std::string, std::unique_ptr<Plan>, Hash> plans;

  const char* named = std::getenv("SENET_KERNELS_CUDA_PLAN");
  const int64_t numbers[] = {current_ordinal(),
                             static_cast<int64_t>(task.shape.form),
                             task.shape.batch,
                             task.shape.channels,
                             task.shape.positions,
                             task.shape.hidden,
                             task.shape.outputs,
                             task.shape.channels_last,
                             static_cast<int64_t>(task.dtype),
                             static_cast<int64_t>(task.parameter_dtype),
                             task.backward + 2 * task.aligned + 4 * task.masks + 8 * task.needs_dx +
                                 16 * task.needs_ds + 32 * task.affine + 64 * task.needs_daffine};
  std::string key(reinterpret_cast<const char*>(numbers), sizeof numbers);
  if (named) key += named;

  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Plan>& plan = plans[key];
  if (!plan) {
    Policy policy;
    const char* error = parse_policy(named, &policy);
    plan = std::make_unique<Plan>(make_plan(task, current_device(), policy));
    if (error) plan->error = error;
  }
  return *plan;
}

}  // namespace

const Device& current_device() {
  static Device devices[kDevices];
  static std::once_flag once[kDevices];
  static const Device none;
  const int ordinal = current_ordinal();
  if (ordinal < 0 || ordinal >= kDevices) return none;
  std::call_once(once[ordinal], [ordinal] { devices[ordinal] = query(ordinal); });
  return devices[ordinal];
}

Task task_of(const ForwardArgs& a) {
  Task t{};
  t.shape = a.shape;
  t.dtype = a.dtype;
  t.parameter_dtype = a.parameters.dtype;
  const int64_t size = a.dtype == DType::f32 ? 4 : 2;
  t.aligned = is_aligned(a.x, size) && (!a.residual.data || is_aligned(a.residual, size)) &&
              (!a.y || is_aligned({a.y, a.y_stride}, size));
  t.masks = a.options.after == Fn::relu;
  t.affine = a.parameters.affine_scale != nullptr;
  return t;
}

Task task_of(const BackwardArgs& a) {
  Task t{};
  t.shape = a.shape;
  t.dtype = a.dtype;
  t.parameter_dtype = a.parameters.dtype;
  t.backward = true;
  const int64_t size = a.dtype == DType::f32 ? 4 : 2;
  t.aligned = is_aligned(a.x, size) && (!a.dy.data || is_aligned(a.dy, size)) &&
              (!a.residual.data || is_aligned(a.residual, size)) && is_aligned(a.dx) &&
              is_aligned(a.dresidual);
  t.needs_dx = a.dx != nullptr;
  t.needs_ds = a.dalpha || a.dbeta;
  t.affine = a.parameters.affine_scale != nullptr;
  t.needs_daffine = a.daffine_scale || a.daffine_shift;
  return t;
}

const Plan& plan_forward(const ForwardArgs& args) { return cached(task_of(args)); }
const Plan& plan_backward(const BackwardArgs& args) { return cached(task_of(args)); }

void poison(void* p, size_t bytes, void* stream) {
  cudaMemsetAsync(p, 0xff, bytes, static_cast<cudaStream_t>(stream));
}

}  // namespace gpu
}  // namespace senet
