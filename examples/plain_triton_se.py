"""Squeeze-and-excitation in Triton, forward and backward, in the plainest form: a first read.

For contiguous float32 ``x[B, C, H, W]`` and the block of Hu et al. (arXiv:1709.01507):

    z = mean of x over H, W     h = relu(W1 z + b1)     g = sigmoid(W2 h + b2)     y = x g

``python examples/plain_triton_se.py`` compares it with PyTorch, on a GPU (where it has not yet run)
or, with ``TRITON_INTERPRET=1``, on any CPU. docs/kernels.md leads from here to the real kernels.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def row_sum_kernel(a, b, out, S, divisor, PRODUCT: tl.constexpr, BLOCK: tl.constexpr):
    """One program per image and channel: the sum of a, or of a b, over its S positions."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, S, BLOCK):
        s = start + tl.arange(0, BLOCK)
        values = tl.load(a + row * S + s, s < S, 0.0)
        if PRODUCT:
            values *= tl.load(b + row * S + s, s < S, 0.0)
        total += values
    tl.store(out + row, tl.sum(total, 0) / divisor)


@triton.jit
def excite_kernel(z, w1, b1, w2, b2, h, g, C, R, BC: tl.constexpr, BR: tl.constexpr):
    """One program per image. The weights are one tile each, as wide as a power of two."""
    image = tl.program_id(0)
    c, r = tl.arange(0, BC), tl.arange(0, BR)
    of_z, of_h = c < C, r < R
    w1_tile = tl.load(w1 + r[:, None] * C + c[None, :], of_h[:, None] & of_z[None, :], 0.0)
    w2_tile = tl.load(w2 + c[:, None] * R + r[None, :], of_z[:, None] & of_h[None, :], 0.0)
    z_row = tl.load(z + image * C + c, of_z, 0.0)
    pre = tl.sum(w1_tile * z_row[None, :], 1) + tl.load(b1 + r, of_h, 0.0)
    h_row = tl.maximum(pre, 0.0)
    u = tl.sum(w2_tile * h_row[None, :], 1) + tl.load(b2 + c, of_z, 0.0)
    tl.store(h + image * R + r, h_row, of_h)
    tl.store(g + image * C + c, 1.0 / (1.0 + tl.exp(-u)), of_z)


@triton.jit
def excite_backward_kernel(ds, g, h, w1, w2, du, dh, dz, C, R, BC: tl.constexpr, BR: tl.constexpr):
    """The chain rule through the gate and the two layers, one program per image."""
    image = tl.program_id(0)
    c, r = tl.arange(0, BC), tl.arange(0, BR)
    of_z, of_h = c < C, r < R
    w1_tile = tl.load(w1 + r[:, None] * C + c[None, :], of_h[:, None] & of_z[None, :], 0.0)
    w2_tile = tl.load(w2 + c[:, None] * R + r[None, :], of_z[:, None] & of_h[None, :], 0.0)
    gate = tl.load(g + image * C + c, of_z, 0.0)
    du_row = tl.load(ds + image * C + c, of_z, 0.0) * gate * (1.0 - gate)
    dh_row = tl.sum(w2_tile * du_row[:, None], 0)
    dh_row = tl.where(tl.load(h + image * R + r, of_h, 0.0) > 0, dh_row, 0.0)
    tl.store(du + image * C + c, du_row, of_z)
    tl.store(dh + image * R + r, dh_row, of_h)
    tl.store(dz + image * C + c, tl.sum(w1_tile * dh_row[:, None], 0), of_z)


@triton.jit
def scale_kernel(x, scale, shift, y, S, divisor, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """y = x scale, and + shift / divisor; one program per image and channel."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(scale + row)
    for start in range(0, S, BLOCK):
        s = start + tl.arange(0, BLOCK)
        values = tl.load(x + row * S + s, s < S, 0.0) * factor
        if SHIFT:
            values += tl.load(shift + row) / divisor
        tl.store(y + row * S + s, values, s < S)


class PlainSE(torch.autograd.Function):
    """Three kernels forward; three backward, and torch's matrix products for the weights."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2):
        B, C, S, R = x.shape[0], x.shape[1], x[0, 0].numel(), w1.shape[0]
        z, g, h = x.new_empty(B, C), x.new_empty(B, C), x.new_empty(B, R)
        y, tiles = torch.empty_like(x), (triton.next_power_of_2(C), triton.next_power_of_2(R))
        row_sum_kernel[(B * C,)](x, x, z, S, S, PRODUCT=False, BLOCK=1024)
        excite_kernel[(B,)](z, w1, b1, w2, b2, h, g, C, R, *tiles)
        scale_kernel[(B * C,)](x, g, g, y, S, S, SHIFT=False, BLOCK=1024)
        ctx.save_for_backward(x, z, h, g, w1, w2)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, z, h, g, w1, w2 = ctx.saved_tensors
        (B, C), R, S, dy = z.shape, h.shape[1], x[0, 0].numel(), dy.contiguous()
        ds, du, dz = x.new_empty(B, C), x.new_empty(B, C), x.new_empty(B, C)
        dh, dx = x.new_empty(B, R), torch.empty_like(x)
        tiles = (triton.next_power_of_2(C), triton.next_power_of_2(R))
        row_sum_kernel[(B * C,)](dy, x, ds, S, 1, PRODUCT=True, BLOCK=1024)
        excite_backward_kernel[(B,)](ds, g, h, w1, w2, du, dh, dz, C, R, *tiles)
        scale_kernel[(B * C,)](dy, g, dz, dx, S, S, SHIFT=True, BLOCK=1024)
        return dx, dh.T @ z, dh.sum(0), du.T @ h, du.sum(0)


def main():
    """Outputs and gradients beside those of PyTorch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = (2, 20, 5, 7), (6, 20), (6,), (20, 6), (20,)
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    x, w1, b1, w2, b2 = inputs
    gate = torch.sigmoid(torch.relu(x.mean((2, 3)) @ w1.T + b1) @ w2.T + b2)
    right, ours = x * gate[:, :, None, None], PlainSE.apply(*inputs)
    dy = torch.randn_like(x)
    torch.testing.assert_close(ours, right)
    for a, b in zip(*(torch.autograd.grad(y, inputs, dy) for y in (ours, right)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    print("the plain kernels and PyTorch agree")


if __name__ == "__main__":
    main()
