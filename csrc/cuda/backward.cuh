// The backward pass up to the gradients of the parameters, which gradients.cuh adds up. One launch.
//
// With m = dy after'(pre):
//   dy, x  -- first pass -->  ds = sum of m p, dshift = sum of m
//   du = [beta ds gate'(u), dshift], dh = (W2^T du) activation'(h), dz = W1^T dh
//   dy     -- second pass -->  dx = (m scale + dz / S) before'(x), d_residual = m
//
// and with an affine map before `before`, two more sums: of dq x and of dq.
//
// Of the excitation only dh is a sum over channels, so an image split by channels exchanges R
// numbers. dy stays in shared memory between the passes where it fits, and x is streamed past it:
// the second pass of the plain operation does not read x at all. The scaling alone has no dz; the
// squeeze alone has nothing else.
#pragma once

#include "images.cuh"
#include "sums.cuh"

namespace senet {
namespace gpu {

struct BackwardLaunch {
  BackwardArgs a;
  Plan plan;
  char* scratch;
  bool wants_sums;  // ds and what follows from it
  bool needs_dz;
  void* du;  // [B, outputs], [B, R], [B, C], for the gradients of the parameters; or null
  void* dh;
  void* ds;
  // [B, C] of each image, or [B blocks, C] of each part, for the affine map; both or null.
  void *da, *db;
};

template <int kBytes, bool kVector, Fn kBefore>
class BackwardBlock {
  using A = typename Accumulation<kBytes>::Type;
  static constexpr bool kFast = kBytes == 2;

 public:
  SENET_DEVICE explicit BackwardBlock(const BackwardLaunch& launch)
      : l_(launch),
        a_(launch.a),
        s_(launch.a.shape),
        p_(launch.plan),
        half_(launch.a.dtype == DType::f16),
        has_shift_(s_.outputs > s_.channels),
        c_(static_cast<int>(s_.channels)),
        ds_(array(p_.at.sums)),
        dshift_(ds_ + (p_.local_channels + kUnit - 1) / kUnit * kUnit),
        scale_(array(p_.at.scale)),
        shift_(array(p_.at.shift)),
        mean_(array(p_.at.mean)),
        hidden_(array(p_.at.hidden)),
        scratch_(array(p_.at.scratch)),
        team_(make_team<A>(p_, launch.scratch)),
        view_(make_view(s_, p_, team_.rank)),
        affine_(a_.parameters, p_, view_.channels) {
    const Parameters& w = a_.parameters;
    const bool two = s_.form == Form::two_layers;
    const int c0 = view_.channels.begin, n = view_.channels.size();
    const int r = static_cast<int>(s_.hidden);
    if (two) {
      w1_ = matrix_at(w.w1, w.dtype, c_, c0);
      gates_ = matrix_at(w.w2, w.dtype, r, int64_t(c0) * r);
      shifts_ = matrix_at(w.w2, w.dtype, r, int64_t(c_ + c0) * r);
    } else {
      w1_ = matrix_at(w.w2, w.dtype, c_, c0);  // of the layer that reads z
      gates_ = shifts_ = w1_;
    }
    if (!p_.weights) return;
    char* at = shared_memory() + p_.at.weights;
    keep(w1_, two ? r : static_cast<int>(s_.outputs), n, at);
    if (two) keep(gates_, n, r, at);
    if (two && has_shift_) keep(shifts_, n, r, at);
  }

