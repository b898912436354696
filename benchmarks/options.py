"""Command line of ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .problem import DTYPES, FORWARD, LAYOUTS, TRAINING
from .providers import BASELINES, FUSED
from .workloads import DEFAULT_NETWORKS, Network, load_networks, select

LOCAL_RESULTS = Path(__file__).with_name("results") / "local"


@dataclass(frozen=True)
class Options:
    """What to measure, after the defaults of the device were filled in."""

    device: torch.device
    networks: list[Network]
    dtypes: list[str]
    layouts: list[str]
    batches: list[int]
    modes: list[str]
    providers: list[str]
    explicit_providers: bool
    neighbours: bool
    small: bool
    layers: bool
    threads: int
    budget: float
    seed: int
    out: Path
    command: str


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Squeeze-excite layers of real networks: the fused backends beside eager "
        "PyTorch, torch.compile and a plain copy, interleaved in one run. Options that select "
        "something may be given several times.",
    )
    add = parser.add_argument
    add("--network", action="append", help="network of workloads.json (repeatable)")
    add("--layer", action="append", default=[], metavar="CxHxW", help="only this shape")
    add("--dtype", action="append", choices=DTYPES, help="default: fp32 on CPU, bf16 on CUDA")
    add("--layout", action="append", choices=LAYOUTS, help="default: both")
    add("--batch", action="append", type=int, help="default: 8 on CPU, 256 on CUDA")
    add("--mode", action="append", choices=[FORWARD, TRAINING], help="default: both")
    add(
        "--provider",
        action="append",
        help=f"of {', '.join(BASELINES)}, and backends {', '.join(FUSED)}, reference; default: "
        "the baselines and every fused backend that runs here",
    )
    add("--neighbours", action="store_true", help="with the pointwise steps before and after")
    add("--full", action="store_true", help="all networks, fp32 and bf16, batches 1, 8, 32")
    add("--small", action="store_true", help="only the overhead of a tiny call, 2x64x4x4")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add(
        "--budget",
        type=float,
        help="seconds to aim for: rounds and torch.compile adapt; 0 is no limit "
        "(default: 180, and no limit with --full)",
    )
    add("--seed", type=int, default=0, help="of the data and of the order of providers")
    add("--out", type=Path, default=LOCAL_RESULTS, metavar="DIR", help="for the JSON and the plot")
    return parser


def _command(args: argparse.Namespace, argv: Sequence[str]) -> str:
    """The command as typed, without ``--out``, which changes no figure and names a local path."""
    kept, skip = [], False
    for word in argv:
        if skip or word.startswith("--out"):
            skip = not skip and word == "--out"
            continue
        kept.append(word)
    return shlex.join(["python", "-m", "benchmarks", *kept])


def parse(argv: Sequence[str]) -> Options:
    """Options from the command line; exits with a message on anything unknown."""
    parser = _parser()
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    known = load_networks(neighbours=args.neighbours)
    names = args.network or (list(known) if args.full or args.layer else DEFAULT_NETWORKS)
    try:
        networks = select(known, names, args.layer)
    except ValueError as error:
        parser.error(str(error))
    allowed = (*BASELINES, *FUSED, "reference")
    if unknown := [name for name in args.provider or [] if name not in allowed]:
        parser.error(f"provider: unknown {unknown[0]!r}; known: {', '.join(allowed)}")
    if args.batch and min(args.batch) < 1:
        parser.error(f"batch: expected at least 1, got {min(args.batch)}")
    budget = args.budget
    if budget is None:
        budget = 0.0 if args.full else 180.0
    return Options(
        device=device,
        networks=networks,
        dtypes=args.dtype or (["fp32", "bf16"] if args.full else ["bf16" if cuda else "fp32"]),
        layouts=args.layout or list(LAYOUTS),
        batches=args.batch or ([1, 8, 32] if args.full else [256 if cuda else 8]),
        modes=args.mode or [FORWARD, TRAINING],
        providers=args.provider or [*BASELINES, *FUSED],
        explicit_providers=bool(args.provider),
        neighbours=args.neighbours,
        # a selection of layers is somebody looking at those layers
        small=args.small or not (args.layer or args.network),
        layers=not args.small,
        threads=args.threads or torch.get_num_threads(),
        budget=budget,
        seed=args.seed,
        out=args.out,
        command=_command(args, argv),
    )
