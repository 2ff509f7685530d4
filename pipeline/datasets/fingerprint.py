"""The figures of a dataset that a plan is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipeline.datasets.case import Dataset
from pipeline.datasets.class_order import ClassOrder, class_orders
from pipeline.datasets.examination import Examined, examine_cases
from pipeline.datasets.measurement import CaseFingerprint, Measured
from pipeline.errors import CasesFailedError, InputError
from pipeline.plan import Record

__all__ = ["CaseFingerprint", "ChannelStatistics", "Fingerprint", "make_fingerprint"]


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics(Record):
    """Intensities of one channel over foreground voxels (label above 0) of all cases.

    Attributes:
        lower, upper: 0.5 and 99.5 percentile of a sample of at most 10,000 voxels a case.
        mean, std: Mean and standard deviation of that sample.
        minimum, maximum: Least and greatest value of all foreground voxels.
    """

    lower: float
    upper: float
    mean: float
    std: float
    minimum: float
    maximum: float


@dataclass(frozen=True, kw_only=True)
class Fingerprint(Record):
    """`fingerprint.json`.

    Attributes:
        dataset_name: The dataset's name.
        channel_names, labels, ignore_value: As in the dataset.
        channels: Statistics of each channel.
        cases: Sizes of each case, sorted by id.
        class_orders: The two classes that keep an order best, of each axis.
        left_out: Why a case is not in here, by case id.
    """

    SCHEMA_VERSION: ClassVar[int] = 1
    schema_version: int = 1
    dataset_name: str
    channel_names: tuple[str, ...]
    labels: dict[str, int]
    ignore_value: int | None
    channels: tuple[ChannelStatistics, ...]
    cases: tuple[CaseFingerprint, ...]
    class_orders: tuple[ClassOrder, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)


def make_fingerprint(
    dataset: Dataset,
    *,
    num_workers: int,
    leave_out: Mapping[str, str] | None = None,
    examined: Sequence[Examined] | None = None,
) -> Fingerprint:
    """Measure a dataset.

    Args:
        dataset: The dataset.
        num_workers: Processes that read cases.
        leave_out: Reason by case id, for cases that are not to be used.
        examined: What `examine_cases` found already; the cases are read when it is left out.

    Raises:
        CasesFailedError: Cases that are not left out cannot be used; all are named.
        InputError: No case is left.
    """
    reasons = dict(leave_out or {})
    kept = replace(dataset, cases=tuple(case for case in dataset.cases if case.case_id not in reasons))
    if not kept.cases:
        raise InputError("no case is left", where=dataset.root, fix="See the problems above")
    if examined is None:
        examined = examine_cases(kept, num_workers=num_workers)
    wanted = {case.case_id for case in kept.cases}
    used = sorted((one for one in examined if one.case_id in wanted), key=lambda one: one.case_id)
    failures = {one.case_id: _reason(one) for one in used if one.measured is None}
    failures |= {case_id: "was not examined" for case_id in sorted(wanted - {one.case_id for one in used})}
    if failures:
        raise CasesFailedError(failures, done="the fingerprint cannot be made")
    measured = [one.measured for one in used if one.measured is not None]
    return Fingerprint(
        dataset_name=dataset.name,
        channel_names=dataset.channel_names,
        labels=dataset.labels,
        ignore_value=dataset.ignore_value,
        channels=tuple(_statistics(measured, channel) for channel in range(len(dataset.channel_names))),
        cases=tuple(one.fingerprint for one in measured),
        class_orders=class_orders([one.class_centers for one in measured], list(dataset.labels)),
        left_out=reasons,
    )


def fingerprint_path(plan: Path) -> Path:
    """Where the fingerprint that a plan was made from is looked for: beside it."""
    return plan.with_name("fingerprint.json")


def _reason(one: Examined) -> str:
    return "; ".join(problem.message for problem in one.problems)


def _statistics(measured: Sequence[Measured], channel: int) -> ChannelStatistics:
    """Statistics of one channel in float64; intensities of whole cases can reach millions."""
    values = np.concatenate([one.foreground[channel] for one in measured]).astype(np.float64)
    if values.size == 0:
        raise InputError("no label of any case has foreground", fix="Check the declared labels")
    extremes = np.concatenate([one.foreground_range[channel] for one in measured])
    lower, upper = np.percentile(values, [0.5, 99.5])
    return ChannelStatistics(
        lower=float(lower),
        upper=float(upper),
        mean=float(values.mean()),
        std=float(values.std()),
        minimum=float(extremes.min()),
        maximum=float(extremes.max()),
    )
