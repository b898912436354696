// What the kernels run on, and the plans made for it so far.
#include <cuda_runtime.h>

#include <array>
#include <mutex>
#include <unordered_map>

#include "launch.h"

namespace senet {
namespace gpu {
namespace {

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
  d.capability = compiled_capability(d);
  d.largest_cluster = d.capability >= 90 ? largest_cluster(d) : 1;
  d.cooperative = attribute(cudaDevAttrCooperativeLaunch) != 0;
  return d;
}

bool is_aligned(const Images& images, int64_t element) {
  return reinterpret_cast<uintptr_t>(images.data) % 16 == 0 && images.stride % 8 == 0 &&
         (element * images.stride) % 16 == 0;
}
bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// A plan that holds on the device as it is: with the blocks that really run at once.
Plan make(const Task& task, const Policy& policy) {
  Device device = current_device();
  Plan plan = make_plan(task, device, policy);
  for (int i = 0; i < 3 && !plan.error; ++i) {
    const Room room = task.backward ? backward_room(task, plan) : forward_room(task, plan);
    if (room.per_multiprocessor == 0 || room.per_multiprocessor >= plan.per_multiprocessor) {
      if (room.clusters > 0 && room.clusters < plan.groups) {
        share_out(&plan, task.shape.batch, room.clusters);
      }
      break;
    }
    device.blocks_per_multiprocessor = room.per_multiprocessor;
    plan = make_plan(task, device, policy);
  }
  return plan;
}

// Plans by what they depend on, so many per thread; then it starts anew.
constexpr size_t kMostPlans = 1024;

}  // namespace

Plan plan_of(const Task& t) {
  if (const auto named = named_policy()) return make(t, *named);
  using Key = std::array<int64_t, 11>;
  const Key key = {current_ordinal(),
                   static_cast<int64_t>(t.shape.form),
                   t.shape.batch,
                   t.shape.channels,
                   t.shape.positions,
                   t.shape.hidden,
                   t.shape.outputs,
                   static_cast<int64_t>(t.dtype),
                   static_cast<int64_t>(t.parameter_dtype),
                   static_cast<int64_t>(t.before),
                   t.shape.channels_last + 2 * t.backward + 4 * t.aligned + 8 * t.masks +
                       16 * t.needs_dx + 32 * t.needs_ds + 64 * t.affine + 128 * t.needs_daffine};
  struct Hash {
    size_t operator()(const Key& k) const {
      uint64_t h = 14695981039346656037u;  // FNV-1a, a number at a time
      for (int64_t v : k) h = (h ^ static_cast<uint64_t>(v)) * 1099511628211u;
      return h ^ h >> 32;
    }
  };
  thread_local std::unordered_map<Key, Plan, Hash> plans;
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  if (plans.size() >= kMostPlans) plans.clear();
  return plans[key] = make(t, Policy{});
}

int current_ordinal() {
  int ordinal = 0;
  return cudaGetDevice(&ordinal) == cudaSuccess ? ordinal : -1;
}

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
  t.before = a.options.before;
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
  t.before = a.options.before;
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

void poison(void* p, size_t bytes, void* stream) {
  cudaMemsetAsync(p, 0xff, bytes, static_cast<cudaStream_t>(stream));
}

}  // namespace gpu
}  // namespace senet
