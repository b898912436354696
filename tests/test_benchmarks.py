"""The benchmark suite: its gate catches what is wrong, its records say what was measured."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

from benchmarks import (
    bench,
    digest,
    dram,
    launches,
    layer_run,
    memory,
    networks,
    options,
    problem,
    providers,
    records,
    strategies,
    summary,
    timing,
    workloads,
)
from benchmarks.__main__ import main
from benchmarks.compiling import NO_TIME, CompileAccount
from policies import PLAN
from senet_kernels import backends, dispatch, resolve, use_backend

CPU = torch.device("cpu")
LAYER = ("layers", "--network", "lc0_10x128", "--batch", "1", "--layout", "contiguous",
         "--provider", "eager-linear", "--provider", "reference", "--mode", "forward",
         "--budget", "0.5")  # fmt: skip
MODEL = ("models", "--network", "tiny", "--budget", "0.5", "--provider", "original",
         "--provider", "neighbours", "--provider", "no-se")  # fmt: skip


def _tiny() -> nn.Module:
    return networks.Tower(2, 8, hidden=4)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that takes no time."""
    spec = networks.NetworkSpec("tiny", _tiny, "here", 112, 8, 2, 2)
    monkeypatch.setitem(networks.NETWORKS, "tiny", spec)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Any]]:
    """Runs a command line without its plots; gives the exit code and the record."""
    monkeypatch.setattr("benchmarks.__main__.draw", lambda record, path: [])

    def run(*words: str) -> tuple[int, Any]:
        path = tmp_path / "record.json"
        code = main([*words, "--device", "cpu", "--record", str(path)])
        return code, records.read(path)

    return run


# -- runs ------------------------------------------------------------------------------------------


