"""Draws how data moves through the kernels: ``python docs/kernel_drawing.py``.

Beside this file: traffic.svg, forward.svg, backward.svg, cpu.svg.
"""

from __future__ import annotations

from pathlib import Path

from svg import Drawing

MEMORY, CHIP, SMALL, WORK = "#dde8f7", "#cfe8d5", "#f7dfc0", "#f3c98b"

#: Bytes of memory traffic in units of N, the size of x: (forward, backward), of plain
#: squeeze-and-excitation in training; and the launches of both where they are a fixed number.
TRAFFIC = (
    ("eager PyTorch", 3, 9, "6 to 8 launches forward"),
    ("torch.compile", 3, 4, "5 or more forward, 8 or more backward"),
    ("fused, x read twice", 3, 4, "2 forward, 3 backward"),
    ("fused, image on chip", 2, 3, "1 forward, 2 backward"),
)


def traffic() -> Drawing:
    d = Drawing(760, 270)
    d.title(380, 28, "Bytes moved, in units of N (the size of x)")
    left, unit = 190, 34
    for i, (name, forward, backward, launches) in enumerate(TRAFFIC):
        y = 50 + 48 * i
        d.text(left - 12, y + 22, name, "end")
        d.box(left, y, unit * forward, 32, WORK, f"{forward}N")
        d.box(left + unit * forward, y, unit * backward, 32, MEMORY, f"{backward}N")
        end = left + unit * (forward + backward)
        d.text(end + 10, y + 21, launches, "start", "font-size='11'")
    d.box(left, 245, 14, 14, WORK)
    d.text(left + 20, 257, "forward", "start")
    d.box(left + 100, 245, 14, 14, MEMORY)
    d.text(left + 120, 257, "backward", "start")
    return d


_EXCHANGE_AFTER = 2  # which step of a block


def _shared_image(
    title: str, memory: str, reads: str, steps: tuple[tuple[str, str], ...], conclusion: str
) -> Drawing:
    """Columns are the blocks that share an image, rows what each does, in time downwards."""
    d = Drawing(760, 585)
    d.title(380, 28, title)
    d.box(150, 48, 568, 40, MEMORY, memory)
    d.text(70, 145, reads)
    d.text(70, 506, "writes N")
    left, w, gap, top, h = 150, 130, 16, 118, 46
    gaps = [58 if i == _EXCHANGE_AFTER else 18 for i in range(len(steps))]
    tops = [top + i * h + sum(gaps[:i]) for i in range(len(steps))]
    for b in range(4):
        x = left + b * (w + gap)
        d.text(x + w / 2, 112, f"block {b}")
        for i, (fill, words) in enumerate(steps):
            d.box(x, tops[i], w, h, fill, *words.split("\n"))
            if i + 1 < len(steps):
                d.arrow((x + w / 2, tops[i] + h), (x + w / 2, tops[i + 1]))
    exchange = "exchange: R partial sums per block, added in the order of blocks"
    d.box(left, tops[_EXCHANGE_AFTER] + h + 12, 4 * w + 3 * gap, 30, SMALL, exchange)
    d.text(434, 560, conclusion)
    return d


def forward() -> Drawing:
    return _shared_image(
        "Forward, one image shared by channels",
        "x of one image in memory: a slice of channels for each block",
        "reads N",
        (
            (CHIP, "load a slice\nand keep it on chip"),
            (WORK, "means of channels:\nz of the slice"),
            (WORK, "W1 z: a part of\nall R hidden sums"),
            (WORK, "h, then W2's rows:\ngates of the slice"),
            (WORK, "x from chip times g\n(+ residual, after)"),
            (MEMORY, "y of the slice"),
        ),
        "Nothing but R numbers per block passes between them; x is read once.",
    )


def backward() -> Drawing:
    return _shared_image(
        "Backward, one image shared by channels",
        "dy and x of one image in memory",
        "reads 2N",
        (
            (CHIP, "load dy and keep it;\nx passes by"),
            (WORK, "ds = sum of dy x\ndu of the slice"),
            (WORK, "W2's rows: a part of\nall R sums dh"),
            (WORK, "dh, then W1's\ncolumns: dz"),
            (WORK, "dx = dy scale + dz/S\nfrom dy on chip"),
            (MEMORY, "dx of the slice"),
        ),
        "dx needs dy but not x: x is read once, and dy is still on chip.",
    )


def cpu() -> Drawing:
    d = Drawing(760, 300)
    d.title(380, 28, "A CPU thread takes an image at a time")
    rows = (("images of thread 0", 0), ("images of thread 1", 1))
    for name, row in rows:
        y = 60 + 110 * row
        d.text(140, y + 28, name, "end")
        for i in range(2):
            x = 155 + 300 * i
            d.box(x, y, 92, 46, CHIP, "read x: sums", f"image {2 * row + i}")
            d.box(x + 98, y, 60, 46, SMALL, "MLP")
            d.box(x + 164, y, 118, 46, WORK, "read x again from", "cache, write y")
            if not i:
                d.arrow((x + 282, y + 23), (x + 300, y + 23))
        d.text(155, y + 66, "the second reading begins where the first ended: what is read last "
               "is still in cache", "start", "font-size='11'")  # fmt: skip
    d.text(380, 275, "A group of up to four images shares one reading of the weights.")
    return d


def main() -> None:
    """Write the drawings beside this file."""
    for draw in (traffic, forward, backward, cpu):
        draw().save(Path(__file__).with_name(f"{draw.__name__}.svg"))


if __name__ == "__main__":
    main()
