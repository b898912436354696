"""Plots of records and of training: what a reader finds in them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.image import imread

from benchmarks import page, plots, processors, records, summary, verdict
from senet_kernels.train import plots as curves


@functools.cache
def _read(name: str) -> dict[str, Any]:
    return records.read(next(p for p in page.committed() if p.name == name))


def record(name: str) -> dict[str, Any]:
    return copy.deepcopy(_read(name))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """Those that are saved, as they are then."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: found.append(self))
    yield found
    import matplotlib.pyplot as plt

    plt.close("all")


def _title_fits(figure: Figure) -> None:
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()  # type: ignore[attr-defined]
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


@pytest.mark.parametrize(("cpu", "more", "expected"), [
    ("AMD EPYC (family 25, model 1)", {}, "AMD EPYC, Zen 3"),
    ("AMD EPYC (family 25, model 17)", {}, "AMD EPYC, Zen 4"),
    ("AMD EPYC 9845 160-Core Processor (family 26, model 17)", {}, "AMD EPYC 9845 160-Core, Zen 5"),
    ("AMD Ryzen 9 5950X (family 25, model 33)", {}, "AMD Ryzen 9 5950X, Zen 3"),
    ("AMD EPYC (family 23, model 49)", {}, "AMD EPYC, Zen 2"),
    ("AMD EPYC", {}, "AMD EPYC"),
    ("AMD EPYC", {"cpu_capability": "AVX512", "caches": {"core": 1 << 20}}, "AMD EPYC, Zen 4 or 5"),
    ("AMD EPYC", {"cpu_capability": "AVX2", "caches": {"core": 1 << 19}}, "AMD EPYC"),
    ("Intel(R) Xeon(R) Processor (family 6, model 207)", {}, "Intel Xeon, Emerald Rapids"),
    ("Intel(R) Xeon(R) Processor (family 6, model 999)", {}, "Intel Xeon (family 6, model 999)"),
    ("aarch64", {}, "aarch64"),
])  # fmt: skip
def test_names_of_processors(cpu: str, more: dict[str, Any], expected: str) -> None:
    assert processors.name({"cpu": cpu, **more}) == expected


def test_layers_have_one_range_and_values_on_top(figures: list[Figure]) -> None:
    drawn = record("cpu-2-cores-layers.json")
    first = drawn["networks"][0]
    names = {layer["layer"] for layer in first["layers"]}
    drawn["networks"] = [first]
    drawn["results"] = [e for e in drawn["results"] if e["layer"] in names]
    assert plots.bars.draw(drawn, Path("one.png"))
    (figure,) = figures
    assert len({axis.get_ylim() for axis in figure.axes}) == 1
    for axis in figure.axes:
        bars = axis.patches
        values = [text for text in axis.texts if text.get_text()[:1].isdigit()]
        assert [text.get_text() for text in values] == [f"{bar.get_height():.1f}" for bar in bars]
        assert all(t.xy[1] >= b.get_height() for t, b in zip(values, bars, strict=True))  # type: ignore[attr-defined]
    title = figure._suptitle.get_text()  # type: ignore[attr-defined]
    assert "seresnet50" in title
    assert "AMD EPYC, Zen 3, 2 threads" in title
    _title_fits(figure)


def test_roofline_names_its_regimes(figures: list[Figure]) -> None:
    assert plots.roofline.draw(record("cpu-2-cores-layers.json"), Path("roof.png"))
    (figure,) = figures
    assert figure.axes[0].get_ylabel() == "effective bandwidth, GB/s"
    for axis in figure.axes:
        shown = [text.get_text() for text in axis.texts]
        assert shown == ["latency", "cache", "mixed", "memory"]
    figure.draw_without_rendering()
    assert "10" in [label.get_text() for label in figure.axes[0].get_yticklabels()]


@pytest.mark.parametrize("mode", ["forward", "forward+backward", "backward"])
def test_sweep_is_relative_to_eager(mode: str, figures: list[Figure]) -> None:
    drawn = record("cpu-2-cores-sweep.json")
    assert plots.sweep.draw(drawn, Path("sweep.png"), mode) is (mode != "backward")
    for figure in figures:
        assert len(figure.axes) == 4
        labels = [axis.get_xlabel().partition(":")[0] for axis in figure.axes]
        assert labels == ["batch", "channels", "positions", "hidden channels"]
        assert figure.axes[0].get_ylabel() == "speed-up over eager-conv"
        (legend,) = figure.legends
        assert "native, NHWC" in [text.get_text() for text in legend.get_texts()]
        assert "eager-conv" not in str([text.get_text() for text in legend.get_texts()])
        _title_fits(figure)
    if figures:
        points = summary.sweep_points(drawn, "batch", mode, "fp32", "contiguous")
        expected = [e["speedup"]["wall"]["native"]["eager-conv"]["ratio"] for _, e in points]
        every = [list(line.get_ydata()) for line in figures[0].axes[0].lines]
        assert any(got == pytest.approx(expected, rel=1e-2) for got in every)


