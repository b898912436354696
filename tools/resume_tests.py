"""A pytest plugin: tests that passed in an earlier, interrupted run are not run again.

``python -m pytest -p tools.resume_tests`` with ``SENET_KERNELS_PASSED=FILE``. Names of tests that
passed go to the file at once, so that a run that is killed leaves them. Works with pytest-xdist,
whose workers read the file before the controller adds to it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "SENET_KERNELS_PASSED"


def _file() -> Path | None:
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = _file()
    passed = set(path.read_text().splitlines()) if path and path.exists() else set()
    dropped = [item for item in items if item.nodeid in passed]
    # With nothing left pytest would call it a failure that nothing ran.
    if dropped and len(dropped) < len(items):
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item.nodeid not in passed]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = _file()
    if path and report.when == "call" and report.passed and "PYTEST_XDIST_WORKER" not in os.environ:
        with path.open("a") as file:
            file.write(f"{report.nodeid}\n")
