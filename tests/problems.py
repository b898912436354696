"""Inputs of one call: shapes, layouts, values, and how to run it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

import oracle
from backend_cases import BackendCase, dtype_row
from senet_kernels import channel_scale, squeeze, squeeze_excite

TENSORS = (
    "x", "w1", "b1", "w2", "b2", "residual", "alpha", "beta", "affine_scale", "affine_shift",
)  # fmt: skip
# What stands for a function of the whole operation where a problem is about one half of it.
HALVES: dict[str, dict[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "squeeze": {squeeze_excite: squeeze, oracle.block: oracle.squeeze,
                oracle.eager_block: oracle.squeeze},
    "channel_scale": {squeeze_excite: channel_scale, oracle.block: oracle.channel_scale,
                      oracle.eager_block: oracle.channel_scale},
}  # fmt: skip
# The pointwise choices each part has.
_CHOICES = {
    "whole": ("activation", "gate", "before", "after"),
    "squeeze": ("before",),
    "channel_scale": ("gate", "before", "after"),
}
LAYOUTS = (
    "contiguous", "channels_last", "permuted", "sliced_space", "sliced_channels", "strided",
    "expanded_batch", "expanded_space", "misaligned", "misaligned_channels_last",
)  # fmt: skip
DENSE_LAYOUTS = ("contiguous", "channels_last", "permuted")


def channels_last(t: Tensor) -> Tensor:
    """A copy with channels innermost, for any number of spatial dimensions."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _shifted(t: Tensor) -> Tensor:
    """A copy of a contiguous tensor one element into its storage."""
    return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)


def _placed(t: Tensor, layout: str) -> Tensor:
    """``order=021,steps=112,offset=3,repeat=0``: the axes from the outermost to the innermost, how
    far apart neighbours along each are (1: no gap), the place of the first element, and the axes
    along which the first slice repeats. What lies between elements is NaN."""
    parts = {n: [int(c) for c in v] for n, _, v in (p.partition("=") for p in layout.split(","))}
    strides, reach = [0] * t.dim(), 1
    for axis in reversed(parts["order"]):
        if axis not in parts["repeat"]:
            strides[axis] = reach * parts["steps"][axis]
            reach = strides[axis] * max(1, t.shape[axis])
    offset = parts["offset"][0]
    gap = math.nan if t.is_floating_point() else torch.iinfo(t.dtype).min
    storage = torch.full((offset + reach,), gap, dtype=t.dtype, device=t.device)
    first = t
    for axis in parts["repeat"]:
        first = first.narrow(axis, 0, min(1, t.shape[axis]))
    storage.as_strided(first.shape, strides, offset).copy_(first)
    return storage.as_strided(t.shape, strides, offset)


def lay_out(t: Tensor, layout: str) -> Tensor:
    """A copy of ``t`` laid out so; the expanded layouts repeat its first slice, and windows have
    their values from the beginning of ``t``. Any strides: see ``_placed``."""
    t = t.contiguous()
    if "=" in layout:
        return _placed(t, layout)
    if layout == "windows":  # what unfold() leaves: each row begins one element after the last
        strides = list(t.stride())
        strides[-2:] = (1, 1)
        return t.clone().as_strided(t.shape, strides)
    if layout == "contiguous":
        return t.clone()
    if layout == "channels_last":
        return channels_last(t)
    if layout == "permuted":  # dense, with every stride the other way round
        back = tuple(reversed(range(t.dim())))
        return t.permute(back).contiguous().permute(back)
    if layout == "sliced_space":
        return torch.cat([t[..., :1], t, t[..., :1]], -1)[..., 1:-1]
    if layout == "sliced_channels":  # what split() and chunk() leave
        return torch.cat([t[:, :1], t, t], 1)[:, 1 : 1 + t.shape[1]]
    if layout == "strided":
        return t.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "expanded_batch":
        return t[:1].clone().expand_as(t)
    if layout == "expanded_space":
        return t[..., :1].clone().expand_as(t)
    if layout == "misaligned":
        return _shifted(t)
    if layout == "misaligned_channels_last":
        return _shifted(t.movedim(1, -1).contiguous()).movedim(-1, 1)
    raise ValueError(layout)


