"""What was done to the SE blocks of a model, for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from .api import explain
from .dispatch import BackendUnavailableError


class Entry(NamedTuple):
    """One line of a report: a module by its name in the model, and what became of it."""

    name: str
    kind: str
    note: str  # what it computes, or why it was refused
    is_around: bool = False  # a module around an SE block, whose steps join it or do not


class Placed(NamedTuple):
    """Where an SE block's layers are: what the choice of its backend depends on."""

    device: torch.device
    dtype: torch.dtype
    channels: int
    backend: str | None  # asked for by name


def listing(sections: Iterable[tuple[str, tuple[Entry, ...]]], *, each: bool = False) -> list[str]:
    """Titled entries as lines in columns.

    Args:
        each: a line for each entry, with its name; otherwise equal entries share one.
    """
    rows = []
    for title, entries in sections:
        if each:
            rows += [(title, e.name or "(the model)", e.kind, e.note) for e in entries]
        else:
            rows += [(title, *row) for row in _collapsed(entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:3]
    return [
        "  ".join([*(c.ljust(w) for c, w in zip(cells, widths, strict=True)), note])
        for *cells, note in rows
    ]


def _collapsed(entries: tuple[Entry, ...]) -> Iterator[tuple[str, str, str]]:
    names: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        names.setdefault((entry.kind, entry.note), []).append(entry.name or "(the model)")
    for (kind, note), found in names.items():
        yield found[0] if len(found) == 1 else f"{len(found)} x", kind, note


class FusionReport(NamedTuple):
    """What :func:`fuse_se_blocks` did. Print it to read it; ``details()`` names every module."""

    replaced: tuple[Entry, ...]
    refused: tuple[Entry, ...]
    placed: tuple[Placed, ...] = ()

    def __str__(self) -> str:
        return self._text(each=False)

    def details(self) -> str:
        """The report with a line for each module, where ``str`` collapses equal ones."""
        return self._text(each=True)

    def _text(self, *, each: bool) -> str:
        fused, around = _split(self.replaced)
        not_fused, not_around = _split(self.refused)
        sections = [
            ("fused", fused), ("joined", around), ("not fused", not_fused),
            ("not joined", not_around),
        ]  # fmt: skip
        lines = [_verdict(*(len(entries) for _, entries in sections))]
        lines += listing(sections, each=each)
        lines += _backends(self.placed)
        return "\n".join(lines)


def _split(entries: tuple[Entry, ...]) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """Entries of SE blocks, and those of the modules around them."""
    return (
        tuple(e for e in entries if not e.is_around),
        tuple(e for e in entries if e.is_around),
    )


def _verdict(fused: int, joined: int, not_fused: int, not_joined: int) -> str:
    every = fused + not_fused
    if not every:
        return "no SE block found"
    text = f"{fused} SE block{'s' if fused != 1 else ''} fused"
    if not_fused:
        text += f", {not_fused} not"
    if joined and not_joined:
        text += f"; steps of {joined} modules around them joined, of {not_joined} not"
    elif joined:
        text += "; the steps around them joined"
    elif not_joined:
        text += "; the steps around them not joined"
    return text


def _backends(placed: tuple[Placed, ...]) -> list[str]:
    """On what the blocks run where they are now, and why on nothing faster."""
    answers: dict[tuple[str, str, tuple[str, ...]], None] = {}
    for place in dict.fromkeys(placed):
        where = f"{place.device}, {str(place.dtype).removeprefix('torch.')}"
        answers[(where, *_answer(place))] = None
    lines = []
    for where, backend, reasons in answers:
        lines.append(f"runs on: {backend} ({where})")
        lines += reasons
    return lines


def _answer(place: Placed) -> tuple[str, tuple[str, ...]]:
    """A backend and, where it is the fallback, lines with the reasons."""
    if place.device.type == "meta":
        return "what is chosen once the model has left", ()
    x = torch.empty(1, place.channels, 2, 2, device=place.device, dtype=place.dtype)
    w = torch.empty(place.channels, 1, device=place.device, dtype=place.dtype)
    try:
        answer = explain(x, w.t(), None, w, None, backend=place.backend)
    except BackendUnavailableError as error:
        return "nothing: calls raise", (str(error),)
    if answer.backend != "fallback":
        return answer.backend, ()
    reasons = tuple(f"not on {name}: {reason}" for name, reason in answer.passed_over)
    return "the modules' own forward", reasons
