// The forward kernels' instances, and their launch.
#include "forward.cuh"
#include "launch.h"

namespace senet {
namespace gpu {
namespace {

struct ForwardKernels {
  template <int kBytes, bool kVector, int kBefore, Way kWay>
  static auto kernel() {
    return forward_kernel<kBytes, kVector, kBefore, static_cast<int>(kWay)>;
  }
  static auto of_networks() { return kernel<2, true, static_cast<int>(Fn::identity), Way::lean>(); }
};

}  // namespace

const char* forward(const ForwardArgs& args, const Plan& plan, void* scratch, int index,
                    void* stream) {
  if (plan.error) return plan.error;
  if (args.shape.batch == 0) return nullptr;
  static OncePerDevice once;
  preload(once, index, stream, [](auto prepare) { with_every_instance<ForwardKernels>(prepare); });
  const ForwardLaunch l{args, plan, static_cast<char*>(scratch)};
  return with_instance<ForwardKernels>(
      args.dtype, args.options.before, plan, [&](auto* kernel, Prepared& prepared) {
        return launch(kernel, prepared, plan, int64_t(plan.groups) * plan.blocks, l, index, stream);
      });
}

Room forward_room(const Task& task, const Plan& plan, int index, const Device& device) {
  return with_instance<ForwardKernels>(task.dtype, task.before, plan,
                                       [&](auto* kernel, Prepared& prepared) {
                                         return room_for(kernel, prepared, plan, index, device);
                                       });
}

// A library built for sm_80 runs on sm_90 too, from PTX, but then has no clusters.
cudaError_t compiled_capability(int* capability, const Device& device) {
  cudaFuncAttributes attributes{};
  auto* const kernel = ForwardKernels::of_networks();
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && attributes.ptxVersion < device.capability) {
    *capability = attributes.ptxVersion;
  }
  return error;
}

int largest_cluster(const Device& device) {
  Plan plan;
  plan.exchange = Exchange::cluster;
  plan.threads = kForwardThreads;
  plan.shared = static_cast<int>(device.shared_per_block);
  auto* const kernel = ForwardKernels::of_networks();
  const void* symbol = reinterpret_cast<const void*>(kernel);
  cudaFuncSetAttribute(symbol, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared);
  cudaFuncSetAttribute(symbol, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  int largest = 1;
  for (plan.blocks = 16; plan.blocks > 1 && largest == 1; plan.blocks /= 2) {
    Configuration c(plan, plan.blocks, nullptr);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &c.config) == cudaSuccess &&
        clusters > 0) {
      largest = plan.blocks;
    }
  }
  cudaGetLastError();  // a size too large is no error of the program's
  return largest;
}

}  // namespace gpu
}  // namespace senet
