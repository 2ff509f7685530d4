"""What lies beside the series in a patient's folder: scouts, screen captures, dose screens, text reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from pipeline.geometry import Grid
from pipeline.io.volume import Volume
from pipeline.synthetic_dicom.modules import DATE, TIME, add_frame_of_reference, make_code, make_dataset, save
from pipeline.synthetic_dicom.options import SeriesOptions, make_uid
from pipeline.synthetic_dicom.series import write_series
from pipeline.synthetic_dicom.stored import WrittenSeries

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
BASIC_TEXT_REPORT = "1.2.840.10008.5.1.4.1.1.88.11"


def write_scout(folder: Path, volume: Volume, options: SeriesOptions) -> WrittenSeries:
    """Write one coronal projection of the first channel: ImageType ORIGINAL, PRIMARY, LOCALIZER.

    Args:
        folder: Where the file goes.
        volume: (C, I, J, K); its means along anterior are what the scout shows.
        options: Of the scout; give it a seed and a series number of its own.
    """
    flat = np.rint(volume.array[:1].mean(axis=2, keepdims=True))
    affine = volume.grid.affine.copy()
    affine[:3, 3] += affine[:3, 1] * (volume.grid.shape[1] - 1) / 2
    grid = Grid((volume.grid.shape[0], 1, volume.grid.shape[2]), affine)
    kind = ("ORIGINAL", "PRIMARY", "LOCALIZER")
    scout = replace(options, slice_axis=1, image_type=kind, enhanced=False, phase_keyword=None, phase_values=())
    return write_series(folder, Volume(flat, grid), scout)


def write_secondary_capture(folder: Path, options: SeriesOptions, *, shape: tuple[int, int] = (24, 32)) -> Path:
    """Write a colour picture that lies nowhere in the patient: `shape` is (rows, columns) of RGB pixels."""
    dataset = _capture(options, "capture", modality="OT")
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    _add_bytes(dataset, np.stack([_ramp(shape), _ramp(shape).T.reshape(shape), _ramp(shape)[::-1]], axis=-1))
    return save(dataset, folder / f"S{options.series_number:03d}_capture.dcm", _plain(options))


def write_dose_report_screen(folder: Path, options: SeriesOptions, *, shape: tuple[int, int] = (24, 32)) -> Path:
    """Write a screen of the scanner as a grey picture of the scan's modality: DERIVED, SECONDARY, SCREEN SAVE."""
    dataset = _capture(options, "dose", modality=options.modality)
    dataset.ImageType = ["DERIVED", "SECONDARY", "SCREEN SAVE"]
    dataset.SeriesDescription, dataset.BurnedInAnnotation = "Dose Report", "YES"
    _add_bytes(dataset, _ramp(shape)[..., None])
    return save(dataset, folder / f"S{options.series_number:03d}_dose.dcm", _plain(options))


def write_text_report(folder: Path, options: SeriesOptions, *, text: str = "Nothing was seen.") -> Path:
    """Write a structured report, which has no pixels: one container with one text."""
    dataset = make_dataset(options, BASIC_TEXT_REPORT, options.instance_uid("report"), modality="SR")
    dataset.InstanceNumber, dataset.CompletionFlag, dataset.VerificationFlag = 1, "COMPLETE", "UNVERIFIED"
    dataset.ReferencedPerformedProcedureStepSequence, dataset.PerformedProcedureCodeSequence = [], []
    dataset.ValueType, dataset.ContinuityOfContent = "CONTAINER", "SEPARATE"
    dataset.ConceptNameCodeSequence = [make_code("121111", "DCM", "Summary")]
    item = Dataset()
    item.RelationshipType, item.ValueType, item.TextValue = "CONTAINS", "TEXT", text
    item.ConceptNameCodeSequence = [make_code("121071", "DCM", "Finding")]
    dataset.ContentSequence = [item]
    return save(dataset, folder / f"S{options.series_number:03d}_report.dcm", _plain(options))


def make_structure_set(options: SeriesOptions, label: str) -> Dataset:
    """An RTSTRUCT without structures, in the study and the frame of reference of `options`."""
    dataset = make_dataset(
        options, "1.2.840.10008.5.1.4.1.1.481.3", options.instance_uid(f"structures {label}"), modality="RTSTRUCT"
    )
    dataset.SeriesInstanceUID = make_uid("structures", options.series_uid, label)
    add_frame_of_reference(dataset, options)
    dataset.StructureSetLabel, dataset.StructureSetDate, dataset.StructureSetTime = label, DATE, TIME
    dataset.InstanceNumber, dataset.ApprovalStatus = 1, "UNAPPROVED"
    return dataset


def _capture(options: SeriesOptions, name: str, *, modality: str) -> Dataset:
    dataset = make_dataset(options, SECONDARY_CAPTURE, options.instance_uid(name), modality=modality)
    dataset.InstanceNumber, dataset.ConversionType, dataset.PatientOrientation = 1, "WSD", None
    return dataset


def _plain(options: SeriesOptions) -> SeriesOptions:
    return replace(options, transfer_syntax="explicit_le")


def _ramp(shape: tuple[int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return (np.arange(shape[0] * shape[1]) % 251).astype(np.uint8).reshape(shape)


def _add_bytes(dataset: Dataset, picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    """(rows, columns, samples) bytes without compression."""
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = picture.shape
    dataset.PhotometricInterpretation = "RGB" if picture.shape[2] == 3 else "MONOCHROME2"
    if picture.shape[2] > 1:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    data = picture.tobytes()
    dataset.PixelData = data + bytes(len(data) % 2)
    dataset["PixelData"].VR = "OB"
