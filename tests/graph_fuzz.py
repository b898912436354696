"""Random programs around excitations, with aliases and in-place operators: the rewritten program
against the original. ``python tests/graph_fuzz.py --programs 5000`` runs many.

Programs run in batches, each batch one graph, because Dynamo's overhead is per graph."""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from graph_compare import State, difference, rewritten, tensors
from senet_kernels.fuse import GraphReport

C, R = 4, 3
SHAPE = (3, C, 4, 5)

_SQUEEZES = (
    "{x}.mean((2, 3), keepdim=True)", "F.adaptive_avg_pool2d({x}, 1)",
    "{x}.flatten(2).mean(2)[:, :, None, None]", "{x}.mean(3, keepdim=True).mean(2, keepdim=True)",
    "{x}.mean(3).mean(2).view(3, 4, 1, 1)", "torch.mean({x}, dim=[-1, -2], keepdim=True)",
    "{x}.sum((2, 3), keepdim=True) / 20", "F.avg_pool2d({x}, {x}.shape[2:])",
    "{x}.view(3, 4, -1).mean(-1, keepdim=True).unsqueeze(-1)",
)  # fmt: skip
_NEAR_SQUEEZES = (
    "{x}.detach().mean((2, 3), keepdim=True)", "{x}.amax((2, 3), keepdim=True)",
    "{x}.sum((2, 3), keepdim=True) / 19", "{x}.mean((0, 2, 3), keepdim=True).expand(3, 4, 1, 1)",
    "{x}.data.mean((2, 3), keepdim=True)",
)  # fmt: skip
_ACTIVATIONS = (
    "{h} = F.relu({h})", "{h}.relu_()", "{h} = F.silu({h}, inplace=True)",
    "{h} = {h} * {h}.sigmoid()", "{h} = F.relu_({h})", "_ = F.relu({h}, inplace=True)",
    "{h} = F.gelu({h})", "{h} = F.hardswish({h})", "{h} = F.leaky_relu({h}, 0.01)",
    "{h} = F.leaky_relu({h}, 0.3)", "{h} = F.dropout({h}, 0.5, False)", "{h} = {h}.tanh()",
    "{h}.clamp_(0, 1)",
)  # fmt: skip
_GATES = (
    "{g} = {g}.sigmoid()", "{g}.sigmoid_()", "{g} = F.hardsigmoid({g})", "{g} = {g}.tanh()",
    "{g} = F.relu6({g} + 3.0) / 6.0", "{g} = F.relu6({g} + 3.0) * (1 / 6)",
    "{g} = {g}.add_(3.0).clamp_(0, 6).div_(6.0)", "{g} = (0.2 * {g} + 0.5).clamp(0, 1)",
    "{g} = F.hardtanh({g}, 0, 6)", "{g} = {g}.relu()", "pass", "{g} = {g}.sigmoid() * 2",
    "{g} = torch.sigmoid({g})", "{g} = F.relu6({g}.add_(3.0), inplace=True).mul_(1 / 6)",
)  # fmt: skip
_PRODUCTS = (
    "{y} = {x} * {g}", "{y} = {g} * {x}", "{y} = torch.mul({x}, {g})", "{y} = {x}.mul_({g})",
    "{y} = {x} * {g}.expand_as({x})", "{x} *= {g}; {y} = {x}",
    "{y} = {x}.mul({g}.expand({x}.shape))",
)  # fmt: skip
_NOISE = (
    "{m}.add_({q} * 0.5)", "{m} += {q}", "{y} = F.relu({m})", "{y} = F.relu({m}, inplace=True)",
    "{y} = {m}.view({m}.shape)", "{y} = {m} + {q}", "{y} = p.bn({m})", "{m}[:, :1].mul_(2.0)",
    "{y} = {m}.detach()", "{y} = F.silu(p.bn({m}))", "p.w.mul_(0.9)", "{y} = {m} * {m}.sigmoid()",
    "{y} = {m} + {q}; {y}.relu_()", "{m}.data.mul_(0.9)", "{y} = {m}.data", "{y} = {m}.clone()",
    "{y} = F.relu(p.bn({m}), inplace=True)", "{y} = {m} * p.scale + p.shift",
    "{y} = F.hardswish({m} * p.scale + p.shift)", "{m}[0] = 0", "{y} = torch.relu({m} + {q})",
    "p.a.weight.data.mul_(0.9)", "{y} = F.dropout({m}, 0.5, False)", "{y} = {m}.flip(0)",
    "{y} = torch.add({m}, {q}, alpha=2)", "{y} = {m}.add({q}).relu()", "{q} += {m}; {y} = {q}",
    "{y} = p.bn({m}).relu_().mul_(1.0)",
)  # fmt: skip


