"""The squeeze-excite layers of real networks, read from ``workloads.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKLOADS = Path(__file__).with_name("workloads.json")

DEFAULT_NETWORKS = (
    "seresnet50",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "regnety_032",
    "lc0_20x256",
)


@dataclass(frozen=True)
class Layer:
    """One squeeze-excite layer: input shape per image, form, and its neighbours in the network."""

    channels: int
    height: int
    width: int
    hidden: int | None  # None: one channels-to-channels layer (effective SE)
    activation: str | None
    gate: str
    shift: bool = False  # scale-and-shift: the second weight has 2C rows
    before: str | None = None
    after: str | None = None
    add: bool = False  # a residual is added before `after`

    @property
    def shape(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"

    @property
    def name(self) -> str:
        """Shape and form in one word, unique among layers without their neighbours."""
        hidden = "single" if self.hidden is None else f"r{self.hidden}"
        form = [self.shape, hidden, *([self.activation] if self.activation else []), self.gate]
        return "-".join([*form, "shift"] if self.shift else form)

    @property
    def positions(self) -> int:
        return self.height * self.width

    def without_neighbours(self) -> Layer:
        return Layer(
            self.channels,
            self.height,
            self.width,
            self.hidden,
            self.activation,
            self.gate,
            self.shift,
        )


@dataclass(frozen=True)
class Network:
    """A network by name and how often it contains each layer."""

    name: str
    source: str
    input_size: int
    layers: tuple[tuple[Layer, int], ...]


def _layer(row: dict[str, Any]) -> Layer:
    def step(name: str | None) -> str | None:
        return None if name in (None, "none") else name

    after = step(row["after"])
    add = False
    if after is not None and after.startswith("add"):
        add = True
        after = step(after.removeprefix("add").removeprefix("_") or None)
    return Layer(
        channels=row["channels"],
        height=row["height"],
        width=row["width"],
        hidden=row["hidden"],
        activation=row["activation"],
        gate=row["gate"],
        shift=row.get("shift", False),
        before=step(row["before"]),
        after=after,
        add=add,
    )


def load_networks(path: Path = WORKLOADS, *, neighbours: bool = False) -> dict[str, Network]:
    """All networks by name; layers carry their neighbours only where asked.

    Without neighbours, layers that differ in nothing else become one, their counts added.
    """
    networks = {}
    for entry in json.loads(path.read_text())["networks"]:
        counts: dict[Layer, int] = {}
        for row in entry["layers"]:
            layer = _layer(row)
            layer = layer if neighbours else layer.without_neighbours()
            counts[layer] = counts.get(layer, 0) + row["count"]
        networks[entry["network"]] = Network(
            entry["network"], entry["source"], entry["input_size"], tuple(counts.items())
        )
    return networks


def select(
    networks: dict[str, Network], names: Sequence[str], shapes: Sequence[str] = ()
) -> list[Network]:
    """The named networks, cut down to layers of the given ``CxHxW`` shapes if there are any.

    ``lc0`` stands for the default tower. Raises ValueError naming what is unknown.
    """
    chosen = []
    for name in names:
        name = "lc0_20x256" if name == "lc0" else name
        if name not in networks:
            raise ValueError(f"network: unknown {name!r}; known: {', '.join(networks)}")
        chosen.append(networks[name])
    if not shapes:
        return chosen
    found = [
        Network(n.name, n.source, n.input_size, kept)
        for n in chosen
        if (kept := tuple(pair for pair in n.layers if pair[0].shape in shapes))
    ]
    present = {layer.shape for network in found for layer, _ in network.layers}
    if missing := set(shapes) - present:
        known = sorted({layer.shape for n in chosen for layer, _ in n.layers})
        raise ValueError(
            f"layer: {', '.join(sorted(missing))} not found; known: {', '.join(known)}"
        )
    return found
