"""The public ops: schemas, fake kernels, and how a captured graph calls them.

``torch.ops.senet_kernels.squeeze_excite``, ``.squeeze`` and ``.channel_scale`` are what graphs
hold that outlive the process that captured them (``torch.export``, ``make_fx``, ONNX): functional,
their options by name, no backend among them. The machine that runs the graph chooses that
(:mod:`senet_kernels.public_kernels`). Their schemas are API: stable from 0.2 on.

The compiled library defines the same schemas for processes without Python; whoever comes second
leaves a definition as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends import native as _native  # noqa: F401  (the library defines first)
from .pointwise import Options

_MEAN = 'Tensor? mask=None, str pool="mean"'
SCHEMAS: dict[str, str] = {
    "squeeze_excite": (
        "(Tensor x, Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, *,"
        ' str activation="relu", str gate="sigmoid", str before="identity",'
        ' Tensor? affine_scale=None, Tensor? affine_shift=None, str after="identity",'
        " Tensor? residual=None, Tensor? alpha=None, Tensor? beta=None, Tensor? lengths=None,"
        f" {_MEAN}) -> Tensor"
    ),
    "squeeze": (
        '(Tensor x, *, str before="identity", Tensor? affine_scale=None,'
        f" Tensor? affine_shift=None, Tensor? lengths=None, {_MEAN}) -> Tensor"
    ),
    "channel_scale": (
        '(Tensor x, Tensor u, *, str gate="identity", str before="identity",'
        ' Tensor? affine_scale=None, Tensor? affine_shift=None, str after="identity",'
        " Tensor? residual=None, Tensor? alpha=None, Tensor? beta=None) -> Tensor"
    ),
}


def check_reserved(mask: Any, pool: str) -> None:
    """Refuse what schemas reserve for later versions.

    Raises:
        ValueError: it is not at its default.
    """
    if mask is not None:
        raise ValueError("mask: expected None, as it is reserved for a later version")
    if pool != "mean":
        raise ValueError(
            f"pool: expected 'mean', as others are reserved for a later version, got {pool!r}"
        )


def _like_x(x: Tensor, *_: Any, mask: Any = None, pool: str = "mean", **__: Any) -> Tensor:
    check_reserved(mask, pool)
    return torch.empty_like(x)


def _pooled(x: Tensor, *, mask: Any = None, pool: str = "mean", **_: Any) -> Tensor:
    check_reserved(mask, pool)
    return x.new_empty(x.shape[:2])


FAKES: dict[str, Callable[..., Tensor]] = {
    "squeeze_excite": _like_x,
    "squeeze": _pooled,
    "channel_scale": _like_x,
}


def _defined(name: str) -> str | None:
    """The schema that an op is defined with in this process; None without one."""
    try:
        return str(torch._C._dispatch_find_schema_or_throw(f"{ops.NAMESPACE}::{name}", ""))
    except RuntimeError:
        return None


def _define(name: str, schema: str) -> Any:
    """The op, defined here unless the compiled library has done so.

    Raises:
        ImportError: the op has been defined with another schema.
    """
    if _defined(name) is None:
        ops.library.define(f"{name}{schema}", tags=ops.TAGS)
    op = getattr(getattr(torch.ops, ops.NAMESPACE), name).default
    wanted = str(torch._C.parse_schema(f"{ops.NAMESPACE}::{name}{schema}"))
    if str(op._schema) != wanted:
        raise ImportError(
            f"expected the op {wanted}, got {op._schema}, defined by another version of "
            "senet_kernels' compiled library in this process"
        )
    op._tags = list(ops.TAGS)  # C++ gives none
    return op


OPS: dict[str, Any] = {name: _define(name, schema) for name, schema in SCHEMAS.items()}
if not ops.SHARED:
    for _name, _fake in FAKES.items():
        torch.library.register_fake(f"{ops.NAMESPACE}::{_name}", _fake, lib=ops.library)

# The names of functions that each op takes, and their defaults.
_DEFAULTS: dict[str, dict[str, str]] = {
    name: {a.name: a.default_value for a in op._schema.arguments if a.name in Options._fields}
    for name, op in OPS.items()
}


_IN_C = {
    "Tensor": "AtenTensorHandle",
    "Optional[Tensor]": "AtenTensorHandle*",
    "str": "const char*",
}


def c_shims(device: str = "cpu") -> dict[Any, list[str]]:
    """What makes AOTInductor call the compiled library's C functions rather than the dispatcher:
    the value of its option ``aot_inductor.custom_ops_to_c_shims`` for the public ops.

    A package compiled so loads only into a process that has loaded the library with
    ``RTLD_GLOBAL``, and calls its native kernels whatever backend is asked for.

    Args:
        device: ``"cpu"``, or ``"cuda"`` where the library has CUDA kernels.

    Raises:
        ValueError: another device.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    shims = {}
    for name, op in OPS.items():
        arguments = [f"{_IN_C[str(a.type)]} {a.name}" for a in op._schema.arguments]
        declared = ", ".join([*arguments, "AtenTensorHandle* result"])
        shims[op] = [f"AOTITorchError aoti_torch_{device}_{name}({declared})"]
    return shims


# The tensors of each op in the order of the private ops, whose forward takes the same; so many of
# them by position.
_POSITIONAL = {"squeeze_excite": 5, "squeeze": 1, "channel_scale": 2}
_AFFINE = ("affine_scale", "affine_shift")
_KEYWORDS: dict[str, tuple[str, ...]] = {
    "squeeze_excite": ("residual", "alpha", "beta", *_AFFINE, "lengths"),
    "squeeze": (*_AFFINE, "lengths"),
    "channel_scale": ("residual", "alpha", "beta", *_AFFINE),
}


def record(name: str, options: Options, *tensors: Tensor | None) -> Tensor:
    """Call a public op: its functions, and its tensors in the order of the private ops. Arguments
    at their defaults are left out, for graphs to be readable."""
    count = _POSITIONAL[name]
    given: dict[str, Any] = {
        argument: getattr(options, argument)
        for argument, default in _DEFAULTS[name].items()
        if getattr(options, argument) != default
    }
    by_keyword = zip(_KEYWORDS[name], tensors[count:], strict=True)
    given |= {argument: t for argument, t in by_keyword if t is not None}
    y: Tensor = OPS[name](*tensors[:count], **given)
    return y
