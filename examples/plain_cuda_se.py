"""plain_cuda_se.cu as a function of PyTorch's: the few lines of Python that CUDA needs.

``python examples/plain_cuda_se.py`` compiles it with nvcc and compares it with PyTorch, on a GPU.
Not yet run on one.
"""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cu")


def compile_and_load():
    """The library, made by nvcc for the GPU that is here."""
    target = Path(tempfile.mkdtemp()) / "plain_cuda_se.so"
    flags = ["-O3", "-arch=native", "-shared", "-Xcompiler=-fPIC"]
    subprocess.run(["nvcc", *flags, str(SOURCE), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def call(function, tensors, numbers):
    """Call a C function with pointers, sizes and the stream torch works on."""
    on_gpu = tensors[0].is_cuda
    stream = torch.cuda.current_stream(tensors[0].device).cuda_stream if on_gpu else 0
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    error = function(*pointers, *map(ctypes.c_int, numbers), ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"CUDA error {error}")


class PlainSE(torch.autograd.Function):
    """``PlainSE.apply(library, x, w1, b1, w2, b2)``, all contiguous float32."""

    @staticmethod
    def forward(ctx, library, x, w1, b1, w2, b2):
        B, C, R = *x.shape[:2], w1.shape[0]
        z, g, h, y = x.new_empty(B, C), x.new_empty(B, C), x.new_empty(B, R), torch.empty_like(x)
        sizes = B, C, R, x[0, 0].numel()
        call(library.se_forward, (x, w1, b1, w2, b2, z, h, g, y), sizes)
        ctx.save_for_backward(x, w1, w2, z, h, g)
        ctx.library, ctx.sizes = library, sizes
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w1, w2, z, h, g = ctx.saved_tensors
        ds, du, dz, dh = *(torch.empty_like(z) for _ in range(3)), torch.empty_like(h)
        dw1, dw2, dx = torch.empty_like(w1), torch.empty_like(w2), torch.empty_like(x)
        db1, db2 = x.new_empty(w1.shape[0]), x.new_empty(w2.shape[0])
        results = ds, du, dh, dz, dx, dw1, db1, dw2, db2
        call(ctx.library.se_backward, (dy.contiguous(), x, w1, w2, z, h, g, *results), ctx.sizes)
        return None, dx, dw1, db1, dw2, db2


def main():
    """Outputs and gradients beside those of PyTorch."""
    shapes = (2, 20, 5, 7), (6, 20), (6,), (20, 6), (20,)
    inputs = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]
    x, w1, b1, w2, b2 = inputs
    gate = torch.sigmoid(torch.relu(x.mean((2, 3)) @ w1.T + b1) @ w2.T + b2)
    right, ours = x * gate[:, :, None, None], PlainSE.apply(compile_and_load(), *inputs)
    dy = torch.randn_like(x)
    torch.testing.assert_close(ours, right)
    for a, b in zip(*(torch.autograd.grad(y, inputs, dy) for y in (ours, right)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    print("the plain kernels and PyTorch agree")


if __name__ == "__main__":
    main()
