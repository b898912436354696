"""The public ops: schemas from either side, values and derivatives on every backend. What graphs
hold is in test_public_op_graphs.py, workflows of capture are in test_capture.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import oracle
import senet_kernels
from backend_cases import BACKENDS, EXACT_BACKENDS, FUSED_BACKENDS, BackendCase
from operations import CountOperations
from problems import Problem, Spec, build, magnitudes
from senet_kernels import (
    BackendUnavailableError,
    dispatch,
    public_ops,
    resolve,
    squeeze_excite,
    use_backend,
)
from senet_kernels.backends import native

_PACKAGE = Path(senet_kernels.__file__).parent
_OPS = torch.ops.senet_kernels

each_fused = pytest.mark.parametrize("backend", FUSED_BACKENDS, indirect=True, ids=str)
needs_library = pytest.mark.skipif(
    native.UNAVAILABLE is not None, reason="the compiled library is not there"
)

_NAMES = {"whole": "squeeze_excite", "squeeze": "squeeze", "channel_scale": "channel_scale"}
_POSITIONAL = {
    "whole": ("x", "w1", "b1", "w2", "b2"),
    "squeeze": ("x",),
    "channel_scale": ("x", "u"),
}


def _op(part: str) -> Any:
    return getattr(_OPS, _NAMES[part]).default


def _arguments(
    problem: Problem, tensors: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A problem as the arguments of its public op."""
    given = dict(problem.tensors if tensors is None else tensors)
    positional = tuple(given.pop(n) for n in _POSITIONAL[problem.part])
    named = {n: t for n, t in given.items() if t is not None}
    if problem.lengths is not None:
        named["lengths"] = problem.lengths
    return positional, {**named, **problem.options}


def _call(problem: Problem, tensors: dict[str, Any] | None = None) -> Tensor:
    args, kwargs = _arguments(problem, tensors)
    y: Tensor = _op(problem.part)(*args, **kwargs)
    return y


def _run(problem: Problem) -> dict[str, Tensor]:
    """``y`` and every gradient, by the public op."""
    leaves = problem.leaves()
    y = _call(problem, leaves)
    gradients = torch.autograd.grad(y, [leaves[n] for n in problem.given], problem.dy)
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(problem.given, gradients, strict=True)}


# ---- schemas ----


def _schemas_in_cpp() -> dict[str, str]:
    source = (_PACKAGE.parent / "csrc" / "registration.cpp").read_text(encoding="utf-8")
    found = re.findall(
        r'constexpr const char\* k\w+Schema =\s*((?:"(?:[^"\\]|\\.)*"\s*)+);', source
    )
    texts = ["".join(re.findall(r'"((?:[^"\\]|\\.)*)"', text)) for text in found]
    texts = [text.replace('\\"', '"') for text in texts]
    return {text.partition("(")[0]: text for text in texts}


@pytest.mark.skipif(not (_PACKAGE.parent / "csrc").exists(), reason="not a source tree")
def test_both_texts_of_the_schemas_agree() -> None:
    in_cpp = _schemas_in_cpp()
    assert set(in_cpp) == set(public_ops.SCHEMAS) == set(_NAMES.values())
    for name, schema in public_ops.SCHEMAS.items():
        parsed = torch._C.parse_schema(f"{name}{schema}")
        assert str(parsed) == str(torch._C.parse_schema(in_cpp[name]))


@pytest.mark.skipif(not (_PACKAGE.parent / "docs").exists(), reason="not a source tree")
def test_the_documented_schemas_are_these() -> None:
    text = (_PACKAGE.parent / "docs" / "api.md").read_text(encoding="utf-8")
    documented = (
        text.partition("```text\n")[2].partition("```")[0].split("torch.ops.senet_kernels.")
    )
    right = [f"{name}{schema}" for name, schema in public_ops.SCHEMAS.items()]
    assert [" ".join(schema.split()) for schema in documented if schema] == right


@pytest.mark.parametrize("name", public_ops.SCHEMAS)
def test_schemas_are_functional_and_readable(name: str) -> None:
    op = getattr(_OPS, name).default
    assert not op._schema.is_mutable
    assert set(op.tags) == {torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag}
    arguments = op._schema.arguments
    assert {str(a.type) for a in arguments} <= {"Tensor", "Optional[Tensor]", "str"}
    positional = [a.name for a in arguments if not a.kwarg_only]
    assert positional == list(_POSITIONAL[{v: k for k, v in _NAMES.items()}[name]])
    assert all(a.has_default_value() for a in arguments if a.kwarg_only)