def source(seed: int) -> str:
    """A program: the body of ``f(p, x, r)``."""
    r = random.Random(seed)
    lines: list[str] = []
    maps, vectors, count = ["x", "r"], [], 0

    def new(letter: str) -> str:
        nonlocal count
        count += 1
        return f"{letter}{count}"

    def noise(chance: float = 1.0) -> None:
        if r.random() >= chance:
            return
        if vectors and r.random() < 0.15:
            v = r.choice(vectors)
            lines.append(r.choice((f"{v}.mul_(0.5)", f"{v} = {v} + 0.1", f"{v}.data.add_(0.1)")))
            return
        y, statement = new("m"), r.choice(_NOISE)
        lines.append(statement.format(m=r.choice(maps[-4:]), q=r.choice(maps), y=y))
        if "{y}" in statement:
            maps.append(y)

    def excite() -> None:
        x, z, h, g, y = r.choice(maps[-3:]), new("z"), new("h"), new("g"), new("y")
        squeeze = r.choice(_SQUEEZES if r.random() < 0.9 else _NEAR_SQUEEZES)
        lines.append(f"{z} = {squeeze.format(x=x)}")
        vectors.append(z)
        noise(0.15)
        k = r.random()
        if k < 0.75:
            lines.append(f"{h} = p.a({z})")
            lines.append(r.choice(_ACTIVATIONS).format(h=h))
            noise(0.1)
            lines.append(f"{g} = p.b({h})")
        elif k < 0.85:
            lines.append(f"{g} = p.c({z})")
        elif k < 0.95:
            lines.append(f"{h} = F.relu(F.linear({z}.flatten(1), p.a.weight.flatten(1)))")
            lines.append(f"{g} = F.linear({h}, p.b.weight[:, :, 0, 0], p.b.bias).view(3, 4, 1, 1)")
        else:
            lines.append(f"{h} = F.relu(p.a({z}))")
            lines.append(f"{g}, {g}s = p.d({h}).chunk(2, 1)")
        lines.append(r.choice(_GATES).format(g=g))
        vectors.append(g)
        noise(0.15)
        other = x if r.random() < 0.92 else r.choice(maps)
        lines.append(r.choice(_PRODUCTS).format(x=other, g=g, y=y))
        if k >= 0.95:
            lines.append(f"{y} = {y} + {g}s")
        maps.append(y)
        vectors[:] = vectors[-1:] if r.random() < 0.2 else []

    for _ in range(r.randint(1, 3)):
        for _ in range(r.randint(0, 2)):
            noise()
        excite()
        for _ in range(r.randint(0, 2)):
            noise()
    if r.random() < 0.6:
        lines[:0] = ["x = x * 1.0", "r = r * 1.0"]
    kept = r.sample(maps + vectors, min(2, len(maps + vectors)))
    lines.append(f"return {', '.join([maps[-1], *kept])}")
    return "def f(p, x, r):\n" + "".join(f"    {line}\n" for line in lines)


_STEPS = ("residual", "after", "before", "BatchNorm", "affine", "one layer", "shift")


class Program(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(C, R, 1), nn.Conv2d(R, C, 1), nn.Conv2d(C, C, 1)
        self.d, self.bn = nn.Conv2d(R, 2 * C, 1), nn.BatchNorm2d(C)
        self.w = nn.Parameter(torch.ones(3), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(1, C, 1, 1) + 0.5)
        self.shift = nn.Parameter(torch.randn(1, C, 1, 1))
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)
        nn.init.normal_(self.bn.bias)
        scope: dict[str, Any] = {"F": F, "torch": torch}
        exec(compile(source(seed), f"<program {seed}>", "exec"), scope)
        self.run = scope["f"]

    def forward(self, x: Tensor, r: Tensor) -> Any:
        return self.run(self, x, r)

    def __deepcopy__(self, memo: Any) -> Program:
        other = Program.__new__(Program)
        memo[id(self)] = other
        other.__dict__.update(
            {k: copy.deepcopy(v, memo) for k, v in vars(self).items() if k != "run"}
        )
        other.run = self.run
        return other


class Batch(nn.Module):
    def __init__(self, programs: list[Program]) -> None:
        super().__init__()
        self.programs = nn.ModuleList(programs)

    def forward(self, inputs: list[Tensor]) -> list[Any]:
        pairs = zip(inputs[::2], inputs[1::2], strict=True)
        return [program(x, r) for program, (x, r) in zip(self.programs, pairs, strict=True)]


