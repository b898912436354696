"""Modules written to be taken for squeeze-and-excitation though they are more, less or other than
that, and modules that are it in unusual words. Each says whether it may be fused, and where it may
not, what the true cause is (a regular expression for the report): what it does, or that Dynamo does
not trace that, as releases of PyTorch differ in it."""

from __future__ import annotations

import collections
import itertools
import logging
import os
import random
import time
import types
import warnings
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet_kernels.validation import DTYPES

C, R = 16, 4
LOG: list[Any] = []
TABLE: dict[str, Any] = {}
CALLS = 0
FACTOR = [1.0]
LOGGER = logging.getLogger("excitation")


class Registry:
    calls = 0


class Case(nn.Module):
    #: What the report says; None: it is fused.
    cause: ClassVar[str | None] = None
    #: Where it is fused: others are left to its own forward.
    dtypes: ClassVar[tuple[torch.dtype, ...]] = DTYPES

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(C, R, 1), nn.Conv2d(R, C, 1)

    def mean(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)

    def excite(self, z: Tensor) -> Tensor:
        u: Tensor = self.b(F.relu(self.a(z)))
        return u.sigmoid()

    def gate(self, x: Tensor) -> Tensor:
        return self.excite(self.mean(x))


# ---- side effects ----


class CountsItsCalls(Case):
    cause = r"changes.* self"

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.gate(x)


class SetsWhatIsSo(Case):
    cause = r"changes.* self"

    def forward(self, x: Tensor) -> Tensor:
        self.ready = True
        return x * self.gate(x)


class KeepsItsGate(Case):
    cause = r"changes.* self"

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.gate(x)
        return x * self.last


class KeepsAList(Case):
    cause = r"changes.* self\.log"

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        self.log.append(g)
        return x * g


class KeepsADictionary(Case):
    cause = r"changes.* self\.kept"

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        self.kept["gate"] = g
        return x * g


class KeepsASet(Case):
    cause = r"changes.* self\.shapes"

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[Any] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.add("seen")
        return x * self.gate(x)


class KeepsADeque(Case):
    cause = r"changes.* self\.recent"

    def __init__(self) -> None:
        super().__init__()
        self.recent: Any = collections.deque(maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        self.recent.append(1)
        return x * self.gate(x)


class KeepsAnObject(Case):
    cause = r"changes.* self\.state"

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = Registry()

    def forward(self, x: Tensor) -> Tensor:
        self.state.gate = self.gate(x)
        return x * self.state.gate


class KeepsOutside(Case):
    cause = r"changes.* LOG"

    def forward(self, x: Tensor) -> Tensor:
        LOG.append(1)
        return x * self.gate(x)


class KeepsInATableOutside(Case):
    cause = r"changes.* TABLE"

    def forward(self, x: Tensor) -> Tensor:
        TABLE["last"] = 1
        return x * self.gate(x)


class CountsInAGlobal(Case):
    cause = r"changes.* CALLS"

    def forward(self, x: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        return x * self.gate(x)


class CountsInItsClass(Case):
    cause = r"changes.* type\(self\)|Dynamo cannot trace.*setattr.*'type'"
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return x * self.gate(x)


class CountsInAnotherClass(Case):
    cause = r"changes.* Registry|Dynamo cannot trace.*setattr.*'type'"

    def forward(self, x: Tensor) -> Tensor:
        Registry.calls += 1
        return x * self.gate(x)


class CountsInAClosure(Case):
    cause = r"changes.* self\.count"

    def __init__(self) -> None:
        super().__init__()
        calls = 0

        def count() -> None:
            nonlocal calls
            calls += 1

        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        self.count()
        return x * self.gate(x)


class MarksItsInput(Case):
    cause = r"changes.* x"

    def forward(self, x: Tensor) -> Tensor:
        x.seen = True  # type: ignore[attr-defined]
        return x * self.gate(x)


class MarksItsOutput(Case):
    cause = "attribute"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        y.excited = True  # type: ignore[attr-defined]
        return y


class MarksItsWeight(Case):
    cause = r"changes.* self\.a\.weight"

    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.seen = True
        return x * self.gate(x)


class HooksTheGradientOfX(Case):
    cause = "hook"

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda d: d * 2)
        return x * self.gate(x)


class HooksTheGradientOfAWeight(Case):
    cause = "hook"

    def forward(self, x: Tensor) -> Tensor:
        if self.a.weight.requires_grad and len(self.a.weight._backward_hooks or ()) == 0:
            self.a.weight.register_hook(lambda d: d * 2)
        return x * self.gate(x)


class SwitchesItsMode(Case):
    cause = r"changes.* self"

    def forward(self, x: Tensor) -> Tensor:
        self.b.eval()
        return x * self.gate(x)


class SwitchesGradientsOff(Case):
    cause = "gradient|grad_enabled"

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x * self.gate(x)


class SwitchesTheDefaultDtype(Case):
    cause = "set_default_dtype"

    def forward(self, x: Tensor) -> Tensor:
        torch.set_default_dtype(torch.get_default_dtype())
        return x * self.gate(x)


class Prints(Case):
    cause = "Dynamo cannot trace.*print"

    def forward(self, x: Tensor) -> Tensor:
        print(end="")
        return x * self.gate(x)


class Warns(Case):
    cause = "Dynamo cannot trace.*warn"

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("excited", stacklevel=2)
        return x * self.gate(x)


class BranchesOnARandomNumber(Case):
    cause = "Dynamo cannot trace.*([Rr]andom|[Dd]ata-dependent branching)"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x) if random.random() < 2 else x


