"""No kernel reads or writes outside its tensors, see :mod:`guard_pages`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import guard_pages
from backend_cases import FUSED_BACKENDS, BackendCase

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")
_TESTS = Path(guard_pages.__file__).parent


def _run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(_TESTS.parent), str(_TESTS)])
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False,
        cwd=_TESTS.parent, env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


# Triton's kernels on the CPU are no column of the feature table.
_ON_CPU = [b for b in FUSED_BACKENDS if b.device == "cpu"]


@pytest.mark.parametrize("backend", _ON_CPU, indirect=True, ids=str)
def test_nothing_outside_is_touched(backend: BackendCase) -> None:
    simulated = ["simulated"] if backend.simulated else []
    done = _run([str(_TESTS / "guard_pages.py"), backend.name, *simulated])
    assert done.stdout.endswith("done\n"), done.stdout[-300:] + done.stderr[-3000:]


def test_a_touch_is_fatal() -> None:
    """The pages are where they should be: one element further, and the process dies."""
    code = (
        "import ctypes, os, torch, guard_pages\n"
        "for side, at in ('begin', -4), ('end', 24):\n"
        "    t = guard_pages.guarded(torch.arange(6.0).view(2, 3), side)\n"
        "    assert t.tolist() == [[0, 1, 2], [3, 4, 5]]\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        ctypes.c_float.from_address(t.data_ptr() + at).value\n"
        "        os._exit(0)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = _run(["-c", code])
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == [-signal.SIGSEGV] * 2
