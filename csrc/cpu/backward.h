// The backward pass. With m = dy after'(pre):
//   ds = sum of m p, dshift = sum of m                 one read of dy and x
//   du = [beta ds gate'(u), dshift], dh = (W2^T du) activation'(h), dz = W1^T dh
//   dq = (m scale + dz / S) before'(q), dx = a dq      a second read; of dy alone in plain SE
//   da = sum of dq x, db = sum of dq                   of an affine map, in that second read
// and the parameters' gradients as sums over images of outer products, in a fixed order. The
// scaling alone has no dz; the squeeze alone has nothing else.
#pragma once

#include "plan.h"

namespace senet {
namespace SENET_ISA {
namespace {

template <class T, Fn kBefore, bool kPlain>
class BackwardPass {
  using A = Acc<T>;

 public:
  BackwardPass(const BackwardArgs& args, const Runtime& runtime)
      : a_(args),
        s_(args.shape),
        runtime_(runtime),
        plan_(make_plan(s_, 2 * sizeof(T), args.parameters.dtype == DType::f32 ? 4 : sizeof(T),
                        runtime.threads)),
        has_shift_(s_.outputs > s_.channels),
        wants_sums_(s_.form != Form::scale || args.du || args.dalpha || args.dbeta),
        wants_affine_(args.daffine_scale || args.daffine_shift),
        wants_dq_(args.dx || wants_affine_),
        width_(has_shift_ ? 2 * s_.channels : s_.channels) {
    const int64_t images = std::max(plan_.threads * plan_.together, plan_.group);
    const int64_t slices = images * plan_.threads;
    Carver<A> carver;
    // For every image, since the parameters' gradients want them at the end.
    const int64_t ds = carver.reserve(s_.batch * s_.channels);
    const int64_t gates = carver.reserve(s_.batch * s_.channels);
    const int64_t du = carver.reserve(s_.batch * s_.outputs);
    const int64_t dh = carver.reserve(s_.batch * s_.hidden);
    const int64_t hidden = carver.reserve(s_.batch * s_.hidden);
    // For the images in progress.
    const int64_t scale = carver.reserve(images * s_.channels);
    const int64_t dmean = carver.reserve(images * s_.channels);
    const int64_t sums = s_.channels_last ? carver.reserve(slices * width_) : 0;
    const int64_t chained = s_.channels_last ? carver.reserve(plan_.threads * width_) : 0;
    const int64_t none = args.lengths ? carver.reserve(s_.channels) : 0;
    constexpr bool kMap = kBefore == kAffine;
    const bool columns = kMap && s_.channels_last;
    const int64_t affine = kMap ? carver.reserve(2 * s_.channels) : 0;
    const int64_t of_affine = kMap ? carver.reserve(2 * s_.batch * s_.channels) : 0;
    const int64_t affine_sums = columns ? carver.reserve(2 * slices * s_.channels) : 0;
    const int64_t affine_chain = columns ? carver.reserve(4 * plan_.threads * s_.channels) : 0;
    A* memory = static_cast<A*>(runtime.scratch(carver.bytes()));
    ds_ = memory + ds;
    gates_ = memory + gates;
    du_ = args.du ? static_cast<A*>(args.du) : memory + du;
    dh_ = memory + dh;
    hidden_ = memory + hidden;
    scale_ = memory + scale;
    dmean_ = memory + dmean;
    sums_ = memory + sums;
    chained_ = memory + chained;
    none_ = memory + none;
    of_affine_ = memory + of_affine;
    affine_sums_ = memory + affine_sums;
    affine_chain_ = memory + affine_chain;
    prologue_ =
        make_prologue<A, kBefore>(a_.options.before, a_.parameters, s_.channels, memory + affine);
    const int64_t image = s_.image() * static_cast<int64_t>(sizeof(T));
    one_run_ = kBefore != kAffine && !args.lengths && rows_as_one(s_, a_.mask);
    const int64_t run = s_.channels_last ? s_.channels : one_run_ ? s_.image() : s_.positions;
    const auto streams = [&](const void* to) {
      return !to || streams_to(runtime, to, s_.batch * image, run * sizeof(T));
    };
    streams_ = exceeds_caches(runtime, (a_.dresidual ? 4 : 3) * s_.batch * image) &&
               streams(a_.dx) && streams(a_.dresidual);
    if (args.lengths) std::fill(none_, none_ + s_.channels, A(0));
    // -0, which changes no number it is added to.
    if (s_.form == Form::scale) std::fill(dmean_, dmean_ + images * s_.channels, A(-0.0));
  }

