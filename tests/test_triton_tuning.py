"""Autotuning of the Triton backend: what is timed, pinned, saved and refused. Interpreted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from problems import Spec, build, check
from senet_kernels import squeeze_excite
from senet_kernels.backends import triton
from senet_kernels.backends.triton import tuning
from senet_kernels.backends.triton.plan import Choice, Device, Plan, Shape, candidates

interpreted = pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")

H200 = Device("sm_90", 132)


@pytest.fixture(autouse=True)
def _nothing_pinned() -> Iterator[None]:
    """Nothing from other tests, and nothing for them."""
    tuning.forget()
    yield
    tuning.enable(False)
    tuning.forget()


_TUNED = Spec((2, 24, 3, 5), 4, layout="channels_last", residual="contiguous", after="relu")


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Puts an invented time in place of every measurement: the next of this list, then 1."""
    script: list[float] = []

    def milliseconds(call: Callable[[], object]) -> float:
        if not measured:  # the others take the interpreter too long
            call()
        measured.append(script.pop(0) if script else 1.0)
        return measured[-1]

    measured: list[float] = []
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_measured", measured, raising=False)
    return script


def _candidates(direction: str) -> list[Choice]:
    batch, channels, *space = _TUNED.shape
    shape = Shape(batch, channels, space[0] * space[1], 4, channels, True)
    return candidates(shape, 4, Device("", 1), direction == "forward")


@interpreted
def test_autotuning_pins_the_fastest(times: list[float]) -> None:
    forward = _candidates("forward")
    times += [5.0] * len(forward)
    times[2] = 3.0
    tuning.enable()
    check(build(_TUNED), squeeze_excite, backend="triton")
    pinned = {key.direction: choice for key, choice in tuning._pinned.items()}
    assert pinned == {"forward": forward[2], "backward": _candidates("backward")[0]}
    assert len(tuning._measured) == len(forward) + len(_candidates("backward"))
    # Nothing is timed twice, and with other values the same plan runs.
    tuning.enable(False)
    check(build(replace(_TUNED, seed=1)), squeeze_excite, backend="triton")
    assert len(tuning._measured) == len(forward) + len(_candidates("backward"))


@interpreted
def test_nothing_is_timed_unless_asked(times: list[float]) -> None:
    check(build(_TUNED), squeeze_excite, backend="triton")
    assert not tuning._measured
    assert not tuning._pinned


@interpreted
def test_pinned_plans_survive_a_file(times: list[float], tmp_path: Path) -> None:
    times += [5.0, 4.0, 3.0]
    tuning.enable()
    first = build(_TUNED).run(squeeze_excite, backend="triton")
    pinned = dict(tuning._pinned)
    tuning.save(tmp_path / "plans.json")
    tuning.enable(False)
    tuning.forget()
    assert not tuning._pinned
    tuning.load(tmp_path / "plans.json")
    assert tuning._pinned == pinned
    tuning._measured.clear()
    again = build(_TUNED).run(squeeze_excite, backend="triton")
    assert not tuning._measured
    assert all(torch.equal(first[name], again[name]) for name in first)


