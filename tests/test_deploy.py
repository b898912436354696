"""What leaves the process that captured it: programs between machines with and without the compiled
library, and the C++ program of examples/deploy, which has no Python in it."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from backend_cases import must_be_available
from captures import CASES, assert_same, gradients, own
from operations import CountOperations
from senet_kernels import FusedSEBlock, fuse_se_blocks
from senet_kernels.backends import native

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "examples" / "deploy"


@pytest.fixture(autouse=True)
def _library() -> None:
    if native.UNAVAILABLE is not None:
        due = must_be_available("native")
        (pytest.fail if due else pytest.skip)(native.UNAVAILABLE)


# ---- between machines ----

#: Run where there is no library: ``here`` was exported beside one, ``there`` is exported by it.
_PURE = """
import sys, torch, senet_kernels
sys.path.insert(0, sys.argv[1])
from captures import CASES, export, gradients, own
assert not senet_kernels.backends()["native"], "the library is there"
for case in CASES:
    if case.name in sys.argv[2:]:
        here = torch.export.load(f"{case.name}-here.pt2")
        torch.save(gradients(own(here.module()), case.inputs(4)), f"{case.name}.pt")
        torch.export.save(export(case, dynamic=True), f"{case.name}-there.pt2")
"""
_NAMES = ("FusedSEBlock-shift", "halves-lengths", "converted-hand-written")


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of programs exported here, with the library, and by a process without it."""
    from captures import export

    folder = tmp_path_factory.mktemp("exchanged")
    without = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "senet_kernels", folder / "senet_kernels", ignore=without)
    for case in CASES:
        if case.name in _NAMES:
            torch.export.save(export(case, dynamic=True), folder / f"{case.name}-here.pt2")
    paths = os.pathsep.join([str(folder), *filter(None, sys.path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", _PURE, str(ROOT / "tests"), *_NAMES], cwd=folder, timeout=300,
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", _NAMES)
def test_a_program_runs_without_the_library(exchanged: Path, name: str) -> None:
    """Decomposed, with every gradient."""
    case = next(case for case in CASES if case.name == name)
    right = gradients(own(case.net(plain=True)), case.inputs(4))
    assert_same(torch.load(exchanged / f"{name}.pt"), right)


@pytest.mark.parametrize("name", _NAMES)
def test_a_program_of_a_machine_without_the_library(exchanged: Path, name: str) -> None:
    """It has the same operators, which run on the kernels here."""
    case = next(case for case in CASES if case.name == name)
    module = torch.export.load(exchanged / f"{name}-there.pt2").module()
    right = gradients(own(case.net(plain=True)), case.inputs(4))
    with CountOperations() as counted:
        assert_same(gradients(own(module), case.inputs(4)), right)
    assert [n for n in counted.calls if n.startswith("senet_kernels::native_")]


# ---- the C++ program ----


def _command(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=900, check=False
    )


@pytest.fixture(scope="module")
def run_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built by CMake as docs/deploy.md says."""
    for tool in ("cmake", "make", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    build = tmp_path_factory.mktemp("build")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["-S", DEPLOY, "-B", build, prefix], ["--build", build]):
        done = _command("cmake", *command)
        if "cannot find the CUDA" in done.stderr:
            pytest.skip("this torch has CUDA, and CMake finds no CUDA toolkit for it")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return build / "run_package"


class _Net(nn.Module):
    """A fused block of each kind: built, converted, and with its halves apart."""

    def __init__(self) -> None:
        super().__init__()
        from captures import Halves, HandWritten

        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.block = FusedSEBlock(8, hidden=4, before="silu", after="relu", gate="hardsigmoid")
        self.converted, self.halves = HandWritten(8, 4), Halves(8, plain=False)
        fuse_se_blocks(self.converted, strict=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.converted(self.block(x, residual=x))
        return self.halves(x)


def _net() -> _Net:
    torch.manual_seed(0)
    return _Net().eval()


@pytest.fixture(scope="module", params=[False, True], ids=["", "c_shims"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that make_package.py writes, for a small network."""
    folder = tmp_path_factory.mktemp("package")
    write = runpy.run_path(str(DEPLOY / "make_package.py"))["write"]
    write(_net(), folder, c_shims=request.param, cases=20)
    with zipfile.ZipFile(folder / "model.pt2") as files:
        contents = b"".join(files.read(name) for name in files.namelist())
    prefix = "aoti_torch_cpu_" if request.param else "senet_kernels::"
    for name in ("squeeze_excite", "squeeze", "channel_scale"):
        assert f"{prefix}{name}".encode() in contents
    return folder


def _differences(*command: str | Path) -> dict[str, tuple[float, float]]:
    """What the program prints by the shape of an input: the difference, and the largest output."""
    done = _command(*command)
    assert done.returncode == 0, done.stderr
    line = r"^\[([\d, ]+)\] difference (\S+) of (\S+)$"
    found = re.findall(line, done.stdout, re.MULTILINE)
    return {shape: (float(off), float(largest)) for shape, off, largest in found}


@pytest.mark.slow
def test_a_process_without_python(run_package: Path, package: Path, tmp_path: Path) -> None:
    """Twenty batches and sizes: near to eager PyTorch, and to float64 as near as that is. (What
    differs is rounding of the operators around ours: it is relative to the outputs.)"""
    example = runpy.run_path(str(DEPLOY / "make_package.py"))
    library = example["library"]()
    found = _differences(run_package, package / "model.pt2", package / "cases.pt", library)
    assert len(found) == 20
    assert len({shape.split(",")[0] for shape in found}) > 10  # batches
    assert len({shape.split(",", 2)[2] for shape in found}) > 10  # sizes
    assert all(off < 1e-6 * max(1.0, largest) for off, largest in found.values()), found
    cases, exact = torch.load(package / "cases.pt"), tmp_path / "exact.pt"
    example["save_cases"](_net().double(), cases[::2], exact)
    eager = [
        (ours - right).abs().max().item()
        for ours, right in zip(cases[1::2], torch.load(exact)[1::2], strict=True)
    ]
    found = _differences(run_package, package / "model.pt2", exact, library)
    assert max(found.values())[0] < 2 * max(eager)
    for file in (run_package, library):
        linked = _command("ldd", file).stdout
        assert "libtorch_cpu" in linked
        assert "python" not in re.sub(r"=> .*", "", linked)


@pytest.mark.slow
def test_the_network_of_the_example(run_package: Path, tmp_path: Path) -> None:
    """Twenty batches and sizes, each output within 1e-6 of eager PyTorch's."""
    script = [sys.executable, DEPLOY / "make_package.py", tmp_path, "--cases", "20"]
    made = _command(*script)
    assert made.returncode == 0, made.stderr
    found = _differences(run_package, *made.stdout.split()[1:])
    assert len(found) == 20
    assert all(off < 1e-6 for off, _ in found.values()), found


@pytest.mark.slow
def test_without_the_library_the_program_says_so(run_package: Path, package: Path) -> None:
    files = (package / "model.pt2", package / "cases.pt")
    for arguments, message in (
        ((), "senet_kernels::squeeze_excite is missing: LIBRARY is expected to be the file"),
        (("libm.so.6",), "senet_kernels/_native.abi3.so, got libm.so.6"),
        (("/nowhere/_native.abi3.so",), "the library does not load: /nowhere/_native.abi3.so"),
    ):
        done = _command(run_package, *files, *arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stdout == ""
    assert _command(run_package).returncode == 2


def test_the_program_is_short() -> None:
    assert len((DEPLOY / "run_package.cpp").read_text().splitlines()) < 60
