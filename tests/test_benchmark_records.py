"""Records of the benchmark suite, what follows from them, and what people read."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    digest,
    page,
    problem,
    readme,
    records,
    regimes,
    stats,
    summary,
    targets,
    workloads,
)
from benchmarks.sweep import thinned

ROOT = Path(__file__).resolve().parent.parent

# -- statistics and summaries ----------------------------------------------------------------------


def test_statistics() -> None:
    found = stats.summarise([3e-6, 1e-6, 2e-6, 5e-6, 4e-6])
    assert found["median_us"] == pytest.approx(3)
    assert (found["q1_us"], found["q3_us"]) == (pytest.approx(2), pytest.approx(4))
    assert found["ci_low_us"] <= 3 <= found["ci_high_us"]
    twice = stats.speedup([2.0, 2.2, 1.8] * 5, [1.0, 1.1, 0.9] * 5)
    assert twice["ratio"] == pytest.approx(2)
    assert twice["ci_low"] <= 2 <= twice["ci_high"]


def _point(**times: float) -> dict[str, Any]:
    return {"providers": {n: {"status": "ok", "wall": {"median_us": t}} for n, t in times.items()}}


def test_crossovers() -> None:
    points = [(1, _point(a=1, b=4)), (4, _point(a=4, b=4.05)), (16, _point(a=16, b=4))]
    (found,) = summary.crossovers(points, ["a", "b"], "wall")
    assert (found.before, found.after) == ("a", "b")
    assert 4 < found.at < 5
    # Within the margin nobody leads.
    level = [(1, _point(a=1.00, b=1.01)), (2, _point(a=1.01, b=1.00))]
    assert summary.crossovers(level, ["a", "b"], "wall") == []
    # Symmetric on logarithmic scales: half way.
    even = [(2, _point(a=1, b=2)), (8, _point(a=2, b=1))]
    assert summary.crossovers(even, ["a", "b"], "wall")[0].at == pytest.approx(4)


def test_price() -> None:
    over = {"fused": {"no-se": {"ratio": 0.8, "ci_low": 0.5, "ci_high": 1.0}},
            "no-se": {"original": {"ratio": 1.5, "ci_low": 1.2, "ci_high": 2.0}}}  # fmt: skip
    entry = {"speedup": {"wall": over}}
    assert summary.price(entry, "wall", "fused") == pytest.approx((25, 0, 100))
    assert summary.price(entry, "wall", "original") == pytest.approx((50, 20, 100))
    assert summary.price(entry, "wall", "neighbours") is None


@pytest.mark.parametrize(
    ("megabytes", "environment", "expected"),
    [
        (2, {"device": "H200", "l2_bytes": 50 << 20}, "latency"),
        (40, {"device": "H200", "l2_bytes": 50 << 20}, "cache"),
        (100, {"device": "H200", "l2_bytes": 50 << 20}, "mixed"),
        (200, {"device": "H200", "l2_bytes": 50 << 20}, "memory"),
        (1, {"device": "cpu", "caches": {"core": 1 << 20, "last": 32 << 20}}, "latency"),
        (12, {"device": "cpu", "caches": {"core": 1 << 20, "last": 32 << 20}}, "cache"),
        (30, {"device": "cpu", "caches": {"core": 1 << 20, "last": 32 << 20}}, "mixed"),
        (33, {"device": "cpu", "caches": {"core": 1 << 20, "last": 32 << 20}}, "memory"),
        (33, {"device": "cpu", "caches": None}, None),
    ],
)
def test_regimes(megabytes: int, environment: dict[str, Any], expected: str | None) -> None:
    assert regimes.regime(megabytes << 20, environment) == expected


_PLAN = "cluster of 8 blocks per image, 256 threads and 98 KB each, "


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (_PLAN + "2 blocks per multiprocessor, single pass", regimes.TWO_FIT),
        (_PLAN + "1 block per multiprocessor, single pass, next image prefetched", regimes.TWO_FIT),
        (_PLAN + "1 block per multiprocessor, single pass, weights kept", regimes.ONE_FITS),
        (_PLAN + "2 blocks per multiprocessor, two passes", regimes.REREAD),
        ("one launch over images, 1 on chip per program", None),
        (None, None),
    ],
)
def test_classes_of_the_memory_regime(plan: str | None, expected: str | None) -> None:
    assert regimes.memory_class(plan) == expected


def _on_gpu(**more: Any) -> dict[str, Any]:
    """A record of two layers as a GPU might give: one in memory, one single small image."""

    def entry(mode: str, batch: int, size: int, us: float, ratio: float) -> dict[str, Any]:
        figure = {"ratio": ratio, "ci_low": ratio, "ci_high": ratio}
        native = {"status": "ok", "device": {"median_us": us, "over_limit": 1.0 / 0.91},
                  "plan": _PLAN + "2 blocks per multiprocessor, single pass",
                  "launches": {"kernels": 1 if mode == "forward" else 3, "copies": 0}}  # fmt: skip
        over = {"eager-conv": figure, "compile-max": figure}
        return {"layer": "64x8x8-r4-relu-sigmoid", "before": None, "after": None, "add": False,
                "dtype": "bf16", "layout": "contiguous", "batch": batch, "mode": mode,
                "bytes": size, "providers": {"native": native},
                "speedup": {"device": {"native": over}}}  # fmt: skip

    host = {
        "mode": "forward",
        "providers": {"native": {"status": "ok", "host": {"median_us": 4.0}}},
    }
    return {
        "kind": "layers", "providers": ["native"], "contenders": ["native"], "neighbours": False,
        "environment": {"device": "A card", "torch": "2", "l2_bytes": 50 << 20},
        "results": [
            entry("forward", 256, 400 << 20, 100.0, 3.2),
            entry("backward", 256, 400 << 20, 150.0, 1.0),
            entry("forward", 1, 8192, 5.5, 3.2), entry("backward", 1, 8192, 9.0, 0.9),
        ],
        "small_call": [host], **more,
    }  # fmt: skip


def _met(*found: dict[str, Any]) -> dict[str, str]:
    lines = targets.Targets(found).lines()
    return {line.what: line.met for line in lines if line.contender == "native" and line.wanted}


def test_targets() -> None:
    met = _met(_on_gpu())
    two = regimes.TITLES[regimes.TWO_FIT].removeprefix("... ")
    expected = {
        f"forward, share of clone's speed, {two}": "no",  # 91 % where 92 % are wanted
        f"backward, share of clone's speed, {two}": "so far",  # 91 % where 90 % are, of one layer
        "forward, geometric mean over eager-conv": "so far",
        "backward, geometric mean over compile-max": "no",
        "slower than compile-max by more than 5 %": "so far",  # backward alone is not asked about
        "batch 1, forward: launches": "so far",
        "batch 1, backward: launches": "no",
        "batch 1, forward, images up to 1 MB: time in a CUDA graph": "no",
        "host time of a call without grad": "yes",
        "host time of a call with grad": "not measured",
        "forward, geometric mean over eager-linear": "not measured",
    }
    assert {what: met[what] for what in expected} == expected
    text = targets.text([_on_gpu()])
    assert text.endswith("1 of 27 targets met, 6 so far, 4 missed, 16 not measured\n")
    assert "- native vs compile-max 0.90× [0.90, 0.90]: 64x8x8 bf16 b1 NCHW backward" in text


def test_targets_of_a_cpu() -> None:
    """Whatever the figures are."""
    met = _met(_on_gpu(environment={"device": "cpu", "torch": "2", "caches": {"last": 1 << 20}}))
    assert set(met.values()) == {"not measured", "not on a GPU"}
    text = targets.text([_on_gpu(environment={"device": "cpu", "torch": "2"})])
    last = text.splitlines()[-1]
    assert last == "0 of 27 targets met, 0 so far, 0 missed, 18 not measured, 9 not on a GPU"


def test_targets_need_a_record_of_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert targets.main(["nowhere.json"]) == 2
    path = next(p for p in COMMITTED if records.read(p)["kind"] != "layers")
    assert targets.main([str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(f"{path.name}: expected a record of layers\n")
    assert not targets.Targets([]).on_gpu


@functools.cache
def _every_case() -> str:
    """A record of all layers, types, layouts and both batches, forward, each as fast as wanted."""
    (one, *_) = _on_gpu()["results"]
    entries = []
    for layer in {layer for n in workloads.load_networks().values() for layer, _ in n.layers}:
        for dtype in problem.DTYPES:
            for layout in problem.LAYOUTS:
                for batch in targets.BATCHES:
                    case = problem.Case(layer, dtype, layout, batch)
                    named = {"layer": layer.name, "dtype": dtype, "layout": layout, "batch": batch}
                    native = one["providers"]["native"]
                    device = {"median_us": 4.0, "over_limit": 1.0}
                    entries.append(one | named | {
                        "bytes": case.bytes, "providers": {"native": native | {"device": device}},
                    })  # fmt: skip
    return json.dumps(_on_gpu(results=entries))


@pytest.mark.parametrize("lacking", ["", "large", "plan", "figure", "single", "launches"])
def test_a_target_is_met_by_all_cases(lacking: str) -> None:
    record = json.loads(_every_case())
    results = record["results"]
    large = next(e for e in results if e["batch"] == 256 and e["bytes"] > 150 << 20)
    single = next(e for e in results if e["batch"] == 1 and e["bytes"] <= targets.SMALL_IMAGE)
    if lacking in ("large", "single"):
        results.remove({"large": large, "single": single}[lacking])
    elif lacking == "plan":
        del large["providers"]["native"]["plan"]
    elif lacking == "figure":
        del large["providers"]["native"]["device"]["over_limit"]
    elif lacking == "launches":
        del single["providers"]["native"]["launches"]
    met = _met(record)
    two = regimes.TITLES[regimes.TWO_FIT].removeprefix("... ")
    short = {
        f"forward, share of clone's speed, {two}": ("large", "plan", "figure"),
        "batch 1, forward: launches": ("single", "launches"),
        "batch 1, forward, images up to 1 MB: time in a CUDA graph": ("single",),
    }
    expected = {what: "so far" if lacking in names else "yes" for what, names in short.items()}
    assert {what: met[what] for what in expected} == expected


def test_a_case_measured_twice_counts_once() -> None:
    first, again = _on_gpu(), _on_gpu()
    for entry in again["results"]:
        entry["providers"]["native"]["launches"]["kernels"] = 1
    lines = {line.what: line for line in targets.Targets([first, again]).lines()}
    launches = lines["batch 1, backward: launches"]
    assert (launches.met, launches.measured) == ("so far", "1 of 528")
    again["small_call"][0]["providers"]["native"]["host"]["median_us"] = 6.0
    assert _met(first, again)["host time of a call without grad"] == "no"
    assert _met(again, first)["host time of a call without grad"] == "yes"


def test_host_time_has_a_line() -> None:
    alone = _on_gpu(results=[])
    assert [title for title, _ in digest.blocks(alone)] == ["one small call"]
    (found,) = (row for row in digest.small_call(_on_gpu()) if row[0].endswith("host"))
    assert found == ["forward, host", "4.0 µs"]


def test_classes_are_rows_of_the_summary() -> None:
    found = {row.network: row for row in summary.regime_rows(_on_gpu(), "forward")}
    assert set(found) == {regimes.LATENCY, regimes.MEMORY, regimes.TWO_FIT}


def test_thinned() -> None:
    assert thinned((1, 2, 4, 8, 16), 0) == (1, 2, 4, 8, 16)
    assert thinned((1, 2, 4, 8, 16), 3) == (1, 4, 16)
    assert thinned((1, 2, 4, 8, 16), 1) == (1,)


# -- records ---------------------------------------------------------------------------------------


COMMITTED = page.committed()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_records(path: Path) -> None:
    record = records.read(path)
    assert record["environment"]["commit"]
    assert not record["environment"]["uncommitted_changes"]
    assert record["status"] == "complete"
    assert records.dumps(record) == path.read_text()
    rows = list(records.rows(record))
    assert len(rows) >= len(record["results"])
    assert len({tuple(row) for row in rows}) == 1  # the columns


def test_schema_refuses(tmp_path: Path) -> None:
    record = records.read(COMMITTED[0])
    entry = record["results"][0]
    name = next(iter(entry["providers"]))

    def fails(change: Callable[[dict[str, Any]], Any], place: str) -> None:
        broken = json.loads(json.dumps(record))
        change(broken)
        with pytest.raises(records.InvalidRecord, match=place):
            records.validate(broken)

    fails(lambda r: r.pop("command"), "'command' is missing")
    fails(lambda r: r.update(kind="dreams"), "record.kind: expected one of")
    fails(lambda r: r.update(surprise=1), "unexpected 'surprise'")
    fails(lambda r: r["results"][0].update(batch=True), r"results\[0\].batch: expected integer")
    fails(lambda r: r["results"][0].update(batch=0), "expected at least 1, got 0")
    fails(lambda r: r["results"][0].pop("bytes"), "'bytes' is missing")
    fails(lambda r: r["results"][0]["providers"][name].update(status="fine"), "status: expected")
    with pytest.raises(records.InvalidRecord, match="expected object"):
        records.validate([])
    (tmp_path / "torn.json").write_text('{"schema": ')
    with pytest.raises(records.InvalidRecord, match=r"torn.json: not JSON"):
        records.read(tmp_path / "torn.json")


def test_schema_is_json_schema() -> None:
    """Our validator and jsonschema's, where that is installed, are of one mind."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(records.SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for path in COMMITTED:
        jsonschema.validate(json.loads(path.read_text()), schema)


