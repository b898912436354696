"""Kernels in PTX about memory, warps, blocks and clusters, for ``test_ptx_threads.py``."""

from __future__ import annotations

import itertools
from collections.abc import Callable

_TID = "mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x;\n"
_TID += "mad.lo.s32 %r0, %r2, %r3, %r1;\n"


def _entry(name: str, parameters: int, body: str, before: str = "") -> str:
    """%r0 is the thread in the grid, %r1 in its block; %rd0 and on the parameters."""
    given = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(parameters))
    return f"""{before}
.visible .entry {name}({given})
{{
.reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<50>; .reg .b64 %rd<30>; .reg .f32 %f<9>;
{loads}
{_TID}
{body}
ret;
}}
"""


SPECIAL = ("tid.x", "tid.y", "tid.z", "ntid.x", "ntid.y", "ctaid.x", "nctaid.x", "laneid",
            "warpid", "cluster_ctarank", "cluster_nctarank", "cluster_ctaid.x",
            "cluster_nctaid.x", "clusterid.x", "nclusterid.x")  # fmt: skip

# For each type the atomic operations, as functions on Python's integers.
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b, "exch": lambda a, b: b, "min": min, "max": max,
    "inc": lambda a, b: 0 if a >= b else a + 1,
    "dec": lambda a, b: b if a == 0 or a > b else a - 1,
}  # fmt: skip
_BITS: dict[str, Callable[[int, int], int]] = {
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
}  # fmt: skip
ATOMICS = [
    *(("u32", name, f) for name, f in _ARITHMETIC.items()),
    *(("b32", name, f) for name, f in _BITS.items()),
    *(("s32", name, _ARITHMETIC[name]) for name in ("min", "max", "add")),
    ("u64", "add", _ARITHMETIC["add"]), ("u64", "max", max), ("b64", "xor", _BITS["xor"]),
]  # fmt: skip


def _atomics() -> str:
    texts = []
    for kind, name, _ in ATOMICS:
        r, size = ("%rd", 8) if kind[1:] == "64" else ("%r", 4)
        at = "\n".join(f"mad.wide.u32 %rd1{i}, %r0, {size}, %rd{i};" for i in range(3))
        load = f"{at}\nld.global.{kind} {r}25, [%rd11];\n"
        texts.append(_entry(f"atom_{name}_{kind}", 3, f"""{load}
            atom.acq_rel.gpu.global.{name}.{kind} {r}26, [%rd10], {r}25;
            st.global.{kind} [%rd12], {r}26;"""))  # fmt: skip
        if name != "exch":
            texts.append(_entry(f"red_{name}_{kind}", 3, f"""{load}
                red.relaxed.gpu.global.{name}.{kind} [%rd10], {r}25;"""))  # fmt: skip
    return "".join(texts)


MMA = {"f16": ("m16n8k16", 4), "bf16": ("m16n8k16", 4), "f16_8": ("m16n8k8", 2),
        "tf32": ("m16n8k8", 4), "tf32_4": ("m16n8k4", 2)}  # fmt: skip