  void run() {
    share(runtime_, plan_, plan_.alone, [&](int64_t begin, int64_t end, int slot) {
      const int64_t at = slot * plan_.together;
      for (int64_t b = begin; b < end; b += plan_.together) {
        const int64_t images = std::min(plan_.together, end - b);
        for (int64_t g = 0; g < images; ++g) through_scale(b + g, at + g, slot);
        if (s_.form == Form::two_layers) through_output_layer(b, images, 0, 1);
        if (wants_dq_ && s_.form != Form::scale) through_first_layer(b, images, at, 0, 1);
        for (int64_t g = images - 1; g >= 0; --g) {
          write_dx(b + g, 0, 1, at + g, at + g, slot);
          add_affine_slices(b + g, at + g, 1);
        }
      }
    });
    for (int64_t b = plan_.alone; b < s_.batch; b += plan_.group) {
      team(b, std::min(plan_.group, s_.batch - b));
    }
    if (a_.dw1 || a_.db1 || a_.dw2 || a_.db2 || a_.dalpha || a_.dbeta || wants_affine_) {
      parameter_gradients();
    }
  }

 private:
  const A* z(int64_t b) const { return static_cast<const A*>(a_.z) + b * s_.channels; }
  const A* h(int64_t b) const { return static_cast<const A*>(a_.h) + b * s_.hidden; }
  const A* u(int64_t b) const { return static_cast<const A*>(a_.u) + b * s_.outputs; }

