"""First calls of the Triton backend: on which GPU, what is kept of one that fails, and what runs
where a kernel does not compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from problems import Spec, build
from senet_kernels import squeeze_excite
from senet_kernels.backends import triton
from senet_kernels.backends.triton import operands, tuning
from senet_kernels.backends.triton.plan import Device, Shape, fixed_choice

pytest.importorskip("triton")

from senet_kernels.backends.triton import launch, launcher

interpreted = pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_pinned", {})
    monkeypatch.setattr(tuning, "_enabled", False)
    monkeypatch.setattr(launch, "_calls", {})


# -- which GPU -------------------------------------------------------------------------------------


def _gpu(monkeypatch: pytest.MonkeyPatch, hip: str | None, **properties: Any) -> None:
    found = SimpleNamespace(multi_processor_count=304, **properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)


@pytest.mark.parametrize(
    ("hip", "properties", "architecture"),
    [
        (None, {"major": 9, "minor": 0}, "sm_90"),
        (None, {"major": 12, "minor": 1}, "sm_121"),
        # The capability of an AMD GPU is made of its name.
        ("7.0", {"major": 9, "minor": 4, "gcnArchName": "gfx942:sramecc+:xnack-"}, "gfx942"),
        ("7.0", {"major": 9, "minor": 0, "gcnArchName": "gfx90a"}, "gfx90a"),
        ("7.0", {"major": 11, "minor": 0, "gcnArchName": "gfx1100"}, "gfx1100"),
    ],
)
def test_a_gpu_is_known_by_its_architecture(
    hip: str | None, properties: dict[str, Any], architecture: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _gpu(monkeypatch, hip, **properties)
    device = operands._device(torch.device("cuda", 0))
    assert device == Device(architecture, 304)
    shape = Shape(2, 200, 240, 16, 200, False)
    assert fixed_choice(shape, 2, device, True) == fixed_choice(shape, 2, Device("", 304), True)


class _Compiled:
    n_regs, n_spills = 64, 2

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments: None


class _Kernel:
    """A kernel whose compilation does what ``compile`` does; it notes the options it is given."""

    arg_names = ("x",)
    __name__ = "some_kernel"

    def __init__(self, compile: Callable[[], Any] = _Compiled) -> None:
        self.compile, self.options = compile, list[dict[str, Any]]()

    def warmup(self, *arguments: Any, grid: Any, **options: Any) -> Any:
        self.options.append(options)
        return self.compile()

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *arguments, **options: self.warmup(*arguments, grid=grid, **options)


@pytest.mark.parametrize("hip", [None, "7.0"])
def test_options_are_those_of_the_vendors_compiler(
    hip: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that spills: NVIDIA's assembler may be given a bound on registers."""
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", hip)
    kernel = _Kernel()
    launch.Launch(kernel, 1, {}, warps=8)(None)
    assert kernel.options[0] == kernel.options[-1] == {"num_warps": 8}
    assert any("maxnreg" in options for options in kernel.options) == (hip is None)


def test_a_report_names_an_amd_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import environment
    from senet_kernels import __main__ as main

    _gpu(monkeypatch, "7.0", major=9, minor=4, gcnArchName="gfx942:xnack-", name="A card",
         total_memory=1 << 37, L2_cache_size=1 << 22)  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(main, "backends", lambda: "")
    main._report()
    assert "GPU 0: A card, gfx942, 128 GiB" in capsys.readouterr().out
    stamp = environment.stamp(torch.device("cuda", 0))
    assert (stamp["capability"], stamp["architecture"]) == (None, "gfx942")


