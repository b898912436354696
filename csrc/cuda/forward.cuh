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
#include "passes_forward.cuh"

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

template <int kBytes, bool kVector, Fn kBefore, Way kWay>
class ForwardBlock {
  using A = typename Accumulation<kBytes>::Type;
  using K = Lean<kBytes, kWay == Way::lean_f16, kBefore>;
  static constexpr bool kFast = kBytes == 2;

 public:
  SENET_DEVICE explicit ForwardBlock(const ForwardLaunch& launch)
      : a_(launch.a),
        s_(launch.a.shape),
        p_(launch.plan),
        half_(launch.a.dtype == DType::f16),
        has_shift_(kWay == Way::general && s_.outputs > s_.channels),
        c_(static_cast<int>(s_.channels)),
        team_(make_team<A>(s_, p_, launch.scratch)),
        affine_(a_.parameters, p_, channels(), kWay == Way::general) {
    if (!p_.weights) return;
    const Parameters& w = a_.parameters;
    const int n = channels().size(), inner = static_cast<int>(s_.inner());
    char* const at = shared_memory() + p_.at.weights;
    if (s_.form == Form::two_layers) {
      copy_weights(first_of(w), static_cast<int>(s_.hidden), n, at);
    }
    copy_weights(second_of(w, 0), n, inner, at + gates_at());
    if (has_shift_) copy_weights(second_of(w, c_), n, inner, at + shifts_at());
  }

  SENET_DEVICE void run() {
    const auto ask = [this](int64_t b) SENET_INLINE {
      prefetch_slice<kBytes>(image(a_.residual.data, b * a_.residual.stride));
    };
    each_image<kBytes, kVector>(s_, p_, a_.x, team_, ask,
                                [this](int64_t b, const char* slot) SENET_INLINE {
                                  const char* x = image(a_.x.data, b * a_.x.stride);
                                  if (s_.form != Form::scale) squeeze(b, x, slot);
                                  if (s_.form != Form::squeeze) {
                                    excite(b);
                                    scale(b, x, slot);
                                  }
                                });
  }

 private:
  SENET_DEVICE static Range channels() { return self().view.channels; }
  SENET_DEVICE A* array(int offset) const { return reinterpret_cast<A*>(shared_memory() + offset); }
  SENET_DEVICE static const char* image(const void* data, int64_t element) {
    return data ? static_cast<const char*>(data) + element * kBytes : nullptr;
  }
  // The matrices' parts for the channels of this block: as they are given, and where those that
  // stay lie in shared memory. Worked out when they are needed, which takes no registers meanwhile.
  SENET_DEVICE Matrix first_of(const Parameters& w) const {
    return matrix_at(w.w1, w.dtype, c_, channels().begin);
  }
  SENET_DEVICE Matrix second_of(const Parameters& w, int row) const {
    const int64_t inner = s_.inner();
    return matrix_at(w.w2, w.dtype, inner, (row + channels().begin) * inner);
  }
  SENET_DEVICE int gates_at() const {
    if (s_.form != Form::two_layers) return 0;
    return kept_bytes(a_.parameters.dtype, static_cast<int>(s_.hidden), channels().size());
  }
  SENET_DEVICE int shifts_at() const {
    const int inner = static_cast<int>(s_.inner());
    return gates_at() + kept_bytes(a_.parameters.dtype, channels().size(), inner);
  }
  SENET_DEVICE Matrix kept(int offset, int columns) const {
    return kept_matrix(shared_memory() + p_.at.weights + offset, a_.parameters.dtype, columns);
  }
  SENET_DEVICE Matrix w1() const {
    return p_.weights ? kept(0, channels().size()) : first_of(a_.parameters);
  }
  SENET_DEVICE Matrix gates() const {
    const int inner = static_cast<int>(s_.inner());
    return p_.weights ? kept(gates_at(), inner) : second_of(a_.parameters, 0);
  }
  SENET_DEVICE Matrix shifts() const {
    const int inner = static_cast<int>(s_.inner());
    return p_.weights ? kept(shifts_at(), inner) : second_of(a_.parameters, c_);
  }
  // Arrays that a step alone needs: where they are is worked out in it, and no register keeps it
  // meanwhile.
  SENET_DEVICE A* sums() const { return array(opaque(p_.at.sums)); }
  SENET_DEVICE A* hidden() const { return array(opaque(p_.at.hidden)); }
  SENET_DEVICE A* scratch() const { return array(opaque(p_.at.scratch)); }
  SENET_DEVICE A* factors() const { return array(opaque(p_.at.scale)); }  // of each channel
  SENET_DEVICE A* addends() const { return array(opaque(p_.at.shift)); }
  // Whether each block has but its own channels of vectors over channels.
  SENET_DEVICE bool split_channels() const {
    return p_.exchange != Exchange::none && p_.axis == Axis::channels;
  }
  // Whether it falls to this block to write what all blocks of the image have.
  SENET_DEVICE bool writes_shared() const { return team_.rank() == 0; }

