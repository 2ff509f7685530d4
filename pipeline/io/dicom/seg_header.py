"""What a DICOM segmentation says of itself: its segments, and where each of its frames lies.

Whatever is missing or out of shape becomes one `InputError`; pydicom's own texts hold values of the header and are
never passed on.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.io.dicom.elements import items, number, numbers, text, whole_number
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
    kind = text(dataset, "SegmentationType")
    if not kind:
        raise InputError("has no SegmentationType")
    if kind not in SEGMENTATION_TYPES:
        raise InputError("has a SegmentationType that is none of BINARY, FRACTIONAL and LABELMAP")
    return kind


def background_value(dataset: Any) -> int:
    """The pixel value of a label map that is no segment."""
    return whole_number(dataset, "PixelPaddingValue", 0)


def read_segments(dataset: Any) -> list[Segment]:
    """The described segments, in the file's order."""
    is_map = segmentation_type(dataset) == "LABELMAP"
    background = background_value(dataset) if is_map else None
    segments = [_segment(item, background) for item in _needed_items(dataset, "SegmentSequence")]
    if len({segment.number for segment in segments}) < len(segments):
        raise InputError("describes two segments with one number")
    return segments


def _segment(item: Any, background: int | None) -> Segment:
    own_number = whole_number(item, "SegmentNumber")
    kind = (item.get("SegmentedPropertyTypeCodeSequence") or [{}])[0]
    code = (kind.get("CodeValue"), kind.get("CodingSchemeDesignator"))
    name = item.get("SegmentLabel") or kind.get("CodeMeaning") or f"segment {own_number}"
    return Segment(own_number, str(name), code == _BACKGROUND_CODE or own_number == background)


def read_frames(dataset: Any) -> list[SegmentFrame]:
    """All frames, in the file's order."""
    shared = _needed_items(dataset, "SharedFunctionalGroupsSequence")[0]
    frames = _needed_items(dataset, "PerFrameFunctionalGroupsSequence")
    if len(frames) != whole_number(dataset, "NumberOfFrames"):
        raise InputError("describes another number of frames than it has")
    is_map = segmentation_type(dataset) == "LABELMAP"
    size = (whole_number(dataset, "Rows"), whole_number(dataset, "Columns"))
    return [
        SegmentFrame(index, None if is_map else _segment_number(own, shared), _plane(own, shared, size))
        for index, own in enumerate(frames)
    ]


def slice_spacing(dataset: Any) -> float:
    """SpacingBetweenSlices of what all frames share, in mm; 0 where it is not said."""
    for measures in items(_needed_items(dataset, "SharedFunctionalGroupsSequence")[0], "PixelMeasuresSequence")[:1]:
        return number(measures, "SpacingBetweenSlices", 0)
    return 0.0


def _plane(own: Any, shared: Any, size: tuple[int, int]) -> Plane:
    x, y, z = numbers(_group(own, shared, "PlanePositionSequence"), "ImagePositionPatient", 3)
    cosines = numbers(_group(own, shared, "PlaneOrientationSequence"), "ImageOrientationPatient", 6)
    row_spacing, column_spacing = numbers(_group(own, shared, "PixelMeasuresSequence"), "PixelSpacing", 2)
    row, column = (cosines[0], cosines[1], cosines[2]), (cosines[3], cosines[4], cosines[5])
    return Plane((x, y, z), row, column, row_spacing, column_spacing, *size)


def _group(own: Any, shared: Any, keyword: str) -> Any:
    """The item of a functional group, which stands with the frame or with what all frames share."""
    return _needed_items(own if keyword in own else shared, keyword)[0]


def _segment_number(own: Any, shared: Any) -> int:
    return whole_number(_group(own, shared, "SegmentIdentificationSequence"), "ReferencedSegmentNumber")


def _needed_items(dataset: Any, keyword: str) -> tuple[Any, ...]:
    """The items of a sequence that has to have some."""
    found = items(dataset, keyword)
    if not found:
        raise InputError(f"has no {keyword}")
    return found
