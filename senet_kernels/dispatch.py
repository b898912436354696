"""Which backend runs a call, and why.

Argument, then :func:`use_backend`, then the environment variable ``SENET_KERNELS_BACKEND``, then
automatic: the first backend in ``ORDER`` that takes the call, passing over those that are not in
``AUTOMATIC`` for its device, and those whose kernels have not proven themselves on this card
(:mod:`senet_kernels.trust`). A backend chosen explicitly never falls back: it runs or raises.
(What no kernel can take part in, forward-mode AD say, is the fallback's all the same:
``resolve.why_no_kernel``.)

``fallback`` is PyTorch's own operators, and takes every legal call. So does ``reference``, the
oracle, which runs only when asked for by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import features, trust
from .backends import native, triton
from .features import Call
from .tensors import dispatch_modes, function_modes, is_captured

#: Backends with kernels.
KERNELS: tuple[str, ...] = ("native", "triton")
#: What the automatic choice takes the first of.
ORDER: tuple[str, ...] = (*KERNELS, "fallback")
#: All that can be asked for by name.
NAMES: tuple[str, ...] = (*ORDER, "reference")
#: The backends with kernels that run without being asked for by name, by device type.
AUTOMATIC: dict[str, tuple[str, ...]] = {"cpu": ("native",), "cuda": ("native", "triton")}
_MODULES: dict[str, ModuleType] = {"native": native, "triton": triton}

ENVIRONMENT_VARIABLE = "SENET_KERNELS_BACKEND"

# One plain global, as torch.backends' flags are: torch.compile guards on it, which it cannot do
# for a ContextVar (graph break) or a threading.local (wrong guard).
_forced: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run the call; the message says why."""


class BackendChoice(NamedTuple):
    """The outcome of a choice: the backend, and why each one before it was passed over."""

    backend: str
    passed_over: tuple[tuple[str, str], ...]


def check_backend_name(backend: str | None, source: str) -> str:
    """``"auto"`` or a known backend; ``source`` names the culprit in the error."""
    if backend is None:
        return "auto"
    if backend not in (*NAMES, "auto"):
        raise ValueError(f"{source}: expected one of auto, {', '.join(NAMES)}, got {backend!r}")
    return backend


def requested_backend(argument: str | None) -> str:
    """The backend asked for by argument, context manager or environment; else ``"auto"``."""
    if argument is not None:
        return check_backend_name(argument, "backend")
    return check_backend_name(_forced, ENVIRONMENT_VARIABLE)


def why_not(backend: str, call: Call) -> str | None:
    """Why ``backend`` cannot run ``call``; None when it can."""
    if backend not in _MODULES:
        return None
    return features.missing_feature(backend, call) or _unavailable(backend, call.device)


def _unavailable(backend: str, device: str) -> str | None:
    """Why ``backend`` cannot be used in this process for tensors of a device type."""
    module = _MODULES[backend]
    reason: str | None = module.UNAVAILABLE
    if reason is None and hasattr(module, "unavailable_on"):
        reason = module.unavailable_on(device)
    return reason


def choose(call: Call, requested: str, against: tuple[tuple[str, str], ...] = ()) -> BackendChoice:
    """Pick the backend for ``call``.

    Args:
        call: what is to be computed.
        requested: a backend's name, or ``"auto"``.
        against: backends that are passed over in an automatic choice, each with the reason.

    Raises:
        BackendUnavailableError: ``requested`` names a backend that cannot run the call.
    """
    if requested != "auto":
        reason = why_not(requested, call)
        if reason is not None:
            raise BackendUnavailableError(
                f"backend={requested!r} was asked for and cannot run this call: {reason}"
            )
        return BackendChoice(requested, ())
    passed_over: tuple[tuple[str, str], ...] = ()
    for backend in ORDER:
        reason = None
        for name, why in against:
            if name == backend:
                reason = why
        # In this order: why_not may import what a backend needs.
        reason = reason or only_by_name(backend, call.device) or why_not(backend, call)
        if reason is None:
            return BackendChoice(backend, passed_over)
        passed_over = (*passed_over, (backend, reason))
    raise AssertionError("the fallback takes every call")


def only_by_name(backend: str, device: str) -> str | None:
    """Why a backend that has kernels for a device type runs there only when it is asked for by
    name; None where it runs by default, or never."""
    if (backend, device) not in features.COLUMNS:
        return None
    if backend not in AUTOMATIC.get(device, ()):
        return f"its kernels for {device} run by name alone; backend={backend!r} tries them"
    return trust.why_off(backend, device)


