"""``python -m tools.mutate_ptx``: is a step that is missing in the compiled kernels noticed?

``[--seed 1] [--count 200] [--target 90a] [--orders 8] [--only ID ...] [--list]``

Takes, one at a time, out of the PTX that nvcc emits for the CUDA kernels: a barrier of a block,
warp or cluster; a wait for copies or for an mbarrier; a commit; an arrival; a proxy fence; a
release or an acquire between blocks; the condition under which something is stored. A seeded sample
of them is executed on the CPU (``tests/ptx``), each in a process of its own, by every policy of the
launch plan in several orders of threads, with images of four shapes in both layouts, until a result
is wrong or the simulation reports an error.

Survivors are printed with the lines around them, and are to be explained. Exit code 0: none.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# In bfloat16, with 16-byte accesses and no function before: what a network's layer runs.
KERNELS = {
    "forward": "_ZN5senet3gpu14forward_kernelILi2ELb1ELi0ELi1EEEvNS0_13ForwardLaunchE",
    "backward": "_ZN5senet3gpu15backward_kernelILi2ELb1ELi0ELi1EEEvNS0_14BackwardLaunchE",
    "gradients": "_ZN5senet3gpu16gradients_kernelIfEEvNS0_15GradientsLaunchE",
}
# What is taken out, and what remains.
STEPS = {
    "barrier": (r"\b(?:bar|barrier)\.sync\b[^;]*;", ";"),
    "warp-barrier": (r"\bbar\.warp\.sync\b[^;]*;", ";"),
    "cluster-arrive": (r"\bbarrier\.cluster\.arrive\b[^;]*;", ";"),
    "cluster-wait": (r"\bbarrier\.cluster\.wait\b[^;]*;", ";"),
    "commit": (r"\bcp\.async\.commit_group;", ";"),
    "wait-for-copies": (r"\bcp\.async\.wait_group\b[^;]*;", ";"),
    "mbarrier-wait": (r"\bmbarrier\.try_wait\.\S+\s+(\S+),[^;]*;", r"setp.eq.u32 \1, 0, 0;"),
    "mbarrier-arrive": (r"\bmbarrier\.arrive\.[^;]*;", ";"),
    "mbarrier-init": (r"\bmbarrier\.init\.[^;]*;", ";"),
    "proxy-fence": (r"\bfence\.proxy\.async\b[^;]*;", ";"),
    "release": (r"\bred\.release\.[^;]*;", ";"),
    "acquire": (r"\bld\.acquire\.\S+\s+(%\w+),[^;]*;", r"mov.u32 \1, 0x7fffffff;"),
    # Of a store, with neither label nor branch in between.
    "condition": (r"@!?%p\d+\s+bra\s+\$\w+;(?=(?:[^;$]*;){0,20}?\s*st\.(?!param|local))", ";"),
}


class Mutant(NamedTuple):
    """A step of a kernel that is left out; ``at`` are characters of its PTX."""

    name: str
    kernel: str
    at: tuple[int, int]
    text: str


def mutants(texts: dict[str, str]) -> Iterator[Mutant]:
    """All there are of kernels' PTX, in the order of the text."""
    for kernel, ptx in texts.items():
        for kind, (pattern, left) in STEPS.items():
            for number, found in enumerate(re.finditer(pattern, ptx)):
                yield Mutant(f"{kernel}-{kind}-{number}", kernel, found.span(), found.expand(left))


def drawn(every: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """A sample, the kinds of steps as evenly as can be: kinds of few members wholly."""
    by_kind: dict[str, list[Mutant]] = {}
    for mutant in random.Random(seed).sample(list(every), len(every)):
        by_kind.setdefault(mutant.name.rpartition("-")[0], []).append(mutant)
    rounds = max(map(len, by_kind.values()), default=0)
    order = [of_kind[i] for i in range(rounds) for of_kind in by_kind.values() if i < len(of_kind)]
    return order[:count]


def _for_tests() -> Any:
    sys.path.insert(0, str(ROOT / "tests"))
    from ptx import compiling

    return compiling


def _texts(target: str) -> dict[str, str]:
    compiling = _for_tests()
    return {name: compiling.ptx_of(kernel, target) for name, kernel in KERNELS.items()}


def _execute(name: str, target: str, orders: int) -> str:
    """What notices the mutant, or an empty text."""
    compiling = _for_tests()
    import cuda_on_cpu
    import test_ptx_kernels
    from policies import POLICIES

    texts = _texts(target)
    mutant = next((m for m in mutants(texts) if m.name == name), None)
    if mutant:
        begin, end = mutant.at
        text = texts[mutant.kernel]
        changed = KERNELS[mutant.kernel], text[:begin] + mutant.text + text[end:]
        original = compiling.ptx_of

        def ptx_of(kernel: str, target: str) -> str:
            return changed[1] if kernel == changed[0] else str(original(kernel, target))

        compiling.ptx_of = ptx_of
    shapes = test_ptx_kernels.SHAPES
    for order in range(orders):
        for number, policy in enumerate(POLICIES):
            device = test_ptx_kernels.device_of(policy, target)
            if device is None:
                continue
            try:
                seed, layout = order * len(POLICIES) + number, "channels_last" if order % 2 else ""
                # Few channels are not cut into blocks channels-last.
                last = layout or "axis=space" in policy
                shape = shapes[0 if last else order // 2 % len(shapes)]
                test_ptx_kernels.runs(policy, device, seed, layout, shape)
            except (AssertionError, RuntimeError) as error:
                return f"{policy or 'automatic'}, order {order}: {str(error).splitlines()[0][:300]}"
    assert cuda_on_cpu.simulation().finder.found
    return ""


def _notices(name: str, target: str, orders: int) -> str:
    command = [sys.executable, "-m", "tools.mutate_ptx", "--execute", name]
    command += ["--target", target, "--orders", str(orders)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode:
        return f"died, status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
    return str(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--target", choices=["80", "90a"], default="90a")
    parser.add_argument("--orders", type=int, default=8)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--execute", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.execute:
        print(json.dumps(_execute(given.execute, given.target, given.orders)))
        return 0
    texts = _texts(given.target)
    every = list(mutants(texts))
    chosen = [m for m in every if m.name in given.only] or drawn(every, given.count, given.seed)
    if given.list:
        print(*(m.name for m in chosen), sep="\n")
        return 0
    if noticed := _notices("none", given.target, given.orders):
        print(f"the unchanged kernels fail: {noticed}")
        return 2
    outcomes: Counter[bool] = Counter()
    for mutant in chosen:
        noticed = _notices(mutant.name, given.target, given.orders)
        outcomes[bool(noticed)] += 1
        print(f"{mutant.name}: {noticed or 'SURVIVES'}", flush=True)
        if not noticed:
            line = texts[mutant.kernel].count("\n", 0, mutant.at[0])
            lines = texts[mutant.kernel].splitlines()[max(line - 4, 0) : line + 5]
            print(*(f"    {text}" for text in lines), sep="\n", flush=True)
    print(f"{outcomes[True]} of {len(chosen)} are noticed; there are {len(every)} in all")
    return 0 if not outcomes[False] else 1


if __name__ == "__main__":
    sys.exit(main())
