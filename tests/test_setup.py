"""setup.py asks for no more than the command at hand needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent

# The setuptools that is here, as if it were 76: its version, and that it takes pyproject.toml for
# invalid.
_AS_OLD = """
import runpy, sys
import setuptools
from setuptools.config import pyprojecttoml
def refuse(*args, **kwargs):
    raise ValueError("invalid pyproject.toml config: `project.license`")
setuptools.__version__ = "76.1.0"
pyprojecttoml.apply_configuration = refuse
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the build reads, without products."""
    for name in ("csrc", "senet_kernels"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
        shutil.copytree(_ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(_ROOT / name, tmp_path / name)
    return tmp_path


def _run(
    source: Path, *arguments: str, mode: str = "python", old: bool = False
) -> subprocess.CompletedProcess[str]:
    start = ["-c", _AS_OLD] if old else ["setup.py"]
    return subprocess.run(
        [sys.executable, *start, *arguments], cwd=source, capture_output=True, text=True,
        env={**os.environ, "SENET_KERNELS_BUILD": mode, "PYTHONPATH": ""}, check=False,
    )  # fmt: skip


def _mode_of_build(source: Path) -> str:
    record = json.loads((source / "senet_kernels" / "_build.json").read_text())
    return str(record["requested"])


@pytest.mark.parametrize(
    "command", ["build_ext --inplace", "-q build_ext -i", "build_ext --force --inplace", "clean"]
)
def test_an_old_setuptools_builds_in_place(source: Path, command: str) -> None:
    done = _run(source, *command.split(), old=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    if "build_ext" in command:
        assert _mode_of_build(source) == "python"


def test_an_old_setuptools_builds_the_library_or_says_why_not(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be built is the build's matter, not that of setuptools."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = _run(source, "build_ext", "--inplace", mode="cpu", old=True)
    assert done.returncode != 0
    assert "setuptools" not in done.stderr
    assert "the cpu kernels cannot be built: no C++ compiler found" in done.stderr


@pytest.mark.parametrize(
    "command",
    ["egg_info", "sdist", "bdist_wheel", "install", "develop", "editable_wheel", "build",
     "build_ext --inplace sdist", "--version", "--name"],
)  # fmt: skip
def test_an_old_setuptools_makes_no_package(source: Path, command: str) -> None:
    """Nor metadata: they would be those of no project."""
    done = _run(source, *command.split(), old=True)
    assert done.returncode != 0, done.stdout
    assert "setuptools 76.1.0 is older than 77" in done.stderr
    assert f"which {command.replace(' --inplace', '')} needs" in done.stderr
    assert "python setup.py build_ext --inplace" in done.stderr
    made = [p.name for p in source.iterdir() if p.name in ("dist", "build")]
    assert not made
    assert not list(source.glob("**/*.egg-info"))


@pytest.mark.parametrize("command", ["--help-commands", "--help", "build_ext --help"])
def test_help_needs_no_new_setuptools(source: Path, command: str) -> None:
    done = _run(source, *command.split(), old=True)
    assert done.returncode == 0, done.stderr
    assert "build_ext" in done.stdout or "usage" in done.stdout


def test_what_builds_nothing_needs_no_mode(source: Path) -> None:
    """A wrong mode is an error of the build alone."""
    for command in (["-q", "sdist"], ["--version"], ["-q", "clean"]):
        done = _run(source, *command, mode="gpu")
        assert done.returncode == 0, done.stderr
    for command in (["build_ext", "--inplace"], ["-q", "bdist_wheel"]):
        done = _run(source, *command, mode="gpu")
        assert done.returncode != 0
        assert "SENET_KERNELS_BUILD must be one of auto, python, cpu, cuda, not 'gpu'" in (
            done.stderr
        )
