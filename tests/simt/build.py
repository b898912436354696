"""Compiles the simulation, with the CUDA kernels or its own test kernels, by the C++ compiler.

Products lie in ``build/simt``, named by a hash of all that goes into them: sources, flags,
compiler. Nothing is compiled twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUT = ROOT / "build" / "simt"
RUNTIME = ("scheduler.cpp", "calls.cpp", "runtime.cpp")

FLAGS = ["-std=c++20", "-O1", "-fPIC", "-DSENET_SIMT=1", f"-I{HERE / 'include'}", f"-I{HERE}"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# As the library's own: NaN and Inf must come out as they do in PyTorch.
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
# Optimised, their checks would take three times as long to compile, and little less to run.
SANITIZERS = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler() -> list[str]:
    """The C++ compiler as the beginning of a command; empty where there is none."""
    candidates = [shlex.split(os.environ.get("CXX", "")), ["g++"]]
    return next((c for c in candidates if c and shutil.which(c[0])), [])


def build(
    name: str,
    sources: list[tuple[Path, list[str]]],
    link_flags: list[str] | None = None,
    *,
    sanitize: bool = False,
) -> Path:
    """Compile sources, each with flags of its own, and the simulation; link them.

    ``name`` with a suffix of .so makes a library, without one a program.

    Raises:
        RuntimeError: the compiler's messages.
    """
    cxx = compiler()
    OUT.mkdir(parents=True, exist_ok=True)
    common = [*FLAGS, *(SANITIZERS if sanitize else ())]
    common_key = hashlib.sha256(subprocess.check_output([*cxx, "--version"]))
    for folder in (HERE, ROOT / "csrc"):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh"):
                common_key.update(f"{path}\0".encode() + path.read_bytes())

    def compiled(source: Path, flags: list[str]) -> Path:
        key = common_key.copy()
        key.update(repr([common, flags]).encode() + source.read_bytes())
        target = OUT / f"{source.name}-{key.hexdigest()[:20]}.o"
        # -x c++: what is in a .cu file, too.
        make(target, [*cxx, *common, *flags, "-x", "c++", "-c", str(source)])
        return target

    everything = [*sources, *((HERE / source, []) for source in RUNTIME)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda source: compiled(*source), everything))
    stem, dot, suffix = name.partition(".")
    key = hashlib.sha256(repr([objects, link_flags]).encode())
    target = OUT / f"{stem}-{key.hexdigest()[:20]}{dot}{suffix}"
    link = [*cxx, "-shared" if dot else "-rdynamic", *(SANITIZERS if sanitize else ())]
    make(target, [*link, *map(str, objects), *(link_flags or ()), "-ldl"])
    return target


def make(target: Path, command: list[str]) -> None:
    """Run a command that writes ``-o target``, unless it is there; one process, while others that
    want the same wait."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        target.with_name(f"{target.name}.lock").open("w") as lock,
        tempfile.TemporaryDirectory(dir=target.parent) as folder,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            product = f"{folder}/{target.name}"
            _run([*command, "-o", product])
            os.replace(product, target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-10000:]}")


def without_randomised_addresses() -> list[str]:
    """The beginning of a command to run a program with AddressSanitizer, which addresses drawn
    from a large range (``vm.mmap_rnd_bits``) can make fail before it begins."""
    command = ["setarch", "-R"]
    if shutil.which(command[0]) and not subprocess.run([*command, "true"]).returncode:
        return command
    return []