def _mma() -> str:
    texts = []
    for name, (shape, count) in MMA.items():
        kind = name.partition("_")[0]
        a = ", ".join(f"%r{10 + i}" for i in range(count))
        b = ", ".join(f"%r{20 + i}" for i in range(count // 2))
        loads = "\n".join(
            f"ld.global.u32 %r{at + i}, [%rd{base}+{4 * i}];"
            for at, base, n in ((10, 10, count), (20, 11, count // 2)) for i in range(n)
        )  # fmt: skip
        texts.append(_entry(f"mma_{name}", 3, f"""
            mad.wide.u32 %rd10, %r0, {4 * count}, %rd0;
            mad.wide.u32 %rd11, %r0, {2 * count}, %rd1;
            mad.wide.u32 %rd12, %r0, 16, %rd2;
            {loads}
            ld.global.v4.f32 {{%f0, %f1, %f2, %f3}}, [%rd12];
            mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32
                {{%f4, %f5, %f6, %f7}}, {{{a}}}, {{{b}}}, {{%f0, %f1, %f2, %f3}};
            st.global.v4.f32 [%rd12], {{%f4, %f5, %f6, %f7}};"""))  # fmt: skip
    return "".join(texts)


def _ldmatrix() -> str:
    texts = []
    for count, trans in itertools.product((1, 2, 4), ("", ".trans")):
        to = ", ".join(f"%r{10 + i}" for i in range(count))
        stores = "\n".join(f"st.global.u32 [%rd11+{4 * i}], %r{10 + i};" for i in range(count))
        # Rows lie 48 bytes apart.
        texts.append(_entry(f"ldmatrix_{count}{trans.replace('.', '_')}", 2, f"""
            mad.wide.u32 %rd10, %r0, 16, %rd0;
            ld.global.v4.u32 {{%r5, %r6, %r7, %r8}}, [%rd10];
            mul.lo.s32 %r4, %r1, 48;
            st.shared.v4.u32 [%r4], {{%r5, %r6, %r7, %r8}};
            bar.warp.sync 0xffffffff;
            ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{to}}}, [%r4];
            mad.wide.u32 %rd11, %r0, {4 * count}, %rd1;
            {stores}"""))  # fmt: skip
    return "".join(texts)


def _stmatrix() -> str:
    texts = []
    for count, trans in itertools.product((1, 2, 4), ("", ".trans")):
        of = ", ".join(f"%r{10 + i}" for i in range(count))
        loads = "\n".join(f"ld.global.u32 %r{10 + i}, [%rd11+{4 * i}];" for i in range(count))
        texts.append(_entry(f"stmatrix_{count}{trans.replace('.', '_')}", 2, f"""
            mad.wide.u32 %rd11, %r0, {4 * count}, %rd0;
            {loads}
            mul.lo.s32 %r4, %r1, 48;
            stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r4], {{{of}}};
            bar.warp.sync 0xffffffff;
            ld.shared.v4.u32 {{%r5, %r6, %r7, %r8}}, [%r4];
            mad.wide.u32 %rd10, %r0, 16, %rd1;
            st.global.v4.u32 [%rd10], {{%r5, %r6, %r7, %r8}};"""))  # fmt: skip
    return "".join(texts)


_MBARRIER = """
setp.ne.u32 %p1, %r1, 0;
@%p1 bra $ready_{name};
mbarrier.init.shared::cta.b64 [{at}], {count};
fence.mbarrier_init.release.cluster;
$ready_{name}:
{fence}
bar.sync 0;
"""


def _wait(name: str, at: str, phase: str = "0") -> str:
    return f"""$again_{name}:
        mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p2, [{at}], {phase};
        @!%p2 bra $again_{name};"""


def _mbarrier(name: str, at: str, count: str, fence: str = "") -> str:
    return _MBARRIER.format(name=name, at=at, count=count, fence=fence)


_TEXTS = (
    _entry("special", 1, f"mad.wide.u32 %rd1, %r0, {4 * len(SPECIAL)}, %rd0;" + "".join(
        f"mov.u32 %r10, %{name}; st.global.u32 [%rd1+{4 * i}], %r10;\n"
        for i, name in enumerate(SPECIAL)
    )),
    # Loads and stores of every state and width; pieces are put together in another order.
    _entry("states", 2, """
        .local .align 16 .b8 depot[32];
        .shared .align 8 .b8 fixed[512];
        createpolicy.fractional.L2::evict_first.b64 %rd20, 0f3F800000;
        mad.wide.u32 %rd10, %r0, 32, %rd0;
        mad.wide.u32 %rd11, %r0, 32, %rd1;
        cvta.to.global.u64 %rd12, %rd10;
        ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%r10, %r11, %r12, %r13},
            [%rd12], %rd20;
        ld.global.cg.v2.u64 {%rd13, %rd14}, [%rd12+16];
        mov.u64 %rd15, depot;
        cvta.local.u64 %rd16, %rd15;
        st.local.v2.u32 [depot+8], {%r10, %r11};
        ld.v2.u32 {%r14, %r15}, [%rd16+8];
        mov.u32 %r20, fixed;
        mad.lo.s32 %r21, %r1, 8, %r20;
        st.shared.v2.u32 [%r21], {%r12, %r13};
        mov.u32 %r22, dynamic;
        mad.lo.s32 %r22, %r1, 8, %r22;
        st.shared::cta.u64 [%r22], %rd14;
        cvt.u64.u32 %rd17, %r22;
        cvta.shared.u64 %rd18, %rd17;
        cvta.to.shared.u64 %rd19, %rd18;
        ld.shared.u64 %rd21, [%rd19];
        ld.u64 %rd22, [%rd18];
        xor.b64 %rd21, %rd21, %rd22;
        add.u64 %rd21, %rd21, %rd22;
        ld.shared.v2.u32 {%r16, %r17}, [%r21];
        st.global.cs.L2::cache_hint.v4.u32 [%rd11], {%r17, %r16, %r15, %r14}, %rd20;
        st.global.wt.u64 [%rd11+16], %rd21;
        ld.const.u16 %rs1, [table+2];
        ld.global.s8 %r18, [counted+1];
        cvt.u32.u16 %r19, %rs1;
        add.u32 %r18, %r18, %r19;
        st.global.u32 [%rd11+24], %r18;
        mov.b64 {%r30, %r31}, %rd13;
        mov.b32 {%rs2, %rs3}, %r30;
        mov.b32 %r32, {%rs3, %rs2};
        st.global.b32 [%rd11+28], %r32;
        """,
        ".extern .shared .align 128 .b8 dynamic[];\n"
        ".const .align 4 .u16 table[3] = {5, 0x1234, 7};\n"
        ".global .align 4 .b8 counted[4] = {1, 254, 3};"),
    _entry("misaligned", 1, "ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd0];"),
    _entry("beyond", 1, "mul.lo.s32 %r5, %r1, 128; st.shared.u32 [%r5+4], %r1;"),
    _entry("not_shared", 1, "cvta.to.shared.u64 %rd1, %rd0;"),
    _entry("traps", 1, "setp.eq.u32 %p1, %r1, 3; @%p1 trap; nanosleep.u32 20; exit;"),
    # A loop, a call, and a branch by a predicate.
    _entry("calls", 1, """
        mad.wide.u32 %rd1, %r0, 4, %rd0;
        mov.u32 %r10, 0; mov.u32 %r11, 0;
        $loop:
        { // callseq
        .param .b32 in; st.param.b32 [in+0], %r10;
        .param .align 8 .b8 both[16]; st.param.b64 [both+0], %rd1; st.param.b32 [both+8], %r0;
        .param .b32 back;
        call.uni (back), plus_square, (in, both);
        ld.param.b32 %r12, [back+0];
        }
        add.s32 %r11, %r11, %r12;
        add.s32 %r10, %r10, 1;
        setp.lt.s32 %p1, %r10, 5;
        @%p1 bra $loop;
        prefetch.global.L2 [%rd1];
        griddepcontrol.wait;
        st.global.u32 [%rd1], %r11;
        griddepcontrol.launch_dependents;""",
        ".func (.param .b32 r) plus_square(.param .b32 a, .param .align 8 .b8 b[16]);\n"
        """.func (.param .b32 r) plus_square(.param .b32 a, .param .align 8 .b8 b[16])
        { .reg .b32 %r<4>; .pragma "nounroll"; ld.param.u32 %r1, [a]; ld.param.u32 %r2, [b+8];
        mad.lo.s32 %r3, %r1, %r1, %r2; st.param.b32 [r+0], %r3; ret; }"""),
    _atomics(),
    _entry("cas", 3, """
        mad.wide.u32 %rd10, %r0, 4, %rd0; mad.wide.u32 %rd11, %r0, 4, %rd1;
        mad.wide.u32 %rd12, %r0, 4, %rd2; ld.global.u32 %r5, [%rd11];
        atom.global.cas.b32 %r6, [%rd10], %r5, 77; st.global.u32 [%rd12], %r6;"""),
    _entry("count", 2, """
        atom.add.release.gpu.u32 %r5, [%rd0], 1; red.global.add.f32 [%rd1], 0f3F000000;"""),
    # Block 0 publishes; the others poll, and copy what they find.
    *(_entry(f"flag_{load[:4]}", 3, f"""
        setp.ne.u32 %p1, %r2, 0; @%p1 bra $others;
        mad.wide.u32 %rd10, %r1, 4, %rd0; add.u32 %r5, %r1, 100; st.global.u32 [%rd10], %r5;
        bar.sync 0; setp.ne.u32 %p1, %r1, 0; @%p1 bra $done;
        fence.acq_rel.gpu; membar.gl;
        st.{store}.global.u32 [%rd1], 1; bra $done;
        $others: setp.ne.u32 %p1, %r1, 0; @%p1 bra $ready;
        $again: ld.{load}.global.u32 %r6, [%rd1]; setp.eq.u32 %p2, %r6, 0; @%p2 bra $again;
        $ready: bar.sync 0;
        mad.wide.u32 %rd10, %r1, 4, %rd0; ld.global.u32 %r7, [%rd10];
        mad.wide.u32 %rd11, %r0, 4, %rd2; st.global.u32 [%rd11], %r7;
        $done:""") for store, load in (("release.gpu", "acquire.gpu"), ("relaxed.gpu", "volatile"),
                                       ("volatile", "relaxed.gpu"))),
    _entry("flag_nobody", 1, """
        $again: ld.global.gpu.acquire.b32 %r6, [ %rd0 + 0 ]; setp.eq.u32 %p2, %r6, 0;
        @%p2 bra $again;"""),
    *(_entry(f"reversed_{name}", 2, f"""
        mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.u32 %r5, [%rd10]; mul.lo.s32 %r6, %r1, 4;
        st.shared.u32 [%r6], %r5; {barrier}
        sub.s32 %r7, %r3, %r1; mad.lo.s32 %r7, %r7, 4, -4; ld.shared.u32 %r8, [%r7];
        mad.wide.u32 %rd11, %r0, 4, %rd1; st.global.u32 [%rd11], %r8;""")
      for name, barrier in (("bar", "bar.sync 0;"), ("barrier", "barrier.sync.aligned 0;"),
                            ("nothing", ""))),
    _entry("divergent", 1, "setp.lt.u32 %p1, %r1, 5; @%p1 bra $a; bar.sync 0; $a: ret;"),
    *(_entry(f"cp_async_{name}", 2, f"""
        mad.wide.u32 %rd10, %r0, {size}, %rd0; mul.lo.s32 %r6, %r1, {size};
        cp.async.{how}.shared.global [%r6], [%rd10], {size}; {wait} bar.sync 0;
        sub.s32 %r7, %r3, %r1; mad.lo.s32 %r7, %r7, {size}, -{size}; ld.shared.u32 %r8, [%r7];
        mad.wide.u32 %rd11, %r0, 4, %rd1; st.global.u32 [%rd11], %r8;""")
      for name, how, size, wait in (
          ("group", "cg", 16, "cp.async.commit_group; cp.async.wait_group 0;"),
          ("all", "ca", 4, "cp.async.wait_all;"), ("late", "ca", 4, "cp.async.commit_group;"))),
    *(_entry(f"bulk_{name}", 2, f"""
        {_mbarrier("bulk", "dynamic2", "1", fence)}
        @%p1 bra $wait;
        mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [dynamic2], 256;
        mov.u32 %r5, dynamic2; add.s32 %r6, %r5, 128;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r6], [%rd0], 256, [%r5];
        $wait: {_wait("bulk", "dynamic2")}
        mov.u32 %r7, dynamic2; mad.lo.s32 %r7, %r1, 4, %r7; ld.shared.u32 %r8, [%r7+128];
        mad.wide.u32 %rd11, %r0, 4, %rd1; st.global.u32 [%rd11], %r8;""",
        ".extern .shared .align 128 .b8 dynamic2[];" if name == "fenced" else "")
      for name, fence in (("fenced", "fence.proxy.async.shared::cta;"), ("unfenced", ""))),
    # Tokens instead of parities; every thread arrives, some for a neighbour.
    _entry("arrive", 2, f"""
        {_mbarrier("arrive", "0", "64")}
        mad.lo.s32 %r6, %r1, 4, 64; st.shared.u32 [%r6], %r0;
        and.b32 %r7, %r1, 1; setp.eq.u32 %p3, %r7, 1;
        @%p3 mbarrier.arrive.shared::cta.b64 %rd10, [0];
        @!%p3 mbarrier.arrive.release.cta.shared::cta.b64 %rd10, [0];
        $test: mbarrier.test_wait.shared::cta.b64 %p2, [0], %rd10; @!%p2 bra $test;
        $try: mbarrier.try_wait.shared::cta.b64 %p2, [0], %rd10; @!%p2 bra $try;
        xor.b32 %r8, %r1, 31; mad.lo.s32 %r8, %r8, 4, 64; ld.shared.u32 %r9, [%r8];
        mad.wide.u32 %rd11, %r0, 4, %rd1; st.global.u32 [%rd11], %r9;"""),
    # Each block writes into its neighbour's shared memory and reads from it.
    _entry("cluster", 2, """
        mul.lo.s32 %r5, %r1, 4; st.shared.u32 [%r5], %r0;
        mov.u32 %r6, %cluster_ctarank; mov.u32 %r7, %cluster_nctarank; add.s32 %r6, %r6, 1;
        rem.u32 %r6, %r6, %r7;
        barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
        cvt.u64.u32 %rd10, %r5; cvta.shared.u64 %rd11, %rd10;
        mapa.u64 %rd12, %rd11, %r6; ld.u32 %r8, [%rd12];
        mapa.shared::cluster.u32 %r9, %r5, %r6; ld.shared::cluster.u32 %r10, [%r9];
        add.s32 %r11, %r10, 1000; st.shared::cluster.u32 [%r9+256], %r11;
        barrier.cluster.arrive; barrier.cluster.wait;
        ld.shared.u32 %r12, [%r5+256];
        mad.wide.u32 %rd13, %r0, 8, %rd1; st.global.v2.u32 [%rd13], {%r8, %r12};"""),
    *(_entry(f"st_async_{n}", 2, f"""
        {_mbarrier(f"st{n}", "0", "1")}
        setp.eq.u32 %p1, %r1, 0;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [0], {128 * n};
        barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
        mov.u32 %r6, %cluster_ctarank; xor.b32 %r6, %r6, 1;
        mad.lo.s32 %r5, %r1, {4 * n}, 64; mapa.shared::cluster.u32 %r7, %r5, %r6;
        mov.u32 %r8, 0; mapa.shared::cluster.u32 %r8, %r8, %r6;
        add.s32 %r9, %r0, 1000;
        st.async.shared::cluster.mbarrier::complete_tx::bytes{suffix}.b32 [%r7],
            {"%r0" if n == 1 else "{%r0, %r9}"}, [%r8];
        {_wait(f"st{n}", "0")}
        ld.shared.u32 %r10, [%r5+{4 * n - 4}];
        mad.wide.u32 %rd13, %r0, 4, %rd1; st.global.u32 [%rd13], %r10;
        barrier.cluster.arrive; barrier.cluster.wait;""")
      for n, suffix in ((1, ""), (2, ".v2"))),
    *(_entry(f"shfl_{how}", 5, f"""
        mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.u32 %r5, [%rd10];
        mad.wide.u32 %rd10, %r0, 4, %rd1; ld.global.u32 %r6, [%rd10];
        mad.wide.u32 %rd10, %r0, 4, %rd2; ld.global.u32 %r7, [%rd10];
        shfl.sync.{how}.b32 %r8|%p1, %r5, %r6, %r7, -1; selp.u32 %r9, 1, 0, %p1;
        shfl.sync.{how}.b32 %r10, %r5, %r6, %r7, 0xffffffff; xor.b32 %r10, %r10, %r8;
        add.s32 %r8, %r8, %r10;
        mad.wide.u32 %rd10, %r0, 4, %rd3; st.global.u32 [%rd10], %r8;
        mad.wide.u32 %rd10, %r0, 4, %rd4; st.global.u32 [%rd10], %r9;""")
      for how in ("idx", "up", "down", "bfly")),
    _entry("votes", 2, """
        mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.u32 %r5, [%rd10];
        setp.ne.u32 %p1, %r5, 0; mov.u32 %r6, 0x0000ffff;
        setp.lt.u32 %p2, %r1, 16; @%p2 bra $low; not.b32 %r6, %r6;
        $low: vote.sync.ballot.b32 %r7, %p1, %r6; vote.sync.any.pred %p3, %p1, %r6;
        vote.sync.all.pred %p4, !%p1, %r6; selp.u32 %r8, 1, 0, %p3; selp.u32 %r9, 1, 0, %p4;
        mad.wide.u32 %rd10, %r0, 16, %rd1;
        st.global.v4.u32 [%rd10], {%r7, %r8, %r9, %r6};"""),
    # Odd lanes and even ones apart, and all together.
    _entry("reductions", 2, """
        mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.u32 %r5, [%rd10]; cvt.u64.u32 %rd12, %r5;
        and.b32 %r6, %r1, 1; setp.eq.u32 %p1, %r6, 0; selp.b32 %r7, 0x55555555, 0xaaaaaaaa, %p1;
        redux.sync.add.u32 %r10, %r5, %r7; redux.sync.min.s32 %r11, %r5, %r7;
        redux.sync.max.u32 %r12, %r5, %r7;
        redux.sync.and.b32 %r14, %r5, %r7; redux.sync.or.b32 %r15, %r5, %r7;
        redux.sync.xor.b32 %r16, %r5, %r7; match.any.sync.b32 %r17, %r5, %r7;
        match.all.sync.b32 %r19|%p2, %r5, %r7;
        selp.u32 %r20, 1, 0, %p2; match.all.sync.b32 %r21, %r6, %r7;
        elect.sync %r22|%p3, %r7; selp.u32 %r23, 1, 0, %p3; bar.sync 0;
        redux.sync.max.s32 %r13, %r5, -1; match.any.sync.b64 %r18, %rd12, -1;
        elect.sync _|%p4, -1; selp.u32 %r24, 1, 0, %p4; mov.u32 %r25, 0;
        mad.wide.u32 %rd11, %r0, 64, %rd1;
        st.global.v4.u32 [%rd11], {%r10, %r11, %r12, %r13};
        st.global.v4.u32 [%rd11+16], {%r14, %r15, %r16, %r17};
        st.global.v4.u32 [%rd11+32], {%r18, %r19, %r20, %r21};
        st.global.v4.u32 [%rd11+48], {%r22, %r23, %r24, %r25};"""),
    # The first warp's threads copy as many bytes as they have numbers, of 16.
    _entry("cp_async_part", 2, """
        createpolicy.fractional.L2::evict_first.b64 %rd20, 1.0;
        mad.wide.u32 %rd10, %r0, 16, %rd0; mul.lo.s32 %r6, %r1, 16; and.b32 %r5, %r1, 31;
        min.u32 %r7, %r5, 16; setp.lt.u32 %p1, %r1, 32;
        @%p1 cp.async.cg.shared.global.L2::128B [%r6], [%rd10], 16, %r7;
        @!%p1 cp.async.cg.shared.global.L2::cache_hint [%r6], [%rd10], 16, %r7, %rd20;
        cp.async.cg.shared.global.L2::cache_hint [%r6+1024], [%rd10], 16, %rd20;
        cp.async.wait_all;
        ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r6]; ld.shared.u32 %r14, [%r6+1024];
        ld.global.u32 %r15, [%rd10]; setp.ne.u32 %p2, %r14, %r15; @%p2 trap;
        mad.wide.u32 %rd11, %r0, 16, %rd1; st.global.v4.u32 [%rd11], {%r10, %r11, %r12, %r13};"""),
    # Warps 0 and 1 write, 2 and 3 read what they wrote, and write for 0 and 1: two barriers of the
    # four warps, at which two of them do not wait.
    _entry("named", 2, """
        mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.u32 %r5, [%rd10]; mul.lo.s32 %r6, %r1, 4;
        mad.wide.u32 %rd11, %r0, 4, %rd1;
        setp.ge.u32 %p1, %r1, 64; @%p1 bra $readers;
        st.shared.u32 [%r6], %r5; bar.arrive 3, 128; barrier.sync 4, 128;
        ld.shared.u32 %r7, [%r6+256]; bra $end;
        $readers: bar.sync 3, 128; ld.shared.u32 %r7, [%r6+-256];
        st.shared.u32 [%r6], %r5; barrier.arrive 4, 128;
        $end: st.global.u32 [%rd11], %r7;"""),
    _entry("named_differently", 1, "add.u32 %r4, %r1, 32; and.b32 %r4, %r4, 96; bar.sync 1, %r4;"),
    # A lock, and a ticket after which everybody waits for the one before.
    _entry("tickets", 2, """
        setp.ne.u32 %p1, %r1, 0; @%p1 bra $end;
        atom.global.gpu.relaxed.add.u32 %r5, [ %rd0 + 0 ], 1;
        $wait: nanosleep.u32 100; atom.acquire.gpu.global.add.u32 %r6, [%rd0+4], 0;
        setp.ne.u32 %p2, %r6, %r5; @%p2 bra $wait;
        $lock: atom.acquire.gpu.global.cas.b32 %r7, [%rd0+8], 0, 1; setp.ne.u32 %p3, %r7, 0;
        @%p3 bra $lock;
        mad.wide.u32 %rd10, %r5, 4, %rd1; st.global.u32 [%rd10], %r2;
        atom.release.gpu.global.exch.b32 %r8, [%rd0+8], 0;
        red.release.gpu.global.add.u32 [%rd0+4], 1;
        $end:"""),
    _entry("ticket_of_nobody", 1, """
        $wait: atom.acquire.gpu.global.add.u32 %r6, [%rd0], 0; setp.eq.u32 %p2, %r6, 0;
        @%p2 bra $wait;"""),
    _ldmatrix(),
    _stmatrix(),
    _mma(),
    # Addresses that the driver gives for barriers of the grid.
    _entry("workspace", 1, """
        mov.u32 %r5, %envreg1; mov.u32 %r6, %envreg2; cvt.u64.u32 %rd1, %r5; cvt.u64.u32 %rd2, %r6;
        shl.b64 %rd1, %rd1, 32; or.b64 %rd1, %rd1, %rd2; setp.eq.u64 %p1, %rd1, 0; @%p1 trap;
        ld.u32 %r7, [%rd1]; st.global.u32 [%rd0], %r7;"""),
)  # fmt: skip


TEXT = "".join(_TEXTS)
