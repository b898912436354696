"""Litmus tests whose verdicts are known: those of the PTX manual, with its section, and the classic
ones, whose answers follow from the definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .model import Instruction, Program, Thread


class Classic(NamedTuple):
    """Whether an execution may end with these registers."""

    name: str
    program: Program
    registers: dict[str, Any]
    allowed: bool


def _ld(order: str, place: str, register: str) -> Instruction:
    return Instruction(f"ld.{order}.u32", place, register=register)


def _st(order: str, place: str, value: Any) -> Instruction:
    return Instruction(f"st.{order}.u32", place, value)


def _add(opcode: str, place: str, register: str = "") -> Instruction:
    return Instruction(f"{opcode}.add.u32", place, lambda old: old + 1, register)


def _fence(kind: str) -> Instruction:
    return Instruction(f"fence.{kind}")


def _blocks(*threads: list[Instruction]) -> Program:
    return Program([Thread(instructions, block) for block, instructions in enumerate(threads)])


def _one_block(*threads: list[Instruction]) -> Program:
    return Program([Thread(instructions) for instructions in threads])


_Make = Callable[..., Program]


def _message(store: str, load: str, make: _Make = _blocks) -> Program:
    return make([_st("weak", "x", 1), _st(store, "flag", 1)],
                [_ld(load, "flag", "r0"), _ld("weak", "x", "r1")])  # fmt: skip


def _fenced_message(first: str, second: str, make: _Make = _blocks) -> Program:
    return make([_st("weak", "x", 1), _fence(first), _st("relaxed.gpu", "flag", 1)],
                [_ld("relaxed.gpu", "flag", "r0"), _fence(second),
                 _ld("weak", "x", "r1")])  # fmt: skip


def _store_buffering(fence: str) -> Program:
    return _blocks([_st("weak", "x", 1), _fence(fence), _ld("weak", "y", "r0")],
                   [_st("weak", "y", 1), _fence(fence), _ld("weak", "x", "r1")])  # fmt: skip


def _load_buffering(load: str, store: str) -> Program:
    return _blocks([_ld(load, "x", "r0"), _st(store, "y", 1)],
                   [_ld(load, "y", "r1"), _st(store, "x", 1)])  # fmt: skip


def _independent_reads(load: str, between: list[Instruction]) -> Program:
    return _blocks(
        [_st("relaxed.gpu", "x", 1)], [_st("relaxed.gpu", "y", 1)],
        [_ld(load, "x", "r0"), *between, _ld(load, "y", "r1")],
        [_ld(load, "y", "r2"), *between, _ld(load, "x", "r3")],
    )  # fmt: skip


def _read_twice(store: str, load: str, make: _Make = _blocks) -> Program:
    return make([_st(store, "x", 1)], [_ld(load, "x", "r0"), _ld(load, "x", "r1")])


def _chain(first: str, second: str) -> Program:
    """ISA2 with data written by the first thread and read by the third."""
    return _blocks(
        [_st("weak", "x", 1), _st(first, "a", 1)],
        [_ld("acquire.gpu", "a", "r0"), _st(second, "b", 1)],
        [_ld("acquire.gpu", "b", "r1"), _ld("weak", "x", "r2")],
    )  # fmt: skip


def _across_barrier(barriers: int) -> Program:
    """A thread of a block writes, another announces it; in the other block one waits, another
    reads."""
    bar = [Instruction("bar.sync")] * barriers
    return Program([
        Thread([_st("weak", "x", 1), *bar]), Thread([*bar, _st("release.gpu", "flag", 1)]),
        Thread([_ld("acquire.gpu", "flag", "r0"), *bar], 1),
        Thread([*bar, _ld("weak", "x", "r1")], 1),
    ])  # fmt: skip


def _of_clusters(scope: str, same: bool) -> Program:
    p = _message(f"release.{scope}", f"acquire.{scope}")
    return Program([p.threads[0], Thread(p.threads[1].instructions, 1, cluster=0 if same else 1)])


def _cluster_barrier(arrive: str) -> Program:
    barrier = [Instruction(f"barrier.cluster.arrive.{arrive}.aligned"),
               Instruction("barrier.cluster.wait.acquire.aligned")]  # fmt: skip
    return _blocks([_st("weak", "x", 1), *barrier], [*barrier, _ld("weak", "x", "r1")])


def _through_atomic(middle: str) -> Program:
    """A release sequence: the acquire reads an atomic operation of a third thread."""
    return _blocks([_st("weak", "x", 1), _st("release.gpu", "flag", 1)], [_add(middle, "flag")],
                   [_ld("acquire.gpu", "flag", "r0"), _ld("weak", "x", "r1")])  # fmt: skip


def _bulk_copy(fence: bool) -> Program:
    """A thread writes to shared memory, then overwrites it by a bulk copy, and waits for that."""
    return Program([Thread([
        Instruction("ld.shared.u32", "x", register="r0"),
        *([Instruction("fence.proxy.async.shared::cta")] if fence else []),
        Instruction("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes", "x", 1,
                    mbarrier="m", complete=lambda old: old + 1),
        Instruction("mbarrier.try_wait.parity", "m", until=lambda v: v == 1),
        Instruction("ld.shared.u32", "x", register="r1"),
    ])])  # fmt: skip


_RELAXED, _RELEASE, _ACQUIRE = "relaxed.gpu", "release.gpu", "acquire.gpu"
_MP, _SB, _LB = {"r0": 1, "r1": 0}, {"r0": 0, "r1": 0}, {"r0": 1, "r1": 1}
_IRIW = {"r0": 1, "r1": 0, "r2": 1, "r3": 0}
_COPY_LB = _blocks([_ld("weak", "x", "r0"), _st("weak", "y", lambda r: r["r0"])],
                   [_ld("weak", "y", "r1"), _st("weak", "x", lambda r: r["r1"])])  # fmt: skip
_COPY_AND_STORE = _blocks([_ld(_RELAXED, "x", "r0"), _st(_RELAXED, "y", lambda r: r["r0"])],
                          [_ld(_RELAXED, "y", "r1"), _st(_RELAXED, "x", 1)])  # fmt: skip


def _atomics(first: str, second: str) -> Program:
    return _blocks([_add(first, "x", "r0")], [_add(second, "x", "r1")])


CLASSICS = (
    Classic("MP", _message("weak", "weak"), _MP, True),
    Classic("MP relaxed", _message(_RELAXED, _RELAXED), _MP, True),
    Classic("MP release, acquire", _message(_RELEASE, _ACQUIRE), _MP, False),
    Classic("MP without release", _message(_RELAXED, _ACQUIRE), _MP, True),
    Classic("MP without acquire", _message(_RELEASE, _RELAXED), _MP, True),
    Classic("MP the message arrives", _message(_RELEASE, _ACQUIRE), _LB, True),
    Classic("MP scope of the release", _message("release.cta", _ACQUIRE), _MP, True),
    Classic("MP scope of the acquire", _message(_RELEASE, "acquire.cta"), _MP, True),
    Classic("MP scope of both", _message("release.cta", "acquire.cta"), _MP, True),
    Classic("MP scope cta in a block", _message("release.cta", "acquire.cta", _one_block),
            _MP, False),
    Classic("MP scope cluster", _of_clusters("cluster", True), _MP, False),
    Classic("MP scope cluster, two clusters", _of_clusters("cluster", False), _MP, True),
    Classic("MP volatile", _message("volatile", "volatile"), _MP, True),
    Classic("MP fences (8.10.6)", _fenced_message("acq_rel.gpu", "acq_rel.gpu"), _MP, False),
    Classic("MP fence.release, fence.acquire", _fenced_message("release.gpu", "acquire.gpu"),
            _MP, False),
    Classic("MP fence.acquire for release", _fenced_message("acquire.gpu", "acquire.gpu"),
            _MP, True),
    Classic("MP scope of a fence", _fenced_message("acq_rel.cta", "acq_rel.gpu"), _MP, True),
    Classic("MP through an atomic operation", _through_atomic("atom.relaxed.gpu"),
            {"r0": 2, "r1": 0}, False),
    Classic("MP through a reduction", _through_atomic("red.relaxed.gpu"),
            {"r0": 2, "r1": 0}, False),
    Classic("MP through one of narrower scope", _through_atomic("atom.relaxed.cta"),
            {"r0": 2, "r1": 0}, True),
    Classic("MP through barriers of the blocks", _across_barrier(1), _MP, False),
    Classic("MP without barriers", _across_barrier(0), _MP, True),
    Classic("MP cluster barrier", _cluster_barrier("release"), {"r1": 0}, False),
    Classic("MP cluster barrier, relaxed", _cluster_barrier("relaxed"), {"r1": 0}, True),
    Classic("SB", _store_buffering("release.gpu"), _SB, True),
    Classic("SB fence.acq_rel (8.10.6)", _store_buffering("acq_rel.gpu"), _SB, True),
    Classic("SB fence.sc (8.10.6)", _store_buffering("sc.gpu"), _SB, False),
    Classic("SB fence.sc, scope", _store_buffering("sc.cta"), _SB, True),
    Classic("LB (8.10.4)", _load_buffering("weak", "weak"), _LB, True),
    Classic("LB relaxed", _load_buffering(_RELAXED, _RELAXED), _LB, True),
    Classic("LB acquire, release", _load_buffering(_ACQUIRE, _RELEASE), _LB, False),
    Classic("LB acquire alone", _load_buffering(_ACQUIRE, _RELAXED), _LB, True),
    Classic("LB with dependencies (8.10.4)", _COPY_LB, {"r0": 1}, False),
    Classic("LB with dependencies, zero", _COPY_LB, {"r0": 0, "r1": 0}, True),
    Classic("LB with one dependency", _COPY_AND_STORE, _LB, True),
    Classic("IRIW relaxed", _independent_reads(_RELAXED, []), _IRIW, True),
    Classic("IRIW acquire", _independent_reads(_ACQUIRE, []), _IRIW, True),
    Classic("IRIW fence.acq_rel", _independent_reads(_RELAXED, [_fence("acq_rel.gpu")]),
            _IRIW, True),
    Classic("IRIW fence.sc", _independent_reads(_RELAXED, [_fence("sc.gpu")]), _IRIW, False),
    Classic("CoRR (8.10.5)", _read_twice("relaxed.sys", "relaxed.sys"), _MP, False),
    Classic("CoRR weak reads", _read_twice(_RELAXED, "weak"), _MP, True),
    Classic("CoRR scope", _read_twice(_RELAXED, "relaxed.cta"), _MP, True),
    Classic("CoRR scope cta in a block", _read_twice("relaxed.cta", "relaxed.cta", _one_block),
            _MP, False),
    Classic("CoWW", _one_block([_st("weak", "x", 1), _st("weak", "x", 2), _ld("weak", "x", "r0")]),
            {"r0": 1}, False),
    Classic("CoRW", _blocks([_ld(_RELAXED, "x", "r0"), _st(_RELAXED, "x", 1)]), {"r0": 1}, False),
    Classic("ISA2", _chain(_RELEASE, _RELEASE), {"r0": 1, "r1": 1, "r2": 0}, False),
    Classic("ISA2 without the second release", _chain(_RELEASE, _RELAXED),
            {"r0": 1, "r1": 1, "r2": 0}, True),
    Classic("RMW (8.10.3, test 1)", _atomics("atom.sys", "atom.sys"), {"r0": 0, "r1": 0}, False),
    Classic("RMW scope (8.10.3, test 2)", _atomics("atom.cta", "atom.gpu"),
            {"r0": 0, "r1": 0}, True),
    Classic(
        "MP with a red (8.11.1)",
        _blocks([_st("weak", "x", 42), _st(_RELEASE, "flag", 1)],
                [_add("red.sys.global", "flag", "r0"), _fence(_ACQUIRE), _ld("weak", "x", "r1")]),
        {"r0": 1, "r1": 0}, True,
    ),
    Classic(
        "MP with an atom (8.11.1)",
        _blocks([_st("weak", "x", 42), _st(_RELEASE, "flag", 1)],
                [_add("atom.sys.global", "flag", "r0"), _fence(_ACQUIRE), _ld("weak", "x", "r1")]),
        {"r0": 1, "r1": 0}, False,
    ),
    Classic("bulk copy, what it wrote", _bulk_copy(True), {"r1": 0}, False),
    Classic("bulk copy over what was read", _bulk_copy(True), {"r0": 1}, False),
    Classic("bulk copy without a proxy fence", _bulk_copy(False), {"r0": 1}, True),
)  # fmt: skip
