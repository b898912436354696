"""Measured times beside computed ones, and the model fitted to them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tools.cost import calibrate
from tools.cost.beside import RECORD, Figure, beside, card_of, main, summary, table
from tools.cost.calibrate import Measured
from tools.cost.cards import CARDS, Card
from tools.cost.events import DEFAULT, Assumed
from tools.cost.pipes import Use
from tools.cost.price import Work, price

LAYER = "256x56x56-r16-relu-sigmoid"


def _entry(mode: str, times: dict[str, float], **more: Any) -> dict[str, Any]:
    return {
        "layer": LAYER, "layout": "contiguous", "mode": mode, "dtype": "bf16", "batch": 256,
        "bytes": 400 << 20, "limit_in_clones": 1.0 if mode == "forward" else 1.5,
        "providers": {n: {"status": "ok", "device": {"median_us": t}} for n, t in times.items()},
        **more,
    }  # fmt: skip


def _record(*results: dict[str, Any], device: str = "NVIDIA H200") -> dict[str, Any]:
    return {"environment": {"device": device}, "contenders": ["native", "triton"],
            "results": list(results)}  # fmt: skip


def test_cards_by_the_names_of_devices() -> None:
    for device, name in (
        ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA L4", "L4"),
        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA L40S", None), ("cpu", None), ("NVIDIA H200 MIG 1g.18gb", None),
    ):  # fmt: skip
        assert card_of(device, CARDS) == name


def test_measured_beside_computed() -> None:
    """Against the record of prices that is committed, whose row is looked up here by hand."""
    cost = json.loads(RECORD.read_text())
    row = next(
        r for r in cost["rows"]
        if (r["backend"], r["card"], r["layer"], r["layout"], r["direction"])
        == ("native", "H200", LAYER, "NCHW", "backward")
    )  # fmt: skip
    middle = sum(row["expected_us"]) / 2
    record = _record(
        _entry("backward", {"clone": 100.0, "native": 2 * middle, "triton": 600.0}),
        _entry("backward", {"clone": 100.0, "native": 50.0}, batch=1),
    )
    record["results"][0]["providers"]["triton"] = {"status": "n/a", "reason": "left out"}
    native, triton, small, _ = beside(record, cost)
    assert native.ratio == pytest.approx(2)
    assert native.copy == 150.0
    assert (triton.problem, triton.ratio) == ("left out", None)
    assert small.computed is None  # of another batch
    lines = summary([native, triton])
    assert lines[0].startswith(
        "native backward: 1 pairs of layer and layout; of the speed of a copy: median "
    )
    assert lines[0].endswith("measured over computed: median 2.00, from 2.00 to 2.00")
    assert lines[1] == "triton backward: 0 pairs of layer and layout"
    text = table([native, triton])
    assert f"| native | {LAYER} | NCHW | backward | {2 * middle:.1f} | 150.0 |" in text
    assert "| 2.00 |" in text
    assert "| left out |" in text


def test_a_device_without_prices() -> None:
    (figure, _) = beside(_record(_entry("forward", {"native": 5.0}), device="NVIDIA L40S"),
                         json.loads(RECORD.read_text()))  # fmt: skip
    assert figure.computed is None
    assert "nothing was computed for this device" in summary([figure])[0]


def test_without_a_graph_it_is_wall_time() -> None:
    """And where there is no time at all, the reason is that of the clock."""
    entry = _entry("forward", {"clone": 100.0, "native": 50.0, "triton": 1.0})
    no_graph = {"reason": "RuntimeError: operation not permitted when stream is capturing"}
    entry["providers"]["native"] = {
        "status": "ok", "device": no_graph, "wall": {"median_us": 70.0}
    }  # fmt: skip
    entry["providers"]["triton"] = {"status": "ok", "device": no_graph}
    record = _record(entry)
    record["contenders"].append("eager-linear")  # which is not the project's own
    native, triton = beside(record, json.loads(RECORD.read_text()))
    assert (native.measured, native.clock, native.copy) == (70.0, "wall", None)
    assert triton.problem == no_graph["reason"]
    assert "| 70.0 (wall) | n/a |" in table([native])
    assert "(1 by wall time: no graph could hold them)" in summary([native])[0]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(_record(_entry("forward", {"clone": 1e3, "native": 400.0}))))
    assert main([str(path)]) == 0
    assert "native forward: 1 pairs of layer and layout" in capsys.readouterr().out


# -- calibrating -----------------------------------------------------------------------------------

_SHAPES = ((1, 40_000), (1, 400_000), (8, 100_000), (16, 40_000), (4, 1_600_000))


def _work(blocks: int, image: int, assumed: Assumed) -> Work:
    """A launch like those of the CUDA kernels: its latencies are sums of what is assumed."""
    latency = {"load": assumed.memory, "mlp": 2 * assumed.l2}
    if blocks > 1:
        latency["exchange"] = assumed.cluster_barrier
    uses = {"sum": Use(image / 60), "mlp": Use(50.0), "exchange": Use(0), "write": Use(image / 50)}
    return Work(
        kernel="k", uses=uses, once=Use(100.0), groups=132 // blocks, blocks=blocks, threads=256,
        shared=60_000, registers=64, spills=0, images=256, moves={"load": image, "write": image},
        l2={"mlp": 10_000.0}, latency=latency, in_flight={}, l2_in_flight={}, stages=2, loops=[],
        narrow=0.0,
    )  # fmt: skip


def _measured(true: Assumed, speed: float) -> list[Measured]:
    """As if a card were what the model says, under other assumptions."""
    found = []
    for blocks, image in _SHAPES:
        (launch,) = calibrate.linear(lambda a, b=blocks, i=image: [_work(b, i, a)])  # type: ignore[misc]

        def expected(card: Card, assumed: Assumed, of: Any = launch) -> tuple[float, float]:
            return price(of.under(assumed), card, assumed).expected

        card = CARDS["H200"]._replace(copy_speed=speed)
        seconds = sum(price(_work(blocks, image, true), card, true).expected) / 2
        figure = Figure("native", LAYER, "NCHW", "forward", seconds * 1e6, None, None, "")
        found.append(Measured(figure, seconds, expected))
    return found


def test_latencies_are_linear_in_what_is_assumed() -> None:
    other = DEFAULT._replace(memory=1e-6, l2=5e-7, cluster_barrier=3e-6, launch=1e-5)
    (launch,) = calibrate.linear(lambda assumed: [_work(4, 40_000, assumed)])
    found, right = launch.under(other), _work(4, 40_000, other)
    assert found._replace(latency={}) == right._replace(latency={})
    assert found.latency == pytest.approx(right.latency)


def test_what_a_card_is_like_is_found_again() -> None:
    true = DEFAULT._replace(memory=1.1e-6, launch=5e-6, cluster_barrier=2.4e-6)
    found = calibrate.fit(_measured(true, 3.9e12), CARDS["H200"], 3.9e12)
    before, after = (
        max(abs(math.log(ratio)) for ratio in of) for of in (found.before, found.after)
    )
    assert before > 0.2
    assert after < 0.03
    assert found.assumed.launch > 1.5 * DEFAULT.launch  # a latency may stand in for the rest


def test_a_card_that_is_as_assumed_stays_so() -> None:
    found = calibrate.fit(_measured(DEFAULT, 4.3e12), CARDS["H200"], None)
    assert found.assumed == DEFAULT
    assert found.after == pytest.approx([1.0] * len(_SHAPES))


def test_what_fits_is_kept_and_read(tmp_path: Path) -> None:
    found = calibrate.fit(_measured(DEFAULT._replace(launch=5e-6), 3e12), CARDS["H200"], 3e12)
    path = tmp_path / "card.json"
    path.write_text(json.dumps(found.as_json()))
    cards, assumed = calibrate.read(path)
    assert assumed == found.assumed
    assert cards["H200"].copy_speed == 3e12
    assert cards["A100"] == CARDS["A100"]
    assert calibrate.read(None) == (CARDS, DEFAULT)


def test_the_speed_of_a_copy_is_that_of_large_layers() -> None:
    small = _entry("forward", {"clone": 1.0}, bytes=1000)
    entries = [_entry("forward", {"clone": t}) for t in (190.0, 200.0, 900.0)]
    speed = calibrate.copy_speed(_record(small, *entries))
    assert speed == pytest.approx(2 * (400 << 20) / 200e-6)
    assert calibrate.copy_speed(_record(small)) is None


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (_record(device="NVIDIA L40S"), "expected a record of one of H200, H100"),
        (_record(_entry("forward", {"native": 5.0}, dtype="fp32")), "expected layers in bf16"),
    ],
)
def test_records_that_say_nothing(record: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        calibrate.measured(record)
