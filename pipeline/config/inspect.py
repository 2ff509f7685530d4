"""Options of `voxfit inspect`."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.checks import Auto, Checked


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Checked):
    """Show what a dataset or a tree of DICOM files holds and every problem found in it."""

    path: str
    """A dataset (MSD or nnU-Net folder, dataset.json, CSV or JSON list), or a folder with DICOM series at any depth."""
    json: bool = False
    """Print JSON instead of a table."""
    num_workers: int | Auto = "auto"
    """Processes that read cases; auto takes the CPUs this job was allotted."""
    write_dataset: str = ""
    """Make the DICOM series a dataset: the dataset.json to write; references to the series lie beside it."""
    channels: str = ""
    """Series of each channel: CT, MR, PT or patterns for SeriesDescription, as in "CT,PT"; by default one modality."""
    classes: str = ""
    """Structures of each class, as in "tumour=GTV*|Mass,liver=Liver"; by default every name is a class."""
    threshold: float = 0.5
    """Fraction from which on a voxel of a fractional DICOM segmentation is inside."""
    allow_tilt: bool = False
    """Resample DICOM series whose slices are shifted by a tilted gantry, instead of refusing them."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `key: problem`."""
        wrong = not 0 < self.threshold <= 1
        return [f"threshold: must be above 0 and at most 1, got {self.threshold}"] if wrong else []
