"""What torch.compile costs a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

COMPILE_SHARE = 0.5  # of the budget; the rest is for checks and timing
COMPILE_SHARE_LAST = 0.9  # where nothing else is left to measure
NO_TIME = "compile time budget"  # how a refusal for time begins


@dataclass
class CompileAccount:
    """Seconds and graphs torch.compile has cost so far, and whether another case fits."""

    budget: float  # 0: no limit
    seconds: float = 0.0
    cases: int = 0
    last: float = 0.0
    broken: dict[str, str] = field(default_factory=dict)
    most: float = 6.0  # what another case is taken to cost at most, in seconds
    share: float = COMPILE_SHARE

    def refuse(self, provider: str = "") -> str | None:
        """Why a provider shall not compile another case; without a name, whether time is left.
        Once one has failed, every case would fail again, slowly."""
        if provider in self.broken:
            return self.broken[provider]
        limit = self.share * self.budget
        # Without a budget there is no limit, but for a share of nothing.
        if (self.budget or not self.share) and self.seconds + self.last >= limit:
            return f"{NO_TIME} of {limit:.0f} s spent"
        return None

    def spend(self, seconds: float) -> None:
        self.seconds += seconds
        self.cases += 1
        # the first includes imports and precompiled headers, which no other case pays again
        self.last = min(seconds, self.most)


@contextmanager
def buffers_kept() -> Iterator[None]:
    """What is compiled inside can run backward again and again: by default it would write into the
    tensors saved for it. For code compiled before, this only hides that."""
    from torch._functorch import config
    from torch._inductor import config as inductor

    # The key of Inductor's cache does not tell code that writes there from code that does not
    # (seen with torch 2.13).
    cached = inductor.patch(fx_graph_cache=False)
    with config.patch(donated_buffer=False, enable_autograd_cache=False), cached:
        yield


def graphs_so_far() -> int:
    """Graphs Dynamo has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
