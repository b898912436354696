// The backward kernels' instances, and their launch.
#include "backward.cuh"
#include "gradients.cuh"
#include "launch.h"

namespace senet {
namespace gpu {
namespace {

template <int kBytes, bool kVector, Fn kBefore>
const char* run(const BackwardLaunch& l, const Plan& plan, void* stream) {
  static Allowed allowed;
  return launch(backward_kernel<kBytes, kVector, static_cast<int>(kBefore)>, allowed, plan,
                int64_t(plan.groups) * plan.blocks, l, stream);
}

template <int kBytes>
const char* run_vector(const BackwardLaunch& l, const Plan& plan, void* stream) {
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

const char* run(const BackwardLaunch& l, const Plan& plan, void* stream) {
  switch (l.a.dtype) {
    case DType::f64:
      return run<8, false, kAny>(l, plan, stream);
    case DType::f32:
      return plan.vector ? run_vector<4>(l, plan, stream) : run<4, false, kAny>(l, plan, stream);
    default:
      return plan.vector ? run_vector<2>(l, plan, stream) : run<2, false, kAny>(l, plan, stream);
  }
}

const char* run_gradients(const BackwardLaunch& l, void* stream) {
  const BackwardArgs& a = l.a;
  const Shape& s = a.shape;
  const int c = static_cast<int>(s.channels), r = static_cast<int>(s.hidden);
  const int outputs = static_cast<int>(s.outputs), inner = static_cast<int>(s.inner());
  const bool two = s.form == Form::two_layers;
  const Fn none = Fn::identity;
  GradientsLaunch g{};
  g.products[0] = {a.dw2,   l.du,  two ? a.h : a.z,      outputs, inner,
                   outputs, inner, a.options.activation, two,     nullptr,
                   0};
  g.products[1] = {a.dw1, l.dh, a.z, r, c, r, c, none, false, nullptr, 0};
  g.products[2] = {a.db2, nullptr, l.du, 0, outputs, 1, outputs, none, false, nullptr, 0};
  g.products[3] = {a.db1, nullptr, l.dh, 0, r, 1, r, none, false, nullptr, 0};
  g.products[4] = {a.dalpha, nullptr, l.ds, 0, c, 1, c, none, false, nullptr, 0};
  g.products[5] = {a.dbeta, nullptr, l.ds, 0, c, 1, c, a.options.gate, true, a.u, outputs};
  g.batch = s.batch;
  g.dtype = a.parameters.dtype;
  int64_t blocks = 0;
  for (const OuterProduct& o : g.products) blocks += o.tiles();
  if (blocks == 0) return nullptr;
  Plan plan;
  plan.threads = kGradientThreads;
  plan.shared = kTile * kTile * (a.dtype == DType::f64 ? 8 : 4);
  static Allowed of_float, of_double;
  return a.dtype == DType::f64
             ? launch(gradients_kernel<double>, of_double, plan, blocks, g, stream)
             : launch(gradients_kernel<float>, of_float, plan, blocks, g, stream);
}

}  // namespace

const char* backward(const BackwardArgs& args, const Plan& plan, void* scratch, void* stream) {
  if (plan.error) return plan.error;
  char* const memory = static_cast<char*>(scratch);
  const bool parameters = args.dw1 || args.db1 || args.dw2 || args.db2 || args.dalpha || args.dbeta;
  BackwardLaunch l{args, plan, memory, false, nullptr, nullptr, nullptr};
  const bool whole = args.shape.form == Form::two_layers || args.shape.form == Form::one_layer;
  l.wants_sums = parameters || args.du || (whole && args.dx);
  if (parameters) {
    l.du = memory + plan.of_du;
    l.dh = memory + plan.of_dh;
  }
  if (args.du) l.du = args.du;
  if (args.dalpha || args.dbeta) l.ds = memory + plan.of_ds;
  if (args.shape.batch > 0 && args.shape.channels > 0) {
    if (const char* error = run(l, plan, stream)) return error;
  }
  return parameters ? run_gradients(l, stream) : nullptr;
}

}  // namespace gpu
}  // namespace senet
