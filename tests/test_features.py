"""The feature table is what happens: a case per row, run on every column."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from backend_cases import FUSED_BACKENDS, PLAIN, BackendCase
from problems import Problem, Spec, build, check, magnitudes
from senet_kernels import (
    ACTIVATIONS,
    GATES,
    BackendUnavailableError,
    backends,
    explain,
    squeeze_excite,
)
from senet_kernels.features import (
    COLUMNS,
    FALLS_BACK,
    FEATURES,
    FUSED,
    format_table,
    is_huge,
    is_wide,
    missing_feature,
)

_SPEC = Spec((2, 8, 3, 5), 4)


def _plain(spec: Spec) -> Callable[[str | None, str], None]:
    """Forward, gradients, and which backend ran."""

    def run(backend: str | None, device: str) -> None:
        problem = build(replace(spec, device=device))
        check(problem, squeeze_excite, backend=backend)

    return run


def _autocast(backend: str | None, device: str) -> None:
    problem = build(replace(_SPEC, device=device))
    x = problem.tensors["x"]
    assert x is not None
    problem.tensors["x"] = x.bfloat16()
    problem.dy = problem.dy.bfloat16()

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return squeeze_excite(*args, **kwargs, backend=backend)

    actual = problem.run(forward)
    assert actual["y"].dtype == actual["dx"].dtype == torch.bfloat16
    assert actual["dw1"].dtype == torch.float32
    right, scale = problem.expected(), magnitudes(problem)
    for names, dtype in ((("y", "dx"), torch.bfloat16), (("dw1", "db1", "dw2"), torch.float32)):
        expected = {n: right[n] for n in names}
        oracle.assert_like_oracle(actual, expected, scale, dtype)


def _inplace(backend: str | None, device: str) -> None:
    problem = build(replace(_SPEC, device=device))
    x = problem.tensors["x"]
    assert x is not None
    right = problem.double().call(oracle.block)
    y = problem.call(squeeze_excite, backend=backend, inplace=True)
    assert y is x
    torch.testing.assert_close(x.double(), right, rtol=1e-5, atol=1e-5)


CASES: dict[str, Callable[[str | None, str], None]] = {
    "dtype float32": _plain(_SPEC),
    "dtype bfloat16": _plain(replace(_SPEC, dtype=torch.bfloat16)),
    "dtype float16": _plain(replace(_SPEC, dtype=torch.float16)),
    "dtype float64": _plain(replace(_SPEC, dtype=torch.float64)),
    "parameters in float32 under autocast": _autocast,
    "two layers": _plain(_SPEC),
    "single layer (w1=None)": _plain(replace(_SPEC, hidden=None)),
    "squeeze alone": _plain(replace(_SPEC, part="squeeze")),
    "channel_scale alone": _plain(replace(_SPEC, part="channel_scale")),
    "scale-and-shift (w2 with 2C rows)": _plain(replace(_SPEC, shift=True)),
    "alpha, beta": _plain(replace(_SPEC, weighted=True)),
    "before_affine": _plain(replace(_SPEC, affine=True)),
    "lengths": _plain(replace(_SPEC, lengths=True)),
    "residual": _plain(replace(_SPEC, residual="contiguous")),
    "inplace": _inplace,
    **{f"activation {n}": _plain(replace(_SPEC, activation=n)) for n in ACTIVATIONS},
    **{f"gate {n}": _plain(replace(_SPEC, gate=n)) for n in GATES},
    **{f"before {n}": _plain(replace(_SPEC, before=n)) for n in ACTIVATIONS},
    **{f"after {n}": _plain(replace(_SPEC, after=n)) for n in ACTIVATIONS},
}


_LOW = ("dtype bfloat16", "dtype float16", "parameters in float32 under autocast")


def test_every_row_has_a_case() -> None:
    assert set(CASES) == set(FEATURES)
    assert all(len(cells) == len(COLUMNS) for cells in FEATURES.values())
    assert {cell for cells in FEATURES.values() for cell in cells} <= {FUSED, FALLS_BACK}


@pytest.mark.parametrize("row", FEATURES)
@pytest.mark.parametrize("backend", FUSED_BACKENDS, indirect=True, ids=str)
def test_cell(backend: BackendCase, row: str, record_ops: Callable[[], set[str]]) -> None:
    """Fused: asked for by name it runs there. Falls back: by name it raises, and auto is right."""
    case, cell = CASES[row], FEATURES[row][COLUMNS.index((backend.name, backend.device))]
    if cell == FUSED:
        case(backend.name, backend.device)
        assert any(op.startswith(f"senet_kernels::{backend.name}_") for op in record_ops())
        case(None, backend.device)
    else:
        with pytest.raises(BackendUnavailableError, match=re.escape(row)):
            case(backend.name, backend.device)
        assert not record_ops()
        case(None, backend.device)
    case("reference", backend.device)


@pytest.mark.parametrize("row", FEATURES)
@pytest.mark.parametrize("plain", PLAIN)
def test_plain_ones_take_everything(
    plain: str, row: str, record_ops: Callable[[], set[str]]
) -> None:
    if plain == "fallback" and row in _LOW:
        pytest.skip("of eager's accuracy there: see test_fallback.py")
    CASES[row](plain, "cpu")
    assert not record_ops()


def _call(problem: Problem, **extra: Any) -> Any:
    return problem.call(explain, **extra)


@pytest.mark.usefixtures("automatic")
@pytest.mark.parametrize("backend", FUSED_BACKENDS, indirect=True, ids=str)
def test_explain_says_what_runs_and_why(backend: BackendCase) -> None:
    fused = _call(build(replace(_SPEC, device=backend.device)))
    assert fused.backend == backend.name
    assert f"runs on: {backend.name}" in str(fused)
    column = COLUMNS.index((backend.name, backend.device))
    falls_back = {row for row, cells in FEATURES.items() if cells[column] == FALLS_BACK}
    optional = {
        "single layer (w1=None)": {"hidden": None},
        "scale-and-shift (w2 with 2C rows)": {"shift": True},
        "alpha, beta": {"weighted": True},
        "before_affine": {"affine": True},
        "lengths": {"lengths": True},
        "dtype float16": {"dtype": torch.float16},
    } | {f"before {n}": {"before": n} for n in ACTIVATIONS}
    for row, change in optional.items():
        answer = _call(build(replace(_SPEC, device=backend.device, **change)))
        if row in falls_back:
            assert answer.backend == "fallback"
            assert dict(answer.passed_over)[backend.name].endswith(row)
            assert row in str(answer)
            with pytest.raises(BackendUnavailableError, match=re.escape(row)):
                _call(build(replace(_SPEC, device=backend.device, **change)), backend=backend.name)
        else:
            assert answer.backend == backend.name


@pytest.mark.parametrize(
    ("image", "huge"),
    [
        ((1, 1 << 17, 1 << 17), True),
        ((16, (1 << 30) - 1), False),
        ((1, (1 << 30) + 1), True),
        (((1 << 29) + 1, 1), True),
        ((1 << 29, 31), False),
        ((1 << 29, 32), True),
        ((0, 1 << 40), False),
    ],
)
@pytest.mark.usefixtures("automatic")
@pytest.mark.parametrize("backend", FUSED_BACKENDS, indirect=True, ids=str)
def test_huge_images(backend: BackendCase, image: tuple[int, ...], huge: bool) -> None:
    """Those that the kernels for a GPU cannot count fall back, and are refused by name."""
    x = torch.zeros(1, device=backend.device).expand(1, *image)
    w = torch.zeros(1, device=backend.device).expand(image[0], image[0])
    answer = explain(x, w, None, w, None)
    assert answer.call.huge == huge
    column = (backend.name, backend.device)
    wide = answer.call.wide and column == ("native", "cuda")
    if column == ("native", "cpu") or not (huge or wide):
        assert answer.backend == backend.name
        return
    reason = "images of more than" if huge else "so many channels"
    assert answer.backend == "fallback"
    assert f"it does not take {reason}" in dict(answer.passed_over)[backend.name]
    with pytest.raises(BackendUnavailableError, match=f"it does not take {reason}"):
        squeeze_excite(x, w, None, w, None, backend=backend.name)


@pytest.mark.parametrize("column", COLUMNS, ids=str)
def test_huge_and_wide_calls_by_the_table(column: tuple[str, str]) -> None:
    """Where the device is not here."""
    backend, device = column
    call = _call(build(_SPEC)).call._replace(device=device)
    assert missing_feature(backend, call) is None
    reason = missing_feature(backend, call._replace(huge=True))
    assert reason is None if device == "cpu" and backend == "native" else "images" in str(reason)
    reason = missing_feature(backend, call._replace(wide=True))
    assert "channels" in str(reason) if column == ("native", "cuda") else reason is None


def test_explain_computes_nothing(record_ops: Callable[[], set[str]]) -> None:
    x, w = torch.empty(2, 8, 3, 5), torch.empty(4, 8)
    x.fill_(torch.nan)
    assert str(explain(x, w, None, w.T, None, backend="reference")).startswith("runs on: reference")
    assert not record_ops()


def test_table_prints() -> None:
    text = format_table()
    for row in FEATURES:
        family, _, function = row.partition(" ")
        assert row in text or any(family in line and function in line for line in text.splitlines())
    shown = repr(backends())
    assert text in shown
    for name in backends():
        assert f"{name}: " in shown
    assert backends()["reference"]
    assert backends().available["reference"]
    for name, reason in backends().reasons.items():
        assert not backends()[name]
        assert reason in shown


@pytest.mark.parametrize("backend", FUSED_BACKENDS, indirect=True, ids=str)
def test_devices_without_a_column_fall_back(backend: BackendCase) -> None:
    x, w = torch.empty(2, 8, 3, 5, device="meta"), torch.empty(4, 8, device="meta")
    answer = explain(x, w, None, w.T, None)
    assert answer.backend == "fallback"
    assert "meta" in dict(answer.passed_over)[backend.name]
    y: Tensor = squeeze_excite(x, w, None, w.T, None)
    assert y.is_meta
    assert y.shape == x.shape
    with pytest.raises(BackendUnavailableError, match="meta"):
        squeeze_excite(x, w, None, w.T, None, backend=backend.name)


def test_limits_of_shapes_are_documented() -> None:
    """In docs/backends.md, and where they say."""
    text = " ".join((Path(__file__).parent.parent / "docs" / "backends.md").read_text().split())
    found = re.search(
        r"up to ([\d,]+) elements, ([\d,]+) positions and ([\d,]+) channels.*"
        r"takes (\d+) R \+ C up to ([\d,]+) .*with 512 channels ([\d,]+) hidden ones",
        text,
    )
    assert found is not None
    elements, positions, channels, weighed, most, of_512 = (
        int(number.replace(",", "")) for number in found.groups()
    )

    def huge(*shape: int) -> bool:
        return is_huge(torch.empty(1).expand(1, *shape))

    assert [huge(1, positions), huge(1, positions + 1)] == [False, True]
    assert [huge(channels, 1), huge(channels + 1, 1)] == [False, True]
    assert elements == 131071 * 131073
    assert [huge(131071, 131073), huge(131072, 131072)] == [False, True]
    for dtype, share in ((torch.float32, 1), (torch.float64, 2)):
        x = torch.empty(1, 512, 1, dtype=dtype)
        hidden = (most // share - 512) // weighed
        assert [is_wide(x, hidden + more, 512, False) for more in (0, 1)] == [False, True]
        affine, both = (most // share - 1024) // weighed, (most // share - 1024) // (2 * weighed)
        assert [is_wide(x, affine + more, 512, True) for more in (0, 1)] == [False, True]
        assert [is_wide(x, both + more, 1024, False) for more in (0, 1)] == [False, True]
        if share == 1:
            assert hidden == of_512


def test_table_prints_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = (FUSED, FALLS_BACK, *[FUSED] * (len(COLUMNS) - 2))
    for row in ("lengths", "gate tanh"):
        monkeypatch.setitem(FEATURES, row, cells)
    fused, *exceptions = format_table().split("\nnot by ")
    assert "tanh" not in fused.splitlines()[-1]
    assert "lengths" not in fused
    backend, device = COLUMNS[1]
    expected = [
        f"{backend} ({device}), which falls back: {row}" for row in ("lengths", "gate tanh")
    ]
    assert exceptions == expected
