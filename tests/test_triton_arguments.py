"""What the raw ops of the Triton backend refuse, beside what the native ones do: the kernels trust
shapes, dtypes, devices and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from senet_kernels import pack_options
from senet_kernels.backends import native, triton
from senet_kernels.ops import mask_numel, saved_numel

pytest.importorskip("triton")

from senet_kernels.backends.triton import halves, launch

B, C, R = 2, 8, 4
RELU = pack_options(after="relu")
#: In the order of the ops' arguments.
OPS: dict[str, tuple[str, ...]] = {
    "forward": ("x", "w1", "b1", "w2", "b2", "residual", "alpha", "beta", "affine_scale",
                "affine_shift", "lengths", "options", "save"),
    "forward_": ("x", "w1", "b1", "w2", "b2", "residual", "alpha", "beta", "affine_scale",
                 "affine_shift", "lengths", "options"),
    "backward": ("dy", "x", "w1", "b1", "w2", "b2", "residual", "alpha", "beta", "affine_scale",
                 "affine_shift", "lengths", "saved", "mask", "options", "needs"),
    "squeeze": ("x", "affine_scale", "affine_shift", "lengths", "options"),
    "squeeze_backward": ("dz", "x", "affine_scale", "affine_shift", "lengths", "options", "needs"),
    "channel_scale": ("x", "u", "residual", "alpha", "beta", "affine_scale", "affine_shift",
                      "options", "save"),
    "channel_scale_backward": ("dy", "x", "u", "residual", "alpha", "beta", "affine_scale",
                               "affine_shift", "mask", "options", "needs"),
}  # fmt: skip
NOT_READ_BACKWARD = {"residual", "b1", "b2"}  # of after="relu", the mask stands for the residual
KEPT = ("saved", "mask")
#: The native ops convert these.
NATIVE_TAKES = {("u", "dtype"), ("dz", "dtype")}


def _arguments(op: str) -> dict[str, Any]:
    x = torch.randn(B, C, 3, 5)
    w1, w2 = torch.randn(R, C), torch.randn(C, R)
    every: dict[str, Any] = {
        "x": x, "w1": w1, "w2": w2, "b1": torch.randn(R), "b2": torch.randn(C),
        "lengths": torch.tensor([15, 7]), "u": torch.randn(B, C), "dz": torch.randn(B, C),
        "saved": torch.randn(saved_numel(x, w1, w2)), "options": RELU, "needs": 1, "save": True,
        "mask": torch.zeros(mask_numel(x), dtype=torch.uint8),
    }  # fmt: skip
    every |= {name: torch.randn(C) for name in ("alpha", "beta", "affine_scale", "affine_shift")}
    every |= {name: torch.randn_like(x) for name in ("residual", "dy")}
    return {name: every[name] for name in OPS[op]}


def _call(op: str, arguments: dict[str, Any]) -> Any:
    """Past the dispatcher, which sends a call with a tensor of another device elsewhere."""
    module = launch if hasattr(launch, op) else halves
    return getattr(module, op)(*arguments.values())


def _freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def _partly_freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - t.element_size())
    return t


#: What is wrong with a tensor, and what the error says that was expected.
WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "device": (lambda t: t.to("meta"), r"expected .*cpu.*got meta"),
    "freed": (_freed, "expected a tensor with memory for all of its elements"),
    "partly freed": (_partly_freed, "expected a tensor with memory for all of its elements"),
    "dtype": (
        lambda t: t.to(torch.int32 if t.dtype in (torch.int64, torch.uint8) else torch.float64),
        r"expected .*torch\.(float32|int64|uint8).*got.*torch\.(float64|int32)",
    ),
    # The rows of w1 and w2 are R and C: others are blamed on what does not match them.
    "extent": (
        lambda t: torch.cat([t, t], 1 if t.shape in ((R, C), (C, R)) else 0),
        "expected .*got",
    ),
    "dimension": (lambda t: t[None], "expected .*got"),
}


def _cases() -> list[Any]:
    found = []
    for op, names in OPS.items():
        for name in names:
            is_tensor = isinstance(_arguments(op)[name], Tensor)
            if not is_tensor or (op.endswith("backward") and name in NOT_READ_BACKWARD):
                continue
            for wrong in WRONG:
                # Any batch, dtype, and number of spatial dimensions will do for x itself; how the
                # results kept for backward are shaped does not matter.
                if name == "x" and wrong in ("device", "extent", "dimension", "dtype"):
                    continue
                if name in KEPT and wrong == "dimension":
                    continue
                found.append(pytest.param(op, name, wrong, id=f"{op}-{name}-{wrong}"))
    return found


@pytest.mark.parametrize(("op", "name", "wrong"), _cases())
def test_what_is_wrong_with_a_tensor_is_told(op: str, name: str, wrong: str) -> None:
    arguments = _arguments(op)
    make, expected = WRONG[wrong]
    arguments[name] = make(arguments[name])
    with pytest.raises(RuntimeError, match=rf"^{name}: {expected}"):
        _call(op, arguments)
    if native.UNAVAILABLE is None and wrong != "device" and (name, wrong) not in NATIVE_TAKES:
        with pytest.raises(RuntimeError, match=name.replace("affine_", "before_affine|affine_")):
            getattr(torch.ops.senet_kernels, f"native_{op}")(*arguments.values())


@pytest.mark.parametrize("kept", ["saved", "mask"])
def test_kept_results_must_be_contiguous(kept: str) -> None:
    arguments = _arguments("backward")
    arguments[kept] = arguments[kept].repeat_interleave(2)[::2]
    with pytest.raises(RuntimeError, match=rf"^{kept}: .*contiguous\), got .*, not contiguous"):
        _call("backward", arguments)


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        ("forward", {"w1": None}, "b1: expected none without w1"),
        ("forward", {"affine_shift": None}, "expected both or none, got affine_scale alone"),
        ("backward", {"affine_scale": None}, "expected both or none, got affine_shift alone"),
        ("squeeze", {"affine_scale": None}, "expected both or none, got affine_shift alone"),
        ("channel_scale", {"affine_shift": None}, "expected both or none, got affine_scale alone"),
        ("forward", {"w1": torch.randn(R)}, r"w1: expected a matrix, got shape \[4\]"),
        ("forward", {"w2": torch.tensor(1.0)}, r"w2: expected a matrix, got shape \[\]"),
        ("channel_scale", {"u": torch.randn(C)}, "u: expected"),
        ("channel_scale", {"u": torch.tensor(1.0)}, "u: expected"),
        *[("forward", {"options": o}, f"options: expected a packing of known functions, got {o}")
          for o in (-1, 1 << 16, 0xF000, 1 << 40)],
    ],
)  # fmt: skip
def test_arguments_that_do_not_go_together(op: str, changed: dict[str, Any], message: str) -> None:
    arguments = _arguments(op) | changed
    with pytest.raises(RuntimeError, match=message):
        _call(op, arguments)
    if native.UNAVAILABLE is None:
        with pytest.raises(RuntimeError):
            getattr(torch.ops.senet_kernels, f"native_{op}")(*arguments.values())


@pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("op", OPS)
def test_right_arguments_are_taken_and_freed_ones_refused_later_too(op: str) -> None:
    """FSDP frees the memory of parameters between calls of the same kind."""
    arguments = _arguments(op)
    _call(op, arguments)
    _call(op, arguments)
    for name, t in arguments.items():
        if not isinstance(t, Tensor) or (op.endswith("backward") and name in NOT_READ_BACKWARD):
            continue
        with pytest.raises(RuntimeError, match=f"^{name}: expected a tensor with memory"):
            _call(op, arguments | {name: _freed(t)})


@pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_weights_of_convolutions_and_empty_batches_are_taken() -> None:
    arguments = _arguments("forward")
    y = _call("forward", arguments)[0]
    for name in ("w1", "w2"):
        arguments[name] = arguments[name][:, :, None, None]
    assert torch.equal(_call("forward", arguments)[0], y)
    for name in ("x", "residual", "lengths"):
        arguments[name] = arguments[name][:0].clone()
    assert _call("forward", arguments)[0].shape[0] == 0