class DrawsARandomNumber(Case):
    cause = "Dynamo cannot trace.*[Rr]andom|more than compute.*rand"

    def forward(self, x: Tensor) -> Tensor:
        random.random()
        return x * self.gate(x)


class ScalesByARandomNumber(Case):
    cause = "more than compute.*rand"

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gate(x) * random.uniform(0.5, 2))


class DrawsARandomTensor(Case):
    cause = "rand"

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(2)
        return x * self.gate(x)


# ---- writes to parameters ----


class ClampsItsWeight(Case):
    cause = r"overwrites .*b\.weight"

    def forward(self, x: Tensor) -> Tensor:
        self.b.weight.data.clamp_(-0.05, 0.05)
        return x * self.gate(x)


class ClampsItsBiasWithoutGrad(Case):
    cause = r"overwrites .*b\.bias"

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.b.bias.clamp_(-0.05, 0.05)
        return x * self.gate(x)


class RenormsItsWeight(Case):
    cause = r"renorm|overwrites"

    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.data = torch.renorm(self.a.weight.data, 2, 0, 0.5)
        return x * self.gate(x)


class FreezesItself(Case):
    cause = "requires_grad"

    def forward(self, x: Tensor) -> Tensor:
        self.b.weight.requires_grad_(False)
        return x * self.gate(x)


class MovingAverage(Case):
    cause = "overwrites .*average"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        with torch.no_grad():
            self.average.lerp_(g.mean((0, 2, 3)), 0.1)
        return x * g


class OverwritesItsInput(Case):
    cause = "overwrites"

    def forward(self, x: Tensor) -> Tensor:
        x *= self.gate(x)
        return x


class ActivatesItsInput(Case):
    cause = "relu"

    def forward(self, x: Tensor) -> Tensor:
        F.relu_(x)
        return x * self.gate(x)


# ---- what it asks and what it branches on ----


class BranchesOnValues(Case):
    cause = "Dynamo cannot trace.*[Dd]ata-dependent"

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        return x * g if g.mean() > 0.5 else x * (1 - g)


class BranchesOnSize(Case):
    cause = "extents"

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-1] > 20 else x * self.gate(x)


class BranchesOnOneImage(Case):
    cause = "extents"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x) if len(x) > 1 else x


class BranchesOnOnePosition(Case):
    cause = "extents"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x) if x.shape[2:].numel() > 1 else x


class MadeForOneExtent(Case):
    cause = "extents|sum"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(x.sum((2, 3), keepdim=True) / 35)


class MeanOfAWindow(Case):
    cause = "squeeze|window"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(F.avg_pool2d(x, (5, 7))[:, :, :1, :1])


class BranchesOnDtype(Case):
    cause = "bfloat16"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return 2 * y if x.dtype == torch.bfloat16 else y


class BranchesOnDtypeByName(Case):
    cause = "float64"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return 2 * y if str(getattr(x, "dtype")).endswith("64") else y  # noqa: B009


class BranchesOnLayout(Case):
    cause = "channels-last"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return y if x.is_contiguous() else 2 * y


class BranchesOnDevice(Case):
    cause = "device"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return 2 * y if x.is_cuda else y


class BranchesOnTraining(Case):
    cause = "in training"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return 2 * y if self.training else y


class BranchesOnTrainingOfALayer(Case):
    cause = "in training"

    def forward(self, x: Tensor) -> Tensor:
        return x if self.b.training else x * self.gate(x)


class BranchesOnGradMode(Case):
    cause = "without gradients"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return y if torch.is_grad_enabled() else 2 * y


