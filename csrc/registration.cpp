// The ops' CPU implementation: checks, memory, layouts; then the kernels, which know no torch.
//
// The only file that includes torch headers, and of these the stable ABI alone, so that one build
// serves every torch from 2.11 on. Schemas and fakes are in senet_kernels/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "se.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- the instruction set ----

struct Kernels {
  const char* name;
  void (*forward)(const senet::ForwardArgs&, const senet::Runtime&);
  void (*backward)(const senet::BackwardArgs&, const senet::Runtime&);
};

// The widest set this processor has; SENET_KERNELS_ISA names another (for tests and bug reports).
const Kernels& kernels() {
  static const Kernels chosen = [] {
    std::vector<Kernels> usable = {
        {"baseline", senet::baseline::forward, senet::baseline::backward}};
#if defined(SENET_X86)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      usable.push_back({"avx2", senet::avx2::forward, senet::avx2::backward});
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        usable.push_back({"avx512", senet::avx512::forward, senet::avx512::backward});
      }
    }
#endif
    const char* wanted = std::getenv("SENET_KERNELS_ISA");
    if (!wanted || !*wanted) return usable.back();
    for (const Kernels& k : usable) {
      if (std::string(wanted) == k.name) return k;
    }
    STD_TORCH_CHECK(false, "SENET_KERNELS_ISA: this processor does not run ", wanted);
    return usable.front();
  }();
  return chosen;
}

std::string isa() { return kernels().name; }

// ---- threads and scratch memory ----

// SENET_KERNELS_POISON=1, for tests: all memory starts as NaN, scratch memory anew in each call,
// so that whatever a kernel reads or returns without having written it shows.
bool poisons() {
  static const bool on = [] {
    const char* value = std::getenv("SENET_KERNELS_POISON");
    return value && *value == '1';
  }();
  return on;
}

// A growing buffer per calling thread: no allocation per call once warm. kFor tells one use from
// another, whose memory must live at the same time.
enum class For { kernels, saved };
template <For kFor>
void* scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local size_t size = 0;
  if (bytes > size) {
    buffer.reset();
    size = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.reset(std::aligned_alloc(64, rounded));
    STD_TORCH_CHECK(buffer != nullptr, "out of memory: ", rounded, " bytes of scratch memory");
    size = rounded;
  }
  if (poisons()) std::memset(buffer.get(), 0xff, bytes);
  return buffer.get();
}

void parallel_for(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, 1,
                              [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

senet::Runtime runtime() {
  return {static_cast<int>(torch::stable::get_num_threads()), parallel_for, scratch<For::kernels>};
}

// ---- dtypes and layouts ----

senet::DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return senet::DType::f32;
    case ScalarType::BFloat16:
      return senet::DType::bf16;
    case ScalarType::Half:
      return senet::DType::f16;
    case ScalarType::Double:
      return senet::DType::f64;
    default:
      STD_TORCH_CHECK(false, name,
                      ": expected dtype float32, bfloat16, float16 or float64, got another");
  }
  return senet::DType::f32;
}

ScalarType accumulation(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

int64_t positions_of(const Tensor& x) {
  int64_t n = 1;
  for (int64_t d = 2; d < x.dim(); ++d) n *= x.size(d);
  return n;
}

// Whether every image of t is dense in the layout: positions adjacent, or channels adjacent. The
// stride between images may be anything.
bool image_is_dense(const Tensor& t, bool channels_last) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t channels = sizes[1];
  int64_t expected = channels_last ? channels : 1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return channels == 1 || strides[1] == (channels_last ? 1 : expected);
}

// The layout the kernels use for x: channels-last only where it differs from rows.
// senet_kernels/ops.py, inner_is_channels, says the same to Python.
bool is_channels_last(const Tensor& like_x, int64_t channels, int64_t positions) {
  return channels > 1 && positions > 1 && like_x.strides()[1] == 1 && image_is_dense(like_x, true);
}

