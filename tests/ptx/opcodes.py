"""The opcodes that are translated: what an instruction looks like, and the C++ it becomes.

A row has a pattern of mnemonics, the operands, and a C++ expression of them.

In a pattern ``[...]`` may be left out, ``(a|b)`` are alternatives, and ``<X:a|b>`` gives what is
there a name; ``<X:int>`` means any of a class in :data:`CLASSES`. Names stand in the expression as
``{X}``: types as their C++ names, a modifier left out as :data:`DEFAULTS` says.

An operand is ``name:type`` (of a type in the pattern, or a PTX type) with ``d`` for what is
written, ``[name]`` for an address, ``#name`` for a constant; those with ``?`` may be left out. The
expression's value is put into ``d``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

CLASSES = {
    "int": "s16|u16|s32|u32|s64|u64",
    "any_int": "s8|u8|s16|u16|s32|u32|s64|u64",
    "bits": "b16|b32|b64",
    "f": "f32|f64",
    "rnd": "rn|rz|rm|rp",
    "integral": "rni|rzi|rmi|rpi",
    "cmp": "eq|ne|lt|le|gt|ge|lo|ls|hi|hs",
    "fcmp": "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan",
    "mem": "b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64",
    "state": "global|shared::cta|shared::cluster|shared|local|param|const",
}
_TYPES = {"pred": "bool", "f32": "f32", "f64": "f64", "f16": "f16", "bf16": "bf16"}
_TYPES |= {f"{kind}{n}": f"{kind}{n}" for kind in "us" for n in (8, 16, 32, 64)}
_TYPES |= {f"b{n}": f"u{n}" for n in (8, 16, 32, 64)}
_TYPES |= {"f16x2": "u32", "bf16x2": "u32"}
#: C++ types by PTX type.
TYPES = _TYPES
_OPERATORS = {"and": "&", "or": "|", "xor": "^"}
_STATES = {name: "shared" if name.startswith("shared") else "generic"
           for name in CLASSES["state"].split("|")}  # fmt: skip
#: What stands in an expression for a modifier that is left out.
DEFAULTS = {"R": "rn", "Z": "keep", "S": "keep", "I": "keep"}
DEFAULTS |= {"at": "generic", "N": "1", "X": "false", "W": "false"}


# Of atomic and ordered accesses: modifiers in the order of the manual. ptxas takes any: Triton has
# the state first, inline assembly of cooperative_groups the operation.
_MODIFIERS = tuple(
    re.compile(text)
    for text in ("relaxed|acquire|release|acq_rel", "cta|cluster|gpu|sys", CLASSES["state"], ".*")
)


def in_order(mnemonic: str) -> str:
    """As the rows below have it."""
    name, *modifiers = mnemonic.split(".")
    ordered = any(_MODIFIERS[0].fullmatch(m) for m in modifiers)
    if name not in ("atom", "red") and not (name in ("ld", "st") and ordered):
        return mnemonic
    places = {m: next(i for i, of in enumerate(_MODIFIERS) if of.fullmatch(m)) for m in modifiers}
    return ".".join([name, *sorted(modifiers, key=lambda m: places[m])])


class Opcode(NamedTuple):
    """A row of the table."""

    pattern: str
    operands: str
    code: str

    def matches(self, mnemonic: str) -> dict[str, str] | None:
        """What is at the pattern's names, as C++."""
        found = _regex(self.pattern).fullmatch(mnemonic)
        return found and {
            name: DEFAULTS[name] if text is None else _as_cpp(name, text)
            for name, text in found.groupdict().items()
        }

    def types(self, mnemonic: str) -> dict[str, str]:
        """The PTX types at the pattern's names."""
        found = _regex(self.pattern).fullmatch(mnemonic)
        assert found
        return {name: text for name, text in found.groupdict().items() if text in TYPES}


def _as_cpp(name: str, text: str) -> str:
    if name == "at":
        return _STATES[text]
    if name in ("X", "W"):
        return "true"
    if name == "B":
        return _OPERATORS[text]
    if name == "N":
        return text.removeprefix("v")
    return TYPES.get(text) or text


