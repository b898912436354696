"""The record of prices: a line per layer, layout, direction and backend."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.workloads import Layer, load_networks

from . import cuda
from .cards import CARDS, Card
from .events import DEFAULT, Assumed
from .price import BATCH, row

HEAD = "computed from machine code, not measured"
LAYOUTS = ("NCHW", "NHWC")
BACKENDS = ("native", "triton")
Cards = dict[str, Card]
_PASSES = {"forward": 2, "backward": 3}


def layers(networks: Iterable[str] = ()) -> list[Layer]:
    """The distinct layers of networks without what is around them; of all networks unless given.

    Raises:
        KeyError: an unknown network.
    """
    every = load_networks()
    chosen = [every[name] for name in networks] or list(every.values())
    return list(dict.fromkeys(layer for network in chosen for layer, _ in network.layers))


def rows(
    backend: str,
    layer: Layer,
    layout: str,
    card: Card,
    batch: int = BATCH,
    accesses: bool = False,
    assumed: Assumed = DEFAULT,
) -> Iterator[dict[str, Any]]:
    """Lines of the record: of the forward and the backward pass, in bfloat16. With ``accesses``
    also what those of the CUDA kernels touch, see :func:`.cuda.touched`."""
    last = layout == "NHWC"
    if backend == "native":
        work, compiler = cuda.work(layer, last, card, batch, assumed), cuda.compiler()
    else:
        from . import triton

        work, compiler = triton.work(layer, last, card, batch, assumed), triton.compiler()
    x_bytes = 2.0 * batch * layer.channels * layer.positions
    touched = dict(cuda.touched(layer, last, card, batch)) if accesses else {}
    for direction, plan, launches in work:
        yield {
            "backend": backend, "card": card.name, "layer": layer.name, "shape": layer.shape,
            "layout": layout, "direction": direction, "compiler": compiler, "plan": plan,
            **row(launches, card, _PASSES[direction], x_bytes, assumed),
            **({"touched": touched[direction]} if accesses else {}),
        }  # fmt: skip


def merged(
    path: Path, new: list[dict[str, Any]], assumed: Assumed = DEFAULT, cards: Cards = CARDS
) -> dict[str, Any]:
    """A record with lines that replace those of the same layer, layout, direction, backend and
    card in the file, where there is one."""

    def key(line: dict[str, Any]) -> tuple[str, ...]:
        return tuple(line[k] for k in ("backend", "card", "layer", "layout", "direction"))

    old = json.loads(path.read_text())["rows"] if path.exists() else []
    lines = {key(line): line for line in [*old, *new]}
    return {
        "what": HEAD,
        "dtype": "bfloat16",
        "batch": BATCH,
        "assumed": assumed._asdict(),
        "cards": {
            name: card._asdict() for name, card in cards.items()
            if any(line["card"] == name for line in lines.values())
        },
        "rows": list(lines.values()),
    }  # fmt: skip


def write(
    path: Path, new: list[dict[str, Any]], assumed: Assumed = DEFAULT, cards: Cards = CARDS
) -> None:
    """Replace the file by what :func:`merged` gives."""
    records.write(merged(path, new, assumed, cards), path)
