"""Nothing is fetched, nothing runs that is data, and CI's tools do not change by themselves."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from checkout import needs_git, tracked
from senet_kernels.train import network
from senet_kernels.train.errors import TrainError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "setup.py", *sorted((ROOT / "senet_kernels").rglob("*.py"))]
TOOLS = [path for part in ("benchmarks", "tools", "docs") for path in (ROOT / part).rglob("*.py")]

# Loaded by every Python below this one, compilers' wrappers and build steps included.
_NO_NETWORK = """
import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind"):
        address = args[1] if event == "socket.connect" else args[0]
        if not isinstance(address, (str, bytes)) or event != "socket.connect":  # no Unix socket
            sys.stderr.write(f"NETWORK {event} {address}\\n")
            sys.stderr.flush()
            raise OSError("the network is blocked")
sys.addaudithook(hook)
"""


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """The environment of processes that cannot open a connection."""
    folder = tmp_path / "no_network"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_NO_NETWORK)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def _run(command: list[str], env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, timeout=900, check=False
    )


def test_the_network_is_really_blocked(offline: dict[str, str]) -> None:
    code = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/')"
    done = _run([sys.executable, "-c", code], offline, ROOT)
    assert done.returncode != 0
    assert "NETWORK socket." in done.stderr


def test_importing_and_calling_need_no_network(offline: dict[str, str]) -> None:
    code = (
        "import torch, senet_kernels as sk\n"
        "import senet_kernels.train, senet_kernels.models\n"
        "x, w = torch.randn(2, 8, 3, 5, requires_grad=True), torch.randn(4, 8)\n"
        "sk.squeeze_excite(x, w, None, w.T, None).sum().backward()\n"
        "print(sk.backends()); sk.fuse_se_blocks(torch.nn.Sequential(sk.FusedSEBlock(8)))\n"
    )
    done = _run([sys.executable, "-c", code], offline, ROOT)
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stderr


def _sources(folder: Path) -> Path:
    """A copy of what the build reads."""
    for name in ("csrc", "senet_kernels"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("mode", ["python", pytest.param("cpu", marks=pytest.mark.slow)])
def test_building_needs_no_network(offline: dict[str, str], tmp_path: Path, mode: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    environment = {**offline, "SENET_KERNELS_BUILD": mode, "SENET_KERNELS_CXXFLAGS": "-O0"}
    environment["PYTHONPATH"] = offline["PYTHONPATH"].split(os.pathsep)[0]
    done = _run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], environment, _sources(source)
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "NETWORK" not in done.stderr
    built = list((source / "senet_kernels").glob("_native*.so"))
    assert bool(built) == (mode != "python")


#: What setuptools writes into a source distribution itself.
_WRITTEN = re.compile(r"PKG-INFO|setup\.cfg|senet_kernels\.egg-info/.*")


@needs_git
def test_a_source_distribution_has_all_tracked_files_and_no_others(
    offline: dict[str, str], tmp_path: Path
) -> None:
    files = {*tracked()}
    products = {"benchmarks/results/local/x.json", "tests/__pycache__/x.pyc", "build/docs/x.html",
                "senet_kernels/_native.abi3.so", "senet_kernels/_build.json"}  # fmt: skip
    for name in files | products:
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((ROOT / name).read_bytes() if name in files else b"")
    environment = {**offline, "PYTHONPATH": offline["PYTHONPATH"].split(os.pathsep)[0]}
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    done = _run(command, environment, tmp_path / "source")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {m.name.partition("/")[2] for m in tar.getmembers() if m.isfile()}
    assert {name for name in names if not _WRITTEN.fullmatch(name)} == files


# -- files -----------------------------------------------------------------------------------------


class _RunsACommand:
    """What a malicious checkpoint has in it."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_checkpoint_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    marker, path = tmp_path / "it_ran", tmp_path / "weights.pt"
    content = {"conv1.weight": torch.zeros(1), "more": _RunsACommand(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(TrainError, match="not tensors and plain values alone"):
        network.read(str(path))
    assert not marker.exists()
    torch.load(path, weights_only=False)  # it would have worked
    assert marker.exists()


def test_safetensors_are_read(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    weights = {"fc.weight": torch.randn(3, 2), "fc.bias": torch.randn(3)}
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(weights, path)
    read = network.read(str(path))
    assert read.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(read[name], value)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(TrainError, match="not a readable checkpoint"):
        network.read(str(path))


def test_safetensors_that_are_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(TrainError, match="safetensors"):
        network.read(str(tmp_path / "weights.safetensors"))


_RUN_CODE = {"eval", "exec", "compile", "__import__"}
_UNPICKLE = {"pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}


def _dangers(path: Path) -> list[str]:
    """Calls that run what they are given, and readers of files that can."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            found += [f"{where}: {a.name}" for a in node.names if a.name.split(".")[0] in _UNPICKLE]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _UNPICKLE:
            found.append(f"{where}: {node.module}")
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in _RUN_CODE:
            found.append(f"{where}: {node.func.id}()")
        if ast.unparse(node.func) in ("torch.load", "torch.jit.load", "numpy.load", "np.load"):
            safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if safe.get("weights_only") != "True" and safe.get("allow_pickle") != "False":
                found.append(f"{where}: {ast.unparse(node)}")
        if any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords):
            found.append(f"{where}: a shell")
    return found


def test_no_code_from_data() -> None:
    assert [danger for path in [*SOURCES, *TOOLS] for danger in _dangers(path)] == []


def test_dangers_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    bad = ["eval(x)", "import pickle", "from dill import loads", "torch.load(f)",
           "torch.load(f, weights_only=False)", "subprocess.run(x, shell=True)"]  # fmt: skip
    for number, line in enumerate(bad):
        (tmp_path / f"{number}.py").write_text(line)
        assert len(_dangers(tmp_path / f"{number}.py")) == 1, line
    (tmp_path / "good.py").write_text("model.eval(); torch.load(f, weights_only=True)")
    assert _dangers(tmp_path / "good.py") == []


# -- tools -----------------------------------------------------------------------------------------


def _pins() -> dict[str, str]:
    pins: dict[str, str] = {}
    markers: dict[str, set[str]] = {}
    for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([\w.-]+)==([\w.]+)( ; python_version (>=|<) \"3\.11\")?", line)
            assert match, line
            pins.setdefault(match[1], match[2])
            markers.setdefault(match[1], set()).add(match[4] or "")
    # Every Python has a version of each: one for all, or one below 3.11 and one from there on.
    assert all(found in ({""}, {"<", ">="}) for found in markers.values()), markers
    return pins


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found, requirement
    return found[0]


def _unpinned(command: str, pins: dict[str, str]) -> list[str]:
    """What a line of a workflow lets pip choose the version of."""
    _, installs, rest = re.sub(r"\$\{\{.*?\}\}", "0", command).partition("pip install")
    words = shlex.split(rest)
    constrained = False
    found = []
    while installs and words:
        word = words.pop(0)
        if word in ("-c", "--constraint"):
            constrained = words.pop(0) == ".ci/constraints.txt"
        elif word in ("--index-url", "--extra-index-url"):
            words.pop(0)
        elif not word.startswith(("-", ".", "dist/")):
            found.append(word)
    return [w for w in found if not (re.search(r"==\d", w) or (constrained and _name(w) in pins))]


def _workflow_lines() -> list[str]:
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    return [line for path in files for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("command", "unpinned"),
    [("pip install build==1.6.1 twine", ["twine"]),
     ("python -m pip install 'setuptools>=77' ninja", ["setuptools>=77", "ninja"]),
     ("pip install -c .ci/constraints.txt build nothing-known", ["nothing-known"]),
     ("pip install torch==${{ matrix.torch }} --index-url https://an.index/", []),
     ("pip install -c .ci/constraints.txt build twine", []),
     ("pip install --no-deps dist/*.whl", []), ("make test", [])],
)  # fmt: skip
def test_unpinned_tools_are_seen(command: str, unpinned: list[str]) -> None:
    assert _unpinned(f"      - run: {command}", _pins()) == unpinned


def test_what_workflows_install_is_pinned() -> None:
    pins = _pins()
    lines = _workflow_lines()
    assert sum("pip install" in line for line in lines) >= 4
    assert [word for line in lines for word in _unpinned(line, pins)] == []
    # What `python -m build` installs for itself is read from here.
    isolated = [x for x in lines if "-m build" in x and "--no-isolation" not in x]
    assert all("PIP_CONSTRAINT=" in line for line in isolated)


def test_what_ci_installs_is_pinned() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    assert all(re.search(r"==\d", requirement) for requirement in extras["lint"])
    pins = _pins()
    wanted = [*project["build-system"]["requires"]]
    wanted += [r for extra in ("bench", "onnx", "train", "test") for r in extras[extra]]
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    assert [r for r in wanted if _name(r) not in pins] == []
    for variable in ("TORCH", "TRITON", "MODELS", "MODELS_ALONE", "NVCC"):
        (value,) = re.findall(rf"^{variable} \?= (.*)$", makefile, re.MULTILINE)
        assert all(re.fullmatch(r"[\w-]+==[\d.]+", part) for part in value.split()), variable
    assert "-c .ci/constraints.txt" in re.findall(r"^PIP := .*$", makefile, re.MULTILINE)[0]


def _brings(names: set[str]) -> set[str]:
    """These distributions and all that they depend on, as far as they are installed."""
    found: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        if name in found:
            continue
        with contextlib.suppress(metadata.PackageNotFoundError):
            wanted = [Requirement(text) for text in metadata.requires(name) or ()]
            here = [r for r in wanted if not r.marker or r.marker.evaluate({"extra": ""})]
            names |= {r.name for r in here}
            found.add(name)
    return found


def test_what_packages_bring_with_them_is_pinned() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        r for extra in ("bench", "docs", "lint", "onnx", "test", "train") for r in extras[extra]
    ]
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    exact = {_name(r) for r in wanted if re.search(r"==\d", r)}
    exact |= set(re.findall(r"([\w-]+)==\d", makefile))
    brought = _brings({_name(r) for r in wanted} | exact) - _brings({"torch"})
    assert "pluggy" in brought
    assert brought - {canonicalize_name(name) for name in {*exact, *_pins()}} == set()


def test_workflows_take_actions_of_github_alone_and_can_only_read() -> None:
    lines = _workflow_lines()
    used = [line.split("uses: ")[1].strip() for line in lines if "uses: " in line]
    assert used
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in used)
    files = [path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    assert all("\npermissions:\n  contents: read\n" in text for text in files)
    assert not any("secrets." in text or ": write" in text for text in files)


def test_the_core_depends_on_torch_alone() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [_name(r) for r in project["dependencies"]] == ["torch"]
