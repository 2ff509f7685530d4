"""Options of `voxfit predict`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.checks import Auto, Checked, as_words, at_least, parse_share, repeated, share_problems
from pipeline.sizes import parse_bytes


@dataclass(frozen=True, kw_only=True)
class PredictOptions(Checked):
    """How trained runs are asked, whatever is segmented."""

    checkpoint: Literal["best", "last"] = "best"
    """Which weights."""
    overlap: float = 0.5
    """Share of the window that neighbouring windows have in common."""
    tta: Literal["none", "mirror"] = "none"
    """Average over mirrored inputs, in all combinations of axes: up to eight times the work."""
    tta_axes: tuple[int, ...] | Auto = "auto"
    """Axes that mirror is for, as in 0 1; auto takes those that training mirrored."""
    postprocess: Literal["auto", "none"] = "auto"
    """auto does what `voxfit postprocess` chose for the run, of several runs if it is the same for all, and never to
    cases held_out, by which it was chosen."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the network runs."""
    num_threads: int | Auto = "auto"
    """Threads of the network on a CPU; auto takes the allotted CPUs, or as many as OMP_NUM_THREADS allows."""
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

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `key: problem`."""
        found = [] if 0 <= self.overlap < 1 else [f"overlap: must be from 0 to below 1, got {self.overlap}"]
        if self.max_ram != "auto" and not parse_bytes(self.max_ram):
            found.append(f"max_ram: must be an amount of memory such as 8GiB, or auto, got {self.max_ram}")
        if not isinstance(self.tta_axes, str):
            if not self.tta_axes or not set(self.tta_axes) <= {0, 1, 2}:
                found.append(f"tta_axes: must be some of 0, 1 and 2, or auto, got {list(self.tta_axes)}")
            if self.tta == "none":
                found.append("tta_axes: goes with tta mirror")
        return found + at_least(self, 1, "num_threads", "window_batch")

    @property
    def max_ram_bytes(self) -> int | None:
        """`max_ram` in bytes; None where it is for the machine to say."""
        return None if self.max_ram == "auto" else parse_bytes(self.max_ram)


@dataclass(frozen=True, kw_only=True)
class PredictConfig(PredictOptions):
    """Segment volumes with a trained run, or with several as one."""

    run_dir: tuple[str, ...] | str
    """The run folder, or several, as those of all folds: the probabilities of their networks are averaged."""
    input: str
    """A NIfTI file, a folder of them (channels by suffix _0000, _0001), a dataset, or a folder with DICOM series."""
    cases: Literal["all", "held_out"] = "all"
    """Which of them: all, or those that the run held out for validation (of the dataset that it was trained on)."""
    output: str
    """Folder for the segmentations, one file per case."""
    format: Literal["nifti", "dicom_seg", "both"] = "nifti"
    """What is written: NIfTI, a DICOM segmentation in the study of its DICOM series, or both of them."""
    save_probabilities: Literal["none", "nifti", "blosc2"] = "none"
    """Write the probabilities of all classes as well, into the folder probabilities."""
    uncertainty: Literal["none", "entropy", "variance"] = "none"
    """Write a map of it as well, into the folder uncertainty: entropy of the probabilities, from 0 to 1, or their
    variance over several runs."""
    channels: str = ""
    """DICOM series of each channel, as in "CT,PT": modalities or patterns for SeriesDescription; by default by name."""
    allow_tilt: bool = False
    """Resample DICOM series whose slices are shifted by a tilted gantry, instead of failing on them."""
    shard: str = ""
    """Segment one share of the cases only, as in 3/16: jobs on any number of nodes may fill one folder at a time."""
    overwrite: bool = False
    """Segment again what is already in the output folder."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `key: problem`."""
        found = super().problems() + repeated(self, "run_dir") + share_problems(self.shard)
        if self.uncertainty == "variance" and len(self.run_dirs) < 2:
            found.append("uncertainty: variance is over several runs, and run_dir names one; entropy needs one only")
        return found

    @property
    def share(self) -> tuple[int, int] | None:
        """Number and count of the shares in `shard`; None without."""
        return parse_share(self.shard)

    @property
    def run_dirs(self) -> tuple[str, ...]:
        """All run folders."""
        return as_words(self.run_dir)
