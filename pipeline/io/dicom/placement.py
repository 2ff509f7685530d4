"""Where the frames of one file lie in the patient: classic files, enhanced multi-frame files, Siemens mosaics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import InputError
from pipeline.io.dicom.elements import is_damaged, items, number, numbers, shown, text, value_of, whole_number, words
from pipeline.io.dicom.frames import Frame, PixelData, PixelFormat, Tile, Vector
from pipeline.io.dicom.phases import phase_of

CSA_CREATOR = "SIEMENS CSA HEADER"
CSA_TAGS = [0x00290010, 0x00291010]
# A float32 of intensities holds no more; no scanner comes near.
LARGEST_RESCALE = 1e30
# Cosines are written with six digits or more; beyond this, directions are no rectangle of pixels.
DIRECTION_TOLERANCE = 1e-3


def read_pixel_format(dataset: Any) -> PixelFormat:
    """How pixels are stored.

    Raises:
        InputError: An element is missing, or has an impossible value.
    """
    sizes = {key: whole_number(dataset, key) for key in ("Rows", "Columns", "BitsAllocated")}
    bits_stored = whole_number(dataset, "BitsStored")
    sign = whole_number(dataset, "PixelRepresentation")
    found = PixelFormat(
        rows=sizes["Rows"],
        columns=sizes["Columns"],
        bits_allocated=sizes["BitsAllocated"],
        bits_stored=bits_stored,
        high_bit=whole_number(dataset, "HighBit", bits_stored - 1),
        is_signed=sign == 1,
        samples=whole_number(dataset, "SamplesPerPixel", 1),
        photometric=shown(text(dataset, "PhotometricInterpretation"), 16),
    )
    if sign not in (0, 1):
        raise InputError("has an unusable PixelRepresentation (0 or 1 is needed)")
    if min(found.rows, found.columns) < 1 or not 0 < found.bits_stored <= found.bits_allocated:
        raise InputError(f"has {found.rows} x {found.columns} pixels of {found.bits_stored} bits")
    return found


def read_frames(dataset: Any, path: Path, data: PixelData | None, pixels: PixelFormat) -> tuple[Frame, ...]:
    """The frames of a file, in its order.

    Raises:
        InputError: Geometry is missing or impossible.
    """
    per_frame = items(dataset, "PerFrameFunctionalGroupsSequence")
    if per_frame:
        return _enhanced_frames(dataset, path, data, per_frame)
    if whole_number(dataset, "NumberOfFrames", 1) != 1:
        raise InputError("holds several frames without saying where each of them lies")
    frame = _frame(_ByGroup(dataset, (), ()), path, 0, data)
    is_mosaic = "MOSAIC" in (word.upper() for word in words(dataset, "ImageType"))
    return _mosaic_frames(dataset, frame, pixels) if is_mosaic else (frame,)


class _ByGroup:
    """Elements of one frame: in its own functional groups, else in the shared ones, else in the file's header."""

    def __init__(self, dataset: Any, per_frame: Sequence[Any], shared: Sequence[Any]) -> None:
        self.dataset, self._places = dataset, (*per_frame, *shared)

    def holder(self, group: str, keyword: str) -> Any:
        """The dataset that holds `keyword`, which a functional group `group` may have; `a/b` is b within a."""
        for place in self._places:
            inside = [place]
            for name in group.split("/"):
                inside = [item for outer in inside for item in items(outer, name)]
            for item in inside:
                if value_of(item, keyword) is not None:
                    return item
        return self.dataset


def _enhanced_frames(dataset: Any, path: Path, data: PixelData | None, per_frame: Sequence[Any]) -> tuple[Frame, ...]:
    count = whole_number(dataset, "NumberOfFrames")
    if count != len(per_frame):
        raise InputError(f"holds {count} frames, but says of {len(per_frame)} where they lie")
    shared = items(dataset, "SharedFunctionalGroupsSequence")
    return tuple(_frame(_ByGroup(dataset, [own], shared), path, index, data) for index, own in enumerate(per_frame))


