"""What the CUDA library's host code does on which device, at its first call there, in a capture,
and where a device refuses a launch: on the simulated devices of ``tests/simt``.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import cuda_on_cpu
from policies import A100, DEVICES, H100, PLAN, SMALL_90, T4, UNCOOPERATIVE_80
from problems import Spec, build, check
from senet_kernels import squeeze_excite

pytestmark = [
    pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=str(cuda_on_cpu.why_not())),
    pytest.mark.skipif(
        os.environ.get(cuda_on_cpu.SANITIZED) == "1", reason="the kernels are those of other tests"
    ),
]

# The image is large enough for several blocks, which a cluster or a cooperative launch takes.
_SPEC = Spec((2, 32, 40, 41), 8, torch.float16, residual="contiguous", after="relu")
_SMALL = Spec((2, 24, 5, 3), 6, torch.bfloat16, before="silu")


def _forward(spec: Spec) -> None:
    """One call without a graph, and its result held to the reference."""
    problem = build(spec)
    with torch.no_grad():
        y = problem.call(squeeze_excite, backend="native")
        right = problem.call(squeeze_excite, backend="reference")
    torch.testing.assert_close(y, right, rtol=2e-2, atol=2e-2)


# -- devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_the_current_device_of_the_library_does_not_matter(device: int) -> None:
    """Its runtime is not torch's. A launch for tensors of another device is an error there."""
    problem = build(_SPEC)
    found = []
    with cuda_on_cpu.plugged_in(device=device) as simulation:
        check(problem, squeeze_excite, backend="native")  # now nothing is refused any more
        for current in DEVICES:
            simulation.use(0, device, current)
            simulation.take_launches()
            check(problem, squeeze_excite, backend="native")
            assert simulation.library.simt_current_device() == current
            found.append(simulation.take_launches())
    assert all(launches == found[0] for launches in found), found


def test_a_plan_is_of_the_tensors_device() -> None:
    """A cluster on a device that has them, also where the current one has none; and the reverse."""
    problem = build(_SPEC)
    for device, current in ((SMALL_90, T4), (T4, SMALL_90), (H100, A100), (A100, H100)):
        with cuda_on_cpu.plugged_in(device=device) as simulation, torch.no_grad():
            simulation.use(0, device, current)
            problem.call(squeeze_excite, backend="native")
            (launch,) = simulation.take_launches()
        assert (" cluster=1 " not in launch) == (device in (SMALL_90, H100)), launch
        assert launch.endswith(" cooperative") == (device in (T4, A100)), launch


