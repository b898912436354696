"""``tools.cost`` on PTX that is compiled and executed: small kernels counted by hand, and the CUDA
and Triton kernels held to their budgets (``cost_budgets.json``)."""

from __future__ import annotations

import ctypes
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from senet_kernels.backends import native
from tools.cost import budgets, page, pipes
from tools.cost.cards import CARDS

ROOT = Path(__file__).parent.parent
BUDGETS = Path(__file__).with_name("cost_budgets.json")
H200 = CARDS["H200"]

needs_cuda_kernels = pytest.mark.skipif(
    bool(native.UNAVAILABLE or native.unavailable_on("cuda")),
    reason="the library was built without CUDA kernels, so that it has no plans",
)


# Ten rounds of a loop for each thread; in the loop a branch that odd threads take.
_PTX = """.version 9.0
.target sm_90a
.address_size 64
.visible .entry rounds(
    .param .u64 rounds_param_0
)
{
    .reg .pred %p<3>;
    .reg .b32 %r<6>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [rounds_param_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    mov.u32 %r2, 0;
    ld.volatile.global.u32 %r5, [%rd3];
$again:
    ld.volatile.global.u32 %r3, [%rd3];
    and.b32 %r4, %r1, 1;
    setp.eq.u32 %p1, %r4, 0;
    @%p1 bra $even;
    atom.global.add.u32 %r3, [%rd3], %r5;
    atom.global.max.u32 %r3, [%rd3], %r3;
$even:
    st.volatile.global.u32 [%rd3], %r3;
    add.u32 %r2, %r2, 1;
    setp.lt.u32 %p2, %r2, %r5;
    @%p2 bra $again;
    ret;
}
"""


def _counted(threads: int, rounds: int) -> tuple[list[int], list[int], list[int]]:
    """Executions of each block of the kernel, by warps and threads; and the lines they begin at."""
    import numpy as np

    from ptx import compiling, running
    from ptx.translate import Module

    path, _ = running._machine()
    library = compiling.linked(_PTX, "rounds", path, counts=True)
    entry = compiling.entries_of(library, _PTX)["rounds"]
    data = np.full(threads, rounds, np.uint32)
    running.launch(entry, [data.ctypes.data], grid=(1, 1, 1), block=threads)
    leaders = Module(_PTX, counts=True).leaders
    warps, each = (ctypes.c_uint64 * len(leaders))(), (ctypes.c_uint64 * len(leaders))()
    library.ptx_take_counts(warps, each, ctypes.c_uint64(len(leaders)))
    return list(warps), list(each), leaders


def _why_not() -> str | None:
    from tools.cost.machine_code import why_not

    return why_not()


needs_compilers = pytest.mark.skipif(bool(_why_not()), reason=str(_why_not()))


@needs_compilers
def test_blocks_of_ptx_are_counted() -> None:
    """By hand: 80 threads are three warps, the last of them half full; odd threads of all three
    take the branch; every thread goes round ten times."""
    warps, threads, leaders = _counted(80, 10)
    lines = _PTX.split("\n")
    assert [lines[line - 1].split()[0] for line in leaders] == [
        "ld.param.u64", "ld.volatile.global.u32", "atom.global.add.u32",
        "st.volatile.global.u32", "ret;",
    ]  # fmt: skip
    assert warps == [3, 30, 30, 30, 3]
    assert threads == [80, 800, 400, 800, 80]


@needs_compilers
def test_a_kernel_counted_by_hand() -> None:
    """Loads, stores and atomics are one instruction each in machine code: how often warps issue
    them is known from the rounds."""
    from tools.cost.machine_code import compiled
    from tools.cost.profile import Profile
    from tools.cost.ptx import Text

    warps, threads, leaders = _counted(64, 7)
    code = compiled(_PTX, "90a", "rounds")
    assert (code.resources.stack, code.resources.spills) == (0, 0)
    profile = Profile(code, Text(_PTX, leaders), warps, threads)
    issued: dict[str, float] = {}
    for t in profile.timed:
        issued[t.instruction.name] = issued.get(t.instruction.name, 0) + t.times
    assert issued["LDG"] == pytest.approx(2 * 7 + 2)
    assert issued["STG"] == pytest.approx(2 * 7)
    atomics = sum(n for name, n in issued.items() if name in ("ATOM", "ATOMG"))
    assert atomics == pytest.approx(2 * 2 * 7)
    assert issued["EXIT"] == pytest.approx(2)
    # As many as there are of PTX, but for what becomes none (parameters) or two (64-bit sums).
    assert profile.ptx_instructions == 2 * (6 + 7 * (4 + 2 + 4) + 1)
    assert profile.instructions == pytest.approx(profile.ptx_instructions, rel=0.25)


