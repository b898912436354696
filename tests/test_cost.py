"""``tools.cost``: small machine code read and counted, the model of events, budgets, the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools.cost import budgets, events, graph, page, pipes, sass
from tools.cost.cards import CARDS, occupancy
from tools.cost.events import Assumed, Multiprocessor, Phase

ROOT = Path(__file__).parent.parent
H200 = CARDS["H200"]


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


@pytest.mark.parametrize("opcode", ["BRX R8", "BRXU UR4"])
def test_a_branch_goes_to_each_of_its_targets(opcode: str) -> None:
    branch = f'{opcode} -0x10 (*"BRANCH_TARGETS .L_x_0,.L_x_1,.L_x_0"*)'
    program = sass.Program(_code("NOP", ".L_x_0:", branch, ".L_x_1:", "EXIT"))
    assert [block.successors for block in program.blocks] == [[1], [1, 2], []]
    assert pipes.pipe_of(program.blocks[1].instructions[0]) == "OTHER"


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
    pytest.importorskip("scipy", reason="linear programs are solved by scipy")
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


def test_plans_are_read_from_their_words() -> None:
    from tools.cost.executed import plan_of

    words = (
        "cluster of 8 blocks per image, split in space, 384 threads and 209 KB each, 1 block per "
        "multiprocessor, single pass, next image prefetched"
    )
    plan = plan_of(words, H200, 256)
    assert (plan.blocks, plan.threads, plan.shared, plan.slots) == (8, 384, 209 << 10, 2)
    assert plan.groups == 16  # 132 blocks are room for 16 groups, which take 16 images each
    assert plan.policy == (
        "exchange=cluster,blocks=8,axis=space,resident=1,slots=2,weights=0,groups=1"
    )
    words = (
        "one block per image, 256 threads and 4 KB each, 8 blocks per multiprocessor, two passes"
    )
    plan = plan_of(words, H200, 256)
    assert (plan.blocks, plan.groups, plan.slots, plan.resident) == (1, 256, 0, False)
    assert plan.policy == "exchange=none,blocks=1,axis=channels,resident=0,weights=0,groups=1"
    with pytest.raises(ValueError, match="no launch plan: no plan: too large"):
        plan_of("no plan: too large", H200, 256)


# ---- budgets and the page ----


def _line(**changes: Any) -> dict[str, Any]:
    kernel = {"kernel": "k", "registers": 100, "blocks_per_multiprocessor": 2, "spilled_bytes": 0,
              "narrow_accesses": 0.1, "loads_before_use": {"sum": [4, 4]}}  # fmt: skip
    for name in list(changes):
        if name in kernel:
            kernel[name] = changes.pop(name)
    line = {
        "backend": "native", "card": "H200", "layer": "a", "layout": "NCHW",
        "direction": "forward", "compiler": "ptxas 1", "per_vector": {"sum": [20.0, 0, 0, 0, 0]},
    }  # fmt: skip
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


def test_a_table_of_a_small_record() -> None:
    from benchmarks.workloads import DEFAULT_NETWORKS
    from tools.cost.record import layers

    layer = layers(DEFAULT_NETWORKS)[0].name
    line = _line(
        layer=layer, instructions_per_vector=123.4, slots_per_vector=249.0, binds="L2",
        ceiling=0.5, expected=[0.25, 0.375],
        touched={"sum": {"read": 1.5, "shared_written": 8.0}, "write": {"written": 1.0}},
    )  # fmt: skip
    record = {"rows": [line], "cards": {"H200": H200._asdict()}, "dtype": "bfloat16",
              "batch": 256}  # fmt: skip
    backward = dict(line, direction="backward", slots_per_vector=373.0)
    record["rows"] = [line, backward]
    rows = page.table(record, "native", "H200").split("\n")
    assert rows[0].startswith("**Computed from machine code, not measured.** `native` on H200")
    cells = "123 | 100, 2 | 4 | L2 | 50% | 25-38%"
    assert rows[4] == f"| {layer} | NCHW | {cells} | {cells} |"
    assert rows[5] == ""  # nothing of the other layout
    assert f"| {layer} | NCHW | forward | sum 1.5 | write 1.0 | - | sum 8.0 |" in rows
    with pytest.raises(ValueError, match="nothing of triton on H200"):
        page.table(record, "triton", "H200")
    with pytest.raises(ValueError, match="expected a block"):
        page.renewed("text", ROOT)
