"""The comparison artifact: trainings side by side, and how their scores differ case by case."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from pipeline.evaluation.bootstrap import Interval, IntervalMethod
from pipeline.evaluation.metrics import NAN, Score
from pipeline.plan import Record

ScoreSource = Literal["final", "training"]
# Metric, case and class to a value; NaN where there is none.
ScoreTable = dict[str, dict[str, dict[str, Score]]]
MEAN_ROW = "mean over classes"
# What p is held against, and the fewest units that differ of which it can fall below that: 2 ** (1 - 6) is 0.03.
SIGNIFICANT_P, FEWEST_FOR_TEST = 0.05, 6


@dataclass(frozen=True, kw_only=True)
class ComparedRun(Record):
    """One training as its run folder tells it, or the folds of a work folder as one.

    Attributes:
        name: The shortest end of its path that tells it from the others.
        folder: Its path as it was given.
        num_folds: Trainings that it stands for.
        state: "finished", or what else `voxfit status` says; of several folds how many are, and what the others are.
        dataset_name, fingerprint_hash: Of its plan.
        fold: Held out, or "all" for a training on every case, or those of a work folder such as "0, 1, 2".
        device, precision: What it ran on and computed in.
        epoch, max_epochs, iteration, optimizer_step, samples: Finished; samples are patches, over all processes.
        best_epoch, best_dice: The best validation of the training.
        train_seconds, validation_seconds: Sums over the finished epochs.
        seconds_per_step: Of the training alone; None before the first step.
        wall_seconds: Of all starts, saves and what else lies between included; None where that was not counted.
        peak_vram_bytes, peak_ram_bytes: The largest of all epochs; None where it is 0 or unknown.
        predicted_bytes, measured_bytes: As in `run.json`.
        step_downs: Every out-of-memory that it went on from, in a sentence.
        class_names: Foreground classes.
        settings: Options (`option.`), plan (`plan.`) and what they came to (`run.`), as text by dotted key.
        curves: Columns over epochs; besides those of `metrics.csv` `samples` and, summed up, `hours`.
        scores: By where they are from.
        patients: Patient by case, where that is known.
        tolerance_mm: Of the final NSD; None without final scores.
    """

    name: str
    folder: str
    num_folds: int = 1
    state: str
    dataset_name: str
    fingerprint_hash: str
    fold: int | str
    device: str
    precision: str
    epoch: int = 0
    max_epochs: int | None = None
    iteration: int = 0
    optimizer_step: int = 0
    samples: int = 0
    best_epoch: int | None = None
    best_dice: float | None = None
    train_seconds: float = 0.0
    validation_seconds: float = 0.0
    seconds_per_step: float | None = None
    wall_seconds: float | None = None
    peak_vram_bytes: int | None = None
    peak_ram_bytes: int | None = None
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    step_downs: tuple[str, ...] = ()
    class_names: tuple[str, ...]
    settings: dict[str, str] = field(default_factory=dict)
    curves: dict[str, tuple[Score, ...]] = field(default_factory=dict)
    scores: dict[ScoreSource, ScoreTable] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    tolerance_mm: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunMeans(Record):
    """What a run's cases come to in one metric.

    Attributes:
        num_cases: Cases that were scored.
        means: By class, and over classes (`MEAN_ROW`): of class means, as in `metrics.json`.
        intervals: Of these means.
    """

    num_cases: int
    means: dict[str, Score]
    intervals: dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class Difference(Record):
    """How one class differs between two runs, over the cases in which both have a value.

    Attributes:
        name: The class, or `MEAN_ROW`: each case's mean over the classes that have a value in both.
        num_cases: Cases.
        first, second: Mean of each run over them.
        difference: Mean of second - first.
        interval: Of the difference.
        num_higher, num_lower, num_equal: Cases in which the second run's value is higher, lower, the same.
        num_units: Cases, or patients where some have several cases: what the test counts.
        p: Two-sided Wilcoxon signed-rank test, units without a difference left out; NaN without any unit.
        smallest_p: What p would be at the least with so many units that differ.
        adjusted_p: Over all pairs (Holm 1979), for each metric: rows of the mean by themselves, classes as well.
    """

    name: str
    num_cases: int
    first: Score = NAN
    second: Score = NAN
    difference: Score = NAN
    interval: Interval = field(default_factory=Interval)
    num_higher: int = 0
    num_lower: int = 0
    num_equal: int = 0
    num_units: int = 0
    p: Score = NAN
    smallest_p: Score = NAN
    adjusted_p: Score = NAN


@dataclass(frozen=True, kw_only=True)
class RunPair(Record):
    """Two runs, case by case.

    Attributes:
        first, second: Names.
        not_paired: Why they were not; "" where they were.
        warning: What the reader should know of the pairing, or "".
        num_common, num_only_first, num_only_second: Cases that both have scored, or only one.
        intervals: How they were made; None where nothing was paired.
        metrics: By metric, a row for the mean and one per class.
    """

    first: str
    second: str
    not_paired: str = ""
    warning: str = ""
    num_common: int = 0
    num_only_first: int = 0
    num_only_second: int = 0
    intervals: IntervalMethod | None = None
    metrics: dict[str, tuple[Difference, ...]] = field(default_factory=dict)

    @property
    def doubt(self) -> str:
        """Why no outcome could have decided between the two, by their mean Dice; "" where one could."""
        rows = self.metrics.get("dice", ())
        if not rows or not rows[0].smallest_p >= SIGNIFICANT_P:
            return ""
        num_units, unit = rows[0].num_units, self.intervals.unit if self.intervals else "case"
        least = f"p cannot fall below {rows[0].smallest_p:.2g}"
        if num_units >= FEWEST_FOR_TEST:
            return f"too few of the {num_units} {unit}s differ to decide anything: {least}"
        enough = f"It takes {FEWEST_FOR_TEST} for a p below {SIGNIFICANT_P:g}"
        if num_units == 1:
            return f"1 {unit} is too few to decide anything: {least}. {enough}"
        many = f"{num_units} {unit}s are too few to decide anything"
        return f"{many}: whatever they differ by, {least}, and the interval is too narrow. {enough}"


@dataclass(frozen=True, kw_only=True)
class Comparison(Record):
    """Everything `voxfit compare` found.

    Attributes:
        source: Which scores were compared.
        source_note: Why these, in a sentence.
        seed: Of the bootstrap.
        runs: In the order given.
        means: By run and metric.
        different_settings: Those that differ: a value per run, None where a run has none.
        pairs: Every other run with the first.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1
    source: ScoreSource
    source_note: str
    seed: int
    runs: tuple[ComparedRun, ...]
    means: dict[str, dict[str, RunMeans]]
    different_settings: dict[str, tuple[str | None, ...]]
    pairs: tuple[RunPair, ...]


def mean_known(values: Iterable[float]) -> float:
    """The mean of the values that there are; NaN without any."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else NAN
