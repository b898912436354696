"""Tools that capture a network to train it: pipelines split by stages, quantisation-aware training.
Every gradient is that of the network written out."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from captures import FEW, PUBLIC, Case, assert_same, export, gradients, operators, own
from models import library

each_of_few = pytest.mark.parametrize("case", FEW, ids=str)

# ---- pipelines ----

pipelining = pytest.importorskip("torch.distributed.pipelining")
fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of one: this process runs every stage and sends nothing."""
    dist.init_process_group("fake", rank=0, world_size=1, store=fake_pg.FakeStore())
    yield
    dist.destroy_process_group()


def _stages(case: Case) -> list[Any]:
    """The network in two stages: the convolution before the block, and the rest."""
    begin = {"block": pipelining.SplitPoint.BEGINNING}
    pipe = pipelining.pipeline(case.net(), (case.inputs(2)[0],), split_spec=begin)
    assert operators(pipe.split_gm) <= PUBLIC
    return [pipe.build_stage(i, torch.device("cpu")) for i in range(pipe.num_stages)]


# The latter computes the gradients of inputs and those of parameters apart, in two passes.
@pytest.mark.parametrize("schedule", ["ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble"])
@pytest.mark.usefixtures("one_rank")
@each_of_few
def test_pipelined(case: Case, schedule: str) -> None:
    if case.name == "halves" and schedule == "ScheduleInterleavedZeroBubble":
        pytest.skip("this schedule fails where operators share parameters: two addmm, one bias")
    stages = _stages(case)
    assert len(stages) == 2
    (x,) = case.inputs(4)
    step = getattr(pipelining, schedule)(
        stages, n_microbatches=2, loss_fn=lambda y, target: y.square().sum(), scale_grads=False
    )
    y = step.step(x, target=torch.zeros(len(x)))
    right = gradients(own(case.net(plain=True)), (x,))
    parameters = {n: p for stage in stages for n, p in stage.submod.named_parameters()}
    got = {"y": y.detach(), **{n: p.grad for n, p in parameters.items()}}
    del right["x"]
    assert_same(got, right)


# ---- quantisation-aware training ----


def _pt2e() -> ModuleType:
    """torchao's, or torch's own where it still has one."""
    try:
        pt2e = library("torchao.quantization.pt2e")
        library("torchao.quantization.pt2e.quantize_pt2e")
    except pytest.skip.Exception:
        pt2e = library("torch.ao.quantization")
        if not hasattr(pt2e, "quantize_pt2e"):
            pytest.skip("neither torchao nor this torch has quantisation of exported programs")
    return pt2e


def _quantizer(pt2e: ModuleType) -> Any:
    """Fake quantisation of what convolutions read: the images, and what the fused operators
    return. (An operator whose tensors have names is not annotated itself, torchao refuses.)"""
    q = pt2e.quantizer
    fake = pt2e.FakeQuantize.with_args(observer=pt2e.MovingAverageMinMaxObserver)
    spec = q.QuantizationSpec(
        dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=fake,
    )  # fmt: skip

    class Quantizer(q.Quantizer):  # type: ignore[misc,name-defined]
        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            for node in model.graph.nodes:
                if "aten.conv2d" in str(node.target):
                    node.meta["quantization_annotation"] = q.QuantizationAnnotation(
                        input_qspec_map=dict.fromkeys(node.args[:2], spec)
                    )
            return model

        def validate(self, model: torch.fx.GraphModule) -> None: ...

    return Quantizer()


def _prepared(case: Case, net: nn.Module, pt2e: ModuleType) -> torch.fx.GraphModule:
    prepare = library(f"{pt2e.__name__}.quantize_pt2e").prepare_qat_pt2e
    inputs = tuple(t.to(next(net.parameters()).dtype) for t in case.inputs())
    graph: torch.fx.GraphModule = prepare(
        torch.export.export(net, inputs).module(), _quantizer(pt2e)
    )
    assert operators(graph) <= PUBLIC
    return graph


@each_of_few
def test_prepared_for_quantisation(case: Case) -> None:
    pt2e = _pt2e()
    prepared = _prepared(case, case.net(), pt2e)
    assert any("activation_post_process" in name for name, _ in prepared.named_modules())
    prepared.apply(pt2e.disable_observer)
    prepared.apply(pt2e.disable_fake_quant)
    inputs = case.inputs()
    assert_same(gradients(own(prepared), inputs), gradients(own(case.net(plain=True)), inputs))


@each_of_few
def test_fake_quantisation_passes_gradients_on(case: Case) -> None:
    """Enabled, it rounds what lies around the block: the gradients are there, and near by."""
    prepared = _prepared(case, case.net().float(), _pt2e())
    inputs = tuple(t.float() for t in case.inputs())
    got = gradients(own(prepared), inputs)
    right = gradients(own(case.net(plain=True).float()), inputs)
    for name, value in right.items():
        found = got[name]
        if value is not None:
            assert found is not None, name
            assert (found - value).norm() < 0.2 * value.norm(), name


@each_of_few
def test_converted_to_integers(case: Case) -> None:
    """The operators stay whole between the integers, and the network is what it was."""
    pt2e = _pt2e()
    prepared = _prepared(case, case.net().float(), pt2e)
    inputs = tuple(t.float() for t in case.inputs())
    prepared(*inputs)  # observes ranges
    converted = library(f"{pt2e.__name__}.quantize_pt2e").convert_pt2e(prepared)
    assert "quantized_decomposed" in str(converted.graph)
    assert operators(converted) == operators(export(case).graph_module) != set()
    y = case.net(plain=True).float()(*inputs)
    assert (converted(*inputs) - y).norm() < 0.05 * y.norm()
