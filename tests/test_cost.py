"""``tools.cost``: small machine code read and counted, and the kernels' within their budgets."""

from __future__ import annotations

import ctypes
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from senet_kernels.backends import native
from tools.cost import budgets, events, graph, page, pipes, sass
from tools.cost.cards import CARDS, occupancy
from tools.cost.events import Assumed, Multiprocessor, Phase

ROOT = Path(__file__).parent.parent
BUDGETS = Path(__file__).with_name("cost_budgets.json")
H200 = CARDS["H200"]

needs_cuda_kernels = pytest.mark.skipif(
    bool(native.UNAVAILABLE or native.unavailable_on("cuda")),
    reason="the library was built without CUDA kernels, so that it has no plans",
)


def _code(*lines: str, name: str = "k") -> str:
    """Machine code as nvdisasm prints it; a line with a colon is a label, one that is a number the
    line of PTX of what follows."""
    text, address = [f"//---- .text.{name} ----", f".text.{name}:"], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        elif line.isdigit():
            text.append(f'\t//## File "kernel.ptx", line {line}')
        else:
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return "\n".join(text)


_LOOP = (
    "1", "MOV R1, c[0x0][0x28]", "@P1 EXIT",
    ".L_x_0:", "2", "LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128 R8, desc[UR4][R2.64+0x200]",
    "3", "FADD R0, R0, R4", "LDG.E.128 R12, desc[UR4][R2.64+0x400]", "4", "FADD R0, R0, R15",
    "ISETP.NE.AND P0, PT, R1, RZ, PT", "@P0 BRA `(.L_x_0)",
    "5", "STG.E desc[UR4][R2.64], R0", "EXIT", ".L_x_1:", "BRA `(.L_x_1)", "NOP", "NOP",
)  # fmt: skip


def test_machine_code_is_read() -> None:
    program = sass.Program(_code(*_LOOP))
    assert program.name == "k"
    assert [len(block.instructions) for block in program.blocks] == [2, 7, 2, 1]
    assert [block.successors for block in program.blocks] == [[1], [2, 1], [], [3]]
    assert [i.line for i in program.blocks[1].instructions] == [2, 2, 3, 3, 4, 4, 4]
    first = program.instructions[2]
    assert (first.opcode, first.bytes, first.address) == ("LDG.E.128", 16, 32)
    assert (first.writes(), first.reads()) == ({"R4", "R5", "R6", "R7"}, {"UR4", "R2", "R3"})
    store = program.blocks[2].instructions[0]
    assert (store.bytes, store.writes(), store.reads()) == (4, set(), {"UR4", "R2", "R3", "R0"})
    assert program.loops() == [graph.Loop(1, frozenset({1})), graph.Loop(3, frozenset({3}))]


def test_sections_are_told_apart() -> None:
    text = _code("EXIT", name="a") + "\n" + _code("NOP", "NOP", "EXIT", name="b")
    assert len(sass.Program(text).instructions) == 1
    assert len(sass.Program(text, "b").instructions) == 3
    with pytest.raises(ValueError, match="no machine code of c"):
        sass.Program(text, "c")


@pytest.mark.parametrize(
    ("text", "falls"),
    [("@P0 BRA `(.L_x_0)", True), ("BRA `(.L_x_0)", False), ("@!UP1 BRA `(.L_x_0)", True),
     ("BRA.U UP0, `(.L_x_0)", True), ("BRA.DIV UR5, `(.L_x_0)", True), ("EXIT", False),
     ("@P0 EXIT", True), ("RET.REL.NODEC R2 `(k)", False), ("CALL.REL.NOINC `(.L_x_0)", True)],
)  # fmt: skip
def test_where_control_goes_on(text: str, falls: bool) -> None:
    program = sass.Program(_code(".L_x_0:", "NOP", text, "EXIT"))
    assert (1 in program.blocks[0].successors if len(program.blocks) > 1 else falls) == falls


def test_cost_of_instructions() -> None:
    def use(text: str, capability: int = 90) -> pipes.Use:
        (instruction,) = sass.Program(_code(text)).instructions
        return pipes.use(instruction, capability)

    assert use("LOP3.LUT R0, R1, R2, RZ, 0xc0, !PT") == pipes.Use(1, alu=2)
    assert use("FFMA R0, R1, R2, R3") == pipes.Use(1, fma=1)
    assert use("FFMA R0, R1, R2, R3", 80) == pipes.Use(1, fma=2)
    assert use("IMAD.MOV.U32 R0, RZ, RZ, R1") == pipes.Use(1, fma=2)
    assert use("MUFU.EX2 R0, R1") == pipes.Use(1, special=8)
    assert use("LDS.128 R4, [R0]") == pipes.Use(1, memory=4)
    assert use("LDS R4, [R0]") == use("SHFL.BFLY PT, R1, R2, 0x1, 0x1f") == pipes.Use(1, memory=1)
    assert use("UIADD3 UR4, UR5, 0x1, URZ") == use("BAR.SYNC.DEFER_BLOCKING 0x0") == pipes.Use(1)
    with pytest.raises(KeyError):
        use("SURPRISE R0, R1")


