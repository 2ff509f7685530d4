"""Intervals of means by the bootstrap: how much a mean over cases depends on which cases it was taken over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.metrics import NAN, Score
from pipeline.plan import Record

Values = NDArray[np.float64]

NUM_RESAMPLES = 5000
LEVEL = 0.95
# Counts held at a time, so that thousands of cases take no more memory than hundreds.
MOST_COUNTS = 4_000_000
# Percentile intervals of fewer hold the mean less often than they say; docs/formats.md has what was measured.
FEW_UNITS = 20


@dataclass(frozen=True, kw_only=True)
class Interval(Record):
    """Where a mean lies; NaN where fewer than two units have a value."""

    low: Score = NAN
    high: Score = NAN


@dataclass(frozen=True, kw_only=True)
class IntervalMethod(Record):
    """How intervals were made.

    Attributes:
        method: Percentiles of the means of resamples (Efron 1979).
        level: Share of resamples within.
        unit: What was drawn: patients with all their cases where it is known who they are.
        num_units: How many there are.
        num_resamples: How often all were drawn anew, with replacement.
        seed: Of the draws.
    """

    method: str = "percentile bootstrap"
    level: float = LEVEL
    unit: str = "case"
    num_units: int
    num_resamples: int = NUM_RESAMPLES
    seed: int = 0


def interval_method(groups: Sequence[str], *, seed: int = 0) -> IntervalMethod:
    """What `mean_intervals` does with these groups, one per case: patients where two cases share one."""
    num_units = len(set(groups))
    return IntervalMethod(unit="patient" if num_units < len(groups) else "case", num_units=num_units, seed=seed)


def mean_intervals(values: Values, groups: Sequence[str], *, seed: int = 0) -> tuple[list[Interval], Interval]:
    """The interval of each column's mean, and that of the mean over columns of these means.

    Cases of a group are drawn together, since they are no independent witnesses; the mean stays one over cases.

    Args:
        values: (cases, columns); NaN takes no part in a mean.
        groups: The group of each case, such as its patient.
        seed: The same one gives the same intervals.
    """
    if not len(groups):
        return [Interval()] * values.shape[1], Interval()
    row_of = {name: row for row, name in enumerate(sorted(set(groups)))}
    known = ~np.isnan(values)
    sums, numbers = np.zeros((2, len(row_of), values.shape[1]))
    rows = [row_of[group] for group in groups]
    np.add.at(sums, rows, np.where(known, values, 0.0))
    np.add.at(numbers, rows, known)
    means = np.concatenate([_means(sums, numbers, counts) for counts in _draws(len(row_of), seed)])
    enough = (numbers > 0).sum(0) >= 2
    columns = [_interval(means[:, index]) if enough[index] else Interval() for index in range(values.shape[1])]
    return columns, _interval(_mean_known(means)) if enough.any() else Interval()


def _draws(num_units: int, seed: int) -> Iterator[Values]:
    """(resamples, units), in blocks: how often each unit was drawn."""
    rng = np.random.default_rng(seed)
    block = max(1, MOST_COUNTS // num_units)
    for first in range(0, NUM_RESAMPLES, block):
        size = min(block, NUM_RESAMPLES - first)
        yield rng.multinomial(num_units, np.full(num_units, 1 / num_units), size=size).astype(float)


def _means(sums: Values, numbers: Values, counts: Values) -> Values:
    """(resamples, columns) means; NaN where none of the drawn cases has a value."""
    totals, drawn = counts @ sums, counts @ numbers
    means: Values = np.divide(totals, drawn, out=np.full_like(totals, np.nan), where=drawn > 0)
    return means


def _mean_known(means: Values) -> Values:
    known = ~np.isnan(means)
    number = known.sum(1)
    sums = np.where(known, means, 0.0).sum(1)
    averages: Values = np.divide(sums, number, out=np.full(len(means), np.nan), where=number > 0)
    return averages


def _interval(means: Values) -> Interval:
    known = means[~np.isnan(means)]
    if not len(known):
        return Interval()
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(low=float(low), high=float(high))
