"""``python tools/torchvision_ops.py``: make torchvision importable in a virtual environment.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its compiled library does not
load, and ``import torchvision``, and with it ``import timm``, fails for want of the schemas of two
operators. Where that is so, a file in the environment's site-packages defines them as soon as
torchvision is imported. Models then run; the operators themselves (nms and the like) stay missing.
Says what it did; exit code 1 where torchvision does not import in the end.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

NAME = "senet_kernels_torchvision_ops"
HOOK = '''"""Written by senet_kernels' tools/torchvision_ops.py, which says why."""

import sys


class _Schemas:
    """Finds nothing; defines what torchvision lacks when that is looked for."""

    libraries = []

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(cls)
            import torch

            cls.libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
            for op in ("nms", "qnms"):
                cls.libraries[-1].define(
                    f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
        return None


sys.meta_path.insert(0, _Schemas)
'''


def failure() -> str | None:
    """What ``import torchvision`` fails with in a process of its own; None if it works."""
    command = [sys.executable, "-c", "import torchvision"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1] if done.returncode else None


def main() -> int:
    if sys.prefix == sys.base_prefix:
        print("    torchvision: not in a virtual environment, nothing is changed")
        return 1
    site = Path(sysconfig.get_paths()["purelib"])
    hook, pth = site / f"{NAME}.py", site / f"{NAME}.pth"
    for path in (hook, pth):  # whatever an earlier torch needed
        path.unlink(missing_ok=True)
    reason = failure()
    if reason is None:
        print("    torchvision: imports")
        return 0
    if "torchvision::nms does not exist" in reason:
        hook.write_text(HOOK, encoding="utf-8")
        pth.write_text(f"import {NAME}\n", encoding="utf-8")
        if failure() is None:
            print(
                "    torchvision: its compiled library does not load beside this torch; it imports,"
            )
            print("    without operators such as nms, which no model here calls")
            return 0
        hook.unlink()
        pth.unlink()
    print(f"    torchvision: does not import: {reason}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
