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

}  // namespace senet