bool is_matrix_dense(const Tensor& t) {  // row-major, whatever the strides of extents of 1
  int64_t expected = 1;
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// An uninitialised dense CPU tensor; the dispatcher is left out, which a small call notices.
Tensor new_dense(ScalarType dtype, const int64_t* sizes, const int64_t* strides, int64_t dims) {
  AtenTensorHandle handle = nullptr;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, code,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  Tensor t(handle);
  if (poisons() && t.numel()) {
    std::memset(t.mutable_data_ptr(), 0xff, static_cast<size_t>(t.numel()) * t.element_size());
  }
  return t;
}
Tensor new_vector(ScalarType dtype, int64_t n) {
  const int64_t stride = 1;
  return new_dense(dtype, &n, &stride, 1);
}
Tensor new_matrix(ScalarType dtype, int64_t rows, int64_t columns) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {std::max<int64_t>(1, columns), 1};
  return new_dense(dtype, sizes, strides, 2);
}

// A result shaped like `like`, written by the kernels in their own layout: into itself where that
// is one of theirs, else into a dense twin that is copied over at the end.
class Result {
 public:
  Result() = default;
  // direct: `like` is dense and in one of the kernels' layouts.
  Result(const Tensor& like, bool direct) : direct_(direct) {
    if (direct) {
      written_ = result_ =
          new_dense(like.scalar_type(), like.sizes().data(), like.strides().data(), like.dim());
    } else {
      result_ = torch::stable::empty_like(like);
      written_ = torch::stable::new_empty(like, like.sizes());
    }
  }
  void* data() const { return written_ ? written_->mutable_data_ptr() : nullptr; }
  // The finished result; an empty tensor where none was asked for.
  Tensor finish(const Tensor& like) {
    if (!result_) return new_vector(like.scalar_type(), 0);
    if (!direct_) torch::stable::copy_(*result_, *written_);
    return *result_;
  }

 private:
  OptionalTensor result_, written_;
  bool direct_ = true;
};

// ---- the arguments all ops share ----

struct Call {
  Tensor x;
  senet::Shape shape;
  senet::DType dtype;
  senet::Options options;
  senet::Parameters parameters;
  const int64_t* lengths;
  Tensor like;                               // empty, with the strides of y and dx
  bool direct;                               // whether y and dx are in a layout of the kernels
  std::optional<ScalarType> parameter_type;  // once there was a parameter
  std::vector<Tensor> copies;                // keeps alive what had to be copied

  // t in the kernels' layout: itself, or a copy.
  Tensor in_layout(const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, ": expected the dtype of x");
    STD_TORCH_CHECK(
        t.dim() == x.dim() && std::equal(t.sizes().begin(), t.sizes().end(), x.sizes().begin()),
        name, ": expected the shape of x");
    if (image_is_dense(t, shape.channels_last)) return t;
    Tensor copy = direct ? torch::stable::empty_like(like) : torch::stable::new_empty(x, x.sizes());
    torch::stable::copy_(copy, t);
    copies.push_back(copy);
    return copy;
  }
  senet::Images images(const char* name, const Tensor& t) {
    const Tensor dense = in_layout(name, t);
    return {dense.data_ptr(), dense.stride(0)};
  }

  const void* parameter(const char* name, const OptionalTensor& t, int64_t rows, int64_t columns) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->is_cpu(), name, ": expected a CPU tensor");
    STD_TORCH_CHECK(t->dim() >= 1 && t->size(0) == rows && t->numel() == rows * columns &&
                        (columns == 1 || (t->dim() >= 2 && t->size(1) == columns)),
                    name, ": expected shape [", rows, ", ", columns,
                    "] with optional trailing extents of 1");
    if (!parameter_type) {
      parameter_type = t->scalar_type();
      parameters.dtype = dtype_of(name, *t);
      STD_TORCH_CHECK(parameters.dtype == dtype ||
                          (parameters.dtype == senet::DType::f32 && dtype != senet::DType::f64),
                      name, ": expected the dtype of x or float32");
    }
    STD_TORCH_CHECK(t->scalar_type() == *parameter_type, name,
                    ": expected the dtype of the other parameters");
    if (is_matrix_dense(*t)) return t->data_ptr();
    copies.push_back(torch::stable::contiguous(*t));
    return copies.back().data_ptr();
  }

  // t as the kernels take vectors of an image: [B, columns], dense, in the accumulation type.
  Tensor vectors(const char* name, const Tensor& t, int64_t columns) const {
    STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == shape.batch && t.size(1) == columns, name,
                    ": expected shape [", shape.batch, ", ", columns, "]");
    dtype_of(name, t);
    return is_matrix_dense(t) ? converted(t, accumulation(x)) : converted_copy(t, accumulation(x));
  }

  static Tensor converted_copy(const Tensor& t, ScalarType dtype) {
    Tensor copy = new_matrix(dtype, t.size(0), t.size(1));
    torch::stable::copy_(copy, t);
    return copy;
  }
  static Tensor converted(const Tensor& t, ScalarType dtype) {
    return t.scalar_type() == dtype ? t : converted_copy(t, dtype);
  }
};

