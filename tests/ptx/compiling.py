"""From a kernel to its PTX, as nvcc emits it, and on to a library that executes it on a CPU.

Products lie in ``build/ptx``. PTX is named by a hash of the kernels' sources and of nvcc, C++ by
one of the PTX and the translator, a library by one of its C++ and the compiler: what has not
changed is not made again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "simt"))

import build

from .translate import Module, Untranslatable

HERE = Path(__file__).resolve().parent
OUT = build.ROOT / "build" / "ptx"
SOURCES = build.ROOT / "csrc" / "cuda"
# Optimised, kernels would take three times as long to compile, which is most of what a test takes.
FLAGS = [
    "-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-w", f"-I{HERE}", f"-I{build.HERE}",
    # IEEE arithmetic as it stands, in the rounding mode of the moment.
    "-ffp-contract=off", "-frounding-math", "-fno-trapping-math", "-fno-math-errno",
]  # fmt: skip
_NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-ptx", f"-I{SOURCES}"]
_KERNEL = re.compile(r"_ZN5senet3gpu\d+(\w+?)_kernelI((?:L[ib]n?\d+E|[fd])+)EEv\w+")
_ARGUMENT = re.compile(r"Li(n?\d+)E|Lb([01])E|([fd])")
#: What kernels are compiled for where the number alone would leave something out.
_TARGETS = {90: "90a"}


@functools.cache
def find_nvcc() -> str | None:
    """As setup.py finds it."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which(f"{home}/bin/nvcc")
    wheels = find_spec("nvidia")
    folders = list(wheels.submodule_search_locations or ()) if wheels else []
    found = sorted(str(path) for folder in folders for path in Path(folder).glob("cu*/bin/nvcc"))
    return shutil.which("nvcc") or next(iter(found), None)


@functools.cache
def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: beside nvcc, on PATH, or in Triton's or NVIDIA's wheels."""
    nvcc = find_nvcc()
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    for package, inside in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin")):
        found = find_spec(package)
        folders += (
            [Path(at) / inside for at in found.submodule_search_locations or ()] if found else []
        )
    for folder in folders[:1]:
        if (folder / name).exists():
            return str(folder / name)
    if on_path := shutil.which(name):
        return on_path
    return next((str(f / name) for f in folders if (f / name).exists()), None)


def why_not() -> str | None:
    """Why PTX cannot be executed here; None when it can."""
    if not build.compiler():
        return "no C++ compiler"
    return None if find_nvcc() else "no nvcc"


def _key(*parts: Any) -> str:
    """Of texts, and of files with their contents."""
    total = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else str(part).encode()
        total.update(f"{len(data)}\0".encode() + data)
    return total.hexdigest()[:20]


@functools.cache
def version(command: str) -> str:
    return subprocess.check_output([command, "--version"], text=True)


@functools.cache
def _translator() -> str:
    return _key(HERE / "translate.py", HERE / "opcodes.py")


@functools.cache
def _compiler() -> str:
    """The headers, and what compiles them."""
    headers = [*sorted(HERE.glob("*.h")), *sorted(build.HERE.glob("*.h"))]
    return _key(*headers, FLAGS, build.compiler(), version(build.compiler()[0]))


def instance(kernel: str) -> tuple[str, str]:
    """The header, and the explicit instantiation, of a kernel by its mangled name.

    Raises:
        ValueError: it is no kernel of csrc/cuda.
    """
    found = _KERNEL.fullmatch(kernel)
    if not found:
        raise ValueError(f"{kernel} is no kernel of csrc/cuda")
    arguments = []
    for number, flag, letter in _ARGUMENT.findall(found[2]):
        if letter:
            arguments.append("float" if letter == "f" else "double")
        else:
            arguments.append(number.replace("n", "-") or ("true" if flag == "1" else "false"))
    parameter = f"const __grid_constant__ {found[1].capitalize()}Launch"
    declared = f"template __global__ void {found[1]}_kernel<{', '.join(arguments)}>({parameter});"
    return f"{found[1]}.cuh", declared


@functools.cache
def ptx_of(kernel: str, target: str, *flags: str) -> str:
    """PTX of one kernel of csrc/cuda, by its mangled name, for ``compute_<target>``; ``flags`` of
    nvcc are such as leave the instructions as they are (``-lineinfo``)."""
    return _ptx_file(kernel, target, *flags).read_text()


def _ptx_file(kernel: str, target: str, *flags: str) -> Path:
    header, declared = instance(kernel)
    text = f'#include "{header}"\nnamespace senet::gpu {{\n{declared}\n}}\n'
    return ptx_file_of(text, header.removesuffix(".cuh"), target, *flags)


def ptx_file_of(text: str, name: str, target: str, *flags: str) -> Path:
    """PTX of C++ that includes headers of csrc/cuda."""
    nvcc = find_nvcc()
    assert nvcc is not None
    headers = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cuh", ".h"))
    names = [path.name for path in headers]
    key = _key(text, target, [*_NVCC_FLAGS, *flags], version(nvcc), names, *headers)
    source = OUT / f"{name}-{target}-{key}.cu"
    product = source.with_suffix(".ptx")
    if not product.exists():
        write(source, text)
        build.make(product, [nvcc, *_NVCC_FLAGS, *flags, f"-arch=compute_{target}", str(source)])
    return product


def cubin_of(kernel: str, target: str) -> Path:
    """Machine code of one kernel of csrc/cuda for ``sm_<target>``, made of its PTX as nvcc does."""
    nvcc = find_nvcc()
    assert nvcc is not None
    ptx = _ptx_file(kernel, target)
    product = ptx.with_suffix(".cubin")  # whose name has the hash of all that the PTX is made of
    build.make(product, [nvcc, "-cubin", f"-arch=sm_{target}", str(ptx)])
    return product


def write(path: Path, text: str) -> None:
    """In one step, so that no other process reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.name}.{os.getpid()}")
    own.write_text(text)
    os.replace(own, path)


