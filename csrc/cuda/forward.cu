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
  switch (l.a.options.before) {
    case Fn::identity:
      return run<kBytes, true, Fn::identity>(l, plan, stream);
    case Fn::relu:
      return run<kBytes, true, Fn::relu>(l, plan, stream);
    case Fn::silu:
      return run<kBytes, true, Fn::silu>(l, plan, stream);
    case Fn::hardswish:
      return run<kBytes, true, Fn::hardswish>(l, plan, stream);
    default:
      return run<kBytes, true, kAny>(l, plan, stream);
  }
}

}  // namespace

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
