"""Command lines of ``python -m benchmarks layers``, ``models`` and ``sweep``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from senet_kernels._command_line import Parser, count, seconds

from .networks import COMPILE_WITHOUT, FULL_ONLY, NETWORKS, VARIANTS, NetworkSpec
from .problem import BACKWARD, DTYPES, FORWARD, LAYOUTS, TRAINING
from .providers import BASELINES, COMPOSED, FUSED, GPU_BASELINES, IN_PLACE, PLAIN
from .strategies import STRATEGIES
from .workloads import DEFAULT_NETWORKS, Network, load_networks, select

LOCAL_RESULTS = Path(__file__).with_name("results") / "local"
AXES = ("batch", "channels", "positions", "hidden")
AMP = "amp"  # bf16 by autocast, the parameters in fp32: for whole networks


@dataclass(frozen=True)
class Options:
    """What all runs have, after the defaults of the device were filled in."""

    device: torch.device
    dtypes: list[str]
    layouts: list[str]
    batches: list[int]
    modes: list[str]
    providers: list[str]
    threads: int
    budget: float
    seed: int
    out: Path
    record: Path | None
    command: str


@dataclass(frozen=True)
class LayerOptions(Options):
    """Of ``layers``."""

    networks: list[Network] = field(default_factory=list)
    neighbours: bool = False
    small: bool = False
    layers: bool = True
    rounds: int = 30
    compile_last: bool = False
    fresh_pages: bool = False
    device_time: bool = False
    profile: bool = True
    left_out: frozenset[str] = frozenset()
    under_way: Path | None = None


@dataclass(frozen=True)
class SweepOptions(LayerOptions):
    """Of ``sweep``: the axes, and the point they meet in."""

    axes: list[str] = field(default_factory=list)
    base: dict[str, int] = field(default_factory=dict)
    points: int = 0  # at most so many per axis; 0: all


@dataclass(frozen=True)
class ModelOptions(Options):
    """Of ``models``. ``batches`` is empty and ``size`` None where each network has its own."""

    specs: list[NetworkSpec] = field(default_factory=list)
    size: int | None = None
    compile_all: bool = True  # and not only the networks that take little time to compile


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer of 0 to 2**63 - 1, got {text!r}")
    return int(text)


def _common(
    add: Any, *, dtypes: Sequence[str], budget: float, modes: Sequence[str] = (FORWARD, TRAINING)
) -> None:
    add("--dtype", action="append", choices=dtypes, help="default: fp32 on CPU, bf16 on CUDA")
    add("--mode", action="append", choices=modes, help=f"default: {FORWARD} and {TRAINING}")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--threads", type=count, help="CPU threads (default: torch's)")
    add(
        "--budget",
        type=seconds,
        help="seconds to aim for: rounds and torch.compile adapt; 0 is no limit "
        f"(default: {budget:.0f}, and no limit with --full)",
    )
    add("--seed", type=_seed, default=0, help="of the data and of the order of providers")
    add("--out", type=Path, default=LOCAL_RESULTS, metavar="DIR", help="for the record and plots")
    add(
        "--record",
        type=Path,
        metavar="FILE",
        help="name of the record, written after every case; if it is there and of the same "
        "command, commit and device, what it has is not measured again; another record is replaced",
    )


def _parser(kind: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"python -m benchmarks {kind}",
        description={
            "layers": "Squeeze-excite layers of real networks: the fused backends beside eager "
            "PyTorch, torch.compile and a plain copy, interleaved in one run.",
            "models": "Whole networks: a training step and inference, as their library makes "
            "them, with fuse_se_blocks, under torch.compile, and without SE.",
            "sweep": "The cost of one layer as batch, channels, positions and hidden width grow, "
            "each alone, and where one way of computing it overtakes another.",
        }[kind]
        + " Options that select something may be given several times.",
    )
    add = parser.add_argument
    if kind == "models":
        _common(add, dtypes=[*DTYPES, AMP], budget=280)
        add("--network", action="append", choices=list(NETWORKS), help="default: most of them")
        add("--batch", action="append", type=count, help="default: of the network and the device")
        add("--size", type=count, help="height and width of the images (default: of the network; "
            "160 on a CPU)")  # fmt: skip
        add("--layout", action="append", choices=LAYOUTS,
            help="default: contiguous on CPU, both on CUDA")  # fmt: skip
        add("--provider", action="append", choices=VARIANTS, help="default: all but "
            f"{COMPILE_WITHOUT}")  # fmt: skip
        add("--full", action="store_true",
            help="all networks and variants, both layouts, original image sizes")  # fmt: skip
        return parser
    _common(add, dtypes=list(DTYPES), budget=180, modes=(FORWARD, BACKWARD, TRAINING))
    add("--layout", action="append", choices=LAYOUTS, help="default: both")
    fused = (
        f"of {', '.join([*BASELINES, *COMPOSED, IN_PLACE])}, "
        f"and backends {', '.join([*FUSED, *PLAIN])}"
    )
    if kind == "layers":
        add("--provider", action="append",
            help=f"{fused}; default: the baselines (on a CPU without timm and "
            "compile-max) and every fused backend")  # fmt: skip
        add("--batch", action="append", type=count, help="default: 8 on CPU, 256 on CUDA")
        add("--network", action="append", help="network of workloads.json (repeatable), or all")
        add("--layer", action="append", default=[], metavar="CxHxW", help="only this shape")
        add("--neighbours", action="store_true", help="with the pointwise steps before and after")
        add("--full", action="store_true", help="all networks, fp32 and bf16, batches 1, 8, 32")
        add("--small", action="store_true", help="only the overhead of a tiny call, 2x64x4x4")
        add("--rounds", type=count, default=30, help="samples per provider at most (30)")
        add("--fresh-pages", action="store_true",
            help="on a CPU: let the allocator give freed memory back, as it does unless told "
            "otherwise, so that calls with large outputs wait for new pages")  # fmt: skip
        add("--compile-last", action="store_true",
            help="all without torch.compile, then once more with it while time lasts")  # fmt: skip
        add("--device-time", action="store_true",
            help="on CUDA: the time of the device alone, from graphs")  # fmt: skip
        add("--no-profile", action="store_true", help="do not count launches with the profiler")
        add("--leave-out", action="append", default=[], metavar="CASE/PROVIDER",
            help="what crashes or hangs; CASE/ is all of a case")  # fmt: skip
        add("--under-way", type=Path, metavar="FILE",
            help="says what runs, in the words of --leave-out; no tables, no plots")  # fmt: skip
        return parser
    add("--provider", action="append",
        help=f"{fused}; default: eager, halves and every fused backend")  # fmt: skip
    add("--axis", action="append", choices=AXES, help="default: all")
    add("--batch", type=count, help="where the axes meet (default: 8 on CPU, 64 on CUDA)")
    add("--channels", type=count, default=256, help="where the axes meet (256)")
    add("--side", type=count, default=14, help="height and width where the axes meet (14)")
    add("--hidden", type=count, default=16, help="where the axes meet (16)")
    add("--points", type=count, default=0, help="at most so many per axis (default: all)")
    add("--full", action="store_true", help="torch.compile too, no limit of time")
    return parser


def without_option(command: str, option: str) -> str:
    """A command without an option and its value."""
    kept, skip = [], False
    for word in shlex.split(command):
        if skip or word == option or word.startswith(f"{option}="):
            skip = not skip and word == option
            continue
        kept.append(word)
    return shlex.join(kept)


def _command(kind: str, argv: Sequence[str]) -> str:
    """The command as typed, without what changes no figure and names local paths."""
    command = shlex.join(["python", "-m", "benchmarks", kind, *argv])
    for option in ("--out", "--record", "--leave-out", "--under-way"):
        command = without_option(command, option)
    return command


def parse(kind: str, argv: Sequence[str]) -> LayerOptions | SweepOptions | ModelOptions:
    """Options from the command line; exits with a message on anything unknown."""
    parser = _parser(kind)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, list):  # what is named twice is measured once
            setattr(args, name, list(dict.fromkeys(value)))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"device: torch {torch.__version__} finds no CUDA device here")
    budget = args.budget
    if budget is None:
        budget = 0.0 if args.full else 280.0 if kind == "models" else 180.0
    common = {
        "device": device,
        "modes": args.mode or [FORWARD, TRAINING],
        "threads": args.threads or torch.get_num_threads(),
        "budget": budget,
        "seed": args.seed,
        "out": args.out,
        "record": args.record,
        "command": _command(kind, argv),
    }
    if kind == "models":
        return _models(args, common)
    allowed = (*BASELINES, *COMPOSED, *FUSED, IN_PLACE, *STRATEGIES, *PLAIN)
    if unknown := [name for name in args.provider or [] if name not in allowed]:
        parser.error(f"provider: unknown {unknown[0]!r}; known: {', '.join(allowed)}")
    return _layers(parser, args, common) if kind == "layers" else _sweep(args, common)


def _layers(
    parser: argparse.ArgumentParser, args: argparse.Namespace, common: dict[str, Any]
) -> LayerOptions:
    cuda = common["device"].type == "cuda"
    known = load_networks(neighbours=args.neighbours)
    names = args.network or (["all"] if args.full or args.layer else DEFAULT_NETWORKS)
    if "all" in names:  # the default ones first, because the time may be up
        names = dict.fromkeys([*DEFAULT_NETWORKS, *known])
    try:
        networks = select(known, names, args.layer)
    except ValueError as error:
        parser.error(str(error))
    return LayerOptions(
        **common,
        networks=networks,
        dtypes=args.dtype or (["fp32", "bf16"] if args.full else ["bf16" if cuda else "fp32"]),
        layouts=args.layout or list(LAYOUTS),
        batches=args.batch or ([1, 8, 32] if args.full else [256 if cuda else 8]),
        providers=args.provider
        or [n for n in (*BASELINES, *FUSED) if cuda or args.full or n not in GPU_BASELINES],
        neighbours=args.neighbours,
        # a selection of layers is somebody looking at those layers
        small=args.small or not (args.layer or args.network),
        layers=not args.small,
        rounds=args.rounds,
        compile_last=args.compile_last,
        fresh_pages=args.fresh_pages,
        device_time=args.device_time,
        profile=not args.no_profile,
        left_out=frozenset(args.leave_out),
        under_way=args.under_way,
    )


def _sweep(args: argparse.Namespace, common: dict[str, Any]) -> SweepOptions:
    cuda = common["device"].type == "cuda"
    batch = args.batch or (64 if cuda else 8)
    base = {"batch": batch, "channels": args.channels, "side": args.side, "hidden": args.hidden}
    wanted = ("eager-conv", "eager-linear", *(("compile",) if args.full else ()))
    baselines = [name for name in BASELINES if name in wanted]
    strategies = STRATEGIES if cuda else ()
    return SweepOptions(
        **common,
        dtypes=args.dtype or ["bf16" if cuda else "fp32"],
        layouts=args.layout or list(LAYOUTS),
        batches=[batch],
        providers=args.provider or [*baselines, *COMPOSED, *FUSED, *strategies],
        axes=args.axis or list(AXES),
        base=base,
        points=args.points,
    )


def _models(args: argparse.Namespace, common: dict[str, Any]) -> ModelOptions:
    cuda = common["device"].type == "cuda"
    names = args.network or [n for n in NETWORKS if args.full or n not in FULL_ONLY]
    return ModelOptions(
        **common,
        specs=[NETWORKS[name] for name in dict.fromkeys(names)],
        size=args.size or (None if cuda or args.full else 160),
        dtypes=args.dtype
        or (["bf16", AMP] if cuda and args.full else ["bf16" if cuda else "fp32"]),
        layouts=args.layout or (list(LAYOUTS) if cuda or args.full else ["contiguous"]),
        batches=args.batch or [],
        compile_all=cuda or args.full or bool(args.provider),
        providers=args.provider
        or [name for name in VARIANTS if args.full or name != COMPILE_WITHOUT],
    )
