"""What a verdict is about: a kernel variant on a card, and the names of both.

A :class:`Kind` is a call as a kernel sees it. Its *class* is what a verdict holds for: functions,
dtypes, form, layout, channels, hidden channels, direction, and the number of images and positions
in buckets. Its *key* adds the launch plan and the hash of the kernels; the environment (card,
driver, versions) names the folder that verdicts are kept in.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from senet_kernels._version import __version__
from senet_kernels.backends import native, triton
from senet_kernels.features import Call
from senet_kernels.pointwise import Options

MODULES: dict[str, ModuleType] = {"native": native, "triton": triton}

#: Directions of a call: without gradients, or the forward pass that keeps for backward with it.
INFERENCE, TRAINING = "inference", "training"

# Whatever a change to it makes of older verdicts: they are not read.
_FORMAT = 2


def bucket(extent: int) -> int:
    """The smallest power of two that is not below an extent; 0 for 0.

    By comparisons: of a symbolic extent torch.compile then guards on the bucket, not on the value.
    """
    limit = 1
    if extent <= 0:
        return 0
    while extent > limit:
        limit *= 2
    return limit


def class_of(
    backend: str,
    call: Call,
    x: Tensor,
    hidden: int,
    outputs: int,
    direction: str,
) -> str:
    """The class of a call as text; Dynamo traces this."""
    positions = 1
    for extent in x.shape[2:]:
        positions *= extent
    layout = "rows"
    if x.stride(1) == 1:
        layout = "channels-last"
    eighths = "8n"
    if positions % 8 != 0:
        eighths = "odd"
    given = (call.shift, call.weighted, call.affine, call.lengths, call.residual, call.inplace)
    facts = "".join(["1" if fact else "0" for fact in given])
    names = "/".join(call.options)
    return (
        f"{backend} {x.device.type} {call.form} {names} {facts} {call.dtype} "
        f"{call.param_dtype} {layout} {x.dim()}d B{bucket(x.shape[0])} C{x.shape[1]} R{hidden} "
        f"U{outputs} S{bucket(positions)}{eighths} {direction}"
    )


class Kind(NamedTuple):
    """A kernel variant: all that it takes to make a call that runs it."""

    backend: str
    call: Call
    device: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    aligned: bool
    hidden: int
    outputs: int  # rows of w2, columns of u
    direction: str
    name: str  # see class_of
    plan: str = ""
    waits: bool = False

    @property
    def key(self) -> str:
        """The name of the variant: its class, memory layout, plan and kernels."""
        dense = "dense" if is_dense(self.shape, self.strides) else "strided"
        memory = dense if self.aligned else f"{dense}, misaligned"
        return f"{self.name} | {memory} | {self.plan} | {kernel_hash(self.backend)}"

    def as_json(self) -> str:
        """For another process."""
        fields = self._asdict()
        call = self.call._asdict()
        call |= {"dtype": _name_of(call["dtype"]), "param_dtype": _name_of(call["param_dtype"])}
        return json.dumps(fields | {"call": call})


def from_json(text: str) -> Kind:
    """Inverse of :meth:`Kind.as_json`."""
    fields: dict[str, Any] = json.loads(text)
    call = fields["call"]
    call["options"] = Options(*call["options"])
    call |= {name: getattr(torch, call[name]) for name in ("dtype", "param_dtype")}
    fields |= {"call": Call(**call)}
    fields |= {name: tuple(fields[name]) for name in ("shape", "strides")}
    return Kind(**fields)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements lie one behind the other, in whatever order of the axes."""
    expected = 1
    for stride, extent in sorted(zip(strides, shape, strict=True)):
        if extent != 1 and stride != expected:
            return False
        expected *= extent
    return True


def kind_of(
    backend: str,
    call: Call,
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    outputs: int,
    direction: str,
) -> Kind:
    """The kind of an eager call.

    ``outputs`` is the number of rows of w2, of columns of u, or C for the squeeze.
    """
    hidden = 0 if w1 is None else w1.shape[0]
    plan = plan_of(backend, call, x, w1, w2, direction)
    # A plan that names no exchange between blocks is one of kernels that do not wait.
    ask = getattr(MODULES[backend], "waits", None)
    waits = bool(plan) and ask is not None and bool(ask(plan))
    return Kind(
        backend=backend,
        call=call._replace(huge=False, wide=False, subclass=None),
        device=str(x.device),
        shape=tuple(x.shape),
        strides=tuple(x.stride()),
        aligned=x.data_ptr() % 16 == 0,
        hidden=hidden,
        outputs=outputs,
        direction=direction,
        name=class_of(backend, call, x, hidden, outputs, direction),
        plan=plan,
        waits=waits,
    )


def plan_of(
    backend: str, call: Call, x: Tensor, w1: Tensor | None, w2: Tensor | None, direction: str
) -> str:
    """How the kernels of a call would be launched, in words; empty for the halves, which have one
    way."""
    if w2 is None:
        return ""
    # As the kernels will be given them: under autocast in other dtypes.
    like = x if x.dtype == call.dtype else x.to(call.dtype)
    if w2.dtype != call.param_dtype:
        w1, w2 = None if w1 is None else w1.to(call.param_dtype), w2.to(call.param_dtype)
    said = MODULES[backend].notes(like, w1, w2, call.options, call.operands)
    return "; ".join(said if direction == TRAINING else said[:1])


@functools.cache
def kernel_hash(backend: str) -> str:
    """A hash of the files that a backend's kernels are made of."""
    digest = hashlib.sha256()
    for path in MODULES[backend].kernel_files():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def environment(device: str) -> tuple[tuple[str, str], ...]:
    """What a verdict depends on besides the kernel: the card, and the software around it."""
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "package": __version__,
        "torch": torch.__version__,
        "toolkit": torch.version.cuda or torch.version.hip or "none",
        "library": native.build_record().get("cuda", "none"),
        "triton": _triton_version(),
        "machine": platform.machine(),
    }
    return tuple((name, str(value)) for name, value in (card(device) | facts).items())


def card(device: str) -> dict[str, Any]:
    """The device and its driver."""
    if torch.device(device).type != "cuda":
        return {"card": torch.device(device).type}
    p = torch.cuda.get_device_properties(torch.device(device))
    return {
        "card": p.name,  # a part of a card (MIG) has its profile in its name
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory": p.total_memory,
        "architecture": getattr(p, "gcnArchName", ""),
        "driver": _driver(),
    }


def _driver() -> str:
    """The version of the driver: as the kernel module says, else the release of CUDA it is for."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        ask = getattr(torch._C, "_cuda_getDriverVersion", None)
        return str(ask()) if ask is not None else "unknown"


def _triton_version() -> str:
    if triton.UNAVAILABLE is not None:
        return "none"
    import triton as installed

    return str(installed.__version__)


def digest(text: str) -> str:
    """A short name for a text, for files."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
