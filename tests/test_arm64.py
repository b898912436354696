"""The CPU kernels with NEON, compiled for AArch64 and executed by qemu's user mode.

``tests/arm64/driver.cpp`` runs the kernels without torch, on cases from a file; results are held
to the oracle here. Not run on hardware.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
import special
from problems import Problem, Spec, build, magnitudes, pairwise
from senet_kernels import squeeze_excite
from senet_kernels.pointwise import POINTWISE

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent / "arm64"
OUT = ROOT / "build" / "arm64"
COMPILERS = ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++-12", "aarch64-linux-gnu-g++-13")
# As setup.py compiles them on an AArch64 machine.
VARIANTS = {"neon": (), "neon_bf16": ("-march=armv8.2-a+bf16",)}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_FORMS = {"two layers": 0, "single layer": 1, "squeeze": 2, "channel_scale": 3}
_INPUTS = ("x", "residual", "lengths", "w1", "b1", "w2", "b2", "alpha", "beta", "affine_scale",
           "affine_shift", "u", "dy")  # fmt: skip
_RESULTS = ("y", "mask", "z", "h", "u", "dx", "dresidual", "dw1", "db1", "dw2", "db2", "dalpha",
            "dbeta", "daffine_scale", "daffine_shift", "du")  # fmt: skip
_IMAGES = ("x", "residual", "y", "dx", "dresidual")


def _compiler() -> str | None:
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def _qemu() -> str | None:
    return shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def _why_not() -> str | None:
    if not _compiler():
        return "no compiler for AArch64 (g++-aarch64-linux-gnu)"
    return None if _qemu() else "no qemu-aarch64 (qemu-user)"


pytestmark = [
    pytest.mark.skipif(bool(_why_not()), reason=str(_why_not())),
    pytest.mark.slow,
]


@functools.cache
def _driver(variant: str) -> Path:
    """The compiled driver; again only where a source changed."""
    sources = [HERE / "driver.cpp", *sorted((ROOT / "csrc").glob("*.h"))]
    sources += sorted((ROOT / "csrc" / "cpu").glob("*.*"))
    compiler = _compiler()
    assert compiler is not None
    flags = ["-std=c++20", "-O2", "-fpeel-loops", "-funswitch-loops", "-fno-math-errno",
             "-fno-trapping-math", "-w", "-static", "-pthread", "-Icsrc",
             f"-DSENET_ISA={variant}", *VARIANTS[variant]]  # fmt: skip
    digest = hashlib.sha256(" ".join([compiler, *flags]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    program = OUT / f"{variant}-{digest.hexdigest()[:16]}"
    if not program.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        partial = program.with_suffix(f".{os.getpid()}")
        command = [compiler, *flags, str(HERE / "driver.cpp"), "csrc/cpu/kernels.cpp"]
        subprocess.run([*command, "-o", str(partial)], cwd=ROOT, check=True)
        partial.replace(program)
    return program


def _bytes(t: Tensor) -> bytes:
    return t.contiguous().flatten().view(torch.uint8).numpy().tobytes()


class _Case:
    """A problem as the driver is given it."""

    def __init__(self, problem: Problem, threads: int, core_cache: int, at_end: bool) -> None:
        self.problem = problem
        t = problem.tensors
        x = t["x"]
        assert x is not None
        self.last = x.stride(1) == 1 and x.shape[1] > 1
        self.shape = x.shape
        self.dtype = problem.dtype
        self.accumulates = torch.float64 if problem.dtype == torch.float64 else torch.float32
        batch, channels = x.shape[:2]
        positions = x[0, 0].numel()
        w1, w2, u = t["w1"], t["w2"], t.get("u")
        form = problem.part
        if form == "whole":
            form = "single layer" if w1 is None else "two layers"
        hidden = 0 if w1 is None else w1.shape[0]
        outputs = u.shape[1] if u is not None else 0 if w2 is None else w2.shape[0]
        code = 0
        for place, name in enumerate(("activation", "gate", "before", "after")):
            code |= POINTWISE[problem.options.get(name, "identity")].code << (4 * place)
        self.words = [
            _FORMS[form], batch, channels, positions, hidden, outputs, int(self.last),
            _DTYPES[self.dtype], _DTYPES[self.dtype], code, threads, core_cache, int(at_end),
            100 * len(_INPUTS) + len(_RESULTS),
        ]  # fmt: skip
        saved = {"z": channels, "h": hidden, "u": outputs}
        sizes: dict[str, tuple[int, ...]] = {n: (batch, count) for n, count in saved.items()}
        if form in ("squeeze", "channel_scale"):
            sizes = {"z": sizes["z"]} if form == "squeeze" else {"du": (batch, outputs)}
        if form != "squeeze":
            sizes["y"] = tuple(self.shape)
            if problem.options["after"] == "relu":
                sizes["mask"] = (batch * -(-channels // 8) * -(-positions // 8) * 8,)
        for name, tensor in t.items():
            if tensor is not None and name != "u":
                sizes[f"d{name}"] = tuple(tensor.shape)
        self.sizes = sizes

    def of(self, name: str) -> torch.dtype:
        """The dtype of an input or a result."""
        if name == "mask":
            return torch.uint8
        of_mean = name == "dy" and self.problem.part == "squeeze"
        return self.accumulates if name in ("z", "h", "u", "du") or of_mean else self.dtype

    def _placed(self, t: Tensor) -> Tensor:
        return t.movedim(1, -1).contiguous() if self.last else t.contiguous()

    def text(self) -> bytes:
        out = [struct.pack(f"<{len(self.words)}q", *self.words)]
        for name in _INPUTS:
            given = {"dy": self.problem.dy, "lengths": self.problem.lengths}
            t = given[name] if name in given else self.problem.tensors.get(name)
            if t is None:
                out.append(struct.pack("<q", -1))
                continue
            if name in _IMAGES or (name == "dy" and self.problem.part != "squeeze"):
                t = self._placed(t)
            data = _bytes(t if name == "lengths" else t.to(self.of(name)))
            out += [struct.pack("<q", len(data)), data]
        out += [struct.pack("<q", self.result_bytes(name)) for name in _RESULTS]
        return b"".join(out)

    def result_bytes(self, name: str) -> int:
        if name not in self.sizes:
            return -1
        return torch.Size(self.sizes[name]).numel() * self.of(name).itemsize

    def results(self, data: memoryview) -> tuple[dict[str, Tensor], memoryview]:
        """As :meth:`Problem.run` has them; and the bytes of the next case."""
        found = {}
        for name in _RESULTS:
            count = max(0, self.result_bytes(name))
            if name in self.sizes:
                raw = torch.tensor(data[:count].tolist(), dtype=torch.uint8)
                found[name] = self._shaped(name, raw.view(self.of(name)))
            data = data[count:]
        if self.problem.part == "squeeze":
            found["y"] = found["z"].to(self.dtype)
        if "du" in found:
            found["du"] = found["du"].to(self.dtype)
        return {n: t for n, t in found.items() if n not in ("z", "h", "u", "mask")}, data

    def _shaped(self, name: str, flat: Tensor) -> Tensor:
        size = self.sizes[name]
        if name in _IMAGES and self.last:
            return flat.view(size[0], *size[2:], size[1]).movedim(-1, 1)
        return flat.view(size)


def _execute(variant: str, cases: Sequence[_Case], folder: Path) -> Iterator[dict[str, Tensor]]:
    """What the kernels compute."""
    texts = [struct.pack("<q", len(cases)), *(case.text() for case in cases)]
    (folder / "cases").write_bytes(b"".join(texts))
    command = [str(_qemu()), "-cpu", "max", str(_driver(variant)), "cases", "results"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-2000:]}"
    data = memoryview((folder / "results").read_bytes())
    for case in cases:
        found, data = case.results(data)
        yield found
    assert not data


def _cases(problems: Sequence[Problem]) -> list[_Case]:
    """With one thread and a team of three, a cache that holds images and one that does not."""
    rng = random.Random(7)
    return [
        _Case(p, rng.choice([1, 3]), rng.choice([0, 1 << 20]), bool(i % 2))
        for i, p in enumerate(problems)
    ]


_CHOICES: dict[str, Sequence[Any]] = {
    "shape": [(3, 16, 5, 7), (2, 31, 3, 3), (1, 64, 8, 8), (5, 24, 7, 7), (2, 3, 300), (4, 130, 1),
              (2, 8, 70, 70), (1, 2, 3, 4, 5)],
    "hidden": [4, None, 9],
    "dtype": list(_DTYPES),
    "layout": ["contiguous", "channels_last"],
    "activation": [n for n, row in POINTWISE.items() if row.is_activation],
    "gate": [n for n, row in POINTWISE.items() if row.is_gate],
    "before": [n for n, row in POINTWISE.items() if row.is_activation],
    "after": [n for n, row in POINTWISE.items() if row.is_activation],
    "residual": [None, "contiguous"],
    "bias": [True, False],
    "shift": [False, True],
    "weighted": [False, True],
    "affine": [False, True],
    "lengths": [False, True],
}  # fmt: skip


def _specs() -> list[Spec]:
    rows = pairwise(dict(_CHOICES))
    whole = [Spec(**row, seed=i) for i, row in enumerate(rows)]
    dtypes = list(_DTYPES)
    whole += [
        replace(spec, dtype=dtypes[dtypes.index(spec.dtype) - 1], seed=spec.seed + len(rows))
        for spec in whole
    ]
    parts = [
        replace(spec, part=part)
        for part in ("squeeze", "channel_scale")
        for spec in whole[:: len(whole) // 40]
    ]
    return whole + parts


@pytest.mark.parametrize("variant", VARIANTS)
def test_pairs_of_choices(variant: str, tmp_path: Path) -> None:
    """Every pair of choices, odd shapes, both layouts, each dtype: against the oracle."""
    specs = _specs()
    assert len(specs) > 200
    cases = _cases([build(spec) for spec in specs])
    for spec, case, found in zip(specs, cases, _execute(variant, cases, tmp_path), strict=True):
        problem = case.problem
        try:
            oracle.assert_like_oracle(found, problem.expected(), magnitudes(problem), problem.dtype)
        except AssertionError as error:
            raise AssertionError(f"{spec}: {error}") from error


@pytest.mark.parametrize("variant", VARIANTS)
def test_special_values(variant: str, tmp_path: Path) -> None:
    """NaN, infinities, zeros of both signs, subnormal and large numbers: of the same kinds as from
    the kernels of this machine."""
    values = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 6e-8, 7e4, -1e38]
    )
    specs = [
        Spec((6, 12, 5, 9), 4, dtype, layout, before=before, gate=gate, after=after,
             residual="contiguous" if after != "identity" else None, seed=seed)
        for seed, (dtype, layout, (before, gate, after)) in enumerate(
            (dtype, layout, functions)
            for dtype in _DTYPES
            for layout in ("contiguous", "channels_last")
            for functions in (
                ("identity", "sigmoid", "identity"), ("identity", "hardsigmoid", "relu"),
                ("silu", "sigmoid", "identity"), ("hardswish", "hardsigmoid", "identity"),
                ("relu", "sigmoid", "silu"), ("relu6", "tanh", "hardswish"))
        )
    ]  # fmt: skip
    problems = [build(spec) for spec in specs]
    for problem in problems:
        x = problem.tensors["x"]
        assert x is not None
        for image, value in enumerate(values[: x.shape[0] - 1].tolist()):
            x[image, image, 2, 3] = value
        x[-1, :, 0, 0] = values[3:].repeat(3)[: x.shape[1]].to(x.dtype)
    cases = _cases(problems)
    for spec, case, found in zip(specs, cases, _execute(variant, cases, tmp_path), strict=True):
        expected = case.problem.run(squeeze_excite, backend="native")
        for name, right in expected.items():
            assert torch.equal(special.kinds(found[name]), special.kinds(right)), (spec, name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rounding(variant: str, tmp_path: Path) -> None:
    """All numbers of 16 bits through a call that changes none of them but NaN's payload: loads and
    stores are exact; and float32 between them is rounded to nearest, ties to even."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    problems = []
    for dtype in (torch.bfloat16, torch.float16):
        x = every.view(dtype).view(64, 1, 1024).clone()
        problem = build(Spec((64, 1, 1024), 1, dtype, gate="identity", part="channel_scale"))
        problem.tensors |= {"x": x, "u": torch.ones(64, 1, dtype=dtype)}
        problem.dy = torch.ones_like(x)
        problems.append(problem)
    cases = [_Case(problem, 1, 0, True) for problem in problems]
    for case, found in zip(cases, _execute(variant, cases, tmp_path), strict=True):
        x = case.problem.tensors["x"]
        assert x is not None
        numbers = ~x.isnan()
        assert torch.equal(found["y"].view(torch.int16)[numbers], x.view(torch.int16)[numbers])
        assert found["y"].isnan().equal(~numbers)
    factors = 1 + torch.arange(64) / 64.0
    for problem in problems:
        problem.tensors["u"] = factors[:, None].to(problem.dtype)
    cases = [_Case(problem, 1, 0, True) for problem in problems]
    for case, found in zip(cases, _execute(variant, cases, tmp_path), strict=True):
        x, u = case.problem.tensors["x"], case.problem.tensors["u"]
        assert x is not None
        assert u is not None
        right = (x.float() * u.float()[:, :, None]).to(x.dtype)
        torch.testing.assert_close(found["y"], right, rtol=0, atol=0, equal_nan=True)


def test_a_wrong_kernel_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another problem's bytes are not taken for right."""
    first, second = build(Spec(seed=1)), build(Spec(seed=2))
    cases = [_Case(first, 1, 0, True)]
    (found,) = _execute("neon", cases, tmp_path)
    with pytest.raises(AssertionError):
        oracle.assert_like_oracle(found, second.expected(), magnitudes(second), second.dtype)
