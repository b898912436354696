"""Writes what a record must say about this machine to the JSON file named as the argument."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import torch

from benchmarks.environment import stamp
from tools.stage_runner import PREBUILT

PACKAGES = (
    "triton", "numpy", "setuptools", "ninja", "pytest", "pytest-xdist", "hypothesis", "rich",
    "tqdm", "matplotlib",
)  # fmt: skip
TOOLS = {
    "nvcc": ("nvcc", "--version"),
    "compute_sanitizer": ("compute-sanitizer", "--version"),
    "ncu": ("ncu", "--version"),
    "nvidia_smi": (
        "nvidia-smi", "--format=csv,noheader",
        "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory",
    ),
}  # fmt: skip


def _version(package: str) -> str | None:
    """Of the distribution of this name, or of one that has a module of this name: Triton's may be
    called pytorch-triton."""
    try:
        return version(package)
    except PackageNotFoundError:
        others = packages_distributions().get(package)
    return version(others[0]) if others else None


def _answer(command: tuple[str, ...]) -> list[str] | None:
    """What a program prints, or None where it is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout or done.stderr).strip().splitlines()


_LOADING = 60.0  # seconds
_ASK = """
from senet_kernels.backends import native
why = native.UNAVAILABLE or (native.unavailable_on("cuda") if {cuda} else None) or ""
if {cuda} and not why:
    import torch
    from senet_kernels import squeeze_excite
    x, w = torch.ones(1, 16, 4, 4, device="cuda"), torch.ones(16, 16, device="cuda")
    try:
        squeeze_excite(x, w, None, w, None, backend="native")
        torch.cuda.synchronize()
    except Exception as error:  # what is wrong with the kernels is for their verdicts to say
        if any(words in str(error) for words in {not_for_it}):
            why = " ".join(str(error).split())[:200]
print(why)
"""
# A library for other devices or drivers; nvcc here would make another one.
_NOT_FOR_IT = ("driver version is insufficient", "no kernel image", "unsupported toolchain")


def library(cuda: bool) -> dict[str, str]:
    """Why the library that was carried along, and the one in place, cannot be used; empty for the
    first that can. Each is tried in a process of its own."""
    found: dict[str, str] = {}
    carried = os.environ.get(PREBUILT, "")
    for name, value in [("carried along", carried)] * bool(carried) + [("in place", "")]:
        try:
            done = subprocess.run(
                [sys.executable, "-c", _ASK.format(cuda=cuda, not_for_it=_NOT_FOR_IT)],
                env={**os.environ, PREBUILT: value}, capture_output=True, text=True,
                timeout=_LOADING, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            found[name] = f"a process that loads it was not ready within {_LOADING:g} s"
            continue
        lines = done.stdout.strip().splitlines()
        found[name] = lines[-1] if lines else ""
        if done.returncode > 0:
            found[name] = f"a process that loads it ended with {done.returncode}"
        if not found[name]:
            break
    return found


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = stamp(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "devices": torch.cuda.device_count(),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    found["packages"] = {name: _version(name) for name in PACKAGES}
    found["tools"] = {name: _answer(command) for name, command in TOOLS.items()}
    path = Path(sys.argv[1])
    path.write_text(json.dumps(found, indent=1) + "\n")
    found["library"] = library(device.type == "cuda")
    path.write_text(json.dumps(found, indent=1) + "\n")
    packages = ", ".join(f"{n} {v}" for n, v in found["packages"].items() if v)
    libraries = ", ".join(f"{n}: {why or 'loads'}" for n, why in found["library"].items())
    print(f"{found['device']}, torch {found['torch']}, python {found['python']}, {packages}")
    print(f"{found['device']}; the compiled library {libraries}")


if __name__ == "__main__":
    main()
