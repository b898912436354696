"""The Triton kernels as Triton compiles them, to PTX, executed on a CPU: see ``tests/ptx`` and
``triton_on_cpu.py``.

The gate runs each kernel in each class of dtypes, on sm_80 or sm_90, of 16 bits bfloat16; all that
Triton's interpreter runs in the gate is run by the slow tests, on both. In processes of their own,
to which the package is interpreted.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import triton_on_cpu
from problems import Spec, build, check
from ptx import compiling
from senet_kernels import squeeze_excite
from senet_kernels.backends import triton

if triton.UNAVAILABLE:
    pytest.skip(triton.UNAVAILABLE, allow_module_level=True)

CAPABILITY = triton_on_cpu.capability()
ROOT = Path(__file__).parent.parent
starts = pytest.mark.skipif(
    triton.INTERPRETED or not compiling.build.compiler(),
    reason="starts processes, with a C++ compiler",
)
executes = pytest.mark.skipif(not CAPABILITY, reason=f"runs where {triton_on_cpu.EXECUTE} is set")

# Of compute capability: the dtypes whose kernels the gate runs.
_GATE = {80: (torch.float64,), 90: (torch.bfloat16, torch.float32)}
# Together every kernel: images in one launch and in several, both halves, several programs a row.
_SPECS: tuple[dict[str, Any], ...] = (
    {"shape": (3, 16, 5, 7), "hidden": 5, "before": "silu", "shift": True},
    {"shape": (2, 20, 30, 31), "hidden": 5, "after": "relu", "residual": "contiguous"},
    {"shape": (2, 2, 70, 31), "part": "squeeze", "affine": True, "lengths": True},
    {"shape": (2, 20, 5, 8), "part": "channel_scale", "layout": "channels_last", "gate": "tanh",
     "weighted": True},
)  # fmt: skip


def _processes(capability: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", triton_on_cpu.EXECUTE: str(capability)}
    done = subprocess.run([*command, *arguments], env=environment, cwd=ROOT,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout


@starts
@pytest.mark.parametrize("capability", _GATE)
def test_every_kernel(capability: int) -> None:
    _processes(capability, f"tests/{Path(__file__).name}", "-m", "not slow")


@starts
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_in_every_dtype(capability: int) -> None:
    _processes(capability, f"tests/{Path(__file__).name}")


@starts
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("test_triton.py", "not bfloat16 and not the_interpreter and not sanitizer"),
        ("test_plain_kernels.py", ""),
        *((f"test_{name}.py", "triton") for name in (
            "accuracy", "gradcheck", "layouts", "pointwise", "properties", "special_values")),
    ],
)  # fmt: skip
def test_what_the_interpreter_runs(file: str, chosen: str, capability: int) -> None:
    _processes(capability, f"tests/{file}", "-k", chosen, "-m", "not slow and not gpu")


def _dtypes() -> list[Any]:
    gate = _GATE.get(CAPABILITY or 0, ())
    return [
        pytest.param(dtype, marks=[] if dtype in gate else pytest.mark.slow)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    ]


@pytest.fixture
def _plans_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from senet_kernels.backends.triton import launch, operands
    from senet_kernels.backends.triton.plan import Device

    monkeypatch.setattr(operands, "_device", lambda _: Device(f"sm_{CAPABILITY}", 132))
    launch.forget()


@executes
@pytest.mark.usefixtures("_plans_of_the_device", "poisoned_empty")
@pytest.mark.parametrize("number", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
@pytest.mark.parametrize("dtype", _dtypes(), ids=str)
def test_results(dtype: torch.dtype, number: int) -> None:
    """Outputs and gradients against the oracle, in several orders of threads and with as many
    errors of approximate functions; every kernel ran."""
    from tools import gpu_cases

    triton_on_cpu.launches.names.clear()
    triton_on_cpu.launches.seed = triton_on_cpu.launches.approximations = number
    for options in _SPECS:
        spec = Spec(**{"hidden": None, **options}, dtype=dtype, seed=number)
        check(build(spec), squeeze_excite, backend="triton")
    flat = {name for name in gpu_cases.TRITON_KERNELS if "flat" in name}  # none in float64
    expected = gpu_cases.TRITON_KERNELS - (flat if dtype == torch.float64 else set())
    assert set(triton_on_cpu.launches.names) == expected


@executes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_programs_that_wait_for_others(dtype: torch.dtype) -> None:
    """Tickets, counters with acquire and release, polls; and a counter that nobody moves."""
    from ptx.triton_kernels import centred_kernel

    groups, tiles, size = 4, 5, 200
    x = torch.randn(groups * tiles, size).to(dtype)
    counters = torch.zeros(groups + 2, dtype=torch.int32)
    sums = x.double().sum(1).view(groups, tiles).sum(1).repeat_interleave(tiles)
    programs = (2 * tiles * (groups + 1),)
    for seed in range(8):
        triton_on_cpu.launches.seed = seed
        y, partial = torch.full_like(x, float("nan")), torch.full((groups * tiles,), float("nan"))
        centred_kernel[programs](x, partial, y, counters, groups, tiles, size, 256)
        torch.testing.assert_close(y, (x.double() - sums[:, None]).to(dtype), rtol=1e-2, atol=1e-3)
        assert not counters.any()
    counters[1:] = -1000
    with pytest.raises(RuntimeError, match=r"centred_kernel: deadlock; block .* wait at a flag"):
        centred_kernel[programs](x, partial, y, counters, groups, tiles, size, 256)


@executes
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 1e-6), (torch.float32, 2e-3)], ids=["bfloat16", "tf32"]
)
def test_products_of_matrices(dtype: torch.dtype, bound: float, stages: int) -> None:
    """mma, ldmatrix, and copies of which the last are of fewer bytes; a grid of three axes."""
    from ptx.triton_kernels import product_kernel

    inner, grid = 104, (2, 2, 3)
    a = torch.randn(6, 32, inner).to(dtype)
    b = torch.randn(6, inner, 32).to(dtype)
    for seed in range(3):
        triton_on_cpu.launches.seed = seed
        c = torch.full((6, 32, 32), float("nan"))
        product_kernel[grid](a, b, c, inner, 16, 32, 32, stages)
        expected = a.double() @ b.double()
        assert ((c - expected).abs().max() / expected.abs().max()).item() < bound


@executes
@pytest.mark.skipif(CAPABILITY == 80, reason="on sm_90, whose kernels have more of them")
@pytest.mark.usefixtures("_plans_of_the_device")
def test_missing_barriers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter, to which a program is one thread, has nothing to notice."""
    problem = build(Spec((2, 64, 8, 8), 16))
    noticed = 0
    monkeypatch.setattr(triton_on_cpu.launches, "change", lambda ptx: ptx.replace("bar.sync", "//"))
    for seed in range(6):
        triton_on_cpu.launches.seed = seed
        try:
            check(problem, squeeze_excite, backend="triton")
        except (AssertionError, RuntimeError):
            noticed += 1
    assert noticed >= 4


