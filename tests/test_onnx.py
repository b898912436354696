"""ONNX: both of torch's exporters write standard operators, for any batch and size, and
onnxruntime computes what the network does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from captures import CASES, Case, dynamic_shapes
from models import REAL_MODELS, RealModel, library, timm_model
from senet_kernels import fuse_se_blocks, use_backend

#: One for each number of dimensions, and one of each kind of block.
_WANTED = (
    "call-shape=5x8x12,after=gelu_tanh,shift=True,lengths=True",
    "call-shape=5x8x6x7x2,before=leaky_relu,residual=contiguous,weighted=True",
    "call-shape=5x8x6x7,before=hardswish,weighted=True,affine=True,lengths=True",
    "FusedSEBlock-steps", "FusedSEBlock-single", "FusedSEBlock-tied", "FusedSEBlock-constant",
    "converted-halves", "converted-neighbours", "halves-lengths",
)  # fmt: skip
_IN_THE_GATE = (*_WANTED[:2], "FusedSEBlock-steps", "converted-neighbours", "halves-lengths")
_NAMED = {case.name: case for case in CASES}
_CASES = [
    pytest.param(_NAMED[name], marks=() if name in _IN_THE_GATE else pytest.mark.slow)
    for name in _WANTED
]
each_case = pytest.mark.parametrize("case", _CASES, ids=str)
each_exporter = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])


@pytest.fixture(autouse=True)
def _libraries() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        library(name)


def _export(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    dynamo: bool,
    shapes: tuple[dict[int, Any], ...],
) -> None:
    names = ["x", "lengths"][: len(inputs)]
    how: dict[str, Any] = {"dynamic_shapes": shapes, "verbose": False}
    if not dynamo:
        axes = [
            {axis: f"{name}{axis}" for axis in of} for name, of in zip(names, shapes, strict=True)
        ]
        how = {"dynamic_axes": dict(zip(names, axes, strict=True))}
    torch.onnx.export(model, inputs, path, dynamo=dynamo, input_names=names, **how)


def _assert_standard(path: Path) -> None:
    """Every node, those in subgraphs and functions too, is of ONNX's own domain."""
    model = library("onnx").load(path)
    library("onnx").checker.check_model(model)
    assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx"}
    assert len(model.functions) == 0
    nodes = list(model.graph.node)
    for node in nodes:
        assert node.domain in ("", "ai.onnx"), node
        for attribute in node.attribute:
            nodes.extend(attribute.g.node)


def _assert_same(model: nn.Module, path: Path, batches: list[tuple[Tensor, ...]]) -> None:
    options = library("onnxruntime").SessionOptions()
    options.intra_op_num_threads = 1
    session = library("onnxruntime").InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )
    names = [argument.name for argument in session.get_inputs()]
    for inputs in batches:
        with torch.no_grad():
            right = model(*inputs)
        given = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
        got = torch.from_numpy(session.run(None, given)[0])
        assert got.shape == right.shape
        assert (got - right).abs().max() <= 1e-5 * max(1.0, oracle.largest(right))


@each_exporter
@each_case
def test_small_networks(case: Case, dynamo: bool, tmp_path: Path) -> None:
    model = case.net().float().eval()

    def inputs(batch: int, larger: int) -> tuple[Tensor, ...]:
        x, *lengths = case.inputs(batch, larger)
        return (x.float(), *lengths)

    path = tmp_path / "model.onnx"
    _export(model, inputs(5, 0), path, dynamo=dynamo, shapes=dynamic_shapes(case))
    _assert_standard(path)
    _assert_same(model, path, [inputs(5, 0), inputs(1, 0), inputs(9, 3)])


@each_exporter
@pytest.mark.parametrize("name", ["native", "fallback"])
def test_a_backend_named_while_exporting(name: str, dynamo: bool, tmp_path: Path) -> None:
    case = _NAMED["FusedSEBlock-steps"]
    model, (x,) = case.net().float().eval(), case.inputs()
    with use_backend(name):
        _export(model, (x.float(),), tmp_path / "model.onnx", dynamo=dynamo, shapes=({0: "batch"},))
    _assert_standard(tmp_path / "model.onnx")
    _assert_same(model, tmp_path / "model.onnx", [(x.float(),)])


def test_a_program_of_torch_export(tmp_path: Path) -> None:
    case = _NAMED["FusedSEBlock-steps"]
    model, inputs = case.net().float().eval(), (case.inputs()[0].float(),)
    program = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes(case))
    torch.onnx.export(program, f=tmp_path / "model.onnx", dynamo=True, verbose=False)
    _assert_standard(tmp_path / "model.onnx")
    _assert_same(model, tmp_path / "model.onnx", [inputs])


@each_exporter
def test_a_network_in_training_mode(dynamo: bool, tmp_path: Path) -> None:
    """Parameters that take gradients are exported all the same."""
    case = _NAMED["halves-shift"]
    model, (x,) = case.net().float(), case.inputs()
    assert all(p.requires_grad for p in model.parameters())
    _export(model, (x.float(),), tmp_path / "model.onnx", dynamo=dynamo, shapes=({},))
    _assert_standard(tmp_path / "model.onnx")
    _assert_same(model, tmp_path / "model.onnx", [(x.float(),)])


_TIMM = [*(m for m in REAL_MODELS if m.name.endswith(("mobilenetv3_small_100", "efficientnet_b0"))
           and m.library == "timm"), timm_model("seresnet50", 16)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("neighbours", [False, True], ids=["", "neighbours"])
@each_exporter
@pytest.mark.parametrize("real", _TIMM, ids=str)
def test_networks_of_timm(
    real: RealModel, dynamo: bool, neighbours: bool, tmp_path: Path
) -> None:  # fmt: skip
    model, x = real.make(), real.input()
    assert len(fuse_se_blocks(model, neighbours=neighbours).replaced) >= real.blocks
    batch = torch.export.Dim("batch", min=1, max=64)
    path = tmp_path / "model.onnx"
    _export(model, (x,), path, dynamo=dynamo, shapes=({0: batch},))
    _assert_standard(path)
    _assert_same(model, path, [(x,), (torch.cat([x, 1 - x, x / 2]),)])