// x, the options and the layout; parameters are the caller's.
Call make_call(Tensor x, const OptionalTensor& affine_scale, const OptionalTensor& affine_shift,
               const OptionalTensor& lengths, int64_t options, senet::Form form, int64_t hidden,
               int64_t outputs) {
  STD_TORCH_CHECK(affine_scale.has_value() == affine_shift.has_value(),
                  "before_affine: expected both of its tensors, or none");
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  STD_TORCH_CHECK(x.dim() >= 3, "x: expected [B, C, *spatial], got ", x.dim(), " dimensions");
  Call c{x, {}, dtype_of("x", x), senet::unpack_options(options), {}, nullptr, x, true, {}, {}};
  const auto legal = [](senet::Fn f) { return f <= senet::Fn::tanh; };
  STD_TORCH_CHECK(options >= 0 && options < (1 << 16) && legal(c.options.activation) &&
                      legal(c.options.gate) && legal(c.options.before) && legal(c.options.after),
                  "options: ", options, " is no packing of known functions");
  const int64_t channels = x.size(1);
  c.shape = {form, x.size(0), channels, positions_of(x), hidden, outputs, false};
  // empty_like keeps the strides of a dense tensor, so x itself tells the layout of y and dx.
  const bool x_is_dense = x.size(0) <= 1 || x.stride(0) == c.shape.image();
  const bool rows = image_is_dense(x, false);
  bool last = is_channels_last(x, channels, c.shape.positions);
  if (!x_is_dense || (!rows && !last)) {
    c.like = torch::stable::empty_like(x);
    last = is_channels_last(c.like, channels, c.shape.positions);
    c.direct = last || image_is_dense(c.like, false);
    // A stride between images that is not theirs side by side: some other order of axes.
    if (x.size(0) > 1 && c.like.stride(0) != c.shape.image()) c.direct = false;
    if (!c.direct) last = false;
  }
  c.shape.channels_last = last;
  c.parameters.dtype = c.dtype;
  c.parameters.affine_scale = c.parameter("before_affine[0]", affine_scale, channels, 1);
  c.parameters.affine_shift = c.parameter("before_affine[1]", affine_shift, channels, 1);

  if (lengths) {
    STD_TORCH_CHECK(lengths->is_cpu(), "lengths: expected a CPU tensor");
    STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Long, "lengths: expected dtype int64");
    STD_TORCH_CHECK(lengths->dim() == 1 && lengths->size(0) == x.size(0),
                    "lengths: expected shape [", x.size(0), "]");
    Tensor dense = is_matrix_dense(*lengths) ? *lengths : torch::stable::contiguous(*lengths);
    c.lengths = static_cast<const int64_t*>(dense.data_ptr());
    c.copies.push_back(dense);
  }
  return c;
}

