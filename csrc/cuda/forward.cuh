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
    const int64_t rows = view_.last ? s_.positions : s_.channels;
    uint8_t* const mask = a_.mask ? a_.mask + b * rows * bit_row() : nullptr;
    const bool gathers = kVector && mask && p_.stretch > 0;
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int turns = gathers ? p_.stretch / threads : INT32_MAX;
    uint8_t* const units = reinterpret_cast<uint8_t*>(shared_memory() + p_.at.bits) + 1;
    const int64_t all = int64_t(view_.outer) * view_.inner / kUnit;
    Walk<kVector> at(view_);
    for (int64_t first = 0;; first += p_.stretch) {
      scale_units(b, x, slot, at, turns, [&](int turn, uint32_t bits) {
        if (gathers) {
          units[turn * threads + thread] = static_cast<uint8_t>(bits);
          return;
        }
        // Rows of a slice begin at whole bytes: such is the plan.
        const int64_t row = (view_.last ? view_.positions.begin : view_.channels.begin) + at.row;
        const int64_t column = (view_.last ? view_.channels.begin : view_.positions.begin) + at.at;
        mask[row * bit_row() + column / 8] = static_cast<uint8_t>(bits);
      });
      if (!gathers) return;
      __syncthreads();
      const int64_t next = first + p_.stretch, end = next < all ? next : all;
      write_bytes(mask + view_.channels.begin * bit_row(), units - first, bytes_before(first),
                  bytes_before(end));
      if (next >= all) return;
      __syncthreads();
      // The thread that will write the last unit of the next stretch moves that of this one.
      if (thread == threads - 1) units[-1] = units[p_.stretch - 1];
    }
  }

  // Bytes of a row of the mask.
  SENET_DEVICE int64_t bit_row() const { return (view_.pitch + 7) / 8; }
  // Bytes of the slice's mask all of whose bits are in its first so many units.
  SENET_DEVICE int64_t bytes_before(int64_t units) const {
    const int64_t row = units * kUnit / view_.inner, rest = units * kUnit - row * view_.inner;
    return row * bit_row() + rest / 8;
  }
  // Bytes begin .. end of the slice's mask, out of the bits of its units.
  SENET_DEVICE void write_bytes(uint8_t* mask, const uint8_t* units, int64_t begin,
                                int64_t end) const {
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      const int64_t row = i / bit_row(), column = (i - row * bit_row()) * 8;
      const int64_t from = row * view_.inner + column;
      const int shift = static_cast<int>(from % kUnit);
      uint32_t bits = units[from / kUnit];
      const int64_t left = view_.inner - column;
      const int count = left < 8 ? static_cast<int>(left) : 8;
      if (shift + count > kUnit) bits |= uint32_t(units[from / kUnit + 1]) << 8;
      mask[i] = static_cast<uint8_t>(bits >> shift & ((1u << count) - 1));
    }
  }

  // y of at most so many units of this thread from `at` on. Calls give(turn, bits) for each, with
  // its bits of the mask.
  template <class F>
  SENET_DEVICE void scale_units(int64_t b, const char* x, const char* slot, Walk<kVector>& at,
                                int turns, F give) {
    const char* residual = image(a_.residual.data, b * a_.residual.stride);
    char* y = static_cast<char*>(a_.y) + b * a_.y_stride * kBytes;
    const Fn after = a_.options.after;
    for (int turn = 0; turn < turns && at.inside(view_); ++turn, at.advance()) {
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
        give(turn, bits);
      }
      if (after == Fn::relu) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j) v[j] = value<kFast>(Fn::relu, v[j]);
      } else if (after != Fn::identity) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j) v[j] = value_of<A>(after, v[j]);
      }
      store_unit<kBytes, kVector>(y + offset, count, half_, v);
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
