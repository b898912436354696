"""Fixtures shared by the suite."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Read when torch loads OpenMP. Spinning at barriers makes the suite many times slower wherever
# something else uses the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read by the compiled library at first use: every output and scratch buffer starts as NaN, so that
# an element nobody wrote cannot pass for a right one.
os.environ.setdefault("SENET_KERNELS_POISON", "1")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import senet_kernels
from backend_cases import BackendCase, require

THREADS = 2


def pytest_report_header() -> list[str]:
    shown = str(senet_kernels.backends()).splitlines()
    return [f"senet_kernels {senet_kernels.__version__}, torch {torch.__version__}", *shown[:3]]


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> BackendCase:
    """The backend a test is parametrised with, known to run here."""
    case: BackendCase = request.param
    require(case)
    return case


@pytest.fixture(autouse=True)
def _clean_slate() -> Iterator[None]:
    """Same random numbers for every test; process-wide settings as they were afterwards."""
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled()
    torch.set_num_threads(THREADS)


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Every ``torch.empty`` comes filled with NaN (integers: their maximum). The compiled library
    has allocations of its own: SENET_KERNELS_POISON, above."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def set_threads() -> Callable[[int], None]:
    """``torch.set_num_threads`` for one test; put back by ``_clean_slate``."""
    return torch.set_num_threads


class _RecordOps(TorchDispatchMode):
    """Collects the names of the raw ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "senet_kernels":
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def record_ops() -> Iterator[Callable[[], set[str]]]:
    """Calling it gives the names of the raw ops that ran since the last call."""
    mode = _RecordOps()

    def take() -> set[str]:
        names, mode.names = mode.names, set()
        return names

    with mode:
        yield take
