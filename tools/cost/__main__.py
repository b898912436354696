"""``python -m tools.cost``: what the compiled GPU kernels take of a card.

``[--backend native triton] [--card H200 ...] [--network NAME ...] [--layer CxHxW ...]
[--layout NCHW NHWC] [--lines [N]] [--accesses] [--record FILE] [--budgets FILE] [--assumed FILE]``

For each layer, layout and direction, in bfloat16 at batch 256: instructions per 16-byte vector of x
by phase, the resource that binds, the ceiling that it sets as a share of the speed of a copy, and
what a model of events expects, phases that wait for each other included. Nothing runs on a GPU: the
PTX is executed on the CPU (``tests/ptx``), which counts how often its basic blocks run; the machine
code of nvcc, ptxas and Triton says which instructions these became.

``--accesses``, of the CUDA kernels, adds what accesses touch: sectors of 32 bytes, and conflicts of
the banks of shared memory. ``--lines`` prints instead where the instructions of each kernel go, by
line of source. ``--record`` adds the lines to a record, see :mod:`tools.cost.page`; ``--budgets``
makes them the budgets that ``tests/test_cost_kernels.py`` holds kernels to. ``--assumed`` takes the
model's assumptions, and the speed of a copy on their card, from a file of
:mod:`tools.cost.calibrate`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from . import calibrate
from .budgets import renew
from .cards import CARDS
from .machine_code import why_not
from .price import BATCH
from .record import BACKENDS, HEAD, LAYOUTS, layers, rows, write


def _shown(line: dict[str, Any]) -> str:
    phases = ", ".join(f"{name} {use[0]:.0f}" for name, use in line["per_vector"].items())
    each = line["kernels"][0]
    low, high = sorted(line["expected"])
    fast, slow = sorted(line["expected_us"])
    return (
        f"{line['backend']} {line['card']} {line['layer']} {line['layout']} {line['direction']}: "
        f"{line['instructions_per_vector']:.0f} of {line['slots_per_vector']:.0f} instructions per "
        f"vector ({phases}); {each['registers']} registers, "
        f"{each['blocks_per_multiprocessor']} blocks per multiprocessor; {line['binds']} binds, "
        f"ceiling {line['ceiling']:.0%}, expected {low:.0%} to {high:.0%} of a copy "
        f"({slow:.0f} to {fast:.0f} µs)"
    )


def _print_lines(backend: str, shape: Any, layout: str, card: Any, count: int) -> None:
    if backend == "native":
        from .cuda import profiles_of
    else:
        from .triton import profiles_of
    vectors = shape.channels * shape.positions / 8 / 32
    vectors *= BATCH if backend == "triton" else 1  # all programs, or what one image takes
    for direction, kernel, profile in profiles_of(shape, layout == "NHWC", card):
        print(f"{backend} {shape.name} {layout} {direction}, {kernel}: "
              f"{profile.instructions / vectors:.1f} instructions per vector")  # fmt: skip
        for file, line, phase, times in profile.lines()[:count]:
            print(f"  {times / vectors:8.1f}  {phase:10} {file}:{line}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.cost", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--card", nargs="+", choices=list(CARDS), default=["H200"])
    parser.add_argument("--network", nargs="+", default=[])
    parser.add_argument("--layer", nargs="+", default=[], metavar="CxHxW")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--lines", nargs="?", type=int, const=20, metavar="N")
    parser.add_argument("--accesses", action="store_true")
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--budgets", type=Path, metavar="FILE")
    parser.add_argument("--assumed", type=Path, metavar="FILE")
    given = parser.parse_args()
    cards, assumed = calibrate.read(given.assumed)
    if reason := why_not():
        print(f"machine code cannot be priced here: {reason}", file=sys.stderr)
        return 2
    try:
        chosen = layers(given.network)
    except KeyError as error:
        parser.error(f"--network: unknown {error}")
    if given.layer:
        unknown = set(given.layer) - {layer.shape for layer in chosen}
        if unknown:
            parser.error(f"--layer: no layer of the networks is {', '.join(sorted(unknown))}")
        chosen = [layer for layer in chosen if layer.shape in given.layer]
    print(HEAD)
    for backend in given.backend:
        for card in (cards[name] for name in given.card):
            for layer in chosen:
                for layout in given.layout:
                    if given.lines:
                        _print_lines(backend, layer, layout, card, given.lines)
                        continue
                    accesses = given.accesses and backend == "native"
                    lines = list(rows(backend, layer, layout, card, accesses=accesses,
                                      assumed=assumed))  # fmt: skip
                    for line in lines:
                        print(_shown(line))
                        for phase, what in line.get("touched", {}).items():
                            print("   ", phase, *(f"{name} {n:.2f}" for name, n in what.items()))
                    sys.stdout.flush()
                    # At once: all layers take an hour, and what is done need not be lost.
                    if given.record:
                        write(given.record, lines, assumed, cards)
                    if given.budgets:
                        renew(given.budgets, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
