"""A resumed run ends with the bits of one that was never interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import senet_kernels
from senet_kernels.train import TrainError, checkpoint, extras, record, train
from senet_kernels.train.__main__ import main
from senet_kernels.train.loop import Learner
from senet_kernels.train.record import read_rows
from training import SHORT, assert_same_bits, checkpoint_of, losses, needs_images, short_run

pytestmark = needs_images

# Dropout draws on torch's random numbers, fp16 has a scaler, two stages have two optimisers.
_COURSE: dict[str, Any] = {
    "model_args": "drop_rate=0.3 formula=weighted", "precision": "fp16", "clip": 1.0,
    "stages": "none:2,se:1", "batch_size": 128,
}  # fmt: skip


def _epochs(out: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in read_rows(out)
        if row["kind"] == "epoch"
    ]


def test_resumed_anywhere(tmp_path: Path) -> None:
    """Mid-epoch, at an epoch's end, at a stage's end: five sessions make up the same run."""
    whole = short_run(tmp_path / "whole", **_COURSE)
    short_run(tmp_path / "parts", **_COURSE, checkpoint_every=2, stop_after=3)
    per_epoch = whole["steps"] // 3
    for steps in (per_epoch - 3, per_epoch, 2, 0):
        summary = short_run(tmp_path / "parts", resume="auto", stop_after=steps)
    assert summary["complete"]
    got, right = checkpoint_of(tmp_path / "parts"), checkpoint_of(tmp_path / "whole")
    assert_same_bits(got["weights"], right["weights"])
    assert got["scaler"] == right["scaler"]
    assert torch.equal(got["ranks"][0]["rng"], right["ranks"][0]["rng"])
    momentum = got["optimizer"]["state"]
    assert momentum.keys() == right["optimizer"]["state"].keys()
    for name, state in right["optimizer"]["state"].items():
        assert torch.equal(momentum[name]["momentum_buffer"], state["momentum_buffer"])
    # The files read as if there had been no interruption.
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert _epochs(tmp_path / "parts") == _epochs(tmp_path / "whole")
    table = (tmp_path / "parts" / "metrics.csv").read_text()
    assert table.count("\n") == 4


def test_lines_after_the_checkpoint_are_cut(tmp_path: Path) -> None:
    """A killed run has logged more than its last checkpoint knows, and perhaps half a line."""
    short_run(tmp_path, stop_after=3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "steps": 4, "loss": 99.0, "lr": 1, "epoch": 1}\n{"kind": "st')
    (tmp_path / "last.pt.part").write_bytes(b"half a checkpoint")
    short_run(tmp_path, resume=str(tmp_path))
    assert 99.0 not in losses(tmp_path)
    steps = [row["steps"] for row in read_rows(tmp_path) if row["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))


def test_refuses_what_is_not_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    short_run(out, stop_after=2)

    def error(*arguments: str) -> str:
        assert main(["--resume", str(out), *arguments]) == 2
        return capsys.readouterr().err

    said = error("--model", "se_resnet20")
    assert "is of another model: --model 'se_resnet8', not 'se_resnet20'" in said
    assert "--init-from" in said
    assert "another model" in error("--model-args", "excitation=tied")
    said = error("--lr", "0.5", "--seed", "3")
    assert "of a run with other options: --lr 0.1, not 0.5; --seed 0, not 3" in said
    torch.save({**checkpoint_of(out), "data": "elsewhere"}, out / "last.pt")
    with pytest.raises(TrainError, match="other images"):
        train({}, str(out))
    with pytest.raises(TrainError, match="no checkpoint"):
        train({}, str(tmp_path / "nothing"))
    weights = tmp_path / "weights.pt"
    torch.save({"weights": checkpoint_of(out)["weights"]}, weights)
    with pytest.raises(TrainError, match="not a checkpoint to resume"):
        train({}, str(weights))


def test_auto_resume_begins_where_there_is_nothing(tmp_path: Path) -> None:
    """One command for a machine that may be taken away at any time."""
    first = train({**SHORT, "out": str(tmp_path), "stop_after": 4}, "auto")
    assert not first["complete"]
    second = train({**SHORT, "out": str(tmp_path)}, "auto")
    assert second["complete"]
    assert train({**SHORT, "out": str(tmp_path)}, "auto")["steps"] == second["steps"]


def test_killed_before_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one from the first moment; without it --resume begins anew."""
    monkeypatch.setattr(Learner, "step", _dies)
    for name in ("a", "b"):
        with pytest.raises(KeyboardInterrupt):
            short_run(tmp_path / name, epochs=1)
    assert checkpoint_of(tmp_path / "a")["progress"]["steps"] == 0
    (tmp_path / "b" / "last.pt").unlink()
    monkeypatch.undo()
    short_run(tmp_path / "whole", epochs=1)
    with pytest.raises(TrainError, match="has a run already"):
        train({**SHORT, "epochs": 1, "out": str(tmp_path / "b")})
    for name in ("a", "b"):
        train({**SHORT, "epochs": 1, "out": str(tmp_path / name)}, "auto")
        assert losses(tmp_path / name) == losses(tmp_path / "whole")