// The whole operation.
Call make_call(Tensor x, const OptionalTensor& w1, const OptionalTensor& b1, const Tensor& w2,
               const OptionalTensor& b2, const OptionalTensor& alpha, const OptionalTensor& beta,
               const OptionalTensor& affine_scale, const OptionalTensor& affine_shift,
               const OptionalTensor& lengths, int64_t options) {
  STD_TORCH_CHECK((!w1 || w1->dim() >= 2) && w2.dim() >= 2, "w1, w2: expected matrices");
  STD_TORCH_CHECK(w1 || !b1, "b1: expected none without w1");
  const int64_t hidden = w1 ? w1->size(0) : 0, outputs = w2.size(0);
  Call c = make_call(x, affine_scale, affine_shift, lengths, options,
                     w1 ? senet::Form::two_layers : senet::Form::one_layer, hidden, outputs);
  const int64_t channels = c.shape.channels;
  STD_TORCH_CHECK(outputs == channels || outputs == 2 * channels, "w2: expected ", channels, " or ",
                  2 * channels, " rows, got ", outputs);
  c.parameters.w1 = c.parameter("w1", w1, hidden, channels);
  c.parameters.b1 = c.parameter("b1", b1, hidden, 1);
  c.parameters.w2 = c.parameter("w2", w2, outputs, c.shape.inner());
  c.parameters.b2 = c.parameter("b2", b2, outputs, 1);
  c.parameters.alpha = c.parameter("alpha", alpha, channels, 1);
  c.parameters.beta = c.parameter("beta", beta, channels, 1);
  return c;
}

// The scaling alone, and its u as the kernels take it.
std::pair<Call, Tensor> make_scale_call(Tensor x, const Tensor& u, const OptionalTensor& alpha,
                                        const OptionalTensor& beta,
                                        const OptionalTensor& affine_scale,
                                        const OptionalTensor& affine_shift, int64_t options) {
  STD_TORCH_CHECK(u.dim() == 2, "u: expected [B, C] or [B, 2C], got ", u.dim(), " dimensions");
  Call c = make_call(x, affine_scale, affine_shift, {}, options, senet::Form::scale, 0, u.size(1));
  const int64_t channels = c.shape.channels;
  STD_TORCH_CHECK(u.size(1) == channels || u.size(1) == 2 * channels, "u: expected ", channels,
                  " or ", 2 * channels, " columns, got ", u.size(1));
  c.parameters.alpha = c.parameter("alpha", alpha, channels, 1);
  c.parameters.beta = c.parameter("beta", beta, channels, 1);
  return {c, c.vectors("u", u, u.size(1))};
}

size_t element_size(senet::DType dtype) { return dtype == senet::DType::f64 ? 8 : 4; }

// z, h and u one after the other in one buffer.
template <class Args>
void point_into_saved(Args& args, void* base) {
  const senet::Shape& s = args.shape;
  char* p = static_cast<char*>(base);
  const size_t size = element_size(args.dtype);
  args.z = p;
  args.h = p + size * static_cast<size_t>(s.batch * s.channels);
  args.u = p + size * static_cast<size_t>(s.batch * (s.channels + s.hidden));
}

int64_t saved_numel(const senet::Shape& s) { return s.batch * (s.channels + s.hidden + s.outputs); }
int64_t mask_numel(const senet::Shape& s) {
  return s.batch * ((s.channels + 7) / 8) * ((s.positions + 7) / 8) * 8;
}

