"""``python -m tools.support_table FILE.md ...``: renew the support table in Markdown files.

What lies between

    <!-- support:begin LANGUAGE -->
    <!-- support:end -->

is written from the predicates that dispatch asks (``senet_kernels.features``,
``senet_kernels.trust``), in English (``en``) or Chinese (``zh``). ``--check`` changes nothing
and only says whether the tables are what the predicates say (exit code 1 if not).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from benchmarks.readme import renew_files
from senet_kernels import features, trust

BLOCK = re.compile(
    r"(<!-- support:begin (?P<language>\w+) -->\n).*?(<!-- support:end -->)", re.DOTALL
)

#: Rows of the table: what to call them, and the rows of the feature table they sum up (a prefix
#: where it ends in a space). Layouts are no question of a backend: every kernel takes both as they
#: are, and any other strides are copied first (tests/test_layouts.py).
ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("dtypes", ("dtype ",)),
    ("autocast", ("parameters in float32 under autocast",)),
    ("excitations", ("two layers", "single layer (w1=None)", "scale-and-shift (w2 with 2C rows)",
                     "alpha, beta", "lengths")),
    ("around", ("before_affine", "residual", "inplace")),
    ("halves", ("squeeze alone", "channel_scale alone")),
    ("functions", ("before ", "activation ", "after ")),
    ("gates", ("gate ",)),
)  # fmt: skip

WORDS: dict[str, dict[str, str]] = {
    "en": {
        "by default": "by default",
        "last": "where nothing else does: eager PyTorch",
        "once proven": "once proven right and fast on the card; **not yet run on a GPU**",
        "any": "any device",
        "runs": "runs",
        "layouts": "contiguous and channels-last (other strides: copied first)",
        "dtypes": "{}",
        "autocast": "float32 parameters under autocast",
        "excitations": "two layers, single layer, scale-and-shift, `alpha`/`beta`, `lengths`",
        "around": "`before_affine`, `residual`, in place",
        "halves": "`squeeze`, `channel_scale` alone",
        "functions": "`before`, `activation`, `after`: {}",
        "gates": "`gate`: {}",
        "fused": "fused",
        "no": "falls back",
        "but": "fused but for {}",
        "plain": "yes",
    },
    "zh": {
        "by default": "默认",
        "last": "别的都不行时：PyTorch 自身的算子",
        "once proven": "在该显卡上验证为正确且够快之后；**尚未在 GPU 上运行过**",
        "any": "任何设备",
        "runs": "何时运行",
        "layouts": "连续和 channels-last（其他步幅先复制）",
        "dtypes": "{}",
        "autocast": "autocast 下的 float32 参数",
        "excitations": "两层、单层、scale-and-shift、`alpha`/`beta`、`lengths`",
        "around": "`before_affine`、`residual`、原地",
        "halves": "单独的 `squeeze`、`channel_scale`",
        "functions": "`before`、`activation`、`after`：{}",
        "gates": "`gate`：{}",
        "fused": "融合",
        "no": "回退",
        "but": "融合，除了 {}",
        "plain": "支持",
    },
}


def _covered(patterns: Sequence[str]) -> list[str]:
    """Rows of the feature table."""
    return [
        row
        for pattern in patterns
        for row in features.FEATURES
        if row == pattern or (pattern.endswith(" ") and row.startswith(pattern))
    ]


def _names(rows: Sequence[str]) -> str:
    """What is listed in a row's head: dtypes, functions."""
    return ", ".join(dict.fromkeys(row.rpartition(" ")[2] for row in rows))


def _cell(rows: Sequence[str], column: int, words: dict[str, str]) -> str:
    missing = [row for row in rows if features.FEATURES[row][column] != features.FUSED]
    if not missing:
        return words["fused"]
    return words["no"] if len(missing) == len(rows) else words["but"].format(", ".join(missing))


def table(language: str) -> str:
    """The table in Markdown.

    Raises:
        ValueError: no such language.
    """
    if language not in WORDS:
        raise ValueError(f"language: expected one of {', '.join(WORDS)}, got {language!r}")
    words = WORDS[language]
    # Triton on the CPU is its interpreter, for tests.
    columns = [c for c in features.COLUMNS if c != ("triton", "cpu")]
    heads = [f"`{backend}`, {device.upper()}" for backend, device in columns]
    when = [words["once proven" if c in trust.ASKED else "by default"] for c in columns]
    lines = [["", *heads, f"`fallback`, {words['any']}"], [words["runs"], *when, words["last"]]]
    for name, patterns in ROWS:
        rows = _covered(patterns)
        cells = [_cell(rows, features.COLUMNS.index(column), words) for column in columns]
        lines.append([words[name].format(_names(rows)), *cells, words["plain"]])
    lines.insert(3, [words["layouts"], *[words["fused"]] * len(columns), words["plain"]])
    head, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rest])


def renewed(text: str) -> str:
    """A Markdown text with its tables as the predicates give them now.

    Raises:
        ValueError: it has no table, or one in an unknown language.
    """
    new, count = BLOCK.subn(lambda m: f"{m[1]}{table(m['language'])}\n{m[3]}", text)
    if not count:
        raise ValueError("expected a block <!-- support:begin LANGUAGE --> ...")
    return new


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return renew_files(
        "python -m tools.support_table", __doc__, lambda text, _: renewed(text), argv
    )


if __name__ == "__main__":
    sys.exit(main())
