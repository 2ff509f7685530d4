"""Put runs side by side: which settings differ, what each scores, and how they differ case by case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from pipeline.errors import InputError
from pipeline.evaluation.bootstrap import Interval, Values, interval_method, mean_intervals
from pipeline.evaluation.comparison import (
    MEAN_ROW,
    ComparedRun,
    Comparison,
    Difference,
    RunMeans,
    RunPair,
    ScoreSource,
    mean_known,
)
from pipeline.evaluation.paired_tests import holm, signed_rank_p, unit_means

CaseTable = Mapping[str, Mapping[str, float]]


def compare_runs(
    runs: Sequence[ComparedRun], *, scores: Literal["auto", "final", "training"] = "auto", seed: int = 0
) -> Comparison:
    """Compare runs with the first of them.

    Args:
        runs: With different names.
        scores: Which scores: `auto` takes the final ones if every run that was scored at all has them.
        seed: Of the bootstrap.

    Raises:
        InputError: Final scores are asked for and a run has none.
    """
    source, note = _choose_source(runs, scores)
    means = {
        run.name: {metric: _means(run, table, seed) for metric, table in run.scores.get(source, {}).items()}
        for run in runs
    }
    pairs = [_pair(runs[0], run, source, seed) for run in runs[1:]]
    return Comparison(
        source=source,
        source_note=note,
        seed=seed,
        runs=tuple(runs),
        means=means,
        different_settings=_different_settings(runs),
        pairs=tuple(_adjusted(pairs)),
    )


def _choose_source(runs: Sequence[ComparedRun], wanted: str) -> tuple[ScoreSource, str]:
    without = [run.name for run in runs if "final" not in run.scores]
    if wanted == "final" and without:
        raise InputError(
            f"no final scores (metrics.json): {', '.join(without)}",
            where="scores final",
            fix="Predict and evaluate their held-out cases, or use --scores training",
        )
    scored = [run for run in runs if run.scores]
    if wanted != "training" and scored and all("final" in run.scores for run in scored):
        text = "predictions of the held-out cases on their own grids (metrics.json)"
        return "final", text + _tolerances(runs)
    text = "the validation of the best weights on the grid of the store (run.json)"
    lacking = [run.name for run in scored if "final" not in run.scores]
    if wanted == "auto" and len(lacking) < len(scored):
        text += f"; final scores are missing in {', '.join(lacking)}"
    return "training", text


def _tolerances(runs: Sequence[ComparedRun]) -> str:
    """What to say where surfaces were not held against the same distance; "" where they were."""
    known = {run.name: run.tolerance_mm for run in runs if run.tolerance_mm is not None}
    if len(set(known.values())) < 2:
        return ""
    return "; NSD at " + ", ".join(f"{tolerance:g} mm in {name}" for name, tolerance in known.items())


def _different_settings(runs: Sequence[ComparedRun]) -> dict[str, tuple[str | None, ...]]:
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: tuple(run.settings.get(key) for run in runs) for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


def _array(table: CaseTable, cases: Sequence[str], classes: Sequence[str]) -> Values:
    """(cases, classes); NaN where there is no value."""
    rows = [[table[case].get(name, np.nan) for name in classes] for case in cases]
    return np.array(rows, dtype=np.float64).reshape(len(cases), len(classes))


def _means(run: ComparedRun, table: CaseTable, seed: int) -> RunMeans:
    cases = sorted(table)
    values = _array(table, cases, run.class_names)
    by_class = {name: mean_known(values[:, i].tolist()) for i, name in enumerate(run.class_names)}
    intervals, overall = mean_intervals(values, _groups(cases, run.patients), seed=seed)
    return RunMeans(
        num_cases=len(cases),
        means={MEAN_ROW: mean_known(by_class.values()), **by_class},
        intervals={MEAN_ROW: overall, **dict(zip(run.class_names, intervals, strict=True))},
    )


def _groups(cases: Sequence[str], patients: Mapping[str, str]) -> list[str]:
    return [patients.get(case) or case for case in cases]


def _pair(first: ComparedRun, second: ComparedRun, source: ScoreSource, seed: int) -> RunPair:
    pair = RunPair(first=first.name, second=second.name)
    if first.dataset_name != second.dataset_name:
        return replace(pair, not_paired=f"other datasets ({first.dataset_name}, {second.dataset_name})")
    tables = [run.scores.get(source, {}) for run in (first, second)]
    without = [run.name for run, table in zip((first, second), tables, strict=True) if not table]
    if without:
        return replace(pair, not_paired=f"no scored cases in {' and '.join(without)}")
    cases = [set(table["dice"]) for table in tables]
    pair = replace(
        pair,
        num_common=len(cases[0] & cases[1]),
        num_only_first=len(cases[0] - cases[1]),
        num_only_second=len(cases[1] - cases[0]),
    )
    if not pair.num_common:
        folds = f" (folds {first.fold} and {second.fold})" if first.fold != second.fold else ""
        return replace(pair, not_paired=f"no case was scored by both{folds}")
    return _paired(pair, first, second, source, seed)


def _paired(pair: RunPair, first: ComparedRun, second: ComparedRun, source: ScoreSource, seed: int) -> RunPair:
    tables = [run.scores[source] for run in (first, second)]
    common = sorted(set(tables[0]["dice"]) & set(tables[1]["dice"]))
    classes = [name for name in first.class_names if name in second.class_names]
    if not classes:
        return replace(pair, not_paired="no class is common to both")
    groups = _groups(common, {**second.patients, **first.patients})
    metrics = {}
    # NSD at two tolerances are two metrics.
    left_out = ("nsd",) if first.tolerance_mm != second.tolerance_mm else ()
    for metric in (name for name in tables[0] if name in tables[1] and name not in left_out):
        sides = [_array(table[metric], common, classes) for table in tables]
        metrics[metric] = _differences(sides[0], sides[1], classes, groups, seed)
    return replace(
        pair, warning=_warning(first, second, source), intervals=interval_method(groups, seed=seed), metrics=metrics
    )


def _warning(first: ComparedRun, second: ComparedRun, source: ScoreSource) -> str:
    found = []
    if first.fingerprint_hash != second.fingerprint_hash:
        found.append("their plans were made from different measurements of the data: cases pair by name alone")
    if set(first.class_names) != set(second.class_names):
        found.append("only classes of both are compared")
    if source == "final" and first.tolerance_mm != second.tolerance_mm:
        tolerances = f"{second.tolerance_mm:g} mm and {first.tolerance_mm:g} mm"
        found.append(f"NSD is not compared, it was scored at {tolerances}")
    return "; ".join(found)


def _differences(
    first: Values, second: Values, classes: Sequence[str], groups: Sequence[str], seed: int
) -> tuple[Difference, ...]:
    """A row for the mean over classes and one per class, of (cases, classes) values."""
    known = ~(np.isnan(first) | np.isnan(second))
    sides = [np.where(known, values, np.nan) for values in (first, second)]
    averaged = [np.array([_row_mean(row) for row in side])[:, None] for side in sides]
    columns = [np.concatenate([mean, side], axis=1) for mean, side in zip(averaged, sides, strict=True)]
    intervals, _ = mean_intervals(columns[1] - columns[0], groups, seed=seed)
    names = [MEAN_ROW, *classes]
    return tuple(
        _difference(name, columns[0][:, index], columns[1][:, index], groups, intervals[index])
        for index, name in enumerate(names)
    )


def _row_mean(row: Values) -> float:
    return mean_known(row.tolist())


def _difference(name: str, first: Values, second: Values, groups: Sequence[str], interval: Interval) -> Difference:
    known = ~np.isnan(first)
    if not known.any():
        return Difference(name=name, num_cases=0)
    changes = np.round(second[known] - first[known], 10)
    units = unit_means(changes, [group for group, is_known in zip(groups, known, strict=True) if is_known])
    p, smallest_p = signed_rank_p(units)
    return Difference(
        name=name,
        num_cases=int(known.sum()),
        first=float(first[known].mean()),
        second=float(second[known].mean()),
        difference=float(changes.mean()),
        interval=interval,
        num_higher=int((changes > 0).sum()),
        num_lower=int((changes < 0).sum()),
        num_equal=int((changes == 0).sum()),
        num_units=len(units),
        p=p,
        smallest_p=smallest_p,
    )


def _adjusted(pairs: Sequence[RunPair]) -> list[RunPair]:
    """The pairs with p-values adjusted over the page: per metric, mean rows and class rows apart."""
    adjusted: dict[tuple[int, str, int], float] = {}
    for metric in sorted({metric for pair in pairs for metric in pair.metrics}):
        rows = [(n, m, row) for n, pair in enumerate(pairs) for m, row in enumerate(pair.metrics.get(metric, ()))]
        for family in ([each for each in rows if each[1] == 0], [each for each in rows if each[1] > 0]):
            values = holm([row.p for _, _, row in family])
            adjusted |= {(n, metric, m): p for (n, m, _), p in zip(family, values, strict=True)}
    return [
        replace(
            pair,
            metrics={
                metric: tuple(replace(row, adjusted_p=adjusted[n, metric, m]) for m, row in enumerate(rows))
                for metric, rows in pair.metrics.items()
            },
        )
        for n, pair in enumerate(pairs)
    ]
