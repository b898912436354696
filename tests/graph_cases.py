"""Modules written to fool a matcher of dataflow. Each says how many excitations may be fused, and
where one may not, what the true cause is (a regular expression for the report)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

C, R = 8, 4
SHAPE = (3, C, 5, 8)


class Case(nn.Module):
    #: Excitations that are fused, in training and in eval.
    fused: ClassVar[int | tuple[int, int]] = 0
    #: What the report says where fewer are fused than there are products; None: says nothing.
    cause: ClassVar[str | None] = None
    dtype: ClassVar[torch.dtype] = torch.float64
    tolerance: ClassVar[float] = 1e-9

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(C, R, 1), nn.Conv2d(R, C, 1)

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))


# ---- writes to weights and buffers ----


class WeightClampedThroughData(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        self.b.weight.data.clamp_(-0.05, 0.05)
        return x * self.gate(x)


class WeightClampedWithoutGrad(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.b.weight.clamp_(-0.05, 0.05)
        return x * self.gate(x)


class WeightWrittenBetweenLayers(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x.mean((2, 3), keepdim=True)))
        self.b.weight.data.mul_(0.5)
        return x * self.b(h).sigmoid()


class WeightWrittenAfterItsUse(Case):
    cause = "overwritten"

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        self.b.weight.data.mul_(0.5)
        return x * g


class BiasWrittenAfterItsUse(Case):
    cause = "overwritten"

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        with torch.no_grad():
            self.a.bias.zero_()
        return x * g


class AverageOfGates(Case):
    cause = "used elsewhere"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        with torch.no_grad():
            self.average.lerp_(g.mean((0, 2, 3)), 0.1)
        return x * g


class AverageOfInputs(Case):
    fused = 1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.lerp_(x.mean((0, 2, 3)), 0.1)
        return x * self.gate(x)


class Counts(Case):
    fused = 1

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.gate(x)


# ---- intermediates that others see ----


class KeepsItsGate(Case):
    cause = "used elsewhere"

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.gate(x)
        return x * self.kept


class KeepsAListOfHidden(Case):
    cause = "used elsewhere"

    def __init__(self) -> None:
        super().__init__()
        self.kept_list: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x.mean((2, 3), keepdim=True)))
        self.kept_list.append(h)
        return x * self.b(h).sigmoid()


class ReturnsItsGate(Case):
    cause = "used elsewhere"

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        g = self.gate(x)
        return {"y": x * g, "g": g}


class OneGateForTwo(Case):
    cause = "used elsewhere"

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        return x * g + (x + 1) * g


class HookOfAGradient(Case):
    cause = "."

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        if g.requires_grad:
            g.register_hook(lambda d: d * 2)
        return x * g


class ForwardHookOfALayer(Case):
    cause = "mul"

    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_hook(lambda m, i, o: o * 2)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class BackwardHookOfALayer(Case):
    cause = "."

    def __init__(self) -> None:
        super().__init__()
        self.a.register_full_backward_hook(lambda m, i, o: (i[0] * 2,))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Prints(Case):
    cause = "input of the graph"

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        print(end="")
        return x * g


class BranchesOnValues(Case):
    cause = "input of the graph"

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        return x * g if g.mean() > 0.5 else x * (1 - g)


class BranchesOnShape(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-1] > 20 else x * self.gate(x)


# ---- in-place operators and aliases ----


class OverwritesItsInput(Case):
    cause = "overwrites"

    def forward(self, x: Tensor) -> Tensor:
        x *= self.gate(x)
        return x


class ActivatesItsInput(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(x)
        return x * self.gate(x)


class InputChangedBetween(Case):
    cause = "overwritten"

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.0
        g = self.gate(x)
        x.add_(1.0)
        return x * g


class InputChangedThroughAView(Case):
    cause = "overwritten"

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.0
        g = self.gate(x)
        x.view(-1).mul_(0.5)
        return x * g


class InputChangedThroughData(Case):
    cause = "overwritten"

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.0
        g = self.gate(x)
        x.data.mul_(0.5)
        return x * g


class InputChangedAfter(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.0
        y = x * self.gate(x)
        x.data.add_(1.0)
        return F.relu(y + x)


class HiddenActivatedInPlace(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.mean((2, 3), keepdim=True))
        h.relu_()
        return x * self.b(h).sigmoid()


class HiddenPartlyZeroed(Case):
    cause = "overwritten"

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.mean((2, 3), keepdim=True))
        h[:, :1].zero_()
        return x * self.b(F.relu(h)).sigmoid()


class GateItemSet(Case):
    cause = "overwritten"

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        g[:, 0] = 1
        return x * g


class GateWrittenAsOut(Case):
    cause = "."

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            u = self.b(F.relu(self.a(x.mean((2, 3), keepdim=True))))
            g = torch.empty_like(u)
            torch.sigmoid(u, out=g)
        return x * g


class ViewOverwritten(Case):
    cause = "holds"

    def forward(self, x: Tensor) -> Tensor:
        r = F.relu(x)
        v = r.view(r.shape)
        v.mul_(self.gate(v))
        return r + 0


class OutputOverwrittenThroughAView(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        y.view(-1).mul_(2.0)
        return y


class ShortcutOverwritten(Case):
    fused = 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = x * 2
        r += x * self.gate(x)
        return r, r.sum()


class InputOverwrittenByTheSum(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        q = x + 1
        y = q * self.gate(q)
        x += y
        return F.relu(x)


class ShortcutSeenByAnother(Case):
    fused = 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = x * 2
        v = r.view(-1)
        r += x * self.gate(x)
        return F.relu(r), v.sin()


class ActivationInPlaceKeptBefore(Case):
    fused = 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = x + 1
        v = q.view(-1)
        p = F.relu(q, inplace=True)
        return p * self.gate(p), v.sin()


class NormalisedOutputKept(Case):
    fused = 1

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = self.bn(x)
        p = F.relu(q)
        return p * self.gate(p), q


# ---- gradients, autocast, modes ----


class Detached(Case):
    cause = "detach"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.detach())


class SqueezeWithoutGrad(Case):
    cause = "gradient"

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.b(F.relu(self.a(z))))


class AllWithoutGrad(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * self.gate(x)
        return x + y


class GradModeBetween(Case):
    fused = 1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        z = x.mean((2, 3), keepdim=True)
        with torch.no_grad():
            self.seen.add_(1)
        return x * torch.sigmoid(self.b(F.relu(self.a(z))))


class AutocastOfTheGate(Case):
    cause = "autocast"
    dtype = torch.float32
    tolerance = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            g = self.gate(x)
        return x * g


class AutocastOfTheGateAndACast(Case):
    cause = "cast"
    dtype = torch.float32
    tolerance = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            g = self.gate(x)
        return x * g.to(x.dtype)


class AutocastOfAll(Case):
    fused = 1
    dtype = torch.float32
    tolerance = 2e-2

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x * self.gate(x)


class AutocastOffInside(Case):
    fused = 1
    dtype = torch.float32
    tolerance = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x * self.gate(x)


class SqueezeInAnotherDtype(Case):
    cause = "cast"

    def forward(self, x: Tensor) -> Tensor:
        z = x.float().mean((2, 3), keepdim=True).to(x.dtype)
        return x * torch.sigmoid(self.b(F.relu(self.a(z))))


class MeanInAnotherDtype(Case):
    cause = "cast"

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3), keepdim=True, dtype=torch.float32).double()
        return x * torch.sigmoid(self.b(F.relu(self.a(z))))


class SqueezeInFloat(Case):
    fused = 1
    dtype = torch.bfloat16
    tolerance = 2e-2

    def forward(self, x: Tensor) -> Tensor:
        z = x.float().mean((2, 3), keepdim=True).to(x.dtype)
        return F.relu(x * self.b(F.relu(self.a(z))).float().sigmoid().to(x.dtype) + x)


class ProductInFloat(Case):
    fused = 1
    dtype = torch.bfloat16
    tolerance = 2e-2

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * self.gate(x).float()).to(x.dtype)


class ProductLeftInFloat(Case):
    cause = "is of torch.float32, x of torch.bfloat16"
    dtype = torch.bfloat16
    tolerance = 2e-2

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).float()


class GateRounded(Case):
    cause = "a cast .*is of torch.bfloat16"
    dtype = torch.float32
    tolerance = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).bfloat16().float()


class CastToItsOwnDtype(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).to(x.dtype)


class Checkpointed(Case):
    fused = 1

    def forward(self, x: Tensor) -> Any:
        return checkpoint(lambda t: t * self.gate(t), x, use_reentrant=False)


class CheckpointThatWrites(Case):
    cause = "overwritten"

    def forward(self, x: Tensor) -> Any:
        x = x * 1.0
        g = self.gate(x)
        y = checkpoint(lambda t: t.data.mul_(0.5).sum() + t.sum(), x, use_reentrant=False)
        return x * g + y


class CheckpointBetween(Case):
    fused = 1

    def forward(self, x: Tensor) -> Any:
        g = self.gate(x)
        y = checkpoint(lambda t: F.relu(t * 2, inplace=True), x, use_reentrant=False)
        return x * g + y


class CustomSqueeze(Case):
    cause = "squeeze"

    class Squeeze(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: Tensor) -> Tensor:
            return t.mean((2, 3), keepdim=True)

        @staticmethod
        def backward(ctx: Any, d: Tensor) -> Tensor:
            return d.expand(SHAPE) * 0

    def forward(self, x: Tensor) -> Tensor:
        z = self.Squeeze.apply(x)
        return x * torch.sigmoid(self.b(F.relu(self.a(z))))


class Dropout(Case):
    fused = (0, 1)
    cause = "dropout"

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.relu(self.a(x.mean((2, 3), keepdim=True))), 0.5, self.training)
        return x * torch.sigmoid(self.b(h))


# ---- nearly squeeze-and-excitation ----


class IdleDropoutIsItsInput(Case):
    cause = "overwrites"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        m = F.dropout(x, 0.5, False)  # the same tensor, by another name
        m *= 2
        return m.mul_(self.gate(m)), x


class SlicedWeights(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3), keepdim=True)
        h = F.relu(F.conv2d(z, self.a.weight[:2], self.a.bias[:2]))
        return x * torch.sigmoid(F.conv2d(h, self.b.weight[:, :2], self.b.bias))


class TiedWeights(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        w = self.a.weight[:, :, 0, 0]
        u = F.linear(F.relu(F.linear(x.mean((2, 3)), w)), w.t())
        return x * torch.sigmoid(u)[:, :, None, None]


class WeightNorm(Case):
    fused = 1

    def __init__(self) -> None:
        super().__init__()
        torch.nn.utils.parametrizations.weight_norm(self.a)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class SqueezesAnother(Case):
    cause = "not the tensor that is scaled"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x + 1)


class GateOfTheFirstImage(Case):
    cause = "expected"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x[:1])


class ChannelsAsBatch(Case):
    cause = r"\bt\b"

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Conv2d(R, SHAPE[0], 1)
        self.a = nn.Conv2d(SHAPE[0], R, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3)).t()
        h = F.relu(F.linear(z, self.a.weight[:, :, 0, 0]))
        return x * torch.sigmoid(F.linear(h, self.b.weight[:, :, 0, 0])).t()[:, :, None, None]


class ScalesTheWidth(Case):
    cause = "expected"

    def forward(self, x: Tensor) -> Tensor:  # width and channels are equal
        return x * self.gate(x).flatten(1)[:, None, None, :]


class MeanOfRows(Case):
    cause = r"\[3, 8, 5, 1\]"

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.b(F.relu(self.a(x.mean(3, keepdim=True)))))


class MeanOverTheBatch(Case):
    cause = r"\[1, 8, 1, 1\]"

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((0, 2, 3), keepdim=True)
        return x * torch.sigmoid(self.b(F.relu(self.a(z))))


class SumOverAnotherCount(Case):
    cause = "sum"

    def forward(self, x: Tensor) -> Tensor:
        z = x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
        return x * torch.sigmoid(self.b(F.relu(self.a(z))))


class PooledToFour(Case):
    cause = "mean"

    def forward(self, x: Tensor) -> Tensor:
        z = F.adaptive_avg_pool2d(x, 2)
        return x * torch.sigmoid(self.b(F.relu(self.a(z)))).mean((2, 3), keepdim=True)


class MaximumAndMean(Case):
    cause = "add"

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3), keepdim=True) + x.amax((2, 3), keepdim=True)
        return x * torch.sigmoid(self.b(F.relu(self.a(z))))


class GroupedLayers(Case):
    cause = "groups"

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Conv2d(R, C, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class WideKernel(Case):
    cause = "1x1"

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Conv2d(R, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class ThreeLayers(Case):
    cause = "conv2d"

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))
        return x * torch.sigmoid(self.c(h))


class SteepLeakyReLU(Case):
    cause = "slope"

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.a(x.mean((2, 3), keepdim=True)), 0.2)
        return x * torch.sigmoid(self.b(h))


class SoftplusGate(Case):
    cause = "softplus"

    def forward(self, x: Tensor) -> Tensor:
        return x * F.softplus(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))


class ShiftedHardSigmoid(Case):
    cause = "clamp|gate"

    def forward(self, x: Tensor) -> Tensor:
        u = self.b(F.relu(self.a(x.mean((2, 3), keepdim=True))))
        return x * (F.relu6(u + 2) / 6)


class ClampForReLU6(Case):
    cause = "gradients at its ends"

    def forward(self, x: Tensor) -> Tensor:
        u = self.b(F.relu(self.a(x.mean((2, 3), keepdim=True))))
        return x * ((u + 3).clamp(0, 6) / 6)


class OneSidedClamp(Case):
    cause = "clamp"

    def forward(self, x: Tensor) -> Tensor:
        u = self.b(F.relu(self.a(x.mean((2, 3), keepdim=True))))
        return x * (0.2 * u + 0.5).clamp(min=0)


class StraightThrough(Case):
    cause = "add"

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        return x * (g + (g.round() - g).detach())


class LearnedFactor(Case):
    cause = "mul"

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((1, C, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gate(x) * self.factor)


class Noise(Case):
    cause = "add"

    def forward(self, x: Tensor) -> Tensor:
        u = self.b(F.relu(self.a(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(u + torch.randn_like(u))


class ScaledTwice(Case):
    cause = "used elsewhere|not the tensor"

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        return x * g * g


class ScaleAndShift(Case):
    fused = 1

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Conv2d(R, 2 * C, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))).chunk(2, 1)
        return F.relu(x * scale.sigmoid() + shift + x)


class ScaleAndShiftOfSlices(Case):
    fused = 1

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Conv2d(R, 2 * C, 1)

    def forward(self, x: Tensor) -> Tensor:
        u = self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))).flatten(1)
        return x * u[:, :C, None, None].sigmoid() + u[:, C:, None, None]


class ShiftBeforeScale(Case):
    cause = "half"

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Conv2d(R, 2 * C, 1)

    def forward(self, x: Tensor) -> Tensor:
        shift, scale = self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))).chunk(2, 1)
        return x * scale.sigmoid() + shift


# ---- neighbours ----


class SumOfItself(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return y + y


class SumWithAFactor(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x * self.gate(x), x, alpha=2)


class SumThatBroadcasts(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x * self.gate(x) + x[:1])


class SumWithALaterValue(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return F.relu(y + torch.sin(x))


class SumKept(Case):
    fused = 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = x * self.gate(x) + x
        return F.relu(s), s


class OneNormTwice(Case):
    fused = 1

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        q = F.silu(self.bn(x))
        return q * self.gate(q) + self.bn(x + 1)


class NormWithoutStatistics(Case):
    fused = 1

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(C, track_running_stats=False, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        q = F.relu(self.bn(x), inplace=True)
        return q * self.gate(q)


class NormWithACumulativeAverage(Case):
    fused = 1

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(C, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        q = F.relu(self.bn(x))
        return q * self.gate(q)


class StatisticsReadBetween(Case):
    fused = 1

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = F.relu(self.bn(x))
        mean = self.bn.running_mean.clone()
        return q * self.gate(q), mean


class ActivationSharedWithTheShortcut(Case):
    fused = 1

    def forward(self, x: Tensor) -> Tensor:
        p = F.silu(x)
        return p * self.gate(p) + p


class NextTakesTheActivation(Case):
    fused = 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(x * self.gate(x))
        return F.relu(y * self.gate(y))


CASES: list[type[Case]] = [
    value for value in globals().values()
    if isinstance(value, type) and issubclass(value, Case) and value is not Case
]  # fmt: skip