@executes
@pytest.mark.slow
@pytest.mark.usefixtures("_plans_of_the_device")
def test_each_missing_barrier_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernels of one call and its gradients, one barrier at a time."""
    problem = build(Spec((2, 64, 8, 8), 16))
    texts: dict[str, str] = {}

    def keep(ptx: str) -> str:
        texts[ptx] = ptx
        return ptx

    monkeypatch.setattr(triton_on_cpu.launches, "change", keep)
    check(problem, squeeze_excite, backend="triton")
    survivors, count = [], 0
    for text in list(texts):
        for found in re.finditer(r"\bbar\.sync\b", text):
            changed = f"{text[: found.start()]}//{text[found.end() :]}"
            monkeypatch.setattr(triton_on_cpu.launches, "change",
                                lambda ptx, text=text, changed=changed:
                                changed if ptx == text else ptx)  # fmt: skip
            count += 1
            for seed in range(12):
                triton_on_cpu.launches.seed = seed
                try:
                    check(problem, squeeze_excite, backend="triton")
                except (AssertionError, RuntimeError):
                    break
            else:
                line = text.count("\n", 0, found.start()) + 1
                survivors.append(f"{text[text.index('.entry') :].split('(')[0]}, line {line}")
    assert count > 8
    assert not survivors
