"""``make gpu`` on pretended devices: killed at any second, with planted faults, from its bundle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

import brought_home
import pretended
from benchmarks import records
from tools import gpu, stage_runner

PYTHON = sys.executable


# -- the dry run -----------------------------------------------------------------------------------


def _dry(out: Path, budget: float, *words: str) -> list[str]:
    return [PYTHON, "-m", "tools.gpu", "--out", str(out), "--budget", str(budget), "--device",
            "cpu", *words]  # fmt: skip


def _killed_after(seconds: float, out: Path) -> dict[str, str]:
    """What is at home after the runner and all that it started were killed."""
    process = subprocess.Popen(
        _dry(out, 20), cwd=gpu.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert sorted(path.name for path in out.glob("*.tgz")) == ["gpu.tgz"]
    return brought_home.home(out / "gpu.tgz")


def _says_what_it_has(home: dict[str, str]) -> None:
    text, summary = home["summary.txt"], json.loads(home["summary.json"])
    assert "dry run" in text
    assert "of 20 s" in text
    for line in summary["stages"]:
        assert f"{line['stage']} " in text
        assert line["status"] in text
    for line in summary["stages"]:
        if line["status"] == "ok":
            assert f"{line['stage']}.log" in home


@pytest.mark.parametrize("seconds", [1, 4])
def test_killed_it_has_left_what_it_had(tmp_path: Path, seconds: int) -> None:
    home = _killed_after(seconds, tmp_path)
    _says_what_it_has(home)
    assert "environment" in home["summary.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", range(1, 21))
def test_killed_at_each_second_it_has_left_what_it_had(tmp_path: Path, seconds: int) -> None:
    _says_what_it_has(_killed_after(seconds, tmp_path))


_ABSENT = r"""
import sys
def absent(finder):
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            found = name.partition(".")[0] not in blocked
            return finder.find_spec(name, path, target) if found else None
    return Finder
sys.meta_path[:] = map(absent, sys.meta_path)
"""
_FAKE_SANITIZER = """#!/bin/sh
while [ "$1" != "application-only" ]; do shift; done
shift
"$@" && echo "========= ERROR SUMMARY: 0 errors"
"""
_FAKE_NCU = r"""#!/bin/sh
while [ "$1" != "--metrics" ]; do shift; done
shift 2
"$@" || exit
echo '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
i=0
for call in $(echo "$*" | grep -o '"mode"'); do
  echo "\"${i}0\",\"spin_kernel\",\"dram__bytes_read.sum\",\"byte\",\"64\""
  echo "\"${i}1\",\"k\",\"dram__bytes_read.sum\",\"byte\",\"1,024\""
  echo "\"${i}1\",\"k\",\"dram__bytes_write.sum\",\"byte\",\"512\""
  echo "\"${i}1\",\"k\",\"smsp__inst_executed.sum\",\"inst\",\"99\""
  i=$((i + 1))
