"""``python -m tools.cost.calibrate RECORD.json [--out FILE]``: fit the model of time
to a card.

RECORD is one of ``python -m benchmarks layers`` on a card of :mod:`tools.cost.cards`, as ``make
gpu`` brings it home. The speed of a copy is what ``clone`` had; of what the model assumes
(:class:`tools.cost.events.Assumed`), the latencies, the launch and the rate of a warp are varied
until measured and expected times of both backends' layers are closest, in the mean of the absolute
logarithms of their ratios. Prints what was assumed and what fits, with the ratios before and after;
``--out`` writes it. Nothing runs on a GPU, but the kernels' machine code is needed, as for
``python -m tools.cost``.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from .beside import Figure, beside, card_of
from .cards import CARDS, Card
from .events import DEFAULT, Assumed
from .price import BATCH, Work, price

#: No assumption goes further from its default than this.
_FURTHEST = 8.0
_STEPS = (2.0, 1.3, 1.1, 1.03)
_LEAST_COPY = 50e6  # bytes of x: a smaller copy is launched longer than it runs

#: Expected seconds of a pass over a layer, with blocks in step and out of step.
Expected = Callable[[Card, Assumed], tuple[float, float]]


class Measured(NamedTuple):
    """A measured time in seconds, and how to compute it."""

    figure: Figure
    seconds: float
    expected: Expected


class Fit(NamedTuple):
    """What fits: ``before`` and ``after`` are the measured times over the expected ones."""

    card: Card
    assumed: Assumed
    before: list[float]
    after: list[float]

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "card": self.card.name, "copy_speed": self.card.copy_speed,
            "assumed": self.assumed._asdict(), "figures": len(self.after),
            "measured_over_expected": {
                when: {"median": median(r), "lowest": min(r), "highest": max(r)}
                for when, r in (("before", self.before), ("after", self.after))
            },
        }  # fmt: skip


def read(path: Path | None) -> tuple[dict[str, Card], Assumed]:
    """The cards and what is assumed, by a file of :func:`main`; without one, as they are here."""
    if path is None:
        return CARDS, DEFAULT
    found = json.loads(path.read_text())
    card = CARDS[found["card"]]._replace(copy_speed=found["copy_speed"])
    return {**CARDS, card.name: card}, Assumed(**found["assumed"])


def copy_speed(record: dict[str, Any]) -> float | None:
    """Bytes read and written per second by ``clone``, the median over layers that are large."""
    found = []
    for entry in record["results"]:
        provider = entry["providers"].get("clone", {})
        time = (provider.get("device") or provider.get("wall") or {}).get("median_us")
        if time and entry["bytes"] >= _LEAST_COPY:
            found.append(2 * entry["bytes"] / (time * 1e-6))
    return median(found) if found else None


def ratios(of: Sequence[Measured], card: Card, assumed: Assumed) -> list[float]:
    """Of measured times to expected ones, by the middle of the two expectations."""
    return [m.seconds / fmean(m.expected(card, assumed)) for m in of]


def _apart(of: Sequence[Measured], card: Card, assumed: Assumed) -> float:
    return fmean(abs(math.log(ratio)) for ratio in ratios(of, card, assumed))


def fit(of: Sequence[Measured], card: Card, speed: float | None) -> Fit:
    """Vary one assumption after another by a factor, by less when nothing gains."""
    before = ratios(of, card, DEFAULT)
    card = card._replace(copy_speed=speed or card.copy_speed)
    best, least = DEFAULT, _apart(of, card, DEFAULT)
    for step in _STEPS:
        gains = True
        while gains:
            gains = False
            for name, default in DEFAULT._asdict().items():
                for factor in (step, 1 / step):
                    value = getattr(best, name) * factor
                    if not default / _FURTHEST <= value <= default * _FURTHEST:
                        continue
                    tried = best._replace(**{name: value})
                    apart = _apart(of, card, tried)
                    if apart < least * (1 - 1e-6):
                        best, least, gains = tried, apart, True
    return Fit(card, best, before, ratios(of, card, best))


class _Linear(NamedTuple):
    """A launch, whose latencies are sums of what is assumed, so many times."""

    work: Work
    times: dict[str, dict[str, float]]  # by phase and assumption

    def under(self, assumed: Assumed) -> Work:
        """The launch with other latencies."""
        return self.work._replace(latency={
            phase: sum(n * getattr(assumed, name) for name, n in of.items())
            for phase, of in self.times.items()
        })  # fmt: skip


def linear(work: Callable[[Assumed], list[Work]]) -> list[_Linear]:
    """Launches as a function of what is assumed, which is asked a few times alone."""
    default = work(DEFAULT)
    times: list[dict[str, dict[str, float]]] = [{p: {} for p in w.latency} for w in default]
    for name, value in DEFAULT._asdict().items():
        for of, one, two in zip(
            times, default, work(DEFAULT._replace(**{name: 2 * value})), strict=True
        ):
            for phase, seconds in two.latency.items():
                if seconds != one.latency[phase]:
                    of[phase][name] = (seconds - one.latency[phase]) / value
    return [_Linear(w, of) for w, of in zip(default, times, strict=True)]


@functools.cache
def _launches(backend: str, layer: str, layout: str, card: Card) -> dict[str, list[_Linear]]:
    """By direction, from the machine code of the kernels."""
    from . import cuda
    from .record import layers

    work = cuda.work
    if backend == "triton":
        from . import triton

        work = triton.work
    of = next(x for x in layers() if x.name == layer)

    def one(direction: str, assumed: Assumed) -> list[Work]:
        passes = {d: works for d, _, works in work(of, layout == "NHWC", card, assumed=assumed)}
        return passes[direction]

    return {d: linear(functools.partial(one, d)) for d in ("forward", "backward")}


def _expected(figure: Figure, card: Card) -> Expected:
    launches = _launches(figure.backend, figure.layer, figure.layout, card)[figure.direction]

    def expected(card: Card, assumed: Assumed) -> tuple[float, float]:
        prices = [price(launch.under(assumed), card, assumed).expected for launch in launches]
        return sum(p[0] for p in prices), sum(p[1] for p in prices)

    return expected


def measured(record: dict[str, Any]) -> list[Measured]:
    """The figures of a record that can be computed: bfloat16, at the batch of prices.

    Raises:
        ValueError: there is none, or the card is not known.
    """
    name = record["environment"]["device"]
    card = card_of(name, CARDS)
    if card is None:
        raise ValueError(f"expected a record of one of {', '.join(CARDS)}, got one of {name}")
    kinds = {"dtype": "bf16", "batch": BATCH}
    of = [e for e in record["results"] if {k: e[k] for k in kinds} == kinds]
    figures = beside({**record, "results": of}, {})
    found = [
        Measured(f, f.measured * 1e-6, _expected(f, CARDS[card]))
        for f in figures
        if not f.problem and f.direction in ("forward", "backward")
        and f.backend in ("native", "triton")
    ]  # fmt: skip
    if not found:
        raise ValueError(f"expected layers in bf16 at batch {BATCH}, forward or backward; got none")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.cost.calibrate", description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--out", type=Path, metavar="FILE")
    given = parser.parse_args(argv)
    record = json.loads(given.record.read_text())
    try:
        of = measured(record)
    except ValueError as error:
        parser.error(str(error))
    card = CARDS[str(card_of(record["environment"]["device"], CARDS))]
    found = fit(of, card, copy_speed(record))
    print(f"{card.name}: {len(of)} figures")
    print(
        f"copy: {card.copy_speed / 1e12:.2f} TB/s assumed, {found.card.copy_speed / 1e12:.2f} fits"
    )
    for name, value in found.assumed._asdict().items():
        print(f"{name}: {getattr(DEFAULT, name):.3g} assumed, {value:.3g} fits")
    for when, of_ratios in (("before", found.before), ("after", found.after)):
        print(f"measured over expected, {when}: median {median(of_ratios):.2f}, "
              f"from {min(of_ratios):.2f} to {max(of_ratios):.2f}")  # fmt: skip
    if given.out:
        given.out.write_text(json.dumps(found.as_json(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
