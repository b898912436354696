"""Runs every Triton kernel once, forward and backward, on shapes small enough for a sanitizer.

``python tools/gpu_kernels.py [DEVICE]``, default ``cuda``; ``cpu`` under ``TRITON_INTERPRET=1``.
The results are compared with the reference, since a sanitizer says nothing about them. Shapes are
odd, so that every mask is needed, and just beyond a tile.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from senet_kernels import channel_scale, squeeze, squeeze_excite
from senet_kernels.backends.triton import halves, launch

KERNELS = {
    "resident_kernel", "squeeze_kernel", "scale_kernel", "resident_backward_kernel",
    "dots_kernel", "dx_kernel", "parameters_kernel", "add_parts_kernel", "half_backward_kernel",
    "half_parameters_kernel",
}  # fmt: skip

# Shape, hidden channels, dtype, channels-last, options.
CASES: tuple[tuple[tuple[int, ...], int | None, torch.dtype, bool, dict[str, Any]], ...] = (
    # An image in one program.
    ((3, 12, 5, 7), 3, torch.float32, False, {"after": "relu", "residual": True}),
    ((3, 12, 5, 7), 3, torch.bfloat16, True, {"before": "silu", "shift": True}),
    # Programs that share images, by channels and by positions.
    ((2, 36, 33, 31), 5, torch.bfloat16, False, {"after": "relu", "residual": True}),
    ((2, 131, 11, 13), 9, torch.float16, True, {"before": "hardswish", "weighted": True}),
    ((2, 20, 33, 31), None, torch.float32, False, {"lengths": True, "affine": True}),
    # Rows moved as runs, by several programs; weights read once for several images.
    ((3, 136, 7, 9), 6, torch.bfloat16, False, {"after": "relu", "residual": True}),
    ((19, 1032, 2, 4), 40, torch.float16, True, {"before": "silu"}),
    # The halves.
    ((1, 3, 70, 33), None, torch.float32, False, {"part": squeeze, "lengths": True,
                                                  "affine": True}),
    ((2, 20, 70, 33), None, torch.bfloat16, True, {"part": channel_scale, "weighted": True,
                                                   "residual": True, "after": "relu"}),
    # Overwriting x.
    ((2, 36, 33, 31), 5, torch.float32, False, {"inplace": True, "before": "silu"}),
)  # fmt: skip


def run(
    device: str,
    shape: tuple[int, ...],
    hidden: int | None,
    dtype: torch.dtype,
    last: bool,
    options: dict[str, Any],
) -> None:
    """One step by Triton and one by the reference on the same tensors."""
    generator = torch.Generator().manual_seed(0)
    options = dict(options)
    batch, channels, *space = shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype).requires_grad_()

    def image() -> torch.Tensor:
        t = normal(*shape).detach()
        return (t.to(memory_format=torch.channels_last) if last else t).requires_grad_()

    part, inplace = options.pop("part", squeeze_excite), options.pop("inplace", False)
    inner = hidden or channels
    rows = channels * (2 if options.pop("shift", False) else 1)
    x, dy = image(), image().detach()
    w1 = b1 = None
    if hidden is not None:
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
    for backend in ("triton", "reference"):
        y = part(*arguments, **named, **options, backend=backend)
        result = (y.detach(), *torch.autograd.grad(y, leaves, dy))
        if inplace:
            with torch.no_grad():
                given = x.clone()
                part(given, *arguments[1:], **named, **options, inplace=True, backend=backend)
            result = (*result, given)
        results.append(result)
    bound = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    for got, want in zip(*results, strict=True):
        scale = want.double().abs().max().clamp(min=1e-3)
        error = (got.double() - want.double()).abs().max() / scale
        if not error <= bound:
            sys.exit(f"{shape} {dtype} {options}: error {error:.2g} of the largest value")


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    assert {n for m in (launch, halves) for n in vars(m) if n.endswith("_kernel")} == KERNELS
    launched: set[str] = set()
    call = launch.Launch.__call__

    def record(self: launch.Launch, *pointers: Any) -> None:
        launched.add(self.kernel.__name__)
        call(self, *pointers)

    launch.Launch.__call__ = record  # type: ignore[method-assign]
    for case in CASES:
        run(device, *case)
    if device == "cuda":
        torch.cuda.synchronize()
    if launched != KERNELS:
        sys.exit(f"launched {sorted(launched)}, expected {sorted(KERNELS)}")
    print(f"{len(CASES)} cases, {len(launched)} kernels")


if __name__ == "__main__":
    main()
