"""Outputs and every gradient against the float64 oracle: options, layouts, shapes, threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from backend_cases import EXACT_BACKENDS, BackendCase
from problems import DENSE_LAYOUTS, LAYOUTS, Spec, build, check, pairwise
from senet_kernels import squeeze_excite

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SHAPES_BY_RANK = {1: (3, 16, 35), 2: (3, 16, 5, 7), 3: (3, 16, 2, 3, 5)}


_HALVES_FACTORS = {
    "squeeze": ("dtype", "layout", "rank", "before", "affine", "lengths", "dy_layout"),
    "channel_scale": ("dtype", "layout", "rank", "before", "gate", "after", "residual", "affine",
                      "shift", "weighted", "dy_layout"),
}  # fmt: skip


def _covering(backend: BackendCase) -> list[Spec]:
    """Every pair of choices among those the backend takes."""
    factors: dict[str, Any] = {
        "dtype": backend.dtypes,
        "layout": LAYOUTS,
        "rank": tuple(SHAPES_BY_RANK),
        "hidden": (4, None) if backend.takes("single layer (w1=None)") else (4,),
        **{n: backend.names(n) for n in ("activation", "gate", "before", "after")},
        "residual": (None, *LAYOUTS),
        "dy_layout": LAYOUTS,
        "bias": (True, False),
        "weights": ("matrix", "conv", "transposed", "nhwc"),
    }
    optional = {
        "shift": "scale-and-shift (w2 with 2C rows)",
        "weighted": "alpha, beta",
        "affine": "before_affine",
        "lengths": "lengths",
    }
    factors |= {n: (False, True) for n, row in optional.items() if backend.takes(row)}
    rows = pairwise(factors)
    for part, chosen in _HALVES_FACTORS.items():
        if backend.takes(f"{part} alone"):
            of_half = {n: v for n, v in factors.items() if n in chosen}
            rows += [{"part": part, **row} for row in pairwise(of_half)]
    return [
        Spec(shape=SHAPES_BY_RANK[row.pop("rank")], device=backend.device, seed=i, **row)
        for i, row in enumerate(rows)
    ]


def _params(specs: Callable[[BackendCase], list[Spec]]) -> list[Any]:
    return [
        pytest.param(backend, spec, id=f"{backend}-{spec}")
        for backend in EXACT_BACKENDS
        for spec in specs(backend)
        if spec.fits(backend)
    ]


@pytest.mark.parametrize(("backend", "spec"), _params(_covering), indirect=["backend"])
def test_pairs_of_choices(backend: BackendCase, spec: Spec) -> None:
    check(build(spec), squeeze_excite, backend=backend.name)


_PARTS: tuple[dict[str, Any], ...] = (
    {"hidden": None},
    {"lengths": True, "before": "relu", "after": "relu"},
    {"part": "squeeze"},
    {"part": "squeeze", "before": "gelu", "lengths": True},
    {"part": "channel_scale", "gate": "sigmoid"},
    {"part": "channel_scale", "residual": "contiguous", "after": "relu", "shift": True},
    {"part": "channel_scale", "before": "silu", "weighted": True},
    {"part": "squeeze", "affine": True, "before": "relu"},
    {"part": "channel_scale", "affine": True},
)
_AFFINE = ({"affine": True, "before": "hardswish"}, *_PARTS[-2:])
# The steps that the kernels compile apart, in every dtype and dense layout.
_BLOCKS: tuple[dict[str, Any], ...] = (
    {},
    {"before": "relu"},
    {"before": "silu", "activation": "silu"},
    {"before": "hardswish", "gate": "hardsigmoid"},
    {"residual": "contiguous", "after": "relu"},
    {"residual": "channels_last", "after": "relu", "before": "relu"},
    {"residual": "contiguous"},
    {"residual": "contiguous", "after": "silu"},
    {"after": "gelu"},
    {"bias": False},
    {"affine": True},
    {"affine": True, "before": "silu", "residual": "contiguous", "after": "relu"},
    *_PARTS,
)

# Around vector widths, cache lines and tiles; primes; ones; images worth splitting over threads;
# batches larger than any thread team; weights larger than the image.
_SHAPES: tuple[tuple[tuple[int, ...], int], ...] = (
    *(((b, c, s), r) for b, (c, r, s) in zip(
        itertools.cycle((1, 2, 5)),
        [
            (1, 1, 1), (1, 1, 2), (1, 2, 3), (2, 1, 1), (2, 3, 7), (3, 1, 13), (3, 2, 1),
            (7, 2, 49), (7, 3, 16), (8, 8, 8), (13, 7, 64), (15, 4, 15), (16, 1, 16),
            (16, 16, 17), (17, 3, 33), (31, 13, 31), (32, 2, 32), (33, 5, 3), (49, 7, 13),
            (63, 3, 65), (64, 4, 64), (65, 8, 63), (127, 13, 2), (128, 8, 49), (196, 49, 7),
            (257, 16, 13), (3, 257, 7), (13, 64, 257), (64, 49, 196), (7, 7, 257),
        ],
        strict=False,
    )),
    ((1, 64, 61, 67), 4),  # one image, split over threads
    ((2, 8, 96, 96), 2),
    ((67, 8, 3, 3), 2),  # many images
    ((2, 512, 2, 2), 128),  # weights larger than the image
    ((1, 1024, 1, 1), 256),
    ((1, 2, 150, 150), 1),
)  # fmt: skip


def _shape_specs(backend: BackendCase) -> list[Spec]:
    dtypes = itertools.cycle(backend.dtypes)
    layouts = itertools.cycle(DENSE_LAYOUTS)
    blocks = itertools.cycle(_BLOCKS[: -len(_PARTS)])
    parts = itertools.cycle(_PARTS)
    specs = []
    for shape, hidden in _SHAPES:
        for _ in range(4):
            spec = Spec(shape, hidden, next(dtypes), next(layouts), device=backend.device)
            specs.append(replace(spec, **next(blocks)))
        # A cycle of their own: where a backend takes none of these, it misses none of the others.
        spec = Spec(shape, hidden, next(dtypes), next(layouts), device=backend.device)
        specs.append(replace(spec, **next(parts)))
    return specs


@pytest.mark.parametrize(("backend", "spec"), _params(_shape_specs), indirect=["backend"])
def test_odd_shapes(backend: BackendCase, spec: Spec) -> None:
    check(build(spec), squeeze_excite, backend=backend.name)


def _long_specs(backend: BackendCase) -> list[Spec]:
    """More images than two chains of sums have; channels-last, rows of channels that the blocks of
    the CUDA kernels take in two parts, forward and backward."""
    options: dict[str, Any] = {"device": backend.device, "layout": "channels_last"}
    if backend.takes("alpha, beta", "before_affine"):
        options |= {"weighted": True, "affine": True}
    return [
        Spec((1030, 3, 2, 2), 2, **options),
        Spec((2, 1000, 5), 3, **options),
        Spec((2, 1200, 5), 3, **options),
    ]


@pytest.mark.parametrize(("backend", "spec"), _params(_long_specs), indirect=["backend"])
def test_long_sums(backend: BackendCase, spec: Spec) -> None:
    check(build(spec), squeeze_excite, backend=backend.name)


def _block_specs(backend: BackendCase) -> list[Spec]:
    grid = itertools.product(_BLOCKS, backend.dtypes, ("contiguous", "channels_last"))
    return [
        replace(Spec((5, 40, 9, 11), 10, dtype, layout, device=backend.device), **options)
        for options, dtype, layout in grid
    ]


@pytest.mark.parametrize(("backend", "spec"), _params(_block_specs), indirect=["backend"])
def test_blocks(backend: BackendCase, spec: Spec) -> None:
    check(build(spec), squeeze_excite, backend=backend.name)


# One image over several threads, and a batch that the team does not divide.
_TEAM_SHAPES = ((1, 48, 40, 40), (1, 7, 64, 65), (5, 24, 30, 31), (2, 96, 3, 3))


def _thread_specs(backend: BackendCase) -> list[Spec]:
    grid = itertools.product(
        _TEAM_SHAPES, DENSE_LAYOUTS[:2], (*_BLOCKS[2:5:2], *_PARTS[1:6:2], *_AFFINE)
    )
    return [
        replace(Spec(shape, 6, torch.float32, layout, device=backend.device), **options)
        for shape, layout, options in grid
    ]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize(("backend", "spec"), _params(_thread_specs), indirect=["backend"])
def test_thread_counts(
    backend: BackendCase, spec: Spec, threads: int, set_threads: Callable[[int], None]
) -> None:
    if backend.device == "cuda" and threads > 1:
        pytest.skip("a CPU's threads")
    set_threads(threads)
    check(build(spec), squeeze_excite, backend=backend.name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_space"])
@pytest.mark.parametrize("backend", EXACT_BACKENDS, indirect=True, ids=str)
def test_no_gradient_needed(backend: BackendCase, layout: str) -> None:
    spec = Spec(layout=layout, residual="channels_last", after="relu", device=backend.device)
    problem = build(spec)
    with torch.no_grad():
        y = problem.call(squeeze_excite, backend=backend.name)
    assert not y.requires_grad
    taught = problem.call(squeeze_excite, problem.leaves(), backend=backend.name)
    assert torch.equal(y, taught)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("backend", [BackendCase("native", "cpu")], indirect=True, ids=str)
def test_images_beyond_a_cores_cache(backend: BackendCase, layout: str) -> None:
    """More than the 1 MB from which on the second reading begins with what was read last."""
    spec = Spec((2, 333, 30, 29), 16, layout=layout, residual="contiguous", after="relu")
    for options in (spec, replace(spec, before="silu", residual=None, after="identity")):
        check(build(options), squeeze_excite, backend=backend.name)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 3, 512, 512), (1, 300, 128, 130), (300, 33, 17, 3)])
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("backend", EXACT_BACKENDS, indirect=True, ids=str)
def test_large(backend: BackendCase, layout: str, shape: tuple[int, ...]) -> None:
    for options, dtype in zip(_BLOCKS, itertools.cycle(backend.dtypes), strict=False):
        spec = replace(Spec(shape, 16, dtype, layout, device=backend.device), **options)
        if spec.fits(backend):
            check(build(spec), squeeze_excite, backend=backend.name)
