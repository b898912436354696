"""The CUDA kernels as nvcc compiles them, to PTX, executed on a CPU: see ``tests/ptx``.

The gate runs every policy on sm_90a and some on sm_80; all that the simulation runs is run by the
slow tests, in processes of their own in which the simulation executes PTX.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cuda_on_cpu
from policies import A100, H100, PLAN, POLICIES, SMALL_80, SMALL_90
from problems import Spec, build, check
from ptx import compiling
from ptx.translate import Module
from senet_kernels import squeeze_excite
from senet_kernels.trust import proof
from test_cuda_on_cpu import computes_right
from tools import gpu_cases, gpu_kernels, mutate_ptx

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.skipif(bool(compiling.why_not()), reason=str(compiling.why_not())),
    # Its processes run the other tests.
    pytest.mark.skipif(cuda_on_cpu.EXECUTE_PTX in os.environ, reason="is such a process itself"),
]

# The first, third and last take the lean loops, which are kernels of one dtype: each is compiled,
# which is most of what these tests take.
_BLOCKS: tuple[dict[str, Any], ...] = (
    {"residual": "contiguous", "after": "relu"},
    {"shift": True, "weighted": True, "dtype": torch.float16},
    {"activation": "silu", "gate": "hardsigmoid"},
    {"bias": False, "after": "gelu", "dtype": torch.float16},
    {"hidden": None},
)


def device_of(policy: str, target: str) -> int | None:
    """A simulated device of compute capability 8.0 or 9.0 that runs the policy."""
    of_80 = [device for device in POLICIES[policy] if device in (A100, SMALL_80)]
    if target == "80":
        return of_80[0] if of_80 else None
    return SMALL_90 if SMALL_90 in POLICIES[policy] else H100


# Besides the first: rows in several segments; long rows, which eight threads share; rows whose bits
# of the mask are no whole bytes. (Found by leaving barriers out.)
SHAPES = ((5, 136, 6, 8), (5, 24, 8, 12), (3, 16, 24, 32), (4, 72, 7, 7))


def runs(
    policy: str, device: int, seed: int, layout: str = "", shape: tuple[int, ...] = SHAPES[0]
) -> None:
    """One call of a 16-bit type and its gradients: right results, and PTX that made them."""
    layout = layout or ("channels_last" if "axis=space" in policy else "contiguous")
    block = _BLOCKS[seed % len(_BLOCKS)]
    if "residual" in block:
        block |= {"residual": layout}
    chosen = {"hidden": 12, "dtype": torch.bfloat16, **block}
    spec = Spec(shape, layout=layout, seed=seed, **chosen)
    with (
        pytest.MonkeyPatch.context() as patch,
        cuda_on_cpu.plugged_in(seed, device, ptx=seed) as simulation,
    ):
        patch.setenv(PLAN, policy)
        computes_right(policy, spec, simulation)
        # No mask is kept then, nor written. (Found by leaving its condition out.)
        check(build(spec), squeeze_excite, names=(), backend="native")
        capability = 80 if device in (A100, SMALL_80) else 90
        used = {compiling.instance(kernel)[0] for kernel, c in simulation.finder.found
                if c == capability}  # fmt: skip
    assert used == {"forward.cuh", "backward.cuh", "gradients.cuh"}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy or "automatic")
def test_every_policy_on_sm_90(policy: str) -> None:
    device = device_of(policy, "90a")
    assert device is not None
    runs(policy, device, list(POLICIES).index(policy))


@pytest.mark.parametrize(
    "policy", [p for p in POLICIES if "resident=1" in p and "cluster" in p and "space" not in p]
)
def test_narrow_slices_on_sm_90(policy: str) -> None:
    """Rows of a slice of channels that are too short for bulk copies: asynchronous ones bring them,
    and threads wait for those. (Found by leaving the wait out.)"""
    device = device_of(policy, "90a")
    assert device is not None
    runs(policy, device, list(POLICIES).index(policy), "channels_last")


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_rows_on_sm_90(shape: tuple[int, ...]) -> None:
    for seed in (0, 2):  # with a residual and a mask, and plain
        runs("exchange=none,resident=0", SMALL_90, seed, shape=shape)


@pytest.mark.parametrize(
    "policy", ["exchange=cluster,blocks=2,resident=0", "exchange=grid,blocks=2,resident=0"]
)
def test_single_layers_on_sm_90(policy: str) -> None:
    """Whose backward pass exchanges sums over the outputs. (Found by leaving an arrival out.)"""
    device = device_of(policy, "90a")
    assert device is not None
    runs(policy, device, _BLOCKS.index({"hidden": None}))


@pytest.mark.parametrize(
    "policy", [policy for policy in POLICIES if device_of(policy, "80") is not None][::3],
    ids=lambda policy: policy or "automatic",
)  # fmt: skip
def test_policies_on_sm_80(policy: str) -> None:
    device = device_of(policy, "80")
    assert device is not None
    runs(policy, device, list(POLICIES).index(policy))


def test_same_bits_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of approximate functions are those of their operands, not of the order."""
    monkeypatch.setenv(PLAN, "exchange=cluster,blocks=2,resident=0")
    problem = build(Spec((3, 136, 6, 8), 12, torch.bfloat16, activation="silu"))
    found = set()
    for seed in range(6):
        with cuda_on_cpu.plugged_in(seed, H100, ptx=3):
            y = problem.call(squeeze_excite, backend="native")
        found.add(bytes(y.detach().view(torch.uint8).flatten().tolist()))
    with cuda_on_cpu.plugged_in(0, H100, ptx=4):
        problem.call(squeeze_excite, backend="native")
    assert len(found) == 1


