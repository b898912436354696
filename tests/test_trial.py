"""``python -m senet_kernels fuse`` on models of others: nothing is downloaded, the input fits the
first layer, a wrong block shows whatever stands behind it, a right one passes."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import library
from senet_kernels import between, converted, parity, recognise, timing, trial
from senet_kernels.__main__ import main

OPTIONS = ("--size", "12", "--batch", "2", "--seconds", "0", "--device", "cpu")


class Gate(nn.Module):
    """Squeeze-and-excitation, any number of dimensions."""

    def __init__(self, channels: int = 8, hidden: int = 4) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(channels, hidden), nn.ReLU()
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        u = self.fc2(self.act(self.fc1(x.flatten(2).mean(2))))
        return x * u.sigmoid().view(*u.shape, *[1] * (x.dim() - 2))


@pytest.fixture(autouse=True, scope="module")
def _captured_once() -> Iterator[None]:
    """The same blocks are in many tests."""
    with recognise.one_recogniser():
        yield


@pytest.fixture
def try_(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str]]]:
    """Exit status of ``fuse`` on what a function makes, and what it says."""

    def run(make: Callable[[], Any], *options: str) -> tuple[int, str]:
        module = types.ModuleType("strangers_module")
        module.make = make  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        code = main(["fuse", "strangers_module:make", *(options or OPTIONS)])
        return code, capsys.readouterr().out

    yield run
    sys.modules.pop("strangers_module", None)


# -- no downloads


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the network; nothing is given."""
    found: list[str] = []

    def refuse(host: Any, *_: Any, **__: Any) -> Any:
        found.append(str(host))
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    # What is there from an earlier download is not to be used either.
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    return found


def test_no_network_of_torchvision_loads_weights(asked: list[str]) -> None:
    """Of every builder that takes weights for a part, and of one that takes them for the whole."""
    models = library("torchvision.models")
    names = {}
    for name in models.list_models():
        arguments = trial._without_weights(models.get_model_builder(name))
        assert set(arguments.values()) == {None}
        names.setdefault(tuple(sorted(arguments)), name)
    assert ("weights", "weights_backbone") in names
    for name in (*names.values(), "lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"):
        trial.make(f"torchvision:{name}", "meta")
    assert asked == []


def test_no_network_of_timm_loads_weights(asked: list[str]) -> None:
    library("timm")
    trial.make("timm:resnet10t.c3_in1k", "cpu")
    for name in ("hf-hub:timm/resnet18.a1_in1k", "hf_hub:timm/resnet18", "HF-HUB:timm/resnet18"):
        with pytest.raises(trial.TrialError, match="is on a hub, and nothing is downloaded"):
            trial.make(f"timm:{name}", "cpu")
    assert asked == []


@pytest.mark.parametrize("name", [
    "torchvision.models.segmentation:lraspp_mobilenet_v3_large",
    "torchvision.models.detection:ssdlite320_mobilenet_v3_large",
    "segmentation_models_pytorch:Unet",
])  # fmt: skip
def test_no_function_of_a_library_loads_weights(name: str, asked: list[str]) -> None:
    library(name.partition(":")[0])
    trial.make(name, "cpu")
    assert asked == []


def test_arguments_without_weights() -> None:
    def build(
        a: int = 1, *, weights: str = "x", weights_encoder: Any = "y", encoder_weights: str = "z",
        pretrained: bool = True, pretrained_backbone: bool = True, init_weights: bool = True,
        **kwargs: Any,
    ) -> None: ...  # fmt: skip

    assert trial._without_weights(build) == {
        "weights": None, "weights_encoder": None, "encoder_weights": None,
        "pretrained": False, "pretrained_backbone": False,
    }  # fmt: skip

    def of_the_user(weights: str = "mine.pt") -> nn.Module:
        assert weights == "mine.pt"
        return nn.ReLU()

    sys.modules["strangers_module"] = module = types.ModuleType("strangers_module")
    module.make = of_the_user  # type: ignore[attr-defined]
    trial.make("strangers_module:make", "cpu")
    del sys.modules["strangers_module"]