  SENET_DEVICE void run() {
    const bool reads_x = l_.wants_sums || l_.da || second_pass_needs_x() || needs_pre();
    const auto ask = [this, reads_x](int64_t b) {
      if (reads_x) prefetch_slice<kBytes>(view_, at(a_.x.data, b * a_.x.stride));
      if (!needs_pre()) return;
      prefetch_slice<kBytes>(view_, at(a_.residual.data, b * a_.residual.stride));
    };
    each_image<kBytes, kVector>(
        s_, p_, view_, a_.dy, team_, ask, [this](int64_t b, const char* slot) {
          prepare(b);
          if (s_.form == Form::squeeze) {
            const A* dz = static_cast<const A*>(a_.dz) + b * c_ + view_.channels.begin;
            divide_mean(b, [&](int c) { return dz[c]; });
          }
          // Each sum is a pass of its own: all but the first are rare, and one place for them makes
          // a small kernel.
          for (int i = 0; i < kSums; ++i) {
            const Sum which = static_cast<Sum>(i);
            if (wants(which)) sum(b, slot, which);
            if (which != Sum::m || !l_.wants_sums) continue;
            finish_sums();
            through_gate(b);
            if (s_.form != Form::scale) through_layers(b);
          }
          if (a_.dx || a_.dresidual) write(b, slot);
        });
  }

 private:
  SENET_DEVICE A* array(int offset) const { return reinterpret_cast<A*>(shared_memory() + offset); }
  SENET_DEVICE static const char* at(const void* data, int64_t element) {
    return data ? static_cast<const char*>(data) + element * kBytes : nullptr;
  }
  SENET_DEVICE bool split_channels() const {
    return p_.exchange != Exchange::none && p_.axis == Axis::channels;
  }
  SENET_DEVICE bool split_space() const {
    return p_.exchange != Exchange::none && p_.axis == Axis::space;
  }
  // Whether this block writes what belongs to its channels, or to the whole image.
  SENET_DEVICE bool writes_channels() const { return p_.axis == Axis::channels || team_.rank == 0; }
  SENET_DEVICE const A* u(int64_t b) const {
    return static_cast<const A*>(a_.u) + b * s_.outputs + view_.channels.begin;
  }
  SENET_DEVICE const Parameters& w() const { return a_.parameters; }

  // scale_ and shift_ as they were forward; mean_ that adds nothing.
  SENET_DEVICE void prepare(int64_t b) {
    const int n = view_.channels.size(), c0 = view_.channels.begin;
    for (int c = threadIdx.x; c < n; c += blockDim.x) {
      mean_[c] = A(-0.0);  // which changes no number it is added to
      if (s_.form == Form::squeeze) {
        scale_[c] = A(0);
        continue;
      }
      A factor = value_of<A>(a_.options.gate, u(b)[c]);
      if (w().beta) factor *= parameter_at<A>(w().dtype, w().beta, c0 + c);
      if (w().alpha) factor += parameter_at<A>(w().dtype, w().alpha, c0 + c);
      scale_[c] = factor;
      if (has_shift_) shift_[c] = u(b)[c_ + c];
    }
    __syncthreads();
  }

  // Bits `from` .. `from` + 7 of a row of the mask; those outside of it are 0 or another row's.
  SENET_DEVICE static uint32_t row_bits(const uint8_t* row, int64_t bytes, int from) {
    const int byte = from >> 3, shift = from & 7;
    uint32_t bits = byte >= 0 && byte < bytes ? row[byte] : 0u;
    if (shift && byte + 1 >= 0 && byte + 1 < bytes) bits |= uint32_t(row[byte + 1]) << 8;
    return bits >> shift;
  }
  SENET_DEVICE const uint8_t* mask_row(int64_t b, int64_t row) const {
    const int64_t rows = view_.last ? s_.positions : s_.channels;
    return a_.mask + (b * rows + row) * bit_row();
  }
  SENET_DEVICE int64_t bit_row() const { return (view_.pitch + 7) / 8; }

  // m out of dy, in place. `pre` holds what `after` was applied to where it is needed again.
  SENET_DEVICE void through_after(A* dy, uint32_t bits, const A* pre) const {
    const Fn after = a_.options.after;
    if (after == Fn::identity) return;
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      dy[j] = a_.mask ? ((bits >> j & 1) ? dy[j] : A(0)) : chain_of<A>(after, pre[j], dy[j]);
    }
  }
  SENET_DEVICE bool needs_pre() const { return a_.options.after != Fn::identity && !a_.mask; }
  SENET_DEVICE bool second_pass_needs_x() const {
    return a_.dx && (kBefore == kAny ? a_.options.before != Fn::identity : kBefore != Fn::identity);
  }