@pytest.mark.slow
def test_kernels_prove_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a user's card; those that lack their barriers do not."""
    monkeypatch.setenv(PLAN, "exchange=none,resident=0")
    case = gpu_cases.Case((3, 136, 6, 8), 12, "bfloat16", False, {})
    with cuda_on_cpu.plugged_in(1, H100, ptx=1):
        kind = gpu_kernels.kind_of("native", "cpu", case)
        assert proof.correct(kind) is None
    original = compiling.ptx_of
    monkeypatch.setattr(
        compiling,
        "ptx_of",
        lambda kernel, target: original(kernel, target).replace("bar.sync", "//"),
    )
    with cuda_on_cpu.plugged_in(1, H100, ptx=1) as simulation:
        monkeypatch.setattr(simulation.finder, "found", {})
        wrong = proof.correct(kind)
    assert wrong is not None
    assert wrong.fault in ("wrong", "races", "failed", "unwritten")


def test_missing_barriers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the forward kernel has, taken out of its PTX."""
    monkeypatch.setenv(PLAN, "exchange=none,resident=0")
    problem = build(Spec((2, 136, 6, 8), 12, torch.bfloat16))
    original = compiling.ptx_of

    def without(kernel: str, target: str) -> str:
        text = original(kernel, target)
        if "forward" not in kernel:
            return text
        assert text.count("bar.sync") > 5
        return text.replace("bar.sync", "//")

    monkeypatch.setattr(compiling, "ptx_of", without)
    noticed = 0
    for seed in range(4):
        with cuda_on_cpu.plugged_in(seed, A100, ptx=0) as simulation:
            monkeypatch.setattr(simulation.finder, "found", {})
            try:
                check(problem, squeeze_excite, backend="native")
            except (AssertionError, RuntimeError):
                noticed += 1
    assert noticed == 4


def test_kernels_that_cannot_be_translated_fail_at_their_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def with_a_surprise(kernel: str, target: str) -> str:
        return f".version 9.0\n.entry {kernel}()\n{{\nsurprise.s32 %r1;\n}}"

    monkeypatch.setattr(compiling, "ptx_of", with_a_surprise)
    with cuda_on_cpu.plugged_in(0, H100, ptx=0) as simulation:
        monkeypatch.setattr(simulation.finder, "found", {})
        with pytest.raises(RuntimeError, match=r"ptx:4: unknown opcode surprise.s32"):
            build(Spec()).run(squeeze_excite, backend="native")


def test_sources_are_never_taken_for_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after an interrupt either: without a result of the callback the launch fails."""

    def interrupted(kernel: str, target: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiling, "ptx_of", interrupted)
    with cuda_on_cpu.plugged_in(0, H100, ptx=0) as simulation:
        monkeypatch.setattr(simulation.finder, "found", {})
        with pytest.raises(RuntimeError, match=r"forward_kernel.*: KeyboardInterrupt"):
            build(Spec()).run(squeeze_excite, backend="native")


