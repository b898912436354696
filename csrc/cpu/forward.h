// The forward pass: squeeze, excite, scale; or the first or the last of these alone.
#pragma once

#include "plan.h"

namespace senet {
namespace SENET_ISA {
namespace {

template <class T, Fn kBefore, bool kPlain>
class ForwardPass {
  using A = Acc<T>;

 public:
  ForwardPass(const ForwardArgs& args, const Runtime& runtime)
      : a_(args),
        s_(args.shape),
        runtime_(runtime),
        plan_(make_plan(s_, sizeof(T), args.parameters.dtype == DType::f32 ? 4 : sizeof(T),
                        runtime.threads)),
        squeezes_(s_.form != Form::scale),
        scales_(s_.form != Form::squeeze) {
    const bool folds = s_.channels_last && kBefore != kAffine && !a_.mask && !has_shift();
    fold_ = folds ? rows_of_whole_lines(s_.channels * sizeof(T)) : 1;
    width_ = fold_ * s_.channels;
    // Per image of the largest group or per thread, whichever holds an image at a time.
    const int64_t images = std::max(plan_.threads * plan_.together, plan_.group);
    const int64_t slices = images * plan_.threads;
    Carver<A> carver;
    const int64_t hidden = carver.reserve(images * s_.hidden);
    const int64_t scale = carver.reserve(images * width_);
    const int64_t sums = s_.channels_last ? carver.reserve(slices * width_) : 0;
    const int64_t chain = s_.channels_last ? carver.reserve(plan_.threads * width_) : 0;
    const int64_t affine = kBefore == kAffine ? carver.reserve(2 * s_.channels) : 0;
    A* memory = static_cast<A*>(runtime.scratch(carver.bytes()));
    hidden_ = memory + hidden;
    scale_ = memory + scale;
    sums_ = memory + sums;
    chain_ = memory + chain;
    prologue_ =
        make_prologue<A, kBefore>(a_.options.before, a_.parameters, s_.channels, memory + affine);
    one_run_ = kBefore != kAffine && rows_as_one(s_, a_.mask);
    const int64_t run = s_.channels_last ? width_ : one_run_ ? s_.image() : s_.positions;
    const int64_t image = s_.image() * static_cast<int64_t>(sizeof(T));
    const int64_t bytes =
        ((squeezes_ ? 1 : 0) + (scales_ ? 1 : 0) + (a_.residual.data ? 1 : 0)) * s_.batch * image;
    from_memory_ = comes_from_memory(runtime, bytes);
    streams_ = exceeds_caches(runtime, bytes) && a_.y != a_.x.data &&
               streams_to(runtime, a_.y, s_.batch * image, run * sizeof(T));
  }

  void run() {
    share(runtime_, plan_, plan_.alone, [&](int64_t begin, int64_t end, int slot) {
      const int64_t at = slot * plan_.together;
      for (int64_t b = begin; b < end; b += plan_.together) {
        const int64_t images = std::min(plan_.together, end - b);
        for (int64_t g = 0; squeezes_ && g < images; ++g) {
          squeeze(b + g, 0, 1, slot, sums_ + at * width_);
        }
        if (!scales_) continue;
        if (s_.form == Form::two_layers) hidden_layer(b, images, at, 0, 1);
        gate_layer(b, images, at, 0, 1);
        for (int64_t g = images - 1; g >= 0; --g) scale(b + g, 0, 1, at + g);
      }
    });
    for (int64_t b = plan_.alone; b < s_.batch; b += plan_.group) {
      team(b, std::min(plan_.group, s_.batch - b));
    }
  }

 private:
  A* z(int64_t b) const { return static_cast<A*>(a_.z) + b * s_.channels; }
  A* h(int64_t b) const { return static_cast<A*>(a_.h) + b * s_.hidden; }
  A* u(int64_t b) const { return static_cast<A*>(a_.u) + b * s_.outputs; }