# -- inputs


class Late(nn.Module):
    """Its first layer is registered last."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.gate, self.stem = nn.Linear(8, 3), Gate(), nn.Conv2d(4, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gate(self.stem(x)).mean((2, 3)))
        return y


def _tokens() -> nn.Module:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.gate = nn.Linear(5, 8), Gate()

        def forward(self, x: Tensor) -> Tensor:
            assert x.dim() == 3
            return self.gate(self.embed(x).mT)  # type: ignore[no-any-return]

    return Transposed()


def _seq(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


INPUTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "1-D": (lambda: _seq(nn.Conv1d(5, 8, 3), Gate()), "12"),
    "2-D": (lambda: _seq(nn.Conv2d(5, 8, 3), Gate()), "12x12"),
    "3-D": (lambda: _seq(nn.Conv3d(2, 8, 3), Gate()), "12x12x12"),
    "grouped": (lambda: _seq(nn.Conv2d(6, 8, 3, groups=2), Gate()), "12x12"),
    "depthwise 1-D": (lambda: _seq(nn.Conv1d(8, 8, 3, groups=8), Gate()), "12"),
    "transposed": (lambda: _seq(nn.ConvTranspose2d(5, 8, 3), Gate()), "12x12"),
    "transposed, grouped, 3-D": (
        lambda: _seq(nn.ConvTranspose3d(4, 8, 3, groups=2), Gate()), "12x12x12"
    ),
    "linear": (
        lambda: _seq(nn.Linear(5, 8 * 9), nn.Unflatten(1, (8, 3, 3)), Gate()), "no positions"
    ),
    "tokens": (_tokens, "12"),
    "a block alone": (Gate, "12x12"),
    "bfloat16": (lambda: _seq(nn.Conv2d(5, 8, 3), Gate()).bfloat16(), "12x12"),
    "float16": (lambda: _seq(nn.Conv1d(5, 8, 3), Gate()).half(), "12"),
    "float64": (lambda: _seq(nn.Conv3d(5, 8, 3), Gate()).double(), "12x12x12"),
    "float64, linear": (
        lambda: _seq(nn.Linear(5, 8 * 9), nn.Unflatten(1, (8, 3, 3)), Gate()).double(),
        "no positions",
    ),
    "registered last": (Late, "12x12"),
    "a norm first": (lambda: _seq(nn.BatchNorm2d(5), nn.Conv2d(5, 8, 3), Gate()), "12x12"),
    "unshuffled": (lambda: _seq(nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 3), Gate()), "12x12"),
    "without parameters before": (lambda: _seq(nn.MaxPool1d(2), nn.Conv1d(5, 8, 3), Gate()), "12"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(kind: str, try_: Callable[..., tuple[int, str]]) -> None:
    make, extents = INPUTS[kind]
    code, out = try_(make)
    assert code == 0, out
    assert "1 SE block fused\n" in out
    assert "blocks: largest difference" in out
    assert "(1 of 1 compared" in out
    for line in ("inference: ", "training step: "):
        assert f"(batch 2, {extents}, cpu)" in out.partition(line)[2].partition("\n")[0], out


def test_equal_blocks_are_captured_once(
    try_: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the model is fused on the way."""

    class Own(Gate):
        pass

    captured: list[nn.Module] = []
    monkeypatch.setattr(recognise, "_kept", [])  # as where no test shares anything
    read = recognise.read_captured
    monkeypatch.setattr(
        recognise, "read_captured", lambda m, words: captured.append(m) or read(m, words)
    )
    code, out = try_(lambda: _seq(nn.Conv2d(5, 8, 3), Own(), Own()))
    assert code == 0, out
    assert "2 SE blocks fused\n" in out
    assert len(captured) == 1


