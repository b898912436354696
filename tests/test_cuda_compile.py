"""The CUDA kernels through nvcc, for GPUs that need not be here: registers, spills, wide accesses.

Proves that they compile, fit the registers that the launch plan counts on, do not spill, move
16 bytes at a time on the aligned path, and are what docs/cuda-kernels.md says. Of their results
``test_cuda_on_cpu.py`` and ``test_ptx_kernels.py`` say something.

``python tests/test_cuda_compile.py > docs/cuda-kernels.md`` writes that page.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from ptx.compiling import find_nvcc, tool
from senet_kernels.backends import native

_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = _ROOT / "csrc" / "cuda"
_PAGE = _ROOT / "docs" / "cuda-kernels.md"
# The oldest has no asynchronous copies, and rounds to 16 bits by hand.
_TARGETS = ("75", "80", "90", "100", "120")
# What csrc/cuda/plan.cpp counts on; fp64 need only be right.
_MOST_REGISTERS = {"forward": 128, "backward": 168}
_LEAN_REGISTERS = 128  # two blocks of 256 threads on a multiprocessor
# The last argument of forward and backward kernels, as csrc/cuda/plan.h numbers the ways.
_WAYS = {"": "", "0": "", "1": ", lean", "2": ", lean fp16"}
# Of the other targets a kernel each, by header: ptxas takes seconds for one.
_FEW: dict[str, dict[str, Sequence[str]]] = {
    "75": {"forward": ["2, false, -1, 0"]},
    "100": {"backward": ["2, true, 0, 1"]},
    "120": {"gradients": ["float"]},
}
_KERNEL = re.compile(
    r"(forward|backward|gradients)_kernelI(?:Li(\d)ELb([01])ELi(n?\d+)E(?:Li(\d)E)?|([fd]))"
)


def _version() -> str:
    nvcc = find_nvcc()
    assert nvcc is not None
    said = subprocess.check_output([nvcc, "--version"], text=True)
    found = re.search(r"release [\d.]+, V([\d.]+)", said)
    assert found, said
    return found[1]


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


def compile_for(
    target: str, source: str, instances: Mapping[str, Sequence[str]] | None = None
) -> list[Kernel]:
    """The kernels of ``forward`` or ``backward`` as nvcc makes them for ``sm_<target>``, as machine
    code and as PTX: all that the library has, or these ``instances`` alone, by header, in a file
    that is called so."""
    nvcc = find_nvcc()
    assert nvcc is not None
    with tempfile.TemporaryDirectory() as folder:
        file = _SOURCES / f"{source}.cu"
        if instances:
            file = Path(folder, f"{source}.cu")
            includes = [f'#include "{header}.cuh"' for header in instances]
            lines = [f"template __global__ void {header}_kernel<{arguments}>"
                     f"(const __grid_constant__ {header.capitalize()}Launch);"
                     for header, of_header in instances.items()
                     for arguments in of_header]  # fmt: skip
            text = [*includes, "namespace senet::gpu {", *lines, "}"]
            file.write_text("\n".join(text) + "\n")
        command = [
            nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "--keep", "--keep-dir", folder,
            f"-gencode=arch=compute_{target},code=[sm_{target},compute_{target}]", "-Xptxas=-v",
            f"-I{_SOURCES}", "-c", str(file), "-o", f"{folder}/out.o",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=_SOURCES, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    usage = {}
    for part in done.stderr.split("Compiling entry function ")[1:]:
        # Of the kernel and of the functions that it calls.
        stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert registers
        assert stacks
        usage[part.split("'")[1]] = _Usage(
            int(registers[1]),
            max(int(stack) for stack, _ in stacks),
            sum(int(spilled) for _, spilled in stacks),
            sum(map(int, re.findall(r"(\d+) bytes smem", part))),
        )
    return _kernels(usage, ptx)


class _Usage(NamedTuple):
    registers: int
    stack: int
    spilled: int
    shared: int


def _kernels(usage: Mapping[str, _Usage], ptx: str) -> list[Kernel]:
    """By their mangled names, and from the PTX that they are made of."""
    bodies = {
        part.split("(", 1)[0].strip(): re.split(r"^\.func|^\.visible", part, flags=re.M)[0]
        for part in ptx.split(".entry ")[1:]
    }
    kernels = []
    for mangled, used in usage.items():
        match = _KERNEL.search(mangled)
        assert match, mangled
        kind, size, vector, before, way, of = match.groups(default="")
        body = bodies[mangled]
        name = f"{kind} {of}" if of else f"{kind} {size} bytes, before {before.replace('n', '-')}"
        name += _WAYS[way]
        kernels.append(
            Kernel(
                name,
                int(size or 0),
                vector == "1",
                *used,
                len(re.findall(r"\bld\.global(?:\.\w+)*\.v4\.\w+", body)),
                len(re.findall(r"\bld\.shared(?:\.\w+)*\.v4\.\w+", body)),
                len(re.findall(r"\bst\.global(?:\.\w+)*\.v4\.\w+", body)),
                len(re.findall(r"\bst\.global(?:\.\w+)*\.[bu]16\b", body)),
                "prefetch_rows" in body and "prefetch.global.L2" in ptx,
            )
        )
    return kernels


def _shown(what: str) -> str:
    """What cuobjdump shows of the compiled library."""
    program = tool("cuobjdump")
    if program is None:
        pytest.skip("no cuobjdump; it comes with Triton")
    if native.UNAVAILABLE is not None:
        pytest.skip(native.UNAVAILABLE)
    if "cuda" not in native.build_record():
        pytest.skip("the compiled library has no CUDA kernels")
    (library,) = native.kernel_files()
    return subprocess.check_output([program, what, str(library)], text=True)


# Bytes of shared memory that the system takes of each block, where the machine code says so.
_RESERVED = {"80": 0, "90": 1024}


def _of_library(target: str) -> dict[str, _Usage]:
    """What the kernels of the compiled library use."""
    parts = _shown("--dump-resource-usage").split("Fatbin elf code:")[1:]
    found = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        "".join(part for part in parts if f"arch = sm_{target}\n" in part),
    )
    if not found:
        pytest.skip(f"the compiled library has no kernels for sm_{target}")
    return {
        name: _Usage(int(registers), int(stack), int(local), int(shared) - _RESERVED[target])
        for name, registers, stack, shared, local in found
    }


needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc; pip install nvidia-cuda-nvcc")


def _check(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        source = "forward" if kernel.name.startswith("forward") else "backward"
        assert kernel.stack == 0, kernel
        assert kernel.spilled == 0, kernel
        assert kernel.shared == 0, kernel
        assert kernel.prefetches == (kernel.bytes > 0), kernel
        if kernel.bytes in (2, 4):
            most = _LEAN_REGISTERS if "lean" in kernel.name else _MOST_REGISTERS[source]
            assert kernel.registers <= most, kernel
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


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("source", ["forward", "backward"])
@pytest.mark.parametrize("target", _TARGETS)
def test_kernels_fit_and_move_16_bytes(target: str, source: str) -> None:
    kernels = compile_for(target, source)
    assert {k.bytes for k in kernels if k.vector} == {2, 4}
    assert {k.bytes for k in kernels if not k.vector} >= {2, 4, 8}
    _check(kernels)
    kinds = ("backward ", "gradients ") if source == "backward" else (f"{source} ",)
    rows = [row for row in _rows_of_compiler(target, _version()) if _name(row).startswith(kinds)]
    assert [_row(target, k) for k in kernels] == rows, f"{_PAGE.name} is stale: write it again"


def test_kernels_of_the_library_fit_and_move_16_bytes() -> None:
    """Those for sm_90, of which it has the PTX."""
    texts = _shown("-ptx").split("Fatbin ptx code:")[1:]
    ptx = "".join(text for text in texts if "arch = sm_90\n" in text)
    kernels = _kernels(_of_library("90"), ptx)
    assert {k.bytes for k in kernels if k.vector} == {2, 4}
    assert {k.bytes for k in kernels if not k.vector} >= {2, 4, 8}
    _check(kernels)
    rows = _rows_of_compiler("90", native.build_record().get("nvcc"))
    assert sorted(_row("90", k) for k in kernels) == sorted(rows), f"{_PAGE.name} is stale"


def test_registers_of_the_library() -> None:
    """Of its kernels for sm_80, without PTX; none spills."""
    used = _of_library("80")
    assert not {usage[1:] for usage in used.values()} - {(0, 0, 0)}
    rows = _rows_of_compiler("80", native.build_record().get("nvcc"))
    assert sorted(u.registers for u in used.values()) == sorted(
        int(r.split(" | ")[3]) for r in rows
    )


@needs_nvcc
@pytest.mark.parametrize("target", _FEW)
def test_other_targets_compile(target: str) -> None:
    kernels = compile_for(target, "few", _FEW[target])
    assert [k.name.split()[0] for k in kernels] == list(_FEW[target])
    _check(kernels)


def test_the_page_is_of_every_target() -> None:
    """As this file writes it; the tests above, that its rows are what the compiler says."""
    page = _PAGE.read_text()
    rows = [_rows_of(page, target) for target in _TARGETS]
    lines = [*_head(_version_of(page)), *itertools.chain(*rows)]
    assert page == "\n".join(lines) + "\n"
    kernels = [[row.split(" | ")[1:3] for row in of_target] for of_target in rows]
    assert kernels == kernels[:1] * len(_TARGETS)


def _rows_of_compiler(target: str, version: str | None) -> list[str]:
    """Of the page; of kernels that another compiler made nothing is known."""
    page = _PAGE.read_text()
    if version != _version_of(page):
        pytest.skip(f"{_PAGE.name} is of nvcc {_version_of(page)}, this is {version}")
    return _rows_of(page, target)


def _name(row: str) -> str:
    return row.split(" | ")[1]


def _version_of(page: str) -> str:
    found = re.search(r"^By nvcc ([\d.]+);", page, re.MULTILINE)
    assert found
    return found[1]


def _rows_of(page: str, target: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(f"| {target} |")]


def _row(target: str, k: Kernel) -> str:
    cells = (target, k.name, "yes" if k.vector else "no", k.registers, k.stack, k.spilled, k.shared)
    counts = (k.wide_global_loads, k.wide_shared_loads, k.wide_stores)
    return f"| {' | '.join(map(str, (*cells, *counts)))} |"


def _head(version: str) -> list[str]:
    heads = ("sm", "kernel", "vectors", "registers", "stack", "spilled bytes",
             "static shared bytes", "16-byte global loads", "16-byte shared loads",
             "16-byte global stores")  # fmt: skip
    return [
        "# The CUDA kernels as compiled", "",
        f"By nvcc {version}; written by `python tests/test_cuda_compile.py > docs/{_PAGE.name}`.",
        "Not yet run on a GPU: this is what the compiler says. The same is a test: no spills, no",
        "more registers than the launch plan counts on (fp64 apart), and to global memory 16-byte",
        "accesses on the aligned path (`vectors`), none off it; and so is that this page is right,",
        "where nvcc is the same: in the gate for the kernels of the compiled library, sm_80 and",
        "sm_90; a kernel is compiled there for each of the others. `before` is the code of the",
        "function in `senet_kernels/pointwise.py` that a kernel is specialised for, -1 is any.",
        "Lean kernels are those of `csrc/cuda/lean.cuh`; fp16 has its own, else 2 bytes are both",
        "16-bit types.",
        "",
        "Accesses are counted in the PTX of a kernel, without the functions it calls: the products",
        "with the weights. Global loads are of images: x, dy and the residual. Shared loads are of",
        "slices of images that stay there, and of vectors over channels; of them the test asks",
        "nothing. Shared memory is what the plan of a call asks for (`explain` prints it); none is",
        "static.", "",
        "The PTX of these kernels is executed on a CPU, see [tests/ptx](../tests/ptx/README.md):",
        "results are right in any order of threads, and with approximate functions as coarse as",
        "their definition allows. That says nothing of what ptxas makes of the PTX, of the order",
        "of memory accesses, which is sequential there, of the bits of approximate functions, or",
        "of time.", "",
        f"| {' | '.join(heads)} |", "|---" * len(heads) + "|",
    ]  # fmt: skip


def _page() -> str:
    jobs = [(t, source) for t in _TARGETS for source in ("forward", "backward")]
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda job: compile_for(*job), jobs))
    rows = [_row(t, k) for (t, _), kernels in zip(jobs, compiled, strict=True) for k in kernels]
    return "\n".join([*_head(_version()), *rows])


if __name__ == "__main__":
    print(_page())
