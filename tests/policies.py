"""The policies of the CUDA kernels' plan that are forced: in the simulation, under sanitizers and
a thousand times over on a GPU (``tools/gpu_kernels.py``, ``test_gpu.py``), by the fuzzer.

Every kind of plan that is chosen for layers of real networks is among them, see
``test_launch_plans.py``.
"""

from __future__ import annotations

PLAN = "SENET_KERNELS_CUDA_PLAN"
# Of the simulated devices, by their order in tests/simt/runtime.cpp.
DEVICES = range(7)
H100, A100, T4, RTX, SMALL_90, SMALL_80, UNCOOPERATIVE_80 = DEVICES

# A policy, and the simulated devices it is forced on. Each image of a batch of five is a group's
# first, second or last; slices are uneven.
POLICIES: dict[str, tuple[int, ...]] = {
    "": (H100, A100, T4, RTX, SMALL_90, SMALL_80, UNCOOPERATIVE_80),
    "exchange=none,resident=0": (A100, SMALL_90),
    "exchange=none,resident=0,groups=1,lean=0": (T4,),
    "exchange=none,resident=1,slots=1": (A100, SMALL_90),
    "exchange=none,resident=1,slots=1,groups=2,lean=0": (H100, T4),
    "exchange=none,resident=1,slots=2,groups=2": (RTX, SMALL_80),
    "exchange=none,resident=1,slots=3,groups=1": (H100, A100),
    "exchange=none,resident=1,slots=2,groups=1,weights=1": (H100, SMALL_80),
    "exchange=none,resident=0,groups=2,weights=1,threads=64": (A100, SMALL_90),
    "exchange=none,threads=32": (T4,),
    "exchange=none,threads=256": (A100,),
    "exchange=cluster,blocks=2,resident=0": (H100, SMALL_90),
    "exchange=cluster,blocks=2,resident=0,axis=space,groups=2": (H100, RTX),
    "exchange=cluster,blocks=3,resident=1,slots=1": (H100,),
    "exchange=cluster,blocks=3,resident=1,slots=2,groups=1": (RTX,),
    "exchange=cluster,blocks=2,resident=1,slots=2,groups=2,axis=space,lean=0": (SMALL_90,),
    "exchange=cluster,blocks=2,resident=1,slots=2,groups=2,weights=1": (H100, SMALL_90),
    "exchange=cluster,blocks=2,resident=1,slots=1,groups=2,axis=space,weights=1": (H100,),
    "exchange=cluster,blocks=4,resident=0,groups=1,weights=1,threads=96": (H100,),
    "exchange=cluster,blocks=5,axis=space,resident=0,threads=64": (RTX,),
    "exchange=grid,blocks=2,resident=0": (A100, H100),
    "exchange=grid,blocks=2,resident=0,axis=space,groups=2": (SMALL_80,),
    "exchange=grid,blocks=3,resident=1,slots=1,groups=2": (A100, T4),
    "exchange=grid,blocks=3,resident=1,slots=2,groups=1,axis=space": (SMALL_80,),
    "exchange=grid,blocks=2,resident=1,slots=2,groups=2,weights=1": (A100, SMALL_80),
    "exchange=grid,blocks=2,resident=1,slots=1,groups=2,axis=space,weights=1": (A100,),
    "exchange=grid,blocks=4,resident=0,groups=1,weights=1,threads=64": (A100,),
}


def parsed(policy: str) -> dict[str, str]:
    return dict(part.split("=") for part in policy.split(",") if part)
