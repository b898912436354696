// Tensors as the kernels take them: checks, memory, layouts. Of torch's headers the stable ABI
// alone, so that one build serves every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <optional>
#include <vector>

#include "host.h"

namespace senet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- dtypes and layouts ----

// Where a call's tensors are.
struct Place {
  const Host* host;
  int32_t index;  // of the device among those of its type
  bool holds(const Tensor& t) const { return host->holds(t, index); }
};
inline Place place_of(const Tensor& x) {
  return {&host_of(x), x.is_cpu() ? 0 : x.get_device_index()};
}

inline DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      STD_TORCH_CHECK(false, name,
                      ": expected dtype float32, bfloat16, float16 or float64, got another");
  }
  return DType::f32;
}

inline ScalarType accumulation(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t positions_of(const Tensor& x) {
  int64_t n = 1;
  for (int64_t d = 2; d < x.dim(); ++d) n *= x.size(d);
  return n;
}

// Whether every image of t is dense in the layout: positions adjacent, or channels adjacent. The
// stride between images may be anything.
inline bool image_is_dense(const Tensor& t, bool channels_last) {
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
inline bool is_channels_last(const Tensor& like_x, int64_t channels, int64_t positions) {
  return channels > 1 && positions > 1 && like_x.strides()[1] == 1 && image_is_dense(like_x, true);
}

inline bool is_matrix_dense(const Tensor& t) {  // row-major, whatever the strides of extents of 1
  int64_t expected = 1;
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// Whether the storage of t has all of its elements: storage().resize_(0), which frees the memory
// of parameters for a while, leaves shape and strides as they were.
inline bool has_memory(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t last = 0, offset = 0, bytes = 0;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (sizes[d] == 0) return true;
    last += (sizes[d] - 1) * strides[d];
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return (offset + last + 1) * static_cast<int64_t>(t.element_size()) <= bytes;
}

// A tensor of n elements that `make` allocates. Of a failure there the stable ABI says no more than
// that some call failed.
template <class Make>
Tensor allocated(int64_t n, size_t element_size, const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    STD_TORCH_CHECK(false, "out of memory: cannot allocate a tensor of ", n, " elements of ",
                    element_size, " bytes");
    throw;
  }
}
// Like torch's own.
inline Tensor new_like(const Tensor& t) {
  return allocated(t.numel(), t.element_size(), [&] { return torch::stable::empty_like(t); });
}
inline Tensor new_rows(const Tensor& t) {
  return allocated(t.numel(), t.element_size(),
                   [&] { return torch::stable::new_empty(t, t.sizes()); });
}
inline Tensor rows_copy(const Tensor& t) {
  return allocated(t.numel(), t.element_size(), [&] { return torch::stable::contiguous(t); });
}

// An uninitialised dense tensor on the device of x.
inline Tensor new_dense(const Place& at, ScalarType dtype, const int64_t* sizes,
                        const int64_t* strides, int64_t dims) {
  Tensor t = new_strided(sizes, strides, dims, dtype, at.host->device_type(), at.index);
  if (poisons() && t.numel()) {
    at.host->poison(t.mutable_data_ptr(), static_cast<size_t>(t.numel()) * t.element_size(),
                    at.index);
  }
  return t;
}
inline Tensor new_vector(const Place& at, ScalarType dtype, int64_t n) {
  const int64_t stride = 1;
  return new_dense(at, dtype, &n, &stride, 1);
}
inline Tensor new_matrix(const Place& at, ScalarType dtype, int64_t rows, int64_t columns) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {std::max<int64_t>(1, columns), 1};
  return new_dense(at, dtype, sizes, strides, 2);
}

// A result shaped like `like`, written by the kernels in their own layout: into itself where that
// is one of theirs, else into a dense twin that is copied over at the end.
class Result {
 public:
  Result() = default;
  // direct: `like` is dense and in one of the kernels' layouts.
  Result(const Place& at, const Tensor& like, bool direct) : direct_(direct) {
    if (direct) {
      written_ = result_ =
          new_dense(at, like.scalar_type(), like.sizes().data(), like.strides().data(), like.dim());
    } else {
      result_ = new_like(like);
      written_ = new_rows(like);
    }
  }
  void* data() const { return written_ ? written_->mutable_data_ptr() : nullptr; }
  // The finished result; an empty tensor where none was asked for.
  Tensor finish(const Place& at, const Tensor& like) {
    if (!result_) return new_vector(at, like.scalar_type(), 0);
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
  Place at;
  Shape shape;
  DType dtype;
  Options options;
  Parameters parameters;
  const int64_t* lengths;
  Tensor like;                               // empty, with the strides of y and dx
  bool direct;                               // whether y and dx are in a layout of the kernels
  std::optional<ScalarType> parameter_type;  // once there was a parameter
  std::vector<Tensor> copies;                // keeps alive what had to be copied

  void check_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(at.holds(t), name, ": expected ", at.host->a_tensor);
    STD_TORCH_CHECK(has_memory(t), name,
                    ": expected a tensor with memory for all of its elements, got one whose "
                    "storage was made smaller or freed");
  }

  // t in the kernels' layout: itself, or a copy.
  Tensor in_layout(const char* name, const Tensor& t) {
    check_device(name, t);
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, ": expected the dtype of x");
    STD_TORCH_CHECK(
        t.dim() == x.dim() && std::equal(t.sizes().begin(), t.sizes().end(), x.sizes().begin()),
        name, ": expected the shape of x");
    if (image_is_dense(t, shape.channels_last)) return t;
    Tensor copy = direct ? new_like(like) : new_rows(x);
    torch::stable::copy_(copy, t);
    copies.push_back(copy);
    return copy;
  }
  Images images(const char* name, const Tensor& t) {
    const Tensor dense = in_layout(name, t);
    return {dense.data_ptr(), dense.stride(0)};
  }

  const void* matrix(const char* name, const OptionalTensor& t, int64_t rows, int64_t columns) {
    if (!t) return nullptr;
    bool matches = t->dim() >= 2 && t->size(0) == rows && t->size(1) == columns;
    for (int64_t d = 2; matches && d < t->dim(); ++d) matches = t->size(d) == 1;
    STD_TORCH_CHECK(matches, name, ": expected shape [", rows, ", ", columns,
                    "] with optional trailing extents of 1");
    return parameter(name, t);
  }
  const void* vector(const char* name, const OptionalTensor& t, int64_t n) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == n, name, ": expected shape [", n, "]");
    return parameter(name, t);
  }
  const void* parameter(const char* name, const OptionalTensor& t) {
    check_device(name, *t);
    if (!parameter_type) {
      parameter_type = t->scalar_type();
      parameters.dtype = dtype_of(name, *t);
      STD_TORCH_CHECK(
          parameters.dtype == dtype || (parameters.dtype == DType::f32 && dtype != DType::f64),
          name, ": expected the dtype of x or float32");
    }
    STD_TORCH_CHECK(t->scalar_type() == *parameter_type, name,
                    ": expected the dtype of the other parameters");
    if (is_matrix_dense(*t)) return t->data_ptr();
    copies.push_back(rows_copy(*t));
    return copies.back().data_ptr();
  }

  // t as the kernels take vectors of an image: [B, columns], dense, in the accumulation type.
  Tensor vectors(const char* name, const Tensor& t, int64_t columns) const {
    check_device(name, t);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == shape.batch && t.size(1) == columns, name,
                    ": expected shape [", shape.batch, ", ", columns, "]");
    dtype_of(name, t);
    return is_matrix_dense(t) ? converted(t, accumulation(x)) : converted_copy(t, accumulation(x));
  }

  Tensor converted_copy(const Tensor& t, ScalarType dtype) const {
    Tensor copy = new_matrix(at, dtype, t.size(0), t.size(1));
    torch::stable::copy_(copy, t);
    return copy;
  }
  Tensor converted(const Tensor& t, ScalarType dtype) const {
    return t.scalar_type() == dtype ? t : converted_copy(t, dtype);
  }
};

