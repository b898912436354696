"""Kernels that prove themselves: verdicts, where they are kept, and what becomes of wrong kernels.

On a pretended card, see :mod:`pretended`: the CPU, whose kernels are to be proven.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import pretended
import senet_kernels
from operations import CountOperations
from pretended import as_new_process
from senet_kernels import (
    FusedSEBlock,
    KernelMistrustError,
    KernelMistrustWarning,
    backends,
    channel_scale,
    explain,
    resolve,
    squeeze,
    squeeze_excite,
    trust,
    workloads,
)
from senet_kernels.__main__ import main
from senet_kernels.backends import native, triton
from senet_kernels.backends.triton import operands
from senet_kernels.backends.triton.plan import Device, Shape, TilePlan, make_plan
from senet_kernels.features import Call
from senet_kernels.pointwise import Options
from senet_kernels.trust import kinds, proof, store, verdicts, worker

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
ROOT = Path(__file__).parent.parent
_has_right = store.Folder.has_right  # which the card has replaced


@pytest.fixture
def fresh_card(card: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that has proven nothing yet: the first kernel is tried in a subprocess."""
    monkeypatch.undo()
    monkeypatch.setenv("SENET_KERNELS_CACHE", str(card))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    pretended.pretend(monkeypatch.setattr)
    monkeypatch.setattr(verdicts, "LEAST_SPEED", 0.0)
    return card


def _tensors(batch: int = 2, channels: int = 16) -> tuple[Tensor, Any, Any, Any, Any]:
    x = torch.randn(batch, channels, 6, 5)
    w1, w2 = torch.randn(4, channels), torch.randn(channels, 4)
    return x, w1, torch.randn(4), w2, torch.randn(channels)


def _right(arguments: tuple[Any, ...], **options: Any) -> Tensor:
    return squeeze_excite(*arguments, backend="reference", **options)


def _states() -> list[str]:
    return [v.state for v in trust.status()]


def _in_a_child(do: Callable[[], object]) -> int:
    """Run something in a forked process, as if it had been started anew; its number."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which there are
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        assert verdicts._forked
        verdicts._forked = False
        do()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


# -- verdicts


@pytest.mark.parametrize("gradients", [False, True])
def test_a_right_kernel_runs_from_the_first_call_on(card: Path, gradients: bool) -> None:
    arguments = _tensors()
    arguments[0].requires_grad_(gradients)
    before = explain(*arguments)
    assert before.backend == "fallback"
    assert dict(before.passed_over)["triton"].startswith("unproven: not proven on this card")
    y = squeeze_excite(*arguments)
    torch.testing.assert_close(y, _right(arguments))
    (verdict,) = trust.status()
    assert verdict.state == trust.TRUSTED
    assert verdict.speed is not None
    assert explain(*arguments).backend == "triton"
    for question in verdicts._questions:
        assert len(question.known) <= 1
    launches = pretended.launches
    torch.testing.assert_close(squeeze_excite(*arguments), y)
    assert pretended.launches == launches + 1  # nothing is proven again
    assert len(list(card.rglob("*.json"))) == 1
    assert not list(card.rglob("*.pending"))
    assert "verdicts on this card: 1 trusted" in str(backends())


@pytest.mark.parametrize("fault", pretended.FAULTS)
def test_a_faulty_kernel_is_refused(
    card: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller gets the right result and one warning; the verdict says what is wrong."""
    monkeypatch.setenv(pretended.FAULT, fault)
    arguments = _tensors(batch=3)
    for t in arguments:
        t.requires_grad_()
    with pytest.warns(KernelMistrustWarning, match=pretended.FAULTS[fault]) as seen:
        y = squeeze_excite(*arguments, residual=arguments[0], after="relu")
    assert len(seen) == 1
    text = str(seen[0].message)
    for part in ("report", "x 3x16x6x5", "torch.float32", f"torch {torch.__version__}", "kernels "):
        assert part in text
    torch.testing.assert_close(y, _right(arguments, residual=arguments[0], after="relu"))
    (verdict,) = trust.status()
    assert verdict.state == trust.REFUSED
    assert verdict.reason.startswith(pretended.FAULTS[fault])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        squeeze_excite(*arguments, residual=arguments[0], after="relu")
        as_new_process()
        launches = pretended.launches
        squeeze_excite(*arguments, residual=arguments[0], after="relu")
    assert pretended.launches == launches
    answer = explain(*arguments, residual=arguments[0], after="relu")
    assert dict(answer.passed_over)["triton"].startswith(f"refused: {pretended.FAULTS[fault]}")


