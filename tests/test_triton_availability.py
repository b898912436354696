"""Whether the Triton backend can be used: found under any distribution's name, and with the C
compiler that Triton itself needs at run time."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from senet_kernels import dispatch, features
from senet_kernels.backends import triton as backend
from senet_kernels.pointwise import Options
from tools import gpu_environment

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent


def _other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton and torch as distributions of other names have them: pytorch-triton, triton-rocm."""

    def version(name: str) -> str:
        if name == "pytorch-triton":
            return "3.7.1+git"
        raise importlib.metadata.PackageNotFoundError(name)

    for module in (importlib.metadata, gpu_environment, backend):
        monkeypatch.setattr(module, "version", version, raising=False)
    monkeypatch.setattr(
        gpu_environment, "packages_distributions", lambda: {"triton": ["pytorch-triton"]},
        raising=False,
    )  # fmt: skip


def test_versions_are_found_under_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    _other_names(monkeypatch)
    assert backend.describe().startswith(f"Triton {triton.__version__}, ")
    assert gpu_environment._version("triton") == "3.7.1+git"
    assert gpu_environment._version("numpy") is None


@pytest.mark.skipif(sys.platform != "linux", reason="native kernels are built on Linux only")
@pytest.mark.parametrize("version", ["2.10.1+cpu", "2.13.0a0+git1234", None])
def test_a_build_asks_torch_itself_for_its_version(
    version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("setuptools")
    _other_names(monkeypatch)
    # setup.py as a module: what it defines, and nothing built.
    source = (ROOT / "setup.py").read_text()
    setup = ModuleType("setup_of_the_package")
    setup.__file__ = str(ROOT / "setup.py")
    exec(compile(source[: source.rindex("\nsetup(")], "setup.py", "exec"), setup.__dict__)
    setup.MODE = "auto"
    origin = tmp_path / "torch" / "__init__.py"
    origin.parent.mkdir()
    (origin.parent / "version.py").write_text(f"__version__ = {version!r}\n")
    find = importlib.util.find_spec
    spec = None if version is None else SimpleNamespace(origin=str(origin))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec if name == "torch" else find(name)
    )
    reason = setup.why_no_cpu() or ""
    if version is None:
        assert reason.startswith("the build does not see torch")
    else:
        assert (reason == f"torch {version} is older than 2.11") == version.startswith("2.10")


def _program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a compiler, on which Triton has not run; its PATH is the folder ``bin``."""
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def test_without_a_compiler_the_reason_says_so(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = backend._why_no_compiler()
    assert reason == (
        "Triton needs a C compiler at run time, and CC is not set, and neither gcc nor clang is on "
        "PATH: install gcc, or set CC to a C compiler, before the process starts"
    )
    monkeypatch.setattr(backend, "UNAVAILABLE", reason)
    call = features.Call(
        "cuda", torch.float32, torch.float32, Options("relu", "sigmoid", "identity", "identity"),
        "two layers", False, False, False, False, False, False, None,
    )  # fmt: skip
    assert dispatch.why_not("triton", call) == reason
    assert dispatch.backends().reasons["triton"] == reason


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_compilers_that_triton_looks_for(bare: Path, name: str) -> None:
    _program(bare / "bin" / "cc")  # which it does not look for
    assert backend._why_no_compiler() is not None
    _program(bare / "bin" / name)
    assert backend._why_no_compiler() is None


@pytest.mark.parametrize("named", ["{}", "mycc", "mycc -m64"])
def test_cc_names_a_compiler(bare: Path, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = _program(bare / "bin" / "mycc")
    monkeypatch.setenv("CC", named.format(program))
    assert backend._why_no_compiler() is None


@pytest.mark.parametrize("named", ["", "nothing-of-this-name", "/nowhere/cc"])
def test_cc_names_nothing(bare: Path, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton then takes no other."""
    _program(bare / "bin" / "gcc")
    monkeypatch.setenv("CC", named)
    assert f"CC is {named!r}, which is no program" in (backend._why_no_compiler() or "")


@pytest.mark.parametrize("variable", ["TRITON_HOME", "TRITON_CACHE_DIR"])
@pytest.mark.parametrize("name", ["cuda_utils.so", "hip_utils.cpython-311-x86_64-linux-gnu.so"])
def test_what_lies_compiled_in_the_cache_needs_no_compiler(
    bare: Path, variable: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = bare / ".triton" / "cache"
    if variable == "TRITON_CACHE_DIR":
        cache = bare / "elsewhere"
        monkeypatch.setenv(variable, str(cache))
    assert backend._why_no_compiler() is not None
    _program(cache / "a-hash" / name)
    assert backend._why_no_compiler() is None


def test_neither_the_interpreter_nor_windows_needs_one(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backend._why_no_compiler() is not None
    with monkeypatch.context() as patch:
        patch.setattr(backend, "INTERPRETED", True)
        assert backend._why_no_compiler() is None
    monkeypatch.setattr(sys, "platform", "win32")
    assert backend._why_no_compiler() is None


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is told to look for one on Linux")
@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_a_process_without_a_compiler(tmp_path: Path, interpreted: str) -> None:
    """It imports the package, and Triton not yet."""
    script = """
import sys, torch, senet_kernels
from senet_kernels.backends import triton
assert "triton" not in sys.modules
print(triton.UNAVAILABLE)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "TRITON_CACHE_DIR")}
    environment |= {"PATH": str(tmp_path), "TRITON_HOME": str(tmp_path), "PYTHONPATH": str(ROOT),
                    "TRITON_INTERPRET": interpreted}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    found = "None" if interpreted == "1" else "Triton needs a C compiler at run time"
    assert done.stdout.startswith(found), done.stdout + done.stderr


def test_triton_looks_where_we_say(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against Triton's own search: what it would run, or that it finds none."""
    from triton.runtime import build

    ran: list[list[str]] = []
    monkeypatch.setattr(build.subprocess, "check_call", lambda command, **_: ran.append(command))

    def compiler() -> str | None:
        ran.clear()
        if hasattr(build, "_find_compiler"):
            build._find_compiler.cache_clear()
        try:
            build._build("name", str(bare / "name.c"), str(bare), [], [], [], [])
        except RuntimeError:  # no compiler, it says
            return None
        return ran[0][0]

    assert compiler() is None
    assert backend._why_no_compiler() is not None
    for name in ("clang", "gcc"):  # the latter is preferred
        program = _program(bare / "bin" / name)
        assert compiler() == str(program)
        assert backend._why_no_compiler() is None
    monkeypatch.setenv("CC", "another")
    assert compiler() == "another"
    assert backend._why_no_compiler() is not None