class BranchesOnRequiresGrad(Case):
    cause = "without gradients"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return y if x.requires_grad else 2 * y


class BranchesOnAFrozenWeight(Case):
    cause = "without gradients|frozen"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return y if self.a.weight.requires_grad else 2 * y


class BranchesOnCompiling(Case):
    cause = "compil"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return y if torch.compiler.is_compiling() else 2 * y


class BranchesOnTheEnvironment(Case):
    cause = "environ"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return y if os.environ.get("NO_EXCITATION_AT_ALL") is None else x


class ReadsAListOutside(Case):
    cause = "FACTOR"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return y if FACTOR[0] == 1 else y * FACTOR[0]


class ReadsAnObject(Case):
    cause = r"self\.config"

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(twice=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return 2 * y if self.config.twice else y


class ReadsTheDefaultDtype(Case):
    cause = "get_default_dtype"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).to(torch.get_default_dtype())


class BranchesOnDeterminism(Case):
    cause = "deterministic"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return 2 * y if torch.are_deterministic_algorithms_enabled() else y


class BranchesOnABackend(Case):
    cause = "mkldnn"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return y if torch.backends.mkldnn.enabled else 2 * y


class BranchesOnParameters(Case):
    cause = "Parameter"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return 2 * y if isinstance(x, nn.Parameter) else y


class BranchesOnAMark(Case):
    cause = "attribute of x"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return 2 * y if hasattr(x, "tag") else y


class ReadsAMark(Case):
    cause = "attribute of x"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * self.gate(x) * getattr(x, "factor", 1)
        return y


class BranchesOnHooks(Case):
    cause = "_forward_hooks"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return 2 * y if len(self._forward_hooks) else y


class BranchesOnRetainedGradients(Case):
    cause = "retains_grad"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return 2 * y if x.retains_grad else y


class ReadsADefault(Case):
    cause = "factor"

    def forward(self, x: Tensor, factor: list[float] = [1.0]) -> Tensor:  # noqa: B006
        return x * self.gate(x) * factor[0]


class KeepsADefault(Case):
    cause = "changes.* seen"

    def forward(self, x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
        seen.append(1)
        return x * self.gate(x)


class BranchesOnTheClock(Case):
    cause = r"Dynamo cannot trace.*time"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return y if time.time() > 0 else 2 * y


class AdvancesAnIterator(Case):
    cause = r"changes.* self\.calls|Dynamo cannot trace.*__next__"

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        next(self.calls)
        return x * self.gate(x)


class Logs(Case):
    cause = "Dynamo cannot trace.*logging"

    def forward(self, x: Tensor) -> Tensor:
        LOGGER.debug("excited")
        return x * self.gate(x)


class SeedsTheGenerator(Case):
    cause = "manual_seed"

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return x * self.gate(x)


# ---- other arithmetic ----


class GateOfTheNextImage(Case):
    cause = "roll"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).roll(1, 0)


class GatesReversed(Case):
    cause = "flip"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).flip(1)


class ReturnsAPair(Case):
    cause = "returns"

    def forward(self, x: Tensor) -> Any:
        return x * self.gate(x), None


class ReturnsADictionary(Case):
    cause = "returns"

    def forward(self, x: Tensor) -> Any:
        return {"y": x * self.gate(x)}


class ReturnsItsGate(Case):
    cause = "returns"

    def forward(self, x: Tensor) -> Any:
        g = self.gate(x)
        return x * g, g


class LargeValuesClamped(Case):
    cause = "clamp"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.clamp(-1e4, 1e4))


class LargeHiddenClamped(Case):
    cause = "clamp"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.b(self.a(self.mean(x)).clamp(0, 50)).sigmoid()


class GateClamped(Case):
    cause = "clamp|minimum"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).clamp(max=0.999999)


class NearlyAMean(Case):
    cause = "sum"

    def forward(self, x: Tensor) -> Tensor:
        z = x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3] + 1e-6)
        return x * self.excite(z)


class Detached(Case):
    cause = "detach"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.detach())


class FrozenInside(Case):
    cause = "detach|computed"

    def forward(self, x: Tensor) -> Tensor:
        u = F.conv2d(F.relu(self.a(self.mean(x))), self.b.weight.detach(), self.b.bias)
        return x * u.sigmoid()


class GradientScaled(Case):
    cause = "."

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        return x * (g + (g.round() - g).detach())


