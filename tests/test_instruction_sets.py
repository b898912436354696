"""Every variant of the native library this processor runs, not only the widest one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backend_cases import FUSED_BACKENDS, BackendCase
from senet_kernels.backends.native import build_record

_TESTS = Path(__file__).parent


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize(
    "backend", [b for b in FUSED_BACKENDS if b.name == "native"], indirect=True, ids=str
)
@pytest.mark.parametrize(
    "choice",
    [
        "native and not pairs_of_choices",
        pytest.param("native and pairs_of_choices", marks=pytest.mark.slow),  # a minute each
    ],
)
def test_variant_passes_the_oracle_tests(backend: BackendCase, isa: str, choice: str) -> None:
    if isa not in build_record()["isas"]:
        pytest.skip(f"the library was built without {isa}")
    if isa == torch.ops.senet_kernels.native_isa():
        pytest.skip(f"the suite itself runs {isa}")
    environment = {**os.environ, "SENET_KERNELS_ISA": isa}
    selection = [str(_TESTS / name) for name in ("test_pointwise.py", "test_accuracy.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", choice, *selection],
        env=environment,
        cwd=_TESTS.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if "this processor does not run" in done.stdout:
        pytest.skip(f"this processor does not run {isa}")
    assert done.returncode == 0, done.stdout[-4000:]


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
