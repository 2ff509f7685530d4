"""Headers of DICOM files: what they are, where their frames lie, where their pixels begin; no pixel is read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import InputError
from pipeline.io.dicom.elements import items, number, shown, tag_of, text, whole_number, words
from pipeline.io.dicom.frames import Frame, PixelData, PixelFormat
from pipeline.io.dicom.phases import PHASE_KEYWORDS
from pipeline.io.dicom.pixel_location import PixelDataMissingError, check_size, locate_pixel_data
from pipeline.io.dicom.placement import CSA_TAGS, read_frames, read_pixel_format
from pipeline.io.dicom.privacy import IDENTITY_KEYWORDS, identity_of
from pipeline.io.dicom.quiet import errors_named
from pipeline.io.dicom.seg_header import read_segments

PREAMBLE_BYTES = 128
# Pixel data, and its float kinds, which no CT, MR or PET image has.
PIXEL_TAGS = frozenset({0x7FE00010, 0x7FE00008, 0x7FE00009})
DEFLATED = "1.2.840.10008.1.2.1.99"
_TEXT = """
SpecificCharacterSet ImageType SOPClassUID SOPInstanceUID Modality SeriesDescription StudyInstanceUID SeriesInstanceUID
SeriesNumber InstanceNumber FrameOfReferenceUID NumberOfFrames Rows Columns BitsAllocated BitsStored HighBit
PixelRepresentation SamplesPerPixel PhotometricInterpretation ImagePositionPatient ImageOrientationPatient PixelSpacing
SliceThickness SpacingBetweenSlices RescaleSlope RescaleIntercept ModalityLUTSequence SharedFunctionalGroupsSequence
PerFrameFunctionalGroupsSequence ReferencedSeriesSequence ReferencedFrameOfReferenceSequence StructureSetROISequence
SegmentSequence SegmentationType PixelPaddingValue ManufacturerModelName RTROIObservationsSequence
ConcatenationUID InConcatenationNumber InConcatenationTotalNumber NumberOfSlices
"""
_KEYWORDS = tuple(_TEXT.split())
# By which segmentations of this program are known, see `pipeline.io.dicom.seg_writer`.
OWN_MODEL_NAME = "voxfit"
# Kinds of RT structures that show neither an organ nor a lesion.
OUTLINE_TYPES = ("EXTERNAL", "ISOCENTER", "MARKER", "CONTROL", "REGISTRATION", "FIXATION")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What one DICOM file says of itself.

    Attributes:
        path: The file.
        sop_class, instance_uid, series_uid, study_uid, frame_of_reference: UIDs as in the file; "" where it has none.
        patient_id: Groups the studies of a patient; never shown.
        modality, series_number, description: For people; the description may quote anything, see `identity`.
        image_type: Values of ImageType in upper case.
        transfer_syntax: UID.
        pixels: None where the file is no image.
        frames: In the file's order; empty when there is a problem.
        referenced_series: Series that structures or segments were drawn on.
        structure_names: Names of structures or segments; the background of a label map is none.
        outline_names: Those that are no organ or lesion: the outline of the body, markers, the isocentre.
        is_own: A segmentation made by this program.
        concatenation_uid: Of what this file is a part of; "" for a file of its own.
        part: Number of this file in its concatenation, and how many there are; (1, 1) for a file of its own.
        num_slices: Slices of a volume as the header counts them; 0 where it does not.
        slice_distance: SpacingBetweenSlices in mm; 0 where the header does not say it.
        problem: Why the frames cannot be used, "" when they can.
        identity: Texts that tell who the patient is; never shown.
    """

    path: Path
    sop_class: str
    instance_uid: str
    series_uid: str
    study_uid: str
    frame_of_reference: str
    modality: str
    series_number: str
    description: str
    image_type: tuple[str, ...]
    transfer_syntax: str
    patient_id: str = field(default="", repr=False)
    pixels: PixelFormat | None = None
    frames: tuple[Frame, ...] = ()
    referenced_series: tuple[str, ...] = ()
    structure_names: tuple[str, ...] = ()
    outline_names: tuple[str, ...] = ()
    is_own: bool = False
    concatenation_uid: str = ""
    part: tuple[int, int] = (1, 1)
    num_slices: int = 0
    slice_distance: float = 0.0
    problem: str = ""
    identity: frozenset[str] = field(default=frozenset(), repr=False)


