"""``python -m senet_kernels``: what runs here, whether it is right, and what it brings a model."""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from . import __version__, _command_line, parity, timing, trial, trust, workloads
from ._command_line import command
from .backends.triton.runtime import architecture
from .convert import fuse_se_blocks
from .dispatch import backends
from .recognise import one_recogniser
from .selftest import run as selftest


def _report() -> int:
    """Versions, devices, backends and the feature table."""
    print(f"senet_kernels {__version__}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            memory = p.total_memory / 2**30
            print(f"GPU {i}: {p.name}, {architecture(torch.device('cuda', i))}, {memory:.0f} GiB")
    else:
        print("GPU: none that torch can use")
    print()
    print(backends())
    return 0


def _selftest() -> int:
    """Every backend that runs here against the reference in float64."""
    start, failures, count = time.perf_counter(), 0, 0
    for result in selftest():
        count += 1
        failures += not result.ok
        print(result, flush=True)
    verdict = f"{failures} of {count} failed" if failures else f"all {count} passed"
    print(f"{verdict}, {time.perf_counter() - start:.1f} s")
    return 1 if failures else 0


def _fuse(
    name: str, size: int | None, batch: int, device: str, seconds: float, neighbours: bool,
    verbose: bool,
) -> int:  # fmt: skip
    """What fuse_se_blocks replaces in a model, how equal the results are, and the time of both."""
    torch.manual_seed(0)
    crowded = timing.leave_cores() if torch.device(device).type == "cpu" else None
    try:
        model = trial.make(name, device)
        x, spatial = trial.find_input(model, batch, size, device)
    except trial.TrialError as error:
        sys.exit(f"model: {name!r} {error}")
    parity.wake(model)
    fuse = partial(fuse_se_blocks, neighbours=neighbours)
    report = fuse(model)
    print(report.details() if verbose else report, flush=True)
    if not report.replaced:
        if not report.refused:
            print("senet_kernels.add_se_blocks(model) puts SE blocks into ResNets and ResNeXts")
        return 1
    if crowded is not None:
        print(crowded, flush=True)
    _progress("comparing the blocks")
    if not _is_right(model, x, [entry.name for entry in report.replaced], fuse):
        return 1
    what = f"batch {batch}, {'x'.join(map(str, spatial)) or 'no positions'}, {device}"
    told, left = [], 2 * seconds
    # The longer one first: what it takes more than its half, the other one takes less.
    for title, step in (("training step", timing.train), ("inference", timing.infer)):
        begin, own = time.perf_counter(), max(0.0, min(seconds, left))
        progress = partial(_progress_of, title)
        try:
            found = timing.times(model, x, step, fuse, own, progress, max(0.0, left - own))
            told.append(_of_times(title, found, what))
        except Exception as error:  # as a norm's of one image of one position, in training
            told.append(f"{title}: does not run: {type(error).__name__}: {error}")
        left -= time.perf_counter() - begin
        _progress("")
    print("\n".join(reversed(told)), flush=True)
    return 0


def _progress(text: str) -> None:
    """Show what is being done, on a line that the next text replaces; on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _progress_of(title: str, done: str) -> None:
    _progress(f"{title}: {done}")


def _of_times(title: str, found: timing.Times, what: str) -> str:
    busy = found.cores_busy_elsewhere
    interval = f"95 % interval {found.low:.2f} to {found.high:.2f}, {found.rounds} rounds"
    if found.rounds == 1:
        interval = "1 round, no interval: more --seconds give one"
    elif timing.is_busy(busy):
        interval = f"interval {found.low:.2f} to {found.high:.2f}, {found.rounds} rounds"
    text = (
        f"{title}: {1e3 * found.original:.2f} ms before, {1e3 * found.fused:.2f} ms after, "
        f"{found.ratio:.2f}x, {interval} ({what})"
    )
    if timing.is_busy(busy):
        text += f"\n{title}: other processes used {busy:.1f} cores meanwhile: do not trust this"
    return text


def _is_right(model: nn.Module, x: Tensor, names: list[str], fuse: parity.Fuse) -> bool:
    """Whether blocks and network give the same as before; says how equal they are."""
    count, found = parity.blocks(model, x, names, fuse)
    _progress("")
    wrong = [apart for apart in found if not apart.is_right]
    if found:
        largest = max((a.apart[0] for a in found), key=lambda d: (math.isnan(d), d))
        print(
            f"blocks: largest difference {largest:.1e} of the largest value "
            f"({count} of {len(names)} compared, with gradients, in eval and training mode)"
        )
    else:
        print(f"blocks: 0 of {len(names)} compared: the model does not call them as modules")
    for apart in wrong[:3]:
        print(
            f"blocks: WRONG: {apart.block or 'the model'}, {apart.what}: {apart.apart[0]:.1e} of "
            f"the largest value, {apart.apart[1]:.1e} in the mean; expected at most "
            f"{apart.limit.largest:.1e}, {apart.limit.mean:.1e}"
        )
    is_right = not wrong
    for training, title in ((False, "output"), (True, "output in training mode")):
        outputs = parity.outputs(model, x, names, fuse, training=training)
        if outputs is None:  # the line of the training step says why
            continue
        if outputs.is_right and outputs.nothing is not None:
            print(f"{title}: {outputs.nothing}")
            continue
        print(f"{title}: largest difference {outputs.apart:.1e} of the largest value")
        if not outputs.is_right:
            is_right = False
            reason = outputs.failure or f"expected a difference of at most {outputs.tolerance:.1e}"
            print(f"{title}: WRONG: {reason}; no times of that")
        elif outputs.tolerance > outputs.usual:
            print(f"{title}: rounding alone makes a difference of up to {outputs.noise:.1e} there")
    return is_right


def _device(text: str) -> str:
    if text.partition(":")[0] not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # no such device, or not in this build of torch
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {reason}") from None
    return text


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _command_line.Parser(prog="python -m senet_kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"senet_kernels {__version__}")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("report", help="versions, devices, backends and features (the default)")
    commands.add_parser("selftest", help="every backend that runs here against the reference")
    fuse = commands.add_parser("fuse", help="what fuse_se_blocks does to a model: parity, time")
    fuse.add_argument("model", help="timm:NAME, torchvision:NAME or MODULE:CALLABLE")
    count, duration = _command_line.count, _command_line.seconds
    fuse.add_argument(
        "--size", type=count, default=None,
        help="positions of the input per spatial dimension (one: 1024, two: 224, three: 32)",
    )  # fmt: skip
    fuse.add_argument("--batch", type=count, default=8, help="images (8)")
    fuse.add_argument(
        "--seconds", type=duration, default=15,
        help="for each of the two timings, about (15); three rounds of a training step may take "
        "some of the other's",
    )  # fmt: skip
    fuse.add_argument("--verbose", action="store_true", help="a line for each block")
    fuse.add_argument("--neighbours", action="store_true", help="the steps around the blocks too")
    verify = commands.add_parser(
        "verify", help="prove the GPU kernels for the layers of networks on this card"
    )
    verify.add_argument("--batch", type=count, default=32, help="images (32)")
    verify.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16",
        help="of the images and the parameters (bfloat16)",
    )  # fmt: skip
    networks = list(dict.fromkeys(layer.network for layer in workloads.LAYERS))
    verify.add_argument("--network", choices=networks, default=None, help="one alone (all)")
    verify.add_argument(
        "--compiled", action="store_true",
        help="measure beside what torch.compile makes of PyTorch's operators too: seconds for each",
    )  # fmt: skip
    verify.add_argument("--forget", action="store_true", help="drop the verdicts on disk first")
    for command_of_device in (fuse, verify):
        command_of_device.add_argument(
            "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu",
            help="cpu, cuda or cuda:N (cuda where there is one)",
        )  # fmt: skip
    args = parser.parse_args(argv)
    if args.command == "verify":
        if args.forget:
            print(f"{trust.forget()} verdicts dropped")
        dtype = getattr(torch, args.dtype)
        return workloads.run(args.device, dtype, args.batch, args.compiled, args.network)
    if args.command == "fuse":
        with one_recogniser():  # the model is fused many times
            return _fuse(
                args.model, args.size, args.batch, args.device, args.seconds, args.neighbours,
                args.verbose,
            )  # fmt: skip
    return _selftest() if args.command == "selftest" else _report()


if __name__ == "__main__":
    sys.exit(main())
