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
#include "passes_backward.cuh"

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

template <int kBytes, bool kVector, Fn kBefore, Way kWay>
class BackwardBlock {
  using A = typename Accumulation<kBytes>::Type;
  using K = Lean<kBytes, kWay == Way::lean_f16, kBefore>;
  static constexpr bool kFast = kBytes == 2;

 public:
  SENET_DEVICE explicit BackwardBlock(const BackwardLaunch& launch)
      : l_(launch),
        a_(launch.a),
        s_(launch.a.shape),
        p_(launch.plan),
        half_(launch.a.dtype == DType::f16),
        has_shift_(kWay == Way::general && s_.outputs > s_.channels),
        c_(static_cast<int>(s_.channels)),
        team_(make_team<A>(s_, p_, launch.scratch)),
        affine_(a_.parameters, p_, channels(), kWay == Way::general) {
    if (!p_.weights) return;
    char* const at = shared_memory() + p_.at.weights;
    const int n = channels().size(), r = static_cast<int>(s_.hidden);
    copy_weights(given_w1(), two_layers() ? r : static_cast<int>(s_.outputs), n, at);
    if (!two_layers()) return;
    copy_weights(given_w2(0), n, r, at + gates_at());
    if (has_shift_) copy_weights(given_w2(c_), n, r, at + shifts_at());
  }

  SENET_DEVICE void run() {
    const bool reads_x = l_.wants_sums || l_.da || second_pass_needs_x() || needs_pre();
    const auto ask = [this, reads_x](int64_t b) SENET_INLINE {
      if (reads_x) prefetch_slice<kBytes>(at(a_.x.data, b * a_.x.stride));
      if (!needs_pre()) return;
      prefetch_slice<kBytes>(at(a_.residual.data, b * a_.residual.stride));
    };
    each_image<kBytes, kVector>(
        s_, p_, a_.dy, team_, ask, [this](int64_t b, const char* slot) SENET_INLINE {
          prepare(b);
          if (s_.form == Form::squeeze) {
            const A* dz = static_cast<const A*>(a_.dz) + b * c_ + channels().begin;
            divide_mean(b, [&](int c) { return dz[c]; });
          }
          // Each sum is a pass of its own: all but the first are rare, and one place for them makes
          // a small kernel.
          for (int i = 0; i < kSums; ++i) {
            const Sum which = static_cast<Sum>(i);
            if (wants(which)) sum(b, slot, which);
            if (which != kLastOfScale || !l_.wants_sums) continue;
            finish_sums();
            through_gate(b);
            if (s_.form != Form::scale) through_layers(b);
          }
          if (a_.dx || a_.dresidual) write(b, slot);
        });
  }

 private:
  SENET_DEVICE static Range channels() { return self().view.channels; }
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
  SENET_DEVICE bool writes_channels() const {
    return p_.axis == Axis::channels || team_.rank() == 0;
  }
  SENET_DEVICE const A* u(int64_t b) const {
    return static_cast<const A*>(a_.u) + b * s_.outputs + channels().begin;
  }
  SENET_DEVICE const Parameters& w() const { return a_.parameters; }

  // Arrays that a step alone needs, as in the forward pass.
  SENET_DEVICE A* hidden() const { return array(opaque(p_.at.hidden)); }
  SENET_DEVICE A* scratch() const { return array(opaque(p_.at.scratch)); }
  SENET_DEVICE A* of_ds() const { return array(opaque(p_.at.sums)); }
  SENET_DEVICE A* of_dshift() const {
    return of_ds() + (p_.local_channels + kUnit - 1) / kUnit * kUnit;
  }
  SENET_DEVICE A* factors() const { return array(opaque(p_.at.scale)); }  // of each channel
  SENET_DEVICE A* addends() const { return array(opaque(p_.at.shift)); }
  SENET_DEVICE A* means() const { return array(opaque(p_.at.mean)); }  // of dz over positions
  // The matrices' parts for the channels of this block. w1 is of the layer that reads z.
  SENET_DEVICE bool two_layers() const { return s_.form == Form::two_layers; }
  SENET_DEVICE Matrix given_w1() const {
    return matrix_at(two_layers() ? w().w1 : w().w2, w().dtype, c_, channels().begin);
  }
  SENET_DEVICE Matrix given_w2(int row) const {
    return matrix_at(w().w2, w().dtype, s_.hidden, (row + channels().begin) * s_.hidden);
  }
  SENET_DEVICE int gates_at() const {
    return kept_bytes(w().dtype, static_cast<int>(s_.hidden), channels().size());
  }
  SENET_DEVICE int shifts_at() const {
    const int r = static_cast<int>(s_.hidden);
    return gates_at() + kept_bytes(w().dtype, channels().size(), r);
  }
  SENET_DEVICE Matrix kept(int offset, int columns) const {
    return kept_matrix(shared_memory() + p_.at.weights + offset, w().dtype, columns);
  }
  SENET_DEVICE Matrix w1() const { return p_.weights ? kept(0, channels().size()) : given_w1(); }
  SENET_DEVICE Matrix gates() const {
    return p_.weights ? kept(gates_at(), static_cast<int>(s_.hidden)) : given_w2(0);
  }
  SENET_DEVICE Matrix shifts() const {
    return p_.weights ? kept(shifts_at(), static_cast<int>(s_.hidden)) : given_w2(c_);
  }

