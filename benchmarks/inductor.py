"""The public op and its decomposition in Inductor: ``python -m benchmarks.inductor``.

An exported block, alone and between steps of a network that Inductor may fuse with what the op is
decomposed into, compiled again without gradients in three ways: with the op, decomposed, and as
``autotune_in_inductor`` has Inductor choose under ``max_autotune``. The three run in turn; the
table has medians, how many times as long as the op the decomposition takes, and how many cores
other processes kept busy; in brackets 95 % intervals.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import senet_kernels
from senet_kernels import FusedSEBlock

from . import stats
from .providers import Call
from .timing import CpuTimer, OtherLoad, Rounds, keep_freed_memory, measure

#: Batch, channels, positions.
SHAPES = ("2x64x4x4", "8x256x14x14", "8x672x7x7", "8x1024x14x14", "8x256x56x56")
OP, DECOMPOSED, CHOSEN = "op", "decomposed", "chosen"


def _networks(channels: int) -> dict[str, nn.Module]:
    """What is compiled, by name."""
    torch.manual_seed(0)
    block = FusedSEBlock(channels, reduction=16 if channels > 64 else 4)
    return {"alone": block, "between SiLU and ReLU": nn.Sequential(nn.SiLU(), block, nn.ReLU())}


def _decomposed(program: Any) -> Any:
    from torch._decomp import get_decompositions

    table = torch.export.default_decompositions()
    table.update(get_decompositions([torch.ops.senet_kernels.squeeze_excite]))
    return program.run_decompositions(table)


def _compiled(model: nn.Module, x: Tensor) -> tuple[dict[str, Call], bool]:
    """The three ways to run an exported model; and whether Inductor chose the op."""
    from torch._inductor.utils import run_and_get_code

    program = torch.export.export(model, (x,))
    programs = {OP: program, DECOMPOSED: _decomposed(program), CHOSEN: program}
    calls: dict[str, Call] = {}
    chose_op = False
    for way, made in programs.items():
        torch._dynamo.reset()
        options: dict[str, Any] = {"max_autotune": way == CHOSEN, "fx_graph_cache": False}
        run: Callable[[Tensor], Tensor] = torch.compile(made.module(), options=options)
        y, code = run_and_get_code(run, x)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
        if way == CHOSEN:
            chose_op = "torch.ops.senet_kernels.squeeze_excite" in "".join(code)
        calls[way] = lambda _, run=run: run(x)  # type: ignore[misc]
    return calls, chose_op


def _interval(summary: dict[str, float | int]) -> str:
    median, low, high = (summary[f"{name}_us"] for name in ("median", "ci_low", "ci_high"))
    return f"{median:.0f} ({low:.0f} to {high:.0f})"


def _rows(shape: str, layout: torch.memory_format, rounds: Rounds) -> list[str]:
    """The lines of one shape."""
    sizes = [int(size) for size in shape.split("x")]
    x = torch.randn(sizes).to(memory_format=layout)
    lines = []
    for name, model in _networks(sizes[1]).items():
        calls, chose_op = _compiled(model.eval(), x)
        load = OtherLoad()
        samples = measure(CpuTimer(), calls, rounds, Random(0)).seconds
        busy = load.read() or 0.0
        ratio = stats.speedup(samples[DECOMPOSED], samples[OP])
        times = [_interval(stats.summarise(samples[way])) for way in (OP, DECOMPOSED, CHOSEN)]
        chosen = OP if chose_op else DECOMPOSED
        compared = f"{ratio['ratio']:.2f} ({ratio['ci_low']:.2f} to {ratio['ci_high']:.2f})"
        cells = [shape, name, *times[:2], compared, f"{chosen}: {times[2]}", f"{busy:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inductor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="NxCxHxW")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    senet_kernels.autotune_in_inductor()
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    print("| shape | block | op µs | decomposed µs | decomposed / op | chosen µs | busy cores |")
    print("|---|---|---|---|---|---|---|")
    rounds = Rounds(least=5, most=options.rounds)
    with torch.no_grad():
        for shape in options.shape:
            print("\n".join(_rows(shape, layout, rounds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