def _dies(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("where", "error"), [
    ((Learner, "step"), RuntimeError("CUDA out of memory")),
    ((Learner, "step"), ValueError("Expected more than 1 value per channel when training")),
    ((Learner, "train_mode"), KeyError("anything")),
    ((record.Record, "run"), OSError(28, "No space left on device", "metrics.jsonl")),
    ((checkpoint, "save"), TrainError("the checkpoint cannot be written")),
], ids=["out of memory", "one image", "a bug", "full disk", "no checkpoint"])  # fmt: skip
def test_failed_before_the_first_step(
    where: tuple[Any, str], error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to keep, and the same command with what was wrong put right is not
    refused; what else is in the folder stays."""

    def fails(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    with monkeypatch.context() as patch:
        patch.setattr(*where, fails)
        for name in ("new", "used"):
            with pytest.raises((type(error), TrainError)):
                short_run(tmp_path / name, epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]
    for name in ("new", "used"):
        assert short_run(tmp_path / name, epochs=1, stop_after=1)["steps"] == 1
    # A run that was there, and is gone on with, stays.
    before = (tmp_path / "new" / "last.pt").read_bytes()
    monkeypatch.setattr(*where, fails)
    with pytest.raises((type(error), TrainError)):
        train({"stop_after": 1}, str(tmp_path / "new"))
    assert (tmp_path / "new" / "last.pt").read_bytes() == before


def test_a_board_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Left out, unless it was asked for."""

    def fails(*_: object) -> None:
        raise TypeError("Descriptors cannot be created directly.\nIf this call came from ...")

    monkeypatch.setattr(record, "_tensorboard", fails)
    monkeypatch.setattr(extras, "why_not", lambda *_: None)
    asked = {**SHORT, "epochs": 1, "stop_after": 1, "out": str(tmp_path / "run")}
    with pytest.raises(TrainError, match="--tensorboard: TypeError: Descriptors cannot"):
        train({**asked, "tensorboard": True})
    assert not (tmp_path / "run").exists()
    del asked["tensorboard"]
    train(asked)
    said = capsys.readouterr().out
    assert "no TensorBoard files: TypeError: Descriptors cannot be created directly.\n" in said


def test_auto_resume_finds_the_default_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train({**SHORT, "epochs": 1, "stop_after": 2}, "auto")
    assert (tmp_path / "runs" / "se_resnet8-digits-0" / "last.pt").is_file()
    assert train({**SHORT, "epochs": 1}, "auto")["complete"]


def test_resumed_into_another_folder(tmp_path: Path) -> None:
    """The new folder has the whole run; a run that is there already is left alone."""
    old, new, other = tmp_path / "old", tmp_path / "new", tmp_path / "other"
    short_run(old, stop_after=9)
    short_run(other, seed=1, epochs=1)
    kept = (other / "last.pt").read_bytes(), (other / "metrics.jsonl").read_bytes()
    with pytest.raises(TrainError, match="has a run already"):
        train({"out": str(other)}, str(old))
    assert ((other / "last.pt").read_bytes(), (other / "metrics.jsonl").read_bytes()) == kept
    summary = train({"out": str(new)}, str(old))
    assert summary["complete"]
    assert len(_epochs(new)) == 2
    assert len(losses(new)) == summary["steps"]
    assert (new / "best.pt").exists()
    # Also one that is complete.
    again = train({"out": str(tmp_path / "again")}, str(new))
    assert again["test_accuracy"] == summary["test_accuracy"]
    assert_same_bits(checkpoint_of(tmp_path / "again")["weights"], checkpoint_of(new)["weights"])
    train({"out": str(other), "overwrite": True}, str(old))
    assert _epochs(other) == _epochs(new)


def test_checkpoints_change_nothing(tmp_path: Path) -> None:
    short_run(tmp_path / "often", checkpoint_every=1, log_every=1, epochs=1)
    short_run(tmp_path / "never", log_every=1000, epochs=1)
    often, never = checkpoint_of(tmp_path / "often"), checkpoint_of(tmp_path / "never")
    assert_same_bits(often["weights"], never["weights"])


def test_a_checkpoint_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the process dies while writing, the name holds the old file."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"n": 1})
    real = torch.save

    def dies(content: Any, file: Any) -> None:
        real(content, file)
        file.flush()
        assert torch.load(path, weights_only=True) == {"n": 1}
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"n": 2})
    assert torch.load(path, weights_only=True) == {"n": 1}


_KILLED = ["--model", "se_resnet8", "--epochs", "5", "--checkpoint-every", "7", "--log-every", "1",
           "--model-args", "drop_rate=0.2", "--no-tensorboard"]  # fmt: skip


def _command(*arguments: str) -> subprocess.Popen[bytes]:
    root = Path(senet_kernels.__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "2"}
    return subprocess.Popen(
        [sys.executable, "-m", "senet_kernels.train", *arguments],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def _wait_for_steps(out: Path, process: subprocess.Popen[bytes], steps: int) -> None:
    deadline = time.monotonic() + 900
    while len(losses(out)) < steps:
        assert process.poll() is None, (process.communicate()[1] or b"").decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_kill_9_and_resume(tmp_path: Path) -> None:
    """SIGKILL three times in the middle of epochs; the final weights have the same bits."""
    whole = _command(*_KILLED, "--out", str(tmp_path / "whole"))
    _, said = whole.communicate(timeout=900)
    assert whole.returncode == 0, said.decode()[-2000:]

    out = tmp_path / "killed"
    for kill_after in (17, 45, 73):
        process = _command(*_KILLED, "--out", str(out), "--resume")
        _wait_for_steps(out, process, kill_after)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        progress = checkpoint_of(out)["progress"]
        assert progress["steps"] <= len(losses(out))
    last = _command("--resume", str(out))
    _, said = last.communicate(timeout=900)
    assert last.returncode == 0, said.decode()[-2000:]

    got, right = checkpoint_of(out), checkpoint_of(tmp_path / "whole")
    assert_same_bits(got["weights"], right["weights"])
    assert losses(out) == losses(tmp_path / "whole")
    assert _epochs(out) == _epochs(tmp_path / "whole")
    sessions = [row for row in read_rows(out) if row["kind"] == "run"]
    assert len(sessions) == 4
