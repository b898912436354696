"""What a run leaves behind: metrics as JSONL and CSV, TensorBoard's files, curves, a summary.

The lines of ``metrics.jsonl`` say what they are by ``kind``: ``run`` (once per session), ``step``
and ``epoch``. ``metrics.csv`` has a row per epoch. Both are cut back to the checkpoint when a run
is resumed, so that they read as if it had never been interrupted.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

from senet_kernels._command_line import make_writable
from senet_kernels._libraries import one_line

from .errors import TrainError

METRICS = "metrics.jsonl"
TABLE = "metrics.csv"
SUMMARY = "summary.json"
CURVES = "curves.png"
SKIPPED = "skipped.txt"
BOARD = "tensorboard"

Row = dict[str, Any]


def read_rows(folder: Path, steps: int | None = None) -> list[Row]:
    """The lines of a run up to and including step ``steps`` (all); a torn last line is left out."""
    rows: list[Row] = []
    path = folder / METRICS
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if steps is None or row["steps"] <= steps:
            rows.append(row)
    return rows


def check_folder(folder: Path, may_replace: bool) -> None:
    """Make the run's folder, and be sure that files can be written there. Nothing is removed.

    Raises:
        TrainError: they cannot, or there is a run already that may not be replaced.
    """
    try:
        make_writable(folder)
    except OSError as error:
        raise TrainError(f"--out: {folder} cannot be written to: {error.strerror}") from None
    there = [name for name in (METRICS, "last.pt") if (folder / name).exists()]
    if there and not may_replace:
        raise TrainError(
            f"--out: {folder} has a run already ({there[0]}): --resume goes on with it, "
            "--overwrite replaces it"
        )


def clear_folder(folder: Path) -> None:
    """Remove the files of a run that is being replaced, or that failed before it had anything."""
    for name in (METRICS, TABLE, SUMMARY, CURVES, SKIPPED, "last.pt", "best.pt"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / BOARD, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all; names that are not UTF-8 are written with escapes."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(part, path)


class Record:
    """Writes the files of one run.

    Args:
        folder: of the run.
        rows: what is known of it up to the checkpoint that is resumed.
        steps: of that checkpoint, else 0.
        tensorboard: whether to write TensorBoard's files; it must import then.
    """

    def __init__(self, folder: Path, rows: list[Row], steps: int, tensorboard: bool) -> None:
        self.folder = folder
        self._rows = rows
        write_text(folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
        self._write_table()
        self._jsonl = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115 - see close
        self._board: Any = None
        #: Why there are no files of TensorBoard though it imports; None where there are.
        self.board_failure: str | None = None
        if tensorboard:
            try:
                self._board = _tensorboard(folder, steps)
            except Exception as error:  # of a library whose files are not needed
                self.board_failure = one_line(error)

    @property
    def rows(self) -> list[Row]:
        """All lines, in their order."""
        return list(self._rows)

    @property
    def epochs(self) -> list[Row]:
        """The rows of all finished epochs."""
        return [row for row in self._rows if row["kind"] == "epoch"]

    def _write_table(self) -> None:
        rows = [{k: v for k, v in row.items() if k != "kind"} for row in self.epochs]
        text = io.StringIO()
        if rows:
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        write_text(self.folder / TABLE, text.getvalue())

    def _add(self, row: Row) -> None:
        self._rows.append(row)
        self._jsonl.write(json.dumps(row) + "\n")
        self._jsonl.flush()

    def run(self, row: Row) -> None:
        """What the session is: versions, options, data."""
        self._add({"kind": "run", **row})

    def step(self, row: Row) -> None:
        """A step's loss and learning rate."""
        self._add({"kind": "step", **row})
        self._to_board(row, "step")

    def epoch(self, row: Row) -> None:
        """An epoch's figures."""
        self._add({"kind": "epoch", **row})
        self._write_table()
        self._to_board(row, "epoch")

    def _to_board(self, row: Row, prefix: str) -> None:
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "steps":
                    self._board.add_scalar(f"{prefix}/{name}", value, row["steps"])

    def summary(self, summary: Row) -> None:
        """The final figures."""
        write_text(self.folder / SUMMARY, json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        """Close the files."""
        self._jsonl.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path, steps: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / BOARD), purge_step=steps + 1 if steps else None)
