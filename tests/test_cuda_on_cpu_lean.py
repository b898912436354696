"""The lean loops of the CUDA kernels, simulated on the CPU: shapes that take each of their ways."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import cuda_on_cpu
from policies import A100, PLAN, SMALL_90
from problems import Spec, build, check
from senet_kernels import channel_scale, squeeze, squeeze_excite

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=str(cuda_on_cpu.why_not())),
]


def _ways(simulation: cuda_on_cpu.Simulation) -> list[str]:
    """Of the forward and backward kernels launched since the last call; "0" is the general one."""
    launches = "\n".join(simulation.take_launches())
    return re.findall(r"(?:forward|backward)_kernel<.*, (\d)>", launches)


_MASKED = {"residual": "contiguous", "after": "relu"}
# Channels and positions of contiguous rows. Units of eight elements are in 1, 2, 4 or 8 rows.
_ROWS: tuple[tuple[tuple[int, int], dict[str, Any]], ...] = (
    ((8, 9), {}),  # the shortest that a unit reaches over: two edges each
    ((8, 9), _MASKED),
    ((8, 11), {"before": "silu"}),
    ((12, 10), {"before": "hardswish"}),
    ((12, 14), _MASKED),
    ((10, 12), {"before": "relu"}),  # whose second row begins in the middle of a unit
    ((10, 12), {"before": "silu", **_MASKED}),
    ((3, 8), _MASKED),  # one unit each
    ((6, 196), {"before": "hardswish"}),  # segments of rows that are no whole units
    ((6, 196), _MASKED),
    ((5, 504), {"before": "silu"}),  # ... and of such that are
    ((40, 512), _MASKED),  # eight threads to a row
    ((3, 1032), {"before": "relu"}),  # ... and to a segment
    ((8, 1023), {}),  # a band of more units than a block has threads
    ((8, 300), _MASKED),  # the mask in several stretches, of 32 threads
)


@pytest.mark.parametrize("case", range(len(_ROWS)))
def test_rows(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each dtype that has such a kernel; of slices in shared memory, and in the image."""
    sizes, block = _ROWS[case]
    dtypes = [torch.bfloat16, torch.float16]
    if block.get("before", "silu") == "silu":
        dtypes.append(torch.float32)
    spec = Spec((2, *sizes), 4, **block)
    for i, dtype in enumerate(dtypes):
        resident = (case + i) % 2
        threads = ",threads=32" if case % 3 == 2 else ""
        monkeypatch.setenv(PLAN, f"exchange=none,resident={resident}{threads}")
        with cuda_on_cpu.plugged_in(case, (A100, SMALL_90)[i % 2]) as simulation:
            check(build(replace(spec, dtype=dtype, seed=case)), squeeze_excite, backend="native")
            forward, *backward = _ways(simulation)
        way = "2" if dtype == torch.float16 else "1"
        # Where units are no bytes of the mask, backward takes the general loops.
        general = "after" in block and sizes[1] % 8 != 0
        assert (forward, backward) == (way, ["0" if general else way])


@pytest.mark.parametrize("positions", [9, 12, 196, 520])
@pytest.mark.parametrize("before", ["identity", "silu"])
def test_what_is_not_finite_stays_in_its_channel(positions: int, before: str) -> None:
    """Threads read units that have elements of two channels: sums of the others keep their bits."""
    generator = torch.Generator().manual_seed(positions)

    def images() -> torch.Tensor:
        return torch.randn(2, 16, positions, generator=generator).bfloat16()

    x, dy, u = images(), images(), images()[:, :, 0]
    with cuda_on_cpu.plugged_in(0, A100) as simulation:

        def results(x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
            leaves = [x.clone().requires_grad_(), u.clone().requires_grad_()]
            z = squeeze(x, before=before, backend="native")
            y = channel_scale(*leaves, before=before, gate="sigmoid", backend="native")
            return [z, y.detach(), *torch.autograd.grad(y, leaves, dy)]

        right = results(x, dy)
        assert set(_ways(simulation)) == {"1"}
        for channel, value in ((0, math.nan), (7, math.inf), (15, math.nan)):
            for which in range(2):
                changed = [x.clone(), dy.clone()]
                changed[which][:, channel] = value
                others = [c for c in range(16) if c != channel]
                for got, wanted in zip(results(*changed), right, strict=True):
                    assert torch.equal(got[:, others], wanted[:, others])
