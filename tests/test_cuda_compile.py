"""The CUDA kernels through nvcc, for GPUs that need not be here: registers, spills, wide accesses.

Proves that they compile, fit the registers that the launch plan counts on, do not spill, and move
16 bytes at a time on the aligned path. Of their results ``test_cuda_on_cpu.py`` says something.

``python tests/test_cuda_compile.py [90a ...]`` prints the table.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

_SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
_TARGETS = ("80", "90a", "100", "120")
# What csrc/cuda/plan.cpp counts on; fp64 need only be right.
_MOST_REGISTERS = {"forward": 128, "backward": 168}
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
    """A row of the table. 16-byte loads; 16- and 2-byte stores to global memory."""

    name: str
    bytes: int  # of an element; 0 for the gradients' sums
    vector: bool
    registers: int
    stack: int
    spilled: int
    wide_loads: int
    wide_stores: int
    narrow_stores: int


def compile_for(target: str, source: str) -> list[Kernel]:
    """The kernels of ``forward`` or ``backward`` as nvcc makes them for ``sm_<target>``."""
    nvcc = find_nvcc()
    assert nvcc is not None
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "--keep", "--keep-dir", folder,
            f"-gencode=arch=compute_{target},code=[sm_{target},compute_{target}]", "-Xptxas=-v",
            "-c", f"{source}.cu", "-o", f"{folder}/out.o",
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
                len(re.findall(r"\bld(?:\.\w+)*\.v4\.\w+", body)),
                len(re.findall(r"\bst\.global(?:\.\w+)*\.v4\.\w+", body)),
                len(re.findall(r"\bst\.global(?:\.\w+)*\.[bu]16\b", body)),
            )
        )
    return kernels


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc; pip install nvidia-cuda-nvcc")
@pytest.mark.parametrize("source", ["forward", "backward"])
@pytest.mark.parametrize(
    "target", [t if t == "90a" else pytest.param(t, marks=pytest.mark.slow) for t in _TARGETS]
)
def test_kernels_fit_and_move_16_bytes(target: str, source: str) -> None:
    kernels = compile_for(target, source)
    assert {k.bytes for k in kernels if k.vector} == {2, 4}
    assert {k.bytes for k in kernels if not k.vector} >= {2, 4, 8}
    for kernel in kernels:
        # fp64 need only be right: its backward kernel has all the registers there are, and spills
        # 24 bytes on sm_120.
        most = 32 if kernel.bytes == 8 else 0
        assert kernel.stack <= most, kernel
        assert kernel.spilled <= most, kernel
        if kernel.bytes in (2, 4):
            assert kernel.registers <= _MOST_REGISTERS[source], kernel
        if kernel.vector:
            # x, or dy and x, in two passes; y, or dx and d_residual. Eight floats are two vectors.
            vectors = kernel.bytes // 2
            assert kernel.wide_loads >= (3 if source == "forward" else 4) * vectors, kernel
            assert kernel.wide_stores >= (1 if source == "forward" else 2) * vectors, kernel
            assert kernel.narrow_stores == 0, kernel


def _table(targets: list[str]) -> None:
    print("| sm | kernel | vectors | registers | stack | 16-byte loads | 16-byte stores |")
    print("|---|---|---|---|---|---|---|")
    for target in targets:
        for source in ("forward", "backward"):
            for k in compile_for(target, source):
                cells = (k.name, "yes" if k.vector else "no", k.registers, k.stack)
                counts = (k.wide_loads, k.wide_stores)
                print("|", " | ".join(map(str, (target, *cells, *counts))), "|")


if __name__ == "__main__":
    _table(sys.argv[1:] or list(_TARGETS))
