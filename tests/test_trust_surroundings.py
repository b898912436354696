"""Kernels that prove themselves, whatever goes on around the call: graphs that are captured, modes
of autograd, other processes, what ``verify`` is given.

On a pretended card, see :mod:`pretended`.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pretended
import senet_kernels
from senet_kernels import (
    FusedSEBlock,
    KernelMistrustError,
    KernelMistrustWarning,
    squeeze_excite,
    trust,
)
from senet_kernels.trust import proof, store, verdicts

_has_right = store.Folder.has_right  # which the card has replaced


def _arguments(channels: int = 16, gradients: bool = False) -> list[Tensor]:
    shapes = [(2, channels, 6, 5), (4, channels), (4,), (channels, 4), (channels,)]
    return [torch.randn(shape, requires_grad=gradients) for shape in shapes]


def _launches(do: Callable[[], Any]) -> int:
    before = pretended.launches
    do()
    return pretended.launches - before


# -- captured graphs


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Say whether a stream is being captured."""
    capturing = [False]
    monkeypatch.setattr(trust, "_is_capturing", lambda x: capturing[0])
    return lambda on: capturing.__setitem__(0, on)


@pytest.mark.parametrize("between", ["nothing", "freeze", "verify"])
def test_what_has_run_can_be_captured(
    card: Path, capture: Callable[[bool], None], between: str
) -> None:
    """Whatever has the verdicts asked for anew."""
    arguments = _arguments()
    squeeze_excite(*arguments)
    if between == "freeze":
        trust.freeze()
    elif between == "verify":
        senet_kernels.verify(FusedSEBlock(8).requires_grad_(False), torch.randn(2, 8, 6, 5))
    capture(True)
    assert _launches(lambda: squeeze_excite(*arguments)) == 1


def test_what_has_not_run_is_not_captured(card: Path, capture: Callable[[bool], None]) -> None:
    """Though it was proven, by another process."""
    arguments = _arguments()
    squeeze_excite(*arguments)
    pretended.as_new_process()
    verdicts.load("cpu")
    capture(True)
    assert _launches(lambda: squeeze_excite(*arguments)) == 0
    capture(False)
    assert _launches(lambda: squeeze_excite(*arguments)) == 1
    capture(True)
    assert _launches(lambda: squeeze_excite(*arguments)) == 1


def test_a_question_is_no_call(card: Path, capture: Callable[[bool], None]) -> None:
    """``explain`` neither lets a kernel into a graph, nor keeps one out."""
    arguments = _arguments()
    squeeze_excite(*arguments)
    pretended.as_new_process()
    assert senet_kernels.explain(*arguments).backend == "triton"
    capture(True)
    assert _launches(lambda: squeeze_excite(*arguments)) == 0
    assert (
        _launches(lambda: torch.func.vjp(lambda x: squeeze_excite(x, *arguments[1:]), arguments[0]))
        == 0
    )
    capture(False)
    senet_kernels.explain(*arguments)
    assert _launches(lambda: squeeze_excite(*arguments)) == 1
    trust.freeze()
    capture(True)
    assert _launches(lambda: squeeze_excite(*arguments)) == 1


def test_each_card_loads_kernels_for_itself(card: Path) -> None:
    """Of two equal ones, too."""
    squeeze_excite(*_arguments())
    kinds_seen: list[Any] = []
    verdicts.listeners.append(lambda kind, verdict: kinds_seen.append(kind))
    try:
        verdicts.forget_answers()
        squeeze_excite(*_arguments())
    finally:
        verdicts.listeners.pop()
    (kind,) = kinds_seen
    assert verdicts.while_capturing(kind) is not None
    assert verdicts.while_capturing(kind._replace(device="cpu:1")) is None


def test_by_name_a_refused_kernel_is_not_captured(
    card: Path, capture: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(pretended.FAULT, "wrong")
    arguments = _arguments()
    with pytest.warns(KernelMistrustWarning):
        squeeze_excite(*arguments)
    capture(True)
    with pytest.raises(KernelMistrustError):
        squeeze_excite(*arguments, backend="triton")


# -- modes of autograd


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "mode",
    [
        lambda: torch.autograd.set_detect_anomaly(True),
        lambda: torch.autograd.graph.disable_saved_tensors_hooks("none here"),
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t * 0, lambda t: t),
    ],
    ids=["anomalies", "no hooks", "hooks"],
)
def test_modes_of_autograd(
    card: Path, mode: Callable[[], AbstractContextManager[None]], gradients: bool
) -> None:
    with mode():
        squeeze_excite(*_arguments(gradients=gradients))
    (verdict,) = trust.status()
    assert verdict.state == trust.TRUSTED, verdict