# -- what is kept ----------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "options", [{}, {"shape": (2, 20, 30, 31)}, {"part": "squeeze"}, {"part": "channel_scale"}],
    ids=str,
)  # fmt: skip
def test_a_call_is_kept_after_its_kernels_were_launched(
    options: dict[str, Any], direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ran out of memory before is not: the kernels that it did not come to would be
    compiled by a later call, perhaps during a capture."""

    def out_of_memory(self: launch.Launch, *pointers: Any) -> None:
        raise torch.OutOfMemoryError("invented")

    problem = build(Spec(**({"shape": (2, 16, 5, 7), "hidden": 4} | options)))

    def forward() -> torch.Tensor:
        return problem.call(squeeze_excite, problem.leaves(), backend="triton")

    def step() -> None:
        y = forward() if direction == "forward" else before
        y.backward(problem.dy, retain_graph=True)

    before = forward()
    if direction == "forward":
        launch.forget()
    kept = len(launch._calls)
    with monkeypatch.context() as patch:
        patch.setattr(launch.Launch, "_compile_and_launch", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError, match="invented"):
            step()
    assert len(launch._calls) == kept
    capturing = False
    monkeypatch.setattr(launch, "_is_capturing", lambda x: capturing)
    capturing = True
    with pytest.raises(RuntimeError, match="before the capture, as a warm-up"):
        step()
    capturing = False
    step()
    assert len(launch._calls) == kept + (2 if direction == "forward" else 1)
    capturing = True
    step()


@pytest.mark.parametrize("current", [0, 1])
def test_capturing_is_asked_of_the_stream_of_x(
    current: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [current]

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            self.before, now[0] = now[0], self.index

        def __exit__(self, *error: object) -> None:
            now[0] = self.before

    def on(index: int) -> Any:
        device = torch.device("cuda", index)
        return SimpleNamespace(is_cuda=True, get_device=lambda: index, device=device)

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now[0] == 1)
    assert launch._is_capturing(on(1))
    assert not launch._is_capturing(on(0))
    assert not launch._is_capturing(torch.empty(1))
    assert now == [current]


# -- kernels that do not compile -------------------------------------------------------------------


def _fail() -> Any:
    raise RuntimeError("PassManager::run failed")  # as MLIR's binding does


def test_what_does_not_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    for hip in (None, "7.0"):
        monkeypatch.setattr(torch.version, "hip", hip)
        call = launch.Launch(_Kernel(_fail), 1, {}, warps=8)
        with pytest.raises(
            tuning.CannotCompileError,
            match=r"^Triton .* does not compile some_kernel with .*8.*: PassManager::run failed$",
        ):
            call(None)


def _no_resident_kernels(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]) -> None:
    right = launch.Launch._compile_and_launch

    def launched(self: launch.Launch, pointers: Any) -> None:
        if self.kernel.__name__.startswith("resident"):
            make()
        right(self, pointers)

    monkeypatch.setattr(launch.Launch, "_compile_and_launch", launched)


def _does_not_compile() -> None:
    raise tuning.CannotCompileError("invented")


def _does_not_fit() -> None:
    from triton.runtime.errors import OutOfResources

    raise OutOfResources(300000, 232448, "shared memory")


@interpreted
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("failure", [_does_not_compile, _does_not_fit])
def test_two_launches_take_the_place_of_one(
    failure: Callable[[], None], inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result() -> dict[str, Any]:
        problem = build(Spec((2, 16, 5, 7), 4, after="relu"))
        if not inplace:
            return problem.run(squeeze_excite, backend="triton")
        with torch.no_grad():
            return {"y": problem.call(squeeze_excite, backend="triton", inplace=True)}

    with tuning.strategy(resident=False):
        right = result()
    _no_resident_kernels(monkeypatch, failure)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [result(), result()]
    assert all(torch.equal(got[name], right[name]) for got in found for name in right)
    directions = ["forward"] if inplace else ["forward", "backward"]
    assert [str(w.message).split(":")[0] for w in said] == [f"triton_{d}" for d in directions]
    assert all("two launches take its place" in str(w.message) for w in said)
    assert [key.direction for key in tuning._pinned] == directions
    assert not any(choice.resident for choice in tuning._pinned.values())


@interpreted
def test_a_strategy_that_is_forced_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_resident_kernels(monkeypatch, _does_not_compile)
    problem = build(Spec((2, 16, 5, 7), 4))
    with (
        tuning.strategy(resident=True),
        torch.no_grad(),
        pytest.raises(tuning.CannotCompileError, match="invented"),
    ):
        problem.call(squeeze_excite, backend="triton")
    assert not tuning._pinned


@interpreted
def test_autotuning_passes_over_what_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_resident_kernels(monkeypatch, _does_not_compile)

    def milliseconds(call: Callable[[], object]) -> float:
        call()
        return 1.0

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_enabled", True)
    problem = build(Spec((2, 16, 5, 7), 4))
    with torch.no_grad():
        with pytest.warns(
            RuntimeWarning, match=r"passed over, the first of them: invented"
        ) as said:
            problem.call(squeeze_excite, backend="triton")
        assert len(said) == 1
        (choice,) = tuning._pinned.values()
        assert not choice.resident
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            problem.call(squeeze_excite, backend="triton")
        # Nothing compiles: the first failure is the reason.
        tuning.forget()
        monkeypatch.setattr(launch.Launch, "_compile_and_launch", lambda *_: _does_not_compile())
        with pytest.raises(tuning.CannotCompileError, match="invented"):
            problem.call(squeeze_excite, backend="triton")