def is_dicom_file(path: Path) -> bool:
    """Whether a file begins like DICOM: with its mark after the preamble, or with an element of the first groups.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as stream:
        start = stream.read(PREAMBLE_BYTES + 4)
    if start[PREAMBLE_BYTES:] == b"DICM":
        return True
    # Old files have no preamble; they begin with a low element of group 2 or 8, in either byte order.
    return start[:4] in (b"\x02\0\0\0", b"\x02\0\1\0", b"\x08\0\0\0", b"\x08\0\5\0", b"\x08\0\x08\0", b"\0\x08\0\x05")


def is_candidate_name(name: str) -> bool:
    """Whether a file of this name may hold a DICOM object; hidden files and a DICOMDIR do not."""
    return not name.startswith(".") and name.upper() != "DICOMDIR"


def claims_dicom(path: Path) -> bool:
    """Whether a file is to be read: one that is called DICOM and is none belongs to a series, and is wrong there.

    Raises:
        OSError: The file cannot be read.
    """
    return path.suffix.lower() == ".dcm" or is_dicom_file(path)


def read_header(path: Path) -> Header:
    """Read all that matters before the pixels.

    Raises:
        InputError: The file cannot be read as DICOM at all. What is only wrong with its frames is in `problem`.
    """
    with errors_named(path, "is damaged, or no DICOM file", fix="Replace the file"), path.open("rb") as stream:
        return _read(path, stream)


def _read(path: Path, stream: BinaryIO) -> Header:
    from pydicom.filereader import read_partial

    # What `dcmread` calls, without turning all keywords into tags for every file.
    dataset = read_partial(stream, stop_when=_is_at_pixels, force=True, specific_tags=_wanted_tags())
    header = _identified(path, dataset)
    if not header.sop_class:
        raise ValueError("no SOPClassUID")
    if tag_of("Rows") not in dataset:
        return header
    pixels = None
    try:
        pixels = read_pixel_format(dataset)
        data = _pixel_data(path, stream, dataset, header.transfer_syntax)
        data = replace(data, num_frames=whole_number(dataset, "NumberOfFrames", 1))
        check_size(pixels, data)
        if header.structure_names:
            return header
        frames = read_frames(dataset, path, data, pixels)
    except (InputError, PixelDataMissingError) as error:
        problem = error.what if isinstance(error, InputError) else str(error)
        return replace(header, pixels=pixels, problem=problem)
    return replace(header, pixels=pixels, frames=frames)


@cache
def _wanted_tags() -> list[Any]:
    return [int(tag_of(keyword)) for keyword in (*_KEYWORDS, *IDENTITY_KEYWORDS, *PHASE_KEYWORDS)] + CSA_TAGS


def _is_at_pixels(tag: int, _vr: str | None, _length: int) -> bool:
    return tag in PIXEL_TAGS


def _identified(path: Path, dataset: Any) -> Header:
    return Header(
        path=path,
        # De-identification blanks UIDs at times, and forgets those of the file's own head.
        sop_class=text(dataset, "SOPClassUID") or text(dataset.file_meta, "MediaStorageSOPClassUID"),
        instance_uid=text(dataset, "SOPInstanceUID") or text(dataset.file_meta, "MediaStorageSOPInstanceUID"),
        series_uid=text(dataset, "SeriesInstanceUID"),
        study_uid=text(dataset, "StudyInstanceUID"),
        frame_of_reference=text(dataset, "FrameOfReferenceUID") or _referenced_frame(dataset),
        patient_id=text(dataset, "PatientID"),
        modality=shown(text(dataset, "Modality").upper(), 16),
        series_number=shown(text(dataset, "SeriesNumber"), 16),
        description=shown(text(dataset, "SeriesDescription")),
        image_type=tuple(word.upper() for word in words(dataset, "ImageType")),
        transfer_syntax=text(dataset.file_meta, "TransferSyntaxUID"),
        referenced_series=_referenced_series(dataset),
        structure_names=_structure_names(dataset),
        outline_names=_outline_names(dataset),
        is_own=text(dataset, "ManufacturerModelName") == OWN_MODEL_NAME and bool(items(dataset, "SegmentSequence")),
        concatenation_uid=text(dataset, "ConcatenationUID"),
        part=(_count(dataset, "InConcatenationNumber", 1), _count(dataset, "InConcatenationTotalNumber", 1)),
        num_slices=_count(dataset, "NumberOfSlices", 0),
        slice_distance=_distance(dataset),
        identity=identity_of(dataset),
    )


def _count(dataset: Any, keyword: str, default: int) -> int:
    """A number that only informs; `default` where there is none that can be used."""
    try:
        return whole_number(dataset, keyword, default)
    except InputError:
        return default


def _distance(dataset: Any) -> float:
    try:
        return abs(number(dataset, "SpacingBetweenSlices", 0.0))
    except InputError:
        return 0.0


def _structure_names(dataset: Any) -> tuple[str, ...]:
    rois = tuple(shown(text(item, "ROIName")) for item in items(dataset, "StructureSetROISequence"))
    if not items(dataset, "SegmentSequence"):
        return rois
    try:
        return tuple(shown(segment.name) for segment in read_segments(dataset) if not segment.is_background)
    except InputError:
        # Reading it says what is wrong.
        return ()


def _outline_names(dataset: Any) -> tuple[str, ...]:
    numbers = {
        text(item, "ReferencedROINumber")
        for item in items(dataset, "RTROIObservationsSequence")
        if text(item, "RTROIInterpretedType").upper() in OUTLINE_TYPES
    }
    rois = items(dataset, "StructureSetROISequence")
    return tuple(shown(text(roi, "ROIName")) for roi in rois if text(roi, "ROINumber") in numbers)


def _referenced_frame(dataset: Any) -> str:
    """The space of a structure set, which seldom has one of its own."""
    found = {text(item, "FrameOfReferenceUID") for item in items(dataset, "ReferencedFrameOfReferenceSequence")}
    return found.pop() if len(found) == 1 else ""


def _referenced_series(dataset: Any) -> tuple[str, ...]:
    """Series that a segmentation or a structure set refers to."""
    found = [text(item, "SeriesInstanceUID") for item in items(dataset, "ReferencedSeriesSequence")]
    for frame in items(dataset, "ReferencedFrameOfReferenceSequence"):
        for study in items(frame, "RTReferencedStudySequence"):
            found += [text(item, "SeriesInstanceUID") for item in items(study, "RTReferencedSeriesSequence")]
    return tuple(dict.fromkeys(filter(None, found)))


def _pixel_data(path: Path, stream: BinaryIO, dataset: Any, syntax: str) -> PixelData:
    """Where the pixels are.

    Raises:
        PixelDataMissingError: There are none, or not all.
    """
    if not syntax:
        # A file without a meta header says by its bytes alone how it is encoded.
        syntax = _syntax_by_encoding(*dataset.original_encoding)
    if syntax == DEFLATED:
        return _deflated_pixel_data(path)
    is_implicit, is_little = dataset.original_encoding
    return locate_pixel_data(stream, syntax, is_implicit=bool(is_implicit), is_little=bool(is_little))


def _syntax_by_encoding(is_implicit: bool, is_little: bool) -> str:
    if is_implicit:
        return "1.2.840.10008.1.2"
    return "1.2.840.10008.1.2.1" if is_little else "1.2.840.10008.1.2.2"


def _deflated_pixel_data(path: Path) -> PixelData:
    """Inflates the file, for which there is no way around reading it whole."""
    from pydicom import dcmread

    with BytesIO(path.read_bytes()) as stream:
        dataset = dcmread(stream, force=True)
    pixels = dataset.get("PixelData")
    if not pixels:
        raise PixelDataMissingError("has no pixel data")
    return PixelData(transfer_syntax=DEFLATED, offset=None, length=len(pixels))