def test_default_sizes(try_: Callable[..., tuple[int, str]]) -> None:
    for kind, extents in (("1-D", "1024"), ("3-D", "32x32x32"), ("2-D", "224x224")):
        _, out = try_(INPUTS[kind][0], "--batch", "1", "--seconds", "0", "--device", "cpu")
        assert f"(batch 1, {extents}, cpu)" in out


@pytest.mark.parametrize(("make", "message"), [
    (lambda: _seq(nn.LazyConv2d(8, 3), Gate()), r"first layer, 0, is lazy \(LazyConv2d\)"),
    (lambda: nn.LazyLinear(8), r"first layer, the model, is lazy \(LazyLinear\)"),
    (lambda: _seq(nn.LazyBatchNorm1d(), nn.Conv1d(5, 8, 3)), r"is lazy \(LazyBatchNorm1d\)"),
    (lambda: _seq(nn.Conv1d(5, 8, 99), Gate()), r"does not run on \[2, 5, 12\]: RuntimeError"),
    (lambda: _seq(nn.Conv3d(5, 8, 99).double()), r"\[2, 5, 12, 12, 12\] of float64: Runtime"),
    (lambda: _seq(nn.Flatten(), nn.Linear(7, 3)), r"does not run on \[2, 3, 12, 12\]"),
], ids=["conv", "linear", "norm", "1-D", "3-D", "flattened"])  # fmt: skip
def test_no_input(
    make: Callable[[], nn.Module], message: str, try_: Callable[..., tuple[int, str]]
) -> None:
    with pytest.raises(SystemExit, match=f"model: 'strangers_module:make' .*{message}"):
        try_(make)


def test_lazy_layers_further_on(try_: Callable[..., tuple[int, str]]) -> None:
    code, out = try_(lambda: _seq(nn.Conv2d(5, 8, 3), Gate(), nn.LazyBatchNorm2d(), nn.Flatten(),
                                  nn.LazyLinear(3)))  # fmt: skip
    assert code == 0, out


# -- parity


class Scale(nn.Module):
    """LayerScale in a residual block."""

    def __init__(self, inner: nn.Module, start: float) -> None:
        super().__init__()
        self.inner, self.gamma = inner, nn.Parameter(start * torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.gamma * self.inner(x)
        return y


class Then(nn.Module):
    """A network, and what becomes of its output."""

    def __init__(self, then: Callable[[Tensor], Any], *more: nn.Module) -> None:
        super().__init__()
        self.net, self.then = _seq(nn.Conv2d(5, 8, 3), nn.ReLU(), Gate(), *more), then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.net(x))


@dataclass
class Found:
    mask: Tensor
    logits: Tensor


def _boxes(y: Tensor) -> list[dict[str, Tensor]]:
    """As of a detector: as many as are above a threshold, ordered by score."""
    found = []
    for image in y:
        scores = image.mean(0).flatten()
        kept = scores[scores > scores.mean()].sort(descending=True)
        found.append({"boxes": kept.values[:, None].expand(-1, 4), "labels": kept.indices})
    return found


def _zeroed(layer: Any) -> Any:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _dead_gate() -> nn.Module:
    gate = Gate()
    _zeroed(gate.fc2)
    return _seq(nn.Conv2d(5, 8, 3), gate)


