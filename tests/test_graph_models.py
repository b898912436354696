"""The compile door on networks of other libraries: every excitation is found, nothing differs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import randomise
from graph_compare import compare, difference, rewritten, tensors
from models import library
from senet_kernels import GraphReport

#: One of each family of timm with squeeze-and-excitation that is quick to compile.
_FAMILIES = (
    "regnety_002", "efficientnet_b0", "tinynet_e", "ghostnet_050", "ese_vovnet19b_dw",
    "fbnetc_100", "hardcorenas_a", "mixnet_s", "seresnext26t_32x4d", "mobilenetv3_large_075",
    "legacy_seresnet18", "semnasnet_050", "lcnet_050", "seresnet33ts", "skresnet18",
)  # fmt: skip
#: Classes of timm that are squeeze-and-excitation of two layers or one.
_TIMM_CLASSES = ("SEModule", "SqueezeExcite", "EffectiveSEModule")


def _count(model: nn.Module) -> int:
    return sum(type(m).__name__ in _TIMM_CLASSES for m in model.modules())


def _exact_gates(model: nn.Module) -> nn.Module:
    """The derivative of ``F.hardsigmoid`` has a 1/6 in float32; that of relu6 is exact."""
    for module in model.modules():
        if type(module).__name__ == "Hardsigmoid":
            module.forward = lambda x: F.relu6(x + 3.0) / 6.0  # type: ignore[method-assign]
    return model


def _compare_network(
    model: nn.Module, x: Tensor, training: bool, norm_in_training: bool = False
) -> GraphReport:
    """As :func:`graph_compare.compare`, with gradients relative to the largest of all."""
    torch._dynamo.reset()
    plain, other = model.train(training), copy.deepcopy(model)
    reports: list[GraphReport] = []
    results = []
    call = rewritten(other, reports, norm_in_training=norm_in_training)
    for module, run in ((plain, plain), (other, call)):
        torch.manual_seed(1)
        y = next(tensors(run(x)))
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        wanted = [p for p in module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True)
        flat = torch.cat([g.flatten() for g in gradients if g is not None])
        results.append(
            {"output": y.detach(), "gradients": flat}
            | {k: v for k, v in module.named_buffers() if v.is_floating_point()}
        )
    error, where = difference(*results)
    assert error < 1e-9, (where, error)
    return sum(reports, GraphReport())


def _timm(name: str, size: int = 64) -> tuple[nn.Module, Tensor]:
    timm = library("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=3).double()
    randomise(model)
    return model, torch.randn(2, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("seresnet18", True), ("mobilenetv3_small_050", False),
        pytest.param("seresnet18", False, marks=pytest.mark.slow),
        pytest.param("mobilenetv3_small_050", True, marks=pytest.mark.slow),
        *[pytest.param(n, t, marks=pytest.mark.slow)
          for n in _FAMILIES
          for t in (True, False)],
    ],
)  # fmt: skip
def test_networks_of_timm(name: str, training: bool) -> None:
    model, x = _timm(name)
    _exact_gates(model)
    report = _compare_network(model, x, training)
    assert len(report.fused) >= _count(model), report


class _MBConv(nn.Module):
    """As EfficientNet-PyTorch and MONAI write it: the excitation stands in the block's forward."""

    def __init__(self, c: int = 8, r: int = 2) -> None:
        super().__init__()
        self.depthwise, self.bn = (
            nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False),
            nn.BatchNorm2d(c),
        )
        self.reduce, self.expand = nn.Conv2d(c, r, 1), nn.Conv2d(r, c, 1)
        self.project, self.bn2 = nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)
        self.swish = nn.SiLU(inplace=True)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.swish(self.bn(self.depthwise(inputs)))
        squeezed = F.adaptive_avg_pool2d(x, 1)
        squeezed = self.expand(self.swish(self.reduce(squeezed)))
        x = torch.sigmoid(squeezed) * x
        return self.bn2(self.project(x)) + inputs