def test_occupancy() -> None:
    """As the occupancy calculator of the CUDA toolkit has it."""
    assert occupancy(H200, 126, 256, 100 << 10) == 2  # registers and shared memory
    assert occupancy(H200, 166, 384, 1024) == 1
    assert occupancy(H200, 32, 256, 0) == 8  # threads
    assert occupancy(H200, 16, 32, 0) == 32  # blocks
    assert occupancy(CARDS["L4"], 32, 256, 0) == 6


def test_instructions_beside_a_copy() -> None:
    assert round(H200.slots_per_vector(2)) == 249
    assert round(H200.slots_per_vector(3)) == 373


# ---- how often blocks run ----


def test_flow_is_conserved() -> None:
    """A block without evidence, and one whose evidence is of a path that is not taken."""
    # 0 -> 1 (loop of 10 rounds, 2 or 3 in each, then 4) -> 5
    successors = [[1], [2, 3], [4], [4], [1, 5], []]
    evidence: list[dict[int, int]] = [{1: 3}, {10: 2}, {7: 5}, {}, {0: 4, 10: 1}, {1: 1}]
    assert graph.frequencies(successors, evidence) == pytest.approx([1, 10, 7, 3, 10, 1])
    assert graph.frequencies([[]], [{}]) == [0.0]


def test_loops_of_a_graph() -> None:
    loops = graph.natural_loops([[1], [2], [2, 3], [1, 4], []])
    assert loops == [graph.Loop(1, frozenset({1, 2, 3})), graph.Loop(2, frozenset({2}))]


# ---- the model of events ----

_OF = Multiprocessor(clock=1e9, bandwidth=1e9, l2_bandwidth=1e9)
_QUICK = Assumed(warp_rate=100.0)


def _seconds(phases: list[Phase], **how: Any) -> float:
    given = {"images": 1, "blocks": 1, "warps": 8, "stages": 0, "in_step": True} | how
    return events.seconds(phases, of=_OF, assumed=_QUICK, **given)


def test_phases_follow_each_other() -> None:
    phases = [Phase("sum", cycles=1000, bytes=3000), Phase("exchange", latency=1e-6),
              Phase("write", cycles=2000, bytes=500)]  # fmt: skip
    assert _seconds(phases) == pytest.approx(6e-6)
    assert _seconds(phases, images=5) == pytest.approx(30e-6)
    assert _seconds(phases, images=50) == pytest.approx(300e-6)


def test_blocks_share_and_overlap() -> None:
    """Two that want the same take twice as long; two that want different things do not."""
    same = [Phase("sum", bytes=100_000)]
    assert _seconds(same, blocks=2) == pytest.approx(200e-6, rel=0.02)
    mixed = [Phase("sum", bytes=100_000), Phase("write", cycles=100_000)]
    assert _seconds(mixed, images=40, blocks=2) == pytest.approx(40 * 400e-6, rel=0.02)
    apart = _seconds(mixed, images=40, blocks=2, in_step=False)
    assert apart == pytest.approx(40 * 200e-6, rel=0.03)


def test_stages_hide_the_load() -> None:
    phases = [Phase("load", bytes=100_000), Phase("sum", cycles=100_000)]
    assert _seconds(phases, images=20, stages=1) == pytest.approx(20 * 200e-6)
    assert _seconds(phases, images=20, stages=2) == pytest.approx(21 * 100e-6)


def test_few_bytes_in_flight_are_slow() -> None:
    """As many bytes as are asked for at a time, per latency."""
    phases = [Phase("sum", bytes=100_000, in_flight=350)]
    assert _seconds(phases) == pytest.approx(100_000 / (350 / 700e-9))
    assert _seconds([Phase("sum", l2_bytes=100_000, l2_in_flight=135)]) == pytest.approx(200e-6)