def test_layers(run: Callable[..., tuple[int, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    code, record = run(*LAYER)
    assert (code, record["kind"], record["status"]) == (0, "layers", "complete")
    (entry,) = record["results"]
    assert entry["providers"].keys() == {"eager-linear", "reference", "clone"}
    assert entry["providers"]["eager-linear"]["wall"]["samples"] >= 3
    assert entry["providers"]["reference"]["launches"]["operators"] >= 5
    assert "--record" not in record["command"]
    assert "256x8x8" not in capsys.readouterr().out


def test_layers_without_what_crashes(run: Callable[..., tuple[int, Any]], tmp_path: Path) -> None:
    """A provider of a case, or all of it; and what is under way can be read."""
    name, under_way = run(*LAYER)[1]["results"][0], tmp_path / "under-way"
    case = f"{name['layer']} {name['dtype']} b{name['batch']} {name['layout']}"
    words = ("--under-way", str(under_way), "--no-profile", "--rounds", "3")
    code, record = run(*LAYER, *words, "--leave-out", f"{case}/reference")
    assert code == 0
    (entry,) = record["results"]
    assert entry["providers"]["reference"] == {
        "status": "n/a", "reason": "left out: it crashed or hung",
    }  # fmt: skip
    assert entry["providers"]["eager-linear"]["status"] == "ok"
    assert "launches" not in entry["providers"]["eager-linear"]
    assert "leave-out" not in record["command"]  # it goes on from what was measured before
    assert under_way.read_text() == f"{case}/"
    (tmp_path / "record.json").unlink()
    _, record = run(*LAYER, *words, "--leave-out", f"{case}/")
    assert (record["results"], record["not_measured"]) == ([], [case])


def test_the_module_of_timm(run: Callable[..., tuple[int, Any]]) -> None:
    from models import library

    library("timm")
    words = ("--network", "mobilenetv3_large_100", "--layer", "960x7x7", "--batch", "1",
             "--neighbours", "--layout", "channels_last", "--budget", "0.5")  # fmt: skip
    code, record = run("layers", *words, "--provider", "timm", "--provider", "reference")
    assert code == 0
    assert {e["providers"]["timm"]["status"] for e in record["results"]} == {"ok"}
    _, record = run(*LAYER, "--provider", "timm")
    assert record["results"][0]["providers"]["timm"]["reason"].endswith("and no shift")


def test_in_place_at_two_batches(
    run: Callable[..., tuple[int, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Over its input it computes the same, and what a later call overwrites stays what it is."""
    if "native" not in providers.FUSED or providers.unavailable("native", CPU):
        pytest.skip("no native library here")
    words = ("--batch", "2", "--provider", "native-inplace", "--fresh-pages")
    code, record = run(*LAYER, *words)
    assert code == 0
    assert record["cache_state"].endswith("freed memory is given back")
    status = [entry["providers"]["native-inplace"]["status"] for entry in record["results"]]
    assert status == ["ok", "ok"]
    assert "fp32 all b" in capsys.readouterr().out

    made = problem.Problem.create(layer_run.SMALL, CPU)
    module = providers.make_provider(providers.IN_PLACE).build(made)
    call = providers.make_call(module, made, problem.FORWARD)
    with torch.no_grad():
        call(0)
        for _ in range(3):
            torch.testing.assert_close(call(0), made.x[0], rtol=0, atol=0)


BACKWARD = ("--mode", "forward", "--mode", "backward", "--mode", "forward+backward")


def test_backward_alone(run: Callable[..., tuple[int, Any]]) -> None:
    """Beside the other modes, with torch.compile, whose code for a training step cannot do it."""
    words = [*LAYER[: LAYER.index("--mode")], "--neighbours", "--provider", "compile", *BACKWARD]
    code, record = run(*words, "--budget", "0")
    assert code == 0
    entries = {entry["mode"]: entry for entry in record["results"]}
    assert {p["status"] for e in entries.values() for p in e["providers"].values()} == {"ok"}
    limits = {mode: entry["limit_in_clones"] for mode, entry in entries.items()}
    assert limits == {"forward": 1.5, "backward": 2, "forward+backward": 3.5}  # with a residual
    counts = {m: e["providers"]["eager-linear"]["launches"]["operators"]
              for m, e in entries.items()}  # fmt: skip
    assert counts["backward"] <= counts["forward+backward"] - counts["forward"]
    assert "saved_bytes" not in entries["backward"]["providers"]["reference"]


def test_backward_that_cannot_be_repeated_is_wrong(
    run: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overwrites(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            ctx.factor = torch.ones_like(y)
            return y.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            dx = dy * ctx.factor
            ctx.factor.zero_()
            return dx

    forward = providers.EagerSE.forward
    monkeypatch.setattr(
        providers.EagerSE, "forward", lambda *args: Overwrites.apply(forward(*args))
    )
    code, record = run(*LAYER[: LAYER.index("--mode")], *BACKWARD, "--budget", "0.5")
    assert code == 1
    status = {e["mode"]: e["providers"]["eager-linear"]["status"] for e in record["results"]}
    assert status == {"forward": "ok", "backward": "wrong", "forward+backward": "ok"}


def test_a_graph_per_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture follows only its own stream; a node runs on that of its forward."""
    case = problem.Case(workloads.Layer(8, 3, 3, 2, "relu", "sigmoid"), "fp32", "contiguous", 2)
    made = problem.Problem.create(case, CPU, copies=2)
    module = providers.make_provider("eager-linear").build(made)
    built, stream = [], ["default"]
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *a: built.append(stream[0]) or forward(*a))
    monkeypatch.setattr(providers, "_stream_of", lambda tensor: stream[0])
    call = providers.make_call(module, made, problem.BACKWARD)
    for name in ("default", "default", "side", "side"):
        stream[0] = name
        call(0), call(1)
    assert built == ["default"] * 2 + ["side"] * 2


def test_what_a_call_does_once_is_not_counted() -> None:
    """A graph for backward, say, on a stream where there was none."""
    found = layer_run.LayerRun(options.parse("layers", [*LAYER[1:], "--device", "cpu"]))
    made = problem.Problem.create(layer_run.SMALL, CPU)
    ones, calls = torch.ones(2), [0]

    def call(index: int) -> Tensor:
        calls[0] += 1
        return ones + 1 if calls[0] > 1 else ones.exp() + ones.sin()

    module = providers.make_provider("eager-linear").build(made)
    account = found._account("eager-linear", call, module, made, problem.BACKWARD)
    assert account == {"launches": {"operators": 1}}


@pytest.mark.parametrize("layer", [
    workloads.Layer(12, 5, 3, 4, "relu", "sigmoid"),
    workloads.Layer(8, 3, 3, None, None, "hardsigmoid", before="silu"),
    workloads.Layer(6, 2, 5, 3, "silu", "sigmoid", shift=True, after="relu", add=True),
], ids=lambda layer: layer.name)  # fmt: skip
def test_the_oracle_by_any_number_of_images(
    layer: workloads.Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = problem.Problem.create(problem.Case(layer, "fp32", "channels_last", 5), CPU)
    at_once = problem.oracle(made)
    for images in (1, 2):
        elements = images * layer.channels * layer.positions
        monkeypatch.setattr(problem, "_ORACLE_ELEMENTS", elements)
        parts = problem.oracle(made)
        assert parts.keys() == at_once.keys()
        for name, right in at_once.items():
            torch.testing.assert_close(parts[name], right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("budget", ["300", "0"])
def test_compile_comes_last(
    run: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    """All cases without it first, then each once more with it; with a budget and without."""
    order: list[tuple[int, bool]] = []
    case = layer_run.LayerBench._case

    def watched(self: Any, which: Any, *more: Any, **named: Any) -> Any:
        entries = case(self, which, *more, **named)
        order.append((which.batch, entries[0]["providers"]["compile"]["status"] == "ok"))
        return entries

    monkeypatch.setattr(layer_run.LayerBench, "_case", watched)
    words = [*LAYER[:-1], budget, "--batch", "2", "--rounds", "3", "--provider", "compile"]
    _, record = run(*words, "--compile-last")
    assert order == [(1, False), (2, False), (1, True), (2, True)]
    assert [entry["batch"] for entry in record["results"]] == [1, 2]


def test_a_later_run_compiles_what_lacks_it(run: Callable[..., tuple[int, Any]]) -> None:
    words = [*LAYER[:-1], "300", "--batch", "2", "--provider", "compile", "--compile-last"]
    refused = CompileAccount.refuse

    def without(self: Any, name: str = "") -> str | None:
        found: str | None = refused(self, name)
        return found or f"{NO_TIME} of 0 s spent"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompileAccount, "refuse", without)
        _, first = run(*words)
    _, second = run(*words)
    for record, status in ((first, "n/a"), (second, "ok")):
        assert [e["batch"] for e in record["results"]] == [1, 2]
        assert [e["providers"]["compile"]["status"] for e in record["results"]] == [status] * 2


def test_unfinished(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = options.parse("layers", [*LAYER[1:], "--device", "cpu"])
    found = layer_run.LayerRun(parsed)
    assert found.unfinished() == []
    entry = {**dict.fromkeys(found.key_fields), "providers": {"compile": {"status": "n/a"}}}
    found.record["results"] = [entry]
    assert found.unfinished() == []
    entry["providers"]["compile"]["reason"] = f"{NO_TIME} of 3 s spent"
    found.record["not_measured"] = ["this", "that"]
    assert found.unfinished() == ["2 cases not measured", "1 without torch.compile"]


def test_a_word_is_not_needed(run: Callable[..., tuple[int, Any]]) -> None:
    assert run(*LAYER[1:])[1]["command"] == run(*LAYER)[1]["command"]


def test_going_on_from_a_record(
    run: Callable[..., tuple[int, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = run(*LAYER)
    _, again = run(*LAYER[:-1], "0.7")  # another budget is no other measurement
    assert again["results"] == first["results"]
    assert again["resumed"] == [first["environment"]["date"]]
    assert "goes on from" in capsys.readouterr().err
    _, other = run(*LAYER, "--seed", "1")
    assert "resumed" not in other
    assert other["results"] != first["results"]
    assert "record.json, which differs in seed, command\n" in capsys.readouterr().err


def test_models(tiny: None, run: Callable[..., tuple[int, Any]]) -> None:
    code, record = run(*MODEL)
    assert (code, record["kind"]) == (0, "models")
    forward, training = record["results"]
    assert (forward["mode"], training["mode"]) == ("forward", "forward+backward")
    assert training["se_modules"] == 2
    for entry in (forward, training):
        assert {p["status"] for p in entry["providers"].values()} == {"ok"}
        assert summary.price(entry, "wall", "original") is not None
    saved = {n: p["saved_bytes"] for n, p in training["providers"].items()}
    assert 0 < saved["no-se"] < min(saved["original"], saved["neighbours"])
    calls = {n: p["launches"]["operators"] for n, p in training["providers"].items()}
    assert calls["neighbours"] < calls["original"]
    titles = [title for title, _ in digest.blocks(record)]
    assert "forward: the price of SE" in titles


def test_a_wrong_network_has_no_figure(
    tiny: None, run: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse = networks.Tower.fuse

    def broken(self: networks.Tower, neighbours: bool) -> int:
        count = fuse(self, neighbours)
        self.blocks[1].se.gate = "hardsigmoid"
        return count

    monkeypatch.setattr(networks.Tower, "fuse", broken)
    code, record = run(*MODEL)
    assert code == 1
    for entry in record["results"]:
        status = entry["providers"]["neighbours"]
        assert status["status"] == "wrong"
        assert "wall" not in status
        assert entry["providers"]["original"]["status"] == "ok"


class _Blind(nn.Module):
    """The right output, and no gradient through the block."""

    def __init__(self, se: nn.Module) -> None:
        super().__init__()
        self.se = se

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self.se(x.detach(), residual=residual)
        return y


def test_a_wrong_gradient_is_found(
    tiny: None, run: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse = networks.Tower.fuse

    def broken(self: networks.Tower, neighbours: bool) -> int:
        count = fuse(self, neighbours)
        self.blocks[0].se = _Blind(self.blocks[0].se)
        return count

    monkeypatch.setattr(networks.Tower, "fuse", broken)
    code, record = run(*MODEL)
    assert code == 1
    forward, training = (e["providers"]["neighbours"] for e in record["results"])
    assert forward["status"] == "ok"
    assert training["status"] == "wrong"
    assert training["reason"].startswith("gradients")


def test_nothing_fused_is_not_timed_as_fused(
    tiny: None, run: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks.Tower, "fuse", lambda self, neighbours: 0)
    _, record = run(*MODEL)
    found = record["results"][0]["providers"]["neighbours"]
    assert found["status"] == "n/a"
    assert "replaced nothing" in found["reason"]


@pytest.mark.slow
def test_calls_that_name_no_backend(
    tiny: None,
    run: Callable[..., tuple[int, Any]],
    record_ops: Callable[[], set[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where none is chosen by itself, networks are not timed on the reference."""
    if not backends()["native"]:
        pytest.skip("the native backend is not available")
    assert providers.backend_to_ask_for(CPU) == "auto"
    monkeypatch.setattr(dispatch, "AUTOMATIC", {})
    monkeypatch.setattr(resolve, "_RESOLVED", {})
    code, record = run(*MODEL)
    assert (code, record["environment"]["backend"]) == (0, "native")
    assert "senet_kernels::native_forward" in record_ops()
    with use_backend("reference"):
        assert providers.backend_to_ask_for(CPU) == "reference"


def test_compiled_models(tiny: None, run: Callable[..., tuple[int, Any]]) -> None:
    words = [*MODEL, "--provider", "compile", "--provider", "compile-fused"]
    words[words.index("0.5")] = "0"
    code, record = run(*words, "--mode", "forward")
    assert code == 0
    for name in ("compile", "compile-fused"):
        found = record["results"][0]["providers"][name]
        assert found["status"] == "ok", found
        assert found["compile"]["graphs"] == 1
        assert found["compile"]["recompiles"] == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("nonsense",), "unknown 'nonsense'"),
        (("layers", "--provider", "magic"), "unknown 'magic'"),
        (("models", "--network", "lenet"), "lenet"),
        (("sweep", "--channels", "0"), "--channels: expected a positive integer, got '0'"),
        (("sweep", "--batch", "0"), "--batch: expected a positive"),
        (("sweep", "--points", "-1"), "--points: expected a positive"),
        (("layers", "--batch", "0"), "--batch: expected a positive"),
        (("layers", "--threads", "0"), "--threads: expected a positive"),
        (("layers", "--budget", "-1"), "--budget: expected a number of seconds, got '-1'"),
        (("layers", "--budget", "nan"), "--budget: expected a number of seconds"),
        (("layers", "--seed", "-1"), "--seed: expected an integer of 0 to"),
        (("models", "--size", "0"), "--size: expected a positive"),
        (("layers", "--record", "file/record.json"), "cannot be written: File exists\n"),
        (("layers", "--record", "."), "--record: expected a record or a new file, got .: not a"),
        (("layers", "--record", "file"), "a new file, got file: not JSON"),
        (("layers", "--record", "other.json"), "a new file, got other.json: record: 'schema' is"),
        (("layers", "--out", "file"), "layers.json cannot be written: File exists\n"),
        (("report", "--out", "file/x"), "--out: file/x cannot be written to: Not a directory\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes(
    words: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Found before anything is measured or written."""
    monkeypatch.setattr(bench.Bench, "run", lambda *_: pytest.fail("it measures"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "other.json").write_text("{}")
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert text in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "text"
    assert (tmp_path / "other.json").read_text() == "{}"


def test_what_is_named_twice_is_measured_once() -> None:
    words = ["--device", "cpu", "--mode", "backward", "--batch", "1", "--dtype", "fp32"]
    words += ["--provider", "eager-conv", "--layout", "contiguous"]
    for more in ([], ["--network", "seresnet50"]):
        once, twice = (options.parse("layers", [*words, *more] * n) for n in (1, 2))
        assert vars(twice) | {"command": ""} == vars(once) | {"command": ""}


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fused", "neighbours"])
def test_variants_share_parameters_and_outputs(name: str) -> None:
    spec = networks.NetworkSpec("tiny", _tiny, "here", 112, 8, 2, 2)
    model = networks.build(spec).eval()
    other = networks.variant(model, name)
    assert {id(p) for p in other.parameters()} == {id(p) for p in model.parameters()}
    assert all(a is not b for a, b in zip(model.buffers(), other.buffers(), strict=True))
    x = spec.input(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
        without = networks.variant(model, "no-se")
        assert (without(x) - model(x)).abs().max() > 0.1 * model(x).abs().max()


def test_timm_network_without_its_blocks() -> None:
    from models import library

    library("timm")
    model = networks.build(networks.NETWORKS["mobilenetv3_large_100"])
    names = networks.se_modules(model)
    assert len(names) == 8
    without = networks.variant(model, "no-se")
    assert all(isinstance(without.get_submodule(n), nn.Identity) for n in names)
    assert not any(isinstance(model.get_submodule(n), nn.Identity) for n in names)


# -- memory and launches ---------------------------------------------------------------------------


def test_saved_bytes() -> None:
    x, w = torch.ones(1000, requires_grad=True), torch.ones(1000, requires_grad=True)
    assert memory.saved_bytes(lambda: x.exp()) == 4000  # its output
    assert memory.saved_bytes(lambda: x * w) == 8000
    assert memory.saved_bytes(lambda: x * w, [w]) == 4000
    assert memory.saved_bytes(lambda: x * x[:1], [w]) == 4000  # a view is of the same storage
    assert memory.saved_bytes(lambda: x + w) == 0
    assert memory.peak_bytes(lambda: x + w, CPU) is None


def test_operators() -> None:
    x = torch.ones(4, 4)
    assert launches.count(lambda: (x.t() + x).relu().t(), CPU) == {"operators": 2}


def test_kernels_of_a_profile() -> None:
    events = [
        SimpleNamespace(name="void se_forward<8>", device_type=DeviceType.CUDA),
        SimpleNamespace(name="Memset (Device)", device_type=DeviceType.CUDA),
        SimpleNamespace(
            name="Optimizer.step", device_type=DeviceType.CUDA, is_user_annotation=True
        ),
        SimpleNamespace(name="aten::relu", device_type=DeviceType.CPU),
    ]
    assert launches.of_events(events) == {"kernels": 1, "copies": 1}
    seen = launches.profiled(lambda: torch.ones(2).relu(), CPU)
    assert any(event.name == "aten::relu" for event in seen)
    assert launches.of_events(seen) == {"kernels": 0, "copies": 0}


_NCU = """==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","spin_kernel","dram__bytes_read.sum","byte","64"
"1","forward","dram__bytes_read.sum","byte","1,000,000"
"1","forward","dram__bytes_write.sum","byte","500"
"2","second","dram__bytes_read.sum","byte","7"
"2","second","sm__cycles.sum","cycle","99"
"3","spin_kernel","dram__bytes_read.sum","byte","64"
"4","other","dram__bytes_read.sum","byte","n/a"
"""


def test_a_few_calls_are_of_all_kinds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Callable[..., tuple[int, Any]]
) -> None:
    """Both passes, every provider, several layers; and what was counted is in the record."""
    _, record = run(*LAYER)
    ok, times = {"status": "ok", "error": 0.0}, record["results"][0]
    record["contenders"] = record["providers"] = ["native", "triton"]
    record["results"] = [
        {**times, "layer": f"layer {i}", "mode": mode, "providers": {"native": ok, "triton": ok}}
        for i in range(14)
        for mode in ("forward", "backward")
    ]
    path = tmp_path / "layers.json"
    records.write(record, path)
    seen: list[tuple[str, str, str]] = []

    def measure(asked: Any, device: str, seconds: float) -> Any:
        seen.extend((entry["layer"], entry["mode"], name) for entry, name in asked)
        return [(7, [{"kernel": "k", "smsp__inst_executed.sum": 1.0}])] * len(asked)

    monkeypatch.setattr(dram, "measure", measure)
    assert dram.fill(path, "cpu", 1e3, most=8) == (8, "")
    assert len(seen) == len(set(seen)) == 8
    assert {kind[1:] for kind in seen} == {
        (mode, name) for mode in ("forward", "backward") for name in ("native", "triton")
    }
    assert len({kind[0] for kind in seen}) > 4
    counted = [p for e in records.read(path)["results"] for p in e["providers"].values()
               if "counters" in p]  # fmt: skip
    assert [p["dram_bytes"] for p in counted] == [7] * 8


def test_calls_that_ncu_counted() -> None:
    assert dram.parse(_NCU) == [
        [
            {"kernel": "forward", "dram__bytes_read.sum": 1e6, "dram__bytes_write.sum": 500.0},
            {"kernel": "second", "dram__bytes_read.sum": 7.0},
        ],
        [{"kernel": "other"}],
    ]


_COUNTED = """"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","spin_kernel","smsp__inst_executed.sum","inst","1"
"1","forward","smsp__inst_executed.sum","inst","12"
"2","second","smsp__inst_executed.sum","inst","3"
"""


def _answers(monkeypatch: pytest.MonkeyPatch, *texts: str) -> list[list[str]]:
    """What ncu prints, call by call; returns the command lines."""
    commands: list[list[str]] = []

    def run(command: list[str], **more: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(stdout=texts[len(commands) - 1], stderr="")

    monkeypatch.setattr(dram.subprocess, "run", run)
    return commands


def _metrics(command: list[str]) -> list[str]:
    return command[command.index("--metrics") + 1].split(",")


def test_bytes_are_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated kernel finds warm caches: what needs repeating is counted in another run."""
    commands = _answers(monkeypatch, _NCU, _COUNTED)
    entry = {"layer": "a", "mode": "forward"}
    (first, second) = dram.measure([(entry, "native"), (entry, "triton")], "cuda", 60)
    assert first[0] == 1_000_507
    assert [k["smsp__inst_executed.sum"] for k in first[1]] == [12.0, 3.0]
    assert first[1][0]["dram__bytes_write.sum"] == 500.0
    assert second == (0, [{"kernel": "other"}])
    assert [_metrics(c) for c in commands] == [list(dram.METRICS), list(dram.COUNTERS)]
    assert not set(dram.METRICS) & set(dram.COUNTERS)


def test_a_counter_that_the_card_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = "==ERROR== Failed to find metric lts__t_bytes.sum\n"
    commands = _answers(monkeypatch, _NCU, lacking, _COUNTED)
    first, _ = dram.measure([({"mode": "forward"}, "native")] * 2, "cuda", 60)
    assert "smsp__inst_executed.sum" in first[1][0]
    assert set(dram.COUNTERS) - set(_metrics(commands[-1])) == {"lts__t_bytes.sum"}


def test_bytes_stay_where_counters_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    _answers(monkeypatch, _NCU, "")
    first, _ = dram.measure([({"mode": "forward"}, "native")] * 2, "cuda", 60)
    assert first[0] == 1_000_507
    assert [k["kernel"] for k in first[1]] == ["forward", "second"]


@pytest.mark.parametrize(("says", "calls"), [("ERR_NVGPUCTRPERM - no", 1), ("other", 2)])
def test_when_counting_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    run: Callable[..., tuple[int, Any]],
    says: str,
    calls: int,
) -> None:
    """A failure of one run of calls is none of the next; no permission is."""
    _, record = run(*LAYER)
    times = record["results"][0]
    record["contenders"] = record["providers"] = ["native"]
    record["results"] = [{**times, "layer": f"{i}", "providers": {"native": {"status": "ok"}}}
                         for i in range(40)]  # fmt: skip
    path = tmp_path / "layers.json"
    records.write(record, path)
    commands = _answers(monkeypatch, *[f"==WARNING== slow\n==ERROR== {says}\n"] * 9)
    count, reason = dram.fill(path, "cuda", 1e3)
    assert (count, reason) == (0, says)
    assert len(commands) == calls


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - no permission\n", "ERR_NVGPUCTRPERM - no permission"),
        ("", "no table"),
        (_NCU.replace('"byte"', '"Mbyte"'), "expected bytes"),
        ("\n".join(_NCU.splitlines()[:2]), "no kernel"),
    ],
)
def test_ncu_without_counters(text: str, reason: str) -> None:
    with pytest.raises(dram.NoCounters, match=reason):
        dram.parse(text)


# -- a GPU's timers, with a clock in place of the GPU ----------------------------------------------


class _Graph:
    """Replays the calls that ran while it was captured."""

    recording: list[Callable[[], None]] | None = None

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """``torch.cuda`` as far as the timers use it; time passes only as the calls say."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing
            self.at = math.nan

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    @contextmanager
    def graph(made: _Graph, pool: object, stream: object) -> Iterator[None]:
        assert (pool, stream) == ("the pool", side)
        _Graph.recording = made.calls
        try:
            yield
        finally:
            _Graph.recording = None

    stream, side = (SimpleNamespace(wait_stream=lambda other: None, name=n) for n in ("", "side"))
    fakes = {
        "Event": Event, "CUDAGraph": _Graph, "graph": graph, "synchronize": lambda: None,
        "Stream": lambda: side, "current_stream": lambda: stream,
        "stream": lambda s: nullcontext(), "graph_pool_handle": lambda: "the pool",
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return now


@pytest.mark.parametrize("kind", [timing.CudaTimer, timing.GraphTimer])
def test_timers_of_a_gpu(clock: list[float], kind: type[Any]) -> None:
    """Every call counts, and the buffers take turns."""
    copies, cost = 3, {0: 1e-5, 1: 2e-5, 2: 3e-5}
    seen: list[int] = []

    def call(index: int) -> None:
        def work() -> None:
            seen.append(index)
            clock[0] += cost[index]

        if _Graph.recording is None:
            work()
        else:
            _Graph.recording.append(work)

    timer = kind(copies)
    timer.prepare(call)
    seen.clear()
    seconds = timer.sample(call)
    assert seconds == pytest.approx(2e-5, rel=0.1)
    assert set(seen) == {0, 1, 2}
    counts = [seen.count(i) for i in range(copies)]
    assert max(counts) - min(counts) <= 1
    done = timing.measure(kind(copies), {"a": call}, timing.Rounds(least=4, most=4), Random(0))
    assert len(done.seconds["a"]) == 4
    assert not done.failed


def test_host_time_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    timer = timing.HostTimer()

    def call(index: int) -> None:
        events.append("call")

    timer.prepare(call)
    events.clear()
    assert 0 < timer.sample(call) < 1e-3
    assert events == ["wait", *["call"] * timer.CALLS]


def test_a_refused_capture_is_a_reason(clock: list[float]) -> None:
    def call(index: int) -> None:
        if _Graph.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    done = timing.measure(timing.GraphTimer(2), {"a": call}, timing.Rounds(), Random(0))
    assert "capturing" in str(done.failed["a"])
    assert not done.seconds


def test_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced plan is in force during a step, and at no other time."""
    monkeypatch.delenv(PLAN, raising=False)
    name = "native-cluster8"
    assert providers.unavailable(name, torch.device("cpu")) == "a plan of the CUDA kernels"
    assert {backend for backend, _ in strategies.STRATEGIES.values()} == {"native"}
    made = problem.Problem.create(
        problem.Case(workloads.Layer(8, 3, 3, 2, "relu", "sigmoid"), "fp32", "contiguous", 2),
        torch.device("cpu"),
    )
    module = providers.make_provider(name).build(made)
    seen = []

    def record(*args: Any) -> torch.Tensor:
        seen.append(os.environ.get(PLAN))
        return made.x[0]

    monkeypatch.setattr(module, "forward", record)
    providers.make_call(module, made, problem.FORWARD)(0)
    assert seen == ["exchange=cluster,blocks=8"]
    assert PLAN not in os.environ


def test_what_an_interrupt_leaves_unmeasured_is_named(tmp_path: Path) -> None:
    words = ["--layer", "240x14x14", "--batch", "1", "--batch", "2", "--dtype", "fp32", "--rounds",
             "3", "--mode", "forward", "--provider", "eager-linear", "--device", "cpu", "--record",
             str(tmp_path / "r.json")]  # fmt: skip
    bench = layer_run.LayerRun(options.parse("layers", words))
    names = [case.name for case in bench.cases()]
    assert len(names) > 2

    def interrupted(cases: list[Any]) -> Any:
        yield cases[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(interrupted)
    assert bench.record["not_measured"] == names[1:]
