"""Illegal calls: the right exception, naming the argument, what was expected and what came."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from backend_cases import FUSED_BACKENDS, BackendCase
from senet_kernels import (
    FusedSEBlock,
    NativeSEFunction,
    channel_scale,
    explain,
    pack_options,
    squeeze,
    squeeze_excite,
    use_backend,
)

_B, _C, _R, _S = 2, 8, 4, (3, 5)


def _legal() -> dict[str, Any]:
    return {
        "x": torch.randn(_B, _C, *_S),
        "w1": torch.randn(_R, _C), "b1": torch.randn(_R),
        "w2": torch.randn(_C, _R), "b2": torch.randn(_C),
    }  # fmt: skip


def _sparse() -> Tensor:
    return torch.randn(_B, _C, *_S).to_sparse()


_meta = torch.device("meta")
_TWICE = torch.randn(_C)

# name: (what is changed, exception, what the message must contain)
_BAD: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "x of rank 2": ({"x": torch.randn(2, 8)}, ValueError, ("x", "[B, C, *spatial]", "[2, 8]")),
    "x unbatched vector": ({"x": torch.randn(8)}, ValueError, ("x", "3 dimensions", "[8]")),
    "x not a tensor": ({"x": [1.0]}, TypeError, ("x", "tensor", "list")),
    "x integer": ({"x": torch.ones(2, 8, 3, dtype=torch.int32)}, TypeError, ("x", "int32")),
    "x complex": ({"x": torch.ones(2, 8, 3) * 1j}, TypeError, ("x", "complex64")),
    "x sparse": ({"x": _sparse()}, TypeError, ("x", "strided", "sparse")),
    "w1 columns": ({"w1": torch.randn(4, 7)}, ValueError, ("w1", "8", "[4, 7]")),
    "w1 rows": ({"w1": torch.randn(5, 8)}, ValueError, ("w1", "4", "[5, 8]")),
    "w1 rank 1": ({"w1": torch.randn(8)}, ValueError, ("w1", "[R, C]", "[8]")),
    "w1 kernel 3": ({"w1": torch.randn(4, 8, 3, 3)}, ValueError, ("w1", "[4, 8, 3, 3]")),
    "w1 not a tensor": ({"w1": "w"}, TypeError, ("w1", "tensor", "str")),
    "w2 rows": ({"w2": torch.randn(9, 4)}, ValueError, ("w2", "8", "[9, 4]")),
    "w2 columns": ({"w2": torch.randn(8, 5)}, ValueError, ("w1", "5", "[4, 8]")),
    "w2 None": ({"w2": None}, TypeError, ("w2", "tensor", "NoneType")),
    "w2 on another device": ({"w2": torch.empty(8, 4, device=_meta)}, ValueError,
                             ("w2", "cpu", "meta")),
    "w1 of another dtype": ({"w1": torch.randn(4, 8).double()}, TypeError,
                            ("w1", "float32", "float64")),
    "b2 of another dtype": ({"b2": torch.randn(8).bfloat16()}, TypeError,
                            ("b2", "float32", "bfloat16")),
    "b1 shape": ({"b1": torch.randn(5)}, ValueError, ("b1", "[4]", "[5]")),
    "b1 rank 2": ({"b1": torch.randn(4, 1)}, ValueError, ("b1", "[4]", "[4, 1]")),
    "b2 shape": ({"b2": torch.randn(1)}, ValueError, ("b2", "[8]", "[1]")),
    "b2 on another device": ({"b2": torch.empty(8, device=_meta)}, ValueError, ("b2", "meta")),
    "b1 without w1": ({"w1": None, "w2": torch.randn(8, 8)}, ValueError, ("b1", "None")),
    "w2 not square, single": ({"w1": None, "b1": None}, ValueError, ("w2", "8", "[8, 4]")),
    "residual shape": ({"residual": torch.randn(2, 8, 3, 4)}, ValueError,
                       ("residual", "[2, 8, 3, 5]", "[2, 8, 3, 4]")),
    "residual to broadcast": ({"residual": torch.randn(1, 8, 3, 5)}, ValueError,
                              ("residual", "[1, 8, 3, 5]")),
    "residual dtype": ({"residual": torch.randn(2, 8, 3, 5).half()}, TypeError,
                       ("residual", "float32", "float16")),
    "residual device": ({"residual": torch.empty(2, 8, 3, 5, device=_meta)}, ValueError,
                        ("residual", "meta")),
    "alpha shape": ({"alpha": torch.randn(1)}, ValueError, ("alpha", "[8]", "[1]")),
    "alpha a number": ({"alpha": 0.5}, TypeError, ("alpha", "tensor", "float")),
    "beta dtype": ({"beta": torch.randn(8).double()}, TypeError, ("beta", "float64")),
    "affine a tensor": ({"before_affine": torch.randn(2, 8)}, TypeError,
                        ("before_affine", "pair", "Tensor")),
    "affine of three": ({"before_affine": (_TWICE,) * 3}, TypeError, ("before_affine", "pair")),
    "affine shape": ({"before_affine": (_TWICE, torch.randn(7))}, ValueError,
                     ("before_affine[1]", "[8]", "[7]")),
    "affine dtype": ({"before_affine": (_TWICE.double(), _TWICE)}, TypeError,
                     ("before_affine[0]", "float64")),
    "lengths float": ({"lengths": torch.ones(2)}, TypeError, ("lengths", "int64", "float32")),
    "lengths int32": ({"lengths": torch.ones(2, dtype=torch.int32)}, TypeError,
                      ("lengths", "int64", "int32")),
    "lengths a list": ({"lengths": [1, 2]}, TypeError, ("lengths", "tensor", "list")),
    "lengths shape": ({"lengths": torch.ones(3, dtype=torch.int64)}, ValueError,
                      ("lengths", "[2]", "[3]")),
    "lengths too long": ({"lengths": torch.tensor([1, 16])}, ValueError,
                         ("lengths", "0..15", "16")),
    "lengths negative": ({"lengths": torch.tensor([-1, 2])}, ValueError,
                         ("lengths", "0..15", "-1")),
    "lengths device": ({"lengths": torch.empty(2, dtype=torch.int64, device=_meta)}, ValueError,
                       ("lengths", "meta")),
    "activation unknown": ({"activation": "swish"}, ValueError, ("activation", "silu", "'swish'")),
    "activation a gate": ({"activation": "sigmoid"}, ValueError, ("activation", "'sigmoid'")),
    "gate unknown": ({"gate": "softmax"}, ValueError, ("gate", "sigmoid", "'softmax'")),
    "gate an activation": ({"gate": "gelu"}, ValueError, ("gate", "'gelu'")),
    "before unknown": ({"before": "prelu"}, ValueError, ("before", "relu", "'prelu'")),
    "after unknown": ({"after": ""}, ValueError, ("after", "relu", "''")),
    "activation a function": ({"activation": torch.relu}, TypeError, ("activation", "name")),
    "activation a module": ({"activation": torch.nn.ReLU()}, TypeError, ("activation", "ReLU")),
    "gate a number": ({"gate": 3}, TypeError, ("gate", "int", "3")),
    "before unhashable": ({"before": ["relu"]}, TypeError, ("before", "list")),
    "after unhashable": ({"after": {}}, TypeError, ("after", "dict")),
    "backend unknown": ({"backend": "cuda"}, ValueError, ("backend", "native", "'cuda'")),
    "backend not a name": ({"backend": 1}, ValueError, ("backend", "1")),
}  # fmt: skip


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("case", _BAD)
def test_message_names_argument_expectation_and_value(case: str, grad: bool) -> None:
    change, exception, words = _BAD[case]
    arguments = {**_legal(), **change}
    for t in arguments.values():
        if grad and isinstance(t, Tensor) and t.is_floating_point():
            t.requires_grad_()
    tensors = [t for t in arguments.values() if isinstance(t, Tensor) and not t.is_meta]
    before = [t.clone() for t in tensors]
    with pytest.raises(exception) as caught:
        squeeze_excite(**arguments)
    message = str(caught.value)
    assert message.startswith(words[0]), message
    for word in words:
        assert word in message, message
    for t, old in zip(tensors, before, strict=True):
        assert t.layout != torch.strided or torch.equal(t, old)


def test_nested_tensors_are_refused() -> None:
    images = [torch.randn(_C, 3, width) for width in (5, 7)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        ragged = torch.nested.nested_tensor(images)
    with pytest.raises(TypeError, match=r"^x: expected a dense tensor, got a nested one"):
        squeeze_excite(**{**_legal(), "x": ragged})


@pytest.mark.parametrize("case", _BAD)
def test_explain_refuses_what_the_call_refuses(case: str) -> None:
    change, exception, words = _BAD[case]
    with pytest.raises(exception) as caught:
        explain(**{**_legal(), **change})
    assert str(caught.value).startswith(words[0])


def _inplace_bad() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    wide = torch.randn(_B, 1, *_S).expand(_B, _C, *_S)
    overlapping = torch.randn(200).as_strided((_B, _C, *_S), (60, 7, 5, 1))
    x = torch.randn(_B, _C, *_S)
    ring = torch.randn(241)
    weights = torch.randn(_C * _R)
    shared = torch.randn(_B * _C * 15 + _C * _R)
    half_x, w_inside = shared[: x.numel()].view_as(x), shared[-weights.numel() :].view(_R, _C)
    return {
        "x needs grad": ({"x": x.clone().requires_grad_()}, ValueError, "gradient"),
        "w1 needs grad": ({"w1": torch.randn(_R, _C, requires_grad=True)}, ValueError, "gradient"),
        "expanded x": ({"x": wide}, ValueError, "overlap"),
        "overlapping x": ({"x": overlapping}, ValueError, "overlap"),
        "residual is x": ({"x": x, "residual": x}, ValueError, "residual"),
        "residual overlaps x": ({"x": ring[:240].view_as(x), "residual": ring[1:].view_as(x)},
                                ValueError, "residual"),
        "negated view": ({"x": (x * 1j).conj().imag}, ValueError, "negated"),
        "w1 shares memory": ({"x": half_x, "w1": w_inside}, ValueError, "w1"),
    }  # fmt: skip


@pytest.mark.parametrize("case", _inplace_bad())
def test_inplace_refusals_write_nothing(case: str) -> None:
    change, exception, word = _inplace_bad()[case]
    arguments = {**_legal(), **change}
    before = arguments["x"].detach().clone()
    with pytest.raises(exception, match=word) as caught:
        squeeze_excite(**arguments, inplace=True)
    assert str(caught.value).startswith("inplace")
    assert torch.equal(arguments["x"], before)


def test_inplace_wants_the_dtype_of_the_result() -> None:
    arguments = {**_legal(), "x": torch.randn(_B, _C, *_S).half(), "inplace": True}
    before = arguments["x"].clone()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError) as caught:
        squeeze_excite(**arguments)
    assert "inplace" in str(caught.value)
    assert torch.equal(arguments["x"], before)


@pytest.mark.parametrize(
    ("call", "exception", "words"),
    [
        (lambda: squeeze(torch.randn(2, 8)), ValueError, ("x", "[2, 8]")),
        (lambda: squeeze(torch.randn(2, 8, 3), before="swish"), ValueError, ("before", "swish")),
        (lambda: squeeze(torch.randn(2, 8, 3), lengths=torch.tensor([0, 4])), ValueError,
         ("lengths", "0..3", "4")),
        (lambda: squeeze(torch.randn(2, 8, 3), before_affine=3), TypeError,
         ("before_affine", "int")),
        (lambda: channel_scale(torch.randn(2, 8, 3), torch.randn(2, 9)), ValueError,
         ("u", "[2, 8]", "[2, 9]")),
        (lambda: channel_scale(torch.randn(2, 8, 3), torch.randn(8)), ValueError, ("u", "[8]")),
        (lambda: channel_scale(torch.randn(2, 8, 3), torch.randn(2, 8).double()), TypeError,
         ("u", "float64")),
        (lambda: channel_scale(torch.randn(2, 8, 3), torch.randn(2, 8), gate="mish"), ValueError,
         ("gate", "mish")),
        (lambda: channel_scale(torch.randn(2, 8, 3), torch.randn(2, 8),
                               residual=torch.randn(2, 8)), ValueError, ("residual", "[2, 8]")),
        (lambda: FusedSEBlock(0), ValueError, ("channels", "positive", "0")),
        (lambda: FusedSEBlock(8, reduction=-2), ValueError, ("reduction", "-2")),
        (lambda: FusedSEBlock(8, hidden=-1), ValueError, ("hidden", "-1")),
        (lambda: FusedSEBlock(8, hidden=0), ValueError, ("hidden", "0")),
        (lambda: FusedSEBlock(8, hidden=2.0),  # type: ignore[arg-type]
         ValueError, ("hidden", "2.0")),
        (lambda: FusedSEBlock(True), ValueError, ("channels", "True")),
        (lambda: FusedSEBlock(8, activation="swish"), ValueError, ("activation", "swish")),
        (lambda: FusedSEBlock(8, gate=1), TypeError, ("gate", "int")),  # type: ignore[arg-type]
        (lambda: FusedSEBlock(8)(torch.randn(2, 9, 3)), ValueError, ("x", "[2, 9, 3]")),
        (lambda: pack_options(gate="gelu"), ValueError, ("gate", "gelu")),
        (lambda: use_backend("gpu").__enter__(), ValueError, ("backend", "gpu")),
        (lambda: FusedSEBlock(8, backend="gpu")(torch.randn(2, 8, 3)), ValueError,
         ("backend", "gpu")),
    ],
)  # fmt: skip
def test_other_entry_points(
    call: Callable[[], Any], exception: type[Exception], words: tuple[str, ...]
) -> None:
    with pytest.raises(exception) as caught:
        call()
    assert str(caught.value).startswith(words[0]), str(caught.value)
    for word in words:
        assert word in str(caught.value)


# Straight to the Function, past every check in Python: RuntimeError, and the process lives.
_RAW_PRELUDE = """
import torch, senet_kernels as sk
torch.manual_seed(0)
def legal():
    return [torch.randn(2, 8, 3, 5), torch.randn(4, 8), torch.randn(4), torch.randn(8, 4),
            torch.randn(8), sk.pack_options()]
