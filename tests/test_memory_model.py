"""Memory ordering of the CUDA kernels: the PTX memory model over their exchange protocols, the
compiled kernels against these protocols, and the machine code of their steps. See
``tests/memory_model/README.md``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from memory_model.classics import CLASSICS, Classic
from memory_model.extraction import SYNCHRONIZES, Kernel
from memory_model.machine_code import Line, sass
from memory_model.model import Instruction, Program, Thread, allows, executions
from memory_model.protocols import (
    BULK_RING,
    CLUSTER,
    GRID,
    PROTOCOLS,
    Protocol,
    Size,
    Weakening,
    async_ring,
    weakened,
)
from ptx import compiling
from tools import mutate_ptx
from tools.mutate_ptx import KERNELS

needs_nvcc = pytest.mark.skipif(
    compiling.find_nvcc() is None, reason="no nvcc; pip install nvidia-cuda-nvcc"
)
needs_nvdisasm = pytest.mark.skipif(
    compiling.tool("nvdisasm") is None, reason="no nvdisasm, which comes with CUDA and with Triton"
)


# ---- the model ----


@pytest.mark.parametrize("classic", CLASSICS, ids=lambda c: c.name)
def test_classics(classic: Classic) -> None:
    assert allows(classic.program, **classic.registers) == classic.allowed


def test_opcodes_that_are_not_modelled_are_refused() -> None:
    for opcode in (
        "st.async.shared::cluster.u32",
        "tex.1d",
        "griddepcontrol.wait",
        "cp.reduce.async",
    ):
        with pytest.raises(ValueError, match="is not modelled"):
            next(executions(Program([Thread([Instruction(opcode, "x", 1)])])))


# ---- the protocols ----


@pytest.mark.parametrize(
    ("protocol", "size"), [(p, size) for p in PROTOCOLS for size in p.right],
    ids=lambda v: v.name if isinstance(v, Protocol) else f"{v.blocks}x{v.images}",
)  # fmt: skip
def test_protocols_are_right(protocol: Protocol, size: Size) -> None:
    """In every execution every thread reads what it is to read, and there is no data-race."""
    assert protocol.fault(size) is None


@pytest.mark.parametrize(
    ("protocol", "weakening"), list(weakened()), ids=lambda v: v.name.replace(" ", "-")
)
def test_weakened_protocols_are_wrong(protocol: Protocol, weakening: Weakening) -> None:
    faults = [protocol.fault(size, weakening) for size in protocol.wrong]
    assert any(faults) != bool(weakening.harmless), (faults, weakening.harmless)


def test_every_step_is_weakened() -> None:
    """But for the accesses that the others order."""
    accesses = {"publish", "collect", "copy", "read"}
    for protocol in PROTOCOLS:
        assert set(protocol.steps) - {w.step for w in protocol.weakenings} <= accesses, (
            protocol.name
        )


def test_what_the_grid_exchange_rests_on() -> None:
    """A block that waits sees the last announcement alone: earlier ones reach it because
    observation order passes through reductions, which the manual says less clearly than of other
    atomics."""
    assert GRID.fault(Size(2, 1), reductions_pass_on=False)


# ---- the compiled kernels ----

_BETWEEN_BLOCKS = re.compile(r"red|atom|barrier\.|ld\.acquire|ld\.global\.cg|.*mapa|.*volatile")


def _expected(target: str) -> Iterator[tuple[dict[str, int], Protocol]]:
    """A protocol for every field of a plan that decides about it, the other fields being any."""
    for axis in (0, 1):
        if target == "90a":
            yield {"exchange": 1, "axis": axis}, CLUSTER
        yield {"exchange": 2, "axis": axis}, GRID
    if target == "90a":
        yield {"resident": 1, "bulk": 1}, BULK_RING
    for slots in (1, 2, 3):
        yield {"resident": 1, "bulk": 0, "slots": slots}, async_ring(slots)


def _roles(protocol: Protocol) -> tuple[bool, ...]:
    """Any thread, and the leader where the protocol has one."""
    return (False, True) if "!" in protocol.order else (False,)


def _cases() -> Iterator[Any]:
    for target in ("90a", "80"):
        for kernel in ("forward", "backward"):
            for plan, protocol in _expected(target):
                few = target == "90a" or protocol is GRID or plan.get("slots") == 2
                choices = ",".join(f"{name}={value}" for name, value in plan.items())
                name, marks = f"{kernel}-{target}-{choices}", () if few else pytest.mark.slow
                yield pytest.param(target, kernel, plan, protocol, id=name, marks=marks)


@needs_nvcc
@pytest.mark.parametrize(("target", "kernel", "plan", "protocol"), list(_cases()))
def test_kernels_follow_the_protocols(
    target: str, kernel: str, plan: dict[str, int], protocol: Protocol
) -> None:
    """The instructions that the litmus programs are made of, in their order, on every path; and
    each of them on some path. For all the plans that have these choices."""
    for leader in _roles(protocol):
        assert Kernel(KERNELS[kernel], target, plan, leader=leader).compare(protocol) is None


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("target", ["90a", "80"])
@pytest.mark.parametrize(
    "instance",
    ["4ELb1ELi3ELi1", "4ELb1ELin1ELi0", "2ELb1ELin1ELi0", "2ELb0ELin1ELi0", "8ELb0ELin1ELi0"],
)
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_other_kernels_follow_the_protocols(kernel: str, instance: str, target: str) -> None:
    """Single and double precision, the general loops, and accesses element by element, which keep
    no images."""
    name = KERNELS[kernel].replace("2ELb1ELi0ELi1", instance)
    for plan, protocol in _expected(target):
        if "resident" not in plan or "Lb1" in instance:
            for leader in _roles(protocol):
                assert Kernel(name, target, plan, leader=leader).compare(protocol) is None, plan


@needs_nvcc
@pytest.mark.parametrize("target", ["90a", "80"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_have_no_other_steps(kernel: str, target: str) -> None:
    """What synchronizes in any plan is a step of some protocol; what exchanges nothing has nothing
    that does."""
    whole = Kernel(KERNELS[kernel], target, {})
    known = {opcode for protocol in PROTOCOLS for opcode in protocol.steps.values()}
    assert {opcode for opcode in whole.opcodes() if SYNCHRONIZES.match(opcode)} <= known
    alone = whole if kernel == "gradients" else Kernel(KERNELS[kernel], target, {"exchange": 0})
    assert not list(filter(_BETWEEN_BLOCKS.match, alone.opcodes()))


def _changes(ptx: str) -> list[tuple[str, str]]:
    """PTX with one step of an exchange left out or weakened, each with a name."""
    kinds = ("cluster-arrive", "cluster-wait", "commit", "wait-for-copies", "mbarrier-wait",
             "mbarrier-arrive", "proxy-fence", "release", "acquire", "warp-barrier")  # fmt: skip
    found = [(m.name, ptx[: m.at[0]] + m.text + ptx[m.at[1] :])
             for m in mutate_ptx.mutants({"forward": ptx})
             if any(m.name.startswith(f"forward-{kind}-") for kind in kinds)]  # fmt: skip
    weaker = {
        r"red\.release\.gpu": "red.relaxed.gpu", r"red\.release\.gpu\b": "red.release.cta",
        r"ld\.acquire\.gpu\.global": "ld.relaxed.gpu.global",
        r"ld\.acquire\.gpu\b": "ld.acquire.cta",
        r"atom\.add\.release\.gpu": "atom.add.relaxed.gpu",
        r"cluster\.arrive\.release": "cluster.arrive.relaxed",
        r"wait_group 0": "wait_group 1", r"wait_group 1": "wait_group 2",
        # The barriers that belong to an exchange: before it, and behind it.
        r"bar\.sync\s+0;(?=(?:(?:(?!bra\.uni)[^;])*;){1,16}?[^;]*red\.release)": ";",
        r"(ld\.acquire\.gpu\.global(?:[^;]*;){1,8}?[^;]*)bar\.sync\s+0;": r"\1;",
        r"(cp\.async\.wait_group 2;(?:[^;]*;){0,3}?[^;]*)bar\.sync\s+0;": r"\1;",
    }  # fmt: skip
    for pattern, instead in weaker.items():
        sites = list(re.finditer(pattern, ptx))
        assert sites, pattern
        for m in sites:
            changed = ptx[: m.start()] + m.expand(instead) + ptx[m.end() :]
            found.append((f"{pattern} at {m.start()}", changed))
    return found


def _noticed(ptx: str) -> bool:
    return any(
        Kernel(KERNELS["forward"], "90a", plan, leader=leader, ptx=ptx).compare(protocol)
        for plan, protocol in _expected("90a")
        for leader in _roles(protocol)
    )


@needs_nvcc
def test_changed_kernels_are_noticed() -> None:
    """A few of the changes; the slow test has all."""
    ptx = compiling.ptx_of(KERNELS["forward"], "90a")
    changes = _changes(ptx)
    assert len(changes) > 40
    assert [name for name, changed in changes[::13] if not _noticed(changed)] == []


@needs_nvcc
@pytest.mark.slow
def test_every_change_of_a_kernel_is_noticed() -> None:
    ptx = compiling.ptx_of(KERNELS["forward"], "90a")
    assert [name for name, changed in _changes(ptx) if not _noticed(changed)] == []


# ---- the machine code ----


def _index(lines: list[Line], pattern: str) -> list[int]:
    return [i for i, line in enumerate(lines) if re.match(pattern, line.text)]


def _before(lines: list[Line], at: int, skipping: str) -> Line:
    """The last instruction before one that does not match."""
    return next(line for line in reversed(lines[:at]) if not re.match(skipping, line.text))


_ERRORS = r"(CGA)?ERRBAR"


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("target", ["90a", pytest.param("80", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_machine_code_of_the_exchanges(kernel: str, target: str) -> None:
    lines = sass(KERNELS[kernel], target)
    steps = [step.opcode for step in Kernel(KERNELS[kernel], target, {}).steps()]

    # red.release and atom.release: all that was done before is performed for the whole GPU, with no
    # access in between. Nothing is stored between that and the block's barrier.
    announced = _index(lines, r"REDG?\.E\.ADD\.STRONG\.GPU")
    assert len(announced) == steps.count(GRID.steps["announce"])
    counted = _index(lines, r"ATOMG?\.E\.ADD\.STRONG\.GPU")
    assert len(counted) == steps.count(GRID.steps["count in"])
    for at in (*announced, *counted):
        assert _before(lines, at, _ERRORS).opcode == "MEMBAR.ALL.GPU", lines[at]
        barrier = _before(lines, at, rf"{_ERRORS}|MEMBAR|BRA|LD").opcode
        assert barrier.startswith("BAR.SYNC"), lines[at]

    # ld.acquire: what L1 holds is of no use afterwards. Nothing is loaded before that, and the
    # block's barrier follows.
    acquired = steps.count(GRID.steps["await"]) + steps.count(GRID.steps["all are in"])
    cluster = steps.count(CLUSTER.steps["wait"])
    dropped = _index(lines, r"CCTL\.IVALL")
    assert len(dropped) == acquired + cluster
    waited = [lines[at - 1].opcode for at in dropped]
    assert sum(bool(re.fullmatch(r"LDG?\.E\.STRONG\.GPU", opcode)) for opcode in waited) == acquired
    assert waited.count("UCGABAR_WAIT") == cluster
    for at in dropped:
        after = next(line for line in lines[at + 1 :] if not line.opcode.startswith("BRA"))
        if lines[at - 1].opcode != "UCGABAR_WAIT":  # sm_80 has barrier.sync in a function
            assert after.opcode.startswith("BAR.SYNC") or "barrier_sync" in after.operands, after

    # barrier.cluster.arrive.release: as a release.
    arrived = _index(lines, "UCGABAR_ARV")
    assert len(arrived) == steps.count(CLUSTER.steps["arrive"]) == cluster
    for at in arrived:
        assert _before(lines, at, _ERRORS).opcode == "MEMBAR.ALL.GPU"


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_machine_code_of_the_rings(kernel: str) -> None:
    lines = sass(KERNELS[kernel], "90a")
    steps = [step.opcode for step in Kernel(KERNELS[kernel], "90a", {}).steps()]

    # Each bulk copy: the proxy fence, the announcement of bytes, the copy.
    copies = _index(lines, r"UBLKCP\.S\.G")
    assert len(copies) == steps.count(BULK_RING.steps["copy"]) == 2
    for at in copies:
        order = [line.opcode.split(".")[0] for line in lines[:at]
                 if re.match(r"FENCE\.VIEW\.ASYNC|SYNCS|BAR\.|UBLKCP|STS|ST\.",
                             line.text)]  # fmt: skip
        assert order[-2:] == ["FENCE", "SYNCS"], lines[at]
    assert len(_index(lines, r"SYNCS\.PHASECHK\S*\.TRYWAIT")) == 1

    # Each wait for groups of copies, as many as may be pending; then the block's barrier.
    waits = _index(lines, r"DEPBAR\.LE SB0, 0x[012]")
    pending = sorted(lines[at].operands[-1] for at in waits)
    assert pending == ["0", "1", "2"]
    for at in waits:
        after = next(line for line in lines[at + 1 :] if not re.match("BRA|DEPBAR", line.text))
        assert after.opcode.startswith("BAR.SYNC"), after
