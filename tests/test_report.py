"""What people read: the report of ``fuse_se_blocks``, and how ``fuse`` gives times."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import library
from senet_kernels import (
    FusedSEBlock,
    __main__,
    backends,
    fuse_se_blocks,
    timing,
    trial,
    use_backend,
)
from senet_kernels._command_line import Parser, near


class Gate(nn.Module):
    def __init__(self, hidden: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 4), hidden(), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        u = self.fc2(self.act(self.fc1(x.mean((2, 3)))))
        return x * u.sigmoid()[:, :, None, None]


class SEDropped(Gate):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        u = self.fc2(self.drop(self.act(self.fc1(x.mean((2, 3))))))
        return x * u.sigmoid()[:, :, None, None]


KIND = f"{__name__}.Gate"


def test_equal_lines_collapse_and_details_name_each() -> None:
    report = fuse_se_blocks(nn.Sequential(Gate(), nn.ReLU(), Gate(), Gate(nn.SiLU)))
    verdict, two, one, *where = str(report).splitlines()
    assert verdict == "3 SE blocks fused"
    assert two == f"fused  2 x  {KIND}  squeeze_excite: two layers, relu, gate sigmoid"
    assert one == f"fused  3    {KIND}  squeeze_excite: two layers, silu, gate sigmoid"
    if backends()["native"]:
        assert where == ["runs on: native (cpu, float32)"]
    names = [line.split()[1] for line in report.details().splitlines()[1:4]]
    assert names == ["0", "2", "3"]


def test_what_was_not_fused() -> None:
    text = str(fuse_se_blocks(nn.Sequential(Gate(), SEDropped(), SEDropped())))
    assert text.startswith("1 SE block fused, 2 not\n")
    assert "\nnot fused  2 x" in text
    assert str(fuse_se_blocks(nn.Linear(3, 3))) == "no SE block found"


def test_steps_around_the_blocks() -> None:
    joined = nn.Sequential(nn.ReLU(), Gate())
    text = str(fuse_se_blocks(joined, neighbours=True))
    assert text.startswith("1 SE block fused; the steps around them joined\n")
    assert "\njoined  (the model)" in text
    alone = nn.Sequential(nn.Conv2d(8, 8, 1), Gate())
    text = str(fuse_se_blocks(alone, neighbours=True))
    assert text.startswith("1 SE block fused; the steps around them not joined\n")
    both = str(fuse_se_blocks(nn.ModuleList([joined, alone]), neighbours=True))
    assert "; steps of 1 modules around them joined, of 1 not" in both


def test_where_each_runs() -> None:
    model = nn.Sequential(Gate(), Gate().double(), Gate().to("meta"))
    report = fuse_se_blocks(model)
    with use_backend("reference"):
        lines = str(report).splitlines()[-3:]
    assert lines[:2] == [f"runs on: reference (cpu, {d})" for d in ("float32", "float64")]
    assert lines[2] == "runs on: what is chosen once the model has left (meta, float32)"
    with use_backend("fallback"):
        assert "runs on: the modules' own forward (cpu, float32)" in str(report)
    if not backends()["triton"]:
        by_name = str(fuse_se_blocks(nn.Sequential(Gate()), backend="triton"))
        assert "runs on: nothing: calls raise (cpu, float32)\n" in by_name


def test_lazy_and_fused_blocks() -> None:
    assert str(fuse_se_blocks(nn.ModuleList([FusedSEBlock(8), nn.LazyLinear(3)]))) == (
        "no SE block found"
    )


def test_options_have_one_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["fuse", "x:y", "--secs", "1"], "--secs: no such option, did you mean --seconds"),
        (["fuse", "x:y", "--bacth=3"], "--bacth=3: no such option, did you mean --batch?"),
        (["fuze"], "'fuze' is no choice, did you mean fuse?"),
    ):
        with pytest.raises(SystemExit) as error:
            __main__.main(words)
        out, text = capsys.readouterr()
        assert (error.value.code, out, text.count("\n")) == (2, "", 1)
        assert said in text


def test_a_parser_inside_names_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="p")
    sub = parser.add_subparsers(dest="command")
    sub.add_parser("one").add_argument("--width")
    sub.add_parser("two").add_argument("--depth")
    assert vars(parser.parse_args(["one", "--width", "3"])) == {"command": "one", "width": "3"}
    with pytest.raises(SystemExit):
        parser.parse_args(["one", "--dept", "3"])
    assert "did you mean" not in capsys.readouterr().err
    assert near("aplha", ["alpha", "beta"]) == ", did you mean alpha?"
    assert near("gamma", ["alpha_of_all", "beta"]) == ""


@pytest.mark.parametrize(("name", "said"), [
    ("timm:seresnet500", "is not in timm, did you mean timm:seresnet50"),
    ("seresnet50", "did you mean timm:seresnet50?"),
    ("timm:serasnet50", "is not in timm, did you mean timm:seresnet50"),
    ("timm:nothing_like_it_at_all", "is not in timm"),
])  # fmt: skip
def test_near_names_of_timm(name: str, said: str) -> None:
    library("timm")
    with pytest.raises(trial.TrialError) as error:
        trial.make(name, "cpu")
    assert said in str(error.value)


def test_a_name_that_timm_keeps_for_old_scripts() -> None:
    """It is in no list of models, and makes one all the same."""
    library("timm")
    with pytest.warns(UserWarning, match="Mapping deprecated model"):
        assert isinstance(trial.make("timm:tf_efficientnet_b0_ns", "cpu"), nn.Module)


# -- times


def test_interval_of_the_median() -> None:
    """It holds the true median in 19 of 20 cases, and is no wider than needed."""
    generator = random.Random(0)
    for count in (2, 3, 5, 6, 9, 20, 51):
        held = 0
        for _ in range(1000):
            rounds = [(generator.lognormvariate(0.3, 1), 1.0) for _ in range(count)]
            found = timing.summary(rounds, None)
            assert found.low <= found.ratio <= found.high
            held += found.low <= 2.718281828**0.3 <= found.high
        assert 0.93 < held / 1000 < 0.995
    one = timing.summary([(3.0, 1.0)], None)
    assert (one.ratio, one.low, one.high, one.rounds) == (3.0, 0.0, math.inf, 1)


@pytest.mark.parametrize("count", [2, 5, 6, 20])
def test_beside_others_all_rounds_are_in_the_interval(count: int) -> None:
    rounds = [(1.0 + i, 1.0) for i in range(count)]
    quiet, busy = (timing.summary(rounds, cores) for cores in (timing.QUIET, 1.0))
    assert busy.low <= 1.0
    assert busy.high >= count
    assert busy.low <= quiet.low
    assert busy.high >= quiet.high
    assert count < 20 or quiet.low > 1.0


def test_times_end_when_they_are_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """No round is begun that would not end in time; each order of the two comes by turns."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    model, order = nn.Sequential(nn.Conv2d(3, 8, 1), Gate()), []

    def step(model: nn.Module, x: Tensor) -> None:
        fused = type(model[1]) is not Gate
        order.append(fused)
        now[0] += 1 if fused else 2

    shown: list[str] = []
    x = torch.zeros(1, 3, 2, 2)
    found = timing.times(model, x, step, fuse_se_blocks, 19, shown.append)
    assert (found.original, found.fused, found.ratio, found.rounds) == (2, 1, 2, 3)
    assert order[::2] == [False, True, True, False, False, True]
    assert shown[-1] == "round 3, 18 of 19 s"
    assert timing.times(model, x, step, fuse_se_blocks, 0).rounds == 1


def test_a_busy_machine_is_told() -> None:
    def told(busy: float | None, rounds: int) -> str:
        times = timing.Times(0.2, 0.1, 2.0, 1.5, 2.5, rounds, busy)
        return __main__._of_times("inference", times, "batch 8, 12x12, cpu")

    quiet = told(0.1, 6)
    assert quiet == (
        "inference: 200.00 ms before, 100.00 ms after, 2.00x, 95 % interval 1.50 to 2.50, "
        "6 rounds (batch 8, 12x12, cpu)"
    )
    assert told(None, 6) == quiet
    assert told(1.3, 6).endswith(
        "\ninference: other processes used 1.3 cores meanwhile: do not trust this"
    )
    assert ", 2.00x, interval 1.50 to 2.50, 6 rounds (" in told(1.3, 6)
    assert ", 2.00x, 1 round, no interval: more --seconds give one (" in told(0.0, 1)


@pytest.mark.parametrize(
    ("busy", "threads", "left"), [(None, 4, 4), (0.1, 4, 4), (0.9, 4, 3), (0.9, 2, 2), (9.0, 4, 1)]
)
def test_cores_are_left_to_others(
    busy: float | None, threads: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(timing.OtherLoad, "read", lambda _: busy)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        said = timing.leave_cores(0)
        assert torch.get_num_threads() == left
        expected = f"other processes use {busy} cores: {left} instead of {threads} threads here"
        assert said == (None if left == threads else expected)
    finally:
        torch.set_num_threads(before)


def test_load_of_others_is_not_our_own() -> None:
    load = timing.OtherLoad()
    begin = timing.time.perf_counter()
    total: Any = 0
    while timing.time.perf_counter() - begin < 0.2:
        total = statistics.fmean([total, 1])
    busy = load.read()
    cores = timing.os.cpu_count() or 1
    assert busy is None or 0 <= busy <= cores