  SENET_OUTLINE void team(int64_t b0, int64_t images) {
    const int64_t slices = plan_.slices(images);
    const auto squeezing = [&](int64_t begin, int64_t end, int slot) {
      for (int64_t task = begin; task < end; ++task) {
        squeeze(b0 + task / slices, task % slices, slices, slot, sums_ + task * width_);
      }
    };
    const auto adding = [&](int64_t begin, int64_t end, int) {
      for (int64_t g = 0; g < images; ++g) {
        finish_mean(b0 + g, sums_ + g * slices * width_, slices * fold_, z(b0 + g), {begin, end});
      }
    };
    // The second layer needs all of the first.
    const int64_t parts = plan_.parts(s_, images);
    const auto first_layer = [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) hidden_layer(b0, images, 0, i, parts);
    };
    const auto second_layer = [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) gate_layer(b0, images, 0, i, parts);
    };
    const auto scaling = [&](int64_t begin, int64_t end, int) {
      for (int64_t task = begin; task < end; ++task) {
        scale(b0 + task / slices, task % slices, slices, task / slices);
      }
    };
    const int64_t tasks = images * slices;
    const bool in_slices = squeezes_ && s_.channels_last && slices > 1;
    share_phases(runtime_, plan_,
                 {{squeezes_ ? tasks : 0, squeezing},
                  {in_slices ? s_.channels : 0, adding},
                  {scales_ && s_.form == Form::two_layers ? parts : 0, first_layer},
                  {scales_ ? parts : 0, second_layer},
                  {scales_ ? tasks : 0, scaling}});
  }

  // The mean of slice i of image b. Rows: a range of channels. Channels-last: a range of
  // positions, whose sums (fold_ for each channel) stay in `sums` for finish_mean unless the slice
  // is the whole image.
  SENET_OUTLINE void squeeze(int64_t b, int64_t i, int64_t slices, int slot, A* sums) {
    const T* x = static_cast<const T*>(a_.x.data) + b * a_.x.stride;
    const int64_t n = counted(s_, a_.lengths, b);
    if (s_.channels_last) {
      const int64_t runs = n / fold_;
      const Range r = slice(runs, i, slices);
      sum_columns(x + r.begin * width_, r.end - r.begin, width_, from_memory_,
                  prologue_.from_channel(0), sums, chain_ + slot * width_);
      if (i == slices - 1) {
        add_rows(x + runs * width_, n % fold_, s_.channels, prologue_.from_channel(0), sums);
      }
      if (slices == 1) finish_mean(b, sums, fold_, z(b), {0, s_.channels});
    } else {
      const Range r = slice(s_.channels, i, slices);
      A* to = z(b) + r.begin;
      sum_rows(x + r.begin * s_.positions, r.end - r.begin, s_.positions, n, prologue_, r.begin,
               to);
      finish_mean(b, to, 1, to, {0, r.end - r.begin});
    }
  }

  // z = the channels' sums, of each of which there are some C apart, over the number of positions;
  // of a range of channels.
  SENET_OUTLINE void finish_mean(int64_t b, const A* sums, int64_t some, A* z, Range r) {
    const A positions = static_cast<A>(counted(s_, a_.lengths, b));
    for_vectors<A>(r.end - r.begin, [&](int64_t i, auto lanes) {
      const A* first = sums + r.begin + i;
      Vec<A> total = get(first, lanes);
      for (int64_t s = 1; s < some; ++s) total += get(first + s * s_.channels, lanes);
      put(z + r.begin + i, total / positions, lanes);
    });
  }

  SENET_OUTLINE void hidden_layer(int64_t b, int64_t images, int64_t at, int64_t i, int64_t parts) {
    const Range r = slice(s_.hidden, i, parts);
    linear<A>(a_.parameters.dtype, a_.parameters.w1, a_.parameters.b1, r.begin, r.end, s_.channels,
              z(b), s_.channels, h(b), s_.hidden, images);
    for (int64_t g = 0; g < images; ++g) {
      map(h(b + g) + r.begin, hidden_ + (at + g) * s_.hidden + r.begin, r.end - r.begin,
          a_.options.activation);
    }
  }