@pytest.mark.parametrize("fault", ["wrong", "unwritten", "writes behind", "race"])
@pytest.mark.parametrize("part", ["squeeze", "channel_scale", "in place"])
def test_every_form_is_proven(
    card: Path, fault: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, *_ = _tensors()
    u = torch.randn(2, 16)
    calls: dict[str, Callable[[], Tensor]] = {
        "squeeze": lambda: squeeze(x, before="silu"),
        "channel_scale": lambda: channel_scale(x, u, gate="sigmoid"),
        "in place": lambda: squeeze_excite(x.clone(), *arguments[1:], inplace=True),
    }
    arguments = _tensors()
    right = calls[part]()
    assert _states() == [trust.TRUSTED]
    trust.forget()
    monkeypatch.setenv(pretended.FAULT, fault)
    with pytest.warns(KernelMistrustWarning, match=pretended.FAULTS[fault]):
        torch.testing.assert_close(calls[part](), right, rtol=1e-4, atol=1e-4)
    assert _states() == [trust.REFUSED]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fault", ["wrong", "one element wrong"])
@pytest.mark.parametrize("part", ["whole", "residual", "squeeze", "channel_scale"])
def test_few_bits_are_no_excuse(
    card: Path, part: str, fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundredth too much, or one element wrong, is seen beside roundings of up to 0.4 %."""
    arguments = [t.to(dtype) for t in _tensors(batch=16)]
    x, u = arguments[0], torch.randn(16, 16, dtype=dtype)
    residual = torch.randn_like(x)
    calls: dict[str, Callable[[], Tensor]] = {
        "whole": lambda: squeeze_excite(*arguments),
        "residual": lambda: squeeze_excite(*arguments, residual=residual, after="relu"),
        "squeeze": lambda: squeeze(x),
        "channel_scale": lambda: channel_scale(x, u, gate="sigmoid"),
    }
    calls[part]()
    assert _states() == [trust.TRUSTED]
    trust.forget()
    monkeypatch.setenv(pretended.FAULT, fault)
    with pytest.warns(KernelMistrustWarning, match="wrong: y"):
        calls[part]()
    assert _states() == [trust.REFUSED]


def test_a_slow_kernel_is_not_run(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pretended.FAULT, pretended.SLOW)
    monkeypatch.setattr(verdicts, "LEAST_SPEED", proof.LEAST_SPEED)
    arguments = _tensors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(squeeze_excite(*arguments), _right(arguments))
    (verdict,) = trust.status()
    assert verdict.state == trust.SLOWER
    assert verdict.speed is not None
    assert verdict.speed < 0.95
    squeeze_excite(*arguments, backend="triton")  # it is right


def test_by_name_a_mismatch_raises(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pretended.FAULT, "wrong")
    arguments = _tensors()
    with (
        pytest.warns(KernelMistrustWarning),
        pytest.raises(KernelMistrustError, match=r"'triton' was asked for.*wrong: y\["),
    ):
        squeeze_excite(*arguments, backend="triton")
    with pytest.raises(KernelMistrustError, match="found wrong on this machine"):
        squeeze_excite(*arguments, backend="triton")
    monkeypatch.setattr(trust, "_mode", "trust")
    resolve._RESOLVED.clear()
    squeeze_excite(*arguments, backend="triton")


def test_transforms_ask_once(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a verdict; they reach none."""
    x, *rest = _tensors()
    asked: list[Any] = []
    decide = verdicts.decide
    monkeypatch.setattr(verdicts, "decide", lambda *a, **k: asked.append(a) or decide(*a, **k))
    gradient = torch.func.grad(lambda x: squeeze_excite(x, *rest).sum())
    launches = pretended.launches
    gradient(x)
    gradient(x)
    assert len(asked) == 2
    assert pretended.launches == launches
    squeeze_excite(x.clone().requires_grad_(), *rest)
    asked.clear()
    launches = pretended.launches
    for _ in range(3):
        gradient(x)
    assert len(asked) <= 1
    assert pretended.launches == launches + 6


def test_by_name_a_mismatch_raises_under_transforms(
    card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where vmap folds what it maps into the batch."""
    monkeypatch.setenv(pretended.FAULT, "wrong")
    x, *rest = _tensors(batch=3)
    x.requires_grad_()
    with pytest.warns(KernelMistrustWarning), pytest.raises(KernelMistrustError):
        squeeze_excite(x, *rest, backend="triton")

    def call(x: Tensor) -> Tensor:
        return squeeze_excite(x, *rest, backend="triton")

    x = x.detach()
    with pytest.raises(KernelMistrustError):
        torch.func.grad(lambda x: call(x).sum())(x)
    with pytest.raises(KernelMistrustError):
        torch.func.vmap(call)(x[:, None])


@pytest.mark.parametrize("where", ["frozen", "a forked child", "a captured stream"])
def test_by_name_a_kernel_runs_where_nothing_can_be_proven(
    card: Path, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And that is said once."""
    if where == "frozen":
        trust.freeze()
    monkeypatch.setattr(verdicts, "_forked", where == "a forked child")
    monkeypatch.setattr(trust, "_is_capturing", lambda x: where == "a captured stream")
    launches, arguments = pretended.launches, _tensors()
    with caplog.at_level(logging.INFO, "senet_kernels.trust"):
        squeeze_excite(*arguments, backend="triton")
        squeeze_excite(*arguments, backend="triton")
    assert pretended.launches == launches + 2
    (record,) = caplog.records
    assert "backend='triton' was asked for, and runs all the same" in record.message
    assert not trust.status()


def test_modes(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _tensors()
    monkeypatch.setattr(trust, "_mode", "trust")
    launches = pretended.launches
    squeeze_excite(*arguments)
    assert (pretended.launches, _states()) == (launches + 1, [])
    monkeypatch.setattr(trust, "_mode", "off")
    resolve._RESOLVED.clear()
    squeeze_excite(*arguments)
    assert pretended.launches == launches + 1
    assert "SENET_KERNELS_GPU is off" in dict(explain(*arguments).passed_over)["triton"]
    block = FusedSEBlock(16)
    block(arguments[0])
    assert _states() == []
    squeeze_excite(*arguments, backend="triton")
    assert pretended.launches == launches + 2
    monkeypatch.setattr(trust, "_mode", "on")
    resolve._RESOLVED.clear()
    with pytest.raises(ValueError, match="SENET_KERNELS_GPU: expected one of verify, trust, off"):
        squeeze_excite(*arguments)


def test_the_mode_is_checked_at_import() -> None:
    """In any case of letters."""
    assert [trust._checked(text) for text in ("OFF", " Trust ", "verify")] == [
        "off",
        "trust",
        "verify",
    ]
    environment = {**os.environ, "SENET_KERNELS_GPU": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "import senet_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "SENET_KERNELS_GPU: expected one of verify, trust, off, got '0'" in done.stderr


def test_a_verdict_is_of_a_variant(card: Path) -> None:
    """Of a bucket of batches, of dtype, layout, options, memory, and direction."""
    x, *rest = _tensors(batch=3)
    base = dict.fromkeys(_states())
    assert not base

    def count(x: Tensor, **options: Any) -> int:
        squeeze_excite(x, *rest, **options)
        return len(trust.status())

    assert count(x) == 1
    assert count(torch.cat([x, x[:1]])) == 1  # four, as three
    assert count(torch.cat([x, x])) == 2
    assert count(x.contiguous(memory_format=torch.channels_last)) == 3
    assert count(x, gate="tanh") == 4
    assert count(x.clone().requires_grad_()) == 5
    misaligned = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    assert count(misaligned) == 6
    strided = torch.empty(3, 16, 6, 10)[..., ::2].copy_(x)
    assert count(strided) == 7
    assert count(x, residual=x.clone()) == 8
    assert count(x, residual=x.contiguous(memory_format=torch.channels_last)) == 9
    assert count(x, residual=misaligned) == 10
    assert set(_states()) <= {trust.TRUSTED, trust.SLOWER}


def test_layouts_that_kernels_walk_differently_are_kinds_of_their_own() -> None:
    """Whatever the strides are called: dense or not."""
    layouts = {
        "contiguous": torch.randn(2, 16, 6, 5),
        "batch and channels swapped": torch.randn(16, 2, 6, 5).transpose(0, 1),
        "channels-last": torch.randn(2, 6, 5, 16).permute(0, 3, 1, 2),
        "the same, misaligned": torch.randn(961)[1:].view(2, 6, 5, 16).permute(0, 3, 1, 2),
        "rows of channels": torch.randn(2, 5, 6, 16).permute(0, 3, 2, 1),
        "channels cut": torch.randn(2, 20, 6, 5)[:, :16],
        "every other position": torch.randn(2, 16, 6, 10)[..., ::2],
        "one image twice": torch.randn(1, 16, 6, 5).expand(2, -1, -1, -1),
    }
    found = {}
    for name, x in layouts.items():
        found[name] = kinds.memory_of(tuple(x.shape), x.stride(), x.data_ptr() % 16 == 0)
    assert len(set(found.values())) == len(found) - 1, found
    assert found["every other position"] == "rows, copied"
    assert found["channels cut"] == "rows, apart by 8n"
    assert found["channels-last"] == "channels-last"


def test_a_kind_is_the_same_in_another_process() -> None:
    """With a residual in other memory, too."""
    x, w1, _, w2, _ = _tensors()
    call = _call("two layers", residual=True)._replace(device="cpu")
    of_channels = x.contiguous(memory_format=torch.channels_last)
    for residual in (None, x, of_channels):
        kind = kinds.kind_of("native", call, x, w1, w2, 16, kinds.TRAINING, residual)
        assert kind.residual == (of_channels.stride() if residual is of_channels else ())
        assert kinds.from_json(kind.as_json()) == kind


def _call(form: str, **facts: bool) -> Call:
    names = ("shift", "weighted", "affine", "lengths", "residual", "inplace")
    options = Options("identity", "identity", "identity", "identity")
    given = [facts.get(name, False) for name in names]
    return Call("cuda", torch.float32, torch.float32, options, form, *given)


def _kind_on_a_card(
    backend: str, call: Call, shape: tuple[int, ...], direction: str = kinds.TRAINING
) -> kinds.Kind:
    x = torch.empty(shape, device="meta", memory_format=torch.channels_last)
    channels, hidden = shape[1], 16 if call.form == "two layers" else 0
    name = kinds.class_of(backend, call, x, hidden, channels, direction)
    return kinds.kind_for(
        backend, call, "cuda:0", shape, x.stride(), True, hidden, channels, direction, name
    )


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for one that is not there."""
    if native.UNAVAILABLE or native.unavailable_on("cuda"):
        pytest.skip("no CUDA kernels in the library")
    gpu, plan = native.Gpu(90, 132, 232_448, 233_472), native._launch_plan
    monkeypatch.setattr(native, "_launch_plan", lambda x, _, *rest: plan(x, gpu, *rest))
    device = Device("sm_90", 132)
    monkeypatch.setattr(operands, "_device", lambda _: device)


@pytest.mark.parametrize("form", ["two layers", "squeeze alone", "channel_scale alone"])
def test_every_form_has_its_plan_in_the_key(h100: None, form: str) -> None:
    """Halves too: where few images are shared out among blocks, those wait for one another."""
    for backend in ("native", "triton"):
        few, many = (_kind_on_a_card(backend, _call(form), (n, 64, 56, 56)) for n in (1, 700))
        assert few.plan.startswith("forward: ")
        assert "; backward: " in few.plan
        assert few.plan in few.key
        assert few.plan != many.plan
        of_inference = _kind_on_a_card(backend, _call(form), (1, 64, 56, 56), kinds.INFERENCE)
        assert "backward" not in of_inference.plan
    exchanges = _kind_on_a_card("native", _call("squeeze alone"), (8, 64, 56, 56))
    assert exchanges.waits
    assert "cluster" in exchanges.plan or "exchange" in exchanges.plan


def test_constants_of_tritons_kernels_are_in_the_key(h100: None) -> None:
    """One key, one set of constants; and not a key for each batch."""
    call = _call("two layers")
    by_key: dict[str, set[Any]] = {}
    for side in (7, 8, 13, 14, 16):
        for batch in range(33, 65):
            kind = _kind_on_a_card("triton", call, (batch, 24, side, side))
            shape = Shape(batch, 24, side * side, 16, 24, True, math.gcd(24 * side * side, 16))
            plan = make_plan(shape, 4, Device("sm_90", 132), masked=False)
            constants = [
                cut._replace(tiles=0, splits=cut.splits > 1, rounds=0)
                if isinstance(cut, TilePlan) else cut._replace(vectors=0, blocks=0)
                for cut in (plan.sums, plan.writes)
            ]  # fmt: skip
            by_key.setdefault(kind.key, set()).add((*constants, batch % 16 == 0))
    assert all(len(constants) == 1 for constants in by_key.values())
    assert len(by_key) <= 3 * 5


def test_what_tiles_divide_is_proven_by_itself(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch of an epoch; another image of a size that vectors do not divide."""
    monkeypatch.setenv(pretended.FAULT, "wrong on 20x16x6x5; wrong on 2x16x7x5")
    for shapes in (((32, 16, 6, 5), (20, 16, 6, 5)), ((2, 16, 6, 6), (2, 16, 7, 5))):
        trust.forget()
        right, wrong = ((torch.randn(shape), *_tensors()[1:]) for shape in shapes)
        squeeze_excite(*right)
        assert _states() == [trust.TRUSTED]
        with pytest.warns(KernelMistrustWarning):
            torch.testing.assert_close(squeeze_excite(*wrong), _right(wrong))


def test_nothing_of_the_callers_has_a_part(card: Path) -> None:
    """Modes, hooks, inference mode, random numbers, autocast: a proof is apart from them."""
    arguments = _tensors()
    numbers = torch.get_rng_state()
    with torch.inference_mode(), CountOperations() as counted:
        squeeze_excite(*arguments)
    assert counted.calls == {"senet_kernels::triton_forward": 1}
    for t in arguments:
        t.requires_grad_()
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        squeeze_excite(*arguments)
    assert len(packed) <= 10  # of the call: its inputs, and what it keeps
    assert torch.equal(torch.get_rng_state(), numbers)
    assert _states() == [trust.TRUSTED] * 2


# -- files


def _file(card: Path) -> Path:
    (path,) = card.rglob("*.json")
    return path


@pytest.mark.parametrize("what", ["truncated", "empty", "another's", "not text", "a number"])
def test_a_damaged_file_is_no_verdict(card: Path, what: str) -> None:
    arguments = _tensors()
    squeeze_excite(*arguments)
    path = _file(card)
    whole = path.read_bytes()
    damaged = {
        "truncated": whole[: len(whole) // 2], "empty": b"", "not text": b"\xff\xfe\x00",
        "another's": whole.replace(b"trusted", b"refused"), "a number": b"3",
    }  # fmt: skip
    path.write_bytes(damaged[what])
    as_new_process()
    squeeze_excite(*arguments)
    assert _states() == [trust.TRUSTED]
    assert json.loads(path.read_text())["state"] == trust.TRUSTED


def test_where_nothing_can_be_written(
    card: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In memory, and said once. (Permissions do not stop root: the folder is a file.)"""
    blocked = card / "file"
    blocked.write_text("")
    monkeypatch.setenv("SENET_KERNELS_CACHE", str(blocked))
    arguments = _tensors()
    with caplog.at_level(logging.WARNING, "senet_kernels.trust"):
        squeeze_excite(*arguments)
        squeeze_excite(*_tensors(batch=9))
    assert _states() == [trust.TRUSTED] * 2
    assert 1 <= len(caplog.records) <= 2
    launches = pretended.launches
    squeeze_excite(*arguments)
    assert pretended.launches == launches + 1


@pytest.mark.parametrize("function", ["replace", "link"])
def test_a_file_system_that_refuses(
    card: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, function, refuse)
    arguments = _tensors()
    torch.testing.assert_close(squeeze_excite(*arguments), _right(arguments))
    assert _states() == [trust.TRUSTED]
    left = [p for p in card.rglob("*") if p.is_file() and p.suffix != ".json"]
    assert left == []


def test_a_folder_deleted_meanwhile(card: Path) -> None:
    squeeze_excite(*_tensors())
    shutil.rmtree(card)
    squeeze_excite(*_tensors())
    squeeze_excite(*_tensors(batch=9))
    assert _states() == [trust.TRUSTED] * 2
    assert _file(card)


def test_another_driver_is_another_card(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _tensors()
    squeeze_excite(*arguments)
    known = kinds.card
    monkeypatch.setattr(kinds, "card", lambda device: {**known(device), "driver": "999.1"})
    as_new_process()
    launches = pretended.launches
    squeeze_excite(*arguments)
    assert pretended.launches > launches + 3
    assert len({p.parent for p in card.rglob("*.json")}) == 2


def test_other_kernels_are_proven_anew(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _tensors()
    squeeze_excite(*arguments)
    folder = store.Folder(kinds.environment("cpu"))
    assert _has_right(folder, "triton")
    assert not _has_right(folder, "native")
    monkeypatch.setattr(triton, "kernel_files", lambda: [Path(pytest.__file__)])
    as_new_process()
    assert not _has_right(folder, "triton")
    launches = pretended.launches
    squeeze_excite(*arguments)
    assert pretended.launches > launches + 3
    assert len(list(card.rglob("*.json"))) == 2
    assert _has_right(folder, "triton")


def test_forget_and_freeze(card: Path) -> None:
    arguments = _tensors()
    squeeze_excite(*arguments)
    assert "trusted" in str(trust.status())
    trust.freeze()
    launches = pretended.launches
    squeeze_excite(*arguments)
    assert pretended.launches == launches + 1
    others = _tensors(batch=9)
    torch.testing.assert_close(squeeze_excite(*others), _right(others))
    assert pretended.launches == launches + 1
    left = _file(card).with_suffix(f".{store._place()}.pending")
    left.write_text("of a process that ended, for a kernel without a verdict")
    assert trust.forget() == 1
    assert not list(card.rglob("*.json"))
    assert not left.exists()
    assert not trust.status()
    squeeze_excite(*others)
    assert pretended.launches > launches + 3


@pytest.mark.parametrize("where", ["frozen", "a forked child"])
def test_nothing_is_measured_against_compiled_code(
    card: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w1, b1, w2, b2 = arguments = _tensors()
    squeeze_excite(*arguments)
    options = Options("relu", "sigmoid", "identity", "identity")
    call = Call("cpu", x.dtype, x.dtype, options, "two layers", *[False] * 6)
    kind = kinds.kind_of("triton", call, x, w1, w2, 16, kinds.INFERENCE)
    assert verdicts.decide(kind, may_prove=False).state == trust.TRUSTED
    if where == "frozen":
        trust.freeze()
    monkeypatch.setattr(verdicts, "_forked", where == "a forked child")
    launches = pretended.launches
    assert verdicts.measure_compiled(kind).compiled_speed is None
    assert pretended.launches == launches


# -- marks and processes


def _mark(card: Path, arguments: tuple[Any, ...], owner: store.Owner) -> Path:
    """Leave the mark of another process for the kind of a call."""
    squeeze_excite(*arguments)
    path = _file(card)
    path.unlink()
    pending = path.with_name(f"{path.stem}.{store._place()}.pending")
    pending.write_text(json.dumps(owner._asdict()))
    as_new_process()
    return pending


def _dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("of", ["a process", "a subprocess", "another process of that number"])
def test_a_mark_of_a_process_that_ended(card: Path, of: str) -> None:
    """It may have been ended by anyone (SIGTERM, no memory): the kernel is tried, in a process of
    its own. Whatever the clock says: a boot, a process and its start are compared."""
    arguments = _tensors()
    how = store.IN_SUBPROCESS if of == "a subprocess" else store.IN_PROCESS
    pid = os.getpid() if of == "another process of that number" else _dead()
    pending = _mark(card, arguments, store.Owner(store._boot(), pid, "12", how))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(squeeze_excite(*arguments), _right(arguments))
    assert _states() == [trust.TRUSTED]
    assert json.loads(_file(card).read_text())["how"] == store.IN_SUBPROCESS
    assert not pending.exists()


def test_where_no_process_can_be_made_for_what_may_have_ended_one(
    card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not tried here: the next process asks again."""
    arguments = _tensors()
    owner = store.Owner(store._boot(), _dead(), "12", store.IN_PROCESS)
    pending = _mark(card, arguments, owner)
    launches = pretended.launches
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(card / "no-such-python"))
        torch.testing.assert_close(squeeze_excite(*arguments), _right(arguments))
    assert pretended.launches == launches
    (verdict,) = trust.status()
    assert verdict.state == trust.UNPROVEN
    assert f"process {owner.pid} ended while it tried this" in verdict.reason
    assert not list(card.rglob("*.json"))
    as_new_process()
    squeeze_excite(*arguments)
    assert _states() == [trust.TRUSTED]
    assert json.loads(_file(card).read_text())["how"] == store.IN_SUBPROCESS
    assert not pending.exists()


def test_waiting_for_another_process(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One decides; the others take its verdict, or PyTorch's operators where it takes long."""
    monkeypatch.setattr(verdicts, "WAIT_SECONDS", 0.2)
    arguments = _tensors()
    boot, pid, start = store._this_process()
    owner = store.Owner(boot, pid, start, store.IN_PROCESS)
    pending = _mark(card, arguments, owner)
    launches = pretended.launches
    torch.testing.assert_close(squeeze_excite(*arguments), _right(arguments))
    assert (pretended.launches, _states()) == (launches, [])
    begin = time.perf_counter()
    squeeze_excite(*arguments)
    assert time.perf_counter() - begin < 0.1  # it does not wait in every call
    pending.unlink()
    verdicts._later.clear()
    squeeze_excite(*arguments)
    assert _states() == [trust.TRUSTED]


def test_an_unreadable_mark_does_not_stay(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "WAIT_SECONDS", 0.1)
    arguments = _tensors()
    pending = _mark(card, arguments, store.Owner("", 0, "", store.IN_PROCESS))
    pending.write_text('{"boot": "tr')
    squeeze_excite(*arguments)
    verdicts._later.clear()
    squeeze_excite(*arguments)
    assert _states() == [trust.TRUSTED]


def test_threads_that_call_at_once(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _tensors()
    results: list[Tensor] = []
    barrier = threading.Barrier(6)
    found: list[Any] = []
    find = verdicts._find
    monkeypatch.setattr(verdicts, "_find", lambda *a, **k: found.append(a) or find(*a, **k))

    def call() -> None:
        barrier.wait()
        results.append(squeeze_excite(*arguments))

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _states() == [trust.TRUSTED]
    assert len(found) == 1
    assert len(results) == 6
    for y in results:
        torch.testing.assert_close(y, _right(arguments))


def _loop(seconds: float) -> int:
    """Forget, decide and read for a while, as processes that start anew; how often."""
    x, *rest = _tensors()
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end or count < 3:
        as_new_process()
        given = x[:1].repeat(random.choice([1, 2, 5]), 1, 1, 1)
        if random.random() < 0.2:
            trust.forget()
        y = squeeze_excite(given, *rest)
        torch.testing.assert_close(y, squeeze_excite(given, *rest, backend="reference"))
        assert set(_states()) <= {trust.TRUSTED}, trust.status()
        for path in Path(os.environ["SENET_KERNELS_CACHE"]).rglob("*.json"):
            with suppress(FileNotFoundError):
                assert path.read_text().endswith("}")
        count += 1
    return count


_LOOP = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch
torch.set_num_threads(1)
import pretended
pretended.pretend()
import test_trust
from senet_kernels.trust import store, verdicts
store.Folder.has_right = lambda *args: True
verdicts.LEAST_SPEED = 0.0
print(test_trust._loop(float(sys.argv[3])))
"""


@needs_fork
def test_processes_that_share_a_cache(card: Path) -> None:
    """They forget, decide and read at once: no wrong verdict, no torn file."""
    children = [_in_a_child(lambda: _loop(1.5)) for _ in range(4)]
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.slow
def test_sixteen_processes_for_a_minute(card: Path) -> None:
    command = [sys.executable, "-c", _LOOP, str(ROOT), str(ROOT / "tests"), "60"]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(16)
    ]
    for process in running:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]
        assert int(out) >= 3


def test_the_first_kernel_is_tried_in_a_subprocess(
    fresh_card: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A crash and a hang there cost this process nothing. (Two processes are started for it, each
    of which imports torch.)"""
    arguments = _tensors()
    right = _right(arguments)
    with caplog.at_level(logging.INFO, "senet_kernels.trust"):
        torch.testing.assert_close(squeeze_excite(*arguments), right)
    assert "(subprocess, " in caplog.text
    assert _states() == [trust.TRUSTED]
    assert json.loads(_file(fresh_card).read_text())["how"] == store.IN_SUBPROCESS
    for fault, text in (
        ("dies", "crashes: the process died by SIGSEGV"),
        (pretended.HANGS, r"hangs: no word for 0\.5 seconds"),
    ):
        trust.forget()
        (fresh_card / pretended.FAULT).write_text(fault)
        monkeypatch.setattr(worker, "JOB_SECONDS", 0.5 if fault == pretended.HANGS else 60.0)
        with pytest.warns(KernelMistrustWarning, match=text):
            torch.testing.assert_close(squeeze_excite(*arguments), right)
        assert _states() == [trust.REFUSED]
        assert worker._worker is None


def test_a_worker_that_someone_else_ended(
    fresh_card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Says nothing about the kernel, which is then tried here."""

    class Ended:
        def receive(self, seconds: float) -> None:
            return None

        class process:
            @staticmethod
            def wait(seconds: float) -> int:
                return -signal.SIGKILL

    monkeypatch.setattr(worker, "_begin", lambda message: Ended())
    squeeze_excite(*_tensors())
    (verdict,) = trust.status()
    assert verdict.state == trust.TRUSTED


def test_kernels_that_wait_are_tried_in_a_subprocess_alone(
    card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "waits", lambda plan: "pretended" in plan, raising=False)
    monkeypatch.setattr(sys, "executable", str(card / "no-such-python"))
    arguments = _tensors()
    launches = pretended.launches
    torch.testing.assert_close(squeeze_excite(*arguments), _right(arguments))
    assert pretended.launches == launches
    (verdict,) = trust.status()
    assert verdict.state == trust.UNPROVEN
    assert "no process for trying kernels could be started" in verdict.reason


def test_plans_of_cuda_that_wait() -> None:
    assert native.waits("cluster of 16 blocks per image, split by channels")
    assert native.waits("16 blocks per image, exchange through global memory, two passes")
    assert not native.waits("1 block per image, 256 threads and 12 KB each, single pass")


@needs_fork
def test_a_process_that_dies_of_a_kernel(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In process: that one is lost, and the next one tries the kernel in a process of its own."""
    arguments = _tensors()
    monkeypatch.setenv(pretended.FAULT, "dies")
    pid = _in_a_child(lambda: (faulthandler.disable(), squeeze_excite(*arguments)))
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGSEGV
    with pytest.warns(KernelMistrustWarning, match="crashes: the process died by SIGSEGV"):
        torch.testing.assert_close(squeeze_excite(*arguments), _right(arguments))
    assert _states() == [trust.REFUSED]


@needs_fork
def test_a_forked_child_proves_nothing(card: Path) -> None:
    """It runs what is proven."""
    proven, other = _tensors(), _tensors(batch=9)
    squeeze_excite(*proven)

    def child() -> None:
        verdicts._forked = True  # as forking has set it
        launches = pretended.launches
        squeeze_excite(*proven)
        assert pretended.launches == launches + 1
        torch.testing.assert_close(squeeze_excite(*other), _right(other))
        assert pretended.launches == launches + 1

    assert os.waitpid(_in_a_child(child), 0)[1] == 0
    assert _states() == [trust.TRUSTED]


# -- a model


def test_verify_leaves_a_model_as_it_was(card: Path) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), FusedSEBlock(16), torch.nn.Dropout()
    )
    x = torch.randn(2, 3, 8, 7)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    numbers = torch.get_rng_state()
    found = senet_kernels.verify(model, x)
    assert [v.state for v in found] == [trust.TRUSTED] * 2
    assert torch.equal(torch.get_rng_state(), numbers)
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name
    assert all(p.grad is None for p in model.parameters())
    assert [v.state for v in senet_kernels.verify(model, x)] == [trust.TRUSTED] * 2


@pytest.mark.parametrize("what", ["the module", "in place", "its forward", "a part"])
def test_verify_finds_what_is_compiled(card: Path, what: str) -> None:
    """It is run eagerly."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), FusedSEBlock(16))
    given: Any = model
    if what == "the module":
        given = torch.compile(model, backend="eager")
    elif what == "in place":
        model.compile(backend="eager")
    elif what == "its forward":
        given = torch.compile(model.forward, backend="eager")
    else:
        model[1] = torch.compile(model[1], backend="eager")
    found = senet_kernels.verify(given, torch.randn(2, 3, 8, 7))
    assert sorted(v.name.split()[-3] for v in found) == ["inference", "training"]


def test_verify_runs_what_a_step_would_run(card: Path) -> None:
    """Of frozen parameters and inputs with gradients, in inference mode, of a function."""
    block = FusedSEBlock(16)
    directions: dict[str, list[str]] = {}
    x = torch.randn(2, 16, 6, 5)
    with torch.inference_mode():
        within = torch.randn(2, 16, 6, 5)
        found = {"in inference mode": senet_kernels.verify(block, within)}
        made_there = torch.nn.Sequential(torch.nn.BatchNorm2d(16), FusedSEBlock(16))
        found["a model made in inference mode"] = senet_kernels.verify(made_there, within)
    found["of a function"] = senet_kernels.verify(lambda x: block(x), x)
    block.requires_grad_(False)
    found["frozen"] = senet_kernels.verify(block, x)
    found["an input with gradients"] = senet_kernels.verify(block, x.clone().requires_grad_())
    for name, verdicts_of in found.items():
        directions[name] = sorted(v.name.split()[-3] for v in verdicts_of)
    assert directions == {
        "in inference mode": ["inference", "training"],
        "a model made in inference mode": ["inference"],
        "of a function": ["inference", "training"],
        "frozen": ["inference"],
        "an input with gradients": ["inference", "training"],
    }


def test_verify_puts_buffers_back_by_their_names(card: Path) -> None:
    class Running(torch.nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.block = FusedSEBlock(16)
            self.register_buffer("mean", torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
            y: Tensor = self.block(x)
            return y

    model = Running()
    before = model.mean
    assert len(senet_kernels.verify(model, torch.randn(2, 16, 6, 5))) == 2
    assert model.mean is before
    assert not model.mean.any()


def test_verify_says_that_there_is_nothing_to_prove() -> None:
    """On a CPU, whose kernels run unasked."""
    found = senet_kernels.verify(FusedSEBlock(8), torch.randn(2, 8, 4, 4))
    assert (len(found), str(found)[:16]) == (0, "nothing to prove")


def test_no_memory_is_no_verdict(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("senet_kernels.trust.proof.Problem", full)
    arguments = _tensors()
    torch.testing.assert_close(squeeze_excite(*arguments), _right(arguments))
    (verdict,) = trust.status()
    assert verdict.state == trust.UNPROVEN
    assert "out of memory" in verdict.reason
    assert not list(card.rglob("*.json"))


def _raising(error: Exception) -> Callable[[str], Callable[..., Any]]:
    def op(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            raise error

        return call

    return op


def test_a_full_disk_is_no_verdict(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a compiler keeps its kernels: what fails is not the kernel."""
    arguments = _tensors()
    with monkeypatch.context() as patch:
        patch.setattr(pretended, "_native", _raising(OSError(28, "No space left on device")))
        torch.testing.assert_close(squeeze_excite(*arguments), _right(arguments))
        (verdict,) = trust.status()
        assert verdict.state == trust.UNPROVEN
        assert "No space left on device" in verdict.reason
    assert not list(card.rglob("*.json"))
    as_new_process()
    squeeze_excite(*arguments)
    assert _states() == [trust.TRUSTED]


def test_a_warning_is_no_verdict(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a compiler's, say, which the user makes an error. It is not suppressed: what is ignored is
    so for all threads."""
    made = pretended._native

    def warn(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            warnings.warn("this is deprecated", DeprecationWarning, stacklevel=2)
            return made(name)(*args)

        return call

    arguments = _tensors()
    monkeypatch.setattr(pretended, "_native", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdict = verdicts.decide(
            kinds.kind_of("triton", _call("two layers")._replace(device="cpu"), arguments[0],
                          arguments[1], arguments[3], 16, kinds.INFERENCE)
        )  # fmt: skip
    assert verdict.state == trust.UNPROVEN
    assert "this is deprecated" in verdict.reason
    monkeypatch.setattr(pretended, "_native", made)
    trust.forget()
    squeeze_excite(*arguments)
    assert _states() == [trust.TRUSTED]


@pytest.mark.parametrize("why", ["frozen", "forked", "no memory"])
def test_what_cannot_be_proven_is_asked_once(
    card: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until freeze() or forget() is called."""

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if why == "frozen":
        trust.freeze()
    monkeypatch.setattr(verdicts, "_forked", why == "forked")
    asked: list[Any] = []
    decide = verdicts.decide
    monkeypatch.setattr(verdicts, "decide", lambda *a, **k: asked.append(a) or decide(*a, **k))
    arguments = _tensors()
    with monkeypatch.context() as patch:
        if why == "no memory":
            patch.setattr("senet_kernels.trust.proof.Problem", full)
        for _ in range(3):
            squeeze_excite(*arguments)
    assert len(asked) == 1
    verdicts._forked = False
    trust.forget()
    squeeze_excite(*arguments)
    assert len(asked) == 2
    assert _states() == [trust.TRUSTED]


def test_no_interpreter_to_start(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python within another program: kernels are tried in the process."""
    monkeypatch.setattr(store.Folder, "has_right", lambda *args: False)
    monkeypatch.setattr(sys, "executable", None)
    squeeze_excite(*_tensors())
    assert _states() == [trust.TRUSTED]


def test_the_environment_does_not_import_triton() -> None:
    code = (
        "import sys; from senet_kernels.trust import kinds; "
        "facts = dict(kinds.environment('cpu')); "
        "assert 'triton' not in sys.modules; print(facts['triton'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    try:
        import triton as installed
    except ImportError:
        assert done.stdout.strip() == "none"
    else:
        assert done.stdout.strip() == installed.__version__


def test_a_module_that_stands_in_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests of other projects have it: without a spec."""
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    assert kinds._triton_version() == "unknown"


def test_many_verdicts(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are read, published and dropped in a time that grows with their number."""
    squeeze_excite(*_tensors())
    path = _file(card)
    record = json.loads(path.read_text())
    del record["sum"]
    for i in range(100, 600):
        other = {
            **record,
            **{name: record[name].replace("C16", f"C{i}") for name in ("key", "name")},
        }
        text = json.dumps({**other, "sum": store._sum(other)})
        path.with_name(f"{kinds.digest(other['key'])}.json").write_text(text)
    as_new_process()
    published: list[Any] = []
    publish = verdicts._publish
    monkeypatch.setattr(verdicts, "_publish", lambda *a: published.append(a) or publish(*a))
    verdicts.load("cpu")
    assert len(published) == len(trust.status()) == 501
    assert trust.forget() == 501
    assert not list(card.rglob("*.json"))


def test_status_while_verdicts_are_reached(card: Path) -> None:
    facts = kinds.environment("cpu")
    verdict = trust.Verdict(trust.TRUSTED, "", key="triton | ", name="triton")
    done, errors = threading.Event(), []

    def add() -> None:
        for i in range(30_000):
            verdicts._memory[facts, str(i % 1000)] = verdict
            verdicts._memory.pop((facts, str(i * 7 % 1000)), None)
        done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=add)
    thread.start()
    try:
        with suppress(RuntimeError):
            errors.append("status() raised")
            while not done.is_set():
                trust.status()
            errors.clear()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert not errors


def test_stream_capture(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was called before runs; else PyTorch's operators, whatever is known on disk."""
    arguments, others = _tensors(), _tensors(batch=9)
    squeeze_excite(*arguments)
    monkeypatch.setattr(trust, "_is_capturing", lambda x: True)
    launches = pretended.launches
    squeeze_excite(*arguments)
    assert pretended.launches == launches + 1
    torch.testing.assert_close(squeeze_excite(*others), _right(others))
    assert pretended.launches == launches + 1
    as_new_process()
    torch.testing.assert_close(squeeze_excite(*arguments), _right(arguments))
    assert pretended.launches == launches + 1
    monkeypatch.setattr(trust, "_is_capturing", lambda x: False)
    squeeze_excite(*arguments)
    assert pretended.launches == launches + 2
    squeeze_excite(*others)
    assert _states() == [trust.TRUSTED] * 2


@pytest.mark.parametrize(
    ("shape", "hidden"),
    [((0, 16, 5, 5), 4), ((2, 16, 0), 4), ((2, 16, 5), 0), ((1, 1, 1), 1), ((2, 3, 2, 3, 4), 2)],
)
def test_extents_of_any_kind_are_proven(card: Path, shape: tuple[int, ...], hidden: int) -> None:
    x, w1, w2 = torch.randn(shape), torch.randn(hidden, shape[1]), torch.randn(shape[1], hidden)
    for gradients in (False, True):
        x.requires_grad_(gradients)
        squeeze_excite(x, w1, None, w2, None)
    assert _states() == [trust.TRUSTED] * 2


def test_a_proof_that_fails_is_no_verdict(
    card: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Never an exception of the caller's: not of a plan, not of the files, not of the oracle."""

    def fail(*args: Any) -> Any:
        raise ZeroDivisionError("in a plan")

    arguments = _tensors()
    for module, name in ((triton, "launches"), (proof, "correct"), (kinds, "card")):
        as_new_process()
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(module, name, fail)
            torch.testing.assert_close(squeeze_excite(*arguments), _right(arguments))
            assert explain(*arguments).backend == "fallback"
        assert "a kernel could not be tried: ZeroDivisionError: in a plan" in caplog.text
    assert not list(card.rglob("*.pending"))


def test_the_command_line(
    card: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table, and 1 where a kernel is refused."""
    layers = [
        workloads.Layer("a network", 16, 5, 4, {"activation": "silu"}),
        workloads.Layer("a network", 8, 4, 2, {"after": "relu", "residual": True}),
        workloads.Layer("another", 8, 4, 2, {}),
    ]
    monkeypatch.setattr(workloads, "LAYERS", layers)
    command = ["verify", "--device", "cpu", "--dtype", "float32", "--batch", "2"]
    assert main([*command, "--network", "a network"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "SENET_KERNELS_GPU=verify, cpu, float32, batch 2"
    assert lines[-1].startswith("8 kernels, 0 refused, ")
    assert len([line for line in lines if line.startswith("trusted ")]) == 8
    monkeypatch.setenv(pretended.FAULT, "wrong")
    with pytest.warns(KernelMistrustWarning):
        assert main([*command, "--forget"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("8 verdicts dropped\n")
    assert "12 kernels, 12 refused, " in out
    monkeypatch.setattr(trust, "ASKED", set())
    resolve._RESOLVED.clear()
    assert main(command) == 0
    assert "nothing is to be proven on cpu" in capsys.readouterr().out


_SLOW_BUT_ALIVE = """
import time
from senet_kernels.trust import worker

def answer(message):
    worker.say(started="a kind")
    for step in range(8):
        time.sleep(0.25)
        worker.say(step=f"step {step}")
    time.sleep(message.get("hangs", 0))
    worker.say(wrong=None, speed=1.0, seconds=1.0)

worker.main(answer)
"""


@pytest.mark.parametrize("hangs", [0, 30])
def test_the_watch_is_for_silence(monkeypatch: pytest.MonkeyPatch, hangs: int) -> None:
    """Many kernels that are compiled take longer than one that hangs may."""
    monkeypatch.setattr(worker, "JOB_SECONDS", 1.0)
    process = worker.Worker(_SLOW_BUT_ALIVE)
    process.send({"hangs": hangs})
    assert process.receive(60) == {"started": "a kind"}
    found = worker._outcome(process)
    process.stop()
    expected = ("hangs", "no word for 1 seconds after step 7") if hangs else None
    assert found.wrong == expected


def test_who_cannot_wait_for_a_proof_does_not(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread proves by the autograd engine, of which this one may be a part."""
    monkeypatch.setattr(verdicts, "WAIT_SECONDS", 0.2)
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with verdicts._lock:
            held.set()
            over.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    arguments = _tensors()
    torch.testing.assert_close(squeeze_excite(*arguments), _right(arguments))
    assert _states() == []
    over.set()
    thread.join()
    squeeze_excite(*arguments)
    assert _states() == ["trusted"]
