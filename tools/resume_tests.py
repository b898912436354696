"""A pytest plugin: tests that passed in an earlier, interrupted run are not run again.

``python -m pytest -p tools.resume_tests`` with ``SENET_KERNELS_PASSED=FILE``. Names of tests that
passed go to the file at once, so that a run that is killed leaves them. Works with pytest-xdist,
whose workers read the file before the controller adds to it. Tests with one of the parameters in
``SENET_KERNELS_LEFT_OUT``, between semicolons, are not run either.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tools.stage_runner import LEFT_OUT_TESTS, PASSED


def _file() -> Path | None:
    name = os.environ.get(PASSED)
    return Path(name) if name else None


def _is_left_out(nodeid: str) -> bool:
    words = filter(None, os.environ.get(LEFT_OUT_TESTS, "").split(";"))
    return any(re.search(rf"[\[-]{re.escape(word)}[\]-]", nodeid) for word in words)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = _file()
    passed = set(path.read_text().splitlines()) if path and path.exists() else set()
    dropped = [item for item in items if item.nodeid in passed or _is_left_out(item.nodeid)]
    # With nothing left pytest would call it a failure that nothing ran.
    if dropped and len(dropped) < len(items):
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = _file()
    if path and report.when == "call" and report.passed and "PYTEST_XDIST_WORKER" not in os.environ:
        with path.open("a") as file:
            file.write(f"{report.nodeid}\n")
