"""What a dataset is: cases with images and labels, the names of channels and classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class SeriesOrigin:
    """A DICOM series as a person knows it; nothing in it tells the patient.

    Attributes:
        name: As messages name it: `series 3 "T1 post" (MR, 4f2a9c81)`.
        place: How large it is and where: `120 slices in head/T1`.
    """

    name: str
    place: str

    def __str__(self) -> str:
        return f"{self.name.removesuffix(')')}; {self.place})"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One examination: the image, in one or several channels, and its label.

    Attributes:
        case_id: Unique in the dataset and safe as a file name.
        images: One file per channel, or one 4D file that holds all channels; empty when the image is missing.
        label: The label file; None when it is missing, or when the case is to be predicted.
        patient: Whom the case shows; "" is unknown, and the case then counts as a patient of its own.
        origins: DICOM series that it was found as, one per channel; empty for cases that a dataset or a file names.
    """

    case_id: str
    images: tuple[Path, ...]
    label: Path | None
    patient: str = ""
    origins: tuple[SeriesOrigin, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Cases and what their voxels mean, whatever layout they came in.

    Attributes:
        name: The dataset's own name, or that of its folder or file.
        root: Folder that paths in the dataset file are relative to.
        channel_names: One per channel, in order.
        labels: Class name -> value in the label files, by rising value; background (0) is first. A class's index
            is its position here.
        ignore_value: Value of voxels that are neither trained on nor scored; None when there is none.
        cases: Training cases, sorted by id; incomplete ones are kept so that the integrity check can name them.
        test_cases: Cases to predict.
        unlisted_files: Volumes in the dataset's own folders that no case uses.
    """

    name: str
    root: Path
    channel_names: tuple[str, ...]
    labels: dict[str, int]
    ignore_value: int | None
    cases: tuple[Case, ...]
    test_cases: tuple[Case, ...]
    unlisted_files: tuple[Path, ...] = ()
