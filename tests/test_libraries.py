"""Optional libraries that are not there, are something else of the same name, or do not import: the
command lines say so in a line, go on without, or end in an error before a file is written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkout import ROOT
from senet_kernels._libraries import Unusable, load, why_not
from training import needs_images

#: What a file or folder of a library's name may be: its ``__init__.py``, or None for a folder of
#: other things.
KINDS = {
    "a folder": None,
    "an empty module": "",
    "TypeError": 'raise TypeError("Descriptors cannot be created directly.\\nIf this call")',
    "RuntimeError": 'raise RuntimeError("module compiled against another version")',
    "ImportError": 'raise ImportError("DLL load failed")',
    "AttributeError": "import torch; torch.no_such_thing",
    "OSError": 'raise OSError("libfoo.so.1: cannot open shared object file")',
    "SystemExit": "raise SystemExit(3)",
}


def _shadow(folder: Path, library: str, kind: str) -> None:
    package = folder / library
    package.mkdir(parents=True)
    (package / "notes.txt").touch()
    content = KINDS[kind]
    if content is not None:
        (package / "__init__.py").write_text(content + "\n")


def _python(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip


#: Runs a module as if what is installed lacked some libraries; the working directory may have it.
_HIDE = """
import runpy, sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return found(name, [{folder!r}] if name in {libraries!r} else path, target)
PathFinder.find_spec = find_spec
sys.argv[0] = {module!r}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def _run(
    folder: Path, libraries: str | tuple[str, ...], module: str, *words: str
) -> subprocess.CompletedProcess[str]:
    script = folder / "start.py"
    hidden = (libraries,) if isinstance(libraries, str) else libraries
    script.write_text(_HIDE.format(libraries=hidden, folder=str(folder), module=module))
    return _python(folder, str(script), *words)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is searched for modules, whose modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("kind", KINDS)
def test_why_a_library_cannot_be_used(kind: str, here: Path) -> None:
    _shadow(here, "some_library", kind)
    # The next try has the same answer as the first.
    for name in ("some_library", "some_library", "some_library.part"):
        with pytest.raises(Unusable) as caught:
            load(name, "function")
        text = str(caught.value)
        assert text.startswith("some_library")
        assert "\n" not in text
        assert not caught.value.absent
        if kind.endswith("Error") or kind == "SystemExit":
            assert f"does not import: {kind}: " in text
        if name != "some_library.part" or kind != "an empty module":
            assert str(here / "some_library") in text


def test_a_library_that_is_not_there_or_lacks_another(here: Path) -> None:
    reason = why_not("some_library")
    assert reason is not None
    assert reason.absent
    assert str(reason) == "some_library is not installed"
    _shadow(here, "some_library", "a folder")
    (here / "some_library" / "__init__.py").write_text("import another_library\n")
    reason = why_not("some_library")
    assert reason is not None
    assert not reason.absent
    assert "ModuleNotFoundError: No module named 'another_library'" in str(reason)


def test_a_library_that_is_there(here: Path) -> None:
    (here / "some_library.py").write_text("def function(): ...\n")
    assert why_not("some_library", "function") is None
    assert why_not("some_library", "other") is not None


def test_ctrl_c_in_an_import(here: Path) -> None:
    (here / "some_library.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load("some_library")


TRAIN = ("--model", "se_resnet8", "--epochs", "1", "--stop-after", "1", "--classes", "0,1",
         "--out", "run")  # fmt: skip


@needs_images
def test_training_goes_on_without(tmp_path: Path) -> None:
    """Three at once: each has its line."""
    unusable = {
        "tensorboard": ("TypeError", "no TensorBoard files"),
        "tqdm": ("an empty module", "no progress bar"),  # torch itself imports it
        "matplotlib": ("OSError", "no curves"),
    }
    for library, (kind, _) in unusable.items():
        _shadow(tmp_path, library, kind)
    done = _run(tmp_path, tuple(unusable), "senet_kernels.train", *TRAIN)
    assert (done.returncode, done.stderr) == (0, "")
    for library, (kind, left_out) in unusable.items():
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(left_out)]
        assert library in line
        if kind.endswith("Error"):
            assert f"does not import: {kind}: " in line
        assert str(tmp_path / library) in line
    assert (tmp_path / "run" / "last.pt").exists()


@needs_images
@pytest.mark.slow
def test_training_goes_on_without_a_library_that_is_a_folder(tmp_path: Path) -> None:
    _shadow(tmp_path, "tensorboard", "a folder")
    done = _run(tmp_path, "tensorboard", "senet_kernels.train", *TRAIN)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = [li for li in done.stdout.splitlines() if li.startswith("no TensorBoard files")]
    assert str(tmp_path / "tensorboard") in line
    assert (tmp_path / "run" / "last.pt").exists()


@needs_images
def test_training_goes_on_where_it_is_not_installed(tmp_path: Path) -> None:
    done = _run(tmp_path, "matplotlib", "senet_kernels.train", *TRAIN)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no curves: matplotlib is not installed" in done.stdout


