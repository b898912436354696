"""The training recipe: options, data, schedule, files, and what it says when something is wrong."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from senet_kernels.models import create_model
from senet_kernels.train import Options, TrainError, checkpoint, evaluate, train
from senet_kernels.train import data as data_module
from senet_kernels.train.__main__ import main
from senet_kernels.train.loader import IGNORED, Pictures, TrainBatches, padded_shares
from senet_kernels.train.loop import Learner
from senet_kernels.train.optimise import learning_rate, optimiser
from senet_kernels.train.options import Stage, parse
from senet_kernels.train.parallel import Processes
from senet_kernels.train.record import read_rows
from training import SHORT, checkpoint_of, losses, needs_images, short_run

pytestmark = needs_images


def _folder(root: Path, classes: dict[str, int], size: int = 12) -> Path:
    """Images of random noise: ``classes`` gives how many of each."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 256, (size, size + i % 3, 3), generator=generator)
            values = bytes(pixels.flatten().tolist())
            image = Image.frombytes("RGB", (size + i % 3, size), values)
            image.save(root / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


# -- a run


def test_a_run_and_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["--model", "se_resnet8", "--classes", "0,1,2,3", "--batch-size", "32",
                 "--epochs", "3", "--out", str(out), "--measure-train"]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "epoch 3/3" in said
    assert "weight decay: 0.0005 on 16 tensors, 0 on 25 tensors" in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["complete"]
    assert summary["test_accuracy"] > 0.5  # by chance: a quarter
    assert summary["train_accuracy"] > 0.5
    with open(out / "metrics.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    assert float(table[-1]["test_accuracy"]) == summary["test_accuracy"]
    rows = read_rows(out)
    assert [row["kind"] for row in rows].count("epoch") == 3
    assert all(math.isfinite(row["loss"]) for row in rows if row["kind"] == "step")
    # Readable without running code, and there is no half of a file left.
    assert checkpoint_of(out)["progress"]["epochs"] == 3
    assert checkpoint_of(out, "best.pt")["classes"] == ["0", "1", "2", "3"]
    assert not list(out.glob("*.part"))
    if find_spec("matplotlib"):
        assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    assert main(["--evaluate", "--init-from", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["test_accuracy"] == summary["test_accuracy"]
    bigger = evaluate({"init_from": str(out), "test_size": 16, "test_scale": 0.5})
    assert (bigger["size"], bigger["scale"]) == (16, 0.5)

    # Another run does not write over it.
    assert main(arguments) == 2
    assert "has a run already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--epochs", "1"]) == 0
    assert checkpoint_of(out)["progress"]["epochs"] == 1


@pytest.mark.parametrize(
    "precision",
    [pytest.param("bf16", marks=pytest.mark.slow), "fp16",
     pytest.param("fp64", marks=pytest.mark.slow)],
)  # fmt: skip
def test_precisions(precision: str, tmp_path: Path) -> None:
    full = short_run(tmp_path / "fp32", epochs=1, clip=1.0, batch_size=64)
    short_run(tmp_path / "other", epochs=1, clip=1.0, batch_size=64, precision=precision)
    weights = checkpoint_of(tmp_path / "other")["weights"]
    assert weights["fc.weight"].dtype == (torch.float64 if precision == "fp64" else torch.float32)
    near, exact = losses(tmp_path / "other"), losses(tmp_path / "fp32")
    assert near != exact
    assert full["steps"] == len(exact) == len(near)
    assert near == pytest.approx(exact, rel=1e-4 if precision == "fp64" else 0.05)


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    bound = 1e-3
    settings = {"epochs": 1, "clip": bound, "momentum": 0.0, "nesterov": False, "lr": 1.0,
                "weight_decay": 0.0, "warmup_epochs": 0.0, "stop_after": 1}  # fmt: skip
    torch.manual_seed(0)
    before = create_model("se_resnet8", 4, 1).state_dict()
    short_run(tmp_path, **settings)
    after = checkpoint_of(tmp_path)["weights"]
    moved = torch.stack([
        (after[name] - value).norm() for name, value in before.items()
        if "running" not in name and "num_batches" not in name
    ]).norm()  # fmt: skip
    assert moved == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize("kind", ["tied", "single", "weighted", "literal"])
def test_every_form_trains(kind: str, tmp_path: Path) -> None:
    name = "formula" if kind in ("weighted", "literal") else "excitation"
    short_run(tmp_path, epochs=1, model_args=f"{name}={kind}")
    assert all(math.isfinite(loss) for loss in losses(tmp_path))


# -- optimiser and schedule


def test_weight_decay_is_of_weights_only() -> None:
    model = create_model("se_resnet8", 4, 1, formula="weighted")
    groups = optimiser(model, Options(weight_decay=0.1)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert len(decay) == len(names)
    for name, parameter in names.items():
        is_weight = name.endswith("weight") and parameter.dim() > 1
        assert decay[id(parameter)] == (0.1 if is_weight else 0), name


def test_cosine_and_steps() -> None:
    stage, options = Stage("none", 10, 0.4), Options(warmup_epochs=1e308)
    assert learning_rate(options, stage, 48, 5) == pytest.approx(0.4 * 49 / 50)
    options = Options(warmup_epochs=2, min_lr=0.01)
    rates = [learning_rate(options, stage, i, 5) for i in range(50)]
    assert rates[:10] == pytest.approx([0.4 * (i + 1) / 11 for i in range(10)])
    assert rates[10] == pytest.approx(0.4)
    assert rates[30] == pytest.approx((0.4 + 0.01) / 2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.01 < rates[-1] < 0.011
    options = Options(schedule="step", warmup_epochs=0, step_epochs=4, step_factor=0.5)
    assert [learning_rate(options, stage, i, 5) for i in (0, 19, 20, 39, 40)] == pytest.approx(
        [0.4, 0.4, 0.2, 0.2, 0.1]
    )


def test_stages_in_the_options() -> None:
    assert Options(stages="backbone:5, se:10:0.01").plan() == [
        Stage("backbone", 5, 0.1), Stage("se", 10, 0.01)
    ]  # fmt: skip
    assert Options(freeze="se", epochs=3).plan() == [Stage("se", 3, 0.1)]
    assert Options(model_args="excitation=tied reduction=4").model_arguments() == {
        "excitation": "tied", "reduction": 4
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "--lr: expected 0 to"),
        ({"epochs": 0}, "--epochs: expected at least 1, got 0"),
        ({"schedule": "linear"}, "--schedule: expected one of cosine, step"),
        ({"stages": "head:3"}, "--stages: expected FREEZE:EPOCHS"),
        ({"stages": "se"}, "--stages"),
        ({"image_size": 10**9}, "--image-size: expected 0 to 16384, got 1e"),
        ({"momentum": 0.0}, "--nesterov: needs --momentum above 0"),
        ({"model_args": "tied"}, "--model-args: expected NAME=VALUE, got 'tied'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        Options(**options)


def test_stages_exclude_freeze(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--stages", "se:1", "--epochs", "3"]) == 2
    assert "without --freeze, --epochs" in capsys.readouterr().err


# -- data


def test_digits_are_split_once_and_for_all() -> None:
    first, again = data_module.load(Options(seed=0)), data_module.load(Options(seed=5))
    assert first.fingerprint == again.fingerprint
    assert (len(first.train), len(first.test)) == (1438, 359)
    assert not {p.source for p in first.train} & {p.source for p in first.test}
    some = data_module.load(Options(classes="7,3"))
    assert some.classes == ["7", "3"]
    sevens = {p.source for p in first.test if p.label == 7}
    assert {p.source for p in some.test if p.label == 0} == sevens


def test_augmentation_depends_on_nothing_but_seed_epoch_and_picture() -> None:
    pictures = data_module.load(Options()).train[:20]

    def image(epoch: int, index: int, seed: int = 0) -> list[int]:
        loaded = Pictures(pictures, 1, 8, "shift", seed)[epoch, index][0]
        values: list[int] = loaded.flatten().tolist()
        return values

    assert image(3, 4) == image(3, 4)
    assert len({tuple(image(epoch, 4)) for epoch in range(20)}) > 4
    assert len({tuple(image(3, 4, seed)) for seed in range(20)}) > 4


def test_every_process_sees_its_share() -> None:
    alone = TrainBatches(103, 10, 1, rank=0, world=1)
    alone.epoch = 2
    batches = list(alone)
    assert len(batches) == alone.per_epoch == 10
    pairs = []
    for rank in range(2):
        mine = TrainBatches(103, 10, 1, rank, world=2)
        mine.epoch, mine.start = 2, 3
        pairs.append(list(mine))
    assert [a + b for a, b in zip(*pairs, strict=True)] == batches[3:]
    indices = [i for batch in batches for _, i in batch]
    assert len(set(indices)) == len(indices) == 100
    shares = [padded_shares(7, 2, rank, 2) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]
    seen = sorted(i for share in shares for batch in share for _, i in batch)
    assert seen == [-1, 0, 1, 2, 3, 4, 5, 6]


def test_zoom_and_shift() -> None:
    white = [data_module.Picture(b"\xff" * 64, 3)]
    small = Pictures(white, 1, 8, "none", scale=0.5)[0, 0][0][0]
    assert small[2:6, 2:6].eq(255).all()
    assert int(small.sum()) == 16 * 255
    large = Pictures(white, 3, 8, "none", scale=2.0)[0, 0][0]
    assert large.shape == (3, 8, 8)
    assert large.eq(255).all()
    for epoch in range(9):  # a shift brings in whole black rows and columns, at most one each
        moved = Pictures(white, 1, 8, "shift")[epoch, 0][0][0]
        assert int(moved.sum()) // 255 in (64, 56, 49)


def test_a_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be read is skipped and counted, before training."""
    root = _folder(tmp_path / "images", {"cat": 12, "dog": 9})
    (root / "cat" / "torn.jpg").write_bytes((root / "cat" / "0.jpg").read_bytes()[:200])
    (root / "dog" / "empty.png").write_bytes(b"")
    (root / "dog" / "notes.txt").write_text("not an image")
    out = tmp_path / "run"
    summary = short_run(out, data=str(root), classes="", batch_size=8, image_size=10, epochs=1,
                        workers=2)  # fmt: skip
    loaded = data_module.load(Options(data=str(root)))
    assert len(loaded.train) + len(loaded.test) == 21
    assert summary["data"].endswith("test images, 2 classes, 2 unreadable files skipped")
    assert "skipped" in capsys.readouterr().out
    assert len((out / "skipped.txt").read_text().splitlines()) == 2
    assert checkpoint_of(out)["classes"] == ["cat", "dog"]
    assert checkpoint_of(out)["model"]["in_chans"] == 3
    # The number of worker processes changes nothing.
    again = tmp_path / "again"
    short_run(again, data=str(root), classes="", batch_size=8, image_size=10, epochs=1, workers=0)
    assert losses(again) == losses(out)


def test_a_folder_already_split(tmp_path: Path) -> None:
    _folder(tmp_path / "train", {"a": 3, "b": 4})
    _folder(tmp_path / "val", {"a": 2, "b": 1})
    loaded = data_module.load(Options(data=str(tmp_path)))
    assert (len(loaded.train), len(loaded.test)) == (7, 3)
    assert {p.source for p in loaded.test} == {str(p) for p in tmp_path.glob("val/*/*")}
    (tmp_path / "val" / "c").mkdir()
    with pytest.raises(TrainError, match="classes without training images: c"):
        data_module.load(Options(data=str(tmp_path)))


def test_a_file_that_breaks_later(tmp_path: Path) -> None:
    """It is not trained on, and counted; the run goes on."""
    root = _folder(tmp_path / "images", {"a": 10, "b": 10})
    for path in root.glob("a/[0-7].*"):
        path.write_bytes(path.read_bytes()[:60])
    image, label = Pictures([data_module.Picture(str(root / "a/0.jpg"), 1)], 3, 8, "none")[0, 0]
    assert label == IGNORED
    assert image.shape == (3, 8, 8)
    out = tmp_path / "run"
    short_run(out, data=str(root), classes="", check="none", batch_size=16, image_size=8, epochs=1)
    (row,) = (row for row in read_rows(out) if row["kind"] == "epoch")
    assert row["unreadable"] > 0
    assert math.isfinite(row["train_loss"])
    assert math.isfinite(row["test_loss"])


def test_nothing_to_train_on(tmp_path: Path) -> None:
    def error(**options: Any) -> str:
        with pytest.raises(TrainError) as caught:
            train({**SHORT, "classes": "", "out": str(tmp_path / "out"), **options})
        return str(caught.value)

    assert "expected 'digits' or a folder" in error(data=str(tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "for each class, found an empty folder" in error(data=str(empty))
    loose = _folder(tmp_path / "loose", {"all": 3}) / "all"
    assert "3 images that are in no class's folder" in error(data=str(loose))
    assert "at least two classes, got all" in error(data=str(tmp_path / "loose"))
    (tmp_path / "loose" / "none").mkdir()
    assert "no training images of class none" in error(data=str(tmp_path / "loose"))
    corrupt = _folder(tmp_path / "corrupt", {"a": 2, "b": 2})
    for path in corrupt.glob("*/*"):
        path.write_bytes(b"broken")
    assert "no training images; 4 files could not be read" in error(data=str(corrupt))
    (tmp_path / "split" / "train").mkdir(parents=True)
    assert "has train but none of val, valid" in error(data=str(tmp_path / "split"))
    assert "at least two classes, got 3" in error(classes="3")
    assert "expected different ones of 0, 1" in error(classes="3,x")
    assert not (tmp_path / "out" / "last.pt").exists()


def test_where_a_file_goes_depends_on_its_name_alone(tmp_path: Path) -> None:
    """A file that comes, goes or breaks does not move training images into the test."""
    root = _folder(tmp_path / "images", {"a": 30, "b": 30})

    def names(part: str) -> set[str]:
        pictures = getattr(data_module.load(Options(data=str(root))), part)
        return {"/".join(str(p.source).rsplit("/", 2)[1:]) for p in pictures}

    train_before, test_before = names("train"), names("test")
    assert 4 <= len(test_before) <= 24
    assert not train_before & test_before
    gone, broken = min(train_before), min(test_before)
    (root / gone).unlink()
    (root / broken).write_bytes(b"broken")
    (root / "b" / "new.png").write_bytes((root / "b" / "29.png").read_bytes())
    assert names("train") - {"b/new.png"} == train_before - {gone}
    assert names("test") - {"b/new.png"} == test_before - {broken}


def test_which_folder_is_tested_on(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        _folder(tmp_path / "both" / name, {"a": 2, "b": 2})
    loaded = data_module.load(Options(data=str(tmp_path / "both")))
    assert "tested on val" in str(loaded)
    assert all("/val/" in str(p.source) for p in loaded.test)
    _folder(tmp_path / "odd", {"test": 2, "rose": 2})
    with pytest.raises(TrainError, match="has test but no train beside it"):
        data_module.load(Options(data=str(tmp_path / "odd")))


def test_names_that_are_not_text(tmp_path: Path) -> None:
    root = os.fsencode(_folder(tmp_path / "images", {"a": 12, "b": 12}))
    try:
        os.rename(root + b"/a/0.jpg", root + b"/a/\xff\xfe.jpg")
        with open(root + b"/b/\xe9.png", "wb") as file:
            file.write(b"broken")
    except OSError:
        pytest.skip("this file system has no such names")
    out = tmp_path / "run"
    summary = short_run(out, data=os.fsdecode(root), classes="", batch_size=8, image_size=8)
    assert summary["skipped"] == 1
    assert "\\udce9.png" in (out / "skipped.txt").read_text(encoding="utf-8")
    assert short_run(out, resume=str(out))["complete"]


def test_images_of_16_bits(tmp_path: Path) -> None:
    from PIL import Image

    values = [0, 256 * 50, 256 * 100, 65535]
    grey = Image.frombytes("I;16", (2, 2), b"".join(v.to_bytes(2, "little") for v in values))
    grey.save(tmp_path / "deep.png")
    pictures = [data_module.Picture(str(tmp_path / "deep.png"), 0)]
    for channels in (1, 3):
        image, label = Pictures(pictures, channels, 2, "none")[0, 0]
        assert label == 0
        assert image[-1].flatten().tolist() == [0, 50, 100, 255]
    Image.new("F", (2, 2)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="floating-point"):
        data_module.open_image(tmp_path / "float.tiff", "L")


# -- other errors before training


def test_overwriting_waits_until_nothing_can_go_wrong(tmp_path: Path) -> None:
    short_run(tmp_path, epochs=1)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "skipped.txt").write_text("old")
    before = (tmp_path / "last.pt").read_bytes()
    wrong: list[dict[str, Any]] = [
        {"model": "se_resnet21"}, {"data": "nowhere"}, {"init_from": str(tmp_path / "metrics.csv")},
        {"backend": "triton"}, {"freeze": "se", "model": "resnet8"},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(TrainError):
            short_run(tmp_path, overwrite=True, **options)
        assert (tmp_path / "last.pt").read_bytes() == before
    # Its own weights can be the start of what replaces it.
    short_run(tmp_path, overwrite=True, init_from=str(tmp_path), epochs=1, lr=0.0)
    assert (tmp_path / "last.pt").read_bytes() != before
    assert not (tmp_path / "skipped.txt").exists()
    assert not (tmp_path / "tensorboard").exists()


def test_cheap_errors_come_before_the_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "load", lambda options: pytest.fail("images were read"))
    for options, message in (
        ({"model": "se_resnet21"}, "--model"),
        ({"model": "resnet8", "freeze": "se"}, "no squeeze-and-excitation weights"),
        ({"model": "resnet8", "stages": "none:1,se:1"}, "no squeeze-and-excitation weights"),
        ({"init_from": "nowhere.pt"}, "there is no nowhere.pt"),
    ):
        with pytest.raises(TrainError, match=message):
            short_run(tmp_path, **options)


def test_model_arguments_given_twice_add_up() -> None:
    given = parse(["--model-args", "reduction=4", "--model-args", "formula=weighted", "pool=pad"])
    assert given.given == {"model_args": "reduction=4 formula=weighted pool=pad"}


def test_paths_are_taken_as_such(tmp_path: Path) -> None:
    assert train({**SHORT, "out": tmp_path / "run", "stop_after": 1})["steps"] == 1


def test_evaluating_on_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short_run(tmp_path, epochs=1)
    assert evaluate({"init_from": str(tmp_path)})["same_images"] is True
    with pytest.raises(TrainError, match="tell 0, 1, 2, 3 apart, the data have 1, 0, 2, 3"):
        evaluate({"init_from": str(tmp_path), "classes": "1,0,2,3"})
    capsys.readouterr()
    assert evaluate({"init_from": str(tmp_path), "test_fraction": 0.5})["same_images"] is False
    assert "some may have been trained on" in capsys.readouterr().err


def test_evaluating_what_others_saved(tmp_path: Path) -> None:
    """Their words for the rest of a checkpoint mean something else."""
    weights = create_model("se_resnet8", 4, 1).state_dict()
    torch.save({"model": weights, "classes": 4, "options": [1], "data": "d"}, tmp_path / "w.pt")
    given = {"model": "se_resnet8", "classes": "0,1,2,3", "init_from": str(tmp_path / "w.pt")}
    assert evaluate(given)["same_images"] is None


@pytest.mark.parametrize(("failure", "message"), [
    (RuntimeError("CUDA out of memory. Tried"), "out of memory: expected a smaller --batch-size"),
    (RuntimeError("can't allocate memory: you"), "out of memory: expected a smaller --batch-size"),
    (PermissionError(13, "Permission denied", "flowers"), "flowers: Permission denied"),
])  # fmt: skip
def test_failures_that_the_user_can_put_right(
    failure: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(data_module, "load", fail)
    assert main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_batch_without_a_readable_image_moves_nothing() -> None:
    torch.manual_seed(0)
    model = create_model("se_resnet8", 4, 1)
    processes = Processes(0, 1, "none", torch.device("cpu"))
    options = Options(weight_decay=0.0)
    learner = Learner(model, Stage("none", 1, 0.1), options, processes, ((0.5,), (0.5,)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    labels = torch.full((4,), IGNORED)
    loss, _ = learner.step(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), labels, 0.1)
    assert loss == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match=r"--out: .*/run cannot be written to: Not a directory"):
        short_run(tmp_path / "file" / "run")
    if os.geteuid():  # root may write anywhere
        (tmp_path / "sealed").mkdir(mode=0o500)
        with pytest.raises(TrainError, match="cannot be written to: Permission denied"):
            short_run(tmp_path / "sealed" / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "se_resnet21"}, "--model, --model-args: name: expected one of"),
        ({"model_args": "excitation=triple"}, "excitation: expected one of two, single, tied"),
        ({"model_args": "width=3"}, "unexpected keyword argument 'width'"),
        ({"model_args": "num_classes=7"}, "num_classes=7, but the data have 4"),
        ({"model": "resnet8", "freeze": "se"}, "has no squeeze-and-excitation weights"),
        ({"parallel": "ddp"}, "start it with torchrun"),
        ({"device": "cuda:99"}, "'cuda:99' is not here"),
        ({"device": "tpu"}, "--device: expected auto, cpu"),
        ({"backend": "foo"}, "--backend: expected one of auto, native"),
        ({"backend": "triton"}, "--backend: backend='triton' was asked for and cannot run"),
        ({"warmup_epochs": float("inf")}, "--warmup-epochs: expected at least 0, got inf"),
        ({"lr": float("nan")}, "--lr: expected 0 to"),
        ({"learning_rate": 0.1}, "there is no option 'learning_rate'"),
        ({"epoch": 3}, r"there is no option 'epoch', did you mean epochs or step_epochs\?"),
        ({"epochs": "3"}, "--epochs: expected int, got str"),
        ({"epochs": True}, "--epochs: expected int, got bool"),
        ({"batch_size": 1, "image_size": 2}, "expected at least 2 images per process"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=message):
        short_run(tmp_path / "run", **options)


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_loss_that_is_not_finite_ends_the_run(log_every: int, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"the loss is (nan|inf) at step .* smaller --lr"):
        short_run(tmp_path, lr=1e6, warmup_epochs=0.0, label_smoothing=0.0, epochs=3,
                  log_every=log_every)  # fmt: skip
    weights = checkpoint_of(tmp_path)["weights"]
    assert all(value.isfinite().all() for value in weights.values())


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_run(tmp_path, epochs=1)
    before = (tmp_path / "last.pt").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainError, match=r"cannot be written: .*No space left"):
        checkpoint.save(tmp_path / "last.pt", {})
    assert (tmp_path / "last.pt").read_bytes() == before


# -- weights from elsewhere


def test_init_from_replaces_a_classifier_of_another_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short_run(tmp_path / "four", epochs=1)
    saved = checkpoint_of(tmp_path / "four")["weights"]
    start = {"init_from": str(tmp_path / "four"), "lr": 0.0, "epochs": 1}
    short_run(tmp_path / "two", classes="8,9", freeze="backbone", **start)
    assert "classifier replaced: 4 classes" in capsys.readouterr().out
    got = checkpoint_of(tmp_path / "two")["weights"]
    assert got["fc.weight"].shape[0] == 2
    for name, value in saved.items():
        assert name.startswith("fc.") or torch.equal(got[name], value), name
    short_run(tmp_path / "same", freeze="backbone", **start)
    assert "classifier replaced" not in capsys.readouterr().out
    assert torch.equal(checkpoint_of(tmp_path / "same")["weights"]["fc.weight"], saved["fc.weight"])
    # A plain network's weights start the weighted form, in which alpha and beta are new.
    short_run(tmp_path / "weighted", model_args="formula=weighted", freeze="backbone", **start)
    assert "6 alpha and beta are not in" in capsys.readouterr().out


def test_init_from_refuses_another_model(tmp_path: Path) -> None:
    plain = tmp_path / "plain.pt"
    torch.save(create_model("resnet8", 4, 1).state_dict(), plain)
    with pytest.raises(TrainError, match=r"not this model's weights \(12 differences\): lacks"):
        short_run(tmp_path / "a", init_from=str(plain))
    torch.save(create_model("se_resnet8", 4, 3).state_dict(), plain)
    with pytest.raises(TrainError, match=r"size mismatch for conv1\.weight"):
        short_run(tmp_path / "b", init_from=str(plain))
    for content, message in (
        (b"", "not a readable checkpoint"),
        (b"\x80\x02cos\nsystem\n.", "not a readable checkpoint: not tensors and plain values"),
        (b"hi", "not a readable checkpoint: KeyError: 105"),
    ):
        plain.write_bytes(content)
        with pytest.raises(TrainError, match=message):
            short_run(tmp_path / "c", init_from=str(plain))
    weights = create_model("se_resnet8", 4, 1).state_dict()
    lacking = {name: value for name, value in weights.items() if name != "fc.weight"}
    for foreign, message in (
        (lacking, r"\(1 differences\): lacks fc\.weight"),
        ({**weights, "fc.weight": torch.tensor(1.0)}, r"size mismatch for fc\.weight"),
        ({**weights, 7: torch.zeros(1)}, r"\(1 differences\): has unknown 7"),
    ):
        torch.save(foreign, plain)
        with pytest.raises(TrainError, match=message):
            short_run(tmp_path / "c", init_from=str(plain))
    torch.save({"epoch": 3}, plain)
    with pytest.raises(TrainError, match="no weights in it"):
        short_run(tmp_path / "d", init_from=str(plain))
    with pytest.raises(TrainError, match=r"--init-from: there is no .*nothing\.pt"):
        short_run(tmp_path / "e", init_from=str(tmp_path / "nothing.pt"))


def test_init_from_refuses_other_geometry(tmp_path: Path) -> None:
    """The weights would fit; what the checkpoint says of its network does not."""
    short_run(tmp_path / "small", epochs=1, stop_after=1)
    state = checkpoint_of(tmp_path / "small")
    for name, value in (("stride_in_1x1", True), ("pool", "ceil")):
        torch.save({**state, "model": {**state["model"], name: value}}, tmp_path / "other.pt")
        with pytest.raises(TrainError, match=f"{name}={value}.* would fit and be wrong"):
            short_run(tmp_path / "run", init_from=str(tmp_path / "other.pt"), epochs=1)


def test_init_from_other_wrappings(tmp_path: Path) -> None:
    """DDP's prefix, a checkpoint dictionary of others, timm's legacy names."""
    theirs = create_model("se_resnet8", 4, 1).state_dict()
    for wrapped in (
        {"state_dict": {f"module.{name}": value for name, value in theirs.items()}, "epoch": 1},
        {f"_orig_mod.module.{name}": value for name, value in theirs.items()},
    ):
        torch.save(wrapped, tmp_path / "w.pt")
        short_run(tmp_path, init_from=str(tmp_path / "w.pt"), epochs=1, lr=0.0, freeze="backbone",
                  overwrite=True)  # fmt: skip
        got = checkpoint_of(tmp_path)["weights"]
        assert all(torch.equal(got[name], value) for name, value in theirs.items())


@pytest.mark.slow
def test_help_in_a_fresh_process() -> None:
    """The command line starts without the optional packages."""
    block = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('sklearn', 'PIL', 'matplotlib', 'tqdm'):\n"
        "            raise ImportError(name + ' is blocked')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from senet_kernels.train.__main__ import main\n"
        "main(['--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "--label-smoothing" in done.stdout
