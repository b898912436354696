"""``python -m senet_kernels``: what runs here, whether it is right, and what it brings a model."""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, _command_line
from ._command_line import command
from ._libraries import load
from .api import explain
from .backends.triton.operands import architecture
from .convert import fuse_se_blocks, unfuse_se_blocks
from .dispatch import backends
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


def _fuse(name: str, size: int, batch: int, device: str, seconds: float, neighbours: bool) -> int:
    """What fuse_se_blocks replaces in a model, how equal the outputs are, and the time of both."""
    model = _load(name).to(device).eval()
    _wake(model)
    shape = [batch, _input_channels(model), size, size]
    try:
        x = torch.randn(shape, device=device)
        with torch.no_grad():
            before = _first_tensor(model(x))
    except Exception as error:  # of a stranger's model
        sys.exit(f"model: {name!r} does not run on {shape}: {type(error).__name__}: {error}")
    fuse = partial(fuse_se_blocks, neighbours=neighbours)
    report = fuse(model)
    print(report)
    if not report.replaced:
        return 1
    print(_backend_on(device))
    with torch.no_grad():
        after = _first_tensor(model(x))
    difference, tolerance = _difference(before, after), _tolerance(before)
    print(f"output: largest difference {difference:.1e} of the largest value")
    if not difference <= tolerance:
        print(f"output: WRONG: expected a difference of at most {tolerance:.1e}; no times of that")
        return 1
    for title, step in (("inference", _infer), ("training step", _train)):
        try:
            fused, original = _interleaved(model, x, step, fuse, device, seconds)
        except Exception as error:  # as a norm's of one image of one position, in training
            print(f"{title}: does not run: {type(error).__name__}: {error}")
            continue
        print(
            f"{title}: {1e3 * original:.2f} ms before, {1e3 * fused:.2f} ms after, "
            f"{original / fused:.2f}x (batch {batch}, {size}x{size}, {device})"
        )
    return 0


def _difference(before: Tensor, after: Tensor) -> float:
    """The largest one over the largest finite value; where both have the same infinity, or NaN,
    there is none. NaN or infinity where only one has them."""
    if before.shape != after.shape:
        return math.inf
    before, after = before.double(), after.double()
    same = (before == after) | (before.isnan() & after.isnan())
    difference = (after - before).abs().masked_fill(same, 0)
    scale = before.nan_to_num(0, 0, 0).abs()
    return (difference.amax() / scale.amax().clamp_min(1e-30)).item()


def _tolerance(y: Tensor) -> float:
    """Of a whole network's output. On a GPU convolutions that are not ours round to TF32."""
    exact = 1e-2 if y.is_cuda and torch.backends.cudnn.allow_tf32 else 1e-3
    return {torch.bfloat16: 3e-2, torch.float16: 1e-2}.get(y.dtype, exact)


def _backend_on(device: str) -> str:
    """What calls there run on, and, where that is the fallback, why no kernel takes them."""
    w = torch.ones(8, 8, device=device)
    answer = explain(torch.ones(1, 8, 2, 2, device=device), w, None, w, None)
    lines = [f"runs on: {answer.backend}"]
    if answer.backend == "fallback":
        lines += [f"not on {name}: {reason}" for name, reason in answer.passed_over]
    return "\n".join(lines)


def _load(name: str) -> nn.Module:
    source, _, rest = name.partition(":")
    if not rest:
        sys.exit(f"model: expected timm:NAME, torchvision:NAME or MODULE:CALLABLE, got {name!r}")
    try:
        if source == "timm":
            model: Any = load("timm").create_model(rest)
        elif source == "torchvision":
            model = load("torchvision.models").get_model(rest, weights=None)
        else:
            model = getattr(load(source), rest)()
    except Exception as error:  # whatever a stranger's code raises
        sys.exit(f"model: {name!r} cannot be made: {type(error).__name__}: {error}")
    if not isinstance(model, nn.Module):
        sys.exit(f"model: expected {name!r} to give a torch.nn.Module, got {type(model).__name__}")
    return model


def _wake(model: nn.Module) -> None:
    """Norms that start at zero (timm's and torchvision's ``zero_init_last``) hide from the output
    whatever comes before them, a wrong block too: one half instead."""
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        weight = getattr(module, "weight", None)
        if weight is not None and not nn.parameter.is_lazy(weight) and not weight.any():
            nn.init.constant_(weight, 0.5)


def _input_channels(model: nn.Module) -> int:
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    first = next(convolutions, None)
    return 3 if first is None else first.in_channels


def _first_tensor(y: Any) -> Tensor:
    while not isinstance(y, Tensor):
        y = next(iter(y.values())) if isinstance(y, dict) else y[0]
    return y


def _infer(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def _train(model: nn.Module, x: Tensor) -> None:
    _first_tensor(model(x)).sum().backward()
    model.zero_grad(set_to_none=True)


def _interleaved(
    model: nn.Module,
    x: Tensor,
    step: Callable[[nn.Module, Tensor], None],
    fuse: Callable[[nn.Module], object],
    device: str,
    seconds: float,
) -> tuple[float, float]:
    """Median seconds of a step, fused and original, turn by turn."""
    fused: list[float] = []
    original: list[float] = []
    start = time.perf_counter()
    while len(fused) < 3 or time.perf_counter() - start < seconds:
        for times, switch in ((original, unfuse_se_blocks), (fused, fuse)):
            switch(model)
            model.train(step is _train)
            step(model, x)
            _wait(device)
            begin = time.perf_counter()
            step(model, x)
            _wait(device)
            times.append(time.perf_counter() - begin)
    return statistics.median(fused), statistics.median(original)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


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
    parser = argparse.ArgumentParser(prog="python -m senet_kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"senet_kernels {__version__}")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("report", help="versions, devices, backends and features (the default)")
    commands.add_parser("selftest", help="every backend that runs here against the reference")
    fuse = commands.add_parser("fuse", help="what fuse_se_blocks does to a model: parity, time")
    fuse.add_argument("model", help="timm:NAME, torchvision:NAME or MODULE:CALLABLE")
    count, duration = _command_line.count, _command_line.seconds
    fuse.add_argument("--size", type=count, default=224, help="of the square input (224)")
    fuse.add_argument("--batch", type=count, default=8, help="images (8)")
    fuse.add_argument("--seconds", type=duration, default=10, help="per timing (10)")
    fuse.add_argument("--neighbours", action="store_true", help="the steps around the blocks too")
    fuse.add_argument(
        "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N (cuda where there is one)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.command == "fuse":
        return _fuse(args.model, args.size, args.batch, args.device, args.seconds, args.neighbours)
    return _selftest() if args.command == "selftest" else _report()


if __name__ == "__main__":
    sys.exit(main())