def _script(script: str, path: Path, folder: Path | None = None) -> str:
    """Output of a script in a new interpreter that finds the package at this path."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True,
        timeout=180, check=False, cwd=folder or path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2500:]
    return done.stdout


@pytest.fixture
def pure_python(tmp_path: Path) -> Path:
    """A folder with a copy of the package that has no compiled library."""
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(_PACKAGE, tmp_path / "pure" / "senet_kernels", ignore=ignore)
    return tmp_path / "pure"


_LIBRARY = f"torch.ops.load_library({str(next(_PACKAGE.glob('_native*.so'), ''))!r})\n"
_VALUES = """
torch.manual_seed(0)
x, w, b, u = torch.randn(2, 8, 3, 5), torch.randn(8, 8), torch.randn(8), torch.randn(2, 8)
op = torch.ops.senet_kernels
def values():
    return [
        op.squeeze_excite(x, w, None, w, b, residual=x, after="relu", before="silu", alpha=b),
        op.squeeze(x, before="silu", lengths=torch.tensor([1, 15])),
        op.channel_scale(x, u, gate="hardsigmoid_02", beta=b),
    ]
"""
_REFUSALS = """
def message(call):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    raise AssertionError("accepted")
for said, call in {
    "mask: expected None": lambda: op.squeeze(x, mask=x),
    "pool: expected 'mean'": lambda: op.squeeze_excite(x, w, None, w, b, pool="max"),
    "gate: expected one of": lambda: op.channel_scale(x, u, gate="relu6"),
    "got 'sigmoid'": lambda: op.squeeze(x, before="sigmoid"),
    "w2: expected": lambda: op.squeeze_excite(x, w, None, w[:3], b),
    "u: expected": lambda: op.channel_scale(x, u[:1]),
    "x: expected [B, C, *spatial]": lambda: op.squeeze(x[0, 0]),
}.items():
    assert said in message(call), message(call)