def test_numbers_in_a_record() -> None:
    text = records.dumps({"a": [{"b": 1.23456789e-7, "c": math.inf}, {"d": 12}], "e": "µ"})
    assert json.loads(text) == {"a": [{"b": 1.2346e-07, "c": None}, {"d": 12}], "e": "µ"}
    assert len(text.splitlines()) == 7


# -- what people read ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", readme.documents(), ids=lambda path: path.name)
def test_figures_are_those_of_the_records(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert readme.renewed(text, path.parent) == text, "run python -m benchmarks.readme"


def test_images_of_the_pages_have_a_record() -> None:
    for path in readme.documents():
        for image in re.findall(r"!\[[^\]]*\]\(([^)]*results/[^)]*)\)", path.read_text("utf-8")):
            stem = re.sub(r"-(roofline|price|training|backward)$", "", Path(image).stem)
            assert (path.parent / image).is_file()
            assert (path.parent / image).with_name(f"{stem}.json").is_file()


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, ("Whole networks", "Forward", "median", "Zen 4 or 5")),
     (1, ("forward", "threads", "| network |", "Speed-up")),
     (2, ("forward", "threads", "| layers |", "Speed-up"))],
)  # fmt: skip
def test_a_block_in_chinese_has_the_same_figures(number: int, words: tuple[str, ...]) -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")]
    english, chinese = (
        text.split("<!-- benchmark:begin ")[1 + number].split("-->", 1)[1].split("<!--")[0]
        for text in texts
    )
    figures = r"\d+(?:\.\d+)?×?"
    assert re.findall(figures, english) == re.findall(figures, chinese)
    assert set(re.findall(r"[a-z]{3,}", chinese)) < set(re.findall(r"[a-z]{3,}", english))
    for word in words:
        assert word in english
        assert word not in chinese


def test_readme_mistakes() -> None:
    with pytest.raises(ValueError, match="expected a block"):
        readme.renewed("nothing", ROOT)
    record = COMMITTED[0].relative_to(ROOT).as_posix()
    text = f"<!-- benchmark:begin everything {record} -->\n<!-- benchmark:end -->"
    with pytest.raises(ValueError, match="expected one of layers"):
        readme.renewed(text, ROOT)


def test_page_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / f"{COMMITTED[0].stem}.png"
    image.write_bytes(b"\x89PNG")
    monkeypatch.setattr("benchmarks.plots.draw", lambda record, path: [image])
    record = records.read(COMMITTED[0])
    record["environment"]["cpu"] = "<b>&"
    text = page.render([(COMMITTED[0], record)], tmp_path)
    assert "data:image/png;base64,iVBORw" in text
    assert "http" not in text.replace("https://", "")
    assert "&lt;b&gt;&amp;" in text
    assert record["command"] in text
    for _, lines in digest.blocks(record):
        assert all(f"<td>{c.strip('*').replace('`', '')}</td>" in text for c in lines[1][:1])
