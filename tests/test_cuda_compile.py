"""The CUDA kernels through nvcc, for GPUs that need not be here: registers, spills, wide accesses.

Proves that they compile, fit the registers that the launch plan counts on, do not spill, and move
16 bytes at a time on the aligned path. Of their results ``test_cuda_on_cpu.py`` says something.

``python tests/test_cuda_compile.py [90a ...] > docs/cuda-kernels.md`` writes the table.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

_SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
_TARGETS = ("80", "90a", "100", "120")
_FULLY = "90a"  # in the gate; of the others one kernel of each kind, and all in the slow tests
_OLDEST = "75"  # no asynchronous copies, and 16-bit rounding by hand
# What csrc/cuda/plan.cpp counts on; fp64 need only be right.
_MOST_REGISTERS = {"forward": 128, "backward": 168}
# One of each kind: a quick look at the targets that are not compiled fully in the gate.
_FEW = ("2, true, 0", "4, true, -1", "2, false, -1", "8, false, -1")
_KERNEL = re.compile(r"(forward|backward|gradients)_kernelI(?:Li(\d)ELb([01])ELi(n?\d+)E|([fd]))")


def find_nvcc() -> str | None:
    """As setup.py finds it."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which(f"{home}/bin/nvcc")
    wheels = find_spec("nvidia")
    folders = list(wheels.submodule_search_locations or ()) if wheels else []
    found = sorted(str(path) for folder in folders for path in Path(folder).glob("cu*/bin/nvcc"))
    return shutil.which("nvcc") or next(iter(found), None)


class Kernel(NamedTuple):
    """A row of the table. 16-byte loads from global and from shared memory; 16- and 2-byte stores
    to global memory. Shared memory is what the kernel has beside the bytes that its plan asks for,
    which is none."""

    name: str
    bytes: int  # of an element; 0 for the gradients' sums
    vector: bool
    registers: int
    stack: int
    spilled: int
    shared: int
    wide_global_loads: int
    wide_shared_loads: int
    wide_stores: int
    narrow_stores: int
    prefetches: bool


def compile_for(target: str, source: str, instances: Sequence[str] = ()) -> list[Kernel]:
    """The kernels of ``forward`` or ``backward`` as nvcc makes them for ``sm_<target>``, as machine
    code and as PTX: all that the library has, or these ``instances`` alone."""
    nvcc = find_nvcc()
    assert nvcc is not None
    with tempfile.TemporaryDirectory() as folder:
        file = _SOURCES / f"{source}.cu"
        if instances:
            file = Path(folder, f"{source}.cu")
            argument = f"const __grid_constant__ {source.capitalize()}Launch"
            lines = [f"template __global__ void {source}_kernel<{i}>({argument});"
                     for i in instances]  # fmt: skip
            text = [f'#include "{source}.cuh"', "namespace senet::gpu {", *lines, "}"]
            file.write_text("\n".join(text) + "\n")
        command = [
            nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "--keep", "--keep-dir", folder,
            f"-gencode=arch=compute_{target},code=[sm_{target},compute_{target}]", "-Xptxas=-v",
            f"-I{_SOURCES}", "-c", str(file), "-o", f"{folder}/out.o",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=_SOURCES, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    bodies = {
        part.split("(", 1)[0].strip(): re.split(r"^\.func|^\.visible", part, flags=re.M)[0]
        for part in ptx.split(".entry ")[1:]
    }
    kernels = []
    for part in done.stderr.split("Compiling entry function ")[1:]:
        mangled = part.split("'")[1]
        match = _KERNEL.search(mangled)
        assert match, mangled
        kind, size, vector, before, of = match.groups()
        # Of the kernel and of the functions that it calls.
        stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert registers
        assert stacks
        body = bodies[mangled]
        name = f"{kind} {of}" if of else f"{kind} {size} bytes, before {before.replace('n', '-')}"
        kernels.append(
            Kernel(
                name,
                int(size or 0),
                vector == "1",
                int(registers[1]),
                max(int(stack) for stack, _ in stacks),
                sum(int(spilled) for _, spilled in stacks),
                sum(map(int, re.findall(r"(\d+) bytes smem", part))),
                len(re.findall(r"\bld\.global(?:\.\w+)*\.v4\.\w+", body)),
                len(re.findall(r"\bld\.shared(?:\.\w+)*\.v4\.\w+", body)),
                len(re.findall(r"\bst\.global(?:\.\w+)*\.v4\.\w+", body)),
                len(re.findall(r"\bst\.global(?:\.\w+)*\.[bu]16\b", body)),
                "prefetch_rows" in body and "prefetch.global.L2" in ptx,
            )
        )
    return kernels


needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc; pip install nvidia-cuda-nvcc")


def _check(source: str, kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.stack == 0, kernel
        assert kernel.spilled == 0, kernel
        assert kernel.shared == 0, kernel
        assert kernel.prefetches == (kernel.bytes > 0), kernel
        if kernel.bytes in (2, 4):
            assert kernel.registers <= _MOST_REGISTERS[source], kernel
        if kernel.vector:
            # x in sums over rows and over columns, unrolled twice, then x and the residual; dy and
            # x in the same. y, or dx and d_residual. Eight floats are two vectors.
            vectors = kernel.bytes // 2
            loads = 6 if source == "forward" else 12
            assert kernel.wide_global_loads >= loads * vectors, kernel
            assert kernel.wide_stores >= (1 if source == "forward" else 2) * vectors, kernel
            assert kernel.narrow_stores == 0, kernel
        elif kernel.bytes:  # or else the count above would be of something else
            assert kernel.wide_global_loads == kernel.wide_stores == 0, kernel


@needs_nvcc
@pytest.mark.parametrize("source", ["forward", "backward"])
@pytest.mark.parametrize(
    "target", [t if t == _FULLY else pytest.param(t, marks=pytest.mark.slow) for t in _TARGETS]
)
def test_kernels_fit_and_move_16_bytes(target: str, source: str) -> None:
    kernels = compile_for(target, source)
    assert {k.bytes for k in kernels if k.vector} == {2, 4}
    assert {k.bytes for k in kernels if not k.vector} >= {2, 4, 8}
    _check(source, kernels)


@needs_nvcc
def test_every_target_compiles_one_kernel_of_each_kind() -> None:
    """Two compilers at a time."""
    targets = [_OLDEST, *(t for t in _TARGETS if t != _FULLY)]
    jobs = [(t, source) for t in targets for source in ("backward", "forward")]
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda job: compile_for(*job, _FEW), jobs))
    for (_, source), kernels in zip(jobs, compiled, strict=True):
        assert len(kernels) == len(_FEW)
        _check(source, kernels)