def _regex(pattern: str, known: dict[str, re.Pattern[str]] = {}) -> re.Pattern[str]:  # noqa: B006
    if pattern not in known:
        text = pattern.replace(".", r"\.").replace("[", "(?:").replace("]", ")?")
        text = re.sub(r"(?<!\?)\((?!\?)", "(?:", text)
        text = re.sub(r"<(\w+):([^>]*)>", lambda m: f"(?P<{m[1]}>{CLASSES.get(m[2], m[2])})", text)
        known[pattern] = re.compile(text)
    return known[pattern]


_ATOM = "[.(relaxed|acquire|release|acq_rel)][.(cta|cluster|gpu|sys)][.<at:state>]"
_EVICT = "evict_normal|evict_unchanged|evict_first|evict_last|no_allocate"
_CACHE = f"[.(ca|cg|cs|lu|cv|nc|wb|wt)][.L1::({_EVICT})][.L2::cache_hint][.L2::(64|128|256)B]"
_WORD = "[.(cta|cluster|gpu|sys)][.<at:state>].<T:b32|b64|u32|u64|s32|s64>"
_POLICY = f"createpolicy.fractional.L2::({_EVICT})[.L2::({_EVICT})].b64"
_BULK = "cp.async.bulk.shared::(cluster|cta).global.mbarrier::complete_tx::bytes[.L2::cache_hint]"
_ST_ASYNC = "st.async[.weak].shared::cluster.mbarrier::complete_tx::bytes[.<N:v2|v4>]"
_ST_ASYNC += ".<T:b32|b64|u32|u64|s32|s64|f32|f64>"
_CTA = "[.(shared|shared::cta)]"
_ARRIVE = "mbarrier.arrive[.(release|relaxed)][.(cta|cluster)]"
_EXPECT = "mbarrier.arrive.expect_tx[.(release|relaxed)][.(cta|cluster)]"
_WAIT = "[.(acquire|relaxed)][.(cta|cluster)][.(shared|shared::cta)]"

