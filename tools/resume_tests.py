"""A pytest plugin: tests that passed in an earlier, interrupted run are not run again.

``python -m pytest -p tools.resume_tests`` with ``SENET_KERNELS_PASSED=FILE``. Names of tests go to
the file at once, as they begin and as they pass, so that a run that is killed leaves them; what was
running then comes last, since the end may have been its doing. Works with pytest-xdist, whose
workers read the file before the controller adds to it. Tests with one of the parameters in
``SENET_KERNELS_LEFT_OUT``, between semicolons, are not run either.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest

from tools.stage_runner import LEFT_OUT_TESTS, PASSED


def _file() -> Path | None:
    name = os.environ.get(PASSED)
    return Path(name) if name else None


def _is_left_out(nodeid: str) -> bool:
    words = filter(None, os.environ.get(LEFT_OUT_TESTS, "").split(";"))
    return any(re.search(rf"[\[-]{re.escape(word)}[\]-]", nodeid) for word in words)


_BEGUN, _ENDED = "begun: ", "ended: "


def _named(lines: list[str], word: str) -> list[str]:
    return [line.removeprefix(word) for line in lines if line.startswith(word)]


def _write(line: str) -> None:
    path = _file()
    if path and "PYTEST_XDIST_WORKER" not in os.environ:
        with path.open("a") as file:
            file.write(f"{line}\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = _file()
    known = path.read_text().splitlines() if path and path.exists() else []
    passed = set(known)
    dropped = [item for item in items if item.nodeid in passed or _is_left_out(item.nodeid)]
    # With nothing left pytest would call it a failure that nothing ran.
    if dropped and len(dropped) < len(items):
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
    begun, ended = (Counter(_named(known, word)) for word in (_BEGUN, _ENDED))
    items.sort(key=lambda item: begun[item.nodeid] > ended[item.nodeid])


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(_BEGUN + nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    _write(_ENDED + nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _write(report.nodeid)
