// Backward of the squeeze alone, in one pass over the images: dq = dz / S before'(q), dx = a dq,
// and what the affine map's gradients add up. Channels are shared out, so that each has its sums at
// hand.
#pragma once

#include "plan.h"

namespace senet {
namespace SENET_ISA {
namespace {

template <class T, Fn kBefore>
class SqueezeBackwardPass {
  using A = Acc<T>;

 public:
  SqueezeBackwardPass(const BackwardArgs& args, const Runtime& runtime)
      : a_(args),
        s_(args.shape),
        runtime_(runtime),
        plan_(make_plan(s_, 2 * sizeof(T), sizeof(T), runtime.threads)) {
    constexpr bool kMap = kBefore == kAffine;
    Carver<A> carver;
    const int64_t dmean = carver.reserve(s_.batch * s_.channels);
    const int64_t none = carver.reserve(s_.channels);
    const int64_t affine = kMap ? carver.reserve(2 * s_.channels) : 0;
    const int64_t sums = kMap ? carver.reserve(2 * s_.channels) : 0;
    const int64_t columns = kMap ? carver.reserve(6 * s_.channels) : 0;
    A* memory = static_cast<A*>(runtime.scratch(carver.bytes()));
    dmean_ = memory + dmean;
    none_ = memory + none;
    sums_ = memory + sums;
    columns_ = memory + columns;
    prologue_ =
        make_prologue<A, kBefore>(a_.options.before, a_.parameters, s_.channels, memory + affine);
    std::fill(none_, none_ + s_.channels, A(0));
  }

  void run() {
    for (int64_t b = 0; b < s_.batch; ++b) {
      const A positions = static_cast<A>(counted(s_, a_.lengths, b));
      const A* dz = static_cast<const A*>(a_.dz) + b * s_.channels;
      for_vectors<A>(s_.channels, [&](int64_t c, auto lanes) {
        put(dmean_ + b * s_.channels + c, get(dz + c, lanes) / positions, lanes);
      });
    }
    share(runtime_, plan_, plan_.threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const Range r = slice(s_.channels, i, plan_.threads);
        s_.channels_last ? columns(r) : rows(r);
      }
    });
    if constexpr (kBefore == kAffine) {
      with_gradient_storage<T>(a_.parameters.dtype, [&](auto zero) {
        using P = decltype(zero);
        store_sums(static_cast<P*>(a_.daffine_scale), sums_);
        store_sums(static_cast<P*>(a_.daffine_shift), sums_ + s_.channels);
      });
    }
  }

 private:
  // Channels-last: runs of the channels in the range.
  SENET_OUTLINE void columns(Range range) {
    const int64_t c = range.begin, n = range.end - range.begin;
    A* total = columns_ + 6 * c;
    ColumnSink<A, kBefore> sums(total, total + 2 * n, n);
    for (int64_t b = 0; b < s_.batch; ++b) {
      const int64_t length = counted(s_, a_.lengths, b);
      for (int64_t r = 0; r < s_.positions; ++r) {
        const int64_t at = r * s_.channels + c;
        const A* dmean = r < length ? dmean_ + b * s_.channels + c : none_ + c;
        mean_run(x(b) + at, dx(b, at), n, prologue_.from_channel(c), PerElement<A>{dmean}, sums);
        sums.end_run();
      }
    }
    sums.finish();
    if constexpr (kBefore == kAffine) {
      std::copy(total, total + n, sums_ + c);
      std::copy(total + n, total + 2 * n, sums_ + s_.channels + c);
    }
  }

  SENET_OUTLINE void rows(Range range) {
    for (int64_t c = range.begin; c < range.end; ++c) {
      ChannelSink<A, kBefore> sums;
      for (int64_t b = 0; b < s_.batch; ++b) {
        const int64_t at = c * s_.positions;
        const Vec<A> dmean = broadcast<A>(dmean_[b * s_.channels + c]);
        mean_run(x(b) + at, dx(b, at), s_.positions, prologue_.of_channel(c),
                 Prefix<A>{dmean, counted(s_, a_.lengths, b)}, sums);
      }
      sums.finish(sums_ + c, sums_ + s_.channels + c);
    }
  }

  const T* x(int64_t b) const { return static_cast<const T*>(a_.x.data) + b * a_.x.stride; }
  T* dx(int64_t b, int64_t at) const {
    return a_.dx ? static_cast<T*>(a_.dx) + b * s_.image() + at : nullptr;
  }
  template <class P>
  void store_sums(P* out, const A* sums) {
    if (out) sum_images(out, s_.channels, sums, nullptr, s_.channels, 1);
  }

  const BackwardArgs& a_;
  const Shape& s_;
  const Runtime& runtime_;
  const Plan plan_;
  A *dmean_, *none_, *sums_, *columns_;
  Prologue<A, kBefore> prologue_;
};

}  // namespace
}  // namespace SENET_ISA
}  // namespace senet
