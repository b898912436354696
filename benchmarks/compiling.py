"""What torch.compile costs a run."""

from __future__ import annotations

from dataclasses import dataclass, field

COMPILE_SHARE = 0.5  # of the budget; the rest is for checks and timing


@dataclass
class CompileAccount:
    """Seconds and graphs torch.compile has cost so far, and whether another case fits."""

    budget: float  # 0: no limit
    seconds: float = 0.0
    cases: int = 0
    last: float = 0.0
    broken: dict[str, str] = field(default_factory=dict)
    most: float = 6.0  # what another case is taken to cost at most, in seconds

    def refuse(self, provider: str = "") -> str | None:
        """Why a provider shall not compile another case; without a name, whether time is left.
        Once one has failed, every case would fail again, slowly."""
        if provider in self.broken:
            return self.broken[provider]
        limit = COMPILE_SHARE * self.budget
        if self.budget and self.seconds + self.last > limit:
            return f"compile time budget of {limit:.0f} s spent"
        return None

    def spend(self, seconds: float) -> None:
        self.seconds += seconds
        self.cases += 1
        # the first includes imports and precompiled headers, which no other case pays again
        self.last = min(seconds, self.most)


def graphs_so_far() -> int:
    """Graphs Dynamo has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
