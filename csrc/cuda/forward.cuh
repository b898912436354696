// The forward pass: squeeze, excite, scale; or the first or the last of these alone. One launch.
//
//   x  -- first pass -->  sums over positions  -- exchange between the image's blocks, MLP -->
//   scale and shift of each channel  -- second pass over x -->  y
//
// A group of blocks takes an image, and then the next one but so many groups. Where the slice of a
// block fits into its shared memory, x crosses the memory bus once: asynchronous copies bring it
// in, both passes read it there, and while one image is reduced and stored the next is on its way.
// Otherwise the second pass reads x again, from L2 if it is still there.
#pragma once

#include "images.cuh"
#include "sums.cuh"

namespace senet {
namespace gpu {

struct ForwardLaunch {
  ForwardArgs a;
  Plan plan;
  char* scratch;
};

// Of rows of so many bits, each beginning with a byte: the bytes that are complete with the first
// so many units. Divisions of 64 bits would cost registers; in 32 there is room, see the plan.
SENET_DEVICE uint32_t bytes_before(uint32_t units, uint32_t inner) {
  const uint32_t rest = units % inner * kUnit, row = units / inner * kUnit + rest / inner;
  return row * ((inner + 7) / 8) + rest % inner / 8;
}

// Writes the bytes of such rows that units `first` to `end` complete. units[0] has the bits of unit
// `first`, units[-1] those of the one before. A function of its own: the kernel around it has no
// registers left.
inline __device__ __noinline__ void write_bytes(const uint8_t* units, uint32_t first, uint32_t end,
                                                uint32_t inner, uint8_t* mask) {
  const uint32_t bit_row = (inner + 7) / 8, bytes = bytes_before(end, inner);
  for (uint32_t i = bytes_before(first, inner) + threadIdx.x; i < bytes; i += blockDim.x) {
    const uint32_t row = i / bit_row, column = (i - row * bit_row) * 8;
    const int64_t from = int64_t(row) * inner + column;
    const uint32_t shift = from % kUnit, left = inner - column, count = left < 8 ? left : 8;
    const uint8_t* const unit = units + (from / kUnit - first);
    uint32_t bits = unit[0];
    if (shift + count > kUnit) bits |= uint32_t(unit[1]) << 8;
    mask[i] = static_cast<uint8_t>(bits >> shift & ((1u << count) - 1));
  }
}

template <int kBytes, bool kVector, Fn kBefore>
class ForwardBlock {
  using A = typename Accumulation<kBytes>::Type;
  static constexpr bool kFast = kBytes == 2;

 public:
  SENET_DEVICE explicit ForwardBlock(const ForwardLaunch& launch)
      : a_(launch.a),
        s_(launch.a.shape),
        p_(launch.plan),
        half_(launch.a.dtype == DType::f16),
        has_shift_(s_.outputs > s_.channels),
        c_(static_cast<int>(s_.channels)),
        sums_(array(p_.at.sums)),
        scale_(array(p_.at.scale)),
        shift_(array(p_.at.shift)),
        hidden_(array(p_.at.hidden)),
        scratch_(array(p_.at.scratch)),
        team_(make_team<A>(p_, launch.scratch)),
        view_(make_view(s_, p_, team_.rank)),
        affine_(a_.parameters, p_, view_.channels) {
    const Parameters& w = a_.parameters;
    const bool two = s_.form == Form::two_layers;
    const int c0 = view_.channels.begin, n = view_.channels.size();
    const int r = static_cast<int>(s_.hidden), inner = static_cast<int>(s_.inner());
    w1_ = matrix_at(w.w1, w.dtype, c_, c0);
    gates_ = matrix_at(w.w2, w.dtype, inner, int64_t(c0) * inner);
    shifts_ = matrix_at(w.w2, w.dtype, inner, int64_t(c_ + c0) * inner);
    if (!p_.weights) return;
    char* at = shared_memory() + p_.at.weights;
    if (two) keep(w1_, r, n, at);
    keep(gates_, n, inner, at);
    if (has_shift_) keep(shifts_, n, inner, at);
  }

  SENET_DEVICE void run() {
    const auto ask = [this](int64_t b) {
      prefetch_slice<kBytes>(view_, image(a_.residual.data, b * a_.residual.stride));
    };
    each_image<kBytes, kVector>(s_, p_, view_, a_.x, team_, ask,
                                [this](int64_t b, const char* slot) {
                                  const char* x = image(a_.x.data, b * a_.x.stride);
                                  if (s_.form != Form::scale) squeeze(b, x, slot);
                                  if (s_.form != Form::squeeze) {
                                    excite(b);
                                    scale(b, x, slot);
                                  }
                                });
  }

