"""The examples run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from typing import Any

import pytest

from markdown_blocks import ROOT
from models import library

EXAMPLES = ROOT / "examples"


def _run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_swap_in_timm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    library("timm")
    _run("swap_in_timm.py", "seresnet18", "--size", "64", monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert out.startswith("8 SE blocks fused; the steps around them joined\n")
    assert float(out.split("largest difference: ")[1]) < 1e-4


def test_train_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    _run("train_ddp.py", "--steps", "10", monkeypatch=monkeypatch)
    assert "step 10: loss" in capsys.readouterr().out


def _in_new_process(*command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_train_in_two_processes() -> None:
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out = _in_new_process(*run, "examples/train_ddp.py", "--steps", "20")
    losses = [float(line.split()[-1]) for line in out.splitlines() if "loss" in line]
    assert len(losses) == 2
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_export() -> None:
    out = _in_new_process("examples/export.py")
    assert "fused ops in the graph: senet_kernels." in out
    assert "a new process computes the same for a batch of 5" in out


# ---- the notebook ----


def _cells() -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    return cells


def test_notebook_was_executed_and_is_that_of_the_script() -> None:
    cells = _cells()
    script = runpy.run_path(str(EXAMPLES / "tour.py"))["CELLS"]
    assert tuple("".join(cell["source"]) for cell in cells) == script
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert cell["outputs"], "every cell shows something"
        assert all(output["output_type"] != "error" for output in cell["outputs"])
    text = (EXAMPLES / "tour.ipynb").read_text()
    assert "/home" not in text
    assert str(ROOT) not in text


def test_notebook_runs() -> None:
    """Its own assertions hold here, too."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in _cells():
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()):
                exec("".join(cell["source"]), names)