class _NAFBlock(nn.Module):
    """NAFNet's: gates of one half by the other, and a single layer without a function."""

    def __init__(self, c: int = 4) -> None:
        super().__init__()
        self.conv1, self.conv3 = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(c, c, 1)
        self.conv2 = nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))
        self.beta = nn.Parameter(torch.rand(1, c, 1, 1))

    def forward(self, inp: Tensor) -> Tensor:
        a, b = self.conv2(self.conv1(inp)).chunk(2, dim=1)
        x = a * b
        x = x * self.sca(x)
        return inp + self.conv3(x) * self.beta


def _monai_efficientnet(spatial_dims: int) -> nn.Module:
    nets = library("monai.networks.nets")
    return nets.EfficientNetBN(
        "efficientnet-b0", pretrained=False, spatial_dims=spatial_dims, num_classes=2
    )


def _monai_seresnet() -> nn.Module:
    nets = library("monai.networks.nets")
    return nets.SENet(
        spatial_dims=3, in_channels=1, block="se_resnet_bottleneck", layers=(1, 1, 1, 1), groups=1,
        reduction=16, num_classes=2, dropout_prob=None, inplanes=8, downsample_kernel_size=1,
        input_3x3=False,
    )  # fmt: skip


def _transformers(name: str, **config: Any) -> nn.Module:
    transformers = library("transformers")
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))


_NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, str]] = {
    "mbconv": (_MBConv, (2, 8, 6, 5), 1, "before silu"),
    "nafnet": (_NAFBlock, (2, 4, 6, 5), 1, "one layer"),
    "monai-seresnet-3d": (_monai_seresnet, (2, 1, 32, 32, 32), 4, "residual"),
    "regnet": (
        lambda: _transformers("RegNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                              groups_width=8, layer_type="y"),
        (2, 3, 32, 32), 2, "before relu",
    ),
    "efficientnet": (
        lambda: _transformers("EfficientNet", width_coefficient=0.25, depth_coefficient=0.1,
                              hidden_dim=320, image_size=32),
        (2, 3, 32, 32), 7, "before silu",
    ),
    "monai-efficientnet": (lambda: _monai_efficientnet(2), (2, 3, 64, 64), 16, "before silu"),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n.startswith(("monai", "efficient")) else n
     for n in _NETWORKS],
)  # fmt: skip
def test_networks_of_others(name: str, training: bool) -> None:
    build, shape, blocks, step = _NETWORKS[name]
    torch.manual_seed(0)
    model = build().double()
    randomise(model)
    for module in model.modules():  # one sample per channel is left at the end of small networks
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    report = _compare_network(model, torch.randn(shape, dtype=torch.float64), training)
    assert len(report.fused) == blocks, report
    assert all(step in f.note for f in report.fused), report


@pytest.mark.parametrize("name", ["mbconv", "regnet"])
def test_norms_in_training_join_as_under_inductor(name: str) -> None:
    build, shape, blocks, _ = _NETWORKS[name]
    torch.manual_seed(0)
    model = build().double()
    randomise(model)
    x = torch.randn(shape, dtype=torch.float64)
    report = _compare_network(model, x, True, norm_in_training=True)
    assert [f.note.endswith("BatchNorm") for f in report.fused] == [True] * blocks, report


def test_random_programs() -> None:
    """A sample; ``python tests/graph_fuzz.py --programs 5000`` runs many."""
    from collections import Counter

    import graph_fuzz

    counts: Counter[str] = Counter()
    wrong = [w for first in (0, 20, 60) for w in graph_fuzz.run(range(first, first + 20), counts)]
    assert not wrong, "\n".join(wrong)
    assert counts["programs"] > 25
    assert counts["fused"] > 15


@pytest.mark.slow
def test_the_fuzzer_would_see_a_wrong_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import Counter

    import graph_fuzz
    from senet_kernels.fuse.flow import Flow

    monkeypatch.setattr(Flow, "writer", lambda *_: None)
    monkeypatch.setattr(Flow, "why_write_stays", lambda *_: None)
    wrong = [w for f in (0, 20, 60) for w in graph_fuzz.run(range(f, f + 20), Counter())]
    assert wrong


def test_module_is_not_touched() -> None:
    torch.manual_seed(0)
    model = _MBConv().double()
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    compare(model, torch.randn(2, 8, 6, 5, dtype=torch.float64), tolerance=1e-9)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