def _tiny(factor: float) -> nn.Module:
    model = _seq(nn.Conv2d(5, 8, 3), Gate(), nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        for parameter in (*model[0].parameters(), *model[2].parameters()):
            parameter *= factor
    return model


#: Untrained networks whose output tells little of their blocks.
HIDING: dict[str, Callable[[], nn.Module]] = {
    "zero head": lambda: _seq(nn.Conv2d(5, 8, 3), Gate(), nn.Flatten(),
                              _zeroed(nn.Linear(800, 3))),
    "zero norm": lambda: _seq(nn.Conv2d(5, 8, 3), Gate(), _zeroed(nn.BatchNorm2d(8))),
    "zero convolution": lambda: _seq(nn.Conv2d(5, 8, 3), Gate(), _zeroed(nn.Conv2d(8, 8, 3))),
    "zero stem": lambda: _seq(_zeroed(nn.Conv2d(5, 8, 3)), Gate()),
    "LayerScale": lambda: _seq(nn.Conv2d(5, 8, 3), Scale(Gate(), 1e-6)),
    "LayerScale that is no constant": lambda: _seq(nn.Conv2d(5, 8, 3), _uneven(1e-6)),
    "ReZero": lambda: _seq(nn.Conv2d(5, 8, 3), Scale(Gate(), 0.0)),
    "dead gate": _dead_gate,
    "constant": lambda: Then(lambda y: torch.ones_like(y)),
    "zeros": lambda: Then(lambda y: y.clamp(5e3, 5e3) - 5e3),
    "tiny": lambda: _tiny(1e-12),
    "tinier": lambda: _tiny(1e-22),
    "huge": lambda: _tiny(1e22),
    "integers": lambda: Then(lambda y: y.amax((2, 3)).argmax(1)),
    "booleans": lambda: Then(lambda y: y > 9),
    "NaN": lambda: Then(lambda y: y * math.nan),
    "NaN from the first layer": lambda: _seq(Nan(nn.Conv2d(5, 8, 3)), Gate()),
    "infinite": lambda: Then(lambda y: y.abs() / 0),
    "boxes": lambda: Then(_boxes),
    "no boxes": lambda: Then(lambda y: [{"boxes": y[0, :0], "labels": torch.zeros(0).long()}]),
    "the first tensor of a dictionary": lambda: Then(lambda y: {"size": torch.ones(2), "out": y}),
    "a dataclass": lambda: Then(lambda y: Found(torch.ones(1), y)),
    "nothing": lambda: Then(lambda y: None),
    "sparse": lambda: Then(lambda y: y.to_sparse()),
    "sparse and a number": lambda: Then(lambda y: {"s": y.relu().to_sparse(), "n": y.mean()}),
    "numbers of Python": lambda: Then(lambda y: {"a": 1.0, "b": [y.shape]}),
    "steep": lambda: Then(lambda y: torch.sin(1e5 * y)),  # makes much of rounding
    "softmax": lambda: Then(lambda y: (1e-9 * y).flatten(1).softmax(1)),
}  # fmt: skip


class Nan(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) * math.nan
        return y


def _uneven(start: float) -> nn.Module:
    scale = Scale(Gate(), start)
    with torch.no_grad():
        scale.gamma[0] *= 1.5
    return scale


@pytest.mark.parametrize("kind", HIDING)
def test_a_right_block_passes_and_a_wrong_one_shows(
    kind: str, try_: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out = try_(HIDING[kind])
    assert code == 0, out
    assert "WRONG" not in out
    assert "inference: " in out
    monkeypatch.setattr(converted, "_excite", _off_by(1.01))
    code, out = try_(HIDING[kind])
    assert code == 1, out
    assert "WRONG" in out
    assert "inference" not in out


@pytest.mark.parametrize(("kind", "said"), [
    ("nothing", "there are no numbers in it"), ("numbers of Python", "there are no numbers in it"),
    ("NaN", "there are no finite numbers in it"), ("sparse", "largest difference"),
])  # fmt: skip
def test_what_is_said_of_outputs(
    kind: str, said: str, try_: Callable[..., tuple[int, str]]
) -> None:
    _, out = try_(HIDING[kind])
    for title in ("output", "output in training mode"):
        (line,) = (line for line in out.splitlines() if line.startswith(f"{title}: "))
        assert line.startswith(f"{title}: {said}")


_EXCITE = converted._excite


def _off_by(factor: float) -> Callable[..., Tensor]:
    return lambda *a, **k: factor * _EXCITE(*a, **k)


def _wrong_gate(module: Any, form: Any, x: Tensor, **more: Any) -> Tensor:
    """Of the neighbouring channel: nothing to see where all gates are the same."""
    return _EXCITE(module, form, x.roll(1, 1), **more).roll(-1, 1) if x.shape[1] > 1 else x


def _wrong_bias(module: Any, form: Any, x: Tensor, **more: Any) -> Tensor:
    fc2 = module.get_submodule("fc2")
    bias, fc2.bias = fc2.bias, None
    try:
        return _EXCITE(module, form, x, **more)
    finally:
        fc2.bias = bias


def _writes(module: Any, form: Any, x: Tensor, **more: Any) -> Tensor:
    y = _EXCITE(module, form, x, **more)
    with torch.no_grad():
        x.detach().mul_(2)
    return y


def _one_wrong(module: Any, form: Any, x: Tensor, **more: Any) -> Tensor:
    y = _EXCITE(module, form, x, **more).clone()
    y[-1, -1, ..., -1] *= 1.1
    return y


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def _in_training(module: Any, form: Any, x: Tensor, **more: Any) -> Tensor:
    y = _EXCITE(module, form, x, **more)
    return y * 1.01 if module.training else y


def _fails(module: Any, form: Any, x: Tensor, **more: Any) -> Tensor:
    raise RuntimeError("no such kernel")


def _backward(module: Any, form: Any, x: Tensor, **more: Any) -> Tensor:
    y: Tensor = _Doubled.apply(_EXCITE(module, form, x, **more))
    return y


WRONG: dict[str, Callable[..., Tensor]] = {
    "gate": _wrong_gate, "bias": _wrong_bias, "writes to its input": _writes,
    "one element": _one_wrong, "gradient": _backward, "in training": _in_training,
    "fails": _fails, "shape": lambda m, f, x, **k: _EXCITE(m, f, x, **k)[..., :-1],
    "NaN": lambda m, f, x, **k: _EXCITE(m, f, x, **k) * math.nan,
    "zero": lambda m, f, x, **k: 0 * _EXCITE(m, f, x, **k),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_kinds_of_wrong_blocks(
    wrong: str, try_: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> nn.Module:
        gate = Gate()
        nn.init.zeros_(gate.fc2.bias)
        return _seq(nn.Conv2d(5, 8, 3), gate, _zeroed(nn.BatchNorm2d(8)))

    assert try_(make)[0] == 0
    monkeypatch.setattr(converted, "_excite", WRONG[wrong])
    code, out = try_(make)
    assert code == 1, out
    assert "WRONG" in out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_hundredth_in_every_dtype(
    dtype: torch.dtype, rank: int, try_: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]

    def make() -> nn.Module:
        return _seq(conv(3, 64, 3), Gate(64, 16)).to(dtype)

    assert try_(make)[0] == 0
    monkeypatch.setattr(converted, "_excite", _off_by(1.01))
    assert try_(make)[0] == 1


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("name", [
    "seresnet18", "ecaresnet26t", "mobilenetv3_small_050",
])  # fmt: skip
def test_networks_of_timm(
    name: str, neighbours: bool, try_: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    timm = library("timm")
    options = ("--size", "32", "--batch", "2", "--seconds", "0", "--device", "cpu")
    options = (*options, "--neighbours") if neighbours else options

    def make() -> nn.Module:
        return timm.create_model(name, drop_rate=0.2, drop_path_rate=0.2)  # type: ignore[no-any-return]

    monkeypatch.setattr(between, "is_worth", lambda *_: True)
    code, out = try_(make, *options)
    assert code == 0, out
    assert "training step: does not run" not in out
    monkeypatch.setattr(converted, "_excite", _off_by(1.01))
    halves = between.run
    monkeypatch.setattr(between, "run", lambda *a: 1.01 * halves(*a))
    code, out = try_(make, *options)
    assert code == 1, out


def test_training_steps_are_in_training_mode_and_statistics_are_put_back(
    try_: Callable[..., tuple[int, str]],
) -> None:
    modes: list[tuple[bool, bool]] = []
    made: list[nn.Module] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            modes.append((self.training, torch.is_grad_enabled()))
            return x

    def make() -> nn.Module:
        made.append(_seq(nn.Conv2d(5, 8, 3), Gate(), nn.BatchNorm2d(8), Watched(), nn.Dropout(0.5)))
        return made[0]

    code, out = try_(make)
    assert code == 0, out
    assert modes[-8:-4] == [(True, True)] * 4
    assert modes[-4:] == [(False, False)] * 4
    norm: Any = made[0][2]  # type: ignore[index]
    assert not norm.running_mean.any()
    assert norm.num_batches_tracked == 0


def test_a_block_is_fused_in_the_mode_it_is_timed_in(
    try_: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether timm's DropPath joins depends on it."""
    seen: list[tuple[bool, Any]] = []
    fuse = timing.times

    def times(model: nn.Module, x: Tensor, step: Any, switch: Any, *rest: Any) -> Any:
        def recorded(model: nn.Module) -> Any:
            seen.append((model.training, step))
            return switch(model)

        return fuse(model, x, step, recorded, *rest)

    monkeypatch.setattr(timing, "times", times)
    assert try_(lambda: _seq(nn.Conv2d(5, 8, 3), Gate()))[0] == 0
    assert {mode is (step is timing.train) for mode, step in seen} == {True}


@pytest.mark.parametrize(("step", "seconds", "rounds"), [
    # A round is four steps; a training step here takes three times as long as inference.
    (0.25, 15, (14, 4)),
    (0.5, 15, (5, 3)),
    (0.6, 15, (3, 3)),
    (0.8, 15, (3, 2)),
    (9.0, 15, (1, 1)),
    (9.0, 0, (1, 1)),
], ids=str)  # fmt: skip
def test_a_training_step_gets_rounds_for_an_interval(
    step: float, seconds: float, rounds: tuple[int, int],
    try_: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where its own seconds are too few it takes of those of inference, which keeps a round's; both
    together end in time."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.OtherLoad, "read", lambda _: None)

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            now[0] += (3 if self.training else 1) * step
            return x

    began: list[float] = []
    times = timing.times

    def watched(*arguments: Any) -> Any:
        began.append(now[0])
        return times(*arguments)

    monkeypatch.setattr(timing, "times", watched)
    options = ("--size", "12", "--batch", "2", "--seconds", str(seconds), "--device", "cpu")
    code, out = try_(lambda: _seq(nn.Conv2d(5, 8, 3), Gate(), Slow()), *options)
    assert code == 0, out
    found = {}
    for title in ("inference", "training step"):
        (line,) = (line for line in out.splitlines() if line.startswith(f"{title}: "))
        found[title] = int(line.partition(" round")[0].rpartition(" ")[2])
    assert (found["inference"], found["training step"]) == rounds
    assert now[0] - began[0] <= max(2 * seconds, 4 * step * (1 + 3)), out


def test_outputs_without_gradients_and_a_block_called_otherwise(
    try_: Callable[..., tuple[int, str]],
) -> None:
    code, out = try_(lambda: Then(lambda y: y.argmax(1)))
    assert code == 0, out
    assert "training step: does not run: RuntimeError: no output has a gradient" in out
    model = Then(lambda y: y)
    model.forward = lambda x: model.net[2].forward(model.net[0](x))  # type: ignore[method-assign]
    code, out = try_(lambda: model)
    assert "blocks: 0 of 1 compared" in out


def test_tensors() -> None:
    a, b, c = torch.ones(3)
    nested = {"x": [a, (b,)], "y": Found(c, a), "z": 3, "n": None}
    assert list(map(id, parity.tensors(nested))) == list(map(id, (a, b, c, a)))
