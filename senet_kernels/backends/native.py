"""The C++ and CUDA backend: loads the compiled library, which implements the ``native_*`` ops.

The library is beside the package, or where ``SENET_KERNELS_PREBUILT`` says, and is loaded at
import: it takes milliseconds, touches no device, and whoever calls a raw op (an exported program,
say) finds it there. Where it is missing or does not load, the reason is kept and importing goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from senet_kernels import ops
from senet_kernels.pointwise import Options, pack

_PACKAGE = Path(__file__).resolve().parent.parent
_FORWARD = "senet_kernels::native_forward"

#: Names a library that was built elsewhere, or its folder.
PREBUILT = "SENET_KERNELS_PREBUILT"


def _folder() -> Path:
    """Where the library is, and the record of its build."""
    given = os.environ.get(PREBUILT)
    path = Path(given) if given else _PACKAGE
    return path if path.is_dir() else path.parent


def kernel_files() -> list[Path]:
    """What the kernels are made of, for :mod:`senet_kernels.trust`."""
    given = Path(os.environ.get(PREBUILT) or _PACKAGE)
    if given.is_dir():
        return sorted(given.glob("_native*.so"))
    return [given] if given.exists() else []


def build_record() -> dict[str, Any]:
    """What setup.py wrote about the build; empty when it never ran."""
    try:
        record: dict[str, Any] = json.loads((_folder() / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record


def _load() -> str | None:
    """Load the library; why that is not possible, or None."""
    if ops.SHARED and torch._C._dispatch_has_kernel_for_dispatch_key(_FORWARD, "CPU"):
        return None  # another copy of this package has loaded its own
    libraries = kernel_files()
    if not libraries and os.environ.get(PREBUILT):
        return f"{PREBUILT} names no library: {os.environ[PREBUILT]}"
    if not libraries:
        reason = build_record().get("reason", "this is a source tree that was never built")
        return (
            f"the compiled library is not installed: {reason}; "
            "'pip install --no-build-isolation .' builds it"
        )
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"the compiled library {libraries[0].name} does not load: {error}"
    return None


#: Why the native backend cannot be used in this process; None when it can.
UNAVAILABLE: str | None = _load()


# Asked once: torch.compile cannot trace the question.
_HAS_CUDA = UNAVAILABLE is None and torch._C._dispatch_has_kernel_for_dispatch_key(_FORWARD, "CUDA")


def _raise_unavailable(*args: Any) -> NoReturn:
    raise RuntimeError(f"backend 'native' is not available: {UNAVAILABLE}")


if UNAVAILABLE is not None and not ops.SHARED:
    # A raw op called all the same says why instead of "could not run".
    for _op in ops.NATIVE_OPS:
        ops.library.impl(_op, _raise_unavailable, "CompositeExplicitAutograd")


def unavailable_on(device: str) -> str | None:
    """Why there are no kernels for a device type in the library that was built; None if there are.

    What the library says, not what there was to be built: the record may be of another build.
    """
    if device != "cuda" or _HAS_CUDA:
        return None
    reason = build_record().get("cuda_reason", "it was built without CUDA kernels")
    return f"the compiled library has no CUDA kernels: {reason}"


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # csrc/se.h


class Gpu(NamedTuple):
    """What a launch plan depends on of a GPU, as csrc/cuda/plan.h has it. In bytes and threads."""

    capability: int  # 90 for sm_90
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    threads_per_multiprocessor: int = 2048
    registers_per_multiprocessor: int = 65536
    largest_cluster: int = 16
    cooperative: bool = True


def launch_plan(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    *,
    before: str = "identity",
    after: str = "identity",
    given: Collection[str] = (),
    backward: bool = False,
    gpu: Gpu | None = None,
) -> str:
    """How the CUDA kernels would be launched for a call of the whole operation.

    Args:
        x, w1, w2: as in ``squeeze_excite``; for a ``gpu`` that is not there, of any device.
        before, after: of the call; ``after="relu"`` may want a bit mask of x.
        given: those of ``before_affine``, ``lengths`` and ``residual`` that the call has.
        backward: the backward pass up to ``dx`` instead of the forward pass.
        gpu: plan for this one; None is the device of x, with what the CUDA runtime says of it.

    Other tensors of the call are taken to be laid out as x is. ``SENET_KERNELS_CUDA_PLAN`` counts.

    Raises:
        RuntimeError: the library has no CUDA kernels.
    """
    reason = UNAVAILABLE or unavailable_on("cuda")
    if reason is not None:
        raise RuntimeError(reason)
    form = "single layer (w1=None)" if w1 is None else "two layers"
    return _launch_plan(
        x, gpu or x.device, gpu is not None or _is_aligned(x), w2.dtype, form,
        0 if w1 is None else w1.shape[0], w2.shape[0],
        Options("identity", "identity", before, after), given, backward,
    )  # fmt: skip


# In the order of csrc/se.h.
_FORMS = ("two layers", "single layer (w1=None)", "squeeze alone", "channel_scale alone")


def _launch_plan(
    x: Tensor,
    gpu: Gpu | torch.device,
    aligned: bool,
    param_dtype: torch.dtype,
    form: str,
    hidden: int,
    outputs: int,
    options: Options,
    given: Collection[str],
    backward: bool,
) -> str:
    call = [
        _FORMS.index(form),
        x.shape[0],
        x.shape[1],
        x.shape[2:].numel(),
        hidden,
        outputs,
        ops.inner_is_channels(x),
        _DTYPES.index(x.dtype),
        _DTYPES.index(param_dtype),
        backward,
        pack(options),
        "before_affine" in given,
        aligned,
        "lengths" in given,
        "residual" in given,
    ]
    numbers = [int(v) for v in call]
    device = [int(v) for v in gpu] if isinstance(gpu, Gpu) else [gpu.index or 0]
    plan: str = torch.ops.senet_kernels.native_plan(numbers, device)
    return plan


def launches(
    x: Tensor,
    device: torch.device,
    aligned: bool,
    param_dtype: torch.dtype,
    form: str,
    hidden: int,
    outputs: int,
    options: Options,
    given: Collection[str],
    training: bool,
) -> tuple[str, ...]:
    """How kernels of any form are launched, for the names of verdicts: forward and, when
    ``training``, backward. Nothing on a CPU, where one plan takes all.

    Args:
        x: of the shape, strides and dtype of the call's, on the meta device.
        device: that of the call.
        aligned: whether its images begin at multiples of 16 bytes.
        param_dtype: of the parameters.
        form: the row of the feature table.
        hidden: R; 0 where there is no hidden layer.
        outputs: rows of w2, columns of u, or C.
        options: the functions of the call.
        given: as for :func:`launch_plan`.
        training: whether it is differentiated.
    """
    if device.type != "cuda":
        return ()
    aligned = _is_aligned(x, aligned)
    names = ("forward", "backward") if training else ("forward",)
    return tuple(
        f"{name}: "
        + _launch_plan(
            x, device, aligned, param_dtype, form, hidden, outputs, options, given,
            name == "backward",
        )
        for name in names
    )  # fmt: skip


def _is_aligned(x: Tensor, begins: bool | None = None) -> bool:
    """Whether all images of x, or of the copy that is made of it where they are not dense, begin at
    multiples of 16 bytes and of 8 elements; ``begins``: whether the first one does."""
    image = x[:1].movedim(1, -1) if ops.inner_is_channels(x) else x[:1]
    if not image.is_contiguous():
        return True
    if begins is None:
        begins = x.data_ptr() % 16 == 0
    stride = x.stride(0)
    return begins and stride % 8 == 0 and stride * x.element_size() % 16 == 0


def notes(
    x: Tensor, w1: Tensor | None, w2: Tensor, options: Options, given: Collection[str]
) -> list[str]:
    """How the CUDA kernels would be launched, for ``explain``; ``given`` as for ``launch_plan``."""
    if x.device.type != "cuda":
        return []

    def plan(backward: bool) -> str:
        return launch_plan(
            x, w1, w2,
            before=options.before, after=options.after, given=given, backward=backward,
        )  # fmt: skip

    return [f"forward: {plan(False)}", f"backward: {plan(True)}"]


def describe() -> str:
    """One line for ``backends()``: how the library was built and which variant runs here."""
    record = build_record()
    isas = ", ".join(record.get("isas", ())) or "unknown"
    reason = unavailable_on("cuda")
    cuda = reason or f"CUDA kernels for {record.get('cuda', 'unknown')}, not yet run on a GPU"
    return (
        f"C++ kernels for {isas}; running {torch.ops.senet_kernels.native_isa()}; "
        f"compiler {record.get('compiler', 'unknown')}; {cuda}"
    )


@contextmanager
def dispatched_allocations() -> Iterator[None]:
    """While kernels are proven: the library allocates as PyTorch's operators do, so that modes of
    this thread see it. It does so in other threads, too, which makes them no more than slower."""
    if UNAVAILABLE is not None:
        yield
        return
    process = os.getpid()
    torch.ops.senet_kernels.native_dispatch_allocations(True)
    _dispatching.append(process)
    try:
        yield
    finally:
        if process in _dispatching:
            _dispatching.remove(process)
            torch.ops.senet_kernels.native_dispatch_allocations(False)


# A process for each proof that is under way.
_dispatching: list[int] = []


def after_fork() -> None:
    """In a child: end what proofs of other threads began; those threads are not in it."""
    while _dispatching:
        _dispatching.pop()
        torch.ops.senet_kernels.native_dispatch_allocations(False)


def waits(plan: str) -> bool:
    """Whether blocks of a launch wait for one another, by what :func:`launch_plan` says of it: then
    a fault can hang the device."""
    return "cluster" in plan or "exchange" in plan
