// The forward kernels' instances, and their launch.
#include "forward.cuh"
#include "launch.h"

namespace senet {
namespace gpu {
namespace {

template <int kBytes, bool kVector, Fn kBefore>
const char* run(const ForwardLaunch& launch_args, const Plan& plan, void* stream) {
  static Allowed allowed;
  return launch(forward_kernel<kBytes, kVector, static_cast<int>(kBefore)>, allowed, plan,
                int64_t(plan.groups) * plan.blocks, launch_args, stream);
}

template <int kBytes>
const char* run_vector(const ForwardLaunch& l, const Plan& plan, void* stream) {
  if constexpr (kBytes == 2) {
    if (l.a.options.before == Fn::relu) return run<kBytes, true, Fn::relu>(l, plan, stream);
    if (l.a.options.before == Fn::hardswish) {
      return run<kBytes, true, Fn::hardswish>(l, plan, stream);
    }
  }
  switch (l.a.options.before) {
    case Fn::identity:
      return run<kBytes, true, Fn::identity>(l, plan, stream);
    case Fn::silu:
      return run<kBytes, true, Fn::silu>(l, plan, stream);
    default:
      return run<kBytes, true, kAny>(l, plan, stream);
  }
}

}  // namespace

int largest_cluster(const Device& device) {
  auto* const kernel = forward_kernel<2, true, static_cast<int>(Fn::identity)>;
  const void* symbol = reinterpret_cast<const void*>(kernel);
  const int shared = static_cast<int>(device.shared_per_block);
  cudaFuncSetAttribute(symbol, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaFuncSetAttribute(symbol, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  for (unsigned blocks = 16; blocks > 1; blocks /= 2) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = blocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kForwardThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0) {
      return static_cast<int>(blocks);
    }
    cudaGetLastError();  // a size too large is no error of the program's
  }
  return 1;
}

const char* forward(const ForwardArgs& args, const Plan& plan, void* scratch, void* stream) {
  if (plan.error) return plan.error;
  if (args.shape.batch == 0 || args.shape.channels == 0) return nullptr;
  const ForwardLaunch l{args, plan, static_cast<char*>(scratch)};
  switch (args.dtype) {
    case DType::f64:
      return run<8, false, kAny>(l, plan, stream);
    case DType::f32:
      return plan.vector ? run_vector<4>(l, plan, stream) : run<4, false, kAny>(l, plan, stream);
    default:
      return plan.vector ? run_vector<2>(l, plan, stream) : run<2, false, kAny>(l, plan, stream);
  }
}

}  // namespace gpu
}  // namespace senet
