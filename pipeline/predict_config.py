"""Options of `voxfit predict`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.option_checks import Auto, Checked, at_least, parse_bytes, parse_share, share_problems


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Checked):
    """Segment volumes with a trained run."""

    run_dir: str
    """The run folder."""
    input: str
    """A NIfTI file, a folder of them (channels by suffix _0000, _0001), a dataset, or a folder with DICOM series."""
    cases: Literal["all", "held_out"] = "all"
    """Which of them: all, or those that the run held out for validation (of the dataset that it was trained on)."""
    output: str
    """Folder for the segmentations, one file per case."""
    format: Literal["nifti", "dicom_seg", "both"] = "nifti"
    """What is written: NIfTI, a DICOM segmentation in the study of its DICOM series, or both of them."""
    channels: str = ""
    """DICOM series of each channel, as in "CT,PT": modalities or patterns for SeriesDescription; by default by name."""
    allow_tilt: bool = False
    """Resample DICOM series whose slices are shifted by a tilted gantry, instead of failing on them."""
    checkpoint: Literal["best", "last"] = "best"
    """Which weights."""
    overlap: float = 0.5
    """Share of the window that neighbouring windows have in common."""
    tta: Literal["none", "mirror"] = "none"
    """Average over mirrored inputs: up to eight times the work."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the network runs."""
    num_threads: int | Auto = "auto"
    """Threads of the network on a CPU; auto takes the allotted CPUs."""
    window_batch: int | Auto = "auto"
    """Windows that are computed at once: on a GPU in one batch, on a CPU each on cores of its own; auto takes what the
    memory is enough for. The result does not depend on it on a CPU, on a GPU to rounding."""
    skip_air: bool = False
    """Take windows for background, without the network, that hold one value only and that below the image's mean, as
    air of a CT that is clipped: less time for scans with wide margins."""
    seams: bool = False
    """Say on which share of the segmented voxels overlapping windows disagree, and warn where it is large."""
    max_ram: str = "auto"
    """Host memory that the whole process may hold, such as 8GiB: larger volumes are divided, at the same result and
    more time; auto takes a share of the memory that this job was allotted."""
    shard: str = ""
    """Segment one share of the cases only, as in 3/16: jobs on any number of nodes may fill one folder at a time."""
    overwrite: bool = False
    """Segment again what is already in the output folder."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `key: problem`."""
        found = [] if 0 <= self.overlap < 1 else [f"overlap: must be from 0 to below 1, got {self.overlap}"]
        if self.max_ram != "auto" and not parse_bytes(self.max_ram):
            found.append(f"max_ram: must be an amount of memory such as 8GiB, or auto, got {self.max_ram}")
        return found + at_least(self, 1, "num_threads", "window_batch") + share_problems(self.shard)

    @property
    def share(self) -> tuple[int, int] | None:
        """Number and count of the shares in `shard`; None without."""
        return parse_share(self.shard)

    @property
    def max_ram_bytes(self) -> int | None:
        """`max_ram` in bytes; None where it is for the machine to say."""
        return None if self.max_ram == "auto" else parse_bytes(self.max_ram)