  // The sums over positions: ds, dshift, and, once dz is there, the affine map's gradients.
  enum class Sum : int { mp, m, dq_x, dq };
  static constexpr int kSums = 4;
  SENET_DEVICE bool wants(Sum which) const {
    switch (which) {
      case Sum::mp:
        return l_.wants_sums;
      case Sum::m:
        return l_.wants_sums && has_shift_;
      default:
        return l_.da != nullptr;
    }
  }
  SENET_DEVICE A* place_of(int64_t b, Sum which) const {
    if (which == Sum::mp || which == Sum::m) {
      A* const first = split_space() ? team_.mine() : ds_;
      return which == Sum::mp ? first : (split_space() ? first + c_ : dshift_);
    }
    const int64_t part = p_.axis == Axis::space ? b * p_.blocks + team_.rank : b;
    return static_cast<A*>(which == Sum::dq_x ? l_.da : l_.db) + part * c_ + view_.channels.begin;
  }

  SENET_DEVICE void sum(int64_t b, const char* slot, Sum which) {
    const char* dy = at(a_.dy.data, b * a_.dy.stride);
    const char* x = at(a_.x.data, b * a_.x.stride);
    const char* residual = at(a_.residual.data, b * a_.residual.stride);
    A* const to = place_of(b, which);
    const bool of_affine = which == Sum::dq_x || which == Sum::dq;
    const bool reads_x = which != Sum::m || needs_pre();
    const int limit = counted(s_, a_.lengths, b);
    const auto term = [&](int64_t in_image, int64_t in_slice, int last, int channel, A* t) {
      if (slot) {
        load_unit<kBytes, kVector, From::shared>(slot + in_slice * kBytes, last, half_, t);
      } else if (dy) {
        load_unit<kBytes, kVector, From::global>(dy + in_image * kBytes, last, half_, t);
      } else {
#pragma unroll
        for (int j = 0; j < kUnit; ++j) t[j] = A(0);
      }
      // Channels-last a unit is of one position; in rows it may begin before its row.
      const int64_t row = view_.last ? in_image / view_.pitch : view_.channels.begin + channel;
      const int column = static_cast<int>(in_image - row * view_.pitch);
      A q[kUnit] = {}, p[kUnit] = {};
      if (reads_x) {
        load_unit<kBytes, kVector, From::global>(x + in_image * kBytes, last, half_, p);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) q[j] = p[j];
        affine_.apply(view_, channel, q);
      }
      if (!of_affine) {  // otherwise the factor is x itself
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          p[j] = before_value<kBefore, kFast>(a_.options.before, q[j]);
        }
      }
      if (needs_pre()) {
        A pre[kUnit] = {};
        if (residual) {
          load_unit<kBytes, kVector, From::global>(residual + in_image * kBytes, last, half_, pre);
        }
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          const int c = view_.last ? channel + j : channel;
          A sum = before_value<kBefore, kFast>(a_.options.before, q[j]) * scale_[c];
          if (has_shift_) sum += shift_[c];
          pre[j] = residual ? sum + pre[j] : sum;
        }
        through_after(t, 0, pre);
      } else if (a_.mask) {
        through_after(t, row_bits(mask_row(b, row), bit_row(), column), nullptr);
      }
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        A value = t[j];
        if (of_affine) {
          const int c = view_.last ? channel + j : channel;
          const int64_t position = view_.last ? row : column + j;
          value = value * scale_[c] + (position < limit ? mean_[c] : A(0));
          value = before_chain<kBefore, kFast>(a_.options.before, q[j], value);
        }
        if (which == Sum::mp || which == Sum::dq_x) value *= p[j];
        t[j] = kVector || j < last ? value : A(0);
      }
    };
    const int all = static_cast<int>(s_.positions);
    __syncthreads();  // scratch
    if (view_.last) {
      sum_columns<kVector>(view_, all, scratch_, to, term);
    } else {
      sum_rows<kVector>(view_, p_, all, scratch_, to, term);
    }
  }

  // ds_ of the channels of this block, and dshift_, out of the parts of a split in space.
  SENET_DEVICE void finish_sums() {
    if (split_space()) {
      team_.meet();
      for (int c = threadIdx.x; c < c_; c += blockDim.x) {
        ds_[c] = team_.total(c);
        if (has_shift_) dshift_[c] = team_.total(c_ + c);
      }
    }
    __syncthreads();
  }

  // ds_ becomes du of the gates.
  SENET_DEVICE void through_gate(int64_t b) {
    const int n = view_.channels.size(), c0 = view_.channels.begin;
    A* du = l_.du ? static_cast<A*>(l_.du) + b * s_.outputs + c0 : nullptr;
    A* ds = l_.ds ? static_cast<A*>(l_.ds) + b * c_ + c0 : nullptr;
    const bool writes = writes_channels();
    for (int c = threadIdx.x; c < n; c += blockDim.x) {
      A value = ds_[c];
      if (ds && writes) ds[c] = value;
      value = chain_of<A>(a_.options.gate, u(b)[c], value);
      if (w().beta) value *= parameter_at<A>(w().dtype, w().beta, c0 + c);
      ds_[c] = value;
      if (du && writes) {
        du[c] = value;
        if (has_shift_) du[c_ + c] = dshift_[c];
      }
    }
    __syncthreads();
  }

  // From du to mean_: dz of the channels of this block over the number of positions.
  SENET_DEVICE void through_layers(int64_t b) {
    const int n = view_.channels.size(), c0 = view_.channels.begin;
    int rows;
    if (s_.form == Form::two_layers) {
      rows = static_cast<int>(s_.hidden);
      A* const sums = split_channels() ? team_.mine() : hidden_;
      columns_product(gates_, n, rows, ds_, scratch_, sums, false);
      if (has_shift_) columns_product(shifts_, n, rows, dshift_, scratch_, sums, true);
      if (split_channels()) {
        team_.meet();
      } else {
        __syncthreads();
      }
      const A* h = static_cast<const A*>(a_.h) + b * rows;
      A* dh = l_.dh && team_.rank == 0 ? static_cast<A*>(l_.dh) + b * rows : nullptr;
      for (int i = threadIdx.x; i < rows; i += blockDim.x) {
        const A sum = split_channels() ? team_.total(i) : hidden_[i];
        const A value = chain_of<A>(a_.options.activation, h[i], sum);
        hidden_[i] = value;
        if (dh) dh[i] = value;
      }
    } else {  // all of du
      rows = static_cast<int>(s_.outputs);
      A* const all = split_channels() ? team_.mine() : hidden_;
      for (int i = threadIdx.x; i < rows; i += blockDim.x) {
        const int c = (i < c_ ? i : i - c_) - c0;
        const bool ours = c >= 0 && c < n;
        all[i] = ours ? (i < c_ ? ds_[c] : dshift_[c]) : A(-0.0);
      }
      if (split_channels()) {
        team_.meet();
        for (int i = threadIdx.x; i < rows; i += blockDim.x) hidden_[i] = team_.total(i);
      }
    }
    __syncthreads();
    if (!l_.needs_dz) return;
    columns_product(w1_, rows, n, hidden_, scratch_, mean_, false);
    __syncthreads();
    divide_mean(b, [&](int c) { return mean_[c]; });
  }
  template <class Of>
  SENET_DEVICE void divide_mean(int64_t b, Of of) {
    const A positions = static_cast<A>(counted(s_, a_.lengths, b));
    for (int c = threadIdx.x; c < view_.channels.size(); c += blockDim.x) {
      mean_[c] = of(c) / positions;
    }
    __syncthreads();
  }

  // dx and d_residual, a unit per thread at a time.
  SENET_DEVICE void write(int64_t b, const char* slot) {
    const char* dy = at(a_.dy.data, b * a_.dy.stride);
    const char* x = at(a_.x.data, b * a_.x.stride);
    const char* residual = at(a_.residual.data, b * a_.residual.stride);
    char* dx = a_.dx ? static_cast<char*>(a_.dx) + b * s_.image() * kBytes : nullptr;
    char* dresidual =
        a_.dresidual ? static_cast<char*>(a_.dresidual) + b * s_.image() * kBytes : nullptr;
    const int limit = counted(s_, a_.lengths, b);
    const bool reads_x = second_pass_needs_x() || needs_pre();
    for (Walk<kVector> at(view_); at.inside(view_); at.advance()) {
      const int count = at.count(view_);
      const int64_t offset = at.in_image(view_) * kBytes;
      A m[kUnit] = {}, v[kUnit] = {}, other[kUnit];
      if (slot) {
        load_unit<kBytes, kVector, From::shared>(slot + at.in_slice(view_) * kBytes, count, half_,
                                                 m);
      } else if (dy) {
        load_unit<kBytes, kVector, From::stream>(dy + offset, count, half_, m);
      }
      if (reads_x) {
        load_unit<kBytes, kVector, From::stream>(x + offset, count, half_, v);
        affine_.apply(view_, at, v);
      }
      if (needs_pre()) {
        A pre[kUnit];
        at.spread(view_, scale_, other);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          pre[j] = before_value<kBefore, kFast>(a_.options.before, v[j]) * other[j];
        }
        if (has_shift_) {
          at.spread(view_, shift_, other);
#pragma unroll
          for (int j = 0; j < kUnit; ++j) pre[j] += other[j];
        }
        if (residual) {
          load_unit<kBytes, kVector, From::stream>(residual + offset, count, half_, other);
#pragma unroll
          for (int j = 0; j < kUnit; ++j) pre[j] += other[j];
        }
        through_after(m, 0, pre);
      } else if (a_.mask) {
        through_after(m, unit_bits(b, at), nullptr);
      }
      if (dresidual) store_unit<kBytes, kVector>(dresidual + offset, count, half_, m);
      if (!dx) continue;
      at.spread(view_, scale_, other);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) m[j] *= other[j];
      at.spread(view_, mean_, other);
      if (a_.lengths) at.only_below(view_, limit, A(0), other);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        m[j] = before_chain<kBefore, kFast>(a_.options.before, v[j], m[j] + other[j]);
      }
      if (affine_.there) {
        at.spread(view_, affine_.scale, other);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) m[j] *= other[j];
      }
      store_unit<kBytes, kVector>(dx + offset, count, half_, m);
    }
  }

  // The mask's bits of a unit, which may reach over the ends of rows. What pads a row is 0.
  SENET_DEVICE uint32_t unit_bits(int64_t b, const Walk<kVector>& at) const {
    if (view_.last) {
      return row_bits(mask_row(b, view_.positions.begin + at.row), bit_row(),
                      view_.channels.begin + at.at);
    }
    const int64_t row = view_.channels.begin + at.row;
    uint32_t bits = row_bits(mask_row(b, row), bit_row(), at.at);
    if constexpr (kVector) {
      uint32_t end = at.width - at.at;
      for (int64_t next = row + 1; end < kUnit; ++next, end += at.width) {
        bits |= uint32_t(mask_row(b, next)[0]) << end;
      }
    }
    return bits;
  }

  const BackwardLaunch& l_;
  const BackwardArgs& a_;
  const Shape& s_;
  const Plan& p_;
  const bool half_, has_shift_;
  const int c_;
  A *const ds_, *const dshift_, *const scale_, *const shift_, *const mean_, *const hidden_,
                                                                                *const scratch_;
  Team<A> team_;
  const View view_;
  const Affine<A> affine_;
  Matrix w1_, gates_, shifts_;
};

template <int kBytes, bool kVector, int kBefore>
__global__ void __launch_bounds__(kBytes == 8 ? kForwardThreads : kBackwardThreads, 1)
    backward_kernel(const __grid_constant__ BackwardLaunch launch) {
  BackwardBlock<kBytes, kVector, static_cast<Fn>(kBefore)>(launch).run();
}

}  // namespace gpu
}  // namespace senet