def test_what_has_not_changed_is_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "OUT", tmp_path)
    commands: list[list[str]] = []
    run = compiling.build._run
    monkeypatch.setattr(compiling.build, "_run", lambda command: (commands.append(command),
                                                                  run(command)))  # fmt: skip
    text = ".version 9.0\n.entry k()\n{\nret;\n}\n"
    first = compiling.compiled(text, "k")
    assert (compiling.compiled(text, "k"), len(commands)) == (first, 2)  # of headers, and of text
    # Another text that says the same is translated, and that is all.
    assert compiling.compiled(f"{text}// a comment\n", "k") == first
    assert len(commands) == 2
    changed = compiling.compiled(text.replace("ret", "trap"), "k")
    assert (changed != first, len(commands)) == (True, 3)


@pytest.mark.parametrize(
    ("kernel", "declared"),
    [
        ("_ZN5senet3gpu14forward_kernelILi2ELb1ELin1ELi0EEEvNS0_13ForwardLaunchE",
         "forward_kernel<2, true, -1, 0>(const __grid_constant__ ForwardLaunch)"),
        ("_ZN5senet3gpu15backward_kernelILi8ELb0ELi3ELi0EEEvNS0_14BackwardLaunchE",
         "backward_kernel<8, false, 3, 0>(const __grid_constant__ BackwardLaunch)"),
        ("_ZN5senet3gpu16gradients_kernelIdEEvNS0_15GradientsLaunchE",
         "gradients_kernel<double>(const __grid_constant__ GradientsLaunch)"),
    ],
)  # fmt: skip
def test_instances_by_their_names(kernel: str, declared: str) -> None:
    header, text = compiling.instance(kernel)
    assert (header, text) == (f"{declared.split('_')[0]}.cuh",
                              f"template __global__ void {declared};")  # fmt: skip
    with pytest.raises(ValueError, match="is no kernel of csrc/cuda"):
        compiling.instance("_Z3foov")


def test_steps_that_can_be_left_out() -> None:
    """Every kind is in the kernels; without one the text is PTX, and another; a sample has all
    kinds that it has room for."""
    texts = {name: compiling.ptx_of(kernel, "90a") for name, kernel in mutate_ptx.KERNELS.items()}
    every = list(mutate_ptx.mutants(texts))
    kinds = {m.name.split("-", 1)[1].rpartition("-")[0] for m in every}
    assert kinds == set(mutate_ptx.STEPS)
    assert len({m.name for m in every}) == len(every)
    assert mutate_ptx.drawn(every, 1000, 1) != every
    assert sorted(mutate_ptx.drawn(every, 1000, 1)) == sorted(every)
    sample = mutate_ptx.drawn(every, 30, 1)
    assert {m.name.split("-", 1)[1].rpartition("-")[0] for m in sample} == kinds
    translated = {name: Module(text).cpp() for name, text in texts.items()}
    for mutant in {m.name.rpartition("-")[0]: m for m in every if m.kernel == "forward"}.values():
        text, (begin, end) = texts[mutant.kernel], mutant.at
        changed = text[:begin] + mutant.text + text[end:]
        assert Module(changed).cpp() != translated[mutant.kernel]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["75", "80", "90a", "100", "120"])
@pytest.mark.parametrize("source", ["forward", "backward"])
def test_every_kernel_is_translated(source: str, target: str, tmp_path: Path) -> None:
    """All that the library has, as one module."""
    product = tmp_path / f"{source}.ptx"
    command = [compiling.find_nvcc(), *compiling._NVCC_FLAGS, f"-arch=compute_{target}", "-o"]
    subprocess.run([*map(str, command), str(product), str(compiling.SOURCES / f"{source}.cu")],
                   check=True, timeout=600)  # fmt: skip
    assert len(Module(product.read_text(), product.name).entries) >= 11


@pytest.mark.slow
@pytest.mark.parametrize("approximations", [0, 3])
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("test_cuda_on_cpu.py", "not sanit and not pretended and not everything"),
        ("test_cuda_on_cpu_devices.py", "device"),
        ("test_cuda_on_cpu_lean.py", "test"),
        *((f"test_{name}.py", "simulated") for name in (
            "accuracy", "budgets", "gradcheck", "layouts", "pointwise", "special_values")),
    ],
)  # fmt: skip
def test_what_the_simulation_runs(file: str, chosen: str, approximations: int) -> None:
    """With PTX in place of the sources, and with two kinds of errors of approximate functions."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", f"tests/{file}", "-k", chosen]
    environment = os.environ | {cuda_on_cpu.EXECUTE_PTX: str(approximations)}
    done = subprocess.run([*command, "-m", "not slow"], env=environment, cwd=compiling.build.ROOT,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout
