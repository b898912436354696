"""Drawings as SVG, by hand: boxes, arrows and words. For the scripts in this folder."""

from __future__ import annotations

from html import escape
from pathlib import Path

_FONT = "font-family='Helvetica, Arial, Noto Sans CJK SC, sans-serif'"


class Drawing:
    """An SVG that grows by boxes, arrows and words."""

    def __init__(self, width: int, height: int) -> None:
        size = f"width='{width}' height='{height}'"
        tip = "<path d='M0 0 L8 4 L0 8 Z' fill='#444'/>"
        self.parts = [
            f"<svg xmlns='http://www.w3.org/2000/svg' {size} {_FONT} font-size='13'>",
            "<defs><marker id='tip' markerWidth='8' markerHeight='8' refX='7' refY='4'",
            f"orient='auto'>{tip}</marker></defs>",
            f"<rect {size} fill='white'/>",
        ]

    def text(self, x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> None:
        self.parts.append(
            f"<text x='{x}' y='{y}' text-anchor='{anchor}' fill='#222' {more}>{escape(words)}"
            "</text>"
        )

    def title(self, x: float, y: float, words: str) -> None:
        self.text(x, y, words, more="font-weight='bold' font-size='15'")

    def box(self, x: float, y: float, w: float, h: float, fill: str, *lines: str) -> None:
        self.parts.append(
            f"<rect x='{x}' y='{y}' width='{w}' height='{h}' rx='5' fill='{fill}' stroke='#666'/>"
        )
        top = y + h / 2 + 4.5 - 8.5 * (len(lines) - 1)
        for i, words in enumerate(lines):
            self.text(x + w / 2, top + 17 * i, words)

    def frame(self, x: float, y: float, w: float, h: float, words: str) -> None:
        self.parts.append(
            f"<rect x='{x}' y='{y}' width='{w}' height='{h}' rx='8' fill='#fff6e6' "
            "stroke='#c77700' stroke-width='2' stroke-dasharray='7 4'/>"
        )
        self.text(x + w / 2, y + h + 20, words, "start", "font-weight='bold'")

    def arrow(self, *points: tuple[float, float]) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f"<polyline points='{path}' fill='none' stroke='#444' stroke-width='1.5' "
            "marker-end='url(#tip)'/>"
        )

    def save(self, path: Path) -> None:
        path.write_text("\n".join([*self.parts, "</svg>", ""]), encoding="utf-8")