"""


@needs_library
def test_the_library_alone_defines_and_computes(tmp_path: Path) -> None:
    """What a process without Python has; the package then finds the definitions."""
    out = _script(
        "import torch\n" + _LIBRARY + _VALUES + _REFUSALS
        + "schemas = [str(o.default._schema) for o in (op.squeeze_excite, op.squeeze,"
        " op.channel_scale)]\n"
        "alone = values()\n"
        "import sys\n"
        "assert 'senet_kernels' not in sys.modules\n"
        "import senet_kernels\n"
        "assert torch.Tag.flexible_layout in op.squeeze.default.tags\n"
        "for ours, theirs in zip(values(), alone): assert torch.equal(ours, theirs)\n"
        "xg = x.clone().requires_grad_()\n"
        "op.squeeze(xg).sum().backward()\n"
        "torch.testing.assert_close(xg.grad, torch.full_like(x, 1 / 15))\n"
        "print('\\n'.join(schemas))\n",
        _PACKAGE.parent,
        folder=tmp_path,
    )  # fmt: skip
    right = [str(getattr(_OPS, name).default._schema) for name in public_ops.SCHEMAS]
    assert out.splitlines() == right


@needs_library
def test_python_alone_defines_and_computes(pure_python: Path) -> None:
    """By the plain composition; a library that is loaded later leaves the definitions."""
    _script(
        "import torch, senet_kernels\n" + _VALUES + _REFUSALS
        + "assert not senet_kernels.backends()['native']\n"
        "alone = values()\n"
        "schema = str(op.squeeze_excite.default._schema)\n"
        + _LIBRARY +
        "assert schema == str(op.squeeze_excite.default._schema)\n"
        "for ours, theirs in zip(values(), alone): assert torch.equal(ours, theirs)\n",
        pure_python,
    )  # fmt: skip


def test_another_librarys_schema_is_refused(pure_python: Path) -> None:
    out = _script(
        "import torch\n"
        "library = torch.library.Library('senet_kernels', 'FRAGMENT')\n"
        "library.define('squeeze(Tensor x, int axis) -> Tensor')\n"
        "try:\n"
        "    import senet_kernels\n"
        "except ImportError as error:\n"
        "    print(error)\n",
        pure_python,
    )
    assert re.search(r"expected the op .*squeeze.*got .*int axis", out)


# ---- values and derivatives, on every backend ----

_SPECS = (
    Spec((3, 16, 5, 7), 4),
    Spec((2, 8, 3, 5), 4, residual="channels_last", after="relu", layout="channels_last"),
    Spec((2, 9, 15), 3, torch.bfloat16, before="silu", after="hardswish", residual="contiguous"),
    Spec((2, 8, 3, 5), 4, torch.float16, gate="hardsigmoid", activation="silu", weighted=True),
    Spec((2, 8, 3, 5), None, torch.float64, shift=True, affine=True, before="gelu"),
    Spec((2, 8, 2, 3, 5), 4, layout="sliced_space", lengths=True, bias=False, weights="conv"),
    Spec((2, 8, 3, 5), part="squeeze", affine=True, lengths=True, before="mish"),
    Spec((2, 8, 15), dtype=torch.bfloat16, part="squeeze", layout="channels_last"),
    Spec((2, 8, 3, 5), part="channel_scale", after="relu", residual="contiguous", weighted=True),
    Spec((2, 8, 3, 5), part="channel_scale", gate="tanh", shift=True, affine=True, seed=1),
)
_CASES = [
    pytest.param(backend, spec, id=f"{backend}-{spec}")
    for backend in EXACT_BACKENDS
    for spec in _SPECS
    if spec.fits(backend)
]


@pytest.mark.parametrize(("backend", "spec"), _CASES, indirect=["backend"])
def test_like_the_oracle(backend: BackendCase, spec: Spec) -> None:
    problem = build(replace(spec, device=backend.device))
    right, scale = problem.expected(), magnitudes(problem)
    with use_backend(backend.name):
        oracle.assert_like_oracle(_run(problem), right, scale, problem.dtype)
        with torch.no_grad():
            y = _call(problem)
        with torch.inference_mode():
            inferred = _call(problem)
    oracle.assert_like_oracle({"y": y}, {"y": right["y"]}, scale, problem.dtype)
    assert torch.equal(inferred, y)


@pytest.mark.usefixtures("automatic")
@each_fused
def test_runs_the_backend_that_is_chosen_at_run_time(backend: BackendCase) -> None:
    problem = build(Spec((2, 8, 3, 5), 4, device=backend.device))
    right = problem.call(squeeze_excite, backend=backend.name)
    raw = f"senet_kernels::{backend.name}_forward"

    def ran() -> bool:
        with torch.profiler.profile() as profile, torch.no_grad():
            assert torch.allclose(_call(problem), right, atol=1e-5)
        return raw in {event.key for event in profile.key_averages()}

    assert ran()
    for name in ("fallback", "reference"):
        with use_backend(name):
            assert not ran()


@pytest.mark.parametrize("part", _NAMES)
def test_no_kernel_is_the_plain_composition(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "ORDER", ("fallback",))
    monkeypatch.setattr(resolve, "_RESOLVED", {})
    problem = build(Spec((2, 8, 3, 5), 4, part=part, before="silu"))
    with CountOperations() as counted:
        results = _run(problem)
    assert not [name for name in counted.calls if name.startswith("senet_kernels::")]
    oracle.assert_like_oracle(results, problem.expected(), magnitudes(problem), problem.dtype)
    with torch.no_grad():
        assert torch.equal(_call(problem), results["y"])
    # In float32 beside a narrower x, as autocast leaves them.
    tensors = {n: t if n in ("x", "u") or t is None else t.float()
               for n, t in problem.tensors.items()}  # fmt: skip
    narrow = problem.tensors["x"]
    assert narrow is not None
    tensors["x"] = narrow.bfloat16()
    y = _call(problem, tensors)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), results["y"], rtol=0.03, atol=0.03)


_SMALL = Spec((2, 3, 2, 3), 2, torch.float64, activation="silu")
_DERIVED = (
    _SMALL,
    replace(_SMALL, residual="contiguous", after="relu", before="silu"),
    replace(_SMALL, affine=True, lengths=True, shift=True, weighted=True, after="mish"),
    replace(_SMALL, part="squeeze", before="silu", lengths=True, affine=True),
    replace(_SMALL, part="channel_scale", gate="tanh", after="silu", residual="contiguous",
            weighted=True),
)  # fmt: skip


def _as_function(
    problem: Problem, names: Iterable[str] | None = None
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    wanted = problem.given if names is None else tuple(names)
    leaves = problem.leaves(wanted)

    def fn(*values: Tensor) -> Tensor:
        return _call(problem, {**leaves, **dict(zip(wanted, values, strict=True))})

    return fn, tuple(t for n in wanted if (t := leaves[n]) is not None)


@pytest.mark.parametrize("spec", _DERIVED, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True, ids=str)
def test_first_and_second_derivatives(backend: BackendCase, spec: Spec) -> None:
    if not spec.fits(backend):
        pytest.skip("the feature table leaves this to the fallback")
    fn, leaves = _as_function(build(replace(spec, device=backend.device, seed=1)))
    with use_backend(backend.name):
        assert torch.autograd.gradcheck(fn, leaves)
        assert torch.autograd.gradgradcheck(fn, leaves)


@pytest.mark.parametrize("spec", _DERIVED, ids=str)
def test_transforms(spec: Spec) -> None:
    problem = build(replace(spec, seed=1))
    fn, values = _as_function(problem)
    values = tuple(t.detach() for t in values)
    positions = tuple(range(len(values)))

    def right(*given: Tensor) -> Tensor:
        wanted = dict(zip(problem.given, given, strict=True))
        return problem.call(squeeze_excite, {**problem.tensors, **wanted}, backend="reference")

    tangents = tuple(torch.randn_like(t) for t in values)
    close = torch.testing.assert_close
    close(torch.func.jvp(fn, values, tangents), torch.func.jvp(right, values, tangents))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        close(transform(fn, positions)(*values), transform(right, positions)(*values))
    second = torch.func.hessian(lambda x: fn(x, *values[1:]).sin().sum())(values[0])
    close(second, torch.func.hessian(lambda x: right(x, *values[1:]).sin().sum())(values[0]))
    many = tuple(torch.stack([t, 2 * t, t + 1]) for t in values)
    close(torch.vmap(fn)(*many), torch.vmap(right)(*many))
    tangent = torch.func.jvp(right, values, tangents)[1]
    with fwAD.dual_level():
        y = fn(*(fwAD.make_dual(*pair) for pair in zip(values, tangents, strict=True)))
        close(fwAD.unpack_dual(y).tangent, tangent)


@each_fused
@pytest.mark.usefixtures("automatic", "poisoned_empty")
@pytest.mark.parametrize("spec", [s for s in _SPECS if s.dtype == torch.float32], ids=str)
def test_opcheck(backend: BackendCase, spec: Spec) -> None:
    if not spec.fits(backend):
        pytest.skip("the feature table leaves this to the fallback")
    problem = build(replace(spec, device=backend.device))
    for tensors in (None, problem.leaves(), problem.leaves(("x",))):
        args, kwargs = _arguments(problem, tensors)
        torch.library.opcheck(_op(problem.part), args, kwargs)


@needs_library
@pytest.mark.parametrize("spec", _SPECS, ids=str)
def test_kernels_of_the_library(spec: Spec) -> None:
    """What runs without Python parses the names itself."""
    problem = build(spec)
    args, kwargs = _arguments(problem)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    assert torch.equal(_op(problem.part).redispatch(keys, *args, **kwargs), _call(problem))


@pytest.mark.parametrize("part", _NAMES)
def test_fakes_and_meta_tensors(part: str) -> None:
    problem = build(Spec((2, 8, 3, 5), 4, layout="channels_last", part=part))
    real = _call(problem)
    args, kwargs = _arguments(problem)

    def check(y: Tensor, device: str) -> None:
        assert (y.shape, y.stride(), y.dtype) == (real.shape, real.stride(), real.dtype)
        assert y.device.type == device

    with FakeTensorMode() as mode:
        check(_op(part)(*(t if t is None else mode.from_tensor(t) for t in args), **kwargs), "cpu")
    check(_op(part)(*(t if t is None else t.to("meta") for t in args), **kwargs), "meta")


# ---- bad calls ----


def test_bad_calls() -> None:
    x, w, b = torch.randn(2, 8, 3, 5), torch.randn(8, 8), torch.randn(8)
    for call, error, said in (
        (lambda: _OPS.squeeze_excite(x, w, None, w, b, mask=x), ValueError, "mask: expected None"),
        (lambda: _OPS.squeeze(x, pool="max"), ValueError, "pool: expected 'mean'.*'max'"),
        (lambda: _OPS.squeeze_excite(x, w, None, w, b, gate="silu"), ValueError, "gate: expected"),
        (lambda: _OPS.squeeze(x, affine_scale=b), ValueError, "affine_scale, affine_shift"),
        (lambda: _OPS.squeeze_excite(x, w[:3], b, w, b), ValueError, "w1: expected 8 rows"),
        (lambda: _OPS.squeeze_excite(x, w.half(), None, w, b), TypeError, "w1: expected dtype"),
        (lambda: _OPS.channel_scale(x, x), ValueError, "u: expected shape"),
        (lambda: _OPS.channel_scale(x, w[:2], residual=x.half()), TypeError, "residual: expected"),
    ):
        with pytest.raises(error, match=said):
            call()
        x.requires_grad_(not x.requires_grad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA kernels are there")
def test_a_backend_that_cannot_run_raises_at_run_time() -> None:
    problem = build(Spec())
    with use_backend("triton"), pytest.raises(BackendUnavailableError, match="triton"):
        _call(problem)