  // The means z of the channels of this block, into sums().
  SENET_DEVICE void squeeze(int64_t b, const char* x, const char* slot) {
    const int n = counted(s_, a_.lengths, b);
    const bool split_space = p_.exchange != Exchange::none && p_.axis == Axis::space;
    const View view = self().view;
    A* const sums = this->sums();
    A* const to = split_space ? team_.mine() : sums;
    if constexpr (kWay != Way::general) {
      lean_squeeze<K>(view, p_, {slot, x + view.first * kBytes}, scratch(), to);
    } else {
      general_squeeze(n, x, slot, to);
    }
    if (split_space) {
      team_.meet();
    } else {
      __syncthreads();
    }
    const A positions = static_cast<A>(n);
    A* z = static_cast<A*>(a_.z);
    if (z) z += b * c_ + channels().begin;
    const bool writes = z && (!split_space || writes_shared());
    for (int c = threadIdx.x; c < channels().size(); c += blockDim.x) {
      const A mean = (split_space ? team_.total(c) : sums[c]) / positions;
      sums[c] = mean;
      if (writes) z[c] = mean;
    }
    __syncthreads();
  }
  SENET_DEVICE void general_squeeze(int n, const char* x, const char* slot, A* to) {
    const View view = self().view;
    const auto term = [&](int64_t in_image, int64_t in_slice, int last, int channel, A* t) {
      if (slot) {
        load_unit<kBytes, kVector, From::shared>(slot + in_slice * kBytes, last, half_, t);
      } else {
        load_unit<kBytes, kVector, From::global>(x + in_image * kBytes, last, half_, t);
      }
      affine_.apply(view, channel, t);
      before_values<kBefore, kFast>(a_.options.before, t);
      if constexpr (!kVector) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j) t[j] = j < last ? t[j] : A(0);
      }
    };
    if (view.last) {
      sum_columns<kVector>(view, n, scratch(), to, term);
    } else {
      sum_rows<kVector>(view, p_, n, scratch(), to, term);
    }
  }

  // factors() and addends() of the channels of this block.
  SENET_DEVICE void excite(int64_t b) {
    const Parameters& w = a_.parameters;
    const int n = channels().size(), c0 = channels().begin;
    const int r = static_cast<int>(s_.hidden), inner = static_cast<int>(s_.inner());
    A *const sums = this->sums(), *const hidden = this->hidden();
    A *const factors = this->factors(), *const addends = this->addends();
    const A* in = hidden;
    if (s_.form == Form::two_layers) {
      A* h = a_.h && writes_shared() ? static_cast<A*>(a_.h) + b * r : nullptr;
      const bool split = split_channels();
      rows_product(w1(), r, n, sums, split ? team_.mine() : hidden);
      if (split) {
        team_.meet();
      } else {
        __syncthreads();
      }
      for (int i = threadIdx.x; i < r; i += blockDim.x) {
        A sum = split ? team_.total(i) : hidden[i];
        sum += parameter_or<A>(w.dtype, w.b1, i, A(0));
        if (h) h[i] = sum;
        hidden[i] = value_of<A>(a_.options.activation, sum);
      }
    } else if (s_.form == Form::one_layer) {
      if (split_channels()) {
        for (int c = threadIdx.x; c < c_; c += blockDim.x) {
          const bool ours = c >= c0 && c < c0 + n;
          team_.mine()[c] = ours ? sums[c - c0] : A(-0.0);
        }
        team_.meet();
        for (int c = threadIdx.x; c < c_; c += blockDim.x) hidden[c] = team_.total(c);
      } else {
        in = sums;
      }
    }
    __syncthreads();

    // u, into factors() and addends(); of the scaling alone it is given.
    const bool given = s_.form == Form::scale;
    if (!given) {
      rows_product(gates(), n, inner, in, factors);
      if (has_shift_) rows_product(shifts(), n, inner, in, addends);
      __syncthreads();
    }
    const bool writes = a_.u && !given && (p_.axis == Axis::channels || writes_shared());
    A* u = static_cast<A*>(a_.u) + b * s_.outputs + c0;
    for (int c = threadIdx.x; c < n; c += blockDim.x) {
      const A gate = given ? u[c] : factors[c] + parameter_or<A>(w.dtype, w.b2, c0 + c, A(0));
      A factor = value_of<A>(a_.options.gate, gate);
      if (w.beta) factor *= parameter_at<A>(w.dtype, w.beta, c0 + c);
      if (w.alpha) factor += parameter_at<A>(w.dtype, w.alpha, c0 + c);
      factors[c] = factor;
      if (writes) u[c] = gate;
      if (!has_shift_) continue;
      const A shift =
          given ? u[c_ + c] : addends[c] + parameter_or<A>(w.dtype, w.b2, c_ + c0 + c, A(0));
      addends[c] = shift;
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
    if constexpr (kWay != Way::general) {
      lean_scale_slice(b, x, slot);
    } else {
      general_scale(b, x, slot);
    }
  }
  // Where the bits of units make up no bytes of the mask, they are gathered as in the general way,
  // but always of whole bands, whose bytes they complete.
  SENET_DEVICE void lean_scale_slice(int64_t b, const char* x, const char* slot) {
    const View view = self().view;
    const A* const scale = factors();
    const int64_t first = b * s_.image() + view.first;
    Streams s = {{slot, x + view.first * kBytes},
                 image(a_.residual.data, b * a_.residual.stride + view.first),
                 static_cast<char*>(a_.y) + (b * a_.y_stride + view.first) * kBytes,
                 a_.mask ? a_.mask + first / kUnit : nullptr};
    const auto visit = [&](const Place& at, const Steps& step, int n, auto factors)
                           SENET_INLINE { lean_scale<K>(s, at, step, n, factors(scale)); };
    if (view.last) {
      visit_columns<K>(view, visit);
      return;
    }
    if (p_.lanes == kLaneGroup) {
      visit_rows<K>(view, p_, visit);
      return;
    }
    const bool gathers = a_.mask && p_.stretch > 0;
    const uint32_t all = static_cast<uint32_t>(view.outer) * view.inner / kUnit;
    const uint32_t width = p_.band * view.inner / kUnit;
    const uint32_t step = gathers ? p_.stretch / width * width : all;
#pragma unroll 1
    for (uint32_t unit = 0; unit < all; unit += step) {
      const uint32_t end = unit + step < all ? unit + step : all;
      if (gathers) s.mask = units() - unit;
      visit_bands<K>(view, p_, unit, end, visit);
      if (!gathers) break;
      __syncthreads();
      write_mask(b, unit, end);
      __syncthreads();
    }
  }
  SENET_DEVICE void write_mask(int64_t b, uint32_t first, uint32_t end) {
    const View view = self().view;
    write_bytes(units(), first, end, view.inner,
                a_.mask + (b * s_.channels + channels().begin) * ((view.inner + 7) / 8));
  }
  SENET_DEVICE void general_scale(int64_t b, const char* x, const char* slot) {
    const View view = self().view;
    Walk<kVector> at(view);
    for (uint32_t end = p_.stretch;; end += p_.stretch) {
      const bool gathers = kVector && a_.mask && p_.stretch > 0;
      scale_units(b, x, slot, at, gathers ? p_.stretch : UINT32_MAX);
      if (!gathers) return;
      const uint32_t all = static_cast<uint32_t>(int64_t(view.outer) * view.inner / kUnit);
      __syncthreads();
      write_mask(b, end - p_.stretch, end < all ? end : all);
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
    const View view = self().view;
    const A *const scale = factors(), *const shift = addends();
    const char* residual = image(a_.residual.data, b * a_.residual.stride);
    char* y = static_cast<char*>(a_.y) + b * a_.y_stride * kBytes;
    const int64_t rows = view.last ? s_.positions : s_.channels;
    const int64_t bit_row = (view.pitch + 7) / 8;
    uint8_t* const mask = a_.mask + b * rows * bit_row;
    const Fn after = a_.options.after;
    for (uint32_t unit = threadIdx.x; unit < stretch && at.inside(view); unit += blockDim.x) {
      const int count = at.count(view);
      const int64_t offset = at.in_image(view) * kBytes;
      A v[kUnit], factor[kUnit];
      if (slot) {
        load_unit<kBytes, kVector, From::shared>(slot + at.in_slice(view) * kBytes, count, half_,
                                                 v);
      } else {
        load_unit<kBytes, kVector, From::stream>(x + offset, count, half_, v);
      }
      affine_.apply(view, at, v);
      at.spread(view, scale, factor);
      before_values<kBefore, kFast>(a_.options.before, v);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) v[j] *= factor[j];
      if (has_shift_) {
        at.spread(view, shift, factor);
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
          const int64_t row = (view.last ? view.positions.begin : channels().begin) + at.row;
          const int64_t column = (view.last ? view.channels.begin : view.positions.begin) + at.at;
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
  Team<A> team_;
  const Affine<A> affine_;
};

// kBefore: the code of a function; -1 is any of them. kWay: of the loops over x.
template <int kBytes, bool kVector, int kBefore, int kWay>
__global__ void __launch_bounds__(kForwardThreads, kWay          ? 2
                                                   : kBytes == 8 ? 1
                                                                 : 2)
    forward_kernel(const __grid_constant__ ForwardLaunch launch) {
  ForwardBlock<kBytes, kVector, static_cast<Fn>(kBefore), static_cast<Way>(kWay)>(launch).run();
}

}  // namespace gpu
}  // namespace senet