@interpreted
def test_a_file_named_in_the_environment_is_loaded_once(
    times: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.enable()
    build(_TUNED).run(squeeze_excite, backend="triton")
    tuning.save(tmp_path / "plans.json")
    pinned = dict(tuning._pinned)
    tuning.enable(False)
    tuning.forget()
    monkeypatch.setattr(tuning, "_file", str(tmp_path / "plans.json"))
    build(_TUNED).run(squeeze_excite, backend="triton")
    assert tuning._pinned == pinned
    assert tuning._file is None


@interpreted
def test_candidates_that_do_not_compile_are_passed_over(
    times: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.errors import OutOfResources

    invented, tried = tuning.milliseconds, []

    def milliseconds(call: Callable[[], object]) -> float:
        tried.append(call)
        if len(tried) < 3 or failing:
            raise OutOfResources(300000, 232448, "shared memory")
        return invented(call)

    failing = False
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    tuning.enable()
    x_only = build(_TUNED)
    with torch.no_grad():
        x_only.call(squeeze_excite, backend="triton")
    (choice,) = tuning._pinned.values()
    assert choice == _candidates("forward")[2]
    tuning.forget()
    failing = True
    with torch.no_grad(), pytest.raises(OutOfResources):
        x_only.call(squeeze_excite, backend="triton")


@interpreted
def test_autotuning_is_refused_during_graph_capture(
    times: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from senet_kernels.backends.triton import launch

    tuning.enable()
    monkeypatch.setattr(launch, "_is_capturing", lambda x: True)
    with pytest.raises(RuntimeError, match=r"timed where autotuning is on.*cannot be done"):
        build(_TUNED).run(squeeze_excite, backend="triton")
    assert not tuning._measured


@interpreted
def test_what_is_timed_leaves_an_x_to_be_overwritten_alone(
    times: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "milliseconds", lambda call: float(bool(call())))
    tuning.enable()
    problem = build(_TUNED)
    with torch.no_grad():
        right = problem.call(squeeze_excite, backend="reference")
        problem.call(squeeze_excite, backend="triton", inplace=True)
    assert tuning._pinned
    torch.testing.assert_close(problem.tensors["x"], right)


_ENTRY: dict[str, Any] = {
    "direction": "forward", "dtype": "float32", "architecture": "sm_90",
    "multiprocessors": 132,
    "shape": Shape(3, 20, 30, 4, 20, False)._asdict(), "resident": False,
    "plan": {"G": 1, "BC": 16, "BS": 8, "BR": 4, "BK": 2, "tiles": 2, "splits": 2, "steps": 2,
             "programs": 12, "warps": 4},
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("not JSON", "not a file of Triton plans"),
        ("[]", "not a file of Triton plans"),
        ({"schema": "other/1", "plans": []}, "expected schema 'senet_kernels.triton_plans/2'"),
        ({"plans": [{**_ENTRY, "direction": "sideways"}]}, "expected one of forward, backward"),
        ({"plans": [{**_ENTRY, "plan": {"G": 1}}]}, "not a file of Triton plans"),
        ({"plans": [{**_ENTRY, "resident": True}]}, "does not fit"),
        ({"plans": [{**_ENTRY, "plan": {**_ENTRY["plan"], "BC": 8}}]}, "does not fit"),
    ],
    ids=["text", "list", "schema", "direction", "fields", "resident", "cut"],
)
def test_bad_plan_files(content: Any, complaint: str, tmp_path: Path) -> None:
    """A plan that does not fit would leave elements unwritten."""
    path = tmp_path / "plans.json"
    if isinstance(content, dict):
        content = json.dumps({"schema": tuning.SCHEMA, **content})
    path.write_text(content)
    with pytest.raises(ValueError, match=complaint):
        tuning.load(path)
    assert not tuning._pinned


def test_a_good_plan_file(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    path.write_text(json.dumps({"schema": tuning.SCHEMA, "plans": [_ENTRY]}))
    tuning.load(path)
    ((key, choice),) = tuning._pinned.items()
    assert key == tuning.Key("forward", Shape(3, 20, 30, 4, 20, False), "float32", H200)
    assert choice == Choice(Plan(**_ENTRY["plan"]))


@interpreted
def test_strategies_force_the_number_of_launches() -> None:
    from senet_kernels.backends.triton import launch

    launched: list[str] = []
    problem = build(_TUNED)
    call = launch.Launch.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            launch.Launch, "__call__",
            lambda self, *pointers: (launched.append(self.kernel.__name__), call(self, *pointers)),
        )  # fmt: skip
        for resident, right in (
            (True, ["resident_kernel", "resident_backward_kernel", "parameters_kernel"]),
            (False, ["squeeze_kernel", "scale_kernel", "dots_kernel", "dx_kernel",
                     "parameters_kernel"]),
        ):  # fmt: skip
            with tuning.strategy(resident=resident):
                check(problem, squeeze_excite, backend="triton")
            assert launched == right
            launched.clear()
    assert tuning.forced() is None
    large = build(Spec((1, 64, 40, 40), 4))
    refused = pytest.raises(RuntimeError, match="no image of this call stays on chip")
    with tuning.strategy(resident=True), torch.no_grad(), refused:
        large.call(squeeze_excite, backend="triton")
