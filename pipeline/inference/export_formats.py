"""What can be written of a case, and under which names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pipeline.config import PredictConfig

OutputFormat = Literal["nifti", "dicom_seg", "probabilities_nifti", "probabilities_blosc2", "entropy", "variance"]
NIFTI_PROBABILITIES: Literal["probabilities_nifti"] = "probabilities_nifti"
BLOSC2: Literal["probabilities_blosc2"] = "probabilities_blosc2"
ENTROPY: Literal["entropy"] = "entropy"
VARIANCE: Literal["variance"] = "variance"

FORMATS: dict[str, tuple[OutputFormat, ...]] = {
    "nifti": ("nifti",),
    "dicom_seg": ("dicom_seg",),
    "both": ("nifti", "dicom_seg"),
}
PROBABILITY_FORMATS: dict[str, tuple[OutputFormat, ...]] = {
    "none": (),
    "nifti": (NIFTI_PROBABILITIES,),
    "blosc2": (BLOSC2,),
}
UNCERTAINTY_FORMATS: dict[str, tuple[OutputFormat, ...]] = {
    "none": (),
    "entropy": (ENTROPY,),
    "variance": (VARIANCE,),
}
# Folders of their own: a folder of segmentations holds one NIfTI file per case and nothing else.
FOLDERS: dict[OutputFormat, str] = {
    NIFTI_PROBABILITIES: "probabilities",
    BLOSC2: "probabilities",
    ENTROPY: "uncertainty",
    VARIANCE: "uncertainty",
}
SUFFIXES: dict[OutputFormat, str] = {"dicom_seg": ".dcm", BLOSC2: ".b2nd"}


def output_formats(config: PredictConfig) -> tuple[OutputFormat, ...]:
    """All that is asked for."""
    return (
        *FORMATS[config.format],
        *PROBABILITY_FORMATS[config.save_probabilities],
        *UNCERTAINTY_FORMATS[config.uncertainty],
    )


def output_files(case_id: str, folder: Path, formats: Sequence[OutputFormat]) -> dict[OutputFormat, Path]:
    """The files of a case by format."""
    return {kind: folder / FOLDERS.get(kind, "") / f"{case_id}{SUFFIXES.get(kind, '.nii.gz')}" for kind in formats}