# ---- from PTX to the price ----

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

    path, machine = running._machine()
    library = compiling.linked(_PTX, "rounds", path, counts=True)
    entry = compiling.entries_of(library, _PTX)["rounds"]
    data = np.full(threads, rounds, np.uint32)
    word = ctypes.c_uint64(data.ctypes.data)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(word))
    assert not machine.ptx_run(
        ctypes.byref(entry), 1, threads, 1, 0, 0, pointers, ctypes.c_uint64(0), None, 0
    )
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
    path, machine = running._machine()
    library = compiling.linked(text, "strides", path, counts=True)
    entry = compiling.entries_of(library, text)["strides"]
    data = np.zeros(32 * 8 + 32, np.uint64)
    word = ctypes.c_uint64(-(-data.ctypes.data // 32) * 32)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(word))
    library.ptx_watch(1)
    assert not machine.ptx_run(
        ctypes.byref(entry), 1, 32, 1, 4096, 0, pointers, ctypes.c_uint64(0), None, 0
    )
    library.ptx_watch(0)
    rows = (_Touched * 8)()
    assert library.ptx_take_accesses(rows, ctypes.c_uint64(8)) == 3  # one of the parameter
    found = {text.split("\n")[row.line - 1].split()[0]: row for row in rows[:3]}
    of = Touched(*(getattr(found["st.shared.u32"], name) for name in Touched._fields))
    assert (of.shared, of.requests, of.bytes) == (1, 1, 128)
    assert (of.wavefronts, of.least) == (conflicts, 1)
    of = Touched(*(getattr(found["st.global.v2.u32"], name) for name in Touched._fields))
    assert (of.shared, of.requests, of.bytes, of.sectors) == (0, 1, 256, sectors)


def _layer(shape: str) -> Any:
    from tools.cost.record import layers

    return next(layer for layer in layers(["seresnet50"]) if layer.shape == shape)


_LOOPS = [
    (direction, kernel, loop, layout)
    for direction, kernel in (("forward", "forward_kernel"), ("backward", "backward_kernel"))
    for loop in ("sum", "write", "mlp")
    for layout in ("NCHW", "NHWC")
]


@needs_compilers
@pytest.mark.parametrize(("direction", "kernel", "loop", "layout"), _LOOPS)
def test_loops_are_as_long_as_in_ptx(direction: str, kernel: str, loop: str, layout: str) -> None:
    """Instructions in an iteration: executed PTX and machine code agree within a quarter."""
    from tools.cost import cuda

    found = [
        x
        for d, k, profile in cuda.profiles_of(_layer("512x28x28"), layout == "NHWC", H200)
        if (d, k) == (direction, kernel)
        for x in profile.loops()
        if x.name == loop
    ]
    assert found
    assert found[0].instructions == pytest.approx(found[0].ptx, rel=0.25)


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


_GATE = ("512x28x28-r32-relu-sigmoid", "1024x14x14-r64-relu-sigmoid", "2048x7x7-r128-relu-sigmoid")


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


def _line(**changes: Any) -> dict[str, Any]:
    kernel = {"kernel": "k", "registers": 100, "blocks_per_multiprocessor": 2, "spilled_bytes": 0,
              "narrow_accesses": 0.1, "loads_before_use": {"sum": [4, 4]}}  # fmt: skip
    for name in list(changes):
        if name in kernel:
            kernel[name] = changes.pop(name)
    line = {"backend": "native", "card": "H200", "layer": "a", "layout": "NCHW",
            "direction": "forward", "per_vector": {"sum": [20.0, 0, 0, 0, 0]}}  # fmt: skip
    return line | {"kernels": [kernel]} | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"per_vector": {"sum": [20.5]}, "registers": 120}, None),
        ({"per_vector": {"sum": [20.7]}}, "sum: 20.70 instructions per vector, at most 20.60"),
        ({"per_vector": {"sum": [20.0], "mlp": [0.9]}}, None),
        ({"per_vector": {"mlp": [1.1]}}, "mlp: 1.10 instructions per vector, at most 1.03"),
        ({"spilled_bytes": 8}, "k: 8 bytes spilled"),
        ({"blocks_per_multiprocessor": 1}, "k: 1 blocks per multiprocessor"),
        ({"narrow_accesses": 0.12}, "k: 12.0% of the accesses are of less than 16 bytes"),
        ({"loads_before_use": {"sum": [1, 4]}}, "k, sum: 1 loads before the first use, at least 4"),
        ({"loads_before_use": {}}, "k, sum: 0 loads before the first use"),
    ],
)  # fmt: skip
def test_what_is_over_budget(changes: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    budgets.renew(path, [_line()])
    (budget,) = budgets.read(path)
    found = budgets.exceeded(budget, _line(**changes))
    assert (found == []) if said is None else found[0].startswith(said)


# ---- the page ----


def test_page_is_what_the_record_says() -> None:
    path = ROOT / "docs" / "performance.md"
    text = path.read_text(encoding="utf-8")
    assert page.renewed(text, path.parent) == text, "run python -m tools.cost.page"


def test_record_has_every_layer() -> None:
    """Of the CUDA kernels on the card that docs speak of."""
    from tools.cost.record import layers

    record = json.loads((ROOT / "benchmarks/results/computed-cost.json").read_text())
    found = {(line["layer"], line["layout"], line["direction"]) for line in record["rows"]
             if (line["backend"], line["card"]) == ("native", "H200")}  # fmt: skip
    wanted = itertools.product((x.name for x in layers()), ("NCHW", "NHWC"),
                               ("forward", "backward"))  # fmt: skip
    assert set(wanted) == found
    assert record["what"] == "computed from machine code, not measured"
