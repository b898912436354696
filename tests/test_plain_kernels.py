"""The first reads in ``examples/``: plain kernels are right, and plain."""

from __future__ import annotations

import ctypes
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from cuda_on_cpu import build
from senet_kernels.backends import triton
from test_cuda_compile import find_nvcc

EXAMPLES = build.ROOT / "examples"
# C, R and S that are no powers of two, extents of one, more rows than a block has threads.
SHAPES = [((2, 20, 5, 7), 6), ((1, 1, 1, 1), 1), ((3, 33, 13, 1), 5), ((2, 140, 1, 3), 131)]

interpreted = pytest.mark.skipif(not triton.INTERPRETED, reason="for Triton's interpreter")
plain_run = pytest.mark.skipif(triton.INTERPRETED, reason="nothing of Triton in it")


def _check(apply: Any, shape: tuple[int, ...], hidden: int) -> None:
    """Outputs and all gradients against the definition in float64."""
    channels = shape[1]
    shapes = shape, (hidden, channels), (hidden,), (channels, hidden), (channels,)
    # Weights scaled as a layer's: plain sums of many large terms would be far from exact.
    scales = 1.0, channels**-0.5, 1.0, hidden**-0.5, 1.0
    inputs = [(a * torch.randn(s)).requires_grad_() for a, s in zip(scales, shapes, strict=True)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    right, ours = oracle.block(*exact), apply(*inputs)
    dy = torch.randn(shape)
    gradients: list[tuple[Tensor, ...]] = [
        torch.autograd.grad(right, exact, dy.double()), torch.autograd.grad(ours, inputs, dy),
    ]  # fmt: skip
    for a, b in zip((ours, *gradients[1]), (right, *gradients[0]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["plain_triton_se.py", "plain_cuda_se.cu", "plain_cuda_se.py"])
def test_short_enough_for_a_first_read(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 120


@interpreted
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("shape", "hidden"), SHAPES[:3], ids=str)
def test_triton(shape: tuple[int, ...], hidden: int) -> None:
    # Imported, not run by path: Triton reads the source of its kernels.
    sys.path.insert(0, str(EXAMPLES))
    try:
        import plain_triton_se
    finally:
        sys.path.remove(str(EXAMPLES))
    _check(plain_triton_se.PlainSE.apply, shape, hidden)


_COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
sys.path[:0] = sys.argv[1:]
import plain_triton_se as plain
class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
triton.runtime.driver.set_active(Driver())
f = torch.float32
for kernel, arguments, more in (
    (plain.row_sum_kernel, (f, f, f, 49, 49), dict(PRODUCT=True, BLOCK=1024)),
    (plain.scale_kernel, (f, f, f, f, 49, 49), dict(SHIFT=True, BLOCK=1024)),
    (plain.excite_kernel, (f,) * 7 + (256, 16), dict(BC=256, BR=16)),
    (plain.excite_backward_kernel, (f,) * 8 + (256, 16), dict(BC=256, BR=16)),
):
    compiled = kernel.warmup(*arguments, **more, grid=(1,))
    print(kernel.__name__, len(compiled.asm["cubin"]))
"""


@plain_run
@pytest.mark.slow
def test_triton_compiles_for_a_gpu() -> None:
    """The interpreter takes types that a device does not."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, str(EXAMPLES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4


# As much as it takes to read CUDA's own words as the simulation's: shared memory and launches.
_LAUNCH = """
#include "simt.h"
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            A... a) {
  cudaLaunchConfig_t config;
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, a...);
}
"""


def _for_the_simulation(source: str) -> str:
    source = re.sub(
        r"extern __shared__ float (\w+)\[\];",
        r"float* \1 = reinterpret_cast<float*>(senet::gpu::shared_memory());",
        source,
    )
    return _LAUNCH + re.sub(r"(\w+)<<<(.*?)>>>\(", r"launch(\1, \2, ", source)


@pytest.fixture(scope="module")
def cuda_library() -> Any:
    if not build.compiler():
        pytest.skip("no C++ compiler")
    build.OUT.mkdir(parents=True, exist_ok=True)
    translated = build.OUT / "plain_cuda_se.cpp"
    text = _for_the_simulation((EXAMPLES / "plain_cuda_se.cu").read_text(encoding="utf-8"))
    assert text.count("launch(") == 1 + 10
    translated.write_text(text, encoding="utf-8")
    # Its indices have the signs of a first read.
    flags = ["-Wno-sign-compare", "-Wno-narrowing"]
    return ctypes.CDLL(str(build.build("plain_cuda_se.so", [(translated, flags)])))


@plain_run
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("shape", "hidden"), SHAPES, ids=str)
def test_cuda_on_a_cpu(cuda_library: Any, shape: tuple[int, ...], hidden: int, seed: int) -> None:
    """Thread by thread, in two orders: see tests/simt."""
    cuda_library.simt_set_seed(ctypes.c_uint64(seed))
    PlainSE = runpy.run_path(str(EXAMPLES / "plain_cuda_se.py"))["PlainSE"]
    _check(lambda *inputs: PlainSE.apply(cuda_library, *inputs), shape, hidden)


@plain_run
@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc; pip install nvidia-cuda-nvcc")
def test_cuda_compiles_for_a_gpu(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    assert nvcc is not None
    command = [nvcc, "-O3", "-arch=sm_90", "-Xptxas=-v", "-c", str(EXAMPLES / "plain_cuda_se.cu")]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores", done.stderr)
    assert len(spills) == 5
    assert set(spills) == {"0"}
