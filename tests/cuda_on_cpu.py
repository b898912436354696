"""The CUDA kernels on CPU tensors: compiled against the simulation in ``tests/simt``.

The very sources of the CUDA part, launch code and registration included, become a library whose
ops have the names and schemas of the native ones, in a namespace of their own. While they are
:func:`plugged_in` they implement the native ops on CPU tensors; the package notices nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from senet_kernels import ops

sys.path.insert(0, str(Path(__file__).parent / "simt"))

import build
from ptx import compiling

CUDA = build.ROOT / "csrc" / "cuda"
NAMESPACE = "senet_simt"
_SETTING = "native_dispatch_allocations"  # an op without tensors
SANITIZED = "SENET_TEST_SANITIZED"
#: Where it is set, the PTX of the kernels is executed, not their source (``tests/ptx``): to the
#: seed of the errors of approximate functions.
EXECUTE_PTX = "SENET_TEST_PTX"


def why_not() -> str | None:
    """Why the kernels cannot be simulated here; None when they can."""
    return None if build.compiler() else "no C++ compiler"


def _with_torch() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-fvisibility=hidden",
        *(f"-isystem{path}" for path in include_paths()),
    ]


def pretended_devices() -> str:
    """What ``csrc/cuda/host.cpp``, compiled as for a GPU, does on which of several devices that
    are not there: the events that ``tests/simt/devices.cpp`` writes down."""
    flags = [*_with_torch(), "-USENET_SIMT", f"-I{build.ROOT / 'csrc'}", f"-I{CUDA}"]
    sources = [(CUDA / "host.cpp", flags), (build.HERE / "devices.cpp", flags)]
    program = build.build("devices", sources)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def compile_library(*, sanitize: bool = False) -> Path:
    """The library; compiled once per content of its sources."""
    from torch.utils.cpp_extension import library_paths

    with_torch = _with_torch()
    kernels = sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cpp")])
    sources = [(build.ROOT / "csrc" / "registration.cpp", with_torch)]
    # The large ones first.
    kernels.sort(key=lambda path: -path.stat().st_size)
    sources += [(path, with_torch if path.name == "host.cpp" else []) for path in kernels]
    link_flags = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-Wl,-z,defs"]
    return build.build("cuda_on_cpu.so", sources, link_flags, sanitize=sanitize)


class Accesses(list[tuple[str, int, int]]):
    """``(how, address, bytes)`` of each 16-byte access to global memory, each copy out of it, and
    each sector that L2 is asked for. ``how`` is ``r``, ``w`` or ``p``."""

    def prefetches(self) -> Counter[int]:
        """How often L2 is asked for which address."""
        return Counter(address for how, address, _ in self if how == "p")

    def times(self, how: str, t: torch.Tensor) -> float:
        """How often all of a tensor is read (``r``) or written (``w``), in bytes."""
        size = t.numel() * t.element_size()
        begin = t.data_ptr()
        of_it = (n for h, at, n in self if h == how and begin <= at < begin + size)
        return sum(of_it) / size


class Simulation:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        schemas = torch.library.Library(NAMESPACE, "DEF")
        for name in ops.NATIVE_OPS:
            schema = getattr(torch.ops.senet_kernels, name).default._schema
            schemas.define(str(schema).partition("::")[2])
        schemas.define(f"{_SETTING}(bool on) -> ()")
        torch.ops.load_library(str(path))
        self.schemas = schemas  # as long as it lives
        self.finder = compiling.Finder(path)
        self.library: Any = ctypes.CDLL(str(path))
        self.library.simt_set_seed.argtypes = [ctypes.c_uint64]
        self.library.simt_set_approximations.argtypes = [ctypes.c_uint64]
        self.library.simt_set_finder.argtypes = [ctypes.c_void_p]
        self.library.simt_device_name.restype = ctypes.c_char_p
        for what in ("launches", "loads", "refusals", "accesses"):
            getattr(self.library, f"simt_take_{what}").restype = ctypes.c_char_p

    @property
    def devices(self) -> list[str]:
        """The names of the simulated devices, in their order."""
        count = self.library.simt_device_count()
        return [self.library.simt_device_name(i).decode() for i in range(count)]

    def use(self, seed: int, device: int, current: int | None = None) -> None:
        """The order in which threads run, and the device that tensors are on, from now on: one of
        :attr:`devices`, or one that is not there.

        The current device of the runtime that the kernels are linked with is ``current``, and
        without it another one than the tensors': that runtime is not torch's, and need not know.
        """
        if current is None:
            current = (device + 1 + seed) % len(self.devices)
            current = current if current != device else (device + 1) % len(self.devices)
        self.library.simt_set_seed(seed)
        assert self.library.simt_set_device(device, current) == 0

    def execute_ptx(self, approximations: int | None) -> None:
        """From now on the PTX that nvcc emits for the kernels is executed, compiled at the first
        launch of each; approximate functions have errors drawn from that seed. None: the sources.
        """
        self.library.simt_set_approximations(approximations or 0)
        callback = None if approximations is None else self.finder.callback
        self.library.simt_set_finder(callback and ctypes.cast(callback, ctypes.c_void_p))

    def take(self, what: str) -> list[str]:
        """What has happened since the last call: ``launches``; ``loads`` of kernels; ``refusals``
        of cooperative launches; ``accesses``."""
        return getattr(self.library, f"simt_take_{what}")().decode().splitlines()

    def take_launches(self) -> list[str]:
        """The launches since the last call."""
        return self.take("launches")

    @contextmanager
    def capture(self, *, loads: bool = True, valid: bool = True) -> Iterator[None]:
        """As if the stream were captured; launches run all the same. Kernels are loaded then by a
        thread that allows for it, or, without ``loads``, by none. ``valid``: whether the capture
        must be at its end, or must have been ruined by a call that is not legal in one.
        """
        self.library.simt_capture(1 if loads else 2)
        try:
            yield
        finally:
            found = self.library.simt_capture(0)
        assert bool(found) == valid

    @contextmanager
    def accesses(self) -> Iterator[Accesses]:
        """What kernels do with global memory within the block; known at its end."""
        found = Accesses()
        self.library.simt_record_accesses(1)
        try:
            yield found
        finally:
            self.library.simt_record_accesses(0)
            for line in self.take("accesses"):
                how, address, size = line.split()
                found.append((how, int(address), int(size)))


@functools.cache
def _simulation() -> Simulation | Exception:
    try:
        return Simulation(compile_library(sanitize=os.environ.get(SANITIZED) == "1"))
    except (RuntimeError, OSError) as error:
        return error  # once: compiling again would take as long for every test


def simulation() -> Simulation:
    """The library; with sanitizers in the processes that :func:`sanitized` starts."""
    found = _simulation()
    if isinstance(found, Exception):
        raise found
    return found


def sanitized(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a Python command with AddressSanitizer, whose library must be the first one there, and
    UndefinedBehaviorSanitizer; :func:`simulation` is then the library compiled for them."""

    def of_compiler(name: str) -> str:
        command = [*build.compiler(), f"-print-file-name={name}"]
        return subprocess.check_output(command, text=True).strip()

    environment = os.environ | {
        SANITIZED: "1",
        # The C++ library too: what throws is intercepted at the start or not at all.
        "LD_PRELOAD": f"{of_compiler('libasan.so')} {of_compiler('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter leaves memory to the system
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*build.without_randomised_addresses(), *command],
        env=environment, cwd=build.ROOT, capture_output=True, text=True,
    )  # fmt: skip


@contextmanager
def plugged_in(
    seed: int = 0, device: int | None = None, *, ptx: int | None = None
) -> Iterator[Simulation]:
    """The native ops run the CUDA kernels on CPU tensors, on a simulated device.

    Without ``device`` the seed chooses that, too. With ``ptx`` the PTX of the kernels is executed,
    see :meth:`Simulation.execute_ptx`; without it, where the environment says so.
    """
    simulated = simulation()
    if ptx is None and EXECUTE_PTX in os.environ:
        ptx = int(os.environ[EXECUTE_PTX])
    simulated.execute_ptx(ptx)
    simulated.use(seed, seed % len(simulated.devices) if device is None else device)
    simulated.take_launches()
    library = torch.library.Library("senet_kernels", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*verrid")
            for name in ops.NATIVE_OPS:
                op = getattr(getattr(torch.ops, NAMESPACE), name).default
                library.impl(name, op, "CPU", allow_override=True)
            op = getattr(getattr(torch.ops, NAMESPACE), _SETTING).default
            library.impl(_SETTING, op, "CompositeExplicitAutograd", allow_override=True)
        yield simulated
    finally:
        library._destroy()