def observe(call: Any, batch: Batch, grad: bool) -> State:
    """Everything a batch leaves behind; raises what eager raises."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(SHAPE, dtype=torch.float64, generator=generator).requires_grad_(grad)
        for _ in range(2 * len(batch.programs))
    ]
    with torch.set_grad_enabled(grad):
        given = [leaf * 1.0 for leaf in leaves]
        outputs = list(tensors(call(given)))
    state = {f"output {i}": y for i, y in enumerate(outputs)}
    state |= {f"input {i}": x for i, x in enumerate(given)}
    if grad and any(y.requires_grad for y in outputs):
        loss = sum(
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
            for y in outputs if y.requires_grad
        )  # fmt: skip
        wanted = [*leaves, *(p for p in batch.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        state |= {f"gradient {i}": g for i, g in enumerate(gradients) if g is not None}
    state |= {f"state {k}": v for k, v in batch.state_dict().items()}
    return {k: v.detach().clone() for k, v in state.items()}


def run(seeds: range, counts: Counter[str]) -> list[str]:
    """Compare one batch; returns what is wrong."""
    grad, training = seeds[0] % 4 != 3, (seeds[0] // len(seeds)) % 2 == 0
    programs, kept = [], []
    for seed in seeds:
        torch.manual_seed(seed)
        program = Program(seed).double().train(training)
        trial = Batch([copy.deepcopy(program)])
        try:
            observe(trial, trial, grad)
        except RuntimeError:
            counts["raise in eager"] += 1
            continue
        programs.append(program)
        kept.append(seed)
    if not programs:
        return []
    norm = training and (seeds[0] // len(seeds)) % 4 == 0  # as under Inductor
    wrong, reports = _compare(programs, grad, norm)
    if wrong is not None and len(programs) == 1 and _dynamo_differs(programs, grad):
        counts["Dynamo alone differs"] += 1
        return []
    counts["programs"] += len(programs)
    for report in reports:
        counts["fused"] += len(report.fused)
        counts["refused"] += len(report.refused)
        for finding in report.fused:
            for step in (
                "residual",
                "after",
                "before",
                "BatchNorm",
                "affine",
                "one layer",
                "shift",
            ):
                counts[step] += step in finding.note
    if wrong is None:
        return []
    if len(programs) == 1:
        return [f"program {kept[0]}, grad {grad}, training {training}: {wrong}\n{source(kept[0])}"]
    found = []
    for seed, program in zip(kept, programs, strict=True):
        one, _ = _compare([program], grad, norm)
        if one is not None and _dynamo_differs([program], grad):
            counts["Dynamo alone differs"] += 1
            wrong = None
        elif one is not None:
            found.append(f"program {seed}, grad {grad}, training {training}: {one}\n{source(seed)}")
    return found or ([] if wrong is None else [f"programs {kept} together: {wrong}"])


def _dynamo_differs(programs: list[Program], grad: bool) -> bool:
    """Whether the programs compute something else already in Dynamo's graph as it was."""
    torch._dynamo.reset()
    plain, other = Batch(copy.deepcopy(programs)), Batch(copy.deepcopy(programs))
    expected = observe(plain, plain, grad)
    try:
        got = observe(torch.compile(other, backend="eager"), other, grad)
    except RuntimeError:
        return True
    return expected.keys() != got.keys() or not difference(expected, got)[0] < 1e-6


def _compare(
    programs: list[Program], grad: bool, norm: bool
) -> tuple[str | None, list[GraphReport]]:
    torch._dynamo.reset()
    plain, other = Batch(copy.deepcopy(programs)), Batch(copy.deepcopy(programs))
    reports: list[GraphReport] = []
    expected = observe(plain, plain, grad)
    try:
        got = observe(rewritten(other, reports, norm_in_training=norm), other, grad)
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:500]}", reports
    if expected.keys() != got.keys():
        return f"other results: {expected.keys() ^ got.keys()}", reports
    worst, where = difference(expected, got)
    # The derivative of F.hardsigmoid has a 1/6 in float32.
    return None if worst < 1e-6 else f"{where} is {worst:.1e} off", reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=500, help="how many (default 500)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--batch", type=int, default=20, help="programs per graph (default 20)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for first in range(args.first, args.first + args.programs, args.batch):
        wrong += run(range(first, first + args.batch), counts)
    print("\n".join(wrong))
    print(dict(counts), "wrong:", len(wrong))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
