// Written by setup.py from the table in senet_kernels/pointwise.py.
#pragma once

namespace senet {

enum class Fn : int {
  identity = 0,
  relu = 1,
  relu6 = 2,
  silu = 3,
  gelu = 4,
  gelu_tanh = 5,
  hardswish = 6,
  leaky_relu = 7,
  mish = 8,
  sigmoid = 9,
  hardsigmoid = 10,
  hardsigmoid_02 = 11,
  tanh = 12,
};
constexpr Fn kLastFn = Fn::tanh;

struct FnName {
  const char* name;
  Fn fn;
  bool is_activation, is_gate;
};
constexpr FnName kFnNames[] = {
    {"identity", Fn::identity, true, true},
    {"relu", Fn::relu, true, true},
    {"relu6", Fn::relu6, true, false},
    {"silu", Fn::silu, true, false},
    {"gelu", Fn::gelu, true, false},
    {"gelu_tanh", Fn::gelu_tanh, true, false},
    {"hardswish", Fn::hardswish, true, false},
    {"leaky_relu", Fn::leaky_relu, true, false},
    {"mish", Fn::mish, true, false},
    {"sigmoid", Fn::sigmoid, false, true},
    {"hardsigmoid", Fn::hardsigmoid, false, true},
    {"hardsigmoid_02", Fn::hardsigmoid_02, false, true},
    {"tanh", Fn::tanh, false, true},
};

}  // namespace senet
