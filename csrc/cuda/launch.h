// Launching a kernel the way its plan says, and asking the device how many of it run at once.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <string>

#include "kernels.h"

namespace senet {
namespace gpu {

constexpr int kDevices = 64;

int current_ordinal();

// What is settled once per kernel and device: that a block may have all the shared memory there is,
// and a cluster more than eight blocks.
struct Prepared {
  std::once_flag once[kDevices];
  cudaError_t error[kDevices] = {};

  cudaError_t operator()(const void* kernel, int ordinal, const Device& device) {
    if (ordinal < 0 || ordinal >= kDevices) return prepare(kernel, device);
    std::call_once(once[ordinal], [&] { error[ordinal] = prepare(kernel, device); });
    return error[ordinal];
  }

 private:
  static cudaError_t prepare(const void* kernel, const Device& device) {
    const int most = static_cast<int>(device.shared_per_block);
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (e == cudaSuccess) {
      e = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    }
    if (e == cudaSuccess && device.capability >= 90) {
      e = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    return e;
  }
};

// A launch's configuration, and the attribute it points to.
struct Configuration {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  Configuration(const Plan& plan, int64_t blocks, void* stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(plan.threads));
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared);
    config.stream = static_cast<cudaStream_t>(stream);
    if (plan.exchange == Exchange::cluster) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(plan.blocks);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else if (plan.exchange == Exchange::grid) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    config.attrs = &attribute;
    config.numAttrs = plan.exchange == Exchange::none ? 0 : 1;
  }
  Configuration(const Configuration&) = delete;
};

// An error message, or null. Valid until the next one on this thread.
inline const char* explain_error(cudaError_t error, const Plan& plan, const Device& device) {
  if (error == cudaSuccess) return nullptr;
  thread_local std::string text;
  text = cudaGetErrorString(error);
  text += " (launching: " + describe(plan) + "; on a device of capability " +
          std::to_string(device.capability / 10) + "." + std::to_string(device.capability % 10);
  text += "; the library was built for the architectures that backends() shows)";
  return text.c_str();
}

template <class Args>
const char* launch(void (*kernel)(const Args), Prepared& prepared, const Plan& plan, int64_t blocks,
                   const Args& args, void* stream) {
  const Device& device = current_device();
  cudaError_t error = prepared(reinterpret_cast<const void*>(kernel), current_ordinal(), device);
  if (error == cudaSuccess) {
    Configuration c(plan, blocks, stream);
    error = cudaLaunchKernelEx(&c.config, kernel, args);
  }
  return explain_error(error, plan, device);
}

// How many blocks of a plan a multiprocessor runs at once, and how many clusters the device; 0
// where it does not say.
struct Room {
  int per_multiprocessor = 0, clusters = 0;
};
template <class Args>
Room room_for(void (*kernel)(const Args), Prepared& prepared, const Plan& plan) {
  Room room;
  prepared(reinterpret_cast<const void*>(kernel), current_ordinal(), current_device());
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&room.per_multiprocessor, kernel, plan.threads,
                                                    static_cast<size_t>(plan.shared)) !=
      cudaSuccess) {
    room.per_multiprocessor = 0;
  }
  if (plan.exchange == Exchange::cluster) {
    Configuration c(plan, plan.blocks, nullptr);
    if (cudaOccupancyMaxActiveClusters(&room.clusters, kernel, &c.config) != cudaSuccess) {
      room.clusters = 0;
    }
  }
  cudaGetLastError();  // not knowing is no error of the program's
  return room;
}

// Calls f(kernel, prepared) with the instance of Kernels that a call needs. The functions `before`
// that networks have are instances of their own for 16-bit types, two of them for float.
template <class Kernels, int kBytes, bool kVector, Fn kBefore, class F>
auto with(F f) {
  static Prepared prepared;
  return f(Kernels::template kernel<kBytes, kVector, static_cast<int>(kBefore)>(), prepared);
}
template <class Kernels, int kBytes, class F>
auto with_before(Fn before, F f) {
  if constexpr (kBytes == 2) {
    if (before == Fn::relu) return with<Kernels, kBytes, true, Fn::relu>(f);
    if (before == Fn::hardswish) return with<Kernels, kBytes, true, Fn::hardswish>(f);
  }
  if (before == Fn::identity) return with<Kernels, kBytes, true, Fn::identity>(f);
  if (before == Fn::silu) return with<Kernels, kBytes, true, Fn::silu>(f);
  return with<Kernels, kBytes, true, kAny>(f);
}
template <class Kernels, class F>
auto with_instance(DType dtype, Fn before, bool vector, F f) {
  if (dtype == DType::f64) return with<Kernels, 8, false, kAny>(f);
  if (dtype == DType::f32) {
    return vector ? with_before<Kernels, 4>(before, f) : with<Kernels, 4, false, kAny>(f);
  }
  return vector ? with_before<Kernels, 2>(before, f) : with<Kernels, 2, false, kAny>(f);
}

// What device.cpp, which has no kernels, asks of forward.cu and backward.cu.
Room forward_room(const Task& task, const Plan& plan);
Room backward_room(const Task& task, const Plan& plan);
// The capability the kernels were compiled for, at most the device's; and the largest cluster whose
// blocks each have a multiprocessor to themselves. Of the current device.
int compiled_capability(const Device& device);
int largest_cluster(const Device& device);

}  // namespace gpu
}  // namespace senet