 private:
  SENET_DEVICE A* array(int offset) const { return reinterpret_cast<A*>(shared_memory() + offset); }
  SENET_DEVICE static const char* image(const void* data, int64_t element) {
    return data ? static_cast<const char*>(data) + element * kBytes : nullptr;
  }
  // Whether each block has but its own channels of vectors over channels.
  SENET_DEVICE bool split_channels() const {
    return p_.exchange != Exchange::none && p_.axis == Axis::channels;
  }
  // Whether it falls to this block to write what all blocks of the image have.
  SENET_DEVICE bool writes_shared() const { return team_.rank == 0; }

  // The means z of the channels of this block, into sums_.
  SENET_DEVICE void squeeze(int64_t b, const char* x, const char* slot) {
    const int n = counted(s_, a_.lengths, b);
    const bool split_space = p_.exchange != Exchange::none && p_.axis == Axis::space;
    A* const to = split_space ? team_.mine() : sums_;
    const auto term = [&](int64_t in_image, int64_t in_slice, int last, int channel, A* t) {
      if (slot) {
        load_unit<kBytes, kVector, From::shared>(slot + in_slice * kBytes, last, half_, t);
      } else {
        load_unit<kBytes, kVector, From::global>(x + in_image * kBytes, last, half_, t);
      }
      affine_.apply(view_, channel, t);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        t[j] = kVector || j < last ? before_value<kBefore, kFast>(a_.options.before, t[j]) : A(0);
      }
    };
    if (view_.last) {
      sum_columns<kVector>(view_, n, scratch_, to, term);
    } else {
      sum_rows<kVector>(view_, p_, n, scratch_, to, term);
    }
    if (split_space) {
      team_.meet();
    } else {
      __syncthreads();
    }
    const A positions = static_cast<A>(n);
    A* z = static_cast<A*>(a_.z);
    if (z) z += b * c_ + view_.channels.begin;
    const bool writes = z && (!split_space || writes_shared());
    for (int c = threadIdx.x; c < view_.channels.size(); c += blockDim.x) {
      const A mean = (split_space ? team_.total(c) : sums_[c]) / positions;
      sums_[c] = mean;
      if (writes) z[c] = mean;
    }
    __syncthreads();
  }

  // scale_ and shift_ of the channels of this block.
  SENET_DEVICE void excite(int64_t b) {
    const Parameters& w = a_.parameters;
    const int n = view_.channels.size(), c0 = view_.channels.begin;
    const int r = static_cast<int>(s_.hidden), inner = static_cast<int>(s_.inner());
    const A* in = hidden_;
    if (s_.form == Form::two_layers) {
      A* h = a_.h && writes_shared() ? static_cast<A*>(a_.h) + b * r : nullptr;
      const bool split = split_channels();
      rows_product(w1_, r, n, sums_, split ? team_.mine() : hidden_);
      if (split) {
        team_.meet();
      } else {
        __syncthreads();
      }
      for (int i = threadIdx.x; i < r; i += blockDim.x) {
        A sum = split ? team_.total(i) : hidden_[i];
        sum += parameter_or<A>(w.dtype, w.b1, i, A(0));
        if (h) h[i] = sum;
        hidden_[i] = value_of<A>(a_.options.activation, sum);
      }
    } else if (s_.form == Form::one_layer) {
      if (split_channels()) {
        for (int c = threadIdx.x; c < c_; c += blockDim.x) {
          const bool ours = c >= c0 && c < c0 + n;
          team_.mine()[c] = ours ? sums_[c - c0] : A(-0.0);
        }
        team_.meet();
        for (int c = threadIdx.x; c < c_; c += blockDim.x) hidden_[c] = team_.total(c);
      } else {
        in = sums_;
      }
    }
    __syncthreads();

    // u, into scale_ and shift_; of the scaling alone it is given.
    const bool given = s_.form == Form::scale;
    if (!given) {
      rows_product(gates_, n, inner, in, scale_);
      if (has_shift_) rows_product(shifts_, n, inner, in, shift_);
      __syncthreads();
    }
    const bool writes = a_.u && !given && (p_.axis == Axis::channels || writes_shared());
    A* u = static_cast<A*>(a_.u) + b * s_.outputs + c0;
    for (int c = threadIdx.x; c < n; c += blockDim.x) {
      const A gate = given ? u[c] : scale_[c] + parameter_or<A>(w.dtype, w.b2, c0 + c, A(0));
      A factor = value_of<A>(a_.options.gate, gate);
      if (w.beta) factor *= parameter_at<A>(w.dtype, w.beta, c0 + c);
      if (w.alpha) factor += parameter_at<A>(w.dtype, w.alpha, c0 + c);
      scale_[c] = factor;
      if (writes) u[c] = gate;
      if (!has_shift_) continue;
      const A shift =
          given ? u[c_ + c] : shift_[c] + parameter_or<A>(w.dtype, w.b2, c_ + c0 + c, A(0));
      shift_[c] = shift;
      if (writes) u[c_ + c] = shift;
    }
    __syncthreads();
  }