def attempt(*args):
    try:
        y = sk.NativeSEFunction.apply(*args)
        if y.requires_grad:
            y.sum().backward()
    except RuntimeError:
        return
    except Exception as error:
        raise SystemExit(f"{type(error).__name__}, not RuntimeError: {error}")
    raise SystemExit(f"no error, but {tuple(y.shape)}")
assert sk.backends()["native"]
sk.NativeSEFunction.apply(*legal())
"""
# Raw ops of the halves, of an x [2, 8, 3] and a u [2, 8].
_NONE5 = "None, None, None, None, None"
_HALVES: dict[str, str] = {
    "squeeze: lengths": "squeeze(x, None, None, torch.ones(3, dtype=torch.int64), 0)",
    "squeeze: x of rank 2": "squeeze(u, None, None, None, 0)",
    "squeeze: dz of rank 3": "squeeze_backward(x, x, None, None, None, 0, 1)",
    "squeeze: dz too wide": "squeeze_backward(torch.randn(2, 9), x, None, None, None, 0, 1)",
    "scale: u of rank 1": f"channel_scale(x, u[0], {_NONE5}, 0, False)",
    "scale: u columns": f"channel_scale(x, torch.randn(2, 9), {_NONE5}, 0, False)",
    "scale: u batch": f"channel_scale(x, torch.randn(3, 8), {_NONE5}, 0, False)",
    "scale: u integer": f"channel_scale(x, u.long(), {_NONE5}, 0, False)",
    "scale: u on meta": f"channel_scale(x, u.to('meta'), {_NONE5}, 0, False)",
    "scale: alpha": "channel_scale(x, u, None, u[0, :7], None, None, None, 0, False)",
    "scale: mask missing": f"channel_scale_backward(x, x, u, {_NONE5}, u[:0], 1 << 12, 1)",
}
_RAW: dict[str, str] = {
    "x rank 2": "a[0] = torch.randn(2, 8)",
    "x rank 0": "a[0] = torch.randn(())",
    "x integer": "a[0] = torch.ones(2, 8, 3, 5, dtype=torch.int64)",
    "x bool": "a[0] = torch.ones(2, 8, 3, 5, dtype=torch.bool)",
    "x complex": "a[0] = torch.ones(2, 8, 3, 5, dtype=torch.complex64)",
    "x more channels": "a[0] = torch.randn(2, 9, 3, 5)",
    "x fewer channels": "a[0] = torch.randn(2, 7, 3, 5)",
    "x on meta": "a[0] = a[0].to('meta')",
    "x sparse": "a[0] = a[0].to_sparse()",
    "w1 on meta": "a[1] = a[1].to('meta')",
    "b2 on meta": "a[4] = a[4].to('meta')",
    "w1 rank 1": "a[1] = torch.randn(8)",
    "w1 rank 3, not ones": "a[1] = torch.randn(4, 8, 2)",
    "w1 transposed": "a[1] = torch.randn(8, 4)",
    "w1 too many rows": "a[1] = torch.randn(400, 8)",
    "w1 of half": "a[1] = a[1].half()",
    "w1 double": "a[1] = a[1].double()",
    "w1 integer": "a[1] = torch.ones(4, 8, dtype=torch.int32)",
    "w1 None, w2 not square": "a[1] = a[2] = None",
    "w1 None, b1 given": "a[1] = None; a[3] = torch.randn(8, 8)",
    "lengths on meta": "a += [None] * 5 + [torch.ones(2, dtype=torch.int64, device='meta')]",
    "lengths of int32": "a += [None] * 5 + [torch.ones(2, dtype=torch.int32)]",
    "lengths too few": "a += [None] * 5 + [torch.ones(1, dtype=torch.int64)]",
    "w2 too few rows": "a[3] = torch.randn(7, 4)",
    "w2 too many rows": "a[3] = torch.randn(800, 4)",
    "w2 too many columns": "a[3] = torch.randn(8, 5)",
    "b1 too short": "a[2] = torch.randn(3)",
    "b1 rank 2": "a[2] = torch.randn(4, 4)",
    "b1 scalar": "a[2] = torch.randn(())",
    "b2 too short": "a[4] = torch.randn(1)",
    "b2 integer": "a[4] = torch.ones(8, dtype=torch.int64)",
    "options negative": "a[5] = -1",
    "options too large": "a[5] = 1 << 40",
    "options with an unknown function": "a[5] = 0xF",
    "gate out of its range": "a[5] = 0xD0",
    "residual shape": "a.append(torch.randn(2, 8, 3, 4))",
    "residual to broadcast": "a.append(torch.randn(1, 8, 1, 1))",
    "residual dtype": "a.append(torch.randn(2, 8, 3, 5).double())",
    "residual on meta": "a.append(torch.empty(2, 8, 3, 5, device='meta'))",
    "dy of another shape": (
        "a[0].requires_grad_()\n"
        "y = torch.ops.senet_kernels.native_forward(*a[:5], *[None] * 6, a[5], True)\n"
        "dy = torch.randn(2, 8, 3, 4)\n"
        "raw = torch.ops.senet_kernels.native_backward\n"
        "attempt = lambda *_: attempt_op(raw, dy, *a[:5], *[None] * 6, y[1], y[2], a[5], 31)\n"
    ),
    "saved too short": (
        "y = torch.ops.senet_kernels.native_forward(*a[:5], *[None] * 6, a[5], True)\n"
        "raw = torch.ops.senet_kernels.native_backward\n"
        "attempt = lambda *_: attempt_op(\n"
        "    raw, y[0], *a[:5], *[None] * 6, y[1][:3], y[2], a[5], 31)\n"
    ),
    "mask missing": (
        "a[5] = sk.pack_options(after='relu')\n"
        "y = torch.ops.senet_kernels.native_forward(*a[:5], *[None] * 6, a[5], True)\n"
        "raw = torch.ops.senet_kernels.native_backward\n"
        "attempt = lambda *_: attempt_op(\n"
        "    raw, y[0], *a[:5], *[None] * 6, y[1], y[2][:0], a[5], 31)\n"
    ),
}
_RAW |= {
    name: (
        "x, u = torch.randn(2, 8, 3), torch.randn(2, 8)\n"
        f"attempt = lambda *_: attempt_op(lambda: torch.ops.senet_kernels.native_{call})"
    )
    for name, call in _HALVES.items()
}
_ATTEMPT_OP = """
def attempt_op(op, *args):
    try:
        op(*args)
    except RuntimeError:
        return
    raise SystemExit("no error")
