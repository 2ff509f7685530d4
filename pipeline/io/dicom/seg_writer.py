"""Label maps to DICOM segmentations in the study that they were made from; highdicom makes the object.

What is described: the classes that have voxels, numbered from 1 in the order of their class values. The standard says
of the segment sequence that it describes the segments contained in the data, and numbers of a BINARY one must be
consecutive; viewers list or stumble over segments that have no frame. Numbers are therefore not class values; names
and codes tell what a segment is. When nothing at all was found, all classes are described, with one empty frame each,
so that an empty result is a valid object that says what was looked for.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import __version__
from pipeline.artifacts import atomic_path
from pipeline.errors import InputError
from pipeline.io.dicom.frames import Stack
from pipeline.io.dicom.headers import OWN_MODEL_NAME
from pipeline.io.dicom.quiet import errors_named
from pipeline.io.dicom.seg_source import SegmentationSource, read_segmentation_source
from pipeline.io.dicom.segment_codes import PRIVATE_SCHEME, clean_text, private_code
from pipeline.io.volume import SourceGrid
from pipeline.plan import Code, SegmentCode

PRODUCT = OWN_MODEL_NAME
# Keeps the new series apart from those of the scanner, and its origin readable.
SERIES_DESCRIPTION = "voxfit segmentation"
SERIES_NUMBER_OFFSET = 1000
LARGEST_SERIES_NUMBER = 2**31 - 1
GOLDEN_RATIO = 0.618034


def write_segmentation(
    path: Path,
    label: NDArray[Any],
    source: SourceGrid,
    *,
    classes: Mapping[str, int],
    codes: Mapping[str, SegmentCode],
) -> None:
    """Write class values as a BINARY segmentation of the series that `source` came from, atomically.

    The object belongs to the source's study and frame of reference, refers to each source slice, and has its
    positions. Only UIDs and dates differ between two runs.

    Args:
        path: The file to write.
        label: (I, J, K) class values in RAS order.
        source: The series; its `header` is the `Stack` that was read.
        classes: Value by class name; 0 is the background and left out.
        codes: What the classes are; those that are missing get a private code.

    Raises:
        InputError: The source is no DICOM series, lacks a UID that the standard needs, or the file cannot be written.
    """
    if not isinstance(source.header, Stack):
        raise InputError("is no DICOM series, so no segmentation can refer to it", where=source.path, fix="Write NIfTI")
    numbers = {name: value for name, value in sorted(classes.items(), key=lambda item: item[1]) if value != 0}
    frames, present = _numbered_frames(label, source, tuple(numbers.values()))
    names = [name for name, value in numbers.items() if value in present] or list(numbers)
    origin = read_segmentation_source(source.header)
    with errors_named(path, "cannot be made a DICOM segmentation", fix="Write NIfTI instead, and report this"):
        segmentation = _segmentation(origin, frames, _descriptions(names, codes))
        origin.set_references(segmentation)
        with atomic_path(path) as temporary:
            segmentation.save_as(temporary, enforce_file_format=True)


def _numbered_frames(
    label: NDArray[Any], source: SourceGrid, values: tuple[int, ...]
) -> tuple[NDArray[Any], frozenset[int]]:
    """Segment numbers as (k, rows, columns), 0 for background, and the class values that occur.

    Where none occurs there is a single empty frame.
    """
    if label.shape != source.order.grid_to_ras(source.grid).shape or label.dtype.kind not in "iub":
        raise ValueError(f"the label ({label.dtype}, {label.shape}) is no label map on the source's grid")
    if not values:
        raise ValueError("there is no class but the background")
    slices = source.order.from_ras(label).T
    known = np.array([0, *values])
    order = np.argsort(known)
    frames = np.empty(slices.shape, np.uint8 if len(values) < 256 else np.uint16)
    counts = np.zeros(len(known), np.int64)
    for frame, voxels in zip(frames, slices, strict=True):
        found = order[np.searchsorted(known, voxels, sorter=order).clip(max=len(known) - 1)]
        if not np.array_equal(known[found], voxels):
            raise ValueError("the label holds values that are no class")
        frame[...] = found
        counts += np.bincount(found.ravel(), minlength=len(known))
    is_present = counts[1:] > 0
    if not is_present.any():
        return frames[:1], frozenset()
    # Numbers of those that occur, without gaps.
    renumber = np.concatenate([[0], np.cumsum(is_present)]).astype(frames.dtype)
    for frame in frames:
        frame[...] = renumber[frame]
    return frames, frozenset(value for value, occurs in zip(values, is_present, strict=True) if occurs)


def _segmentation(source: SegmentationSource, frames: NDArray[Any], descriptions: list[Any]) -> Any:
    from highdicom import UID
    from highdicom.content import PlanePositionSequence
    from highdicom.seg import Segmentation

    # An empty result has one frame, at the first slice.
    positions = [
        PlanePositionSequence("PATIENT", header.ImagePositionPatient) for header in source.headers[: len(frames)]
    ]
    return Segmentation(
        source_images=source.headers,
        pixel_array=frames,
        segmentation_type="BINARY",
        segment_descriptions=descriptions,
        series_instance_uid=UID(),
        series_number=min(source.series_number + SERIES_NUMBER_OFFSET, LARGEST_SERIES_NUMBER),
        sop_instance_uid=UID(),
        instance_number=1,
        manufacturer=PRODUCT,
        manufacturer_model_name=PRODUCT,
        software_versions=__version__,
        # Required, and software has none.
        device_serial_number="none",
        content_label="SEGMENTATION",
        content_description="Segmentation by a trained network",
        series_description=SERIES_DESCRIPTION,
        # Names of classes and of the patient, in whatever script.
        specific_character_set="ISO_IR 192",
        plane_positions=positions if len(frames) < len(source.headers) else None,
        coding_schemes=_coding_schemes(descriptions),
    )


def _coding_schemes(descriptions: list[Any]) -> list[Any] | None:
    """Who our private codes are from; None where there are none, as an empty list is not valid."""
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

    schemes = {item.segmented_property_type.scheme_designator for item in descriptions}
    if PRIVATE_SCHEME not in schemes:
        return None
    return [CodingSchemeIdentificationItem(PRIVATE_SCHEME, name="voxfit class names")]


def _descriptions(names: list[str], codes: Mapping[str, SegmentCode]) -> list[Any]:
    return [_description(number, name, codes.get(name) or private_code(name)) for number, name in enumerate(names, 1)]


def _description(number: int, name: str, code: SegmentCode) -> Any:
    from highdicom.content import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes as dictionary

    description = SegmentDescription(
        segment_number=number,
        segment_label=clean_text(name),
        segmented_property_category=_concept(code.category),
        segmented_property_type=_concept(code.type),
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=PRODUCT, family=dictionary.CID7162.ArtificialIntelligence, version=__version__
        ),
        display_color=_color(number),
    )
    if code.modifier is not None:
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [_concept(code.modifier)]
    return description


def _concept(code: Code) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(code.value, code.scheme, code.meaning)


def _color(number: int) -> Any:
    """A colour of its own for each number: hues that are far apart for neighbours."""
    from highdicom.color import CIELabColor

    red, green, blue = colorsys.hsv_to_rgb((number * GOLDEN_RATIO) % 1.0, 0.7, 0.9)
    return CIELabColor.from_rgb(round(255 * red), round(255 * green), round(255 * blue))