@dataclass(frozen=True)
class Spec:
    """What one call looks like; ``build`` makes its tensors. A half leaves out what it has not."""

    shape: tuple[int, ...] = (3, 16, 5, 7)  # B, C, *spatial
    hidden: int | None = 4  # None: a single layer
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    activation: str = "relu"
    gate: str = "sigmoid"
    before: str = "identity"
    after: str = "identity"
    residual: str | None = None  # its layout
    dy_layout: str = "contiguous"
    bias: bool = True
    weights: str = "matrix"  # conv: [R, C, 1, 1]; transposed: non-contiguous; nhwc: channels-last
    shift: bool = False
    weighted: bool = False
    affine: bool = False
    lengths: bool = False
    part: str = "whole"  # or a key of HALVES
    device: str = "cpu"
    seed: int = 0

    def __str__(self) -> str:
        def show(value: Any) -> str:
            if isinstance(value, tuple):
                return "x".join(map(str, value))
            return str(value).removeprefix("torch.")

        changed = [
            f"{f.name}={show(getattr(self, f.name))}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return ",".join(changed) or "default"

    @property
    def options(self) -> dict[str, str]:
        return {n: getattr(self, n) for n in _CHOICES[self.part]}

    def rows(self) -> list[str]:
        """The rows of the feature table this call needs."""
        optional = (
            (self.part != "whole", f"{self.part} alone"),
            (self.part == "whole" and self.hidden is None, "single layer (w1=None)"),
            (self.part == "whole" and self.hidden is not None, "two layers"),
            (self.shift, "scale-and-shift (w2 with 2C rows)"),
            (self.weighted, "alpha, beta"),
            (self.affine, "before_affine"),
            (self.lengths, "lengths"),
            (self.residual is not None, "residual"),
        )
        named = [f"{argument} {name}" for argument, name in self.options.items()]
        return [dtype_row(self.dtype), *named, *(row for wanted, row in optional if wanted)]

    def fits(self, backend: BackendCase) -> bool:
        return backend.takes(*self.rows())


@dataclass
class Problem:
    """The tensors of one call. Absent ones are None."""

    tensors: dict[str, Tensor | None]
    lengths: Tensor | None
    options: dict[str, str]
    dy: Tensor
    dtype: torch.dtype = field(default=torch.float32)
    part: str = "whole"

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the differentiable inputs that are there."""
        return tuple(n for n, t in self.tensors.items() if t is not None)

    def double(self) -> Problem:
        """The same values in float64, contiguous: over other strides torch's own sums are worse."""
        tensors = {
            n: None if t is None else t.double().contiguous() for n, t in self.tensors.items()
        }
        return replace(self, tensors=tensors, dy=self.dy.double().contiguous(), dtype=torch.float64)

    def call(
        self, fn: Callable[..., Tensor], tensors: dict[str, Any] | None = None, **extra: Any
    ) -> Tensor:
        """``fn`` with the signature of ``squeeze_excite`` on these inputs (or ``tensors``), or
        the half of it that the problem is about."""
        given = dict(self.tensors if tensors is None else tensors)
        u = given.pop("u", None)
        scale, shift = given.pop("affine_scale"), given.pop("affine_shift")
        extra |= {"before_affine": None if scale is None else (scale, shift), **self.options}
        x, *mlp = (given.pop(n) for n in ("x", "w1", "b1", "w2", "b2"))
        if self.part == "squeeze":
            return HALVES["squeeze"][fn](x, lengths=self.lengths, **extra)
        if self.part == "channel_scale":
            return HALVES["channel_scale"][fn](x, u, **given, **extra)
        return fn(x, *mlp, **given, lengths=self.lengths, **extra)

    def positional(self, options: int, tensors: dict[str, Any] | None = None) -> list[Any]:
        """The arguments of ``NativeSEFunction.apply``."""
        given = self.tensors if tensors is None else tensors
        values = [given[n] for n in TENSORS]
        return [*values[:5], options, *values[5:], self.lengths]

    def leaves(self, names: Iterable[str] | None = None) -> dict[str, Tensor | None]:
        """The tensors as fresh leaves; those in ``names`` (default: all) require grad."""
        wanted = self.given if names is None else tuple(names)
        return {
            n: None if t is None else t.detach().requires_grad_(n in wanted)
            for n, t in self.tensors.items()
        }

    def run(
        self, fn: Callable[..., Tensor], names: Iterable[str] | None = None, **extra: Any
    ) -> dict[str, Tensor]:
        """``y`` and the gradients ``dx``, ``dw1``, ... of the inputs in ``names``."""
        wanted = self.given if names is None else tuple(names)
        leaves = self.leaves(wanted)
        y = self.call(fn, leaves, **extra)
        results = {"y": y.detach()}
        if wanted:
            gradients = torch.autograd.grad(y, [leaves[n] for n in wanted], self.dy)
            results |= {f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}
        return results

    def expected(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The oracle's results."""
        return self.double().run(oracle.block, names)


def _weight(rows: int, columns: int, form: str, generator: torch.Generator) -> Tensor:
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    w = 1.5 * w / math.sqrt(max(columns, 1))
    if form == "matrix":
        return w
    if form == "conv":
        return w[:, :, None, None]
    if form == "transposed":
        return w.T.contiguous().T
    if form == "nhwc":
        return w[:, :, None, None].to(memory_format=torch.channels_last)
    raise ValueError(form)


def build(spec: Spec) -> Problem:
    """The tensors of ``spec``. Channels have means of their own, so that gates differ."""
    rng = torch.Generator().manual_seed(spec.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    batch, channels, *space = spec.shape
    rows = 2 * channels if spec.shift else channels
    hidden = channels if spec.hidden is None else spec.hidden

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(spec.device, spec.dtype)

    values: dict[str, Tensor | None] = dict.fromkeys(TENSORS)
    values["x"] = normal(*spec.shape) + normal(channels, *[1] * len(space))
    if spec.part == "channel_scale":
        values["u"] = lay_out(normal(batch, rows), "permuted" if spec.seed % 2 else "contiguous")
    values["w2"] = _weight(rows, hidden, spec.weights, rng)
    if spec.hidden is not None:
        values["w1"] = _weight(hidden, channels, spec.weights, rng)
    if spec.bias:
        values["b1"] = 0.5 * normal(hidden) if spec.hidden is not None else None
        values["b2"] = 0.5 * normal(rows)
    if spec.residual is not None:
        values["residual"] = normal(*spec.shape)
    if spec.weighted:
        values["alpha"], values["beta"] = normal(channels), 1 + 0.5 * normal(channels)
    if spec.affine:
        values["affine_scale"] = 1 + 0.5 * normal(channels)
        values["affine_shift"] = 0.5 * normal(channels)
    for name in _ABSENT[spec.part]:
        values[name] = None
    tensors = {n: cast(t) for n, t in values.items()}
    x, residual = tensors["x"], tensors["residual"]
    assert x is not None
    tensors["x"] = lay_out(x, spec.layout)
    if residual is not None and spec.residual is not None:
        tensors["residual"] = lay_out(residual, spec.residual)
    lengths = None
    if spec.lengths and spec.part != "channel_scale":
        positions = math.prod(space)
        lengths = torch.randint(min(1, positions), positions + 1, (batch,), generator=rng).to(
            spec.device
        )
    dy = normal(*(spec.shape[:2] if spec.part == "squeeze" else spec.shape))
    problem = Problem(
        tensors, lengths, spec.options, dy.to(spec.device, spec.dtype), spec.dtype, spec.part
    )
    problem.dy = lay_out(off_the_kinks(problem), spec.dy_layout)
    return problem


_MLP = ("w1", "b1", "w2", "b2")
_ABSENT = {
    "whole": (),
    "squeeze": (*_MLP, "residual", "alpha", "beta"),
    "channel_scale": _MLP,
}


def off_the_kinks(problem: Problem) -> Tensor:
    """dy, zero where rounding could decide on which side of a kink of ``after`` an element is."""
    kinks = oracle.KINKS.get(problem.options.get("after", "identity"), ())
    if not kinks or not problem.dy.numel():
        return problem.dy
    plain = replace(problem.double(), options={**problem.options, "after": "identity"})
    pre = plain.call(oracle.block)
    near = torch.stack([(pre - kink).abs() < 1e-4 for kink in kinks]).any(0)
    return problem.dy.masked_fill(near, 0.0)


def magnitudes(problem: Problem) -> dict[str, float]:
    """For each result, the largest sum of the absolute values of its terms.

    Rounding errors of a sum are proportional to this, whatever cancels. Derivatives of pointwise
    functions are at most 1.5, and a gate moves by at most the change of its argument.
    """
    t = {n: None if v is None else v.abs() for n, v in problem.double().tensors.items()}
    dy, x, w2 = problem.dy.double().abs(), t["x"], t["w2"]
    assert x is not None
    q = x.flatten(2)
    slope = 1.5 if problem.options["before"] != "identity" else 1.0
    raw = q
    if t["affine_scale"] is not None and t["affine_shift"] is not None:
        q = t["affine_scale"][:, None] * q + t["affine_shift"][:, None]
    positions = q.shape[2]
    counted = torch.full((q.shape[0],), positions) if problem.lengths is None else problem.lengths
    z = q.mean(2) if problem.lengths is None else q.sum(2) / counted.cpu()[:, None].to(q.device)
    a = 1.0 if t["affine_scale"] is None else t["affine_scale"][:, None]

    def through_before(dp: Tensor) -> dict[str, Tensor]:
        dq = slope * (1 + q * (slope > 1)) * dp
        return {"dx": a * dq, "daffine_scale": (dq * raw).sum((0, 2)),
                "daffine_shift": dq.sum((0, 2))}  # fmt: skip

    def largest(found: dict[str, Tensor | None]) -> dict[str, float]:
        return {n: oracle.largest(v) for n, v in found.items() if v is not None}

    if problem.part == "squeeze":
        return largest({"y": z, **through_before((dy / counted.to(dy)[:, None])[:, :, None])})
    dy = dy.flatten(2)
    w1, w2 = (None if w is None else w.flatten(1) for w in (t["w1"], w2))
    beta = 1.0 if t["beta"] is None else t["beta"]
    alpha = 0.0 if t["alpha"] is None else t["alpha"]
    h = z if w1 is None else z @ w1.T + (0 if t["b1"] is None else t["b1"])
    u = t["u"] if w2 is None else h @ w2.T + (0 if t["b2"] is None else t["b2"])
    assert u is not None
    channels = x.shape[1]
    g = 1 + u[:, :channels]
    scale = alpha + beta * g
    y = q * scale[:, :, None] + (u[:, channels:, None] if u.shape[1] > channels else 0)
    if t["residual"] is not None:
        y = y + t["residual"].flatten(2)
    m = 1.5 * dy * (1 + y * (problem.options["after"] not in ("identity", "relu")))
    ds = (m * q).sum(2)
    du = beta * ds * g
    if u.shape[1] > channels:
        du = torch.cat([du, m.sum(2)], 1)
    common = {"y": y, "dresidual": m, "dalpha": ds.sum(0), "dbeta": (ds * g).sum(0)}
    through_scale = m * scale[:, :, None]
    if w2 is None:
        return largest({**common, "du": du, **through_before(through_scale)})
    dh = (du @ w2) * (1.5 * (1 + h))
    dz = dh if w1 is None else dh @ w1
    return largest({
        **common, "dw1": None if w1 is None else dh.T @ z, "db1": dh.sum(0),
        "dw2": du.T @ (1 + h), "db2": du.sum(0),
        **through_before(through_scale + (dz / counted.to(dz)[:, None])[:, :, None]),
    })  # fmt: skip


def check(
    problem: Problem, fn: Callable[..., Tensor], names: Iterable[str] | None = None, **extra: Any
) -> dict[str, Tensor]:
    """Run ``fn`` on ``problem`` and hold every result to the oracle. ``names`` are as for
    :meth:`Problem.run`. Returns the results."""
    results = problem.run(fn, names, **extra)
    oracle.assert_like_oracle(results, problem.expected(names), magnitudes(problem), problem.dtype)
    return results


def pairwise(
    factors: dict[str, Iterable[Any]],
    legal: Callable[[dict[str, Any]], bool] = lambda row: True,
) -> list[dict[str, Any]]:
    """Legal rows such that every pair of values of two factors that is in a legal row at all occurs
    in one; deterministic, greedy."""
    names = list(factors)
    values = {n: list(v) for n, v in factors.items()}
    missing = {
        (a, i, b, j)
        for ai, a in enumerate(names)
        for b in names[ai + 1 :]
        for i in range(len(values[a]))
        for j in range(len(values[b]))
    }
    rows: list[dict[str, Any]] = []

    def completed(row: dict[str, int]) -> dict[str, int] | None:
        """With what gains most pairs for each further factor, as far as that is legal."""
        name = next((n for n in names if n not in row), None)
        if name is None:
            return row if legal({n: values[n][row[n]] for n in names}) else None

        def gain(k: int) -> tuple[int, int]:
            pairs = ((n, v, name, k) for n, v in row.items())
            new = sum(p in missing or (*p[2:], *p[:2]) in missing for p in pairs)
            return new, -((k + len(rows)) % len(values[name]))

        tried = sorted(range(len(values[name])), key=gain, reverse=True)
        return next((found for k in tried if (found := completed({**row, name: k}))), None)

    while missing:
        a, i, b, j = min(missing)
        row = completed({a: i, b: j})
        missing.discard((a, i, b, j))
        if row is None:
            continue
        for ai, a in enumerate(names):
            for b in names[ai + 1 :]:
                missing.discard((a, row[a], b, row[b]))
        rows.append({n: values[n][row[n]] for n in names})
    return rows
