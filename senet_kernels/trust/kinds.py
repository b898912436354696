"""What a verdict is about: a kernel variant on a card, and the names of both.

A :class:`Kind` is a call as a kernel sees it. Its *class* is what a verdict holds for: functions,
dtypes, form, layout, channels, hidden channels, direction, and the number of images and positions
in buckets. Its *key* adds what kernels treat differently within a class (the constants of the
launch plan, the layout that they walk, what tiles divide) and the hash of the kernels; the
environment (card, driver, versions) names the folder that verdicts are kept in.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import platform
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from senet_kernels import ops
from senet_kernels._version import __version__
from senet_kernels.backends import native, triton
from senet_kernels.features import Call
from senet_kernels.pointwise import Options

MODULES: dict[str, ModuleType] = {"native": native, "triton": triton}

#: Directions of a call: without gradients, or the forward pass that keeps for backward with it.
INFERENCE, TRAINING = "inference", "training"

# Whatever a change to it makes of older verdicts: they are not read.
_FORMAT = 4


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


def number(extent: int) -> int:
    """An extent that may be a symbol, as a number: a range is made of nothing else."""
    return len(range(extent))


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
    eighths = "8n"
    if positions % 8 != 0:
        eighths = "odd"
    layer = layer_of(backend, call, x, hidden, outputs, direction)
    return f"{layer} B{bucket(x.shape[0])} S{bucket(positions)}{eighths}"


def layer_of(
    backend: str,
    call: Call,
    x: Tensor,
    hidden: int,
    outputs: int,
    direction: str,
) -> str:
    """The part of a class that is not of the numbers of images and positions."""
    layout = "rows"
    if x.stride(1) == 1:
        layout = "channels-last"
    names = "/".join(call.options)
    return (
        f"{backend} {x.device.type} {call.form} {names} {facts_of(call)} {call.dtype} "
        f"{call.param_dtype} {layout} {x.dim()}d C{number(x.shape[1])} R{hidden} U{outputs} "
        f"{direction}"
    )


def layer_in(name: str) -> str:
    """The layer of a class."""
    return name.rpartition(" B")[0]


def facts_of(call: Call) -> str:
    """What a call has been given, a digit each, from ``shift`` on; Dynamo traces this."""
    given = (call.shift, call.weighted, call.affine, call.lengths, call.residual, call.inplace)
    return "".join(["1" if fact else "0" for fact in given])


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
    residual: tuple[int, ...] = ()  # strides of the residual, where kernels see another memory

    @property
    def key(self) -> str:
        """The name of the variant: its class, memory, divisors, plan and kernels."""
        memory = memory_of(self.shape, self.strides, self.aligned)
        if self.residual:
            memory += f"; residual {memory_of(self.shape, self.residual, self.aligned)}"
        return (
            f"{self.name} | {memory} | {_divisors(self.shape)} | {self.plan} | "
            f"{kernel_hash(self.backend)}"
        )

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
    fields |= {name: tuple(fields[name]) for name in ("shape", "strides", "residual")}
    return Kind(**fields)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=4096)
def memory_of(shape: tuple[int, ...], strides: tuple[int, ...], aligned: bool) -> str:
    """How kernels walk images in such memory: by channels or by positions, where they are or as a
    copy, and how the images follow one another; whether results can be written where they are
    to be."""
    x = torch.empty_strided(shape, strides, device="meta")
    by_channels = ops.inner_is_channels(x)
    words = ["channels-last" if by_channels else "rows"]
    image = math.prod(shape[1:])
    follow = shape[0] <= 1 or strides[0] == image
    if not _is_dense(x[:1], by_channels):
        words.append("copied")
    elif not follow:
        apart = f"apart by {math.gcd(strides[0], 16)}n"
        words.append("repeated" if strides[0] == 0 else apart)
    y = torch.empty_like(x)
    if not _is_dense(y[:1], by_channels) or (shape[0] > 1 and y.stride(0) != image):
        words.append("y copied")
    if not aligned:
        words.append("misaligned")
    return ", ".join(words)


def _is_dense(image: Tensor, by_channels: bool) -> bool:
    return (image.movedim(1, -1) if by_channels else image).is_contiguous()


def _divisors(shape: tuple[int, ...]) -> str:
    """What tiles and vectors divide of the extents that a class has in buckets only."""
    whole = "16n" if shape[0] % 16 == 0 else "ragged"
    return f"B{whole} S{math.gcd(math.prod(shape[2:]), 16)}n"


def kind_of(
    backend: str,
    call: Call,
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    outputs: int,
    direction: str,
    residual: Tensor | None = None,
) -> Kind:
    """The kind of an eager call.

    ``outputs`` is the number of rows of w2, of columns of u, or C for the squeeze.
    """
    hidden = 0 if w1 is None else w1.shape[0]
    shape, (strides, aligned) = tuple(x.shape), _memory_given(x, call)
    other: tuple[int, ...] = ()
    if residual is not None:
        # One that is misaligned alone makes kernels take all images so.
        other, is_aligned = _memory_given(residual, call)
        aligned = aligned and is_aligned
        if memory_of(shape, other, aligned) == memory_of(shape, strides, aligned):
            other = ()
    return kind_for(
        backend, call, str(x.device), shape, strides, aligned, hidden, outputs, direction,
        class_of(backend, call, x, hidden, outputs, direction), other,
    )  # fmt: skip


def _memory_given(t: Tensor, call: Call) -> tuple[tuple[int, ...], bool]:
    """The strides of an image as a kernel is given it, and whether it is aligned: under autocast it
    may be a copy in another dtype."""
    if t.dtype != call.dtype:
        return torch.empty_like(t, device="meta").stride(), True
    return tuple(t.stride()), t.data_ptr() % 16 == 0


def kind_for(
    backend: str,
    call: Call,
    device: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    aligned: bool,
    hidden: int,
    outputs: int,
    direction: str,
    name: str,
    residual: tuple[int, ...] = (),
) -> Kind:
    """The kind of a call whose tensors need not be there."""
    # A copy of what is not dense is aligned.
    plan = plan_for(backend, call, device, shape, strides, aligned, hidden, outputs, direction)
    ask = getattr(MODULES[backend], "waits", None)
    return Kind(
        backend=backend,
        call=call._replace(huge=False, wide=False, subclass=None),
        device=device,
        shape=shape,
        strides=strides,
        aligned=aligned,
        hidden=hidden,
        outputs=outputs,
        direction=direction,
        name=name,
        plan=plan,
        waits=ask is not None and bool(ask(plan)),
        residual=residual,
    )


def plan_for(
    backend: str,
    call: Call,
    device: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    aligned: bool,
    hidden: int,
    outputs: int,
    direction: str,
) -> str:
    """How the kernels of a call are launched: forward, and with gradients backward."""
    x = torch.empty_strided(shape, strides, dtype=call.dtype, device="meta")
    return "; ".join(
        MODULES[backend].launches(
            x, torch.device(device), aligned, call.param_dtype, call.form, hidden, outputs,
            call.options, call.operands, direction == TRAINING,
        )
    )  # fmt: skip


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
    """Without importing it, which takes long: native kernels have no use for it."""
    try:
        if importlib.util.find_spec("triton") is None:
            return "none"
    except ValueError:  # a module without a spec stands in for it
        return "unknown"
    for name in (
        "triton",
        "pytorch-triton",
        "pytorch-triton-rocm",
        "triton-rocm",
        "triton-windows",
    ):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "unknown"


def digest(text: str) -> str:
    """A short name for a text, for files."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