@pytest.mark.parametrize("policy", ["speed=1", "exchange=grid,blocks=2"])
def test_the_current_device_is_as_before_a_failure(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no plan, and where a launch fails."""
    monkeypatch.setenv(PLAN, policy)
    with cuda_on_cpu.plugged_in() as simulation:
        simulation.use(0, UNCOOPERATIVE_80, A100)
        with pytest.raises(RuntimeError, match="senet_kernels on CUDA"):
            _forward(_SPEC)
        assert simulation.library.simt_current_device() == A100


def test_a_device_that_cannot_be_used_is_named() -> None:
    """The runtime's error, not what a plan makes of a device that has nothing."""
    with cuda_on_cpu.plugged_in() as simulation:
        for index in (99, 127, 128, -1):
            simulation.use(0, index, A100)
            with pytest.raises(RuntimeError, match=f"cannot use device {index}: "):
                _forward(_SMALL)
            assert simulation.library.simt_current_device() == A100


# -- in a process of its own, where no device has been used ----------------------------------------


# Imports once, and forks for each scenario before anything has run.
_FORKS = f"""
import os, sys, traceback
import {__name__} as tests
for name in sys.argv[1:]:
    if os.fork() == 0:
        try:
            getattr(tests, name)()
        except BaseException:
            with open(name, "w") as file:
                traceback.print_exc(file=file)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    if status and not os.path.exists(name):
        with open(name, "w") as file:
            file.write(f"ended with {{status}}")
"""


@functools.cache
def _errors() -> dict[str, str]:
    """Of the scenarios that failed, each in a process of its own."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-c", _FORKS, *(scenario.__name__ for scenario in _SCENARIOS)],
            cwd=folder, timeout=300, env={**os.environ, "PYTHONPATH": path}, check=True,
        )  # fmt: skip
        return {file.name: file.read_text() for file in Path(folder).iterdir()}


def _cold(scenario: Callable[[], None]) -> None:
    """The outcome of one of the scenarios."""
    assert scenario in _SCENARIOS
    error = _errors().get(scenario.__name__)
    assert error is None, error


def _kinds(loads: list[str], device: int) -> dict[str, int]:
    """How many kernels of each kind were loaded, all of them on the device."""
    kinds: dict[str, int] = {}
    for line in loads:
        where, name = line.split(" ", 1)
        assert where == str(device), line
        found = re.search(r"(forward|backward|gradients)_kernel", name)
        assert found, line
        kinds[found[1]] = kinds.get(found[1], 0) + 1
    return kinds


# Lean kernels: two of float, four each of bfloat16 and float16. General ones: of 4 and of 2 bytes,
# in vectors and element by element, and of double.
_INSTANCES = 2 + 4 + 4 + 2 + 2 + 1


def _the_first_call_loads_what_others_need() -> None:
    """Forward and backward apart; and once per device."""
    with cuda_on_cpu.plugged_in() as simulation:
        for device in (H100, A100):
            simulation.use(0, device)
            simulation.take("loads")
            _forward(Spec((2, 24, 5, 3), 6, torch.float32))
            assert _kinds(simulation.take("loads"), device) == {"forward": _INSTANCES}
            with simulation.capture(loads=False):
                for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                    for before in ("identity", "relu", "gelu"):
                        for side in (3, 4):
                            _forward(Spec((2, 24, 6, side), 6, dtype, before=before))
            assert not simulation.take("loads")
            check(build(_SPEC), squeeze_excite, backend="native")
            loaded = _kinds(simulation.take("loads"), device)
            assert loaded == {"backward": _INSTANCES, "gradients": 2}
            with simulation.capture(loads=False):
                check(build(_SMALL), squeeze_excite, backend="native")
            assert not simulation.take("loads")


def test_the_first_call_loads_what_others_need() -> None:
    _cold(_the_first_call_loads_what_others_need)


def _a_cold_capture_works() -> None:
    """On a device that nobody has used. No more is loaded than that call needs; the first call
    outside a capture loads the rest."""
    with cuda_on_cpu.plugged_in() as simulation:
        for device in DEVICES:
            simulation.use(0, device)
            simulation.take("loads")
            with simulation.capture():
                check(build(_SMALL), squeeze_excite, backend="native")
                assert simulation.library.simt_capture_mode() == 0
            loaded = _kinds(simulation.take("loads"), device)
            # One beside its own says for what the library was compiled.
            assert loaded == {"forward": 2, "backward": 1, "gradients": 1}, loaded
            _forward(_SMALL)
            assert _kinds(simulation.take("loads"), device) == {"forward": _INSTANCES - 2}


def test_a_cold_capture_works() -> None:
    _cold(_a_cold_capture_works)


def _a_refused_load_is_not_remembered() -> None:
    """Where a driver loads nothing in a capture the error says what to do; and afterwards all is as
    if nothing had been, the plan too."""
    with cuda_on_cpu.plugged_in() as simulation:
        for device in (SMALL_90, A100):
            simulation.use(0, device)
            for _ in range(2):
                message = rf"not permitted .*on device {device} of capability .* before the capture"
                with (
                    simulation.capture(loads=False, valid=False),
                    pytest.raises(RuntimeError, match=message),
                ):
                    _forward(_SPEC)
            assert not simulation.take("launches")
            _forward(_SPEC)
            (launch,) = simulation.take("launches")
            assert (" cluster=1 " not in launch) == (device == SMALL_90), launch
            assert launch.endswith(" cooperative") == (device == A100), launch


def test_a_refused_load_is_not_remembered() -> None:
    _cold(_a_refused_load_is_not_remembered)


def _a_refused_cooperative_launch_is_planned_anew() -> None:
    """Once: the device has no more of them. Others still have."""
    with cuda_on_cpu.plugged_in() as simulation:
        simulation.use(0, UNCOOPERATIVE_80)
        _forward(_SPEC)
        (launch,) = simulation.take("launches")
        assert not launch.endswith(" cooperative")
        (refused,) = simulation.take("refusals")
        assert "forward_kernel" in refused
        for spec in (_SPEC, _SMALL, Spec((1, 64, 28, 28), 16)):
            check(build(spec), squeeze_excite, backend="native")
        assert not simulation.take("refusals")
        simulation.take("launches")
        simulation.use(0, A100)
        _forward(_SPEC)
        assert simulation.take("launches")[0].endswith(" cooperative")


def test_a_refused_cooperative_launch_is_planned_anew() -> None:
    _cold(_a_refused_cooperative_launch_is_planned_anew)


def _backward_is_planned_anew_too() -> None:
    # Of three images each takes two blocks, of the three that run at once.
    with cuda_on_cpu.plugged_in() as simulation:
        simulation.use(0, UNCOOPERATIVE_80)
        problem = build(Spec((3, 32, 40, 41), 8, torch.float16, shift=True))
        os.environ[PLAN] = "exchange=none"
        x = problem.tensors["x"]
        assert x is not None
        y = problem.call(
            squeeze_excite, {**problem.tensors, "x": x.requires_grad_()}, backend="native"
        )
        del os.environ[PLAN]
        simulation.take("launches")
        (dx,) = torch.autograd.grad(y, x, problem.dy)
        (launch,) = simulation.take("launches")
        assert "backward_kernel" in launch
        assert not launch.endswith(" cooperative")
        assert len(simulation.take("refusals")) == 1
        check(problem, squeeze_excite, backend="native")
        assert not simulation.take("refusals")
        assert dx.isfinite().all()


def test_backward_is_planned_anew_too() -> None:
    _cold(_backward_is_planned_anew_too)


def _a_refusal_without_another_plan_is_reported() -> None:
    """A plan that was asked for by name: the refusal says why, and later the plan."""
    os.environ[PLAN] = "exchange=grid,blocks=2"
    with cuda_on_cpu.plugged_in() as simulation:
        simulation.use(0, UNCOOPERATIVE_80)
        # What the runtime says of the launch, which one, and what may be the cause.
        message = "more blocks than fit at a time .*2 blocks per image.* an MPS limit or a green"
        with pytest.raises(RuntimeError, match=message):
            _forward(_SPEC)
        with pytest.raises(RuntimeError, match=f"{PLAN}: this device has no .* or refused one"):
            _forward(_SPEC)
        assert len(simulation.take("refusals")) == 1


def test_a_refusal_without_another_plan_is_reported() -> None:
    _cold(_a_refusal_without_another_plan_is_reported)


_SCENARIOS = (
    _the_first_call_loads_what_others_need,
    _a_cold_capture_works,
    _a_refused_load_is_not_remembered,
    _a_refused_cooperative_launch_is_planned_anew,
    _backward_is_planned_anew_too,
    _a_refusal_without_another_plan_is_reported,
)


# -- bulk copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        (Spec((3, 32, 24, 32), 8, torch.float16), "exchange=none,resident=1,slots=2,groups=1"),
        (Spec((3, 32, 24, 32), 8, torch.float16), "exchange=cluster,blocks=2,resident=1,groups=1"),
        # A copy for every position, of the half of the channels.
        (Spec((3, 1024, 5, 9), 8, torch.float16, "channels_last"),
         "exchange=cluster,blocks=2,resident=1,slots=2,groups=1,axis=channels"),
    ],
    ids=["flat", "flat-cluster", "rows"],
)  # fmt: skip
def test_slices_of_several_bulk_copies(
    spec: Spec, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By several lanes, into a slot that was used before: each must have executed the fence."""
    monkeypatch.setenv(PLAN, policy)
    for seed in range(3):
        with cuda_on_cpu.plugged_in(seed, SMALL_90) as simulation:
            with simulation.accesses() as accesses:
                check(build(spec), squeeze_excite, backend="native")
            copies = [size for how, _, size in accesses if how == "r" and size > 16]
            assert len(copies) >= 2 * 2 * len(build(spec).tensors["x"])


# -- what only a compiler sees ---------------------------------------------------------------------


def _compiles(tmp_path: Path, *lines: str) -> tuple[bool, str]:
    """Whether the simulation's compiler takes the lines, and what it says."""
    file = tmp_path / "snippet.cpp"
    file.write_text("\n".join(lines) + "\n")
    flags = [flag for flag in cuda_on_cpu.build.FLAGS if flag != "-O1"]
    done = subprocess.run(
        [*cuda_on_cpu.build.compiler(), *flags, f"-I{cuda_on_cpu.CUDA}", "-fsyntax-only", file],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", [4096, 4097, 8192])
def test_the_parameters_of_a_kernel_are_limited(tmp_path: Path, size: int) -> None:
    """To what every device takes. All launches are by ``launch``, which sees to it."""
    taken, said = _compiles(
        tmp_path,
        '#include "launch.h"',
        f"struct Arguments {{ char bytes[{size}]; }};",
        "namespace senet::gpu {",
        "const char* f(void (*kernel)(const Arguments), Prepared& p, const Arguments& a) {",
        "  return launch(kernel, p, Plan{}, 1, a, 0, nullptr);",
        "}",
        "}",
    )
    assert taken == (size <= 4096), said
    assert taken or "more than a kernel's parameters may be" in said
    others = [path.name for path in cuda_on_cpu.CUDA.iterdir()
              if re.search(r"\bcuda(LaunchKernel|LaunchCooperative)\w*\(|<<<",
                           path.read_text())]  # fmt: skip
    assert others == ["launch.h"]


# Of threads 0, 77 and 255 of 256: the row and the sector of the first accesses.
_SECTORS = {
    "32": (1, ((0, 0), (256, 0)), ((77, 0), (333, 0)), ((255, 0), (511, 0))),
    "3 * 32 - 1": (3, ((0, 0), (85, 1)), ((25, 2), (111, 0)), ((85, 0), (170, 1))),
    "256 * 32": (256, ((0, 0), (1, 0)), ((0, 77), (1, 77)), ((0, 255), (1, 255))),
    "300 * 32": (300, ((0, 0), (0, 256)), ((0, 77), (1, 33)), ((0, 255), (1, 211))),
    # More sectors than an int counts; 0 of them, when it did.
    "int64_t(1) << 36": (2**31, ((0, 0), (0, 256)), ((0, 77), (0, 333)), ((0, 255), (0, 511))),
    "int64_t(1) << 37": (2**32, ((0, 0), (0, 256)), ((0, 77), (0, 333)), ((0, 255), (0, 511))),
}


@pytest.mark.parametrize("row", _SECTORS)
def test_sectors_of_any_row(tmp_path: Path, row: str) -> None:
    sectors, *threads = _SECTORS[row]
    lines = ['#include "images.cuh"', "namespace senet::gpu {",
             "constexpr Sectors after(Sectors s) { s.next(256); return s; }",
             f"static_assert(Sectors(0, 256, {row}).in_row == {sectors});"]  # fmt: skip
    for thread, ((row_0, column_0), (row_1, column_1)) in zip((0, 77, 255), threads, strict=True):
        lines += [
            f"constexpr Sectors first_{thread}({thread}, 256, {row});",
            f"static_assert(first_{thread}.row == {row_0} && first_{thread}.column == {column_0});",
            f"constexpr Sectors next_{thread} = after(first_{thread});",
            f"static_assert(next_{thread}.row == {row_1} && next_{thread}.column == {column_1});",
        ]
    taken, said = _compiles(tmp_path, *lines, "}")
    assert taken, said


def test_no_interface_of_the_driver_that_is_not_public() -> None:
    """The word in which a grid's barrier counts is the driver's own."""
    for path in cuda_on_cpu.CUDA.iterdir():
        assert "%envreg" not in path.read_text(), path.name