done
"""


@pytest.fixture
def fake_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU machine has, in name: they run the command and say that all is well."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("compute-sanitizer", _FAKE_SANITIZER), ("ncu", _FAKE_NCU)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.slow
@brought_home.needs_card
def test_dry_run_of_every_stage(tmp_path: Path, fake_tools: None) -> None:
    out, begin = tmp_path / "out", time.monotonic()
    command = ["make", "gpu", f"OUT={out}", f"PYTHON={PYTHON}", "DEVICE=cpu"]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - begin < 480
    lines = brought_home.lines(out / "gpu.tgz")
    assert list(lines) == [stage.name for stage in gpu.STAGES]
    expected = dict.fromkeys(lines, "ok") | {"build": "skipped", "layers-otherwise": "skipped"}
    assert {name: line["status"] for name, line in lines.items()} == expected
    home = brought_home.home(out / "gpu.tgz")
    for name in ("layers", "plans", "compiled", "networks", "price-of-se"):
        record = json.loads(home[f"{name}.json"])
        records.validate(record)
        assert record["results"], name
    found = [p for e in json.loads(home["layers.json"])["results"] for p in e["providers"].values()]
    counted = [p for p in found if "counters" in p]
    assert counted
    assert counted[0]["dram_bytes"] == 1536
    assert counted[0]["counters"][0]["smsp__inst_executed.sum"] == 99
    assert "| triton |" in home["report.md"]
    again = subprocess.run(_dry(out, 60), cwd=gpu.ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout
    lines = brought_home.lines(out / "gpu.tgz")
    # Verdicts may have been for the rest.
    may_go_on = {"environment", "build", "layers-otherwise", "verdicts", "verdicts-native",
                 "situations"}  # fmt: skip
    assert {name for name, line in lines.items() if not line["earlier"]} <= may_go_on


@pytest.mark.slow
@brought_home.needs_card
def test_dry_run_with_planted_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of kernels, the library, ncu and pytest: each is named, and the rest is done."""
    faults = {"3x24x7x16": "wrong", "1x3x70x33": "raises", "2x20x70x33": "dies",
              "2x131x11x13": "hangs", "2x240x14x14": "dies"}  # fmt: skip
    broken, site = tmp_path / "carried", tmp_path / "site"
    broken.mkdir()
    (broken / "_native.abi3.so").write_bytes(b"no library")
    site.mkdir()
    (site / "sitecustomize.py").write_text("blocked = {'pytest'}" + _ABSENT)
    monkeypatch.setenv(pretended.FAULT, "; ".join(f"{f} on {s}" for s, f in faults.items()))
    monkeypatch.setenv(stage_runner.PREBUILT, str(broken))
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    stages = ("build", "verdicts", "layers", "counters", "gpu-tests", "verdicts-rest")
    only = [word for name in stages for word in ("--only", name)]
    begin = time.monotonic()
    done = subprocess.run(_dry(tmp_path / "out", 290, *only), cwd=gpu.ROOT, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert time.monotonic() - begin < 290
    path = tmp_path / "out" / "gpu.tgz"
    home, lines = brought_home.home(path), brought_home.lines(path)
    verdicts = json.loads(home["verdicts-triton.json"])
    wanted = {"wrong": "error", "raises": "launch error", "dies": "crash", "hangs": "hang"}
    for name, verdict in verdicts.items():
        shape = name.removeprefix("layer ").partition(" ")[0]
        assert verdict["outcome"] == wanted.get(faults.get(shape, ""), "ok"), name
        if verdict["outcome"] != "ok":
            assert f"{verdict['outcome']}: {name}" in home["summary.txt"]
    assert "_native.abi3.so does not load" in lines["environment"]["detail"]
    native = [v["outcome"] for v in json.loads(home["verdicts-native.json"]).values()]
    assert "ok" in native
    assert set(native) <= {"ok", "not run"}
    layers = json.loads(home["layers.json"])
    assert lines["layers"]["status"] == "ok"
    for entry in layers["results"]:
        assert entry["providers"]["triton"]["reason"] == "left out: it crashed or hung"
        assert entry["providers"]["native"]["status"] == "ok"
    assert lines["counters"]["detail"] == "ncu is not on PATH"
    assert lines["gpu-tests"]["detail"] == "not installed: pytest"


@pytest.mark.slow
def test_dry_run_that_has_to_build_without_nvcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build's failure is told, and why nothing native ran; the rest is done."""
    root = tmp_path / "checkout"
    leave = shutil.ignore_patterns("__pycache__", "_native*.so", "_build.json", "results")
    for name in ("senet_kernels", "benchmarks", "tools", "tests", "csrc"):
        shutil.copytree(gpu.ROOT / name, root / name, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(gpu.ROOT / name, root / name)
    monkeypatch.setenv("CUDA_HOME", "/none")
    monkeypatch.delenv(stage_runner.PREBUILT, raising=False)
    stages = ("build", "verdicts", "verdicts-native", "memcheck-native", "gpu-tests")
    only = [word for name in stages for word in ("--only", name)]
    done = subprocess.run(_dry(tmp_path / "out", 120, *only), cwd=root, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 1, done.stdout
    lines = brought_home.lines(tmp_path / "out" / "gpu.tgz")
    assert lines["build"]["status"] == "failed"
    assert "nvcc not found" in lines["build"]["detail"]
    for name in ("verdicts", "verdicts-native", "memcheck-native"):
        assert lines[name]["status"] == "skipped"
        assert "the compiled library is not installed" in lines[name]["detail"]
    assert lines["gpu-tests"]["status"] == "ok"


# -- the bundle ------------------------------------------------------------------------------------

_WITHOUT = r"""
import sys
from importlib.metadata import packages_distributions, requires
import re
def plain(name):
    return re.sub("[-_.]+", "-", name).lower()
kept, todo = set(), ["torch", "triton"]
while todo:
    name = plain(todo.pop())
    if name in kept:
        continue
    kept.add(name)
    try:
        found = requires(name) or []
    except ImportError:
        continue
    todo += [re.match(r"[\w.-]+", line)[0] for line in found if "extra ==" not in line]
blocked = {m for m, of in packages_distributions().items() if not {plain(n) for n in of} & kept}
blocked -= {"senet_kernels", "sitecustomize"}
"""


def _unpacked(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """The bundle in a folder, and an environment where only torch, Triton and what these need can
    be imported."""
    if not list((gpu.ROOT / "senet_kernels").glob("_native*.so")):
        pytest.skip("there is no compiled library")
    path = tmp_path / "bundle.tgz"
    command = ["make", "--no-print-directory", str(path), f"BUNDLE={path}"]
    made = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert path.stat().st_size < 64 << 20
    assert made.stdout == f"{path}: {path.stat().st_size} bytes\n"
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(_WITHOUT + _ABSENT)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    environment.pop("TRITON_INTERPRET", None)
    return tmp_path / "senet_kernels", environment


_IMPORTS = """
import sys
from tools import gpu, gpu_verdicts, gpu_kernels, gpu_report
import benchmarks.__main__, benchmarks.watched, benchmarks.dram, benchmarks.launches
from senet_kernels.backends import native
assert gpu.__file__.startswith(sys.argv[1]) and native.__file__.startswith(sys.argv[1])
assert native.UNAVAILABLE is None, native.UNAVAILABLE
assert not {"numpy", "pytest", "rich", "tqdm", "matplotlib"} & {*sys.modules}
"""


def test_the_bundle_travels_and_needs_only_torch_and_triton(tmp_path: Path) -> None:
    root, environment = _unpacked(tmp_path)
    done = subprocess.run([PYTHON, "-c", _IMPORTS, str(root)], cwd=root, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@brought_home.needs_card
def test_a_dry_run_of_the_bundle(tmp_path: Path) -> None:
    """With its library and its commit; the CUDA kernels are not simulated there, which would have
    to be compiled first."""
    root, environment = _unpacked(tmp_path)
    out = tmp_path / "out"
    stages = ("layers", "plans", "gpu-tests")
    only = [word for name in stages for word in ("--only", name)]
    done = subprocess.run(_dry(out, 120, *only), cwd=root, env=environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    lines = brought_home.lines(out / "gpu.tgz")
    assert {name: line["status"] for name, line in lines.items()} == {
        "environment": "ok", **dict.fromkeys(stages, "ok"), "gpu-tests": "skipped",
    }, done.stdout  # fmt: skip
    assert lines["gpu-tests"]["detail"] == "not installed: pytest"
    home = brought_home.home(out / "gpu.tgz")
    results = json.loads(home["plans.json"])["results"]
    assert results
    assert all(entry["providers"]["native"]["status"] == "ok" for entry in results)
    assert json.loads(home["environment.json"])["commit"] == (root / "COMMIT").read_text()[:40]
    command = [PYTHON, "-m", "tools.gpu_verdicts", str(tmp_path), "--device", "cpu", "--backend",
               "triton", "--group", "verdicts"]  # fmt: skip
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "16 cases: 16 ok"