// Where z, h and u live when no backward pass will want them.
void* own_saved(const senet::Shape& s, senet::DType dtype) {
  return scratch<For::saved>(element_size(dtype) * static_cast<size_t>(saved_numel(s)));
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
Tensor point_into_results(senet::ForwardArgs& args, const Result& y, bool save) {
  const bool keep_mask = save && args.options.after == senet::Fn::relu;
  Tensor mask = new_vector(ScalarType::Byte, keep_mask ? mask_numel(args.shape) : 0);
  if (keep_mask) args.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  args.y = y.data();
  args.y_stride = args.shape.image();
  return mask;
}

// The gradients of the affine map, those that the two lowest bits of `wanted` ask for.
void point_into_affine(senet::BackwardArgs& args, Result& dscale, Result& dshift,
                       const OptionalTensor& scale, const OptionalTensor& shift, int64_t wanted) {
  if (scale && (wanted & 1)) dscale = Result(*scale, is_matrix_dense(*scale));
  if (shift && (wanted & 2)) dshift = Result(*shift, is_matrix_dense(*shift));
  args.daffine_scale = dscale.data();
  args.daffine_shift = dshift.data();
}

// What a backward kernel needs to go back through `after`.
void give_after(senet::BackwardArgs& args, Call& c, const OptionalTensor& residual,
                const Tensor& mask) {
  const senet::Fn after = c.options.after;
  if (after == senet::Fn::relu) {
    STD_TORCH_CHECK(mask.is_cpu() && mask.numel() == mask_numel(c.shape),
                    "mask: expected what the forward op returned for these arguments");
    args.mask = static_cast<const uint8_t*>(mask.data_ptr());
  } else if (residual && after != senet::Fn::identity) {
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
  auto args = kernel_args<senet::ForwardArgs>(c);
  Result y(c.like, c.direct);
  Tensor mask = point_into_results(args, y, save);
  Tensor saved = new_vector(accumulation(x), save ? saved_numel(c.shape) : 0);
  args.x = c.images("x", x);
  if (residual) args.residual = c.images("residual", *residual);
  point_into_saved(args, save ? saved.mutable_data_ptr() : own_saved(c.shape, c.dtype));
  kernels().forward(args, runtime());
  return {y.finish(x), saved, mask};
}

// y over x. Where the kernels cannot read x itself they work on its copy, which is copied back.
void forward_inplace(Tensor x, OptionalTensor w1, OptionalTensor b1, Tensor w2, OptionalTensor b2,
                     OptionalTensor residual, OptionalTensor alpha, OptionalTensor beta,
                     OptionalTensor affine_scale, OptionalTensor affine_shift,
                     OptionalTensor lengths, int64_t options) {
  Call c = make_call(x, w1, b1, w2, b2, alpha, beta, affine_scale, affine_shift, lengths, options);
  auto args = kernel_args<senet::ForwardArgs>(c);
  Tensor dense = c.in_layout("x", x);
  const bool is_x = dense.data_ptr() == x.data_ptr();
  STD_TORCH_CHECK(!is_x || x.size(0) <= 1 || x.stride(0) >= c.shape.image(),
                  "x: expected images that do not overlap in memory");
  args.y = dense.mutable_data_ptr();
  args.y_stride = dense.stride(0);
  args.x = {args.y, args.y_stride};
  if (residual) args.residual = c.images("residual", *residual);
  point_into_saved(args, own_saved(c.shape, c.dtype));
  kernels().forward(args, runtime());
  if (!is_x) torch::stable::copy_(x, dense);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dy, Tensor x, OptionalTensor w1, OptionalTensor b1, Tensor w2, OptionalTensor b2,
    OptionalTensor residual, OptionalTensor alpha, OptionalTensor beta, OptionalTensor affine_scale,
    OptionalTensor affine_shift, OptionalTensor lengths, Tensor saved, Tensor mask, int64_t options,
    int64_t needs) {
  Call c = make_call(x, w1, b1, w2, b2, alpha, beta, affine_scale, affine_shift, lengths, options);
  STD_TORCH_CHECK(saved.numel() == saved_numel(c.shape) && saved.scalar_type() == accumulation(x) &&
                      is_matrix_dense(saved),
                  "saved: expected what the forward op returned for these arguments");
  auto args = kernel_args<senet::BackwardArgs>(c);
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
    results[i] = Result(*of[i], image ? c.direct : is_matrix_dense(*of[i]));
    *into[i] = results[i].data();
  }
  kernels().backward(args, runtime());
  const auto result = [&](int i) { return results[i].finish(x); };
  return {result(0), result(1), result(2), result(3), result(4),
          result(5), result(6), result(7), result(8), result(9)};
}

Tensor squeeze(Tensor x, OptionalTensor affine_scale, OptionalTensor affine_shift,
               OptionalTensor lengths, int64_t options) {
  Call c = make_call(x, affine_scale, affine_shift, lengths, options, senet::Form::squeeze, 0, 0);
  auto args = kernel_args<senet::ForwardArgs>(c);
  Tensor z = new_matrix(accumulation(x), c.shape.batch, c.shape.channels);
  args.x = c.images("x", x);
  args.z = z.mutable_data_ptr();
  kernels().forward(args, runtime());
  return Call::converted(z, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> squeeze_backward(Tensor dz, Tensor x,
                                                    OptionalTensor affine_scale,
                                                    OptionalTensor affine_shift,
                                                    OptionalTensor lengths, int64_t options,
                                                    int64_t needs) {
  Call c = make_call(x, affine_scale, affine_shift, lengths, options, senet::Form::squeeze, 0, 0);
  auto args = kernel_args<senet::BackwardArgs>(c);
  const Tensor of_mean = c.vectors("dz", dz, c.shape.channels);
  args.dz = of_mean.data_ptr();
  args.x = c.images("x", x);
  Result dx, daffine_scale, daffine_shift;
  if (needs & 1) dx = Result(c.like, c.direct);
  point_into_affine(args, daffine_scale, daffine_shift, affine_scale, affine_shift, needs >> 1);
  args.dx = dx.data();
  kernels().backward(args, runtime());
  return {dx.finish(x), daffine_scale.finish(x), daffine_shift.finish(x)};
}

std::tuple<Tensor, Tensor> channel_scale(Tensor x, Tensor u, OptionalTensor residual,
                                         OptionalTensor alpha, OptionalTensor beta,
                                         OptionalTensor affine_scale, OptionalTensor affine_shift,
                                         int64_t options, bool save) {
  auto [c, given] = make_scale_call(x, u, alpha, beta, affine_scale, affine_shift, options);
  auto args = kernel_args<senet::ForwardArgs>(c);
  Result y(c.like, c.direct);
  Tensor mask = point_into_results(args, y, save);
  args.x = c.images("x", x);
  if (residual) args.residual = c.images("residual", *residual);
  args.u = given.data_ptr();
  kernels().forward(args, runtime());
  return {y.finish(x), mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> channel_scale_backward(
    Tensor dy, Tensor x, Tensor u, OptionalTensor residual, OptionalTensor alpha,
    OptionalTensor beta, OptionalTensor affine_scale, OptionalTensor affine_shift, Tensor mask,
    int64_t options, int64_t needs) {
  auto [c, given] = make_scale_call(x, u, alpha, beta, affine_scale, affine_shift, options);
  auto args = kernel_args<senet::BackwardArgs>(c);
  args.dy = c.images("dy", dy);
  args.x = c.images("x", x);
  give_after(args, c, residual, mask);
  args.u = given.data_ptr();

  // In the order of the inputs.
  const auto wanted = [needs](int i) { return (needs >> i & 1) != 0; };
  Result dx, dresidual, dalpha, dbeta, daffine_scale, daffine_shift;
  if (wanted(0)) dx = Result(c.like, c.direct);
  if (wanted(2)) dresidual = Result(c.like, c.direct);
  if (alpha && wanted(3)) dalpha = Result(*alpha, is_matrix_dense(*alpha));
  if (beta && wanted(4)) dbeta = Result(*beta, is_matrix_dense(*beta));
  args.dx = dx.data();
  args.dresidual = dresidual.data();
  args.dalpha = dalpha.data();
  args.dbeta = dbeta.data();
  point_into_affine(args, daffine_scale, daffine_shift, affine_scale, affine_shift, needs >> 5);
  Tensor du = new_matrix(accumulation(x), wanted(1) ? c.shape.batch : 0, c.shape.outputs);
  if (wanted(1)) args.du = du.mutable_data_ptr();
  kernels().backward(args, runtime());
  du = wanted(1) ? Call::converted(du, u.scalar_type()) : new_vector(x.scalar_type(), 0);
  return {dx.finish(x),           du,
          dresidual.finish(x),    dalpha.finish(x),
          dbeta.finish(x),        daffine_scale.finish(x),
          daffine_shift.finish(x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(senet_kernels, CPU, m) {
  m.impl("native_forward", TORCH_BOX(&forward));
  m.impl("native_forward_", TORCH_BOX(&forward_inplace));
  m.impl("native_backward", TORCH_BOX(&backward));
  m.impl("native_squeeze", TORCH_BOX(&squeeze));
  m.impl("native_squeeze_backward", TORCH_BOX(&squeeze_backward));
  m.impl("native_channel_scale", TORCH_BOX(&channel_scale));
  m.impl("native_channel_scale_backward", TORCH_BOX(&channel_scale_backward));
}

STABLE_TORCH_LIBRARY_IMPL(senet_kernels, CompositeExplicitAutograd, m) {
  m.impl("native_isa", TORCH_BOX(&isa));
}
