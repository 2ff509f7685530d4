"""Contours of structures (RTSTRUCT): of given polygons, or around every class of a label map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from pipeline.geometry import LPS_TO_RAS
from pipeline.synthetic_dicom.layout import decimal
from pipeline.synthetic_dicom.modules import save
from pipeline.synthetic_dicom.objects import make_structure_set
from pipeline.synthetic_dicom.stored import WrittenSeries

Polygon = NDArray[np.float64]
STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
COLOURS = ([255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255])
# A tenth of a micrometre: as exact as anyone needs, and files stay small.
CONTOUR_DECIMALS = 4


def label_polygons(series: WrittenSeries, label: NDArray[Any], names: Mapping[int, str]) -> dict[str, list[Polygon]]:
    """Contours around the classes of a label map, slice by slice.

    A contour runs half-way between the centres of inner and outer voxels, so the voxels whose centres lie inside an odd
    number of the contours of a slice are exactly the class; a hole is a contour of its own.

    Args:
        series: The images that the contours are drawn on.
        label: (I, J, K) class values in RAS order, on the grid of the series.
        names: Name of each class that gets contours.

    Returns:
        By name, polygons (points, 3) in LPS+ mm, not closed by repeating the first point.
    """
    slices = series.layout.slices(label)
    affine = series.layout.grid.affine
    polygons: dict[str, list[Polygon]] = {}
    for value, name in names.items():
        polygons[name] = []
        for k, mask in enumerate(slices == value):
            for pixels in _outlines(mask):
                file_indices = np.column_stack([pixels, np.full(len(pixels), float(k))])
                polygons[name].append(LPS_TO_RAS * (file_indices @ affine[:3, :3].T + affine[:3, 3]))
    return polygons


def _outlines(mask: NDArray[np.bool_]) -> list[Polygon]:
    """Closed outlines of a mask (rows, columns) as (points, 2) columns and rows, corners only."""
    if not mask.any():
        return []
    from contourpy import contour_generator

    lines = contour_generator(z=np.pad(mask, 1).astype(float)).lines(0.5)
    return [_corners(np.asarray(line)[:-1] - 1) for line in lines]


def _corners(points: Polygon) -> Polygon:
    """A closed polygon without the points on straight lines."""
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    turn = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    corners: Polygon = points[turn != 0]
    return corners


def write_structures(
    path: Path,
    series: WrittenSeries,
    polygons: Mapping[str, Sequence[Polygon]],
    *,
    label: str = "synthetic",
    decimals: int = CONTOUR_DECIMALS,
) -> Path:
    """Write an RTSTRUCT that refers to the images of `series`.

    Args:
        path: The file.
        series: The images; must not be shuffled between writing and this call.
        polygons: By name of the structure, closed planar contours (points, 3) in LPS+ mm; may be empty.
        label: StructureSetLabel, from which UIDs follow as well.
        decimals: Of the coordinates in mm.
    """
    dataset = make_structure_set(series.options, label)
    uids = _instance_uids(series)
    dataset.ReferencedFrameOfReferenceSequence = [_referenced_frame(series, uids)]
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    dataset.RTROIObservationsSequence = []
    for number, (name, contours) in enumerate(polygons.items(), 1):
        roi, observation = Dataset(), Dataset()
        roi.ROINumber, roi.ReferencedFrameOfReferenceUID = number, series.options.frame_of_reference_uid
        roi.ROIName, roi.ROIGenerationAlgorithm = name, "MANUAL"
        observation.ObservationNumber = observation.ReferencedROINumber = number
        observation.RTROIInterpretedType, observation.ROIInterpreter = "ORGAN", None
        dataset.StructureSetROISequence.append(roi)
        dataset.RTROIObservationsSequence.append(observation)
        dataset.ROIContourSequence.append(_contours(series, uids, number, contours, decimals))
    return save(dataset, path, series.options)


def _contours(
    series: WrittenSeries, uids: list[str], number: int, contours: Sequence[Polygon], decimals: int
) -> Dataset:
    """The contours of one structure, each with the image of the nearest slice."""
    item = Dataset()
    item.ReferencedROINumber, item.ROIDisplayColor = number, COLOURS[(number - 1) % len(COLOURS)]
    item.ContourSequence = []
    origin, normal = series.layout.grid.affine[:3, 3], series.layout.normal
    for points in contours:
        contour = Dataset()
        k = int(np.rint(normal @ (LPS_TO_RAS * points[0] - origin) / series.layout.slice_spacing))
        if 0 <= k < len(uids):
            contour.ContourImageSequence = [_image(series, uids[k], k)]
        contour.ContourGeometricType = "CLOSED_PLANAR" if len(points) > 1 else "POINT"
        contour.NumberOfContourPoints = len(points)
        contour.ContourData = [decimal(value, decimals) for value in np.ravel(points)]
        item.ContourSequence.append(contour)
    return item


def _instance_uids(series: WrittenSeries) -> list[str]:
    """SOP instance of each slice of the first phase."""
    options = series.options
    return [options.instance_uid("enhanced" if options.enhanced else f"0 {k}") for k in range(len(series.paths[0]))]


def _image(series: WrittenSeries, uid: str, k: int) -> Dataset:
    image = Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = series.sop_class, uid
    if series.options.enhanced:
        image.ReferencedFrameNumber = int(series.frame_numbers[0, k]) + 1
    return image


def _referenced_frame(series: WrittenSeries, uids: list[str]) -> Dataset:
    """The frame of reference with study, series and images."""
    images, study, frame = Dataset(), Dataset(), Dataset()
    images.SeriesInstanceUID = series.options.series_uid
    images.ContourImageSequence = []
    for uid in dict.fromkeys(uids):
        image = Dataset()
        image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = series.sop_class, uid
        images.ContourImageSequence.append(image)
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = STUDY_CLASS, series.options.study_uid
    study.RTReferencedSeriesSequence = [images]
    frame.FrameOfReferenceUID = series.options.frame_of_reference_uid
    frame.RTReferencedStudySequence = [study]
    return frame