def test_the_price_of_se_has_intervals_and_says_where_they_go_on(figures: list[Figure]) -> None:
    drawn = record("cpu-2-cores-models.json")
    assert plots.models.draw_price(drawn, Path("price.png"))
    (figure,) = figures
    low, high = figure.axes[0].get_xlim()
    for axis in figure.axes:
        marks = [line.get_marker() for line in axis.lines]
        assert marks.count("o") == 21  # seven networks, three variants
        ends = [line.get_xdata() for line in axis.lines if len(line.get_xdata()) == 2]
        beyond = [pair for pair in ends if pair[0] < low or pair[1] > high]
        assert marks.count("<") + marks.count(">") >= len(beyond) > 0
    _title_fits(figure)


def test_curves_of_a_run(figures: list[Figure], tmp_path: Path) -> None:
    options = {"model": "se_resnet20", "precision": "fp32", "label_smoothing": 0.1}
    rows: list[dict[str, Any]] = [
        {"kind": "run", "data": "digits", "batch": 64, "options": {**options, "augment": "auto"}}
    ]
    for epoch, accuracy in enumerate((0.5, 0.9, 0.9, 0.8), 1):
        rows.append({
            "kind": "epoch", "epoch": epoch, "stage": epoch // 3, "lr": 0.1, "train_loss": 1.0,
            "test_loss": 0.5, "train_accuracy": accuracy, "test_accuracy": accuracy,
        })  # fmt: skip
    monkey = pytest.MonkeyPatch()
    monkey.setattr(curves.os, "replace", lambda *_: None)
    assert curves.draw(rows, tmp_path / "curves.png")
    monkey.undo()
    (figure,) = figures
    loss, accuracy_axis, rate = figure.axes
    shown = [[t.get_text() for t in a.get_legend().get_texts()] for a in (loss, accuracy_axis)]  # type: ignore[union-attr]
    assert shown[0] == ["train (label smoothing, augmented)", "test"]
    assert shown[1] == ["train (augmented)", "test", "best: 90.0 % (epoch 2)"]  # the first of two
    assert accuracy_axis.get_ylabel() == "accuracy, %"
    assert max(accuracy_axis.lines[1].get_ydata()) == 90
    assert figure._suptitle.get_text() == "se_resnet20, digits, batch 64, fp32"  # type: ignore[attr-defined]
    assert all(float(tick).is_integer() for tick in rate.get_xticks())
    assert not curves.draw(rows[:1], tmp_path / "none.png")


@pytest.mark.parametrize("path", page.committed(), ids=lambda path: path.stem)
def test_pictures_of_committed_records(path: Path) -> None:
    """That they are there; not their bits, which are matplotlib's."""
    drawn = [
        path.with_name(f"{path.stem}{s}.png") for s, _ in plots.DRAWINGS[_read(path.name)["kind"]]
    ]
    there = [image for image in drawn if image.exists()]
    assert there
    for image in there:
        assert imread(image).shape[1] >= 900


def test_verdicts() -> None:
    said = verdict.verdict(record("cpu-2-cores-models.json"))
    assert said.startswith(
        "Forward: fused networks run at 1.08× the speed (1.00 to 1.14); what SE adds "
        "to the time of the network without it falls from 14 % to 6 % (median). "
    )
    assert verdict.verdict(record("cpu-2-cores-sweep.json")).endswith("at 58 of 58 points.")
    said = verdict.verdict(record("cpu-fallback-layers.json"))
    assert "Forward, bf16, 10 layers: the speed of fallback is 1.04× that of eager-conv" in said
    assert said.endswith("36 of 160 comparisons lost by more than 5 %.")
    assert verdict.verdict(record("cpu-2-cores-sweep.json") | {"results": []}) == "No result."
    with pytest.raises(ValueError, match="expected records of models, or of layers, got sweep"):
        verdict.results([record("cpu-2-cores-sweep.json")])
