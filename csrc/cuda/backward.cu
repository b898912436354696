// The backward kernels' instances, and their launch.
#include "backward.cuh"
#include "gradients.cuh"
#include "launch.h"

namespace senet {
namespace gpu {
namespace {

struct BackwardKernels {
  template <int kBytes, bool kVector, int kBefore, Way kWay>
  static auto kernel() {
    return backward_kernel<kBytes, kVector, kBefore, static_cast<int>(kWay)>;
  }
};

Prepared gradients_of_float, gradients_of_double;

const char* run_gradients(const BackwardLaunch& l, int index, void* stream) {
  const BackwardArgs& a = l.a;
  const Shape& s = a.shape;
  const int c = static_cast<int>(s.channels), r = static_cast<int>(s.hidden);
  const int outputs = static_cast<int>(s.outputs), inner = static_cast<int>(s.inner());
  const bool two = s.form == Form::two_layers;
  const Fn none = Fn::identity;
  GradientsLaunch g{};
  const int64_t n = s.batch;
  const int64_t parts = l.plan.axis == Axis::space ? n * l.plan.blocks : n;
  const void *du = l.du, *dh = l.dh, *ds = l.ds, *h = two ? a.h : a.z;
  // out, left, right, pitches, rows, columns, function of right, apply it, gates, pitch, images
  const auto vector = [none](void* out, const void* right, int length, int64_t images) {
    return OuterProduct{out, nullptr, right, 0, length, 1, length, none, false, nullptr, 0, images};
  };
  const Fn activation = a.options.activation;
  g.products[0] = {a.dw2, du, h, outputs, inner, outputs, inner, activation, two, nullptr, 0, n};
  g.products[1] = {a.dw1, dh, a.z, r, c, r, c, none, false, nullptr, 0, n};
  g.products[2] = vector(a.db2, du, outputs, n);
  g.products[3] = vector(a.db1, dh, r, n);
  g.products[4] = vector(a.dalpha, ds, c, n);
  g.products[5] = vector(a.dbeta, ds, c, n);
  g.products[5].of_right = a.options.gate;
  g.products[5].apply = true;
  g.products[5].gates = a.u;
  g.products[5].gates_pitch = outputs;
  g.products[6] = vector(a.daffine_scale, l.da, c, parts);
  g.products[7] = vector(a.daffine_shift, l.db, c, parts);
  g.dtype = a.parameters.dtype;
  int64_t blocks = 0;
  for (const OuterProduct& o : g.products) blocks += o.tiles();
  if (blocks == 0) return nullptr;
  Plan plan;
  plan.threads = kGradientThreads;
  plan.shared = kTile * kTile * (a.dtype == DType::f64 ? 8 : 4);
  return a.dtype == DType::f64
             ? launch(gradients_kernel<double>, gradients_of_double, plan, blocks, g, index, stream)
             : launch(gradients_kernel<float>, gradients_of_float, plan, blocks, g, index, stream);
}

}  // namespace

const char* backward(const BackwardArgs& args, const Plan& plan, void* scratch, int index,
                     void* stream) {
  if (plan.error) return plan.error;
  static OncePerDevice once;
  preload(once, index, stream, [](auto prepare) {
    with_every_instance<BackwardKernels>(prepare);
    prepare(gradients_kernel<float>, gradients_of_float);
    prepare(gradients_kernel<double>, gradients_of_double);
  });
  char* const memory = static_cast<char*>(scratch);
  const bool layers = args.dw1 || args.db1 || args.dw2 || args.db2 || args.dalpha || args.dbeta;
  const bool affine = args.daffine_scale || args.daffine_shift;
  BackwardLaunch l{};
  l.a = args;
  l.plan = plan;
  l.scratch = memory;
  const bool whole = args.shape.form == Form::two_layers || args.shape.form == Form::one_layer;
  l.wants_sums = layers || args.du || (whole && (args.dx || affine));
  l.needs_dz = args.dx || affine;
  if (layers) {
    l.du = memory + plan.of_du;
    l.dh = memory + plan.of_dh;
  }
  if (args.du) l.du = args.du;
  if (args.dalpha || args.dbeta) l.ds = memory + plan.of_ds;
  if (affine) {
    const int64_t images = args.shape.batch * (plan.axis == Axis::space ? plan.blocks : 1);
    l.da = memory + plan.of_daffine;
    l.db = memory + plan.of_daffine +
           images * args.shape.channels * (args.dtype == DType::f64 ? 8 : 4);
  }
  if (args.shape.batch > 0) {
    const char* error = with_instance<BackwardKernels>(
        args.dtype, args.options.before, plan, [&](auto* kernel, Prepared& prepared) {
          return launch(kernel, prepared, plan, int64_t(plan.groups) * plan.blocks, l, index,
                        stream);
        });
    if (error) return error;
  }
  return layers || affine ? run_gradients(l, index, stream) : nullptr;
}

Room backward_room(const Task& task, const Plan& plan, int index, const Device& device) {
  return with_instance<BackwardKernels>(task.dtype, task.before, plan,
                                        [&](auto* kernel, Prepared& prepared) {
                                          return room_for(kernel, prepared, plan, index, device);
                                        });
}

}  // namespace gpu
}  // namespace senet