class CustomGradient(Case):
    cause = "."

    class Gate(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, u: Tensor) -> Tensor:
            return u.sigmoid()

        @staticmethod
        def backward(ctx: Any, d: Tensor) -> Tensor:
            return 2 * d

    def forward(self, x: Tensor) -> Tensor:
        return x * self.Gate.apply(self.b(F.relu(self.a(self.mean(x)))))


class MakesContiguous(Case):
    cause = "contiguous"

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gate(x)).contiguous()


class MakesItsInputContiguous(Case):
    cause = "contiguous"

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        return x * self.gate(x)


class GateOfAllStrides(Case):
    cause = "strides"

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).expand_as(x).contiguous() * x


class ReturnsFloat(Case):
    cause = "float"

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gate(x)).float()


class RoundsItsGate(Case):
    cause = r"bfloat16, a cast"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).bfloat16().to(x.dtype)


class RoundsItsInput(Case):
    cause = "bfloat16"

    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16().to(x.dtype) * self.gate(x)


class AutocastInside(Case):
    cause = "autocast"

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x * self.gate(x)


class TwoExcitations(Case):
    cause = "2 excitations|mul"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return y * self.gate(y)


class SpatialToo(Case):
    cause = "."

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Conv2d(C, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x) + x * self.s(x).sigmoid()


class SwappedBiases(Case):
    cause = "weight|bias"

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(C, R, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.conv2d(self.mean(x), self.a.weight, self.c.bias))
        return x * self.b(h).sigmoid()


class WeightNorm(Case):
    cause = "computed"

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.a)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class OwnParameters(nn.Module):
    cause = "parameters of its own"

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(R, C)), nn.Parameter(torch.randn(C, R))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.linear(x.mean((2, 3)), self.w1))
        return x * torch.sigmoid(F.linear(h, self.w2))[:, :, None, None]


# ---- squeeze-and-excitation all the same ----


class InItsOwnWords(Case):
    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        z = x.view(b, c, h * w).sum(-1).div(h * w).view(b, c, 1, 1)
        return torch.mul(self.excite(z).expand_as(x), x)


class OfASubclass(Case):
    class Layer(nn.Conv2d):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.a = self.Layer(C, R, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class PlusOne(Case):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.gate(x))


class WholeSlices(Case):
    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        h = F.relu(F.conv2d(self.mean(x), self.a.weight[:, :c], self.a.bias))
        return x * torch.sigmoid(F.conv2d(h, self.b.weight[:c], self.b.bias[:c]))


class OffAutocast(Case):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x * self.gate(x.to(self.a.weight.dtype))


class AsksWhatDoesNotMatter(Case):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype.is_floating_point
        assert not torch.is_grad_enabled() or x.dim() == 4
        y = x * self.gate(x)
        assert not self.training or y.requires_grad or not torch.is_grad_enabled()
        return y


class KernelOfTheExtents(Case):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(F.avg_pool2d(x, x.shape[2:]))


class MeanInFloat(Case):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(self.mean(x.float()).type_as(self.a.weight))


class MeanOfDtypeFloat(Case):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(x.mean((2, 3), keepdim=True, dtype=torch.float32).to(x.dtype))


class AllInFloat(Case):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        w1, b1, w2, b2 = (p.float() for p in self.parameters())
        v = x.float()
        h = F.relu(F.conv2d(self.mean(v), w1, b1))
        return (v * F.conv2d(h, w2, b2).sigmoid() + v).to(x.dtype)


class GateInFloat(Case):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        u = self.b(F.relu(self.a(self.mean(x))))
        return (x * u.float().sigmoid()).to(x.dtype)


class IdleDropout(Case):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.drop(self.gate(x))


class AssertsItsExtents(Case):
    cause = "branches on the extents"

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[3] < 1000, "a large map"
        return x * self.gate(x)


class MarksRanges(Case):
    cause = "ranges for profilers .record_function"

    def forward(self, x: Tensor) -> Tensor:
        with torch.profiler.record_function("se"):
            return x * self.gate(x)


class AsksForTheDefaultDtype(Case):
    cause = "settings of the process .get_default_dtype"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return y if torch.get_default_dtype() == torch.float32 else 2 * y


class AsksForDeterminism(Case):
    cause = "settings of the process"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return 2 * y if torch.are_deterministic_algorithms_enabled() else y


class AsksWhetherItIsALeaf(Case):
    cause = "how a tensor was made .is_leaf"

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return 2 * y if x.is_leaf else y


CASES: tuple[type[nn.Module], ...] = tuple(
    kind
    for kind in list(globals().values())
    if isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "cause")
    and kind is not Case
)  # fmt: skip
