"""The process that tries the cases of ``tools/gpu_cases.py``.

``tools/gpu_verdicts.py`` starts such processes, which take one case after another: a kernel proves
itself as in :mod:`senet_kernels.trust`, against float64, between guard bands, with NaN; or its
calls are captured in a CUDA graph, run on two streams at a time, or are the first of a process.
``python -m tools.gpu_kernels triton|native [cuda|cpu] [--verdicts FILE]`` runs every kernel once,
for a sanitizer, but for those that crashed or hung by FILE.

On ``cpu`` the card is pretended: Triton's ops are the C++ kernels (tests/pretended.py), the CUDA
kernels run in the simulation of tests/simt.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import read_json
from senet_kernels.features import Call
from senet_kernels.pointwise import Options
from senet_kernels.trust import kinds, problem, proof, worker
from senet_kernels.trust.bands import same_bits
from tools.gpu_cases import (
    BACKENDS,
    FRESH,
    NATIVE_CASES,
    NOT_HERE,
    PLAN,
    SITUATIONS,
    TRITON_CASES,
    Case,
    cases,
)
from tools.gpu_verdicts import LEFT_OUT


def kind_of(backend: str, device: str, case: Case) -> kinds.Kind:
    """The kernel variant that a case runs, by the plan that is in force."""
    options = dict(case.options)
    part, inplace = options.pop("part", None), options.pop("inplace", False)
    facts = [options.pop(name, False) for name in ("shift", "weighted", "affine", "lengths",
                                                   "residual")]  # fmt: skip
    two = part is None and case.hidden is not None
    names = {"activation": "relu" if two else "identity", "before": "identity", "after": "identity",
             "gate": "identity" if part == "squeeze" else "sigmoid", **options}  # fmt: skip
    form = "two layers" if two else "single layer (w1=None)"
    form = f"{part} alone" if part else form
    of = torch.device(device).type
    dtype = getattr(torch, case.dtype)
    call = Call(of, dtype, dtype, Options(**names), form, *facts, inplace)
    layout = torch.channels_last if case.last else torch.contiguous_format
    x = torch.empty(case.shape, dtype=dtype, device=device, memory_format=layout)
    channels = case.shape[1]
    rows = channels * (2 if call.shift else 1)
    w1 = x.new_empty(case.hidden or 0, channels) if two else None
    w2 = None if part else x.new_empty(rows, case.hidden or channels)
    outputs = channels if part == "squeeze" else rows
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


_DO: dict[str, Callable[[problem.Problem], str]] = dict(
    zip(SITUATIONS, (_first_call, _graph, _streams), strict=True)
)


@contextmanager
def _as_new() -> Iterator[None]:
    """Nothing that Triton compiled before is found."""
    variable = "TRITON_CACHE_DIR"
    before = os.environ.get(variable)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[variable] = folder
        try:
            yield
        finally:
            del os.environ[variable]
            os.environ |= {variable: before} if before is not None else {}


# -- the process

# Of an error's type, or in the words of CUDA's runtime, its driver and Triton.
_LAUNCH = re.compile(
    r"\b(AcceleratorError|OutOfResources): |CUDA (driver )?error: |Triton Error \[|"
    r"an illegal (memory access|instruction) was encountered|misaligned address|"
    r"unspecified launch failure|too many resources requested for launch|"
    r"no kernel image is available|the launch timed out|\(launching: "
)


@contextmanager
def card(backend: str, device: str) -> Iterator[None]:
    """The CPU as a card, for a backend; a card is one."""
    if device != "cpu":
        yield
        return
    torch.set_num_threads(1)
    if backend == "native":
        import cuda_on_cpu

        with cuda_on_cpu.plugged_in(seed=1, device=0):
            yield
        return
    import pretended

    if reason := pretended.why_not():
        raise RuntimeError(reason)
    pretended.pretend()
    yield


def _in_error(device: str) -> str:
    """Why the device is of no more use to this process; empty where it is."""
    if device == "cpu":
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return f"; the device is in error: {error}"
    return ""


def outcome(
    backend: str, device: str, case: Case, tell: Callable[..., None] = lambda **message: None
) -> dict[str, Any]:
    """What becomes of a case that the process survives: in a word, in a text, by which plan. That
    is told before the kernel is run."""
    os.environ[PLAN] = case.policy
    plan, word, text = "", "ok", ""
    try:
        kind = kind_of(backend, device, case)
        plan = kind.plan
        tell(started=True, plan=plan)
        if case.what:
            with problem.undisturbed(kind.device):
                text = _DO[case.what](problem.Problem(kind, problem.batch_for(kind)))
        else:
            # A plan that keeps images resident is for both passes over them.
            found = proof.prove(kind, speed=False, forced="resident=1" in case.policy)
            if found.wrong:
                word, text = "error", ": ".join(found.wrong)
    except (proof.NoVerdictError, torch.OutOfMemoryError) as error:
        word, text = "no verdict", str(error)
    except Exception as error:
        word, text = "error", f"{type(error).__name__}: {error}"
    if case.policy and any(words in text for words in NOT_HERE):
        word = "not here"
    elif word != "ok":
        text += (broken := _in_error(device))
        word = "launch error" if broken or _LAUNCH.search(text) else word
    return {"outcome": word, "text": " ".join(text.split())[:400], "plan": plan}


def serve(device: str, backends: Sequence[str]) -> None:
    """Answer for cases by their numbers, as a process of ``tools/gpu_verdicts.py``."""
    if device != "cpu":
        torch.empty(1, device=device)  # the context
    for backend in backends:
        with suppress(Exception), card(backend, device):  # a pretended one may have to be compiled
            pass
    worker.tell_steps()
    worker.say(ready=True)

    def answer(message: dict[str, Any]) -> None:
        backend, group, number = message["job"]
        case = cases(backend, group, device == "cpu")[number]
        new = _as_new() if case.what == FRESH else nullcontext()
        try:
            with card(backend, device), new:
                found = outcome(backend, device, case, worker.say)
        except Exception as error:  # there is no such card
            found = {"outcome": "no verdict", "text": f"{type(error).__name__}: {error}"}
        worker.say(**found)

    worker.main(answer)


def main() -> int:
    """Every kernel once: the sanitizer looks, and nothing is compared."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_kernels", description=__doc__)
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("device", nargs="?", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--verdicts", type=Path, help="what crashed or hung by it is left out")
    parser.add_argument("--until", type=float, default=float("inf"), help="Unix time of its end")
    given = parser.parse_args()
    known = read_json(given.verdicts) if given.verdicts else {}
    ran, failed, late = 0, 0, 0
    with card(given.backend, given.device):
        for case in TRITON_CASES if given.backend == "triton" else NATIVE_CASES:
            if known.get(case.name, {}).get("outcome") in LEFT_OUT:
                print(f"{case.name}: left out: {known[case.name]['outcome']}", flush=True)
                continue
            if time.time() > given.until:  # the sanitizer has its summary still to write
                late += 1
                continue
            said = _once(given.backend, given.device, case)
            print(f"{case.name}: {said or 'ran'}", flush=True)
            ran += not said
            failed += bool(said) and not said.startswith("not here")
            if failed and (broken := _in_error(given.device)):
                print(f"no further{broken}", flush=True)
                break
    print(f"{ran} cases of {given.backend}; {failed} failed", end="")
    print(f"; {late} not run: the time was up" if late else "")
    return 1 if failed else 0


def _once(backend: str, device: str, case: Case) -> str:
    """What was wrong with one call."""
    os.environ[PLAN] = case.policy
    try:
        kind = kind_of(backend, device, case)
        with problem.undisturbed(device):
            problem.Problem(kind, kind.shape[0]).kernel_plainly()
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        here = not case.policy or not any(text in str(error) for text in NOT_HERE)
        return f"{'' if here else 'not here: '}{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
