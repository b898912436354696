// The ops: checks, memory, layouts; then the kernels, which know no torch. The same functions
// serve the CPU and CUDA; what differs is in cpu/host.cpp and cuda/host.cpp.
//
// Schemas and fakes of the private ops are in senet_kernels/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "cpu/host.h"
#include "public_ops.h"
#include "tensors.h"

namespace senet {
namespace {

// The whole operation.
Call make_call(Tensor x, const OptionalTensor& w1, const OptionalTensor& b1, const Tensor& w2,
               const OptionalTensor& b2, const OptionalTensor& alpha, const OptionalTensor& beta,
               const OptionalTensor& affine_scale, const OptionalTensor& affine_shift,
               const OptionalTensor& lengths, int64_t options) {
  STD_TORCH_CHECK((!w1 || w1->dim() >= 2) && w2.dim() >= 2, "w1, w2: expected matrices");
  STD_TORCH_CHECK(w1 || !b1, "b1: expected none without w1");
  const int64_t hidden = w1 ? w1->size(0) : 0, outputs = w2.size(0);
  Call c = make_call(x, affine_scale, affine_shift, lengths, options,
                     w1 ? Form::two_layers : Form::one_layer, hidden, outputs);
  const int64_t channels = c.shape.channels;
  STD_TORCH_CHECK(outputs == channels || outputs == 2 * channels, "w2: expected ", channels, " or ",
                  2 * channels, " rows, got ", outputs);
  c.parameters.w1 = c.matrix("w1", w1, hidden, channels);
  c.parameters.b1 = c.vector("b1", b1, hidden);
  c.parameters.w2 = c.matrix("w2", w2, outputs, c.shape.inner());
  c.parameters.b2 = c.vector("b2", b2, outputs);
  c.parameters.alpha = c.vector("alpha", alpha, channels);
  c.parameters.beta = c.vector("beta", beta, channels);
  return c;
}

// The scaling alone, and its u as the kernels take it.
std::pair<Call, Tensor> make_scale_call(Tensor x, const Tensor& u, const OptionalTensor& alpha,
                                        const OptionalTensor& beta,
                                        const OptionalTensor& affine_scale,
                                        const OptionalTensor& affine_shift, int64_t options) {
  STD_TORCH_CHECK(u.dim() == 2, "u: expected [B, C] or [B, 2C], got ", u.dim(), " dimensions");
  Call c = make_call(x, affine_scale, affine_shift, {}, options, Form::scale, 0, u.size(1));
  const int64_t channels = c.shape.channels;
  STD_TORCH_CHECK(u.size(1) == channels || u.size(1) == 2 * channels, "u: expected ", channels,
                  " or ", 2 * channels, " columns, got ", u.size(1));
  c.parameters.alpha = c.vector("alpha", alpha, channels);
  c.parameters.beta = c.vector("beta", beta, channels);
  return {c, c.vectors("u", u, u.size(1))};
}

size_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// z, h and u one after the other in one buffer.
template <class Args>
void point_into_saved(Args& args, void* base) {
  if (!base) return;
  const Shape& s = args.shape;
  char* p = static_cast<char*>(base);
  const size_t size = element_size(args.dtype);
  args.z = p;
  args.h = p + size * static_cast<size_t>(s.batch * s.channels);
  args.u = p + size * static_cast<size_t>(s.batch * (s.channels + s.hidden));
}

int64_t saved_numel(const Shape& s) { return s.batch * (s.channels + s.hidden + s.outputs); }
int64_t mask_numel(const Shape& s) {
  return s.batch * ((s.channels + 7) / 8) * ((s.positions + 7) / 8) * 8;
}

// Where z, h and u live when no backward pass will want them.
void* own_saved(const Call& c) {
  return c.at.host->saved(element_size(c.dtype) * static_cast<size_t>(saved_numel(c.shape)));
}

// What every kernel is given of a call.
template <class Args>
Args kernel_args(const Call& c) {
  Args args{};
  args.shape = c.shape;
  args.dtype = c.dtype;
  args.options = c.options;
  args.parameters = c.parameters;
  args.lengths = c.lengths;
  return args;
}

// A forward kernel's y, and the mask where it is to be kept.
Tensor point_into_results(ForwardArgs& args, const Call& c, const Result& y, bool save) {
  const bool keep_mask = save && args.options.after == Fn::relu;
  Tensor mask = new_vector(c.at, ScalarType::Byte, keep_mask ? mask_numel(args.shape) : 0);
  if (keep_mask) args.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  args.y = y.data();
  args.y_stride = args.shape.image();
  return mask;
}

// The gradients of the affine map, those that the two lowest bits of `wanted` ask for.
void point_into_affine(BackwardArgs& args, const Call& c, Result& dscale, Result& dshift,
                       const OptionalTensor& scale, const OptionalTensor& shift, int64_t wanted) {
  if (scale && (wanted & 1)) dscale = Result(c.at, *scale, is_matrix_dense(*scale));
  if (shift && (wanted & 2)) dshift = Result(c.at, *shift, is_matrix_dense(*shift));
  args.daffine_scale = dscale.data();
  args.daffine_shift = dshift.data();
}

// What a backward kernel needs to go back through `after`.
void give_after(BackwardArgs& args, Call& c, const OptionalTensor& residual, const Tensor& mask) {
  const Fn after = c.options.after;
  if (after == Fn::relu) {
    c.check_device("mask", mask);
    STD_TORCH_CHECK(mask.numel() == mask_numel(c.shape) && mask.scalar_type() == ScalarType::Byte &&
                        is_matrix_dense(mask),
                    "mask: expected what the forward op returned for these arguments");
    args.mask = static_cast<const uint8_t*>(mask.data_ptr());
  } else if (residual && after != Fn::identity) {
    args.residual = c.images("residual", *residual);
  }
}

// ---- the ops ----

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, OptionalTensor w1, OptionalTensor b1,
                                           Tensor w2, OptionalTensor b2, OptionalTensor residual,
                                           OptionalTensor alpha, OptionalTensor beta,
                                           OptionalTensor affine_scale, OptionalTensor affine_shift,
                                           OptionalTensor lengths, int64_t options, bool save) {
  Call c = make_call(x, w1, b1, w2, b2, alpha, beta, affine_scale, affine_shift, lengths, options);
  auto args = kernel_args<ForwardArgs>(c);
  Result y(c.at, c.like, c.direct);
  Tensor mask = point_into_results(args, c, y, save);
  Tensor saved = new_vector(c.at, accumulation(x), save ? saved_numel(c.shape) : 0);
  args.x = c.images("x", x);
  if (residual) args.residual = c.images("residual", *residual);
  point_into_saved(args, save ? saved.mutable_data_ptr() : own_saved(c));
  c.at.host->forward(args, c.at.index);
  return {y.finish(c.at, x), saved, mask};
}

// y over x. Where the kernels cannot read x itself they work on its copy, which is copied back.
void forward_inplace(Tensor x, OptionalTensor w1, OptionalTensor b1, Tensor w2, OptionalTensor b2,
                     OptionalTensor residual, OptionalTensor alpha, OptionalTensor beta,
                     OptionalTensor affine_scale, OptionalTensor affine_shift,
                     OptionalTensor lengths, int64_t options) {
  Call c = make_call(x, w1, b1, w2, b2, alpha, beta, affine_scale, affine_shift, lengths, options);
  auto args = kernel_args<ForwardArgs>(c);
  Tensor dense = c.in_layout("x", x);
  const bool is_x = dense.data_ptr() == x.data_ptr();
  STD_TORCH_CHECK(!is_x || x.size(0) <= 1 || x.stride(0) >= c.shape.image(),
                  "x: expected images that do not overlap in memory");
  args.y = dense.mutable_data_ptr();
  args.y_stride = dense.stride(0);
  args.x = {args.y, args.y_stride};
  if (residual) args.residual = c.images("residual", *residual);
  point_into_saved(args, own_saved(c));
  c.at.host->forward(args, c.at.index);
  if (!is_x) torch::stable::copy_(x, dense);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dy, Tensor x, OptionalTensor w1, OptionalTensor b1, Tensor w2, OptionalTensor b2,
    OptionalTensor residual, OptionalTensor alpha, OptionalTensor beta, OptionalTensor affine_scale,
    OptionalTensor affine_shift, OptionalTensor lengths, Tensor saved, Tensor mask, int64_t options,
    int64_t needs) {
  Call c = make_call(x, w1, b1, w2, b2, alpha, beta, affine_scale, affine_shift, lengths, options);
  c.check_device("saved", saved);
  STD_TORCH_CHECK(saved.numel() == saved_numel(c.shape) && saved.scalar_type() == accumulation(x) &&
                      is_matrix_dense(saved),
                  "saved: expected what the forward op returned for these arguments");
  auto args = kernel_args<BackwardArgs>(c);
  args.dy = c.images("dy", dy);
  args.x = c.images("x", x);
  give_after(args, c, residual, mask);
  point_into_saved(args, saved.mutable_data_ptr());

  // In the order of Needs in senet_kernels/ops.py.
  // d_residual is laid out like dx; the residual itself is not kept where it is not needed.
  const OptionalTensor of[10] = {c.like, w1,    b1,   w2,           b2,
                                 c.like, alpha, beta, affine_scale, affine_shift};
  void** const into[10] = {
      &args.dx,        &args.dw1,    &args.db1,   &args.dw2,           &args.db2,
      &args.dresidual, &args.dalpha, &args.dbeta, &args.daffine_scale, &args.daffine_shift};
  Result results[10];
  for (int i = 0; i < 10; ++i) {
    if (!of[i] || !(needs >> i & 1)) continue;
    const bool image = i == 0 || i == 5;
    results[i] = Result(c.at, *of[i], image ? c.direct : is_matrix_dense(*of[i]));
    *into[i] = results[i].data();
  }
  c.at.host->backward(args, c.at.index);
  const auto result = [&](int i) { return results[i].finish(c.at, x); };
  return {result(0), result(1), result(2), result(3), result(4),
          result(5), result(6), result(7), result(8), result(9)};
}

Tensor squeeze(Tensor x, OptionalTensor affine_scale, OptionalTensor affine_shift,
               OptionalTensor lengths, int64_t options) {
  Call c = make_call(x, affine_scale, affine_shift, lengths, options, Form::squeeze, 0, 0);
  auto args = kernel_args<ForwardArgs>(c);
  Tensor z = new_matrix(c.at, accumulation(x), c.shape.batch, c.shape.channels);
  args.x = c.images("x", x);
  args.z = z.mutable_data_ptr();
  c.at.host->forward(args, c.at.index);
  return c.converted(z, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> squeeze_backward(Tensor dz, Tensor x,
                                                    OptionalTensor affine_scale,
                                                    OptionalTensor affine_shift,
                                                    OptionalTensor lengths, int64_t options,
                                                    int64_t needs) {
  Call c = make_call(x, affine_scale, affine_shift, lengths, options, Form::squeeze, 0, 0);
  auto args = kernel_args<BackwardArgs>(c);
  const Tensor of_mean = c.vectors("dz", dz, c.shape.channels);
  args.dz = of_mean.data_ptr();
  args.x = c.images("x", x);
  Result dx, daffine_scale, daffine_shift;
  if (needs & 1) dx = Result(c.at, c.like, c.direct);
  point_into_affine(args, c, daffine_scale, daffine_shift, affine_scale, affine_shift, needs >> 1);
  args.dx = dx.data();
  c.at.host->backward(args, c.at.index);
  return {dx.finish(c.at, x), daffine_scale.finish(c.at, x), daffine_shift.finish(c.at, x)};
}

std::tuple<Tensor, Tensor> channel_scale(Tensor x, Tensor u, OptionalTensor residual,
                                         OptionalTensor alpha, OptionalTensor beta,
                                         OptionalTensor affine_scale, OptionalTensor affine_shift,
                                         int64_t options, bool save) {
  auto [c, given] = make_scale_call(x, u, alpha, beta, affine_scale, affine_shift, options);
  auto args = kernel_args<ForwardArgs>(c);
  Result y(c.at, c.like, c.direct);
  Tensor mask = point_into_results(args, c, y, save);
  args.x = c.images("x", x);
  if (residual) args.residual = c.images("residual", *residual);
  args.u = given.data_ptr();
  c.at.host->forward(args, c.at.index);
  return {y.finish(c.at, x), mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> channel_scale_backward(
    Tensor dy, Tensor x, Tensor u, OptionalTensor residual, OptionalTensor alpha,
    OptionalTensor beta, OptionalTensor affine_scale, OptionalTensor affine_shift, Tensor mask,
    int64_t options, int64_t needs) {
  auto [c, given] = make_scale_call(x, u, alpha, beta, affine_scale, affine_shift, options);
  auto args = kernel_args<BackwardArgs>(c);
  args.dy = c.images("dy", dy);
  args.x = c.images("x", x);
  give_after(args, c, residual, mask);
  args.u = given.data_ptr();

  // In the order of the inputs.
  const auto wanted = [needs](int i) { return (needs >> i & 1) != 0; };
  Result dx, dresidual, dalpha, dbeta, daffine_scale, daffine_shift;
  if (wanted(0)) dx = Result(c.at, c.like, c.direct);
  if (wanted(2)) dresidual = Result(c.at, c.like, c.direct);
  if (alpha && wanted(3)) dalpha = Result(c.at, *alpha, is_matrix_dense(*alpha));
  if (beta && wanted(4)) dbeta = Result(c.at, *beta, is_matrix_dense(*beta));
  args.dx = dx.data();
  args.dresidual = dresidual.data();
  args.dalpha = dalpha.data();
  args.dbeta = dbeta.data();
  point_into_affine(args, c, daffine_scale, daffine_shift, affine_scale, affine_shift, needs >> 5);
  Tensor du = new_matrix(c.at, accumulation(x), wanted(1) ? c.shape.batch : 0, c.shape.outputs);
  if (wanted(1)) args.du = du.mutable_data_ptr();
  c.at.host->backward(args, c.at.index);
  du = wanted(1) ? c.converted(du, u.scalar_type()) : new_vector(c.at, x.scalar_type(), 0);
  return {dx.finish(c.at, x),           du,
          dresidual.finish(c.at, x),    dalpha.finish(c.at, x),
          dbeta.finish(c.at, x),        daffine_scale.finish(c.at, x),
          daffine_shift.finish(c.at, x)};
}

// ---- the public ops: options by name, y alone ----
//
// Their schemas are in senet_kernels/public_ops.py too, which defines what is missing.

Fn fn_of(const char* argument, const std::string& name, bool FnName::* legal) {
  for (const FnName& row : kFnNames)
    if (row.*legal && name == row.name) return row.fn;
  std::string known;
  for (const FnName& row : kFnNames)
    if (row.*legal) known += (known.empty() ? "" : ", ") + std::string(row.name);
  STD_TORCH_CHECK(false, argument, ": expected one of ", known, ", got '", name, "'");
  return Fn::identity;
}

int64_t pack_options(const std::string& activation, const std::string& gate,
                     const std::string& before, const std::string& after) {
  const Fn chosen[] = {fn_of("activation", activation, &FnName::is_activation),
                       fn_of("gate", gate, &FnName::is_gate),
                       fn_of("before", before, &FnName::is_activation),
                       fn_of("after", after, &FnName::is_activation)};
  int64_t code = 0;
  for (int i = 0; i < 4; ++i) code |= static_cast<int64_t>(chosen[i]) << (4 * i);
  return code;
}

void refuse_reserved(const OptionalTensor& mask, const std::string& pool) {
  STD_TORCH_CHECK(!mask, "mask: expected None, as it is reserved for a later version");
  STD_TORCH_CHECK(pool == "mean",
                  "pool: expected 'mean', as others are reserved for a later "
                  "version, got '",
                  pool, "'");
}

constexpr const char* kSqueezeExciteSchema =
    "squeeze_excite(Tensor x, Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, *, "
    "str activation=\"relu\", str gate=\"sigmoid\", str before=\"identity\", "
    "Tensor? affine_scale=None, Tensor? affine_shift=None, str after=\"identity\", "
    "Tensor? residual=None, Tensor? alpha=None, Tensor? beta=None, Tensor? lengths=None, "
    "Tensor? mask=None, str pool=\"mean\") -> Tensor";
constexpr const char* kSqueezeSchema =
    "squeeze(Tensor x, *, str before=\"identity\", Tensor? affine_scale=None, "
    "Tensor? affine_shift=None, Tensor? lengths=None, Tensor? mask=None, str pool=\"mean\") "
    "-> Tensor";
constexpr const char* kChannelScaleSchema =
    "channel_scale(Tensor x, Tensor u, *, str gate=\"identity\", str before=\"identity\", "
    "Tensor? affine_scale=None, Tensor? affine_shift=None, str after=\"identity\", "
    "Tensor? residual=None, Tensor? alpha=None, Tensor? beta=None) -> Tensor";

}  // namespace

Tensor public_squeeze_excite(Tensor x, OptionalTensor w1, OptionalTensor b1, Tensor w2,
                             OptionalTensor b2, std::string activation, std::string gate,
                             std::string before, OptionalTensor affine_scale,
                             OptionalTensor affine_shift, std::string after,
                             OptionalTensor residual, OptionalTensor alpha, OptionalTensor beta,
                             OptionalTensor lengths, OptionalTensor mask, std::string pool) {
  refuse_reserved(mask, pool);
  return std::get<0>(forward(x, w1, b1, w2, b2, residual, alpha, beta, affine_scale, affine_shift,
                             lengths, pack_options(activation, gate, before, after), false));
}

Tensor public_squeeze(Tensor x, std::string before, OptionalTensor affine_scale,
                      OptionalTensor affine_shift, OptionalTensor lengths, OptionalTensor mask,
                      std::string pool) {
  refuse_reserved(mask, pool);
  return squeeze(x, affine_scale, affine_shift, lengths,
                 pack_options("identity", "identity", before, "identity"));
}

Tensor public_channel_scale(Tensor x, Tensor u, std::string gate, std::string before,
                            OptionalTensor affine_scale, OptionalTensor affine_shift,
                            std::string after, OptionalTensor residual, OptionalTensor alpha,
                            OptionalTensor beta) {
  return std::get<0>(channel_scale(x, u, residual, alpha, beta, affine_scale, affine_shift,
                                   pack_options("identity", gate, before, after), false));
}

const Host& host_of(const Tensor& x) {
#if defined(SENET_SIMT)  // tests/simt: the CUDA kernels, run on the CPU
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  return cuda_host();
#else
#if SENET_CUDA
  if (x.is_cuda()) return cuda_host();
#endif
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  return cpu_host();
#endif
}

namespace {

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("native_forward", TORCH_BOX(&forward));
  m.impl("native_forward_", TORCH_BOX(&forward_inplace));
  m.impl("native_backward", TORCH_BOX(&backward));
  m.impl("native_squeeze", TORCH_BOX(&squeeze));
  m.impl("native_squeeze_backward", TORCH_BOX(&squeeze_backward));
  m.impl("native_channel_scale", TORCH_BOX(&channel_scale));
  m.impl("native_channel_scale_backward", TORCH_BOX(&channel_scale_backward));
}

// What a process without Python calls; with Python, senet_kernels/public_kernels.py comes first.
[[maybe_unused]] void register_public_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("squeeze_excite", TORCH_BOX(&public_squeeze_excite));
  m.impl("squeeze", TORCH_BOX(&public_squeeze));
  m.impl("channel_scale", TORCH_BOX(&public_channel_scale));
}

// Where Python, or another copy of this library, has defined an op already, its definition stays:
// STABLE_TORCH_LIBRARY_FRAGMENT would end the process instead.
[[maybe_unused]] bool define_public_ops() {
  static TorchLibraryHandle library = nullptr;  // definitions live as long as it does
  if (aoti_torch_library_init_fragment("senet_kernels", __FILE__, __LINE__, &library)) return false;
  for (const char* schema : {kSqueezeExciteSchema, kSqueezeSchema, kChannelScaleSchema})
    (void)aoti_torch_library_def(library, schema);
  return true;
}

}  // namespace

Tensor new_strided(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType dtype,
                   int32_t device, int32_t index) {
  using torch::stable::detail::from, torch::stable::detail::to;
  AtenTensorHandle handle = nullptr;
  AOTITorchError error;
  if (dispatching.load(std::memory_order_relaxed) > 0) {
    const auto n = static_cast<size_t>(dims);
    const torch::stable::Device on(static_cast<torch::headeronly::DeviceType>(device), index);
    std::array<StableIValue, 6> stack{from(torch::headeronly::IntHeaderOnlyArrayRef(sizes, n)),
                                      from(torch::headeronly::IntHeaderOnlyArrayRef(strides, n)),
                                      from(std::optional(dtype)),
                                      from(std::nullopt),
                                      from(std::optional(on)),
                                      from(std::nullopt)};
    error = torch_call_dispatcher("aten::empty_strided", "", stack.data(), TORCH_ABI_VERSION);
    if (error == AOTI_TORCH_SUCCESS) return to<Tensor>(stack[0]);
  } else {
    const auto code = to<int32_t>(from(dtype));
    error = aoti_torch_empty_strided(dims, sizes, strides, code, device, index, &handle);
  }
  if (error != AOTI_TORCH_SUCCESS) {
    int64_t n = 1;
    for (int64_t d = 0; d < dims; ++d) n *= sizes[d];
    STD_TORCH_CHECK(false, "out of memory: cannot allocate a tensor of ", n, " elements");
  }
  return Tensor(handle);
}

}  // namespace senet

#if defined(SENET_SIMT)
STABLE_TORCH_LIBRARY_IMPL(senet_simt, CPU, m) { senet::register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(senet_simt, CompositeExplicitAutograd, m) {
  m.impl("native_dispatch_allocations", TORCH_BOX(&senet::dispatch_allocations));
}
#else
namespace {
[[maybe_unused]] const bool defined = senet::define_public_ops();
}
STABLE_TORCH_LIBRARY_IMPL(senet_kernels, CPU, m) {
  senet::register_ops(m);
  senet::register_public_ops(m);
}
#if SENET_CUDA
STABLE_TORCH_LIBRARY_IMPL(senet_kernels, CUDA, m) {
  senet::register_ops(m);
  senet::register_public_ops(m);
}
#endif
STABLE_TORCH_LIBRARY_IMPL(senet_kernels, CompositeExplicitAutograd, m) {
  m.impl("native_isa", TORCH_BOX(&senet::cpu_isa));
  m.impl("native_dispatch_allocations", TORCH_BOX(&senet::dispatch_allocations));
#if SENET_CUDA
  m.impl("native_plan", TORCH_BOX(&senet::cuda_plan));
#endif
}
#endif
