"""Names and values of the classes: as a dataset declares them, or as its label files hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.allocation import allotted_cpus
from pipeline.artifacts import read_artifact
from pipeline.datasets.label_values import count_values
from pipeline.datasets.workers import sensible_workers
from pipeline.errors import InputError
from pipeline.io.image_file import read_label
from pipeline.log import get_logger
from pipeline.parallel import map_unordered

BACKGROUND = "background"
IGNORE = "ignore"


@dataclass(frozen=True)
class Classes:
    """Class name -> value by rising value, background (0) first; and the value of ignored voxels, if any."""

    labels: dict[str, int]
    ignore_value: int | None = None


def declared_classes(declared: Mapping[str, object], where: Path) -> Classes:
    """Classes as written in a dataset file, `{"0": "background"}` (MSD) or `{"background": 0}` (nnU-Net).

    A class called "ignore" becomes the ignore value. Background is added where 0 has no name.

    Raises:
        InputError: Two names share a value, a value is no whole number, or the classes are overlapping regions.
    """
    pairs = [_name_and_value(key, item, where) for key, item in declared.items()]
    ignore = [value for name, value in pairs if name.lower() == IGNORE]
    classes = sorted((value, name) for name, value in pairs if name.lower() != IGNORE)
    if not classes or classes[0][0] != 0:
        classes.insert(0, (0, BACKGROUND))
    _check_distinct([name for _, name in classes], "names", where)
    _check_distinct([value for value, _ in classes] + ignore, "values", where)
    if len(classes) < 2:
        raise InputError("`labels` declares no class beside the background", where=where)
    return Classes({name: value for value, name in classes}, ignore[0] if ignore else None)


def _name_and_value(key: str, item: object, where: Path) -> tuple[str, int]:
    if isinstance(item, list):
        raise InputError(
            f"labels.{key}: overlapping regions (a list of values) are not supported yet",
            where=where,
            fix="Give every class one value of its own",
        )
    name, value = (item, key) if isinstance(item, str) and _whole_number(key) is not None else (key, item)
    number = _whole_number(value)
    if number is None or number < 0 or not name.strip():
        raise InputError(
            f"labels.{key}: a name and a whole number from 0 are needed, got {item!r}",
            where=where,
            fix='Write "name": value, or "value": "name"',
        )
    return name.strip(), number


def _whole_number(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def _check_distinct(items: Sequence[object], what: str, where: Path) -> None:
    twice = sorted({str(item) for item in items if items.count(item) > 1})
    if twice:
        raise InputError(f"`labels` gives the same {what} twice: {', '.join(twice)}", where=where)


def classes_beside(candidates: Sequence[Path], label_files: Sequence[Path], where: Path) -> Classes:
    """Classes from the first of `candidates` (JSON files) that exists, else discovered in the label files."""
    for path in candidates:
        if path.is_file():
            plain = read_artifact(path, dict[str, object])
            nested = plain.get("labels", plain)
            if not isinstance(nested, dict):
                raise InputError("`labels` is no mapping of names to values", where=path)
            return declared_classes(nested, path)
    return discovered_classes(label_files, where)


def discovered_classes(label_files: Sequence[Path], where: Path) -> Classes:
    """Classes `class_<value>` for every value found in the label files; files that cannot be read add none.

    Args:
        label_files: All of them are read.
        where: The dataset, for messages.

    Raises:
        InputError: No file holds a value above 0.
    """
    files = [path for path in sorted(set(label_files)) if path.is_file()]
    states = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    found = _values_of_all(states, where)
    if not any(value > 0 for value in found):
        raise InputError("no label file holds a class", where=where, fix="Declare the classes in a labels.json")
    return Classes({BACKGROUND: 0} | {f"class_{value}": value for value in found if value > 0})


@cache
def _values_of_all(states: tuple[tuple[Path, int, int], ...], where: Path) -> tuple[int, ...]:
    """All values of label files, each given with its size and time: a chain of commands reads them once."""
    files = [path for path, _, _ in states]
    outcomes = map_unordered(_values_in, files, num_workers=sensible_workers(files, allotted_cpus()))
    found = sorted(set().union(*(outcome.result or () for outcome in outcomes)))
    get_logger().info(
        "%s declares no classes; %d label files hold the values %s", where, len(files), ", ".join(map(str, found))
    )
    return tuple(found)


def _values_in(path: Path) -> tuple[int, ...]:
    return tuple(count_values(read_label(path).array))
