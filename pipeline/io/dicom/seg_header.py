"""What a DICOM segmentation says of itself: its segments, and where each of its frames lies.

Whatever is missing or out of shape becomes one `InputError`; pydicom's own texts hold values of the header and are
never passed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.io.dicom.frames import Vector
from pipeline.io.dicom.quiet import errors_named
from pipeline.io.dicom.seg_placement import Plane

SEGMENTATION_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
SEGMENTATION_TYPES = ("BINARY", "FRACTIONAL", "LABELMAP")
_BACKGROUND_CODE = ("125040", "DCM")


def seg_errors_named(path: Path) -> AbstractContextManager[None]:
    """`errors_named` for reading a segmentation."""
    return errors_named(path, "is damaged, or no DICOM segmentation by the standard", fix="Export it again")


@dataclass(frozen=True)
class Segment:
    """A described segment: its number in the file, its label, and whether it is what is no structure."""

    number: int
    name: str
    is_background: bool


@dataclass(frozen=True)
class SegmentFrame:
    """A frame of the file: its index from 0, its segment (None in a label map, which holds all), and its place."""

    index: int
    segment: int | None
    plane: Plane


def read_dataset(path: Path, *, with_pixels: bool) -> Any:
    """The data set of a file, checked to be a segmentation; within `seg_errors_named`."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    try:
        dataset = dcmread(path, stop_before_pixels=not with_pixels)
    except InvalidDicomError:
        raise InputError("is not a DICOM file", fix="Give a DICOM segmentation") from None
    if dataset.get("SOPClassUID") not in SEGMENTATION_CLASSES:
        raise InputError("is not a DICOM segmentation", fix="Give a file of modality SEG")
    return dataset


def segmentation_type(dataset: Any) -> str:
    """BINARY, FRACTIONAL or LABELMAP."""
    kind = str(_value(dataset, "SegmentationType"))
    if kind not in SEGMENTATION_TYPES:
        raise InputError("has a SegmentationType that is none of BINARY, FRACTIONAL and LABELMAP")
    return kind


def background_value(dataset: Any) -> int:
    """The pixel value of a label map that is no segment."""
    return int(dataset.get("PixelPaddingValue") or 0)


def read_segments(dataset: Any) -> list[Segment]:
    """The described segments, in the file's order."""
    is_map = segmentation_type(dataset) == "LABELMAP"
    background = background_value(dataset) if is_map else None
    segments = [_segment(item, background) for item in _value(dataset, "SegmentSequence")]
    if len({segment.number for segment in segments}) < len(segments):
        raise InputError("describes two segments with one number")
    return segments


def _segment(item: Any, background: int | None) -> Segment:
    number = int(_value(item, "SegmentNumber"))
    kind = (item.get("SegmentedPropertyTypeCodeSequence") or [{}])[0]
    code = (kind.get("CodeValue"), kind.get("CodingSchemeDesignator"))
    name = item.get("SegmentLabel") or kind.get("CodeMeaning") or f"segment {number}"
    return Segment(number, str(name), code == _BACKGROUND_CODE or number == background)


def read_frames(dataset: Any) -> list[SegmentFrame]:
    """All frames, in the file's order."""
    shared = _first(dataset, "SharedFunctionalGroupsSequence")
    frames = _value(dataset, "PerFrameFunctionalGroupsSequence")
    if len(frames) != int(_value(dataset, "NumberOfFrames")):
        raise InputError("describes another number of frames than it has")
    is_map = segmentation_type(dataset) == "LABELMAP"
    size = (int(_value(dataset, "Rows")), int(_value(dataset, "Columns")))
    return [
        SegmentFrame(index, None if is_map else _segment_number(own, shared), _plane(own, shared, size))
        for index, own in enumerate(frames)
    ]


def slice_spacing(dataset: Any) -> float:
    """SpacingBetweenSlices of what all frames share, in mm; 0 where it is not said."""
    measures = (_first(dataset, "SharedFunctionalGroupsSequence").get("PixelMeasuresSequence") or [{}])[0]
    return float(measures.get("SpacingBetweenSlices") or 0)


def _plane(own: Any, shared: Any, size: tuple[int, int]) -> Plane:
    position = _numbers(_group(own, shared, "PlanePositionSequence"), "ImagePositionPatient", 3)
    cosines = _numbers(_group(own, shared, "PlaneOrientationSequence"), "ImageOrientationPatient", 6)
    between_rows, between_columns = _numbers(_group(own, shared, "PixelMeasuresSequence"), "PixelSpacing", 2)
    return Plane(_vector(position), _vector(cosines[:3]), _vector(cosines[3:]), between_rows, between_columns, *size)


def _group(own: Any, shared: Any, keyword: str) -> Any:
    """The item of a functional group, which stands with the frame or with what all frames share."""
    return _first(own if keyword in own else shared, keyword)


def _segment_number(own: Any, shared: Any) -> int:
    return int(_value(_group(own, shared, "SegmentIdentificationSequence"), "ReferencedSegmentNumber"))


def _value(dataset: Any, keyword: str) -> Any:
    value = dataset.get(keyword)
    if value is None or value == "" or (isinstance(value, Sequence) and not len(value)):
        raise InputError(f"lacks {keyword}")
    return value


def _first(dataset: Any, keyword: str) -> Any:
    return _value(dataset, keyword)[0]


def _numbers(dataset: Any, keyword: str, count: int) -> tuple[float, ...]:
    values = tuple(float(number) for number in _value(dataset, keyword))
    if len(values) != count:
        raise InputError(f"has {len(values)} numbers in {keyword}, {count} are needed")
    return values


def _vector(values: tuple[float, ...]) -> Vector:
    x, y, z = values
    return x, y, z
