"""The Triton kernels' work on a layer: their launches, executed PTX, and machine code."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.workloads import Layer

from .cards import Card
from .events import DEFAULT, Assumed
from .machine_code import OUT, ROOT, compiled, for_tests, release
from .pipes import Use
from .price import BATCH, Work
from .profile import Profile
from .ptx import Text

KERNELS = ROOT / "senet_kernels" / "backends" / "triton"
#: See :data:`.profile.CUDA_PHASES`; functions of the package.
PHASES = (
    ("sum", r"^(squeeze|mean|bwd_reduce|finish_sums)_kernel$"),
    ("mlp", r"^(hidden|gates|factors|hidden_bwd)_kernel$"),
    ("write", r"^(scale|dx)_(flat|tile)_kernel$"),
    ("parameters", r"^(excite_bwd|sums)_kernel$"),
)  # fmt: skip
# They add up what programs that shared a sum have left.
_ADDERS = ("mean_kernel", "finish_sums_kernel")
_VERSION = "3"  # of how it is counted here
_FLAGS = ("--regAllocOptLevel=2",)  # as Triton's compiler gives them


def _assembler() -> str:
    from importlib.util import find_spec

    found = find_spec("triton")
    assert found
    assert found.origin
    return str(Path(found.origin).parent / "backends" / "nvidia" / "bin" / "ptxas")


def compiler() -> str:
    from importlib.metadata import version

    return f"triton {version('triton')}, {release(_assembler())}"


class _Process:
    """Answers for one device; started when it is first asked."""

    def __init__(self, capability: int, multiprocessors: int) -> None:
        command = [sys.executable, "-m", "tools.cost.triton_launches"]
        # What interprets kernels does not compile them.
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self.process = subprocess.Popen(
            [*command, str(capability), str(multiprocessors)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
        )  # fmt: skip

    def ask(self, call: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """Raises RuntimeError where the process ends without an answer."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"tools.cost.triton_launches ended with {self.process.wait()}")
        passes: list[list[dict[str, Any]]] = json.loads(answer)
        return passes


@functools.cache
def _process(capability: int, multiprocessors: int) -> _Process:
    return _Process(capability, multiprocessors)


def launches(layer: Layer, last: bool, card: Card, batch: int) -> list[list[dict[str, Any]]]:
    """Of the forward and the backward pass, in bfloat16; kept in ``build/cost`` by the kernels'
    sources, Triton's version and the translator."""
    from importlib.metadata import version

    capability = card.capability if card.capability < 100 else 90
    call = {
        "shape": [batch, layer.channels, layer.height, layer.width], "hidden": layer.hidden,
        "shift": layer.shift, "gate": layer.gate, "activation": layer.activation or "relu",
        "layout": "channels_last" if last else "contiguous", "dtype": "bfloat16",
    }  # fmt: skip
    parts = [_VERSION, json.dumps(call), str(capability), str(card.multiprocessors),
             version("triton"), for_tests()._translator()]  # fmt: skip
    parts += [path.read_text() for path in sorted(KERNELS.glob("*.py"))]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    product = OUT / f"triton-{key}.json"
    if not product.exists():
        for_tests().write(product, json.dumps(_process(capability, card.multiprocessors).ask(call)))
    found: list[list[dict[str, Any]]] = json.loads(product.read_text())
    return found


def profile(launch: dict[str, Any], target: str) -> Profile:
    """Of all programs of a launch."""
    compiling = for_tests()
    ptx, kernel = launch["ptx"], launch["kernel"]
    of = re.search(r"\.target\s+sm_(\w+)", ptx)
    code = compiled(ptx, of[1] if of else target, kernel, _assembler(), _FLAGS)
    text = Text(ptx, compiling.Module(ptx, counts=True).leaders)
    return Profile(code, text, launch["warps"], launch["threads"], PHASES)


def _launch(launch: dict[str, Any], layer: Layer, card: Card, batch: int, assumed: Assumed) -> Work:
    kernel, found = launch["kernel"], profile(launch, card.target)
    image = 2.0 * layer.channels * layer.positions
    inner = layer.channels if layer.hidden is None else layer.hidden
    outputs = layer.channels * (1 + layer.shift)
    weights = 2.0 * inner * (outputs + (layer.channels if layer.hidden is not None else 0))
    programs, resources = launch["programs"], found.code.resources
    loops = found.loops()
    loads = max((x.loads for x in loops), default=1)
    asked = 16.0 * launch["threads_per_program"] * max(1, loads)
    uses = {name: use for name, use in found.uses(card.capability).items() if use.issue}
    other = uses.pop("other", Use(0))
    main = next(phase for phase, of in PHASES if re.match(of, kernel))
    uses[main] = uses.get(main, Use(0)).plus(other)
    moves: dict[str, float] = {}
    l2: dict[str, float] = {}
    latency: dict[str, float] = {main: assumed.memory}
    total = batch * image
    held = total * 2 <= 0.8 * card.l2_bytes
    vectors = 4.0 * batch * (outputs + 2 * inner + layer.channels)
    if main in ("mlp", "parameters"):
        # Tiles of a product of 32 terms, one after another.
        terms = batch if main == "parameters" else max(inner, layer.channels)
        moves[main], l2[main] = weights, vectors
        latency[main] = -(-terms // 32) * assumed.l2
    elif kernel in _ADDERS:
        parts = launch["splits"] * (1 + layer.shift * (kernel == "finish_sums_kernel"))
        l2[main], latency[main] = vectors + 4.0 * batch * layer.channels * parts, assumed.l2
    elif main == "sum":
        moves[main] = total * (2 if kernel == "bwd_reduce_kernel" else 1)
    else:
        moves[main] = total * (1 if held else 2)
        l2[main] = total if held else 0.0
    # Of the whole launch, programs being blocks that have one task each.
    return Work(
        kernel=kernel, uses=uses, once=Use(0), groups=1, blocks=programs,
        threads=launch["threads_per_program"], shared=launch["shared"],
        registers=resources.registers, spills=resources.spills, images=1, moves=moves, l2=l2,
        latency={name: t for name, t in latency.items() if name in uses or name in moves},
        in_flight={main: asked * (2 if main == "write" else 1)}, l2_in_flight={}, stages=0,
        loops=loops, narrow=found.narrow(),
    )  # fmt: skip


def work(
    layer: Layer, last: bool, card: Card, batch: int = BATCH, assumed: Assumed = DEFAULT
) -> Iterator[tuple[str, str, list[Work]]]:
    """See :func:`.cuda.work`."""
    passes = launches(layer, last, card, batch)
    for direction, found in zip(("forward", "backward"), passes, strict=True):
        words = ", ".join(
            f"{x['kernel']} {x['programs']}x{x['threads_per_program']}" for x in found
        )
        yield direction, words, [_launch(x, layer, card, batch, assumed) for x in found]


def profiles_of(
    layer: Layer, last: bool, card: Card, batch: int = BATCH
) -> Iterator[tuple[str, str, Profile]]:
    """Direction, kernel, and what all its programs do."""
    for direction, found in zip(
        ("forward", "backward"), launches(layer, last, card, batch), strict=True
    ):
        for launch in found:
            yield direction, launch["kernel"], profile(launch, card.target)
