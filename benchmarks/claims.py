"""Tables of docs/senet.md from the record that docs/senet_claims.py keeps, in English and Chinese.

The record has a run for each command: its figures under ``rows``, and when, where and of which
commit they were taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Run = dict[str, Any]
Lines = list[list[str]]

#: Forms of the network, by the names they have in ``docs/senet_claims.py``.
FORMS = {
    "plain": ("`resnet20`, no SE", "`resnet20`，无 SE"),
    "two": ("two layers", "两层"),
    "single": ("one layer", "单层"),
    "tied": ("tied", "共享"),
    "weighted": ("two layers, alpha and beta", "两层，alpha 与 beta"),
    "article": ("tied, alpha and beta (the article's)", "共享，alpha 与 beta（文章）"),
    "literal": ("literal: alpha x + beta", "字面公式 alpha x + beta"),
    "plain8": ("`resnet8`, no SE", "`resnet8`，无 SE"),
    "two8": ("`se_resnet8`, two layers", "`se_resnet8`，两层"),
}
_HEADS = {
    "size": (
        ["network", "GMAC paper", "GMAC here", "with SE, paper", "with SE, here", "M parameters",
         "with SE"],
        ["网络", "GMAC，论文", "GMAC，本库", "加 SE，论文", "加 SE，本库", "百万参数", "加 SE"],
    ),
    "memory": (
        ["network", "kept for backward, MB an image", "parameters, MB"],
        ["网络", "为反向保留，每张图像 MB", "参数 MB"],
    ),
    "step-time": (
        ["network", "training step", "inference"], ["网络", "训练一步", "推理"],
    ),
    "accuracy": (
        ["form", "test", "train minus test", "train loss", "test loss", "parameters"],
        ["形式", "测试", "训练减测试", "训练损失", "测试损失", "参数"],
    ),
}  # fmt: skip
_BACKENDS = {
    "reference": (", not fused", "，未融合"), "native": (", fused", "，融合后"),
}  # fmt: skip


def spread(values: list[float], chinese: bool) -> str:
    """Median, lowest and highest."""
    middle, low, high = values
    return f"{middle:.2f} ({low:.2f} {'至' if chinese else 'to'} {high:.2f})"


def _network(name: str, backend: str, chinese: bool) -> str:
    fused = _BACKENDS[backend][chinese] if name.startswith("se_") else ""
    return f"`{name}`{fused}"


def _size(run: Run, chinese: bool) -> Lines:
    def cell(value: float | None, places: int) -> str:
        return "" if value is None else f"{value:.{places}f}"

    places = (2, 3, 2, 3, 2, 2)
    lines = [_HEADS["size"][chinese]]
    for name, *values in run["rows"]:
        lines.append([name, *(cell(v, n) for v, n in zip(values, places, strict=True))])
    return lines


def _forms(run: Run, chinese: bool) -> Lines:
    parameters = "百万参数" if chinese else "M parameters"
    lines = [["`se_resnet50`", parameters, "GMAC"]]
    for form, millions, gmac in run["forms"]:
        lines.append([f'`excitation="{form}"`', f"{millions:.2f}", f"{gmac:.4f}"])
    return lines


def _memory(run: Run, chinese: bool) -> Lines:
    rows = [[_network(name, backend, chinese), f"{kept:.1f}", f"{parameters:.1f}"]
            for name, backend, kept, parameters in run["rows"]]  # fmt: skip
    return [_HEADS["memory"][chinese], *rows]


def _step_time(run: Run, chinese: bool) -> Lines:
    rows = [[_network(name, backend, chinese), f"{step:.0f} ms", f"{inference:.0f} ms"]
            for name, backend, step, inference in run["rows"]]  # fmt: skip
    return [_HEADS["step-time"][chinese], *rows]


def _accuracy(run: Run, chinese: bool) -> Lines:
    lines = [_HEADS["accuracy"][chinese]]
    for form, test, gap, train_loss, test_loss, parameters in run["rows"]:
        spreads = [spread(values, chinese) for values in (test, gap)]
        losses = [f"{loss:.4f}" for loss in (train_loss, test_loss)]
        lines.append([FORMS[form][chinese], *spreads, *losses, f"{parameters:,}"])
    return lines


def _scale(run: Run, chinese: bool) -> Lines:
    lines = [[_HEADS["accuracy"][chinese][0], *run["columns"]]]
    for form, *columns in run["rows"]:
        lines.append([FORMS[form][chinese], *(spread(values, chinese) for values in columns)])
    return lines


#: Of a block: the run, and its table; ``gate`` is what its command prints.
TABLES: dict[str, tuple[str, Callable[[Run, bool], Lines] | None]] = {
    "claims-size": ("size", _size),
    "claims-forms": ("size", _forms),
    "claims-memory": ("memory", _memory),
    "claims-step-time": ("step-time", _step_time),
    "claims-accuracy": ("accuracy", _accuracy),
    "claims-accuracy-few": ("accuracy-few", _accuracy),
    "claims-scale": ("scale", _scale),
    "claims-gate": ("gate", None),
}


def _stamp(run: Run, chinese: bool) -> str:
    """By which command, when, where."""
    known = [run["date"], run["machine"], run["commit"] and f"commit {run['commit']}"]
    words = [word for word in known if word]
    if note := run["note"][chinese]:
        words.append(note)
    separator, stop = ("，", "。") if chinese else (", ", ".")
    return f"`{run['command']}`{separator}{separator.join(words)}{stop}"


def render(
    record: dict[str, Any], table: str, table_of: Callable[[Lines], list[str]], *, chinese: bool
) -> str:
    """A block: ``table_of`` makes Markdown of the lines.

    Raises:
        ValueError: there is no such table.
    """
    if table not in TABLES:
        raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {table!r}")
    name, lines = TABLES[table]
    run = record["runs"][name]
    body = ["```text", *run["rows"], "```"] if lines is None else table_of(lines(run, chinese))
    return "\n".join([_stamp(run, chinese), "", *body])
