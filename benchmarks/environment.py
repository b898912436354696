"""What a record must say about where it was made. No host names, no paths."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()

    def field(name: str) -> str | None:
        found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        return found.group(1) if found else None

    name, family, model = field("model name"), field("cpu family"), field("model")
    if name and family and model:  # several generations go by the same name
        return f"{name} (family {family}, model {model})"
    return name or platform.machine()


def _compiler() -> str | None:
    """First line of the C++ compiler's version: what torch.compile builds with."""
    path = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    text = _run(path, "--version") if path else None
    return text.splitlines()[0] if text else None


def _torch_compiler() -> str | None:
    found = re.search(r"^\s*-\s*((?:GCC|Clang|MSVC)\b.*)$", torch.__config__.show(), re.MULTILINE)
    return found.group(1) if found else None


def _fused() -> dict[str, str | None]:
    try:
        import senet_kernels
    except ImportError:
        return {"version": None}
    return {"version": getattr(senet_kernels, "__version__", None)}


def _caches() -> dict[str, int] | None:
    """Bytes of a core's own data cache and of the last level, where Linux says so."""
    levels: dict[int, int] = {}
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            kind = (folder / "type").read_text().strip()
            size = re.fullmatch(r"(\d+)K", (folder / "size").read_text().strip())
            level = int((folder / "level").read_text())
        except (OSError, ValueError):
            return None
        if kind != "Instruction" and size:
            levels[level] = int(size[1]) * 1024
    if not levels:
        return None
    return {"core": levels.get(2, max(levels.values())), "last": levels[max(levels)]}


def clocks(device: torch.device) -> dict[str, object]:
    """What the clocks are at this moment: a figure taken while they were throttled is none."""
    if device.type == "cuda":
        fields = (
            "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw",
            "temperature.gpu", "clocks_throttle_reasons.active",
        )  # fmt: skip
        query = f"--query-gpu={','.join(fields)}"
        found = _run("nvidia-smi", query, "--format=csv,noheader", f"--id={device.index or 0}")
        values = found.split(", ") if found else []
        return dict(zip(fields, values, strict=False))
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    mhz = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", text, re.MULTILINE)]
    return {"mhz_min": min(mhz), "mhz_max": max(mhz)} if mhz else {}


def _commit() -> tuple[str | None, bool | None]:
    """The commit, and whether files differ from it; of a bundle, by what it says of itself."""
    bundled = Path(__file__).resolve().parent.parent / "COMMIT"
    if bundled.exists():
        commit, _, changed = bundled.read_text().strip().partition("-")
        return commit or None, bool(changed) if commit else None
    commit_here = _run("git", "rev-parse", "HEAD")
    changed_here = _run("git", "status", "--porcelain", "--untracked-files=no")
    return commit_here, bool(changed_here) if commit_here and changed_here is not None else None


def stamp(device: torch.device) -> dict[str, object]:
    """Environment of this run, ready for JSON."""
    commit, changed = _commit()
    out: dict[str, object] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": changed,
        "senet_kernels": _fused(),
        "torch": torch.__version__,
        "torch_built_with": _torch_compiler(),
        "cxx": _compiler(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "device": "cpu",
    }
    if device.type == "cuda":
        from senet_kernels.backends.triton.runtime import architecture

        properties = torch.cuda.get_device_properties(device)
        out |= {
            "device": properties.name,
            "cuda": torch.version.cuda,
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
            # An AMD GPU's is of no compute capability.
            "capability": None if torch.version.hip else f"{properties.major}.{properties.minor}",
            "architecture": architecture(device),
            "l2_bytes": properties.L2_cache_size,
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return out