def _table(targets: list[str]) -> str:
    nvcc = find_nvcc()
    assert nvcc is not None
    version = subprocess.check_output([nvcc, "--version"], text=True)
    release = re.search(r"release ([\d.]+)", version)
    command = " ".join(["python tests/test_cuda_compile.py", *targets, "> docs/cuda-kernels.md"])
    heads = ("sm", "kernel", "vectors", "registers", "stack", "spilled bytes",
             "static shared bytes", "16-byte global loads", "16-byte shared loads",
             "16-byte global stores")  # fmt: skip
    lines = [
        "# The CUDA kernels as compiled", "",
        f"By nvcc {release[1] if release else 'unknown'}; written by `{command}`.",
        "Not yet run on a GPU: this is what the compiler says. The same is a test: no spills, no",
        "more registers than the launch plan counts on (fp64 apart), and to global memory 16-byte",
        "accesses on the aligned path (`vectors`), none off it; in the gate for sm_90a, and for",
        "one kernel of each kind on sm_75, sm_80, sm_100, sm_120. `before` is the code of the",
        "function in `senet_kernels/pointwise.py` that a kernel is specialised for, -1 is any.", "",
        "Accesses are counted in the PTX of a kernel, without the functions it calls: the products",
        "with the weights. Global loads are of images: x, dy and the residual. Shared loads are of",
        "slices of images that stay there, and of vectors over channels; of them the test asks",
        "nothing. Shared memory is what the plan of a call asks for (`explain` prints it); none is",
        "static.", "",
        f"| {' | '.join(heads)} |", "|---" * len(heads) + "|",
    ]  # fmt: skip
    jobs = [(t, source) for t in targets or _TARGETS for source in ("forward", "backward")]
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda job: compile_for(*job), jobs))
    for (target, _), kernels in zip(jobs, compiled, strict=True):
        for k in kernels:
            cells = (k.name, "yes" if k.vector else "no", k.registers, k.stack, k.spilled)
            counts = (k.shared, k.wide_global_loads, k.wide_shared_loads, k.wide_stores)
            lines.append(f"| {' | '.join(map(str, (target, *cells, *counts)))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(_table(sys.argv[1:]))