# -- other processes


def test_a_backend_none_of_whose_kernels_was_right_is_tried_in_a_subprocess(
    card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next kernel of one that crashed is no safer."""
    monkeypatch.setattr(store.Folder, "has_right", _has_right)
    ways: list[str] = []
    found = proof.Found(proof.Wrong("crashes", "the process died by SIGSEGV"))
    monkeypatch.setattr(verdicts, "_find", lambda kind, how, **_: ways.append(how) or found)
    for channels in (8, 12):
        with pytest.warns(KernelMistrustWarning):
            squeeze_excite(*_arguments(channels))
    pretended.as_new_process()
    with pytest.warns(KernelMistrustWarning):
        squeeze_excite(*_arguments(16))
    found = proof.Found(None, speed=2.0)
    squeeze_excite(*_arguments(20))
    squeeze_excite(*_arguments(24))
    assert ways == [store.IN_SUBPROCESS] * 4 + [store.IN_PROCESS]


def test_another_process_is_waited_for_once(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was suspended in the middle of a proof stops nobody again and again."""
    monkeypatch.setattr(verdicts, "WAIT_SECONDS", 0.5)
    monkeypatch.setattr(verdicts, "_AGAIN_SECONDS", 0.0)
    arguments = _arguments()
    squeeze_excite(*arguments)
    (path,) = card.rglob("*.json")
    record = path.read_text()
    path.unlink()
    owner = store.Owner(*store._this_process(), store.IN_PROCESS)
    mark = path.with_name(f"{path.stem}.{store._place()}.pending")
    mark.write_text(json.dumps(owner._asdict()))
    pretended.as_new_process()
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        assert _launches(lambda: squeeze_excite(*arguments)) == 0
        seconds.append(time.perf_counter() - begin)
    assert seconds[0] >= 0.5
    assert max(seconds[1:]) < 0.5
    path.write_text(record)  # at last
    assert _launches(lambda: squeeze_excite(*arguments)) == 1


# -- verify


class _Step:
    def __init__(self, model: nn.Module) -> None:
        self.models = {"net": model}

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.models["net"](x)
        return y

    def step(self, x: Tensor) -> Tensor:
        return self(x)


def _in_a_closure(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x)


def _in_an_inner_function(model: nn.Module) -> Callable[[Tensor], Any]:
    def call(x: Tensor) -> list[Tensor]:
        return [net(x) for net in nets]

    nets = [model]
    return call


_WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda model: model,
    "its method": lambda model: model.forward,
    "closure": _in_a_closure,
    "partial": lambda model: partial(model),
    "object": _Step,
    "method of an object": lambda model: _Step(model).step,
    "partial of a method": lambda model: partial(_Step(model).step),
    "in an inner function": _in_an_inner_function,
}


@pytest.mark.parametrize("way", _WAYS)
def test_verify_keeps_buffers_of_whatever_is_called(card: Path, way: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), FusedSEBlock(8))
    buffers = {name: t.clone() for name, t in model.named_buffers()}
    found = senet_kernels.verify(_WAYS[way](model), torch.randn(2, 3, 6, 5))
    assert {v.state for v in found} == {trust.TRUSTED}
    for name, t in model.named_buffers():
        assert torch.equal(t, buffers[name]), name


def test_verify_keeps_buffers_of_an_argument(card: Path) -> None:
    norm, block = nn.BatchNorm2d(8), FusedSEBlock(8)
    before = norm.running_mean.clone()  # type: ignore[union-attr]
    senet_kernels.verify(lambda net, x: block(net(x)), norm, torch.randn(2, 8, 6, 5) + 3)
    assert torch.equal(norm.running_mean, before)  # type: ignore[arg-type]


def test_verify_of_a_function_in_reach_of_unusual_modules(card: Path) -> None:
    """Made in inference mode, lazy, or gone."""
    block = FusedSEBlock(8)
    with torch.inference_mode():
        made_there = nn.BatchNorm2d(8)
    gone = nn.ReLU()
    others = [made_there, nn.LazyBatchNorm2d(), weakref.proxy(gone)]
    del gone

    def call(x: Tensor, others: Any = others) -> Tensor:
        y: Tensor = block(x)
        return y

    (one, two) = senet_kernels.verify(call, torch.randn(2, 8, 6, 5))
    assert {one.state, two.state} == {trust.TRUSTED}
