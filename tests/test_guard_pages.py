"""No kernel reads or writes outside its tensors, see :mod:`guard_pages`."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize("side", ["begin", "end"])
def test_a_touch_is_fatal(side: str) -> None:
    """The pages are where they should be: one element further, and the process dies."""
    code = (
        "import ctypes, torch, guard_pages\n"
        f"t = guard_pages.guarded(torch.arange(6.0).view(2, 3), {side!r})\n"
        "assert t.tolist() == [[0, 1, 2], [3, 4, 5]]\n"
        f"at = t.data_ptr() + ({side!r} == 'end') * 24 - ({side!r} == 'begin') * 4\n"
        "print('inside', flush=True)\n"
        "print(ctypes.c_float.from_address(at).value)\n"
    )
    done = _run(["-c", code], PYTHONFAULTHANDLER="")
    assert done.stdout == "inside\n"
    assert done.returncode < 0
