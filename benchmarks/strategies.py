"""Ways to cut the same work on a GPU, forced one at a time: where does which begin to win?

Not yet run on a GPU. Compare device times: what a forced plan costs the host is no part of the
question (that of the CUDA kernels is then made anew in every call).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

Strategy = Callable[[], AbstractContextManager[None]]

_VARIABLE = "SENET_KERNELS_CUDA_PLAN"


@contextmanager
def _cuda(policy: str) -> Iterator[None]:
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = policy
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


#: What forces which plan of the CUDA kernels, by the name of the provider.
POLICIES = {
    "native-block": "exchange=none",
    "native-block-reread": "exchange=none,resident=0",
    "native-cluster4": "exchange=cluster,blocks=4",
    "native-cluster8": "exchange=cluster,blocks=8",
    "native-cluster8-reread": "exchange=cluster,blocks=8,resident=0",
    "native-grid8": "exchange=grid,blocks=8",
    # What a plan chooses by itself, but for this.
    "native-reread": "resident=0",
    "native-stages1": "resident=1,slots=1",
    "native-stages2": "resident=1,slots=2",
    "native-stages3": "resident=1,slots=3",
}
#: Providers by name: the backend, and what forces its plan.
STRATEGIES: dict[str, tuple[str, Strategy]] = {
    name: ("native", partial(_cuda, policy)) for name, policy in POLICIES.items()
}
