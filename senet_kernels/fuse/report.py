"""What was done to a graph, for people."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from torch.fx import Node


class Finding(NamedTuple):
    """A product of a graph: the line of the model it stands in, and what became of it."""

    node: str
    where: str
    note: str


class GraphReport(NamedTuple):
    """The squeeze-and-excitations of a graph that run as one call, and the products that nearly
    were ones, with the reason why they are not. Print it to read it."""

    fused: tuple[Finding, ...] = ()
    refused: tuple[Finding, ...] = ()

    def __add__(self, other: object) -> GraphReport:
        if not isinstance(other, GraphReport):
            return NotImplemented
        return GraphReport(self.fused + other.fused, self.refused + other.refused)

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)}, refused {len(self.refused)}"]
        for title, findings in zip(self._fields, self, strict=True):
            width = max((len(f.where) for f in findings), default=0)
            lines += [f"{title}  {f.where.ljust(width)}  {f.note}" for f in findings]
        return "\n".join(lines)


def place_of(node: Node) -> str:
    """The line of the model that made a node."""
    frames = re.findall(r'File "([^"]*)", line (\d+)', node.meta.get("stack_trace") or "")
    if not frames:
        return node.name
    path, line = frames[-1]
    return f"{os.path.basename(path)}:{line}"
