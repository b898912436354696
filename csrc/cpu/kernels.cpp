// Entry points of one instruction set: from run-time types and options to templates.
//
// Compiled once per instruction set, with -DSENET_ISA=<namespace> and the set's own flags.
#include "backward.h"
#include "forward.h"
#include "squeeze_backward.h"

namespace senet {
namespace SENET_ISA {
namespace {

// Each case of `before` costs seconds of compilation: none of its own for float64 and for the
// instruction set that is there for the rare old processor, which need only be right.
#if defined(SENET_FEW_CASES)
constexpr bool kFewCases = true;
#else
constexpr bool kFewCases = false;
#endif

// Without a plain case of its own.
template <class T, Fn kBefore, bool>
using SqueezeBackward = SqueezeBackwardPass<T, kBefore>;

// Runs Pass<T, kBefore, kPlain>; plain means no shift, no residual and after = identity.
template <template <class, Fn, bool> class Pass, class Args, class T, Fn kBefore>
void run(const Args& args, const Runtime& runtime, bool plain) {
  if (plain) {
    Pass<T, kBefore, true>(args, runtime).run();
  } else {
    Pass<T, kBefore, false>(args, runtime).run();
  }
}

template <template <class, Fn, bool> class Pass, class T, class Args>
void with_before(const Args& args, const Runtime& runtime, bool plain) {
  if (args.parameters.affine_scale) return Pass<T, kAffine, false>(args, runtime).run();
  if constexpr (kFewCases || std::is_same_v<T, double>) {
    run<Pass, Args, T, kAny>(args, runtime, plain);
  } else {
    switch (args.options.before) {
      case Fn::identity:
        return run<Pass, Args, T, Fn::identity>(args, runtime, plain);
      case Fn::relu:
        return run<Pass, Args, T, Fn::relu>(args, runtime, plain);
      case Fn::silu:
        return run<Pass, Args, T, Fn::silu>(args, runtime, plain);
      case Fn::hardswish:
        return run<Pass, Args, T, Fn::hardswish>(args, runtime, plain);
      default:
        return run<Pass, Args, T, kAny>(args, runtime, plain);
    }
  }
}

template <template <class, Fn, bool> class Pass, class Args>
void with_dtype(const Args& args, const Runtime& runtime, bool plain) {
  switch (args.dtype) {
    case DType::f32:
      return with_before<Pass, float>(args, runtime, plain);
    case DType::bf16:
      return with_before<Pass, bf16>(args, runtime, plain);
    case DType::f16:
      return with_before<Pass, f16>(args, runtime, plain);
    case DType::f64:
      return with_before<Pass, double>(args, runtime, plain);
  }
}

}  // namespace

void forward(const ForwardArgs& args, const Runtime& runtime) {
  const bool plain = args.options.after == Fn::identity && !args.residual.data &&
                     args.shape.outputs == args.shape.channels;
  with_dtype<ForwardPass>(args, runtime, plain);
}

void backward(const BackwardArgs& args, const Runtime& runtime) {
  if (args.shape.form == Form::squeeze) {
    return with_dtype<SqueezeBackward>(args, runtime, true);
  }
  // A shift needs the sum of m beside that of m p: not plain.
  const bool plain = args.options.after == Fn::identity && !args.lengths &&
                     args.shape.outputs == args.shape.channels;
  with_dtype<BackwardPass>(args, runtime, plain);
}

}  // namespace SENET_ISA
}  // namespace senet
