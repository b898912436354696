"""Every variant of the native library this processor runs, not only the widest one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backend_cases import FUSED_BACKENDS, BackendCase
from senet_kernels.backends.native import build_record

_TESTS = Path(__file__).parent


def _python(isa: str, *arguments: str, **environment: str) -> str:
    """What a Python that runs this variant prints; skips where the processor does not run it."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "SENET_KERNELS_ISA": isa, **environment},
        cwd=_TESTS.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if "this processor does not run" in done.stdout + done.stderr:
        pytest.skip(f"this processor does not run {isa}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "neon"])
@pytest.mark.parametrize(
    "backend", [b for b in FUSED_BACKENDS if b.name == "native"], indirect=True, ids=str
)
@pytest.mark.parametrize(
    "choice",
    [
        "native and not pairs_of_choices and not thread_counts",
        # Half a minute and more each. Shares of threads are the same code for every variant.
        pytest.param("native and thread_counts", marks=pytest.mark.slow),
        pytest.param("native and pairs_of_choices", marks=pytest.mark.slow),
    ],
)
def test_variant_passes_the_oracle_tests(backend: BackendCase, isa: str, choice: str) -> None:
    if isa not in build_record()["isas"]:
        pytest.skip(f"the library was built without {isa}")
    if isa == torch.ops.senet_kernels.native_isa():
        pytest.skip(f"the suite itself runs {isa}")
    selection = [str(_TESTS / name) for name in ("test_pointwise.py", "test_accuracy.py")]
    _python(isa, "-m", "pytest", "-q", "-m", "not slow", "-k", choice, *selection)


def test_an_unknown_variant_is_refused() -> None:
    code = "import torch, senet_kernels; torch.ops.senet_kernels.native_isa()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SENET_KERNELS_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    if build_record().get("isas"):
        assert "SENET_KERNELS_ISA" in done.stderr
        assert "sse9" in done.stderr


# Prints a digest of every result of calls whose rows are whole cache lines, and of some others.
_CALLS = """
import hashlib, itertools
import torch
from senet_kernels import channel_scale, squeeze_excite

torch.set_num_threads(2)
SHAPES = [(1, 64, 16, 16), (5, 48, 14, 14), (3, 64, 7, 7), (4, 96, 8, 8), (3, 31, 5, 5)]
OPTIONS = [
    {}, {"before": "silu", "gate": "hardsigmoid"}, {"residual": 1, "after": "relu"},
    {"residual": 1, "after": "gelu"}, {"shift": 1}, {"alpha": 1, "beta": 1, "before_affine": 1},
    {"lengths": 1},
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
digest = hashlib.sha256()
def note(*tensors):
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
for shape, options, dtype, layout in itertools.product(SHAPES, OPTIONS, DTYPES, LAYOUTS):
    torch.manual_seed(0)
    new = lambda *size: torch.randn(*size, dtype=dtype)
    image = lambda: new(*shape).to(memory_format=layout)
    batch, channels, *_ = shape
    chosen = dict(options)
    rows = (1 + chosen.pop("shift", 0)) * channels
    x, w = image(), [new(8, channels), new(8), new(rows, 8), new(rows)]
    if "residual" in chosen: chosen["residual"] = image().requires_grad_()
    for name in ("alpha", "beta"):
        if name in chosen: chosen[name] = new(channels)
    if "before_affine" in chosen: chosen["before_affine"] = (new(channels), new(channels))
    if "lengths" in chosen: chosen["lengths"] = torch.arange(batch) + 3
    leaves = [x.requires_grad_(), *(t.requires_grad_() for t in w)]
    y = squeeze_excite(*leaves, backend="native", **chosen)
    leaves += [chosen["residual"]] if "residual" in chosen else []
    note(y, *torch.autograd.grad(y, leaves, image()))
    with torch.no_grad():
        note(squeeze_excite(x.clone(), *w, backend="native", inplace=True, **chosen))
        note(channel_scale(x, new(batch, channels), backend="native"))
print(digest.hexdigest())
"""


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_writing_around_the_caches_changes_no_bit(isa: str) -> None:
    """A call that exceeds the last cache stores its result around the caches: the same numbers."""
    if isa not in build_record().get("isas", []):
        pytest.skip(f"the library was built without {isa}")
    # Poisoned, because memory that was never touched is written as usual.
    digests = {
        _python(isa, "-c", _CALLS, SENET_KERNELS_LAST_CACHE=size, SENET_KERNELS_POISON="1")
        for size in ("1", "1000000000000")
    }
    assert len(digests) == 1


def test_teams_agree_with_one_thread(tmp_path: Path) -> None:
    """The program that sanitizers run, as it is: every way of sharing out work."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    isas = build_record().get("isas", [])
    if compiler is None or not isas:
        pytest.skip("no compiler here, or no native library")
    isa, flags = ("avx2", ["-mavx2", "-mfma", "-mf16c"]) if "avx2" in isas else ("baseline", [])
    program = tmp_path / "team"
    sources = ["tests/team/team.cpp", "csrc/cpu/kernels.cpp"]
    flags += ["-std=c++20", "-O0", "-w", "-pthread", "-Icsrc", "-DSENET_FEW_CASES=1"]
    subprocess.run(
        [compiler, *flags, f"-DSENET_ISA={isa}", *sources, "-o", str(program)],
        cwd=_TESTS.parent,
        check=True,
    )
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.stdout.endswith(", 0 wrong\n"), done.stdout[-2000:]
    assert done.returncode == 0
