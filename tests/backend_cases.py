"""The backends under test: the one place that lists them.

Each column of the feature table is a backend on a device; the reference and the fallback are tested
on the CPU and on every device that has a column. A test asks for the ``backend`` fixture, which
fails or skips where the backend cannot run, and is never given what the table says a backend does
not take.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import cuda_on_cpu
import senet_kernels
from senet_kernels import features
from senet_kernels.backends import native
from senet_kernels.dispatch import KERNELS, NAMES
from senet_kernels.pointwise import ACTIVATIONS, GATES
from senet_kernels.validation import DTYPES


@dataclass(frozen=True)
class BackendCase:
    """A backend, and the device its inputs live on.

    ``simulated``: the CUDA kernels take the place of the CPU's, see :mod:`cuda_on_cpu`.
    """

    name: str
    device: str
    simulated: bool = False

    def __str__(self) -> str:
        if self.simulated:
            return "simulated-cuda"
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"

    def takes(self, *rows: str) -> bool:
        """Whether the feature table has all these rows as fused; plain PyTorch takes any."""
        if self.name in PLAIN:
            return True
        columns = [features.COLUMNS.index((self.name, self.device))]
        if self.simulated and (self.name, "cuda") in features.COLUMNS:
            columns.append(features.COLUMNS.index((self.name, "cuda")))
        cells = [features.FEATURES[row][column] for row in rows for column in columns]
        return all(cell == features.FUSED for cell in cells)

    @contextmanager
    def running(self, seed: int = 0) -> Iterator[None]:
        """Where this backend's kernels run as they should; ``seed`` is for simulated ones."""
        with cuda_on_cpu.plugged_in(seed) if self.simulated else nullcontext():
            yield

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(d for d in DTYPES if self.takes(dtype_row(d)))

    def names(self, argument: str) -> tuple[str, ...]:
        """The functions this backend takes for ``activation``, ``gate``, ``before``, ``after``."""
        legal = GATES if argument == "gate" else ACTIVATIONS
        return tuple(name for name in legal if self.takes(f"{argument} {name}"))


def dtype_row(dtype: torch.dtype) -> str:
    """The feature table's row for a dtype."""
    return f"dtype {str(dtype).removeprefix('torch.')}"


DEVICES = tuple(dict.fromkeys(["cpu", *(device for _, device in features.COLUMNS)]))
#: Backends of PyTorch's own operators.
PLAIN = tuple(name for name in NAMES if name not in KERNELS)
REFERENCES = tuple(BackendCase("reference", device) for device in DEVICES)
FALLBACKS = tuple(BackendCase("fallback", device) for device in DEVICES)
SIMULATED = BackendCase("native", "cpu", simulated=True)
FUSED_BACKENDS = (*(BackendCase(name, device) for name, device in features.COLUMNS), SIMULATED)
#: Those that keep the promises of accuracy and of special values; the fallback's are eager's own.
EXACT_BACKENDS = (*REFERENCES, *FUSED_BACKENDS)
BACKENDS = (*REFERENCES, *FALLBACKS, *FUSED_BACKENDS)


def dtype_cases(
    dtypes: Iterable[torch.dtype] = DTYPES, backends: Iterable[BackendCase] = EXACT_BACKENDS
) -> list[Any]:
    """``(backend, dtype)`` for every dtype each backend takes."""
    wanted = tuple(dtypes)
    return [
        pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
        for backend in backends
        for dtype in wanted
        if dtype in backend.dtypes
    ]


def must_be_available(name: str) -> str | None:
    """Why an unavailable backend is a failure rather than a skip; None when it is a skip."""
    if name == "native":
        if os.environ.get("SENET_KERNELS_REQUIRE_NATIVE") == "1":
            return "SENET_KERNELS_REQUIRE_NATIVE=1"
        if "isas" in native.build_record():
            return "the build record says the library was built"
    return None


def require(backend: BackendCase) -> None:
    """Fail or skip the running test where ``backend`` cannot run."""
    if backend.simulated and (missing := cuda_on_cpu.why_not()):
        pytest.skip(missing)
    if backend.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = senet_kernels.backends().reasons.get(backend.name)
    if reason is None and backend.name == "native" and (
        missing := native.unavailable_on(backend.device)
    ):  # fmt: skip
        pytest.skip(missing)
    if reason is None:
        return
    due = must_be_available(backend.name)
    if due is not None:
        pytest.fail(f"the {backend.name} backend must be available ({due}): {reason}")
    pytest.skip(f"the {backend.name} backend is not available: {reason}")
