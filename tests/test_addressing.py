"""Offsets beyond 2^31, and extents beyond what a launch grid's y and z (65,535) would take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from backend_cases import BACKENDS, FUSED_BACKENDS, BackendCase
from problems import Spec, build, check
from senet_kernels import squeeze_excite

each_fused = pytest.mark.parametrize("backend", FUSED_BACKENDS, indirect=True, ids=str)
_FAR = 1 << 31


def _far_apart(t: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """The two images of ``t`` more than 2^31 elements apart in ``memory``."""
    far = memory.as_strided(t.shape, (_FAR + 8, *t.stride()[1:]))
    return far.copy_(t)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@each_fused
def test_images_beyond_2_31_elements(backend: BackendCase, layout: str) -> None:
    """Four gigabytes of address space each, of which the system provides what is touched."""
    spec = Spec((2, 16, 3, 5), 4, torch.bfloat16, layout, before="silu", residual=layout,
                after="relu", dy_layout=layout, device=backend.device)  # fmt: skip
    problem = build(spec)
    if backend.device == "cuda" and torch.cuda.mem_get_info()[0] < 14e9:
        pytest.skip("needs 14 GB of device memory")
    near = problem.run(squeeze_excite, backend=backend.name)
    for name in ("x", "residual"):
        t = problem.tensors[name]
        assert t is not None
        memory = torch.empty(_FAR + 4096, dtype=t.dtype, device=t.device)
        problem.tensors[name] = _far_apart(t, memory)
    memory = torch.empty(_FAR + 4096, dtype=torch.bfloat16, device=backend.device)
    problem.dy = _far_apart(problem.dy, memory)
    far = check(problem, squeeze_excite, backend=backend.name)
    for name, value in near.items():
        assert torch.equal(far[name], value), name


# At 65,535 and one and two more: images, channels, both together, positions, hidden channels.
_MANY = (
    *((f"B={n}", Spec((n, 1, 1), 1)) for n in (65535, 65536, 65537)),
    *((f"C={n}", Spec((1, n, 1), 1)) for n in (65535, 65536, 65537)),
    *((f"B*C={n}", Spec((b, n // b, 2), 2)) for n, b in ((65535, 255), (65536, 256))),
    ("B*C=65537, S=3", Spec((1, 65537, 3), 1, layout="channels_last")),
    ("S=65537", Spec((1, 2, 65537), 1)),
    *((f"R={n}", Spec((1, 2, 3), n)) for n in (65535, 65536, 65537)),
)


@pytest.mark.parametrize("spec", [spec for _, spec in _MANY], ids=[name for name, _ in _MANY])
@pytest.mark.parametrize(
    "backend",
    [
        # A thread of the simulation and a program of the interpreter cost microseconds, not
        # nanoseconds.
        pytest.param(b, marks=[pytest.mark.slow] if b.simulated or b.name == "triton" else [])
        for b in BACKENDS
    ],
    indirect=True,
    ids=str,
)
def test_extents_beyond_65535(backend: BackendCase, spec: Spec) -> None:
    spec = replace(spec, device=backend.device, before="relu", activation="silu")
    problem = build(spec)
    if (spec.hidden or 0) >= 65535 and (backend.simulated or str(backend) == "native-cuda"):
        with pytest.raises(RuntimeError, match=r"channels.* shared memory"):  # and nothing else
            problem.call(squeeze_excite, backend=backend.name)
        return
    check(problem, squeeze_excite, backend=backend.name)