def _frame(found: _ByGroup, path: Path, index: int, data: PixelData | None) -> Frame:
    dataset = found.dataset
    position = numbers(found.holder("PlanePositionSequence", "ImagePositionPatient"), "ImagePositionPatient", 3)
    cosines = numbers(found.holder("PlaneOrientationSequence", "ImageOrientationPatient"), "ImageOrientationPatient", 6)
    measures = found.holder("PixelMeasuresSequence", "PixelSpacing")
    row_spacing, column_spacing = numbers(measures, "PixelSpacing", 2)
    if min(row_spacing, column_spacing) <= 0:
        raise InputError("has an unusable PixelSpacing (it must be positive)")
    slope_in, intercept_in = (
        found.holder("PixelValueTransformationSequence", keyword) for keyword in ("RescaleSlope", "RescaleIntercept")
    )
    if items(dataset, "ModalityLUTSequence") or is_damaged(dataset, "ModalityLUTSequence"):
        raise InputError("holds a table of intensities (ModalityLUTSequence), which is not supported")
    row, column = _directions(cosines)
    return Frame(
        path=path,
        index=index,
        instance_uid=text(dataset, "SOPInstanceUID") or text(dataset.file_meta, "MediaStorageSOPInstanceUID"),
        instance_number=_instance_number(dataset),
        position=(position[0], position[1], position[2]),
        row_direction=row,
        column_direction=column,
        row_spacing=row_spacing,
        column_spacing=column_spacing,
        slope=_rescale(slope_in, "RescaleSlope", 1.0),
        intercept=_rescale(intercept_in, "RescaleIntercept", 0.0),
        has_rescale=(bool(words(slope_in, "RescaleSlope")), bool(words(intercept_in, "RescaleIntercept"))),
        phase=phase_of(found.holder, words(dataset, "ImageType")),
        thickness=max(0.0, number(measures, "SliceThickness", 0.0)),
        data=data,
    )


def _rescale(rescale: Any, keyword: str, default: float) -> float:
    value = number(rescale, keyword, default)
    if value == 0 and keyword == "RescaleSlope":
        raise InputError("has an unusable RescaleSlope (it is 0)")
    if abs(value) > LARGEST_RESCALE:
        raise InputError(f"has an unusable {keyword} (it is larger than intensities can be)")
    return value


def _instance_number(dataset: Any) -> int | None:
    try:
        return whole_number(dataset, "InstanceNumber")
    except InputError:
        return None


def _directions(cosines: Sequence[float]) -> tuple[Vector, Vector]:
    """Both in-plane unit vectors.

    Raises:
        InputError: They are no unit vectors at a right angle.
    """
    row, column = np.array(cosines[:3]), np.array(cosines[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(length - 1) for length in lengths) > DIRECTION_TOLERANCE or abs(row @ column) > DIRECTION_TOLERANCE:
        raise InputError("has an unusable ImageOrientationPatient (two unit vectors at a right angle are needed)")
    # As they stand there, to the digit: a segmentation gives them back.
    return (float(row[0]), float(row[1]), float(row[2])), (float(column[0]), float(column[1]), float(column[2]))


def _mosaic_frames(dataset: Any, sheet: Frame, pixels: PixelFormat) -> tuple[Frame, ...]:
    """The slices on one sheet; nibabel reads Siemens' own header, which counts them and says which way they go.

    The sheet's position is that of a single slice as large as the sheet around the same centre.
    """
    count, normal = _mosaic_layout(dataset)
    across = int(np.ceil(np.sqrt(count)))
    if pixels.rows % across or pixels.columns % across:
        raise InputError(f"is a mosaic of {count} slices by its Siemens header, which its size does not hold")
    rows, columns = pixels.rows // across, pixels.columns // across
    spacing = number(dataset, "SpacingBetweenSlices")
    row, column = np.array(sheet.row_direction), np.array(sheet.column_direction)
    corner = np.array(sheet.position)
    corner = corner + row * sheet.column_spacing * (pixels.columns - columns) / 2
    corner = corner + column * sheet.row_spacing * (pixels.rows - rows) / 2
    frames = []
    for index in range(count):
        x, y, z = corner + index * spacing * normal
        tile = Tile(row=index // across * rows, column=index % across * columns, rows=rows, columns=columns)
        frames.append(replace(sheet, position=(float(x), float(y), float(z)), tile=tile))
    return tuple(frames)


def _mosaic_layout(dataset: Any) -> tuple[int, Any]:
    """Number of slices on the sheet and the unit vector from one to the next."""
    from nibabel.nicom import csareader

    creator, content = (dataset.get(tag) for tag in CSA_TAGS)
    if content is None or creator is None or str(creator.value).strip() != CSA_CREATOR:
        raise InputError("is a mosaic without the Siemens header that says how many slices it holds")
    try:
        csa = csareader.read(content.value)  # type: ignore[no-untyped-call]
        count = csareader.get_n_mosaic(csa)  # type: ignore[no-untyped-call]
        normal = csareader.get_slice_normal(csa)  # type: ignore[no-untyped-call]
    except Exception:
        # Any of a dozen types, and one of its own that is none of the built-in ones.
        raise InputError("is a mosaic whose Siemens header is damaged") from None
    if not count or count < 0 or normal is None or not np.all(np.isfinite(normal)):
        raise InputError("is a mosaic whose Siemens header does not say how many slices it holds")
    return int(count), np.asarray(normal, float)
