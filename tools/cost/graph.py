"""Control flow: natural loops, and how often blocks run where only some of it was counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

#: What a count of zero weighs against any other: of equal instructions on two paths, merged into
#: one, a compiler keeps the line of either.
_ZERO_WEIGHS = 0.25
#: The price of what enters or leaves a block on no edge.
_LEAK_COSTS = 20.0


class Loop(NamedTuple):
    """A natural loop: its head, and its blocks, the head among them."""

    head: int
    blocks: frozenset[int]


def predecessors(successors: Sequence[Sequence[int]]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in successors]
    for block, following in enumerate(successors):
        for successor in following:
            found[successor].append(block)
    return found


def natural_loops(successors: Sequence[Sequence[int]]) -> list[Loop]:
    """The loops of branches back, large ones first; branches to the same head are one loop. Blocks
    are in the order of the code, in which a loop's head comes first."""
    before = predecessors(successors)
    found: dict[int, set[int]] = {}
    for block, following in enumerate(successors):
        for head in following:
            if head > block:
                continue
            members, left = {head, block}, [block]
            while left:
                here = left.pop()
                if here == head:
                    continue
                for previous in before[here]:
                    if previous not in members and previous >= head:
                        members.add(previous)
                        left.append(previous)
            found.setdefault(head, set()).update(members)
    loops = [Loop(head, frozenset(members)) for head, members in found.items()]
    return sorted(loops, key=lambda loop: (-len(loop.blocks), loop.head))


def frequencies(
    successors: Sequence[Sequence[int]], evidence: Sequence[dict[int, int]]
) -> list[float]:
    """How often each block runs: the flow that conserves what enters and leaves blocks, and of
    these the one that differs least from the evidence.

    Args:
        successors: of each block.
        evidence: of each block, how many of its instructions say that it runs how often.

    A block that nothing leads to may begin with any flow (a function), and one that leads nowhere
    may end with any.

    Raises:
        ImportError: without scipy, whose linear programs are used.
    """
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    largest = max((count for row in evidence for count in row), default=0)
    if largest == 0:
        return [0.0] * len(successors)
    before = predecessors(successors)
    costs: list[float] = []
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    right: list[float] = []

    def variable(cost: float = 0.0) -> int:
        costs.append(cost)
        return len(costs) - 1

    def equation(terms: list[tuple[int, float]], value: float) -> None:
        for column, factor in terms:
            rows.append(len(right))
            columns.append(column)
            values.append(factor)
        right.append(value)

    flow = [variable() for _ in successors]
    entering: list[list[tuple[int, float]]] = [[] for _ in successors]
    leaving: list[list[tuple[int, float]]] = [[] for _ in successors]
    for block, following in enumerate(successors):
        for successor in dict.fromkeys(following):
            edge = variable()
            leaving[block].append((edge, 1.0))
            entering[successor].append((edge, 1.0))
    for block, row in enumerate(evidence):
        begins = variable(_LEAK_COSTS if before[block] else 0.0)
        ends = variable(_LEAK_COSTS if successors[block] else 0.0)
        equation([(flow[block], -1.0), (begins, 1.0), *entering[block]], 0.0)
        equation([(flow[block], -1.0), (ends, 1.0), *leaving[block]], 0.0)
        for count, instructions in row.items():
            weight = instructions * (1.0 if count else _ZERO_WEIGHS)
            less, more = variable(weight), variable(weight)
            equation([(flow[block], 1.0), (less, 1.0), (more, -1.0)], count / largest)
    matrix = coo_matrix((values, (rows, columns)), shape=(len(right), len(costs))).tocsc()
    solved = linprog(costs, A_eq=matrix, b_eq=right, method="highs")
    assert solved.status == 0, solved.message  # every evidence has a solution
    return [float(solved.x[variable]) * largest for variable in flow]
