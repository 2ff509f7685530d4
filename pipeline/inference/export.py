"""Segmentations as files: NIfTI on the grid of the image, DICOM segmentations in the study of the series."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.datasets.case import Case
from pipeline.errors import InputError
from pipeline.inference.export_formats import BLOSC2, NIFTI_PROBABILITIES, OutputFormat
from pipeline.inference.outputs import Prediction
from pipeline.io.dicom.frames import Stack
from pipeline.io.dicom.references import anonymous_errors
from pipeline.io.dicom.tilt import back_to_slices
from pipeline.io.image_file import is_series, write_label, write_map
from pipeline.io.volume import Volume
from pipeline.plan import Plan

NO_SERIES = "Use --format nifti"


def check_inputs(cases: Sequence[Case], formats: Iterable[OutputFormat]) -> None:
    """Refuse at once what none of the images can become.

    Raises:
        InputError: DICOM segmentations are asked, and no image is a DICOM series.
    """
    if cases and "dicom_seg" in formats and not any(is_series(path) for case in cases for path in case.images[:1]):
        raise InputError("a DICOM segmentation refers to a DICOM series, and the input has none", fix=NO_SERIES)


def check_formats(image: Volume, formats: Iterable[OutputFormat]) -> None:
    """Refuse, before anything is computed, what cannot be written of an image.

    Raises:
        InputError: A DICOM segmentation is asked of an image that is no DICOM series, or of one that lacks what a
            segmentation refers to.
    """
    if "dicom_seg" not in formats:
        return
    stack = image.source.header if image.source is not None else None
    if not isinstance(stack, Stack):
        raise InputError("a DICOM segmentation refers to a DICOM series, and this is none", fix=NO_SERIES)
    from pipeline.io.dicom.seg_source import read_segmentation_source

    with anonymous_errors(_files_of(stack)):
        read_segmentation_source(stack)


def write_outputs(prediction: Prediction, files: Mapping[OutputFormat, Path], plan: Plan) -> None:
    """Write what was made of a case in every format, each file atomically; the segmentation last.

    Args:
        prediction: On the grid of the image, with its source.
        files: Where to, by format.
        plan: Names, values and codes of the classes.

    Raises:
        InputError: A file cannot be written.
    """
    label = prediction.label
    for kind in (NIFTI_PROBABILITIES, BLOSC2):
        if kind in files and prediction.probabilities is not None:
            prediction.probabilities.write(files[kind], label)
    for kind, values in prediction.maps.items():
        write_map(files[kind], values)
    if "nifti" in files:
        write_label(files["nifti"], label)
    if "dicom_seg" in files:
        _write_dicom(files["dicom_seg"], label, plan)


def _write_dicom(path: Path, label: Volume, plan: Plan) -> None:
    from pipeline.io.dicom.seg_writer import write_segmentation

    on_slices = back_to_slices(label)
    if on_slices.source is None:
        raise ValueError("a segmentation of a series has a source")
    classes = dict(list(plan.labels.items())[1:])
    stack = on_slices.source.header
    with anonymous_errors(_files_of(stack) if isinstance(stack, Stack) else ()):
        write_segmentation(path, on_slices.array[0], on_slices.source, classes=classes, codes=plan.segment_codes)


def _files_of(stack: Stack) -> list[Path]:
    """The files of a series, each once."""
    return list(dict.fromkeys(frame.path for phase in stack.frames for frame in phase))
