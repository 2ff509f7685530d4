"""Options of `voxfit evaluate`."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.checks import Auto, Checked, at_least


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Checked):
    """Score predictions against labels, per case and class."""

    predictions: str
    """Folder of predicted segmentations."""
    labels: str
    """Folder of reference labels with the same file names, or a dataset."""
    out: str = "metrics.json"
    """Where the metrics are written, as JSON; NAME_cases.csv lies beside it with a row per case and class."""
    report: str = ""
    """Write a self-contained HTML report here as well."""
    images: str = ""
    """Folder of images, or a dataset, for the slices in the report."""
    run_dir: str = ""
    """A run folder whose training curves go into the report."""
    tolerance_mm: float = 1.0
    """Tolerance of the normalised surface distance."""
    patient_pattern: str = ""
    """Regular expression on the case id whose first group is the patient, as in training; by default the dataset tells.
    Cases of a patient are drawn together for the intervals of the means."""
    seed: int = 0
    """Seed of these intervals (bootstrap)."""
    num_workers: int | Auto = "auto"
    """Processes; auto takes the CPUs this job was allotted."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `key: problem`."""
        found = [] if self.out.endswith(".json") else [f"out: must end in .json, got {self.out}"]
        return found + at_least(self, 0, "tolerance_mm", "seed") + at_least(self, 1, "num_workers")
