"""What a segmentation takes over from the series it was made from: the study's identity, geometry, references.

highdicom is given one plain header per slice, made from the checked frames of the stack, so that classic, enhanced and
mosaic sources take one way and whatever else their headers hold cannot get in its way. The references to those made-up
headers are then set to the true instances and frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError
from pipeline.io.dicom.frames import Frame, Stack
from pipeline.io.dicom.quiet import errors_named

# A class of single frames that highdicom knows; stands in for the source's until the references are set.
_STAND_IN_CLASS = "1.2.840.10008.5.1.4.1.1.2"
_REQUIRED = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPClassUID")
# Type 2 of the patient and the study: must be there, and may be empty. These three identify and are kept to the letter.
_IDENTITY = ("PatientName", "PatientID", "AccessionNumber")
# The others: what does not have the form that the standard gives it (a StudyID of 17 characters) is left empty.
_FORMED = ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "ReferringPhysicianName")
# Kept where they are there and well formed.
_OPTIONAL = (
    *("IssuerOfPatientID", "PatientAge", "PatientSize", "PatientWeight", "PatientIdentityRemoved"),
    *("DeidentificationMethod", "StudyDescription", "PositionReferenceIndicator"),
    *("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
    *("ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName", "ClinicalTrialSiteID"),
    *("ClinicalTrialSiteName", "ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID"),
    *("LongitudinalTemporalInformationModified",),
)


@dataclass(frozen=True, eq=False)
class SegmentationSource:
    """A series as the source of a segmentation.

    Attributes:
        headers: One per slice, in the stack's order, for highdicom; their instance UIDs are made up.
        frames: The slices that they stand for.
        sop_class: Of the source's instances.
        is_multiframe: Whether frames are referred to by their number.
        series_number: Of the source; 0 where it has none.
    """

    headers: tuple[Any, ...]
    frames: tuple[Frame, ...]
    sop_class: str
    is_multiframe: bool
    series_number: int

    def set_references(self, segmentation: Any) -> None:
        """Let `segmentation`, made from `headers`, refer to the true instances and frames."""
        frame_of = {header.SOPInstanceUID: frame for header, frame in zip(self.headers, self.frames, strict=True)}
        for item in _derivation_items(segmentation):
            # highdicom shares an item between the segments of a slice; the second time its UID is the true one.
            if (frame := frame_of.get(item.ReferencedSOPInstanceUID)) is not None:
                self._refer(item, frame)
        instances = [self._instance(uid) for uid in dict.fromkeys(frame.instance_uid for frame in self.frames)]
        segmentation.SourceImageSequence = instances
        segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence = instances

    def _refer(self, item: Any, frame: Frame) -> None:
        item.ReferencedSOPClassUID = self.sop_class
        item.ReferencedSOPInstanceUID = frame.instance_uid
        if self.is_multiframe:
            item.ReferencedFrameNumber = frame.index + 1
        if frame.tile is not None:
            item.SpatialLocationsPreserved = "NO"

    def _instance(self, uid: str) -> Any:
        from pydicom import Dataset

        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = self.sop_class, uid
        return item


def _derivation_items(segmentation: Any) -> Iterator[Any]:
    for group in segmentation.PerFrameFunctionalGroupsSequence:
        for derivation in group.DerivationImageSequence:
            yield from derivation.SourceImageSequence


def read_segmentation_source(stack: Stack) -> SegmentationSource:
    """Read the header of the stack's first file; the other slices are as the stack says.

    Raises:
        InputError: The file is gone or damaged, or lacks a UID without which a segmentation cannot refer to it.
    """
    frames = stack.frames[0]
    path = frames[0].path
    with errors_named(path, "has a header that cannot be read", fix="Export the series again"):
        from pydicom import dcmread

        header = dcmread(path, stop_before_pixels=True, force=True)
        _check_identity(header, frames)
        base = {**_identity(header), **_geometry(stack, _slice_thickness(header))}
        return SegmentationSource(
            headers=tuple(_stand_in(base, frame, number) for number, frame in enumerate(frames, 1)),
            frames=frames,
            sop_class=str(header.SOPClassUID),
            is_multiframe=int(header.get("NumberOfFrames") or 1) > 1 or "PerFrameFunctionalGroupsSequence" in header,
            series_number=_series_number(header),
        )


def _check_identity(header: Any, frames: Sequence[Frame]) -> None:
    missing = [keyword for keyword in _REQUIRED if not header.get(keyword)]
    if not all(frame.instance_uid for frame in frames):
        missing.append("SOPInstanceUID")
    if missing:
        what = f"lacks {', '.join(missing)}, without which a segmentation cannot refer to it"
        raise InputError(what, fix="Export the series again, or write NIfTI")


def _identity(header: Any) -> dict[str, Any]:
    """Attributes of patient, study and series by keyword; what the standard requires and is missing is empty."""
    values: dict[str, Any] = {keyword: str(header[keyword].value) for keyword in _REQUIRED[:3]}
    # Text is taken out of the source's character set here; the segmentation has one that holds all.
    values |= {keyword: _text(header, keyword) for keyword in _IDENTITY}
    values |= {keyword: _text(header, keyword) if _is_formed(header, keyword) else "" for keyword in _FORMED}
    values |= {keyword: header[keyword].value for keyword in _OPTIONAL if _is_formed(header, keyword)}
    values["Modality"] = _text(header, "Modality") or "OT"
    if values["PatientSex"] not in ("M", "F", "O"):
        values["PatientSex"] = ""
    return values


def _text(header: Any, keyword: str) -> str:
    value = header.get(keyword)
    return "" if value is None else str(value)


def _is_formed(header: Any, keyword: str) -> bool:
    """Whether an attribute has a value that may be stored."""
    from pydicom.config import RAISE
    from pydicom.valuerep import validate_value

    try:
        element = header[keyword]
        values = element.value if element.VM > 1 else [element.value]
        for value in values:
            validate_value(element.VR, str(value), RAISE)
    except (KeyError, ValueError, TypeError):
        return False
    return element.value not in (None, "")


def _geometry(stack: Stack, thickness: float | None) -> dict[str, Any]:
    first = stack.frames[0][0]
    columns, rows, _ = stack.grid.shape
    return {
        "Rows": rows,
        "Columns": columns,
        "PixelSpacing": [first.row_spacing, first.column_spacing],
        # Required; where the source does not say it, the voxels of the segmentation are as thick as they are apart.
        "SliceThickness": thickness or stack.grid.spacing[2],
        "ImageOrientationPatient": [*first.row_direction, *first.column_direction],
    }


def _stand_in(base: dict[str, Any], frame: Frame, number: int) -> Any:
    from pydicom import Dataset
    from pydicom.valuerep import DS

    header = Dataset()
    for keyword, value in base.items():
        setattr(header, keyword, [DS(x, auto_format=True) for x in value] if _is_floats(value) else value)
    header.SOPClassUID, header.SOPInstanceUID = _STAND_IN_CLASS, f"2.25.{number}"
    header.ImagePositionPatient = [DS(x, auto_format=True) for x in frame.position]
    return header


def _is_floats(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, float) for x in value)


def _slice_thickness(header: Any) -> float | None:
    """Of the header or, in enhanced files, of the functional groups; None where it is not said."""
    places = [header]
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in (header.get(keyword) or [])[:1]:
            places += list(group.get("PixelMeasuresSequence") or [])
    found = [place.SliceThickness for place in places if place.get("SliceThickness") is not None]
    return float(found[0]) if found and float(found[0]) > 0 else None


def _series_number(header: Any) -> int:
    try:
        return max(0, int(header.get("SeriesNumber") or 0))
    except (TypeError, ValueError):
        return 0
