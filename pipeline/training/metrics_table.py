"""`metrics.csv`: one row an epoch."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.artifacts import write_text
from pipeline.run_record import Counts

COUNT_COLUMNS = ("epoch", "iteration", "optimizer_step")
COLUMNS = (
    *COUNT_COLUMNS,
    *("seconds", "data_wait_share", "peak_vram_bytes", "peak_ram_bytes", "lr", "train_loss", "val_dice_mean"),
)
VALIDATION_SECONDS = "validation_seconds"
NOISE_SCALE = "noise_scale"
Row = dict[str, int | float | None]


class MetricsTable:
    """`metrics.csv`: rewritten whole and atomically, so that it is never torn; what is unknown stays empty.

    Columns: counts of finished epochs, iterations and optimiser steps; seconds of training (validation apart) and the
    share of them spent waiting for data; peak memory of GPU and processes; learning rate of the last step; mean
    training loss; Dice of the validation, mean and by class; seconds of the validation; gradient noise scale in
    patches, once it is known.

    Args:
        path: The file.
        class_names: Foreground classes.
        keep_epochs: Rows of later epochs are dropped: a resumed run does these epochs again.
        is_written: Whether this process writes the file, or only keeps the rows.
    """

    def __init__(
        self, path: Path, *, class_names: Sequence[str], keep_epochs: int = 0, is_written: bool = True
    ) -> None:
        self.path, self.is_written = path, is_written
        self.class_names = tuple(class_names)
        self.columns = (*COLUMNS, *(f"val_dice_{name}" for name in class_names), VALIDATION_SECONDS, NOISE_SCALE)
        self.rows = [row for row in read_rows(path) if (row["epoch"] or 0) <= keep_epochs] if keep_epochs else []

    def append(self, row: Mapping[str, int | float | None]) -> None:
        """Add a row and write the file."""
        self.rows.append(dict(row))
        if not self.is_written:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        for each in self.rows:
            writer.writerow({key: "" if value is None else value for key, value in each.items()})
        write_text(self.path, text.getvalue())

    def total(self, column: str) -> float:
        """The sum of a column over all epochs."""
        return float(sum(row.get(column) or 0 for row in self.rows))


def finished_epochs(path: Path) -> Counts:
    """Counts of the last row of a table; none without one."""
    rows = read_rows(path)
    return Counts(**{name: int(rows[-1][name] or 0) for name in COUNT_COLUMNS}) if rows else Counts()


def read_rows(path: Path) -> list[Row]:
    """The rows of a table, numbers as numbers and what is unknown as None; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(stream)]


def _number(text: str) -> int | float | None:
    if not text:
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)
