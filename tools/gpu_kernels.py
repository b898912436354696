"""The cases that say whether the kernels of a backend are right on this machine, and the process
that runs them.

``tools/gpu_verdicts.py`` starts such processes, which take one case after another: a kernel proves
itself as in :mod:`senet_kernels.trust`, against float64, between guard bands, with NaN; or its
calls are captured in a CUDA graph, run on two streams at a time, or are the first of a process.
``python -m tools.gpu_kernels triton|native [cuda|cpu]`` runs every kernel once, for a sanitizer.

Shapes are odd, so that every mask is needed, and just beyond a tile; the CUDA kernels run by every
policy of tests/policies.py. On ``cpu`` the card is pretended: Triton's ops are the C++ kernels
(tests/pretended.py), the CUDA kernels run in the simulation of tests/simt.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.problem import LAYOUTS
from benchmarks.workloads import Layer, load_networks
from senet_kernels import channel_scale, squeeze
from senet_kernels.features import Call
from senet_kernels.pointwise import Options
from senet_kernels.trust import kinds, problem, proof, worker
from senet_kernels.trust.bands import same_bits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from policies import PLAN, POLICIES

NETWORKS = ("seresnet50", "efficientnet_b0")
_LAYER_BATCH = 256


class Case(NamedTuple):
    """A call. ``policy`` is for the plan of the CUDA kernels; empty leaves the choice to it."""

    shape: tuple[int, ...]
    hidden: int | None
    dtype: torch.dtype
    last: bool  # channels-last
    options: dict[str, Any]
    policy: str = ""
    what: str = ""  # of SITUATIONS; the proof of the kernel alone without
    layer: str = ""  # the case of the benchmarks

    @property
    def name(self) -> str:
        """Unique among the cases of a backend."""
        words = [self.what, self.layer and "layer", "x".join(map(str, self.shape))]
        words += [str(self.dtype).removeprefix("torch."), "NHWC" if self.last else "NCHW"]
        words += [getattr(self.options.get("part"), "__name__", ""), self.policy]
        words += ["in place"] if "inplace" in self.options else []
        return " ".join(word for word in words if word)


_RELU = {"after": "relu", "residual": True}
_ALL = {"before": "silu", "shift": True, "weighted": True}

TRITON_KERNELS = {
    "squeeze_kernel", "mean_kernel", "hidden_kernel", "gates_kernel", "factors_kernel",
    "scale_flat_kernel", "scale_tile_kernel", "bwd_reduce_kernel", "finish_sums_kernel",
    "hidden_bwd_kernel", "excite_bwd_kernel", "sums_kernel", "dx_flat_kernel", "dx_tile_kernel",
}  # fmt: skip
TRITON_CASES = (
    # Vectors of 16 bytes, in rows of a multiple of them and not.
    Case((3, 24, 7, 16), 3, torch.float32, False, _RELU),
    Case((3, 24, 7, 7), 3, torch.bfloat16, False, {"before": "silu"}),
    Case((3, 24, 7, 7), 3, torch.bfloat16, True, {**_RELU, "before": "silu", "shift": True}),
    # Tiles.
    Case((3, 12, 5, 7), 3, torch.float32, False, _RELU),
    Case((3, 12, 5, 7), 3, torch.bfloat16, True, {"before": "silu", "shift": True}),
    # Programs that share images, by channels and by positions.
    Case((2, 36, 33, 31), 5, torch.bfloat16, False, _RELU),
    Case((2, 131, 11, 13), 9, torch.float16, True, {"before": "hardswish", "weighted": True}),
    Case((2, 20, 33, 31), None, torch.float32, False, {"lengths": True, "affine": True}),
    Case((19, 1032, 2, 4), 40, torch.float16, True, {"before": "silu"}),
    # The halves.
    Case((1, 3, 70, 33), None, torch.float32, False, {"part": squeeze, "lengths": True,
                                                      "affine": True}),
    Case((2, 20, 70, 33), None, torch.bfloat16, True, {"part": channel_scale, "weighted": True,
                                                       **_RELU}),
    # Overwriting x.
    Case((2, 36, 33, 31), 5, torch.float32, False, {"inplace": True, "before": "silu"}),
)  # fmt: skip

# Images that all policies take: 16-byte accesses, slices that blocks do not share evenly.
_WIDE, _WIDE_LAST = (  # contiguous with rows that are no whole bytes of the mask
    Case((5, 136, 7, 7), 12, torch.bfloat16, False, _RELU),
    Case((5, 136, 6, 8), 12, torch.float16, True, _ALL),
)
_WIDE_CASES = (_WIDE, _WIDE_LAST)
_ODD = Case((5, 133, 5, 5), 3, torch.float32, False, {"before": "hardswish", "weighted": True})


def _legal_cases(policy: str) -> tuple[Case, ...]:
    """Which of these a policy takes, on a device that has what the policy needs."""
    if "axis=space" in policy:
        return (_WIDE_LAST,)
    return (_WIDE, _WIDE_LAST) if "resident=1" in policy else (_WIDE, _WIDE_LAST, _ODD)


NATIVE_CASES = (
    *(case._replace(policy=policy) for policy in POLICIES for case in _legal_cases(policy)),
    Case((3, 20, 9, 7), 5, torch.float64, False, _ALL),
    Case((3, 20, 33, 31), None, torch.float32, False, {"lengths": True, "affine": True}),
    Case((2, 3, 70, 33), None, torch.float32, False, {"part": squeeze, "lengths": True,
                                                      "affine": True}),
    Case((2, 24, 30, 33), None, torch.bfloat16, True, {"part": channel_scale, "weighted": True,
                                                       **_RELU}),
    Case((2, 36, 33, 31), 5, torch.float32, False, {"inplace": True, "before": "silu"}),
)  # fmt: skip
# How a plan begins to say that the device, not the policy, is the reason.
NOT_HERE = (f"{PLAN}: this device has no", "an image's blocks do not run at once")


def _layers(dry: bool) -> list[Case]:
    """Of the networks, in both layouts; on the CPU few and small ones."""
    found: dict[Layer, None] = {}
    batch = 2 if dry else _LAYER_BATCH
    for name in NETWORKS:
        found |= dict.fromkeys(layer for layer, _ in load_networks()[name].layers)
    if dry:
        found = {layer: None for layer in found if layer.shape in ("240x14x14", "480x14x14")}
    return [
        Case((batch, layer.channels, layer.height, layer.width), layer.hidden,
             torch.bfloat16, bool(last), {"activation": layer.activation, "gate": layer.gate},
             layer=f"{layer.name} bf16 b{batch} {layout}")
        for layer in found
        for last, layout in enumerate(LAYOUTS)
    ]  # fmt: skip


def cases(backend: str, group: str, dry: bool) -> list[Case]:
    """Of a group: the ``verdicts`` on all kernels, the CUDA kernels' by all policies, and on layers
    of networks; or the ``situations``."""
    if group == "situations":
        of = (*_WIDE_CASES, *_layers(dry)[:1])
        return [case._replace(what=what) for what in SITUATIONS for case in of]
    own = TRITON_CASES if backend == "triton" else NATIVE_CASES
    return [*own, *_layers(dry)]


def kind_of(backend: str, device: str, case: Case) -> kinds.Kind:
    """The kernel variant that a case runs, by the plan that is in force."""
    options = dict(case.options)
    part, inplace = options.pop("part", None), options.pop("inplace", False)
    facts = [options.pop(name, False) for name in ("shift", "weighted", "affine", "lengths",
                                                   "residual")]  # fmt: skip
    two = part is None and case.hidden is not None
    names = {"activation": "relu" if two else "identity", "before": "identity", "after": "identity",
             "gate": "identity" if part is squeeze else "sigmoid", **options}  # fmt: skip
    form = "two layers" if two else "single layer (w1=None)"
    form = f"{part.__name__} alone" if part else form
    of = torch.device(device).type
    call = Call(of, case.dtype, case.dtype, Options(**names), form, *facts, inplace)
    layout = torch.channels_last if case.last else torch.contiguous_format
    x = torch.empty(case.shape, dtype=case.dtype, device=device, memory_format=layout)
    channels = case.shape[1]
    rows = channels * (2 if call.shift else 1)
    w1 = x.new_empty(case.hidden or 0, channels) if two else None
    w2 = None if part else x.new_empty(rows, case.hidden or channels)
    outputs = channels if part is squeeze else rows
    direction = kinds.INFERENCE if inplace else kinds.TRAINING
    return kinds.kind_of(backend, call, x, w1, w2, outputs, direction)


# -- situations


def _differs(got: problem.Results, want: problem.Results) -> None:
    for name, value in want.values.items():
        if not same_bits(got.values[name], value):
            raise AssertionError(f"{name} has other bits")


def _graph(given: problem.Problem) -> str:
    """Replays have the bits of calls. On a CPU the call stands in for the replay."""
    want = given.kernel_plainly().clone()
    if not given.kind.device.startswith("cuda"):
        _differs(given.kernel_plainly(), want)
        return "no graphs on a CPU"
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        given.kernel_plainly()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        results = given.kernel_plainly()
    for value in results.values.values():
        value.fill_(torch.nan)  # what a replay does not write is found
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    _differs(results, want)
    return ""


def _streams(given: problem.Problem) -> str:
    """Two problems on two streams at a time have the bits that they have alone."""
    both = [given, problem.Problem(given.kind, given.batch, seed=1)]
    want = [one.kernel_plainly().clone() for one in both]
    cuda = given.kind.device.startswith("cuda")
    streams = [torch.cuda.Stream() if cuda else None for _ in both]
    for _ in range(10):
        if cuda:
            torch.cuda.synchronize()
        got = []
        for one, stream in zip(both, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(one.kernel_plainly())
        if cuda:
            torch.cuda.synchronize()
        for found, right in zip(got, want, strict=True):
            _differs(found, right)
    return "" if cuda else "no streams on a CPU"


def _first_call(given: problem.Problem) -> str:
    """The first call of a process has the bits of the second; how long both took."""
    seconds, found = [], []
    for _ in range(2):
        start = time.perf_counter()
        found.append(given.kernel_plainly().clone())
        if given.kind.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    _differs(*found)
    return f"first call {seconds[0]:.3g} s, second {seconds[1]:.3g} s"


FRESH = "first call"  # for which a process must be new
SITUATIONS: dict[str, Callable[[problem.Problem], str]] = {
    "graph": _graph, "streams": _streams, FRESH: _first_call,
}  # fmt: skip


# -- the process

# In the words of CUDA's runtime, its driver and Triton.
_LAUNCH = ("CUDA error", "CUDA driver error", "Triton Error", "out of resource", "launch",
           "illegal memory access", "misaligned address")  # fmt: skip


def pretend(backend: str) -> None:
    """The CPU as a card, for good."""
    torch.set_num_threads(1)
    if backend == "native":
        import cuda_on_cpu

        cuda_on_cpu.plugged_in(seed=1, device=0).__enter__()
    else:
        import pretended

        if reason := pretended.why_not():
            raise RuntimeError(reason)
        pretended.pretend()


def outcome(backend: str, device: str, case: Case) -> dict[str, str]:
    """What becomes of a case that the process survives: in a word, in a text, by which plan."""
    os.environ[PLAN] = case.policy
    plan = ""
    try:
        kind = kind_of(backend, device, case)
        plan = kind.plan
        if case.what:
            with problem.undisturbed(kind.device):
                given = problem.Problem(kind, problem.batch_for(kind))
                return {"outcome": "ok", "text": SITUATIONS[case.what](given), "plan": plan}
        wrong = proof.prove(kind, speed=False).wrong
        text = ": ".join(wrong or ())
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    if any(words in text for words in NOT_HERE):
        return {"outcome": "not here", "text": text, "plan": plan}
    word = "ok" if not text else "launch error" if any(w in text for w in _LAUNCH) else "error"
    return {"outcome": word, "text": " ".join(text.split())[:400], "plan": plan}


def _tell_what_is_compiled() -> None:
    """The watch begins anew with each kernel that Triton has compiled: it is for those that run."""
    from senet_kernels.backends.triton import launcher

    compile_one = launcher.Launch._compile

    def told(self: launcher.Launch, *of: Any) -> Any:
        kernel = compile_one(self, *of)
        worker.say(compiled=self.kernel.__name__)
        return kernel

    launcher.Launch._compile = told  # type: ignore[method-assign]


def serve(backend: str, group: str, device: str) -> None:
    """Answer for cases by their numbers, as a process of ``tools/gpu_verdicts.py``."""
    if device == "cpu":
        pretend(backend)
    else:
        torch.empty(1, device=device)  # the context, before the watch runs
        _tell_what_is_compiled()
    numbered = cases(backend, group, device == "cpu")

    def answer(message: dict[str, Any]) -> None:
        worker.say(started=True)
        worker.say(**outcome(backend, device, numbered[message["case"]]))

    worker.main(answer)


def main() -> None:
    """Every kernel once: the sanitizer looks, and nothing is compared."""
    backend, device = (*sys.argv[1:], "cuda")[:2]
    if device == "cpu":
        pretend(backend)
    ran = 0
    for case in TRITON_CASES if backend == "triton" else NATIVE_CASES:
        os.environ[PLAN] = case.policy
        try:
            kind = kind_of(backend, device, case)
            with problem.undisturbed(device):
                problem.Problem(kind, kind.shape[0]).kernel_plainly()
            ran += 1
        except RuntimeError as error:
            if not any(text in str(error) for text in NOT_HERE):
                raise
            print(f"{case.name}: {error}")
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} cases of {backend}")


if __name__ == "__main__":
    main()