def compiled(text: str, name: str, *, counts: bool = False) -> Path:
    """An object file of translated PTX, which counts basic blocks where asked, see :class:`Module`.

    Raises:
        Untranslatable: see :class:`Module`.
        RuntimeError: the compiler's messages.
    """
    source = OUT / f"{name}-{_key(text, _translator(), *(['counts'] if counts else []))}.cpp"
    if not source.exists():
        write(source, Module(text, f"{name}.ptx", counts=counts).cpp())
    # What another translator translates alike is not compiled again.
    target = OUT / f"{name}-{_key(source, _compiler())}.o"
    if not target.exists():
        # Found first, it spares each module two thirds of what the compiler does.
        header = OUT / f"header-{_compiler()}" / "ptx.h.gch"
        build.make(header, [*build.compiler(), *FLAGS, "-x", "c++-header", str(HERE / "ptx.h")])
        build.make(target, [*build.compiler(), f"-I{header.parent}", *FLAGS, "-c", str(source)])
    return target


class _Entry(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p), ("run", ctypes.c_void_p),
        ("parameters", ctypes.c_int), ("shared_bytes", ctypes.c_int),
    )  # fmt: skip


def linked(text: str, name: str, simulation: Path, *, counts: bool = False) -> ctypes.CDLL:
    """A module, loaded beside the library of the simulation that it runs on."""
    target = compiled(text, name, counts=counts)
    library = target.with_name(f"{target.stem}-{_key(simulation.name)}.so")
    link = [*build.compiler(), "-shared", str(target), str(simulation), "-Wl,-z,defs"]
    build.make(library, link)
    return ctypes.CDLL(str(library))


def entries(text: str, name: str, simulation: Path) -> dict[str, _Entry]:
    """The kernels of a module."""
    return entries_of(linked(text, name, simulation), text)


def entries_of(library: ctypes.CDLL, text: str) -> dict[str, _Entry]:
    table = ctypes.cast(library.ptx_entries, ctypes.POINTER(_Entry))
    found = {}
    for i in range(len(text)):
        if table[i].name is None:
            break
        found[table[i].name.decode()] = table[i]
    return found


_FINDER = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p)
)


class Finder:
    """What a simulation asks, at a launch, for what to execute in place of a kernel's source: its
    PTX for the capability of the device."""

    def __init__(self, simulation: Path) -> None:
        self.simulation = simulation
        self.found: dict[tuple[str, int], int] = {}
        self.callback = _FINDER(self._find)
        self._error = ctypes.create_string_buffer(b"")

    def _find(self, kernel: bytes, capability: int, found: Any) -> int | None:
        key = kernel.decode(), capability
        try:
            if key not in self.found:
                self.found[key] = self._load(*key)
            found[0] = self.found[key]
        except BaseException as error:  # whatever it is: the launch fails, and says so
            text = f"{key[0]}: {type(error).__name__}: {error}"
            self._error = ctypes.create_string_buffer(text.encode())
            return ctypes.addressof(self._error)
        return None

    def _load(self, kernel: str, capability: int) -> int:
        target = _TARGETS.get(capability, str(capability))
        name = f"{instance(kernel)[0].removesuffix('.cuh')}-{target}"
        entry = entries(ptx_of(kernel, target), name, self.simulation)[kernel]
        if entry.shared_bytes:
            raise Untranslatable("static shared memory, of which the simulated runtime has none")
        return int(entry.run)
