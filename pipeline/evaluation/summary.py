"""The metrics artifact: scores per case and class, what they sum up to, and its JSON and CSV files."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipeline.artifacts import write_artifact, write_text
from pipeline.evaluation.bootstrap import Interval, IntervalMethod, interval_method, mean_intervals
from pipeline.evaluation.metrics import METRIC_NAMES, ClassScores, Score
from pipeline.plan import Record


@dataclass(frozen=True, kw_only=True)
class CaseScores(Record):
    """All classes of one case."""

    case_id: str
    classes: dict[str, ClassScores]


@dataclass(frozen=True, kw_only=True)
class Summary(Record):
    """One metric over the cases in which it has a value.

    Attributes:
        mean, median: NaN without any such case.
        std: Sample standard deviation (n - 1); NaN below two cases.
        num_cases: Cases with a value.
        interval: Of the mean; without numbers in files of earlier versions.
    """

    mean: Score
    median: Score
    std: Score
    num_cases: int
    interval: Interval = field(default_factory=Interval)


@dataclass(frozen=True, kw_only=True)
class ClassSummary(Record):
    """One class over all cases.

    Attributes:
        metrics: By metric name.
        num_missed: Cases that have the class, and no voxel of it was predicted.
        num_invented: Cases without the class, and some voxel of it was predicted.
        num_absent: Cases without the class, rightly predicted so: they count in no metric but the volume error.
    """

    metrics: dict[str, Summary]
    num_missed: int
    num_invented: int
    num_absent: int


@dataclass(frozen=True, kw_only=True)
class FoldMeans(Record):
    """One fold of a cross-validation.

    Attributes:
        num_cases: Cases that it held out and that were scored.
        overall: By metric name, over its own cases what `Metrics.overall` is over all.
        dice: By class name, mean Dice over its own cases.
    """

    num_cases: int
    overall: dict[str, Score]
    dice: dict[str, Score]


@dataclass(frozen=True, kw_only=True)
class Metrics(Record):
    """Everything `voxfit evaluate` found.

    Attributes:
        tolerance_mm: Of the normalised surface distance.
        labels: Value in the files by class name, without background.
        overall: By metric name, the mean over classes of each class's mean over its cases: every class weighs the
            same, however rare it is.
        by_class: By class name.
        cases: By rising case id.
        failures: Reason by case id, for cases that could not be scored.
        overall_intervals: Intervals of `overall`, by metric name.
        intervals: How all intervals were made; None in files of earlier versions and without cases.
        folds: By name, where the cases are those of a whole cross-validation.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1
    tolerance_mm: float
    labels: dict[str, int]
    overall: dict[str, Score]
    by_class: dict[str, ClassSummary]
    cases: tuple[CaseScores, ...]
    failures: dict[str, str]
    overall_intervals: dict[str, Interval] = field(default_factory=dict)
    intervals: IntervalMethod | None = None
    folds: dict[str, FoldMeans] = field(default_factory=dict)


def make_metrics(
    cases: Sequence[CaseScores],
    *,
    labels: Mapping[str, int],
    tolerance_mm: float,
    failures: Mapping[str, str],
    patients: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Metrics:
    """Sum up scored cases.

    Args:
        cases: Each with all classes of `labels`, in any order.
        labels: Value by class name, without background.
        tolerance_mm: As scored with.
        failures: Reason by case id.
        patients: Patient by case id, where known: cases of a patient are drawn together for the intervals.
        seed: Of the intervals.
    """
    ordered = tuple(sorted(cases, key=lambda case: case.case_id))
    by_class = {name: _sum_up_class([case.classes[name] for case in ordered]) for name in labels}
    overall = {
        metric: _mean([summary.metrics[metric].mean for summary in by_class.values()]) for metric in METRIC_NAMES
    }
    metrics = Metrics(
        tolerance_mm=tolerance_mm,
        labels=dict(labels),
        overall=overall,
        by_class=by_class,
        cases=ordered,
        failures=dict(sorted(failures.items())),
    )
    groups = [(patients or {}).get(case.case_id) or case.case_id for case in ordered]
    return _with_intervals(metrics, groups, seed) if ordered and labels else metrics


def _with_intervals(metrics: Metrics, groups: Sequence[str], seed: int) -> Metrics:
    by_class, overall = dict(metrics.by_class), {}
    for metric in METRIC_NAMES:
        values = [[getattr(case.classes[name], metric) for name in metrics.labels] for case in metrics.cases]
        columns, overall[metric] = mean_intervals(np.array(values, dtype=np.float64), groups, seed=seed)
        for name, interval in zip(metrics.labels, columns, strict=True):
            known = by_class[name].metrics
            summary = replace(known[metric], interval=interval)
            by_class[name] = replace(by_class[name], metrics={**known, metric: summary})
    method = interval_method(groups, seed=seed)
    return replace(metrics, by_class=by_class, overall_intervals=overall, intervals=method)


def pool_metrics(folds: Mapping[str, Metrics], *, patients: Mapping[str, str] | None = None) -> Metrics:
    """The scores of all folds of a cross-validation as those of one evaluation, and each fold's own means.

    Args:
        folds: By name; every case is in one of them only, and all are scored with the same classes and tolerance.
        patients: As of `make_metrics`.
    """
    first = next(iter(folds.values()))
    pooled = make_metrics(
        [case for metrics in folds.values() for case in metrics.cases],
        labels=first.labels,
        tolerance_mm=first.tolerance_mm,
        failures={case: reason for metrics in folds.values() for case, reason in metrics.failures.items()},
        patients=patients,
    )
    return replace(pooled, folds={name: _fold_means(metrics) for name, metrics in folds.items()})


def _fold_means(metrics: Metrics) -> FoldMeans:
    dice = {name: summary.metrics["dice"].mean for name, summary in metrics.by_class.items()}
    return FoldMeans(num_cases=len(metrics.cases), overall=metrics.overall, dice=dice)


def _sum_up_class(scores: Sequence[ClassScores]) -> ClassSummary:
    present = [(score.prediction_ml > 0, score.reference_ml > 0) for score in scores]
    return ClassSummary(
        metrics={name: _sum_up([getattr(score, name) for score in scores]) for name in METRIC_NAMES},
        num_missed=present.count((False, True)),
        num_invented=present.count((True, False)),
        num_absent=present.count((False, False)),
    )


def _sum_up(values: Sequence[float]) -> Summary:
    known = np.array([value for value in values if not np.isnan(value)])
    return Summary(
        mean=_mean(known),
        median=float(np.median(known)) if len(known) else float("nan"),
        std=float(np.std(known, ddof=1)) if len(known) > 1 else float("nan"),
        num_cases=len(known),
    )


def _mean(values: Sequence[float] | np.typing.NDArray[np.float64]) -> float:
    """Mean of the values that are not NaN; NaN when there is none."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def write_metrics(path: Path, metrics: Metrics) -> None:
    """Write `path` as JSON (NaN as null), and beside it `<name>_cases.csv`: a row per case and class.

    The CSV has a name of its own so that it never takes the place of a run's `metrics.csv`.
    """
    write_artifact(path, metrics)
    write_text(path.with_name(f"{path.stem}_cases.csv"), _to_csv(metrics))


def _to_csv(metrics: Metrics) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case_id", "class", *METRIC_NAMES])
    for case in metrics.cases:
        for name, scores in case.classes.items():
            values = [getattr(scores, metric) for metric in METRIC_NAMES]
            writer.writerow([case.case_id, name, *("" if np.isnan(v) else f"{v:.6g}" for v in values)])
    return text.getvalue()