# Each lane stores 4 bytes to shared memory, so many behind the lane before it, and 8 to global one.
_STRIDES = """.version 9.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry strides(
    .param .u64 strides_param_0
)
{
    .reg .b32 %%r<6>;
    .reg .b64 %%rd<4>;
    ld.param.u64 %%rd1, [strides_param_0];
    mov.u32 %%r1, %%tid.x;
    mov.u32 %%r2, smem;
    mad.lo.u32 %%r3, %%r1, %d, %%r2;
    st.shared.u32 [%%r3], %%r1;
    mul.wide.u32 %%rd2, %%r1, %d;
    add.s64 %%rd3, %%rd1, %%rd2;
    st.global.v2.u32 [%%rd3], {%%r1, %%r1};
    ret;
}
"""


@needs_compilers
@pytest.mark.parametrize(
    ("shared", "conflicts", "stride", "sectors"),
    [(4, 1, 8, 8), (8, 2, 16, 16), (32, 8, 32, 32), (128, 32, 0, 1), (0, 1, 64, 32)],
)
def test_what_accesses_touch(shared: int, conflicts: int, stride: int, sectors: int) -> None:
    import numpy as np

    from ptx import compiling, running
    from tools.cost.executed import Touched, _Touched

    text = _STRIDES % (shared, stride)
    path, _ = running._machine()
    library = compiling.linked(text, "strides", path, counts=True)
    entry = compiling.entries_of(library, text)["strides"]
    data = np.zeros(32 * 8 + 32, np.uint64)
    library.ptx_watch(1)
    running.launch(entry, [-(-data.ctypes.data // 32) * 32], grid=(1, 1, 1), block=32, shared=4096)
    library.ptx_watch(0)
    rows = (_Touched * 8)()
    assert library.ptx_take_accesses(rows, ctypes.c_uint64(8)) == 3  # one of the parameter
    found = {text.split("\n")[row.line - 1].split()[0]: row for row in rows[:3]}
    of = Touched(*(getattr(found["st.shared.u32"], name) for name in Touched._fields))
    assert (of.shared, of.requests, of.bytes) == (1, 1, 128)
    assert (of.wavefronts, of.least) == (conflicts, 1)
    of = Touched(*(getattr(found["st.global.v2.u32"], name) for name in Touched._fields))
    assert (of.shared, of.requests, of.bytes, of.sectors) == (0, 1, 256, sectors)


_LOCATED = """.version 9.0
.target sm_90a
.address_size 64
.func helper()
{
    .loc 1 7 1
    ret;
}
.visible .entry outer(.param .u64 outer_param_0)
{
    .reg .b32 %r<3>;
    .loc 1 20 3
    mov.u32 %r1, 1;
    .loc 1 12 5, function_name $L__info_string0, inlined_at 1 20 3
    mov.u32 %r2, 2;
    .loc 2 3 5, function_name $L__info_string1, inlined_at 1 12 5
    mov.u32 %r1, 3;
    ret;
}
    .file 1 "/a/one.cuh"
    .file 2 "/a/two.cuh"
    .section .debug_str
    {
$L__info_string0:
.b8 115,99,97,108,101,0
$L__info_string1:
.b8 108,111
.b8 97,100,0
    }
"""


@needs_compilers
def test_places_in_the_source() -> None:
    """Functions are named from the inside to the outside."""
    from tools.cost.ptx import Frame, Text

    text = Text(_LOCATED, [7, 13])
    assert text.frames[7] == Frame("one.cuh", 7, ("helper",))
    assert text.frames[13] == Frame("one.cuh", 20, ("outer",))
    assert text.frames[15] == Frame("one.cuh", 12, ("scale", "outer"))
    assert text.frames[17] == Frame("two.cuh", 3, ("load", "scale", "outer"))
    assert [text.block_of(line) for line in (1, 7, 13, 17)] == [None, 0, 1, 1]
    assert text.instructions == [[7], [13, 15, 17, 18]]
    assert text.loops() == []


@needs_compilers
def test_every_instruction_names_its_line() -> None:
    from tools.cost.machine_code import located

    lines = located(_LOCATED).split("\n")
    named = {int(line.split()[2]): lines[i + 1].strip() for i, line in enumerate(lines)
             if line.startswith(".loc")}  # fmt: skip
    assert named == {7: "ret;", 13: "mov.u32 %r1, 1;", 15: "mov.u32 %r2, 2;",
                     17: "mov.u32 %r1, 3;", 18: "ret;"}  # fmt: skip


# Two numbers of bfloat16, times three.
_FOLDED = """.version 9.0
.target sm_90a
.address_size 64
.visible .entry tripled(
    .param .u64 tripled_param_0
)
{
    .reg .b16 %rs<3>;
    .reg .b32 %r<7>;
    .reg .f32 %f<5>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd1, [tripled_param_0];
    cvta.to.global.u64 %rd2, %rd1;
    ld.global.u32 %r1, [%rd2];
    shl.b32 %r2, %r1, 16;
    and.b32 %r3, %r1, -65536;
    mov.b32 %f1, %r2;
    mov.b32 %f2, %r3;
    mul.f32 %f3, %f1, 0f40400000;
    mul.f32 %f4, %f2, 0f40400000;
    cvt.rn.bf16.f32 %rs1, %f3;
    cvt.rn.bf16.f32 %rs2, %f4;
    mov.b32 %r4, {%rs1, %rs2};
    st.global.u32 [%rd2], %r4;
    ret;
}
"""


@needs_compilers
def test_what_ptxas_makes_fewer_instructions_of() -> None:
    """Bits that change their type, and halves that are put side by side, are no instruction; two
    roundings are one."""
    from tools.cost.machine_code import compiled
    from tools.cost.ptx import Text, machine_instructions

    names = [i.name for i in compiled(_FOLDED, "90a", "tripled").program.instructions]
    work = names[names.index("LDG") : names.index("STG") + 1]
    assert len(work) == 7
    assert (work.count("FMUL"), work.count("F2FP")) == (2, 1)
    first = next(n for n, line in enumerate(_FOLDED.split("\n"), 1) if "ld.param" in line)
    around = 3  # of the parameter, two, and the return
    assert Text(_FOLDED, [first]).expected == [len(work) + around]
    assert machine_instructions("mov.u32 %r1, %tid.x;") == 1
    assert machine_instructions("mov.b32 %r1, 16;") == 1


def _layer(shape: str) -> Any:
    from tools.cost.record import layers

    of = ["seresnet50", "efficientnet_b0"]
    return next(layer for layer in layers(of) if layer.shape == shape)


_LOOPS = [
    (direction, kernel, loop, layout)
    for direction, kernel in (("forward", "forward_kernel"), ("backward", "backward_kernel"))
    for loop in ("sum", "write", "mlp")
    for layout in ("NCHW", "NHWC")
]


@needs_compilers
@pytest.mark.parametrize(("direction", "kernel", "loop", "layout"), _LOOPS)
def test_loops_are_as_long_as_in_ptx(direction: str, kernel: str, loop: str, layout: str) -> None:
    """Instructions in an iteration: executed PTX and machine code agree within a fifth. In PTX a
    bit cast is an instruction, and rounding two numbers to bfloat16 is three; in the loops over x
    that is a third of them. Of these it is known how many ptxas leaves, see the test above; within
    a fifth is the rest, sums of 64 bits above all, which are one or two."""
    from tools.cost import cuda

    found = [
        x
        for d, k, profile in cuda.profiles_of(_layer("512x28x28"), layout == "NHWC", H200)
        if (d, k) == (direction, kernel)
        for x in profile.loops()
        if x.name == loop
    ]
    assert found
    assert found[0].instructions == pytest.approx(found[0].ptx, rel=0.2)


@needs_compilers
def test_every_opcode_of_the_kernels_has_a_pipe() -> None:
    from tools.cost import cuda

    opcodes = {
        i
        for _, _, profile in cuda.profiles_of(_layer("512x28x28"), False, H200)
        for i in profile.code.program.instructions
    }
    assert len(opcodes) > 5000
    for instruction in opcodes:
        pipes.pipe_of(instruction)


# ---- budgets ----


def _budgets(*, gate: bool) -> list[Any]:
    """Some layers of SE-ResNet-50 are held to their budgets in the gate, others by slow tests."""
    named = [(b["backend"], b["card"], b["layer"], b["layout"]) for b in budgets.read(BUDGETS)]
    quick = [n for n in dict.fromkeys(named) if n[0] == "native" and n[2] in _GATE]
    return quick if gate else [n for n in dict.fromkeys(named) if n not in quick]


_GATE = ("512x28x28-r32-relu-sigmoid", "2048x7x7-r128-relu-sigmoid")


def _holds(backend: str, card: str, layer: str, layout: str) -> None:
    from tools.cost.record import layers, rows

    (of,) = (x for x in layers() if x.name == layer)
    allowed = {
        b["direction"]: b
        for b in budgets.read(BUDGETS)
        if (b["backend"], b["card"], b["layer"], b["layout"]) == (backend, card, layer, layout)
    }
    lines = list(rows(backend, of, layout, CARDS[card]))
    assert {line["direction"] for line in lines} == set(allowed)
    for line in lines:
        of_compiler = allowed[line["direction"]]["compiler"]
        if line["compiler"] != of_compiler:
            pytest.skip(f"the budgets are of {of_compiler}, this is {line['compiler']}")
    wrong = {line["direction"]: budgets.exceeded(allowed[line["direction"]], line)
             for line in lines}  # fmt: skip
    assert not any(wrong.values()), wrong


@needs_compilers
@needs_cuda_kernels
@pytest.mark.parametrize(("backend", "card", "layer", "layout"), _budgets(gate=True))
def test_budgets(backend: str, card: str, layer: str, layout: str) -> None:
    _holds(backend, card, layer, layout)


@needs_compilers
@needs_cuda_kernels
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "card", "layer", "layout"), _budgets(gate=False))
def test_more_budgets(backend: str, card: str, layer: str, layout: str) -> None:
    _holds(backend, card, layer, layout)


# ---- the record and the page ----


def test_page_is_what_the_record_says() -> None:
    path = ROOT / "docs" / "cost.md"
    text = path.read_text(encoding="utf-8")
    assert page.renewed(text, path.parent) == text, "run python -m tools.cost.page"


def test_record_has_every_layer() -> None:
    """Of the CUDA kernels on the card that docs speak of."""
    from tools.cost.record import layers

    record = json.loads((ROOT / "benchmarks/results/computed/cost.json").read_text())
    found = {(line["layer"], line["layout"], line["direction"]) for line in record["rows"]
             if (line["backend"], line["card"]) == ("native", "H200")}  # fmt: skip
    wanted = itertools.product((x.name for x in layers()), ("NCHW", "NHWC"),
                               ("forward", "backward"))  # fmt: skip
    assert set(wanted) == found
    assert record["what"] == "computed from machine code, not measured"


# ---- Triton ----


@needs_compilers
@pytest.mark.slow
def test_what_adds_up_parts_reads_them_alone() -> None:
    """Where several programs share a channel's sum; it is no reading of the images."""
    from tools.cost import triton

    layer = _layer("32x112x112")
    passes = triton.work(layer, True, H200)
    adders = {w.kernel: w for _, _, works in passes for w in works if w.kernel in triton._ADDERS}
    assert set(adders) == set(triton._ADDERS)
    for work in adders.values():
        assert not work.moves
        assert sum(work.l2.values()) < 0.01 * 256 * 2 * layer.channels * layer.positions
