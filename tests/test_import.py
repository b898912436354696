"""What importing costs and needs, each in a fresh process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import senet_kernels
from backend_cases import FUSED_BACKENDS, BackendCase

_PACKAGE = Path(senet_kernels.__file__).parent


def _python(script: str, *flags: str, package: Path = _PACKAGE, **environment: str) -> str:
    """Output of ``script`` in a new interpreter that finds the package at ``package``."""
    env = {**os.environ, **environment, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, *flags, "-c", script],
        capture_output=True, text=True, env=env, timeout=120, check=False,
        cwd=package.parent,  # -c looks there first
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:1500]
    return done.stdout


_CALL = """
import torch, senet_kernels as sk
x, w = torch.randn(2, 8, 3, 5, requires_grad=True), torch.randn(4, 8)
y = sk.squeeze_excite(x, w, None, w.T, None)
y.sum().backward()
assert y.shape == x.shape == x.grad.shape
assert sk.FusedSEBlock(8)(x).shape == x.shape
"""

# After torch, which as of 2.14 cannot be imported so itself.
_BLOCK_TRITON = """
import sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("triton is blocked")
sys.meta_path.insert(0, Blocked())
"""


def test_works_without_triton() -> None:
    _python(_BLOCK_TRITON + _CALL + "assert 'triton' not in sys.modules")


@pytest.fixture
def pure_python(tmp_path: Path) -> Path:
    """A copy of the package without its compiled library and build record."""
    copy = tmp_path / "senet_kernels"
    shutil.copytree(
        _PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    )
    return copy


def test_works_without_the_library(pure_python: Path) -> None:
    out = _python(
        _CALL
        + """
assert not sk.backends()["native"]
assert sk.explain(x, w, None, w.T, None).backend == "fallback"
for call in (lambda: sk.squeeze_excite(x, w, None, w.T, None, backend="native"),
             lambda: sk.NativeSEFunction.apply(x, w, None, w.T, None)):
    try:
        call()
    except RuntimeError as error:
        print(error)
print(sk.__file__)
""",
        package=pure_python,
    )
    by_name, by_function, where = out.splitlines()
    for message in (by_name, by_function):
        assert "native" in message
        assert "never built" in message
        assert "pip install --no-build-isolation" in message
    assert where.startswith(str(pure_python))


def test_build_record_gives_the_reason(pure_python: Path) -> None:
    (pure_python / "_build.json").write_text('{"requested": "auto", "reason": "no compiler here"}')
    out = _python(
        "import senet_kernels as sk; print(sk.backends().reasons['native'])", package=pure_python
    )
    assert "no compiler here" in out


@pytest.mark.parametrize(
    "content",
    ["not an ELF file", *(pytest.param(c, marks=pytest.mark.slow) for c in ("", "\x7fELF"))],
)
def test_broken_library_is_a_reason_not_a_crash(pure_python: Path, content: str) -> None:
    (pure_python / "_native.abi3.so").write_text(content)
    script = _CALL + "print(sk.backends().reasons['native'])"
    out = _python(script, package=pure_python)
    assert "_native.abi3.so does not load" in out


_WATCH = """
import sys
spawned = []
def hook(event, args):
    if event in ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec", "socket.connect"):
        spawned.append((event, args))
import torch
before = set(sys.modules)
sys.addaudithook(hook)
import senet_kernels
assert not spawned, spawned
assert not torch.cuda.is_initialized()
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "timm", "torchvision", "numpy", "hypothesis"}, new
assert not [n for n in sys.modules if n.startswith(("torch._inductor", "torch._dynamo"))
            and n not in before]
"""


def test_import_starts_nothing() -> None:
    """No CUDA, no compilation, no process, no network, none of the heavy parts of torch."""
    _python(_WATCH)


def test_import_does_not_warn() -> None:
    # torch is imported first: its own warnings are not ours.
    _python("import torch, warnings; warnings.simplefilter('error'); import senet_kernels")
    _python(_CALL, "-W", "error")


@pytest.mark.parametrize("backend", [b for b in FUSED_BACKENDS if b.name == "native"],
                         indirect=True, ids=str)  # fmt: skip
def test_function_alone_loads_the_library(backend: BackendCase) -> None:
    """Nothing has to be called before the exported Function, nor before the raw ops compile."""
    _python(
        "import torch; from senet_kernels import NativeSEFunction\n"
        "x, w = torch.randn(2, 8, 3, requires_grad=True), torch.randn(4, 8)\n"
        "NativeSEFunction.apply(x, w, None, w.T, None).sum().backward()\n"
        "assert x.grad is not None\n"
    )


_ANEW = """
import importlib, sys
import torch, senet_kernels as first
x, w = torch.randn(2, 8, 3, 5, requires_grad=True), torch.randn(4, 8)
right = first.squeeze_excite(x, w, None, w.T, None, after="relu")
def forget():
    for name in [n for n in sys.modules if n.split(".")[0] == first.__name__]:
        del sys.modules[name]
def check(copy):
    assert copy is not first
    for module in (copy, first):
        y = module.squeeze_excite(x, w, None, w.T, None, after="relu")
        assert torch.equal(y, right)
        y.sum().backward()
    print(copy.explain(x, w, None, w.T, None).backend, copy.__file__)
forget()
import senet_kernels
check(senet_kernels)
forget()
sys.path.insert(0, sys.argv[1])
"""


def _copies(tmp_path: Path) -> Path:
    """A folder with the package under its own name, and vendored under another."""
    for name in ("senet_kernels", "vendored", "later"):
        shutil.copytree(_PACKAGE, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_two_copies_in_one_process(tmp_path: Path) -> None:
    """Imported anew, from another path, vendored under another name; one of another version is
    refused."""
    folder = _copies(tmp_path)
    (folder / "later" / "_version.py").write_text('__version__ = "9.9"\n')
    script = (
        _ANEW.replace("sys.argv[1]", repr(str(folder)))
        + "check(__import__('senet_kernels')); check(__import__('vendored'))\n"
        + "try: import later\nexcept ImportError as error: print(error)"
    )
    here, other, vendored, refusal = _python(script).splitlines()
    assert here.endswith(f" {_PACKAGE / '__init__.py'}")
    assert other.endswith(f" {tmp_path / 'senet_kernels' / '__init__.py'}")
    assert vendored.endswith(f" {tmp_path / 'vendored' / '__init__.py'}")
    # All of them on the same backend: the second copy finds the first's library.
    assert len({line.split()[0] for line in (here, other, vendored)}) == 1
    assert "senet_kernels 9.9" in refusal
    assert f"senet_kernels {senet_kernels.__version__} ({_PACKAGE})" in refusal


def test_public_names() -> None:
    for name in senet_kernels.__all__:
        assert hasattr(senet_kernels, name), name
    assert len(set(senet_kernels.__all__)) == len(senet_kernels.__all__)
    assert (_PACKAGE / "py.typed").exists()
