"""The worked example of CONTRIBUTING.md: a new activation in every backend, no test edited."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("markdown_it")

import markdown_blocks
from checkout import ROOT, git, needs_git, tracked
from cuda_on_cpu import build

FUNCTION = "softsign"
TWINS = {
    "senet_kernels/pointwise.py",
    "senet_kernels/backends/triton/pointwise.py",
    "csrc/cpu/pointwise.h",
    "csrc/cuda/pointwise.cuh",
}


def the_diff() -> str:
    """What CONTRIBUTING.md shows."""
    found = [b.text for b in markdown_blocks.blocks(ROOT / "CONTRIBUTING.md")
             if b.language == "diff"]  # fmt: skip
    assert len(found) == 1
    return found[0]


@needs_git
def test_it_applies_and_touches_the_table_and_the_twins_alone() -> None:
    diff = the_diff()
    assert set(re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)) == TWINS
    git("apply", "--check", "-", folder=ROOT, text=diff)


def _run(folder: Path, *command: str, **variables: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder), **variables}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@needs_git
@pytest.mark.slow
@pytest.mark.skipif(not build.compiler(), reason="no C++ compiler")
def test_every_backend_has_it(tmp_path: Path) -> None:
    """Applied to a copy, which is built without optimisation, and tested."""
    for name in tracked():
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    git("apply", "-", folder=tmp_path, text=the_diff())
    _run(
        tmp_path, "setup.py", "build_ext", "--inplace",
        SENET_KERNELS_BUILD="cpu", SENET_KERNELS_CXXFLAGS="-O0",
    )  # fmt: skip
    codes = (tmp_path / "csrc" / "pointwise_codes.h").read_text(encoding="utf-8")
    assert f"  {FUNCTION} = 13," in codes
    pytest_run = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    tests = ("tests/test_pointwise.py", "tests/test_features.py")
    out = _run(tmp_path, *pytest_run, "-vv", *tests, "-m", "not gpu", "-k", f"{FUNCTION} or codes")
    passed = set(re.findall(r"\[([\w-]+)\] PASSED", out))
    for backend in ("native", "simulated-cuda", "reference"):
        for place in ("activation", "before", "after"):
            assert f"{backend}-float32-{place}-{FUNCTION}" in passed
    assert FUNCTION in passed  # its definition
    wanted = f"{FUNCTION} and triton and float32"
    out = _run(tmp_path, *pytest_run, tests[0], "-k", wanted, "-m", "not gpu", TRITON_INTERPRET="1")
    assert "3 passed" in out