  // y, and the mask where it is wanted.
  //
  // Where rows of the image are no whole bytes, those of the mask are all the same, and the bits of
  // a unit belong to several bytes (stretch > 0). They are gathered, a stretch of units at a time,
  // and one unit before it, with which the first byte may begin.
  SENET_DEVICE void scale(int64_t b, const char* x, const char* slot) {
    Walk<kVector> at(view_);
    for (uint32_t end = p_.stretch;; end += p_.stretch) {
      const bool gathers = kVector && a_.mask && p_.stretch > 0;
      scale_units(b, x, slot, at, gathers ? p_.stretch : UINT32_MAX);
      if (!gathers) return;
      const uint32_t all = static_cast<uint32_t>(int64_t(view_.outer) * view_.inner / kUnit);
      __syncthreads();
      write_bytes(units(), end - p_.stretch, end < all ? end : all, view_.inner,
                  a_.mask + (b * s_.channels + view_.channels.begin) * ((view_.inner + 7) / 8));
      if (end >= all) return;
      __syncthreads();
      // The thread that will write the last unit of the next stretch moves that of this one.
      if (threadIdx.x == blockDim.x - 1) units()[-1] = units()[p_.stretch - 1];
    }
  }
  SENET_DEVICE uint8_t* units() const {
    return reinterpret_cast<uint8_t*>(shared_memory() + p_.at.bits) + 1;
  }

  // y of the units of this thread from `at` on that are among the next so many of the slice.
  SENET_DEVICE void scale_units(int64_t b, const char* x, const char* slot, Walk<kVector>& at,
                                uint32_t stretch) {
    const char* residual = image(a_.residual.data, b * a_.residual.stride);
    char* y = static_cast<char*>(a_.y) + b * a_.y_stride * kBytes;
    const int64_t rows = view_.last ? s_.positions : s_.channels;
    const int64_t bit_row = (view_.pitch + 7) / 8;
    uint8_t* const mask = a_.mask + b * rows * bit_row;
    const Fn after = a_.options.after;
    for (uint32_t unit = threadIdx.x; unit < stretch && at.inside(view_); unit += blockDim.x) {
      const int count = at.count(view_);
      const int64_t offset = at.in_image(view_) * kBytes;
      A v[kUnit], factor[kUnit];
      if (slot) {
        load_unit<kBytes, kVector, From::shared>(slot + at.in_slice(view_) * kBytes, count, half_,
                                                 v);
      } else {
        load_unit<kBytes, kVector, From::stream>(x + offset, count, half_, v);
      }
      affine_.apply(view_, at, v);
      at.spread(view_, scale_, factor);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        v[j] = before_value<kBefore, kFast>(a_.options.before, v[j]) * factor[j];
      }
      if (has_shift_) {
        at.spread(view_, shift_, factor);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) v[j] += factor[j];
      }
      if (residual) {
        load_unit<kBytes, kVector, From::stream>(residual + offset, count, half_, factor);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) v[j] += factor[j];
      }
      if (a_.mask) {
        uint32_t bits = 0;
#pragma unroll
        for (int j = 0; j < kUnit; ++j) bits |= (j < count && !(v[j] <= A(0)) ? 1u : 0u) << j;
        if (kVector && p_.stretch > 0) {
          units()[unit] = static_cast<uint8_t>(bits);
        } else {
          // Rows of a slice begin at whole bytes: such is the plan.
          const int64_t row = (view_.last ? view_.positions.begin : view_.channels.begin) + at.row;
          const int64_t column =
              (view_.last ? view_.channels.begin : view_.positions.begin) + at.at;
          mask[row * bit_row + column / 8] = static_cast<uint8_t>(bits);
        }
      }
      if (after == Fn::relu) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j) v[j] = value<kFast>(Fn::relu, v[j]);
      } else if (after != Fn::identity) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j) v[j] = value_of<A>(after, v[j]);
      }
      store_unit<kBytes, kVector>(y + offset, count, half_, v);
      at.advance();
    }
  }

  const ForwardArgs& a_;
  const Shape& s_;
  const Plan& p_;
  const bool half_, has_shift_;
  const int c_;
  A *const sums_, *const scale_, *const shift_, *const hidden_, *const scratch_;
  Team<A> team_;
  const View view_;
  const Affine<A> affine_;
  Matrix w1_, gates_, shifts_;
};

// kBefore: the code of a function; -1 is any of them.
template <int kBytes, bool kVector, int kBefore>
__global__ void __launch_bounds__(kForwardThreads, kBytes == 8 ? 1 : 2)
    forward_kernel(const __grid_constant__ ForwardLaunch launch) {
  ForwardBlock<kBytes, kVector, static_cast<Fn>(kBefore)>(launch).run();
}

}  // namespace gpu
}  // namespace senet
