"""``make gpu-bundle``: this repository with its compiled library as one file, for a machine with a
GPU that has torch (of the release that the library was built with, or a later one), Triton and
nothing else.

``python -m tools.gpu_bundle FILE.tgz``. Unpacked there, ``make gpu PYTHON=python3`` runs.
"""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

from tools.stage_runner import ROOT

MOST_BYTES = 64 << 20
FOLDERS = ("senet_kernels", "benchmarks", "tools", "tests", "csrc")
FILES = ("Makefile", "setup.py", "pyproject.toml", "LICENSE", "README.md")
_NOT = {"__pycache__", "local", "corpus"}


def members() -> list[Path]:
    """What goes along, from the root; of results only what was computed, for the report."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    relative = [path.relative_to(ROOT) for path in sorted(found)]
    return [Path(name) for name in FILES] + [
        path
        for path in relative
        if not _NOT & {*path.parts} and ("results" not in path.parts or "computed" in path.parts)
    ]


def write(path: Path) -> int:
    """The file; how many bytes it has.

    Raises:
        RuntimeError: there is no library to carry along, or the file is too large to travel.
    """
    libraries = sorted((ROOT / "senet_kernels").glob("_native*.so"))
    if not libraries:
        raise RuntimeError("there is no compiled library: make build makes it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for member in members():
            tar.add(ROOT / member, str(Path("senet_kernels") / member), recursive=False)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise RuntimeError(f"{path} has {size:,} bytes, expected at most {MOST_BYTES:,}")
    return size


def main() -> int:
    path = Path(sys.argv[1])
    print(f"{path}: {write(path):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
