"""Fixtures shared by the suite."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

# Read when torch loads OpenMP. Spinning at barriers makes the suite many times slower wherever
# something else uses the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

import senet_kernels  # noqa: E402
from backend_cases import BackendCase, require  # noqa: E402

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
    """Every ``torch.empty``, those made in C++ too, comes filled with NaN (integers: their
    maximum), so that an element nobody wrote cannot pass for a right one."""
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
