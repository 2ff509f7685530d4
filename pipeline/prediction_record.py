"""How each case was segmented: a small file per case, beside the predictions, so that shares may fill one folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.artifacts import read_artifact
from pipeline.errors import InputError
from pipeline.log import get_logger
from pipeline.plan import Record

FOLDER = "records"
# Share of voxels on which overlapping windows disagree that is warned of. Measured on the hippocampus: 5 % with windows
# of the size that the network was trained on; 44 % and 0.05 less Dice with windows of 0.58 of its voxels.
MANY_SEAMS = 0.25


@dataclass(frozen=True, kw_only=True)
class MadeFrom(Record):
    """What a segmentation follows from.

    Attributes:
        model: Weights and options of the prediction by their names, in words; weights are a hash of all of them.
        image_bytes: Size of all files of the image.
        image_hash: Of their content.
    """

    model: dict[str, str]
    image_bytes: int
    image_hash: str


@dataclass(frozen=True, kw_only=True)
class PredictionRecord(Record):
    """What the segmentation of one case took and what was found out on the way.

    Attributes:
        case_id: Of the case.
        seconds: From the prepared image to class values, beside whatever other cases were computed then.
        windows: That it was divided into, of all networks; those that two blocks need count twice.
        air_windows: Those of them that were taken for background without the network.
        compared_voxels: Voxels of the prepared image that several windows cover and one of them does not call
            background; None where they were not counted.
        disagreeing_voxels: Those of them to which two windows give different classes.
        made_from: Model and image; None in records of earlier versions.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1
    case_id: str
    seconds: float
    windows: int
    air_windows: int = 0
    compared_voxels: int | None = None
    disagreeing_voxels: int | None = None
    made_from: MadeFrom | None = None

    @property
    def seam_share(self) -> float | None:
        """Share of the compared voxels on which windows disagree; None where none were compared."""
        if not self.compared_voxels or self.disagreeing_voxels is None:
            return None
        return self.disagreeing_voxels / self.compared_voxels

    @property
    def has_many_seams(self) -> bool:
        """Whether the result depends on where windows lie to a degree that is warned of."""
        return (self.seam_share or 0) > MANY_SEAMS


def record_path(predictions: Path, case_id: str) -> Path:
    """Where the record of a case is, beside its segmentation."""
    return predictions / FOLDER / f"{case_id}.json"


def read_records(predictions: Path, case_ids: Iterable[str]) -> dict[str, PredictionRecord]:
    """Records by case id, of the cases that have one. One that cannot be read is warned of and left out.

    Args:
        predictions: Folder of segmentations.
        case_ids: Which cases.
    """
    found = {}
    for case_id in case_ids:
        path = record_path(predictions, case_id)
        if not path.is_file():
            continue
        try:
            found[case_id] = read_artifact(path, PredictionRecord)
        except InputError as error:
            get_logger().warning("left out: %s", error)
    return found
