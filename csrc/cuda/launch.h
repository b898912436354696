// Launching a kernel the way its plan says.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"

namespace senet {
namespace gpu {

// An error message, or null.
inline const char* message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The most blocks that run as one cluster on the current device when each has a multiprocessor to
// itself.
int largest_cluster(const Device& device);

// Each kernel keeps, per device, how much shared memory it has been allowed so far.
struct Allowed {
  static constexpr int kDevices = 64;
  int bytes[kDevices] = {};
  bool wide_clusters[kDevices] = {};
};

template <class Args>
const char* launch(void (*kernel)(const Args), Allowed& allowed, const Plan& plan, int64_t blocks,
                   const Args& args, void* stream) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return message(error);
  const void* symbol = reinterpret_cast<const void*>(kernel);
  const int slot = device < Allowed::kDevices ? device : 0;
  if (slot != device || plan.shared > allowed.bytes[slot]) {
    error = cudaFuncSetAttribute(symbol, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared);
    if (error != cudaSuccess) return message(error);
    allowed.bytes[slot] = plan.shared;
  }
  const bool cluster = plan.exchange == Exchange::cluster;
  if (cluster && plan.blocks > 8 && (slot != device || !allowed.wide_clusters[slot])) {
    error = cudaFuncSetAttribute(symbol, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return message(error);
    allowed.wide_clusters[slot] = true;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  if (cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(plan.blocks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else if (plan.exchange == Exchange::grid) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  config.attrs = &attribute;
  config.numAttrs = plan.exchange == Exchange::none ? 0 : 1;
  error = cudaLaunchKernelEx(&config, kernel, args);
  return message(error);
}

}  // namespace gpu
}  // namespace senet
