"""What a run leaves behind: metrics as JSONL and CSV, TensorBoard's files, curves, a summary.

The lines of ``metrics.jsonl`` say what they are by ``kind``: ``run`` (once per session), ``step``
and ``epoch``. ``metrics.csv`` has a row per epoch. Both are cut back to the checkpoint when a run
is resumed, so that they read as if it had never been interrupted.
"""

from __future__ import annotations

import csv
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import TrainError

METRICS = "metrics.jsonl"
TABLE = "metrics.csv"
SUMMARY = "summary.json"
CURVES = "curves.png"

Row = dict[str, Any]


def read_rows(folder: Path, steps: int | None = None) -> list[Row]:
    """The lines of a run up to and including step ``steps`` (all); a torn last line is left out."""
    rows: list[Row] = []
    path = folder / METRICS
    if not path.is_file():
        return rows
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if steps is None or row["steps"] <= steps:
            rows.append(row)
    return rows


def make_folder(folder: Path, keep: bool, overwrite: bool) -> None:
    """Make the run's folder, and be sure that files can be written there.

    Raises:
        TrainError: they cannot, or there is a run already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise TrainError(f"--out: {folder} cannot be written to: {error.strerror}") from None
    if keep:
        return
    there = [name for name in (METRICS, "last.pt") if (folder / name).exists()]
    if there and not overwrite:
        raise TrainError(
            f"--out: {folder} has a run already ({there[0]}): --resume goes on with it, "
            "--overwrite replaces it"
        )
    for name in (METRICS, TABLE, SUMMARY, CURVES, "last.pt", "best.pt"):
        (folder / name).unlink(missing_ok=True)


class Record:
    """Writes the files of one run; ``steps``: of the checkpoint that is resumed, else 0."""

    def __init__(self, folder: Path, steps: int, tensorboard: bool) -> None:
        self.folder = folder
        self._rows = read_rows(folder, steps) if steps else []
        self._rewrite()
        self._jsonl = open(folder / METRICS, "a")  # noqa: SIM115 - closed by close
        self._board = _tensorboard(folder, steps) if tensorboard else None

    @property
    def epochs(self) -> list[Row]:
        """The rows of all finished epochs."""
        return [row for row in self._rows if row["kind"] == "epoch"]

    def _rewrite(self) -> None:
        part = self.folder / (METRICS + ".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        os.replace(part, self.folder / METRICS)
        self._write_table()

    def _write_table(self) -> None:
        rows = [{k: v for k, v in row.items() if k != "kind"} for row in self.epochs]
        part = self.folder / (TABLE + ".part")
        with open(part, "w", newline="") as file:
            if rows:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        os.replace(part, self.folder / TABLE)

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
        part = self.folder / (SUMMARY + ".part")
        part.write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(part, self.folder / SUMMARY)

    def close(self) -> None:
        """Close the files."""
        self._jsonl.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path, steps: int) -> Any:
    if not find_spec("tensorboard"):
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=steps + 1 if steps else None)
