"""Ctrl-C, as a terminal sends it: to every process of the command. It ends soon, with one line for
people and no traceback, and what was written is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import records
from senet_kernels.train.record import read_rows
from training import checkpoint_of, losses, needs_images, short_run

ROOT = Path(__file__).resolve().parent.parent
# Far more than is needed on a machine that has nothing else to do.
SOON = 20.0

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def _heed_interrupts() -> None:
    """What runs in a shell's background inherits that SIGINT is ignored; CI may be such a thing."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Command:
    """A command in a process group of its own, as a shell has it."""

    def __init__(self, *words: str, cwd: Path) -> None:
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words], cwd=cwd, env=env, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_heed_interrupts,
        )  # fmt: skip

    def interrupt_when(self, ready: Callable[[], bool], patience: float = 180) -> tuple[str, str]:
        """Ctrl-C once ``ready``; what the command said."""
        deadline = time.monotonic() + patience
        try:
            while not ready():
                assert self.process.poll() is None, self.process.communicate()
                assert time.monotonic() < deadline, "it does not get under way"
                time.sleep(0.01)
            start = time.monotonic()
            os.killpg(self.process.pid, signal.SIGINT)
            said = self.process.communicate(timeout=6 * SOON)
            assert time.monotonic() - start < SOON
        finally:
            self._end()
        assert self.process.returncode == 130, said
        assert "Traceback" not in said[0] + said[1], said[1]
        return said

    def _end(self) -> None:
        """Nothing of it is left, whatever happened. Its group is its own."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
            left = True
        except ProcessLookupError:
            left = False
        finished = self.process.returncode is not None
        self.process.wait()
        assert not (left and finished), "processes were left behind"


TRAINING = ["senet_kernels.train", "--model", "se_resnet8", "--classes", "0,1,2,3", "--epochs",
            "200", "--log-every", "1", "--no-tensorboard"]  # fmt: skip


@needs_images
@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=pytest.mark.slow)], ids=["alone", "with workers"]
)
def test_training(workers: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = Command(*TRAINING, "--out", str(out), "--workers", str(workers), cwd=tmp_path)
    metrics = out / "metrics.jsonl"
    _, said = command.interrupt_when(lambda: metrics.exists() and len(losses(out)) >= 3)
    assert said.rstrip().endswith("interrupted: the same command with --resume goes on")
    # Nothing is cut off.
    for line in metrics.read_text().splitlines():
        json.loads(line)
    steps = checkpoint_of(out)["progress"]["steps"]
    assert 0 <= steps <= len(losses(out))
    # And it does go on.
    summary = short_run(out, resume=str(out), stop_after=steps + 2)
    assert summary["steps"] == steps + 2
    assert [row["kind"] for row in read_rows(out)].count("run") == 2


BENCHMARKS = ["benchmarks", "layers", "--device", "cpu", "--provider", "eager-conv", "--provider",
              "native", "--network", "seresnet50", "--batch", "2", "--budget", "170",
              "--record", "record.json"]  # fmt: skip


@pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib")
def test_benchmarks(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = Command(*BENCHMARKS, cwd=tmp_path)

    def some_results() -> bool:
        return record.exists() and len(json.loads(record.read_text())["results"]) >= 2

    said, _ = command.interrupt_when(some_results)
    assert "record.json" in said.splitlines()[-1]
    kept = records.read(record)  # holds it to the schema
    assert kept["status"] == "interrupted"
    assert kept["results"]
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.name.endswith(".tmp")) == []
