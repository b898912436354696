// What the kernels run on, and the plans made for it so far.
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <unordered_map>

#include "launch.h"

namespace senet {
namespace gpu {
namespace {

cudaError_t query(int index, Device* device) {
  const CurrentDevice current(index);
  const WhateverIsCaptured scope;
  cudaError_t error = current.error();
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, index);
    return error == cudaSuccess ? value : 0;
  };
  Device d;
  d.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                 attribute(cudaDevAttrComputeCapabilityMinor);
  d.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  d.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  d.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  d.threads_per_multiprocessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  d.registers_per_multiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
  d.cooperative = attribute(cudaDevAttrCooperativeLaunch) != 0;
  if (error == cudaSuccess) error = compiled_capability(&d.capability, d);
  d.largest_cluster = error == cudaSuccess && d.capability >= 90 ? largest_cluster(d) : 1;
  *device = d;
  return error;
}

// Devices that refused a cooperative launch.
std::atomic<bool> refuses[kDevices] = {};

bool is_aligned(const Images& images, int64_t element) {
  return reinterpret_cast<uintptr_t>(images.data) % 16 == 0 && images.stride % 8 == 0 &&
         (element * images.stride) % 16 == 0;
}
bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// A plan that holds on the device as it is: with the blocks that really run at once. `known`: the
// device has said so.
Plan make(const Task& task, const Policy& policy, int index, Device device, bool* known) {
  const CurrentDevice current(index);
  *known = current.error() == cudaSuccess;
  Plan plan = make_plan(task, device, policy);
  for (int i = 0; i < 3 && *known && !plan.error; ++i) {
    const Room room = task.backward ? backward_room(task, plan, index, device)
                                    : forward_room(task, plan, index, device);
    *known = room.known;
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

// A plan for a device of which the runtime did not say all. Where there is none this is why.
Plan half_known(Plan plan, int index, cudaError_t error) {
  thread_local std::string why;
  if (plan.error) {
    why = "cannot use device " + std::to_string(index) + ": " + cudaGetErrorString(error);
    plan.error = why.c_str();
  }
  cudaGetLastError();  // else the launch, which asks again, reports it
  return plan;
}

// Plans by what they depend on, so many per thread; then it starts anew.
constexpr size_t kMostPlans = 1024;

}  // namespace

Plan plan_of(const Task& t, int index) {
  Device device;
  bool known = false;
  const auto named = named_policy();
  if (const cudaError_t error = device_of(index, &device)) {
    return half_known(make(t, named.value_or(Policy{}), index, device, &known), index, error);
  }
  if (named) return make(t, *named, index, device, &known);
  using Key = std::array<int64_t, 11>;
  const Key key = {2 * index + device.cooperative,
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
                       16 * t.needs_dx + 32 * t.needs_ds + 64 * t.affine + 128 * t.needs_daffine +
                       256 * t.plain};
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
  const Plan plan = make(t, Policy{}, index, device, &known);
  if (!known) return plan;  // the next call asks again
  if (plans.size() >= kMostPlans) plans.clear();
  return plans[key] = plan;
}

cudaError_t device_of(int index, Device* device) {
  static OncePerDevice once;
  static Device devices[kDevices];
  Device partly;
  const cudaError_t error = once(index, [index, &partly] {
    const cudaError_t e = query(index, &partly);
    if (e == cudaSuccess) devices[index] = partly;
    return e;
  });
  *device = error == cudaSuccess ? devices[index] : partly;
  if (error == cudaSuccess && refuses[index].load(std::memory_order_relaxed)) {
    device->cooperative = false;
  }
  return error;
}

void refuse_cooperation(int index) { refuses[index].store(true, std::memory_order_relaxed); }

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
  const bool adds = a.residual.data != nullptr;
  t.plain = !a.lengths && !t.affine && a.shape.outputs <= a.shape.channels &&
            (a.shape.form == Form::squeeze || a.options.after == (adds ? Fn::relu : Fn::identity));
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
  const bool masks = a.mask && (a.shape.channels_last || a.shape.positions % 8 == 0);
  const bool follows = a.options.after == Fn::identity ? !a.dresidual : masks;
  t.plain = !a.lengths && !t.affine && a.shape.outputs <= a.shape.channels && a.dx && a.dy.data &&
            a.shape.form != Form::squeeze && follows;
  return t;
}

void poison(void* p, size_t bytes, int index, void* stream) {
  const CurrentDevice current(index);
  cudaMemsetAsync(p, 0xff, bytes, static_cast<cudaStream_t>(stream));
}

}  // namespace gpu
}  // namespace senet
