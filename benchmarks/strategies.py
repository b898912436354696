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


#: Providers by name: the backend, and what forces its plan.
STRATEGIES: dict[str, tuple[str, Strategy]] = {
    "native-block": ("native", partial(_cuda, "exchange=none")),
    "native-block-reread": ("native", partial(_cuda, "exchange=none,resident=0")),
    "native-cluster4": ("native", partial(_cuda, "exchange=cluster,blocks=4")),
    "native-cluster8": ("native", partial(_cuda, "exchange=cluster,blocks=8")),
    "native-cluster8-reread": ("native", partial(_cuda, "exchange=cluster,blocks=8,resident=0")),
    "native-grid8": ("native", partial(_cuda, "exchange=grid,blocks=8")),
}