def may_run_kernels(x: Tensor, backend: str | None, compiling: bool) -> bool:
    """Whether a call on the device of x, with this backend asked for, may be other than PyTorch's
    own operators: a quick no for machines and devices where nothing is fused. What is captured may
    run on another machine, which has the compiled library."""
    requested = _forced if backend is None else backend
    if requested is not None and requested != "auto":
        return requested != "fallback"
    # is_cpu takes half the instructions, and Dynamo would record it.
    device = "cpu" if not compiling and x.is_cpu else x.device.type
    for name in AUTOMATIC.get(device, ()):
        # What is known to be missing may be there where a captured call runs.
        if _MODULES[name].__dict__.get("UNAVAILABLE") is not None:
            if (compiling or dispatch_modes() or function_modes()) and is_captured():
                return True
        # A library may have been built without kernels for a GPU, never without the CPU's.
        elif device == "cpu" or _unavailable(name, device) is None:
            return (name, device) not in trust.ASKED or _may_be_proven(name, x, compiling)
    return False


def _may_be_proven(backend: str, x: Tensor, compiling: bool) -> bool:
    """Whether kernels that are to be proven may run for x: in compiled code, if they are."""
    device = x.device.type
    if not trust.is_asked(backend, device):
        return trust.why_off(backend, device) is None
    return not compiling or is_captured() or trust.any_compiled(x.device)


def notes(backend: str, call: Call, x: Tensor, w1: Tensor | None, w2: Tensor) -> tuple[str, ...]:
    """What ``backend`` has to say about how it would run a call of the whole operation."""
    say = getattr(_MODULES.get(backend), "notes", None)
    return () if say is None else tuple(say(x, w1, w2, call.options, call.operands))


def refuse_kernels(what: str, argument: str | None) -> None:
    """Refuse kernels asked for by name where there is no other way than PyTorch's own operators.

    Raises:
        BackendUnavailableError: ``argument``, or what stands in for it, names a kernel backend.
    """
    requested = requested_backend(argument)
    if requested in KERNELS:
        raise BackendUnavailableError(f"backend={requested!r} was asked for and cannot run {what}")


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Run the calls inside on one backend, or raise where it cannot.

    Process-wide, like ``torch.backends`` flags, and so not for several threads at once; ``None``
    and ``"auto"`` restore the automatic choice. Under ``torch.compile`` a change recompiles.

    Raises:
        ValueError: no such backend.
    """
    global _forced
    check_backend_name(backend, "backend")
    outer = _forced
    _forced = backend
    try:
        yield
    finally:
        _forced = outer


class Backends(Mapping[str, bool]):
    """What :func:`backends` returns: a mapping that is readable when printed.

    ``available`` maps each backend's name to True or False, ``reasons`` an unavailable one's name
    to why.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.details: dict[str, str] = {
            "fallback": "PyTorch's own operators in the dtype of x, where no kernel takes a call",
            "reference": "the oracle: PyTorch in float32 or float64, by name alone",
        }
        for name, module in _MODULES.items():
            devices = [device for backend, device in features.COLUMNS if backend == name]
            reason = module.UNAVAILABLE
            if reason is None and not any(map(_is_there, devices)):
                reason = f"no device it has kernels for is here: {', '.join(devices)}"
            if reason is None:
                self.details[name] = module.describe()
            else:
                self.reasons[name] = reason
        self.available: dict[str, bool] = {name: name not in self.reasons for name in NAMES}

    def __getitem__(self, name: str) -> bool:
        return self.available[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.available)

    def __len__(self) -> int:
        return len(self.available)

    def __repr__(self) -> str:
        lines = [
            f"{name}: available: {self.details[name]}"
            if available
            else f"{name}: not available: {self.reasons[name]}"
            for name, available in self.available.items()
        ]
        lines.append(f"chosen by default: {requested_backend(None)}")
        lines.append(f"{trust.ENVIRONMENT_VARIABLE}: {trust.mode()}")
        lines += trust.as_lines()
        return "\n".join([*lines, "", features.format_table()])


def _is_there(device: str) -> bool:
    return device == "cpu" or torch.cuda.is_available()


def backends() -> Backends:
    """The backends of this installation: available or why not, and the feature table.

    Print the result to read it; ``backends().available["native"]`` to ask.
    """
    return Backends()
