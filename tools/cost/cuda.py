"""The CUDA kernels' work on a layer: a launch plan, executed PTX, and machine code."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator

import torch

from benchmarks.workloads import Layer

from .cards import Card
from .events import DEFAULT, Assumed
from .executed import Counts, Plan, accesses, counts, module_of, plan_of
from .machine_code import compiled, release
from .pipes import Use
from .price import BATCH, Work
from .profile import Profile, phase_of
from .ptx import Text

_DIRECTIONS = ("forward", "backward")
#: Images of which the kernel of the parameters' gradients adds up one at a time, by the warps of a
#: block; each step waits for L2.
_GRADIENT_WARPS = 8


def plans(layer: Layer, last: bool, card: Card, batch: int = BATCH) -> tuple[Plan, Plan]:
    """Of the forward and the backward pass, in bfloat16.

    Raises:
        RuntimeError: the library was built without CUDA kernels.
        ValueError: there is no plan.
    """
    from senet_kernels.backends.native import Gpu, launch_plan

    form = torch.channels_last if last else torch.contiguous_format
    shape = (batch, layer.channels, layer.height, layer.width)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta").to(memory_format=form)
    inner = layer.channels if layer.hidden is None else layer.hidden
    w1 = None if layer.hidden is None else x.new_empty(inner, layer.channels)
    w2 = x.new_empty(layer.channels * (1 + layer.shift), inner)
    gpu = Gpu(
        card.capability, card.multiprocessors, card.shared_per_block,
        card.shared_per_multiprocessor, card.threads_per_multiprocessor,
        largest_cluster=card.largest_cluster,
    )  # fmt: skip
    forward, backward = (
        plan_of(launch_plan(x, w1, w2, backward=b, gpu=gpu), card, batch) for b in (False, True)
    )
    return forward, backward


@functools.cache
def text_of(kernel: str, target: str) -> Text:
    return Text(*module_of(kernel, target))


def profiles(of: Counts) -> tuple[Profile, Profile]:
    """What a kernel does for an image, and once."""
    code = compiled(module_of(of.kernel, of.target)[0], of.target, of.kernel)
    text = text_of(of.kernel, of.target)
    return Profile(code, text, *of.image), Profile(code, text, *of.once)


def _uses(profile: Profile, capability: int) -> dict[str, Use]:
    """By phase; what belongs to none is done before the sums."""
    found = {name: use for name, use in profile.uses(capability).items() if use.issue}
    other = found.pop("other", Use(0))
    # Copies into shared memory are begun by threads that go on at once.
    other = other.plus(found.pop("load", Use(0)))
    first = next(iter(found), "sum")
    return found | {first: found.get(first, Use(0)).plus(other)}


def work(
    layer: Layer, last: bool, card: Card, batch: int = BATCH, assumed: Assumed = DEFAULT
) -> Iterator[tuple[str, str, list[Work]]]:
    """Direction, words of the plan, and the launches, of the forward and the backward pass."""
    of_plans = plans(layer, last, card, batch)
    of_counts = counts(layer, last, of_plans, card.target)
    for direction, plan, found in zip(_DIRECTIONS, of_plans, of_counts, strict=True):
        yield (
            direction,
            plan.words,
            [_launch(layer, last, card, batch, plan, direction, of, assumed) for of in found],
        )


def _launch(
    layer: Layer, last: bool, card: Card, batch: int, plan: Plan, direction: str, of: Counts,
    assumed: Assumed,
) -> Work:  # fmt: skip
    profile, start = profiles(of)
    name = _short(of.kernel)
    resources = profile.code.resources
    common = {
        "kernel": name, "registers": resources.registers, "spills": resources.spills,
        "loops": profile.loops(), "narrow": profile.narrow(), "images": batch,
    }  # fmt: skip
    inner = layer.channels if layer.hidden is None else layer.hidden
    outputs = layer.channels * (1 + layer.shift)
    weights = 2.0 * inner * (outputs + (layer.channels if layer.hidden is not None else 0))
    image = 2.0 * layer.channels * layer.positions
    if name == "gradients_kernel":
        # A batch is one task of it.
        uses = {"parameters": profile.per_image(card.capability)}
        saved = 4.0 * (outputs + 2 * inner + layer.channels)
        tiles = -(-outputs // 32) * -(-inner // 32)
        if layer.hidden is not None:
            tiles += -(-inner // 32) * -(-layer.channels // 32) + -(-inner // 32)
        tiles += -(-outputs // 32)
        steps = -(-batch // _GRADIENT_WARPS)
        return Work(
            **common, uses=uses, once=start.per_image(card.capability), groups=1, blocks=tiles,
            threads=256, shared=4096, moves={"parameters": weights / batch},
            l2={"parameters": saved * tiles / max(1, -(-outputs // 32))},
            latency={"parameters": steps / batch * assumed.l2}, in_flight={}, l2_in_flight={},
            stages=0,
        )  # fmt: skip
    backward = direction == "backward"
    moves = {"write": image}
    l2 = {"mlp": 0.0 if "weights kept" in plan.words else weights}
    streams: list[str] = []  # phases that read x or dy from memory as they go
    if plan.resident:
        moves["load"] = image
    else:
        moves["sum"] = image
        streams += ["sum", "write"]
        # The second reading finds in L2 what the images in progress have left there.
        held = plan.groups * image * (2 if backward else 1) <= 0.8 * card.l2_bytes
        if held:
            l2["write"] = image
        else:
            moves["write"] += image
    if backward:
        moves["sum"] = moves.get("sum", 0.0) + image  # x, beside dy
        streams.append("sum")
    loads = {x.name: x.loads for x in reversed(profile.loops())}
    asked = {name: 16.0 * plan.threads * max(1, loads.get(name, 1)) for name in streams}
    in_flight, l2_in_flight = asked, asked
    if profile.prefetches:  # memory is asked ahead, and the loop reads from L2
        in_flight = {}
        for name in asked:
            l2[name] = moves[name] - (image if name == "write" else 0.0) or l2.get(name, 0.0)
    meets = 0
    latency = {"load": assumed.memory, "mlp": 2 * assumed.l2}
    if "cluster of" in plan.words or "global memory" in plan.words:
        meets = 1
        one = assumed.cluster_barrier if "cluster of" in plan.words else assumed.grid_exchange
        latency["exchange"] = meets * one
    if "sum" in asked:
        latency["sum"] = assumed.memory
    uses = _uses(profile, card.capability)
    if meets:
        uses.setdefault("exchange", Use(0))
    return Work(
        **common, uses=uses, once=start.per_image(card.capability), groups=plan.groups,
        blocks=plan.blocks, threads=plan.threads, shared=plan.shared, moves=moves, l2=l2,
        latency=latency, in_flight=in_flight, l2_in_flight=l2_in_flight, stages=plan.slots,
    )  # fmt: skip


def compiler() -> str:
    return release()


_ACCESS = re.compile(r"(?:@!?\s*%\w+\s+)?(ld|st|atom|red)\.")
_NO_MEMORY = re.compile(r"\.(param|local|const)\b")


def touched(
    layer: Layer, last: bool, card: Card, batch: int = BATCH
) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Direction, and by phase what accesses touch for an image: ``read`` and ``written``, bytes of
    the 32-byte sectors of global memory in each request over the bytes asked for; ``shared_read``
    and ``shared_written``, wavefronts of shared memory over those without bank conflicts."""
    passes = accesses(layer, last, plans(layer, last, card, batch), card.target)
    for direction, kernels in zip(_DIRECTIONS, passes, strict=True):
        sums: dict[str, Counter[str]] = {}
        for (kernel, target), rows in kernels.items():
            text = text_of(kernel, target)
            lines = text.text.split("\n")
            for row in rows:
                line = lines[row.line - 1]
                found = _ACCESS.search(line)
                if found is None or _NO_MEMORY.search(line):
                    continue
                what = ("shared_" if row.shared else "") + (
                    "read" if found[1] == "ld" else "written"
                )
                phase = phase_of(text.frames[row.line])
                of = sums.setdefault(phase, Counter())
                of[f"{what} cost"] += row.wavefronts if row.shared else 32 * row.sectors
                of[f"{what} least"] += row.least if row.shared else row.bytes
        yield (
            direction,
            {
                phase: {
                    what: round(of[f"{what} cost"] / of[f"{what} least"], 3)
                    for what in ("read", "written", "shared_read", "shared_written")
                    if of[f"{what} least"]
                }
                for phase, of in sums.items()
            },
        )


def profiles_of(
    layer: Layer, last: bool, card: Card, batch: int = BATCH
) -> Iterator[tuple[str, str, Profile]]:
    """Direction, kernel, and what it does for an image."""
    for direction, found in zip(
        _DIRECTIONS, counts(layer, last, plans(layer, last, card, batch), card.target), strict=True
    ):
        for of in found:
            yield direction, _short(of.kernel), profiles(of)[0]


def _short(kernel: str) -> str:
    return kernel.split("3gpu")[1].lstrip("0123456789").partition("I")[0]