  // factors() and addends() as they were forward, means() that add nothing.
  SENET_DEVICE void prepare(int64_t b) {
    A *const scale = factors(), *const shift = addends(), *const mean = means();
    const int n = channels().size(), c0 = channels().begin;
    for (int c = threadIdx.x; c < n; c += blockDim.x) {
      mean[c] = A(-0.0);  // which changes no number it is added to
      if (s_.form == Form::squeeze) {
        scale[c] = A(0);
        continue;
      }
      A factor = value_of<A>(a_.options.gate, u(b)[c]);
      if (w().beta) factor *= parameter_at<A>(w().dtype, w().beta, c0 + c);
      if (w().alpha) factor += parameter_at<A>(w().dtype, w().alpha, c0 + c);
      scale[c] = factor;
      if (has_shift_) shift[c] = u(b)[c_ + c];
    }
    __syncthreads();
  }

  SENET_DEVICE const uint8_t* mask_row(int64_t b, int64_t row) const {
    const int64_t rows = self().view.last ? s_.positions : s_.channels;
    return a_.mask + (b * rows + row) * bit_row();
  }
  SENET_DEVICE int64_t bit_row() const { return (self().view.pitch + 7) / 8; }

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
  static constexpr int kSums = kWay == Way::general ? 4 : 1;
  // The one after which the gates' gradients can be worked out.
  static constexpr Sum kLastOfScale = kWay == Way::general ? Sum::m : Sum::mp;
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
      A* const first = split_space() ? team_.mine() : of_ds();
      return which == Sum::mp ? first : (split_space() ? first + c_ : of_dshift());
    }
    const int64_t part = p_.axis == Axis::space ? b * p_.blocks + team_.rank() : b;
    return static_cast<A*>(which == Sum::dq_x ? l_.da : l_.db) + part * c_ + channels().begin;
  }

  // Of the slice, for the lean loops.
  SENET_DEVICE BackwardStreams streams(int64_t b, const View& view, const char* slot) const {
    const int64_t first = b * s_.image() + view.first;
    const auto image = [&](void* p) {
      return p ? static_cast<char*>(p) + first * kBytes : nullptr;
    };
    return {{slot, at(a_.dy.data, b * a_.dy.stride + view.first)},
            at(a_.x.data, b * a_.x.stride + view.first),
            a_.mask ? a_.mask + first / kUnit : nullptr,
            image(a_.dx),
            image(a_.dresidual)};
  }

  SENET_DEVICE void sum(int64_t b, const char* slot, Sum which) {
    if constexpr (kWay != Way::general) {
      const View view = self().view;
      __syncthreads();  // scratch
      lean_ds<K>(view, p_, streams(b, view, slot), scratch(), place_of(b, which));
    } else {
      general_sum(b, slot, which);
    }
  }
  SENET_DEVICE void general_sum(int64_t b, const char* slot, Sum which) {
    const char* dy = at(a_.dy.data, b * a_.dy.stride);
    const char* x = at(a_.x.data, b * a_.x.stride);
    const char* residual = at(a_.residual.data, b * a_.residual.stride);
    A* const to = place_of(b, which);
    const bool of_affine = which == Sum::dq_x || which == Sum::dq;
    const bool reads_x = which != Sum::m || needs_pre();
    const View view = self().view;
    A *const scale = factors(), *const shift = addends(), *const mean = means();
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
      const int64_t row = view.last ? in_image / view.pitch : view.channels.begin + channel;
      const int column = static_cast<int>(in_image - row * view.pitch);
      A q[kUnit] = {}, p[kUnit] = {};
      if (reads_x) {
        load_unit<kBytes, kVector, From::global>(x + in_image * kBytes, last, half_, p);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) q[j] = p[j];
        affine_.apply(view, channel, q);
      }
      if (!of_affine) {  // otherwise the factor is x itself
#pragma unroll
        for (int j = 0; j < kUnit; ++j) p[j] = q[j];
        before_values<kBefore, kFast>(a_.options.before, p);
      }
      if (needs_pre()) {
        A pre[kUnit] = {};
        if (residual) {
          load_unit<kBytes, kVector, From::global>(residual + in_image * kBytes, last, half_, pre);
        }
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          const int c = view.last ? channel + j : channel;
          A sum = before_value<kBefore, kFast>(a_.options.before, q[j]) * scale[c];
          if (has_shift_) sum += shift[c];
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
          const int c = view.last ? channel + j : channel;
          const int64_t position = view.last ? row : column + j;
          value = value * scale[c] + (position < limit ? mean[c] : A(0));
          value = before_chain<kBefore, kFast>(a_.options.before, q[j], value);
        }
        if (which == Sum::mp || which == Sum::dq_x) value *= p[j];
        t[j] = kVector || j < last ? value : A(0);
      }
    };
    const int all = static_cast<int>(s_.positions);
    __syncthreads();  // scratch
    if (view.last) {
      sum_columns<kVector>(view, all, scratch(), to, term);
    } else {
      sum_rows<kVector>(view, p_, all, scratch(), to, term);
    }
  }

  // ds of the channels of this block, and dshift, out of the parts of a split in space.
  SENET_DEVICE void finish_sums() {
    if (split_space()) {
      A *const ds = of_ds(), *const dshift = of_dshift();
      team_.meet();
      for (int c = threadIdx.x; c < c_; c += blockDim.x) {
        ds[c] = team_.total(c);
        if (has_shift_) dshift[c] = team_.total(c_ + c);
      }
    }
    __syncthreads();
  }

  // ds becomes du of the gates.
  SENET_DEVICE void through_gate(int64_t b) {
    const int n = channels().size(), c0 = channels().begin;
    A* du = l_.du ? static_cast<A*>(l_.du) + b * s_.outputs + c0 : nullptr;
    A* ds_out = l_.ds ? static_cast<A*>(l_.ds) + b * c_ + c0 : nullptr;
    A *const ds = of_ds(), *const dshift = of_dshift();
    const bool writes = writes_channels();
    for (int c = threadIdx.x; c < n; c += blockDim.x) {
      A value = ds[c];
      if (ds_out && writes) ds_out[c] = value;
      value = chain_of<A>(a_.options.gate, u(b)[c], value);
      if (w().beta) value *= parameter_at<A>(w().dtype, w().beta, c0 + c);
      ds[c] = value;
      if (du && writes) {
        du[c] = value;
        if (has_shift_) du[c_ + c] = dshift[c];
      }
    }
    __syncthreads();
  }

  // From du to means(): dz of the channels of this block over the number of positions.
  SENET_DEVICE void through_layers(int64_t b) {
    const int n = channels().size(), c0 = channels().begin;
    A *const hidden = this->hidden(), *const scratch = this->scratch();
    A *const ds = of_ds(), *const dshift = of_dshift(), *const mean = means();
    int rows;
    if (s_.form == Form::two_layers) {
      rows = static_cast<int>(s_.hidden);
      A* const sums = split_channels() ? team_.mine() : hidden;
      columns_product(gates(), n, rows, ds, scratch, sums, false);
      if (has_shift_) columns_product(shifts(), n, rows, dshift, scratch, sums, true);
      if (split_channels()) {
        team_.meet();
      } else {
        __syncthreads();
      }
      const A* h = static_cast<const A*>(a_.h) + b * rows;
      A* dh = l_.dh && team_.rank() == 0 ? static_cast<A*>(l_.dh) + b * rows : nullptr;
      for (int i = threadIdx.x; i < rows; i += blockDim.x) {
        const A sum = split_channels() ? team_.total(i) : hidden[i];
        const A value = chain_of<A>(a_.options.activation, h[i], sum);
        hidden[i] = value;
        if (dh) dh[i] = value;
      }
    } else {  // all of du
      rows = static_cast<int>(s_.outputs);
      A* const all = split_channels() ? team_.mine() : hidden;
      for (int i = threadIdx.x; i < rows; i += blockDim.x) {
        const int c = (i < c_ ? i : i - c_) - c0;
        const bool ours = c >= 0 && c < n;
        all[i] = ours ? (i < c_ ? ds[c] : dshift[c]) : A(-0.0);
      }
      if (split_channels()) {
        team_.meet();
        for (int i = threadIdx.x; i < rows; i += blockDim.x) hidden[i] = team_.total(i);
      }
    }
    __syncthreads();
    if (!l_.needs_dz) return;
    columns_product(w1(), rows, n, hidden, scratch, mean, false);
    __syncthreads();
    divide_mean(b, [&](int c) { return mean[c]; });
  }
  template <class Of>
  SENET_DEVICE void divide_mean(int64_t b, Of of) {
    const A positions = static_cast<A>(counted(s_, a_.lengths, b));
    A* const mean = means();
    const int n = channels().size();
    for (int c = threadIdx.x; c < n; c += blockDim.x) mean[c] = of(c) / positions;
    __syncthreads();
  }

  // dx and d_residual.
  SENET_DEVICE void write(int64_t b, const char* slot) {
    if constexpr (kWay != Way::general) {
      const View view = self().view;
      lean_dx<K>(view, p_, streams(b, view, slot), factors(), means());
    } else {
      general_write(b, slot);
    }
  }
  // A unit per thread at a time.
  SENET_DEVICE void general_write(int64_t b, const char* slot) {
    const View view = self().view;
    A *const scale = factors(), *const shift = addends(), *const mean = means();
    const char* dy = at(a_.dy.data, b * a_.dy.stride);
    const char* x = at(a_.x.data, b * a_.x.stride);
    const char* residual = at(a_.residual.data, b * a_.residual.stride);
    char* dx = a_.dx ? static_cast<char*>(a_.dx) + b * s_.image() * kBytes : nullptr;
    char* dresidual =
        a_.dresidual ? static_cast<char*>(a_.dresidual) + b * s_.image() * kBytes : nullptr;
    const int limit = counted(s_, a_.lengths, b);
    const bool reads_x = second_pass_needs_x() || needs_pre();
    for (Walk<kVector> at(view); at.inside(view); at.advance()) {
      const int count = at.count(view);
      const int64_t offset = at.in_image(view) * kBytes;
      A m[kUnit] = {}, v[kUnit] = {}, other[kUnit];
      if (slot) {
        load_unit<kBytes, kVector, From::shared>(slot + at.in_slice(view) * kBytes, count, half_,
                                                 m);
      } else if (dy) {
        load_unit<kBytes, kVector, From::stream>(dy + offset, count, half_, m);
      }
      if (reads_x) {
        load_unit<kBytes, kVector, From::stream>(x + offset, count, half_, v);
        affine_.apply(view, at, v);
      }
      if (needs_pre()) {
        A pre[kUnit];
        at.spread(view, scale, other);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          pre[j] = before_value<kBefore, kFast>(a_.options.before, v[j]) * other[j];
        }
        if (has_shift_) {
          at.spread(view, shift, other);
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
        through_after(m, unit_bits(b, view, at), nullptr);
      }
      if (dresidual) store_unit<kBytes, kVector>(dresidual + offset, count, half_, m);
      if (!dx) continue;
      at.spread(view, scale, other);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) m[j] *= other[j];
      at.spread(view, mean, other);
      if (a_.lengths) at.only_below(view, limit, A(0), other);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) m[j] += other[j];
      before_chains<kBefore, kFast>(a_.options.before, v, m);
      if (affine_.there) {
        at.spread(view, affine_.scale, other);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) m[j] *= other[j];
      }
      store_unit<kBytes, kVector>(dx + offset, count, half_, m);
    }
  }

  // The mask's bits of a unit, which may reach over the ends of rows. What pads a row is 0.
  SENET_DEVICE uint32_t unit_bits(int64_t b, const View& view, const Walk<kVector>& at) const {
    if (view.last) {
      return row_bits(mask_row(b, view.positions.begin + at.row), bit_row(),
                      view.channels.begin + at.at);
    }
    const int64_t row = view.channels.begin + at.row;
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
  Team<A> team_;
  const Affine<A> affine_;
};

template <int kBytes, bool kVector, int kBefore, int kWay>
__global__ void __launch_bounds__(kWay || kBytes == 8 ? kForwardThreads : kBackwardThreads,
                                  kWay ? 2 : 1)
    backward_kernel(const __grid_constant__ BackwardLaunch launch) {
  BackwardBlock<kBytes, kVector, static_cast<Fn>(kBefore), static_cast<Way>(kWay)>(launch).run();
}

}  // namespace gpu
}  // namespace senet