@needs_images
@pytest.mark.parametrize(("library", "kind", "needs"), [
    ("tensorboard", "TypeError", "--tensorboard"), ("tqdm", "a folder", "--progress"),
    ("PIL", "OSError", "--data"), ("sklearn", "AttributeError", "--data digits"),
])  # fmt: skip
def test_training_that_needs_it_writes_nothing(
    library: str, kind: str, needs: str, tmp_path: Path
) -> None:
    _shadow(tmp_path, library, kind)
    words = [needs] if library in ("tensorboard", "tqdm") else []
    done = _run(tmp_path, library, "senet_kernels.train", *TRAIN, *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {needs}: ")
    assert str(tmp_path / library) in line
    assert not (tmp_path / "run").exists()


@needs_images
def test_training_needs_no_numpy_of_its_own(tmp_path: Path) -> None:
    """torch goes on without; scikit-learn does not import, and is needed."""
    done = _run(tmp_path, "numpy", "senet_kernels.train", *TRAIN)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: --data digits: scikit-learn is needed: ")
    assert "ModuleNotFoundError: No module named 'numpy'" in line
    assert not (tmp_path / "run").exists()


@needs_images
def test_safetensors(tmp_path: Path) -> None:
    _shadow(tmp_path, "safetensors", "a folder")
    (tmp_path / "w.safetensors").touch()
    words = ("--evaluate", "--init-from", "w.safetensors")
    done = _run(tmp_path, "safetensors", "senet_kernels.train", *words)
    assert done.returncode == 2
    assert "w.safetensors: safetensors is needed: safetensors" in done.stderr


def test_curves_drawn_again(tmp_path: Path) -> None:
    _shadow(tmp_path, "matplotlib", "a folder")
    done = _run(tmp_path, "matplotlib", "senet_kernels.train.plots", "run")
    assert done.returncode == 1
    assert "\nno curves: matplotlib.figure is not installed: the folder" in f"\n{done.stderr}"


@pytest.mark.parametrize(
    ("library", "kind"), [("timm", "a folder"), ("torchvision", "AttributeError")]
)
def test_a_model_library(library: str, kind: str, tmp_path: Path) -> None:
    _shadow(tmp_path, library, kind)
    done = _run(tmp_path, library, "senet_kernels", "fuse", f"{library}:resnet18")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"model: '{library}:resnet18' cannot be made: {library}")
    assert str(tmp_path / library) in done.stderr


@pytest.mark.parametrize("kind", [
    "a folder", pytest.param("an empty module", marks=pytest.mark.slow),
    pytest.param("AttributeError", marks=pytest.mark.slow),
])  # fmt: skip
def test_triton(kind: str, tmp_path: Path) -> None:
    """The report says why it is not available, and calls are answered by others."""
    _shadow(tmp_path, "triton", kind)
    code = (
        "\nimport torch, senet_kernels as sk\n"
        "assert 'triton' not in sys.modules\n"
        "x, w = torch.randn(2, 8, 3, 3), torch.randn(4, 8)\n"
        "sk.squeeze_excite(x, w, None, w.T, None)\n"
        "print(sk.backends().reasons['triton'])\n"
        "print(sk.backends().available['triton'])\n"
    )
    script = _HIDE.format(libraries=("triton",), folder=str(tmp_path), module="x")
    start = script.rpartition("sys.argv")[0]
    done = _python(tmp_path, "-c", start + code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    reason, available = done.stdout.splitlines()[-2:]
    assert available == "False"
    assert reason.startswith("triton")
    assert str(tmp_path / "triton") in reason
    report = _run(tmp_path, "triton", "senet_kernels")
    assert report.returncode == 0, report.stderr
    assert "triton: not available: triton" in report.stdout


def test_benchmarks(tmp_path: Path) -> None:
    unusable = {
        "rich": ("a folder", "no tables: "), "tqdm": ("a folder", "no progress bar: "),
        "matplotlib": ("OSError", "no plots: "),
    }  # fmt: skip
    for library, (kind, _) in unusable.items():
        _shadow(tmp_path, library, kind)
    done = _run(
        tmp_path, tuple(unusable), "benchmarks", "sweep", "--device", "cpu", "--budget", "1",
        "--record", "record.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for _, says in unusable.values():
        assert len([line for line in done.stderr.splitlines() if line.startswith(says)]) == 1
    assert "Traceback" not in done.stderr
    assert (tmp_path / "record.json").exists()


def test_a_benchmarks_report(tmp_path: Path) -> None:
    _shadow(tmp_path, "jinja2", "a folder")
    done = _run(tmp_path, "jinja2", "benchmarks", "report", "--out", "out")
    assert done.returncode == 2
    assert done.stderr.startswith("the page cannot be made: jinja2")
    assert not (tmp_path / "out").exists()


def test_a_module_of_the_users_in_a_folder(tmp_path: Path) -> None:
    """A namespace package is no fault there; nor is an error inside it hidden."""
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "one.py").write_text("import torch\ndef make(): return torch.nn.ReLU()\n")
    (tmp_path / "nets" / "two.py").write_text("{}['key']\n")
    words = ("-m", "senet_kernels", "fuse", "--size", "8", "--batch", "1")
    done = _python(tmp_path, *words, "nets.one:make")
    assert (done.returncode, done.stderr) == (1, "")
    assert "no SE block found" in done.stdout
    assert (
        "nets.two does not import: KeyError: 'key'"
        in _python(tmp_path, *words, "nets.two:make").stderr
    )
    assert "nets.three is not installed" in _python(tmp_path, *words, "nets.three:make").stderr
