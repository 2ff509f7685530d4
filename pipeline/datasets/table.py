"""A table of cases: CSV or TSV with the columns case_id, image (or image_<channel> for each), label, patient, split."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from pipeline.datasets.case import Case, Dataset
from pipeline.datasets.class_names import classes_beside
from pipeline.datasets.listing import check_cases, check_names, counted_channels
from pipeline.errors import InputError, name_some

Row = dict[str, str]
IMAGE = "image"
CHANNEL_PREFIX = "image_"
TRAINING_WORDS = ("", "train", "training")
TEST_WORDS = ("test", "testing")


def read_table(path: Path) -> Dataset:
    """Read a table of cases; paths are relative to its folder, and columns that are not ours are left alone.

    `split` is "train" or "test". Classes come from `<name>.labels.json` or `labels.json` beside the table, else from
    the label files.

    Raises:
        InputError: A column or an id is missing, an id is used twice, or `split` has another value.
    """
    rows = _read_rows(path)
    image_columns = _image_columns(list(rows[0]), path, needed=("case_id", "label"))
    _check_rows(rows, path)
    cases = check_cases(_cases(rows, image_columns, path, TRAINING_WORDS), path)
    if not cases:
        raise InputError("lists no training case", where=path)
    candidates = [path.with_name(f"{path.stem}.labels.json"), path.with_name("labels.json")]
    classes = classes_beside(candidates, [case.label for case in cases if case.label], path)
    named = tuple(column[len(CHANNEL_PREFIX) :] for column in image_columns if column != IMAGE)
    return Dataset(
        name=path.stem,
        root=path.parent,
        channel_names=named or counted_channels(cases),
        labels=classes.labels,
        ignore_value=classes.ignore_value,
        cases=cases,
        test_cases=check_cases(_cases(rows, image_columns, path, TEST_WORDS), path),
    )


def read_case_list(path: Path) -> tuple[Case, ...]:
    """All cases of a table, for prediction: no label column is needed, and no class is looked for.

    Raises:
        InputError: As in `read_table`.
    """
    rows = _read_rows(path)
    image_columns = _image_columns(list(rows[0]), path, needed=("case_id",))
    _check_rows(rows, path)
    return check_cases(_cases(rows, image_columns, path, (*TRAINING_WORDS, *TEST_WORDS)), path)


def _read_rows(path: Path) -> list[Row]:
    """Rows with stripped cells; the delimiter is the one the header has most of (spreadsheets also write `;`)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({error})", where=path, fix="Save it as CSV in UTF-8") from error
    first_line = next((line for line in text.splitlines() if line.strip(" ,;\t")), "")
    delimiter = max(",;\t", key=first_line.count)
    rows = [row for row in csv.reader(StringIO(text, newline=""), delimiter=delimiter) if "".join(row).strip()]
    if len(rows) < 2:
        raise InputError("holds no case", where=path, fix="A header and at least one row are needed")
    header = [_column_name(cell.strip()) for cell in rows[0]]
    if len(set(header)) != len(header):
        raise InputError("has two columns of one name", where=path)
    long = [row for row in rows[1:] if len(row) > len(header)]
    if long:
        text = f"the row of {long[0][0]!r} has {len(long[0])} cells, the header {len(header)}"
        raise InputError(text, where=path, fix="Put cells that hold the delimiter into quotes")
    padded = [[cell.strip() for cell in row] + [""] * (len(header) - len(row)) for row in rows[1:]]
    return [dict(zip(header, row, strict=True)) for row in padded]


def _column_name(cell: str) -> str:
    """Our own names in any case of letters; a channel's name as it is written."""
    is_channel = cell.lower().startswith(CHANNEL_PREFIX)
    return CHANNEL_PREFIX + cell[len(CHANNEL_PREFIX) :] if is_channel else cell.lower()


def _image_columns(header: Sequence[str], path: Path, *, needed: Sequence[str]) -> list[str]:
    columns = [name for name in header if name == IMAGE or name.startswith(CHANNEL_PREFIX)]
    missing = [name for name in needed if name not in header]
    if not columns:
        missing.append("image or image_<channel>")
    if missing:
        raise InputError(
            f"columns are missing: {', '.join(missing)} (found {', '.join(header)})",
            where=path,
            fix="The header needs case_id, image (or image_<channel> for each channel) and label",
        )
    if IMAGE in columns and len(columns) > 1:
        raise InputError("has both `image` and `image_<channel>` columns", where=path, fix="Keep one kind")
    return columns


def _check_rows(rows: Sequence[Row], path: Path) -> None:
    nameless = ["; ".join(row.values()) for row in rows if not row["case_id"]]
    if nameless:
        raise InputError(f"case_id is empty in the row(s): {name_some(nameless)}", where=path)
    odd = [row for row in rows if row.get("split", "").lower() not in (*TRAINING_WORDS, *TEST_WORDS)]
    if odd:
        raise InputError(
            f"case {odd[0]['case_id']}: split is {odd[0]['split']!r}",
            where=path,
            fix="Write train or test; the folds for validation are made by voxfit",
        )


def _cases(rows: Sequence[Row], image_columns: Sequence[str], path: Path, words: Sequence[str]) -> list[Case]:
    chosen = [row for row in rows if row.get("split", "").lower() in words]
    return [
        Case(
            case_id=row["case_id"],
            images=_image_files(row, image_columns, path),
            label=path.parent / row["label"] if row.get("label") else None,
            patient=row.get("patient", ""),
        )
        for row in chosen
    ]


def _image_files(row: Row, columns: Sequence[str], path: Path) -> tuple[Path, ...]:
    """One file per channel; a cell left empty beside others leaves the case a channel short, which integrity names."""
    names = [row[column] for column in columns if row[column]]
    check_names([*names, *([row["label"]] if row.get("label") else [])], path)
    return tuple(path.parent / name for name in names)
