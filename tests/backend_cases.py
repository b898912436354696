"""The backends under test: the one place that lists them.

Each column of the feature table is a backend on a device; the reference is tested on the CPU and
on every device that has a column. A test asks for the ``backend`` fixture, which fails or skips
where the backend cannot run, and is never given what the table says a backend does not take.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from senet_kernels import backends, features
from senet_kernels.backends import native
from senet_kernels.pointwise import ACTIVATIONS, GATES
from senet_kernels.validation import DTYPES


@dataclass(frozen=True)
class BackendCase:
    """A backend, and the device its inputs live on."""

    name: str
    device: str

    def __str__(self) -> str:
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"

    def takes(self, *rows: str) -> bool:
        """Whether the feature table has all these rows as fused; the reference takes any."""
        if self.name == "reference":
            return True
        column = features.COLUMNS.index((self.name, self.device))
        return all(features.FEATURES[row][column] == features.FUSED for row in rows)

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
REFERENCES = tuple(BackendCase("reference", device) for device in DEVICES)
FUSED_BACKENDS = tuple(BackendCase(name, device) for name, device in features.COLUMNS)
BACKENDS = (*REFERENCES, *FUSED_BACKENDS)


def dtype_cases(dtypes: Iterable[torch.dtype] = DTYPES) -> list[Any]:
    """``(backend, dtype)`` for every dtype each backend takes."""
    wanted = tuple(dtypes)
    return [
        pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
        for backend in BACKENDS
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
    if backend.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = backends().reasons.get(backend.name)
    if reason is None:
        return
    due = must_be_available(backend.name)
    if due is not None:
        pytest.fail(f"the {backend.name} backend must be available ({due}): {reason}")
    pytest.skip(f"the {backend.name} backend is not available: {reason}")
