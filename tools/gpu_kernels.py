"""Runs every kernel of a backend, forward and backward, on shapes small enough for a sanitizer.

``python tools/gpu_kernels.py triton|native [DEVICE]``, default ``cuda``. On ``cpu`` Triton's run
in its interpreter (``TRITON_INTERPRET=1``), and the CUDA kernels in the simulation of tests/simt.
The results are compared with the reference, since a sanitizer says nothing about them. Shapes are
odd, so that every mask is needed, and just beyond a tile; the CUDA kernels run by every policy of
tests/policies.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from senet_kernels import channel_scale, squeeze, squeeze_excite

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from policies import PLAN, POLICIES


class Case(NamedTuple):
    """A call. ``policy`` is for the plan of the CUDA kernels; empty leaves the choice to it."""

    shape: tuple[int, ...]
    hidden: int | None
    dtype: torch.dtype
    last: bool  # channels-last
    options: dict[str, Any]
    policy: str = ""


_RELU = {"after": "relu", "residual": True}
_ALL = {"before": "silu", "shift": True, "weighted": True}

TRITON_KERNELS = {
    "squeeze_kernel", "mean_kernel", "hidden_kernel", "gates_kernel", "factors_kernel",
    "scale_flat_kernel", "scale_tile_kernel", "bwd_reduce_kernel", "finish_sums_kernel",
    "hidden_bwd_kernel", "excite_bwd_kernel", "sums_kernel", "dx_flat_kernel", "dx_tile_kernel",
}  # fmt: skip
TRITON_CASES = (
    # Vectors of 16 bytes, in rows of a multiple of them and not.
    Case((3, 24, 7, 16), 3, torch.float32, False, _RELU),
    Case((3, 24, 7, 7), 3, torch.bfloat16, False, {"before": "silu"}),
    Case((3, 24, 7, 7), 3, torch.bfloat16, True, {**_RELU, "before": "silu", "shift": True}),
    # Tiles.
    Case((3, 12, 5, 7), 3, torch.float32, False, _RELU),
    Case((3, 12, 5, 7), 3, torch.bfloat16, True, {"before": "silu", "shift": True}),
    # Programs that share images, by channels and by positions.
    Case((2, 36, 33, 31), 5, torch.bfloat16, False, _RELU),
    Case((2, 131, 11, 13), 9, torch.float16, True, {"before": "hardswish", "weighted": True}),
    Case((2, 20, 33, 31), None, torch.float32, False, {"lengths": True, "affine": True}),
    Case((19, 1032, 2, 4), 40, torch.float16, True, {"before": "silu"}),
    # The halves.
    Case((1, 3, 70, 33), None, torch.float32, False, {"part": squeeze, "lengths": True,
                                                      "affine": True}),
    Case((2, 20, 70, 33), None, torch.bfloat16, True, {"part": channel_scale, "weighted": True,
                                                       **_RELU}),
    # Overwriting x.
    Case((2, 36, 33, 31), 5, torch.float32, False, {"inplace": True, "before": "silu"}),
)  # fmt: skip

# Images that all policies take: 16-byte accesses, slices that blocks do not share evenly.
_WIDE, _WIDE_LAST = (  # contiguous with rows that are no whole bytes of the mask
    Case((5, 136, 7, 7), 12, torch.bfloat16, False, _RELU),
    Case((5, 136, 6, 8), 12, torch.float16, True, _ALL),
)
_ODD = Case((5, 133, 5, 5), 3, torch.float32, False, {"before": "hardswish", "weighted": True})


def _legal_cases(policy: str) -> tuple[Case, ...]:
    """Which of these a policy takes, on a device that has what the policy needs."""
    if "axis=space" in policy:
        return (_WIDE_LAST,)
    return (_WIDE, _WIDE_LAST) if "resident=1" in policy else (_WIDE, _WIDE_LAST, _ODD)


NATIVE_CASES = (
    *(case._replace(policy=policy) for policy in POLICIES for case in _legal_cases(policy)),
    Case((3, 20, 9, 7), 5, torch.float64, False, _ALL),
    Case((3, 20, 33, 31), None, torch.float32, False, {"lengths": True, "affine": True}),
    Case((2, 3, 70, 33), None, torch.float32, False, {"part": squeeze, "lengths": True,
                                                      "affine": True}),
    Case((2, 24, 30, 33), None, torch.bfloat16, True, {"part": channel_scale, "weighted": True,
                                                       **_RELU}),
    Case((2, 36, 33, 31), 5, torch.float32, False, {"inplace": True, "before": "silu"}),
)  # fmt: skip
CASES = {"triton": TRITON_CASES, "native": NATIVE_CASES}
# How a plan begins to say that the device, not the policy, is the reason.
NOT_HERE = (f"{PLAN}: this device has no", "an image's blocks do not run at once")
_BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def run(backend: str, device: str, case: Case) -> None:
    """One step by the backend and one by the reference on the same tensors."""
    generator = torch.Generator().manual_seed(0)
    options = dict(case.options)
    batch, channels, *space = case.shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, case.dtype).requires_grad_()

    def image() -> torch.Tensor:
        t = normal(*case.shape).detach()
        t = t.to(memory_format=torch.channels_last) if case.last else t
        return t.requires_grad_()

    part, inplace = options.pop("part", squeeze_excite), options.pop("inplace", False)
    inner = case.hidden or channels
    rows = channels * (2 if options.pop("shift", False) else 1)
    x, dy = image(), image().detach()
    w1 = b1 = None
    if case.hidden is not None:
        w1, b1 = normal(inner, channels), normal(inner)
    w2, b2 = normal(rows, inner), normal(rows)
    named: dict[str, Any] = {"residual": image() if options.pop("residual", False) else None}
    if options.pop("weighted", False):
        named |= {"alpha": normal(channels), "beta": normal(channels)}
    if options.pop("affine", False):
        named["before_affine"] = normal(channels), normal(channels)
    if options.pop("lengths", False):
        named["lengths"] = torch.full((batch,), space[0] * space[1] - 3, device=device)
    arguments: tuple[Any, ...] = (x, w1, b1, w2, b2)
    if part is squeeze:
        arguments, dy = (x,), dy[:, :, 0, 0].contiguous()
        del named["residual"]
    elif part is channel_scale:
        arguments = (x, normal(batch, rows))
    leaves = [
        t
        for t in (*arguments, *named.values(), *named.get("before_affine", ()))
        if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    results = []
    for name in (backend, "reference"):
        y = part(*arguments, **named, **options, backend=name)
        result = (y.detach(), *torch.autograd.grad(y, leaves, dy))
        if inplace:
            with torch.no_grad():
                given = x.clone()
                part(given, *arguments[1:], **named, **options, inplace=True, backend=name)
            result = (*result, given)
        results.append(result)
    for got, want in zip(*results, strict=True):
        scale = want.double().abs().max().clamp(min=1e-3)
        error = (got.double() - want.double()).abs().max() / scale
        if not error <= _BOUNDS[case.dtype]:
            sys.exit(f"{case}: error {error:.2g} of the largest value")


@contextmanager
def _recorded_launches(launched: set[str]) -> Iterator[None]:
    """The names of the Triton kernels that are launched; in the end all there are."""
    from senet_kernels.backends.triton import build, launcher

    known = {kernel.__name__ for kernels in build.KERNELS.values() for kernel in kernels}
    assert known == TRITON_KERNELS
    call = launcher.Launch.__call__

    def record(self: launcher.Launch, *pointers: Any) -> None:
        launched.add(self.kernel.__name__)
        call(self, *pointers)

    launcher.Launch.__call__ = record  # type: ignore[method-assign]
    yield
    if launched != TRITON_KERNELS:
        sys.exit(f"launched {sorted(launched)}, expected {sorted(TRITON_KERNELS)}")


def _environment(backend: str, device: str) -> AbstractContextManager[Any]:
    if backend == "triton":
        return _recorded_launches(set())
    if device == "cuda":
        return nullcontext()
    import cuda_on_cpu

    simulated: AbstractContextManager[Any] = cuda_on_cpu.plugged_in(seed=1, device=0)
    return simulated


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] not in CASES:
        sys.exit(f"expected {' or '.join(CASES)}, then a device")
    backend, device = words[0], words[1] if len(words) > 1 else "cuda"
    cases = CASES[backend]
    left_out: dict[str, str] = {}
    with _environment(backend, device):
        for case in cases:
            os.environ.pop(PLAN, None)
            if case.policy:
                os.environ[PLAN] = case.policy
            try:
                run(backend, device, case)
            except RuntimeError as error:
                if not case.policy or not any(text in str(error) for text in NOT_HERE):
                    raise
                left_out[case.policy] = str(error).partition("\n")[0]
        if device == "cuda":
            torch.cuda.synchronize()
    for policy, reason in left_out.items():
        print(f"{policy}: {reason}")
    ran = len([case for case in cases if case.policy not in left_out])
    print(f"{ran} of {len(cases)} cases of {backend}")


if __name__ == "__main__":
    main()