"""
_FUSED = [b for b in FUSED_BACKENDS if b.name == "native"]


@pytest.mark.parametrize("backend", _FUSED, indirect=True, ids=str)
def test_bad_arguments_to_the_function_itself(backend: BackendCase) -> None:
    """All in one fresh process that reports each verdict: a crash names the case it died in."""
    cases = "\n".join(
        f"def case_{i}():\n{textwrap.indent('global attempt', '    ')}\n"
        f"    a = legal()\n{textwrap.indent(body, '    ')}\n    attempt(*a)\n"
        for i, body in enumerate(_RAW.values())
    )
    driver = (
        "keep = attempt\n"
        f"for i in range({len(_RAW)}):\n"
        "    attempt = keep\n"
        "    print('case', i, flush=True)\n"
        "    try:\n"
        "        globals()[f'case_{i}']()\n"
        "    except SystemExit as verdict:\n"
        "        print('bad', i, verdict, flush=True)\n"
        "print('done')\n"
    )
    script = f"{_RAW_PRELUDE}{_ATTEMPT_OP}{cases}\n{driver}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    names = list(_RAW)
    lines = done.stdout.split("\n")
    if "done" not in lines:
        last = int([line for line in lines if line.startswith("case")][-1].split()[1])
        pytest.fail(f"died with {done.returncode} in {names[last]!r}: {done.stderr[-2000:]}")
    bad = [line.split(maxsplit=2)[1:] for line in lines if line.startswith("bad")]
    assert not bad, {names[int(i)]: verdict for i, verdict in bad}


def test_the_function_names_what_is_wrong() -> None:
    with pytest.raises(RuntimeError):
        NativeSEFunction.apply(torch.randn(2, 8, 3), torch.randn(4, 9), None, torch.randn(8, 4),
                               None)  # fmt: skip