  SENET_OUTLINE void gate_layer(int64_t b, int64_t images, int64_t at, int64_t i, int64_t parts) {
    const Range r = slice(s_.outputs, i, parts);
    if (s_.form != Form::scale) {  // whose u is given
      const A* in = s_.form == Form::two_layers ? hidden_ + at * s_.hidden : z(b);
      linear<A>(a_.parameters.dtype, a_.parameters.w2, a_.parameters.b2, r.begin, r.end, s_.inner(),
                in, s_.inner(), u(b), s_.outputs, images);
    }
    const int64_t end = std::min(r.end, s_.channels);  // the rest is the shift
    for (int64_t g = 0; g < images && r.begin < end; ++g) {
      A* scale = scale_ + (at + g) * width_;
      map(u(b + g) + r.begin, scale + r.begin, end - r.begin, a_.options.gate);
      gates_to_scale(a_.parameters, r.begin, end, scale);
      for (int64_t f = 1; f < fold_; ++f) {
        std::copy(scale + r.begin, scale + end, scale + f * s_.channels + r.begin);
      }
    }
  }

  // Slice i of image b, whose factors are at place `at` of scale_.
  SENET_OUTLINE void scale(int64_t b, int64_t i, int64_t slices, int64_t at) {
    const T* x = static_cast<const T*>(a_.x.data) + b * a_.x.stride;
    const T* residual = static_cast<const T*>(a_.residual.data);
    if (residual) residual += b * a_.residual.stride;
    T* y = static_cast<T*>(a_.y) + b * a_.y_stride;
    const A* factors = scale_ + at * width_;
    const A* shifts = has_shift() ? u(b) + s_.channels : factors;
    const int64_t runs = s_.channels_last ? s_.positions / fold_ : s_.channels;
    const int64_t n = s_.channels_last ? width_ : s_.positions;
    const int64_t bit_row = (n + 7) / 8;
    uint8_t* bits = a_.mask ? a_.mask + b * runs * bit_row : nullptr;
    const Range range = slice(runs, i, slices);
    if constexpr (kBefore != kAffine) {
      if (one_run_) {
        const int64_t first = range.begin * n;
        const bool streams = streams_ && is_line_aligned(y + first);
        for_rows_as_one<A>(
            range.end - range.begin, n, [&](int64_t at, int64_t count, auto of) SENET_LAMBDA {
              at += first;
              scale_run<T, kPlain>(
                  x + at, residual ? residual + at : nullptr, y + at, nullptr, count,
                  prologue_.of_channel(0), Uniform<A>{of(factors + range.begin)},
                  Uniform<A>{of(shifts + range.begin)}, has_shift(), a_.options.after, streams);
            });
        if (streams_) end_streams();
        return;
      }
    }
    second_reading(range, n * sizeof(T), runtime_.core_cache, [&](int64_t r) SENET_LAMBDA {
      const T* from = x + r * n;
      const T* add = residual ? residual + r * n : nullptr;
      uint8_t* row_bits = bits ? bits + r * bit_row : nullptr;
      if (s_.channels_last) {
        scale_run<T, kPlain>(from, add, y + r * n, row_bits, n, prologue_.from_channel(0),
                             PerElement<A>{factors}, PerElement<A>{shifts}, has_shift(),
                             a_.options.after, streams_);
      } else {
        scale_run<T, kPlain>(from, add, y + r * n, row_bits, n, prologue_.of_channel(r),
                             Uniform<A>{broadcast<A>(factors[r])},
                             Uniform<A>{broadcast<A>(shifts[r])}, has_shift(), a_.options.after,
                             streams_);
      }
    });
    const int64_t left = s_.positions % fold_;
    if (left > 0 && i == slices - 1) {
      const int64_t at = runs * n;
      scale_run<T, kPlain>(x + at, residual ? residual + at : nullptr, y + at, nullptr,
                           left * s_.channels, prologue_.from_channel(0), PerElement<A>{factors},
                           PerElement<A>{shifts}, has_shift(), a_.options.after, streams_);
    }
    if (streams_) end_streams();
  }
  bool has_shift() const { return s_.outputs > s_.channels; }

  const ForwardArgs& a_;
  const Shape& s_;
  const Runtime& runtime_;
  const Plan plan_;
  const bool squeezes_, scales_;
  bool from_memory_, one_run_, streams_;  // the last of y: written around the caches
  // Channels-last: how many positions make a run, so that runs are of whole cache lines; and its
  // elements. 1 and C otherwise.
  int64_t fold_, width_;
  A *hidden_, *scale_, *sums_, *chain_;
  Prologue<A, kBefore> prologue_;
};

}  // namespace
}  // namespace SENET_ISA
}  // namespace senet