OPCODES = tuple(
    Opcode(*row)
    for row in (
        # ---- integers ----
        ("<F:add|sub>.<T:int>", "d a:T b:T", "{F}({a}, {b})"),
        ("<F:add|sub>.sat.<T:s32>", "d a:T b:T", "{F}_sat({a}, {b})"),
        ("mul.<F:lo|hi>.<T:int>", "d a:T b:T", "product_{F}({a}, {b})"),
        ("mul.wide.<T:s16|u16|s32|u32>", "d a:T b:T", "product({a}, {b})"),
        ("mad.<F:lo|hi>.<T:int>", "d a:T b:T c:T", "add(product_{F}({a}, {b}), {c})"),
        ("mad.wide.<T:s16|u16|s32|u32>", "d a:T b:T c:wide", "add(product({a}, {b}), {c})"),
        ("div.<T:int>", "d a:T b:T", "quotient({a}, {b})"),
        ("rem.<T:int>", "d a:T b:T", "remainder({a}, {b})"),
        ("<F:min|max>.<T:int>", "d a:T b:T", "std::{F}({a}, {b})"),
        ("neg.<T:s16|s32|s64>", "d a:T", "negative({a})"),
        ("abs.<T:s16|s32|s64>", "d a:T", "absolute({a})"),
        ("<B:and|or|xor>.<T:b16|b32|b64|pred>", "d a:T b:T", "static_cast<{T}>({a} {B} {b})"),
        ("not.<T:bits>", "d a:T", "static_cast<{T}>(~{a})"),
        ("not.pred", "d a:pred", "!{a}"),
        ("shl.<T:bits>", "d a:T n:u32", "shl({a}, {n})"),
        ("shr.<T:b16|b32|b64|u16|u32|u64|s16|s32|s64>", "d a:T n:u32", "shr({a}, {n})"),
        ("shf.<F:l|r>.wrap.b32", "d a:u32 b:u32 n:u32", "funnel_{F}({a}, {b}, {n} & 31)"),
        ("shf.<F:l|r>.clamp.b32", "d a:u32 b:u32 n:u32",
         "funnel_{F}({a}, {b}, std::min(32u, {n}))"),
        ("popc.<T:b32|b64>", "d a:T", "static_cast<u32>(std::popcount({a}))"),
        ("clz.<T:b32|b64>", "d a:T", "static_cast<u32>(std::countl_zero({a}))"),
        ("brev.<T:b32|b64>", "d a:T", "reversed({a})"),
        ("bfi.<T:b32|b64>", "d a:T b:T p:u32 n:u32", "inserted({a}, {b}, {p}, {n})"),
        ("bfe.<T:s32|u32|s64|u64>", "d a:T p:u32 n:u32", "extracted({a}, {p}, {n})"),
        ("prmt.b32", "d a:u32 b:u32 c:u32", "permuted({a}, {b}, {c})"),
        ("lop3.b32", "d a:u32 b:u32 c:u32 #table", "looked_up({a}, {b}, {c}, {table})"),
        # ---- floating point ----
        ("<F:add|sub|mul>[.<R:rnd>][.<Z:ftz>][.<S:sat>].<T:f32>", "d a:T b:T",
         "{S}({Z}(f{F}<{R}>({Z}({a}), {Z}({b}))))"),
        ("fma.<R:rnd>[.<Z:ftz>][.<S:sat>].<T:f32>", "d a:T b:T c:T",
         "{S}({Z}(ffma<{R}>({Z}({a}), {Z}({b}), {Z}({c}))))"),
        ("<F:add|sub|mul>[.<R:rnd>].<T:f64>", "d a:T b:T", "f{F}<{R}>({a}, {b})"),
        ("fma.<R:rnd>.<T:f64>", "d a:T b:T c:T", "ffma<{R}>({a}, {b}, {c})"),
        ("div.<R:rnd>[.<Z:ftz>].<T:f>", "d a:T b:T", "{Z}(fdiv<{R}>({Z}({a}), {Z}({b})))"),
        ("<F:rcp|sqrt>.<R:rnd>[.<Z:ftz>].<T:f>", "d a:T", "{Z}(f{F}<{R}>({Z}({a})))"),
        ("<F:neg|abs>[.<Z:ftz>].<T:f>", "d a:T", "f{F}({Z}({a}))"),
        ("<F:min|max>[.<Z:ftz>].<T:f>", "d a:T b:T", "f{F}({Z}({a}), {Z}({b}))"),
        ("<F:min|max>[.<Z:ftz>].NaN.f32", "d a:f32 b:f32", "f{F}_nan({Z}({a}), {Z}({b}))"),
        ("copysign.<T:f>", "d a:T b:T", "std::copysign({b}, {a})"),
        ("<F:ex2|lg2|rcp|sqrt|rsqrt|sin|cos>.approx[.<Z:ftz>].f32", "d a:f32",
         "{Z}(approx_{F}({Z}({a})))"),
        ("tanh.approx.f32", "d a:f32", "approx_tanh({a})"),
        ("div.<F:approx|full>[.<Z:ftz>].f32", "d a:f32 b:f32",
         "{Z}({F}_div({Z}({a}), {Z}({b})))"),
        ("rcp.approx.ftz.f64", "d a:f64", "approx_rcp({a})"),
        # ---- 16-bit floating point, alone and in pairs ----
        ("<F:add|sub|mul>[.rn][.<Z:ftz>][.<S:sat>].<T:f16|bf16>", "d a:T b:T",
         "{S}({Z}(half_{F}({Z}({a}), {Z}({b}))))"),
        ("<F:add|sub|mul>[.rn][.<Z:ftz>][.<S:sat>].<T:f16|bf16>x2", "d a:u32 b:u32",
         ("in_pairs<{T}>([](auto x, auto y) {{ return {S}({Z}(half_{F}({Z}(x), {Z}(y)))); }}, "
          "{a}, {b})")),
        ("fma.rn[.<Z:ftz>][.<S:sat|relu>].<T:f16|bf16>", "d a:T b:T c:T",
         "{S}({Z}(half_fma({Z}({a}), {Z}({b}), {Z}({c}))))"),
        ("fma.rn[.<Z:ftz>][.<S:sat|relu>].<T:f16|bf16>x2", "d a:u32 b:u32 c:u32",
         ("in_pairs<{T}>([](auto x, auto y, auto z) {{ return {S}({Z}(half_fma({Z}(x), {Z}(y), "
          "{Z}(z)))); }}, {a}, {b}, {c})")),
        ("<F:neg|abs>[.<Z:ftz>].<T:f16|bf16>", "d a:T", "half_{F}({Z}({a}))"),
        ("<F:neg|abs>[.<Z:ftz>].<T:f16|bf16>x2", "d a:u32",
         "in_pairs<{T}>([](auto x) {{ return half_{F}({Z}(x)); }}, {a})"),
        ("<F:min|max>[.<Z:ftz>][.<W:NaN>].<T:f16|bf16>", "d a:T b:T",
         "half_{F}<{W}>({Z}({a}), {Z}({b}))"),
        ("<F:min|max>[.<Z:ftz>][.<W:NaN>].<T:f16|bf16>x2", "d a:u32 b:u32",
         "in_pairs<{T}>([](auto x, auto y) {{ return half_{F}<{W}>({Z}(x), {Z}(y)); }}, {a}, {b})"),
        # ---- comparing and choosing ----
        ("setp.<C:cmp>.<T:int>", "d a:T b:T", "both(compare<{C}>({a}, {b}))"),
        ("setp.<C:eq|ne>.<T:bits>", "d a:T b:T", "both(compare<{C}>({a}, {b}))"),
        ("setp.<C:fcmp>[.<Z:ftz>].<T:f>", "d a:T b:T",
         "both(compare<{C}>({Z}({a}), {Z}({b})))"),
        ("setp.<C:cmp>.<B:and|or|xor>.<T:int>", "d a:T b:T p:pred",
         "both(compare<{C}>({a}, {b}) {B} {p})"),
        ("setp.<C:fcmp>.<B:and|or|xor>[.<Z:ftz>].<T:f>", "d a:T b:T p:pred",
         "both(compare<{C}>({Z}({a}), {Z}({b})) {B} {p})"),
        ("setp.<C:fcmp>[.<Z:ftz>].<T:f16|bf16>", "d a:T b:T",
         "both(compare<{C}>(widened({Z}({a})), widened({Z}({b}))))"),
        ("setp.<C:fcmp>.<B:and|or|xor>[.<Z:ftz>].<T:f16|bf16>", "d a:T b:T p:pred",
         "both(compare<{C}>(widened({Z}({a})), widened({Z}({b}))) {B} {p})"),
        ("setp.<C:fcmp>[.<Z:ftz>].<T:f16|bf16>x2", "d a:u32 b:u32",
         ("of_pairs<{T}>([](auto x, auto y) {{ return compare<{C}>(widened({Z}(x)), "
          "widened({Z}(y))); }}, {a}, {b})")),
        ("selp.<T:b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64>", "d a:T b:T p:pred",
         "{p} ? {a} : {b}"),
        # ---- moving and converting ----
        ("mov.<T:b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64|pred>", "d a:T", "{a}"),
        ("cvt.<D:any_int>.<T:any_int>", "d a:T", "resized<{D}>({a})"),
        ("cvt.sat.<D:any_int>.<T:any_int>", "d a:T", "resized_sat<{D}>({a})"),
        ("cvt.<R:rnd>.<D:f32|f64>.<T:any_int>", "d a:T", "to_float<{D}, {R}>({a})"),
        ("cvt.<R:rn>.<D:f16|bf16>.<T:s8|u8|s16|u16>", "d a:T", "to_float<{D}, {R}>({a})"),
        ("cvt.<I:integral>[.<Z:ftz>].<D:any_int>.<T:f>", "d a:T",
         "to_integer<{D}>({I}({Z}({a})))"),
        ("cvt.<I:integral>.<D:any_int>.<T:f16|bf16>", "d a:T",
         "to_integer<{D}>({I}(widened({a})))"),
        ("cvt[.<I:integral>][.<Z:ftz>][.<S:sat>].f32.f32", "d a:f32",
         "{S}({Z}({I}({Z}({a}))))"),
        ("cvt[.<I:integral>].f64.f64", "d a:f64", "{I}({a})"),
        ("cvt.<R:rnd>[.<Z:ftz>][.<S:sat>].f32.f64", "d a:f64", "{S}({Z}(to_float<f32, {R}>({a})))"),
        ("cvt[.<Z:ftz>].f64.f32", "d a:f32", "static_cast<f64>({Z}({a}))"),
        ("cvt[.<Z:ftz>].f32.<T:f16|bf16>", "d a:T", "{Z}(widened({a}))"),
        ("cvt.<R:rn|rz>.<D:f16|bf16>.f32", "d a:f32", "to_float<{D}, {R}>({a})"),
        ("cvt.<R:rn|rz>.<D:f16|bf16>x2.f32", "d a:f32 b:f32",
         "pair_of_halves<{D}, {R}>({a}, {b})"),
        ("cvt.rna.tf32.f32", "d a:f32", "to_tf32({a})"),
        # ---- memory ----
        ("cvta[.<at:global|local|param|const>].u64", "d a:u64", "{a}"),
        ("cvta.to.(global|local|param|const).u64", "d a:u64", "{a}"),
        ("cvta.shared[::cta].u64", "d a:u64", "generic_of_shared({a})"),
        ("cvta.to.shared[::cta].u64", "d a:u64", "shared_of_generic({a})"),
        ("mapa.u64", "d a:u64 b:u32", "peers_generic({a}, {b})"),
        ("mapa.shared::cluster.u32", "d a:u32 b:u32", "peers_shared({a}, {b})"),
        (f"ld[.weak][.<at:state>]{_CACHE}[.<N:v2|v4>].<T:mem>", "d [a] hint:u64?",
         "load<{T}, {N}>(at_{at}({a}, {N} * sizeof({T})))"),
        (f"ld.(volatile|relaxed|acquire){_WORD}", "d [a]",
         "poll<{T}>(at_{at}({a}, sizeof({T})))"),
        (f"st[.weak][.<at:state>]{_CACHE}[.<N:v2|v4>].<T:mem>", "[a] b:array hint:u64?",
         "store<{T}, {N}>(at_{at}({a}, {N} * sizeof({T})), {b})"),
        (f"st.(volatile|relaxed|release){_WORD}", "[a] b:array",
         "publish<{T}, 1>(at_{at}({a}, sizeof({T})), {b})"),
        (f"atom{_ATOM}.<F:add|exch|min|max|and|or|xor|inc|dec>.<T:b32|b64|s32|u32|u64|f32|f64>",
         "d [a] b:T", "atomic_{F}<{T}>(at_{at}({a}, sizeof({T})), {b})"),
        (f"red{_ATOM}.<F:add|min|max|and|or|xor|inc|dec>.<T:b32|b64|s32|u32|u64|f32|f64>",
         "[a] b:T", "atomic_{F}<{T}>(at_{at}({a}, sizeof({T})), {b})"),
        (f"atom{_ATOM}.cas.<T:b32|b64>", "d [a] b:T c:T",
         "atomic_cas<{T}>(at_{at}({a}, sizeof({T})), {b}, {c})"),
        ("prefetch[.global].(L1|L2)", "[a]", "prefetch({a})"),
        (_POLICY, "d f:f32?", "u64{{0x12f0000000000000}}"),
        # ---- asynchronous copies ----
        ("cp.async.(ca|cg).shared[::cta].global[.L2::(64|128|256)B]", "[a] [b] #n",
         "copy_async(at_shared({a}, {n}), at_generic({b}, {n}), {n})"),
        ("cp.async.(ca|cg).shared[::cta].global.L2::cache_hint[.L2::(64|128|256)B]",
         "[a] [b] #n hint:u64", "copy_async(at_shared({a}, {n}), at_generic({b}, {n}), {n})"),
        # The rest is filled with zeros.
        ("cp.async.(ca|cg).shared[::cta].global[.L2::(64|128|256)B]", "[a] [b] #n size:u32",
         "copy_async(at_shared({a}, {n}), at_generic({b}, {n}), {n}, {size})"),
        ("cp.async.(ca|cg).shared[::cta].global.L2::cache_hint[.L2::(64|128|256)B]",
         "[a] [b] #n size:u32 hint:u64",
         "copy_async(at_shared({a}, {n}), at_generic({b}, {n}), {n}, {size})"),
        ("cp.async.commit_group", "", "simt::commit()"),
        ("cp.async.wait_group", "#n", "simt::wait_for_copies({n})"),
        ("cp.async.wait_all", "", "simt::commit(), simt::wait_for_copies(0)"),
        (_BULK, "[a] [b] n:u32 [m] hint:u64?",
         "copy_bulk(at_shared({a}, {n}), at_generic({b}, {n}), {n}, at_shared({m}, 8))"),
        (_ST_ASYNC, "[a] b:array [m]",
         "store_async<{T}, {N}>(at_shared({a}, {N} * sizeof({T})), {b}, at_shared({m}, 8))"),
        # ---- barriers ----
        ("(bar|barrier)[.cta].sync[.aligned]", "#zero", "simt::block_barrier(Where::current())"),
        # With a number of threads: of those that name the barrier, however many the block has.
        ("(bar|barrier)[.cta].sync[.aligned]", "number:u32 threads:u32",
         "simt::named_barrier({number}, {threads}, true, Where::current())"),
        ("(bar|barrier)[.cta].arrive[.aligned]", "number:u32 threads:u32",
         "simt::named_barrier({number}, {threads}, false, Where::current())"),
        ("bar.warp.sync", "m:u32", "warp_sync({m})"),
        ("barrier.cluster.arrive[.(release|relaxed)][.aligned]", "",
         "simt::cluster_arrive(Where::current())"),
        ("barrier.cluster.wait[.acquire][.aligned]", "", "simt::cluster_wait(Where::current())"),
        (f"mbarrier.init{_CTA}.b64", "[a] n:u32", "mbarrier_init(at_shared({a}, 8), {n})"),
        (f"{_ARRIVE}[.shared[::(cta|cluster)]].b64", "d [a] n:u32?",
         "mbarrier_arrive(at_shared({a}, 8), {n}, 0)"),
        (f"{_EXPECT}[.shared[::(cta|cluster)]].b64", "d [a] n:u32",
         "mbarrier_arrive(at_shared({a}, 8), 1, {n})"),
        (f"mbarrier.try_wait[.parity]{_WAIT}.b64", "d [a] b:u64 time:u32?",
         "mbarrier_try(at_shared({a}, 8), {b})"),
        (f"mbarrier.test_wait[.parity]{_WAIT}.b64", "d [a] b:u64",
         "mbarrier_test(at_shared({a}, 8), {b})"),
        ("fence.proxy.async[.(shared::cta|shared::cluster|global)]", "", "simt::fence_proxy()"),
        ("fence.mbarrier_init.release.cluster", "", ""),
        ("fence[.(sc|acq_rel)].(cta|cluster|gpu|sys)", "", ""),
        ("membar.(cta|gl|sys)", "", ""),
        # ---- warps ----
        ("shfl.sync.<F:idx|up|down|bfly>.b32", "d a:u32 b:u32 c:u32 m:u32",
         "shuffle<{F}>({a}, {b}, {c}, {m})"),
        ("vote.sync.<F:any|all>.pred", "d a:pred m:u32", "vote_{F}({a}, {m})"),
        ("vote.sync.ballot.b32", "d a:pred m:u32", "vote_ballot({a}, {m})"),
        ("redux.sync.<F:add|min|max>.<T:u32|s32>", "d a:T m:u32", "redux_{F}<{T}>({a}, {m})"),
        ("redux.sync.<F:and|or|xor>.<T:b32>", "d a:T m:u32", "redux_{F}<{T}>({a}, {m})"),
        ("match.any.sync.<T:b32|b64>", "d a:T m:u32", "match_any({a}, {m})"),
        ("match.all.sync.<T:b32|b64>", "d a:T m:u32", "match_all({a}, {m})"),
        ("elect.sync", "d m:u32", "elect({m})"),
        ("ldmatrix.sync.aligned.m8n8.x<N:1|2|4>[.<X:trans>].shared[::cta].b16", "d [a]",
         "ldmatrix<{N}, {X}>(static_cast<u32>({a}))"),
        ("stmatrix.sync.aligned.m8n8.x<N:1|2|4>[.<X:trans>].shared[::cta].b16", "[a] v:u32s",
         "stmatrix<{N}, {X}>(static_cast<u32>({a}), {v})"),
        ("mma.sync.aligned.(m16n8k8|m16n8k16).row.col.f32.<T:f16|bf16>.(f16|bf16).f32",
         "d a:u32s b:u32s c:f32s", "mma<{T}>({a}, {b}, {c})"),
        ("mma.sync.aligned.(m16n8k4|m16n8k8).row.col.f32.<T:tf32>.tf32.f32",
         "d a:u32s b:u32s c:f32s", "mma<{T}>({a}, {b}, {c})"),
        # ---- control, beside bra and call ----
        ("(ret|exit)[.uni]", "", "return"),
        ("trap", "", 'simt::fail("trap", Where::current())'),
        ("nanosleep.u32", "n:u32", "simt::yield()"),
        ("griddepcontrol.(launch_dependents|wait)", "", ""),
    )
)  # fmt: skip
