"""First calls of the Triton backend: on which GPU, what is kept of one that fails, and what is said
of a kernel that does not compile."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from problems import Spec, build
from senet_kernels import squeeze_excite
from senet_kernels.backends import triton
from senet_kernels.backends.triton import operands
from senet_kernels.backends.triton.plan import Device, Shape, make_plan

pytest.importorskip("triton")

from senet_kernels.backends.triton import launch, launcher

interpreted = pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
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
    shape, other = Shape(2, 200, 240, 16, 200, False), Device("sm_90", 304)
    assert make_plan(shape, 2, device, masked=False) == make_plan(shape, 2, other, masked=False)
    capability = 0 if hip else properties["major"] * 10 + properties["minor"]
    assert device.capability == capability


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
    launcher.Launch(kernel, 1, {}, warps=8)(None)
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
    "options", [{}, {"part": "squeeze"}, {"part": "channel_scale"}],
    ids=str,
)  # fmt: skip
def test_a_call_is_kept_after_its_kernels_were_launched(
    options: dict[str, Any], direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ran out of memory before is not: the kernels that it did not come to would be
    compiled by a later call, perhaps during a capture."""

    def out_of_memory(self: launcher.Launch, *pointers: Any) -> None:
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
        patch.setattr(launcher.Launch, "_compile_and_launch", out_of_memory)
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
        return SimpleNamespace(get_device=lambda: index, device=device)

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
        call = launcher.Launch(_Kernel(_fail), 1, {}, warps=8)
        with pytest.raises(
            launcher.CannotCompileError,
            match=r"^Triton .* does not compile some_kernel with .*8.*: PassManager::run failed$",
        ):
            call(None)


def test_who_watches_is_told_before_a_kernel_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def fail() -> Any:
        told.append("compiled")
        return _fail()

    monkeypatch.setattr(launcher, "INTERPRETED", False)
    monkeypatch.setattr(launcher, "listeners", [lambda: told.append("told")])
    with pytest.raises(launcher.CannotCompileError):
        launcher.Launch(_Kernel(fail), 1, {}, warps=8)(None)
    assert told == ["told", "compiled"]
