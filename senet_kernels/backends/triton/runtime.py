"""What depends on a device's vendor: guards, stream capture, properties, compiler options."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .plan import Device

_NO_GUARD = nullcontext()


class Runtime:
    """The CPU, on which Triton's interpreter runs kernels; base of those of GPUs."""

    #: Registers of a multiprocessor, where the assembler takes a bound for those of a thread.
    registers: int | None = None

    def guard(self, x: Any) -> AbstractContextManager[Any]:
        """Launches inside go to the current stream of the device of x."""
        return _NO_GUARD

    def is_capturing(self, x: Any) -> bool:
        """Whether the stream that launches for x go to is being captured."""
        return False

    def device(self, device: torch.device) -> Device:
        """What plans depend on. A small device makes plans with few programs."""
        return INTERPRETER


class Cuda(Runtime):
    """NVIDIA's GPUs."""

    registers: int | None = 1 << 16

    def guard(self, x: Any) -> AbstractContextManager[Any]:
        if x.get_device() == torch.cuda.current_device():
            return _NO_GUARD
        return torch.cuda.device(x.device)

    def is_capturing(self, x: Any) -> bool:
        with self.guard(x):
            return torch.cuda.is_current_stream_capturing()

    def device(self, device: torch.device) -> Device:
        properties = torch.cuda.get_device_properties(device)
        return Device(self.architecture(properties), properties.multi_processor_count)

    @staticmethod
    def architecture(properties: Any) -> str:
        """As compilers name it: sm_90."""
        return f"sm_{properties.major}{properties.minor}"


class Hip(Cuda):
    """AMD's GPUs, whose device type is "cuda" too. The capability does not tell them apart: gfx942
    reports (9, 4), which reads like a Hopper GPU's."""

    registers = None

    @staticmethod
    def architecture(properties: Any) -> str:
        """gfx942, of gfx942:sramecc+:xnack-: without the features that are switched on or off."""
        return str(properties.gcnArchName).split(":")[0]


# The interpreter has no device; a small one makes plans with large tiles and few programs.
INTERPRETER = Device("", 1)

_CPU, _CUDA, _HIP = Runtime(), Cuda(), Hip()


def of_gpus() -> Cuda:
    """The runtime of this torch's GPUs."""
    return _CUDA if torch.version.hip is None else _HIP


def runtime_of(device: torch.device) -> Runtime:
    return of_gpus() if device.type == "cuda" else _CPU


def architecture(device: torch.device) -> str:
    """A GPU's, as compilers name it."""
    return of_gpus().architecture(torch.cuda.get_device_properties(device))