  SENET_OUTLINE void team(int64_t b0, int64_t images) {
    const int64_t slices = plan_.slices(images), tasks = images * slices;
    const auto whole_images = [&](int64_t begin, int64_t end, int slot) {
      for (int64_t g = begin; g < end; ++g) through_scale(b0 + g, g, slot);
    };
    const auto preparing = [&](int64_t begin, int64_t end, int) {
      for (int64_t g = begin; g < end; ++g) prepare(b0 + g, g);
    };
    const auto summing = [&](int64_t begin, int64_t end, int slot) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t g = task / slices;
        dots(b0 + g, task % slices, slices, g, sums_ + task * width_, slot);
      }
    };
    const auto gates = [&](int64_t begin, int64_t end, int) {
      for (int64_t g = begin; g < end; ++g) {
        if (s_.channels_last) add_slices(b0 + g, sums_ + g * slices * width_, slices);
        through_gate(b0 + g);
      }
    };
    const int64_t parts = plan_.parts(s_, images);
    const auto output_layer = [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) through_output_layer(b0, images, i, parts);
    };
    const auto first_layer = [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) through_first_layer(b0, images, 0, i, parts);
    };
    const auto writing = [&](int64_t begin, int64_t end, int slot) {
      for (int64_t task = begin; task < end; ++task) {
        write_dx(b0 + task / slices, task % slices, slices, task / slices, task, slot);
      }
    };
    const bool in_slices = slices > 1;
    share_phases(runtime_, plan_,
                 {{in_slices ? 0 : images, whole_images},
                  {in_slices ? images : 0, preparing},
                  {in_slices && wants_sums_ ? tasks : 0, summing},
                  {in_slices && wants_sums_ ? images : 0, gates},
                  {s_.form == Form::two_layers ? parts : 0, output_layer},
                  {wants_dq_ && s_.form != Form::scale ? parts : 0, first_layer},
                  {tasks, writing}});
    for (int64_t g = 0; g < images; ++g) add_affine_slices(b0 + g, g * slices, slices);
  }

  // From dy to du for one whole image, on one thread.
  SENET_OUTLINE void through_scale(int64_t b, int64_t at, int slot) {
    prepare(b, at);
    if (!wants_sums_) return;
    dots(b, 0, 1, at, sums_ + at * width_, slot);
    if (s_.channels_last) add_slices(b, sums_ + at * width_, 1);
    through_gate(b);
  }

  // What the forward pass did not save: activations, gates, and scale at place `at`.
  SENET_OUTLINE void prepare(int64_t b, int64_t at) {
    map(h(b), hidden_ + b * s_.hidden, s_.hidden, a_.options.activation);
    map(u(b), gates_ + b * s_.channels, s_.channels, a_.options.gate);
    A* scale = scale_ + at * s_.channels;
    std::copy(gates_ + b * s_.channels, gates_ + (b + 1) * s_.channels, scale);
    gates_to_scale(a_.parameters, 0, s_.channels, scale);
  }

  // Where image b's runs lie. Run r of n elements is position r (channels-last) or channel r.
  struct ImageRuns {
    BackRun<T> first;
    int64_t n, bit_row;
    BackRun<T> operator()(int64_t r) const {
      return {first.dy + r * n, first.x + r * n, first.residual ? first.residual + r * n : nullptr,
              first.bits ? first.bits + r * bit_row : nullptr};
    }
  };
  ImageRuns runs_of(int64_t b) const {
    const int64_t runs = s_.channels_last ? s_.positions : s_.channels;
    const int64_t n = s_.channels_last ? s_.channels : s_.positions;
    const int64_t bit_row = (n + 7) / 8;
    const T* residual = static_cast<const T*>(a_.residual.data);
    return {{static_cast<const T*>(a_.dy.data) + b * a_.dy.stride,
             static_cast<const T*>(a_.x.data) + b * a_.x.stride,
             residual ? residual + b * a_.residual.stride : nullptr,
             a_.mask ? a_.mask + b * runs * bit_row : nullptr},
            n,
            bit_row};
  }
  const A* shifts(int64_t b, const A* otherwise) const {
    return has_shift_ ? u(b) + s_.channels : otherwise;
  }

  // Slice i of image b. Rows: ds and dshift of a range of channels, in place. Channels-last: a
  // range of positions, into `sums` for add_slices.
  SENET_OUTLINE void dots(int64_t b, int64_t i, int64_t slices, int64_t at, A* sums, int slot) {
    const ImageRuns runs = runs_of(b);
    const A* scale = scale_ + at * s_.channels;
    const A* shift = shifts(b, scale);
    const Fn after = a_.options.after;
    if (s_.channels_last) {
      const Range range = slice(s_.positions, i, slices);
      dot_columns<T, kPlain>([&](int64_t r) { return runs(range.begin + r); },
                             range.end - range.begin, s_.channels, prologue_.from_channel(0),
                             PerElement<A>{scale}, PerElement<A>{shift}, has_shift_, after, sums,
                             chained_ + slot * width_);
      return;
    }
    const Range range = slice(s_.channels, i, slices);
    A* ds = ds_ + b * s_.channels;
    A* dshift = du_ + b * s_.outputs + s_.channels;
    for (int64_t c = range.begin; c < range.end; ++c) {
      dot_run<T, kPlain>(runs(c), s_.positions, prologue_.of_channel(c),
                         Uniform<A>{broadcast<A>(scale[c])}, Uniform<A>{broadcast<A>(shift[c])},
                         has_shift_, after, ds + c, dshift + c);
    }
  }

  SENET_OUTLINE void add_slices(int64_t b, const A* sums, int64_t slices) {
    for (int64_t half = 0; half < width_; half += s_.channels) {
      A* to = half == 0 ? ds_ + b * s_.channels : du_ + b * s_.outputs + s_.channels;
      for_vectors<A>(s_.channels, [&](int64_t c, auto lanes) {
        Vec<A> total = get(sums + half + c, lanes);
        for (int64_t i = 1; i < slices; ++i) total += get(sums + i * width_ + half + c, lanes);
        put(to + c, total, lanes);
      });
    }
  }

  // du = beta ds gate'(u); the shift's half is dshift, already there.
  SENET_OUTLINE void through_gate(int64_t b) {
    const A* ds = ds_ + b * s_.channels;
    A* du = du_ + b * s_.outputs;
    std::copy(ds, ds + s_.channels, du);
    chain_map(a_.options.gate, u(b), du, s_.channels);
    if (!a_.parameters.beta) return;
    for (int64_t c = 0; c < s_.channels; ++c) {
      du[c] *= parameter_at<A>(a_.parameters.dtype, a_.parameters.beta, c);
    }
  }

  SENET_OUTLINE void through_output_layer(int64_t b, int64_t images, int64_t i, int64_t parts) {
    const Range r = slice(s_.hidden, i, parts);
    linear_transposed<A>(a_.parameters.dtype, a_.parameters.w2, s_.outputs, s_.hidden, r.begin,
                         r.end, du_ + b * s_.outputs, s_.outputs, dh_ + b * s_.hidden, s_.hidden,
                         images);
    for (int64_t g = b; g < b + images; ++g) {
      chain_map(a_.options.activation, h(g) + r.begin, dh_ + g * s_.hidden + r.begin,
                r.end - r.begin);
    }
  }

  // dz / S, the part of dx that comes through the mean, from the layer that reads z.
  SENET_OUTLINE void through_first_layer(int64_t b, int64_t images, int64_t at, int64_t i,
                                         int64_t parts) {
    const Range r = slice(s_.channels, i, parts);
    A* dmean = dmean_ + at * s_.channels;
    const bool two = s_.form == Form::two_layers;
    const void* weight = two ? a_.parameters.w1 : a_.parameters.w2;
    const int64_t rows = two ? s_.hidden : s_.outputs;
    linear_transposed<A>(a_.parameters.dtype, weight, rows, s_.channels, r.begin, r.end,
                         (two ? dh_ : du_) + b * rows, rows, dmean, s_.channels, images);
    for (int64_t g = 0; g < images; ++g) {
      const A positions = static_cast<A>(counted(s_, a_.lengths, b + g));
      A* of_image = dmean + g * s_.channels + r.begin;
      for_vectors<A>(r.end - r.begin, [&](int64_t c, auto lanes) {
        put(of_image + c, get(of_image + c, lanes) / positions, lanes);
      });
    }
  }

  // Slice i of image b, whose factors are at place `at`. The affine map's sums: rows, in place;
  // channels-last, over a range of positions, to place `task` for add_affine_slices.
  SENET_OUTLINE void write_dx(int64_t b, int64_t i, int64_t slices, int64_t at, int64_t task,
                              int slot) {
    if (!wants_dq_ && !a_.dresidual) return;
    const ImageRuns runs = runs_of(b);
    const A* scale = scale_ + at * s_.channels;
    const A* shift = shifts(b, scale);
    const A* dmean = dmean_ + at * s_.channels;
    T* dx = a_.dx ? static_cast<T*>(a_.dx) + b * s_.image() : nullptr;
    T* dresidual = a_.dresidual ? static_cast<T*>(a_.dresidual) + b * s_.image() : nullptr;
    const int64_t n = counted(s_, a_.lengths, b), width = 2 * s_.channels;
    const auto row = [&](T* image, int64_t r) { return image ? image + r * runs.n : nullptr; };
    if (s_.channels_last) {
      const Range range = slice(s_.positions, i, slices);
      ColumnSink<A, kBefore> sums(affine_sums_ + task * width, affine_chain_ + 2 * slot * width,
                                  s_.channels);
      second_reading(range, runs.n * sizeof(T), runtime_.core_cache, [&](int64_t r) SENET_LAMBDA {
        dx_run<T, kPlain>(runs(r), row(dx, r), row(dresidual, r), runs.n, prologue_.from_channel(0),
                          PerElement<A>{scale}, PerElement<A>{shift}, has_shift_,
                          PerElement<A>{kPlain || r < n ? dmean : none_}, a_.options.after, sums,
                          streams_);
        sums.end_run();
      });
      if (streams_) end_streams();
      return sums.finish();
    }
    const Range range = slice(s_.channels, i, slices);
    if constexpr (kBefore != kAffine) {
      if (one_run_) {
        const int64_t first = range.begin * runs.n;
        const bool streams = streams_ && (!dx || is_line_aligned(dx + first)) &&
                             (!dresidual || is_line_aligned(dresidual + first));
        NoSums<A> sums;
        for_rows_as_one<A>(
            range.end - range.begin, runs.n, [&](int64_t at, int64_t count, auto of) SENET_LAMBDA {
              at += first;
              const BackRun<T> run = {runs.first.dy + at, runs.first.x + at,
                                      runs.first.residual ? runs.first.residual + at : nullptr,
                                      nullptr};
              dx_run<T, kPlain>(run, dx ? dx + at : nullptr, dresidual ? dresidual + at : nullptr,
                                count, prologue_.of_channel(0), Uniform<A>{of(scale + range.begin)},
                                Uniform<A>{of(shift + range.begin)}, has_shift_,
                                Uniform<A>{of(dmean + range.begin)}, a_.options.after, sums,
                                streams);
            });
        if (streams_) end_streams();
        return;
      }
    }
    A* of_affine = of_affine_ + b * width;
    second_reading(range, runs.n * sizeof(T), runtime_.core_cache, [&](int64_t r) SENET_LAMBDA {
      ChannelSink<A, kBefore> sums;
      const auto with = [&](auto of_mean) SENET_LAMBDA {
        dx_run<T, kPlain>(runs(r), row(dx, r), row(dresidual, r), runs.n, prologue_.of_channel(r),
                          Uniform<A>{broadcast<A>(scale[r])}, Uniform<A>{broadcast<A>(shift[r])},
                          has_shift_, of_mean, a_.options.after, sums, streams_);
      };
      if (!kPlain && a_.lengths) {
        with(Prefix<A>{broadcast<A>(dmean[r]), n});
      } else {
        with(Uniform<A>{broadcast<A>(dmean[r])});
      }
      sums.finish(of_affine + r, of_affine + s_.channels + r);
    });
    if (streams_) end_streams();
  }

  // Channels-last: the slices of image b, from place `task` on, together.
  SENET_OUTLINE void add_affine_slices(int64_t b, int64_t task, int64_t slices) {
    if (kBefore != kAffine || !s_.channels_last) return;
    const int64_t width = 2 * s_.channels;
    const A* sums = affine_sums_ + task * width;
    for_vectors<A>(width, [&](int64_t c, auto lanes) {
      Vec<A> total = get(sums + c, lanes);
      for (int64_t i = 1; i < slices; ++i) total += get(sums + i * width + c, lanes);
      put(of_affine_ + b * width + c, total, lanes);
    });
  }

  SENET_OUTLINE void parameter_gradients() {
    const bool worth = s_.batch * s_.weights() >= kSerialElements;
    const int64_t parts = worth ? plan_.threads : 1;
    with_gradient_storage<T>(a_.parameters.dtype, [&](auto zero) {
      using P = decltype(zero);
      share(runtime_, plan_, parts, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
          const Range w2 = slice(s_.outputs, i, parts), w1 = slice(s_.hidden, i, parts);
          if (a_.dw2) {
            const A* in = s_.form == Form::two_layers ? hidden_ : static_cast<const A*>(a_.z);
            outer_products(static_cast<P*>(a_.dw2), w2.begin, w2.end, s_.inner(), du_, s_.outputs,
                           in, s_.inner(), s_.batch);
          }
          if (a_.dw1) {
            outer_products(static_cast<P*>(a_.dw1), w1.begin, w1.end, s_.channels, dh_, s_.hidden,
                           static_cast<const A*>(a_.z), s_.channels, s_.batch);
          }
        }
      });
      const int64_t channels = s_.channels;
      sum_into(static_cast<P*>(a_.db2), s_.outputs, du_, nullptr, s_.outputs);
      sum_into(static_cast<P*>(a_.db1), s_.hidden, dh_, nullptr, s_.hidden);
      sum_into(static_cast<P*>(a_.dalpha), channels, ds_, nullptr, channels);
      sum_into(static_cast<P*>(a_.dbeta), channels, ds_, gates_, channels);
      sum_into(static_cast<P*>(a_.daffine_scale), channels, of_affine_, nullptr, 2 * channels);
      sum_into(static_cast<P*>(a_.daffine_shift), channels, of_affine_ + channels, nullptr,
               2 * channels);
    });
  }

  template <class P>
  void sum_into(P* out, int64_t n, const A* a, const A* b, int64_t stride) {
    if (out) sum_images(out, n, a, b, stride, s_.batch);
  }

  const BackwardArgs& a_;
  const Shape& s_;
  const Runtime& runtime_;
  const Plan plan_;
  const bool has_shift_, wants_sums_, wants_affine_, wants_dq_;
  const int64_t width_;
  bool one_run_, streams_;  // the last of dx and dresidual: written around the caches
  A *ds_, *gates_, *du_, *dh_, *hidden_, *scale_, *dmean_, *sums_, *chained_, *none_;
  A *of_affine_, *affine_sums_, *affine_chain_;
  Prologue<A, kBefore> prologue_;
};

}  // namespace
}  // namespace SENET_ISA
}  // namespace senet