// x, the options and the layout; parameters are the caller's.
inline Call make_call(Tensor x, const OptionalTensor& affine_scale,
                      const OptionalTensor& affine_shift, const OptionalTensor& lengths,
                      int64_t options, Form form, int64_t hidden, int64_t outputs) {
  STD_TORCH_CHECK(affine_scale.has_value() == affine_shift.has_value(),
                  "before_affine: expected both of its tensors, or none");
  STD_TORCH_CHECK(x.dim() >= 3, "x: expected [B, C, *spatial], got ", x.dim(), " dimensions");
  Call c{x,    place_of(x), {}, dtype_of("x", x), unpack_options(options), {}, nullptr, x,
         true, {},          {}};
  const auto legal = [](Fn f) { return f <= kLastFn; };
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
    c.like = new_like(x);
    last = is_channels_last(c.like, channels, c.shape.positions);
    c.direct = last || image_is_dense(c.like, false);
    // A stride between images that is not theirs side by side: some other order of axes.
    if (x.size(0) > 1 && c.like.stride(0) != c.shape.image()) c.direct = false;
    if (!c.direct) last = false;
  }
  c.shape.channels_last = last;
  c.parameters.dtype = c.dtype;
  c.parameters.affine_scale = c.vector("before_affine[0]", affine_scale, channels);
  c.parameters.affine_shift = c.vector("before_affine[1]", affine_shift, channels);

  if (lengths) {
    c.check_device("lengths", *lengths);
    STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Long, "lengths: expected dtype int64");
    STD_TORCH_CHECK(lengths->dim() == 1 && lengths->size(0) == x.size(0),
                    "lengths: expected shape [", x.size(0), "]");
    Tensor dense = is_matrix_dense(*lengths) ? *lengths : rows_copy(*lengths);
    c.lengths = static_cast<const int64_t*>(dense.data_ptr());
    c.copies.push_back(dense);
  }
  return c;
}

}  // namespace senet
