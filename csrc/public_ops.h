// The public ops as C++ functions: without gradients, on the device of x. Their schemas are in
// registration.cpp, and in senet_kernels/public_ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

namespace senet {

torch::stable::Tensor public_squeeze_excite(
    torch::stable::Tensor x, std::optional<torch::stable::Tensor> w1,
    std::optional<torch::stable::Tensor> b1, torch::stable::Tensor w2,
    std::optional<torch::stable::Tensor> b2, std::string activation, std::string gate,
    std::string before, std::optional<torch::stable::Tensor> affine_scale,
    std::optional<torch::stable::Tensor> affine_shift, std::string after,
    std::optional<torch::stable::Tensor> residual, std::optional<torch::stable::Tensor> alpha,
    std::optional<torch::stable::Tensor> beta, std::optional<torch::stable::Tensor> lengths,
    std::optional<torch::stable::Tensor> mask, std::string pool);

torch::stable::Tensor public_squeeze(torch::stable::Tensor x, std::string before,
                                     std::optional<torch::stable::Tensor> affine_scale,
                                     std::optional<torch::stable::Tensor> affine_shift,
                                     std::optional<torch::stable::Tensor> lengths,
                                     std::optional<torch::stable::Tensor> mask, std::string pool);

torch::stable::Tensor public_channel_scale(torch::stable::Tensor x, torch::stable::Tensor u,
                                           std::string gate, std::string before,
                                           std::optional<torch::stable::Tensor> affine_scale,
                                           std::optional<torch::stable::Tensor> affine_shift,
                                           std::string after,
                                           std::optional<torch::stable::Tensor> residual,
                                           std::optional<torch::stable::Tensor> alpha,
                                           std::optional<torch::stable::Tensor> beta);

}  // namespace senet
