"""The file of an RT structure set: who is in it, what it was drawn on, and the contours' data, undecoded.

pydicom parses the file; its messages and warnings quote values, which may be the patient's, so none of them gets out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.io.dicom.quiet import errors_named

RT_STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
CONTOUR_DATA = 0x30060050
UNDEFINED_LENGTH = 0xFFFFFFFF
EXPORT_AGAIN = "Export the structure set again"


@dataclass(frozen=True)
class Roi:
    """A structure as in the file.

    Attributes:
        name, number: As the file tells them.
        place: File and structure, for messages.
        contours: Geometric type and undecoded data of each contour: numbers x, y, z in LPS+ mm, backslashes between.
    """

    name: str
    number: int
    place: str
    contours: tuple[tuple[str, bytes], ...]


def read_rois(path: Path, wanted: Callable[[str], bool]) -> list[Roi]:
    """Read the wanted structures that have an entry for contours, in the order of the file's names.

    Raises:
        InputError: No file, not DICOM, no RT structure set, truncated, structures without a name or number of their
            own or in several frames of reference, contours that belong to no structure or are there twice, or a
            contour without a type.
    """
    with errors_named(path, "is truncated or malformed", fix="Copy or export it again"):
        dataset = _read(path)
        names = _names(dataset, path)
        _check_one_space(dataset, path)
    chosen = [number for number, name in names.items() if wanted(name)]
    with errors_named(path, "is truncated or malformed", fix="Copy or export it again"):
        contours = _contours_by_number(dataset, names, path)
        return [_roi(number, names[number], contours.get(number), path) for number in chosen]


def _read(path: Path) -> Any:
    """The dataset, checked to be an RT structure set and, where it is read to its end, to be whole."""
    from pydicom.errors import InvalidDicomError
    from pydicom.filereader import read_partial

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise InputError(what, where=path.name, fix="Give the file of an RT structure set")
    try:
        with path.open("rb") as stream:
            dataset = read_partial(stream)
    except InvalidDicomError:
        raise InputError("is not DICOM", where=path.name, fix="Give the file of an RT structure set") from None
    if not len(dataset) or any(_is_cut(dataset.get_item(tag)) for tag in dataset.keys()):  # noqa: SIM118
        raise InputError("is truncated", where=path.name, fix="Copy or export it again")
    if str(dataset.get("SOPClassUID", "")) != RT_STRUCTURE_SET:
        raise InputError("is DICOM, but no RT structure set", where=path.name, fix="Give the file with the structures")
    return dataset


def _is_cut(element: Any) -> bool:
    """Whether the file ended within the element. Elements of undefined length are parsed at once, and found out so."""
    length = getattr(element, "length", UNDEFINED_LENGTH)
    return length not in (0, UNDEFINED_LENGTH) and len(element.value or b"") < length


def _names(dataset: Any, path: Path) -> dict[int, str]:
    """Name by number of all structures."""
    names: dict[int, str] = {}
    for item in _sequence(dataset, "StructureSetROISequence", path):
        number, name = int(item.ROINumber), _text(item.get("ROIName"))
        if not name:
            raise InputError(f"structure number {number} has no name", where=path.name, fix="Name it, and export again")
        if number in names:
            text = f"{names[number]!r} and {name!r} are both structure number {number}"
            raise InputError(text, where=path.name, fix=EXPORT_AGAIN)
        names[number] = name
    return names


def _text(value: Any) -> str:
    """A backslash, which splits values, is part of the name."""
    from pydicom.multival import MultiValue

    return ("\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value or "")).strip()


def _sequence(dataset: Any, keyword: str, path: Path) -> Sequence[Any]:
    items: Sequence[Any] | None = dataset.get(keyword)
    if not items:
        raise InputError(f"holds no {keyword}, so no structures", where=path.name, fix=EXPORT_AGAIN)
    return items


def _check_one_space(dataset: Any, path: Path) -> None:
    """Refuse structures that lie in several frames of reference."""
    spaces = {str(item.get("ReferencedFrameOfReferenceUID") or "") for item in dataset.StructureSetROISequence} - {""}
    if len(spaces) > 1:
        text = f"its structures lie in {len(spaces)} frames of reference"
        raise InputError(text, where=path.name, fix="Export one structure set per image series")


def _contours_by_number(dataset: Any, names: dict[int, str], path: Path) -> dict[int, Any]:
    """The item with the contours of each structure, by its number."""
    items: dict[int, Any] = {}
    for item in _sequence(dataset, "ROIContourSequence", path):
        number = int(item.ReferencedROINumber)
        if number not in names:
            text = f"contours of structure number {number}, which has no name"
            raise InputError(text, where=path.name, fix=EXPORT_AGAIN)
        if number in items:
            raise InputError(f"two sets of contours of {names[number]!r}", where=path.name, fix=EXPORT_AGAIN)
        items[number] = item
    return items


def _roi(number: int, name: str, item: Any, path: Path) -> Roi:
    place = f"{path.name}, structure {name!r}"
    contours = []
    for contour in (item.get("ContourSequence") or ()) if item is not None else ():
        kind = _text(contour.get("ContourGeometricType"))
        if not kind:
            raise InputError("a contour without a geometric type", where=place, fix=EXPORT_AGAIN)
        contours.append((kind, _data(contour, place)))
    return Roi(name, number, place, tuple(contours))


def _data(contour: Any, place: str) -> bytes:
    """Undecoded: to make an object of each number, as pydicom would, takes most of the time of a large file."""
    element = contour.get_item(CONTOUR_DATA)
    if element is None:
        return b""
    if _is_cut(element):
        raise InputError("contour data that end too soon", where=place, fix=EXPORT_AGAIN)
    return element.value or b""
