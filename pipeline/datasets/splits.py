"""Seeded folds that keep the cases of a patient on one side."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pipeline.errors import InputError, name_some
from pipeline.plan import Record


@dataclass(frozen=True, kw_only=True)
class Fold(Record):
    """The case ids of one fold, sorted."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Splits(Record):
    """All folds of a cross-validation; `splits.json` of a run."""

    SCHEMA_VERSION: ClassVar[int] = 1
    schema_version: int = 1
    seed: int
    folds: tuple[Fold, ...]


def make_splits(patients: Mapping[str, str], *, num_folds: int, seed: int) -> Splits:
    """Divide cases into folds of similar size, every patient's cases together.

    Patients go into the smallest fold so far, those with most cases first, so fold sizes differ by at most the
    cases of one patient. Among equals the order is that of a hash of seed and patient, which no library's random
    stream can change.

    Args:
        patients: Patient by case id; "" makes the case a patient of its own.
        num_folds: How many folds; every case is validated in exactly one of them.
        seed: The same seed and the same patients give the same folds, on any machine and in any order.

    Raises:
        InputError: There are fewer patients than folds, or fewer than two folds.
    """
    cases_of = _cases_by_patient(patients)
    if not 2 <= num_folds <= len(cases_of):
        raise InputError(
            f"num_folds: {num_folds} folds cannot be made of {len(cases_of)} patient(s)",
            fix="Use from 2 folds up to one per patient",
        )
    parts: list[list[str]] = [[] for _ in range(num_folds)]
    for patient in sorted(cases_of, key=lambda name: (-len(cases_of[name]), _shuffle_key(seed, name))):
        min(parts, key=len).extend(cases_of[patient])
    folds = tuple(
        Fold(train=tuple(sorted(set(patients) - set(part))), validation=tuple(sorted(part))) for part in parts
    )
    return Splits(seed=seed, folds=folds)


def _cases_by_patient(patients: Mapping[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = defaultdict(list)
    for case_id in sorted(patients):
        grouped[patients[case_id] or case_id].append(case_id)
    return grouped


def _shuffle_key(seed: int, patient: str) -> str:
    return hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()


def patients_by_pattern(case_ids: Sequence[str], pattern: str) -> dict[str, str]:
    """Patient by case id: the first group of the regular expression, searched in the id.

    Raises:
        InputError: `pattern` is no regular expression, has no group, or does not match every case.
    """
    fix = r"Give one with a group, such as ^(P\d+)"
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"patient_pattern: {pattern!r} is no regular expression ({error})", fix=fix) from error
    if not expression.groups:
        raise InputError(f"patient_pattern: {pattern!r} has no group", fix=fix)
    found = {case_id: match[1] or "" for case_id in case_ids if (match := expression.search(case_id))}
    unmatched = sorted(case_id for case_id in case_ids if not found.get(case_id))
    if unmatched:
        raise InputError(f"patient_pattern: {pattern!r} finds no patient in {name_some(unmatched)}", fix=fix)
    return found


def select_fold(splits: Splits, fold: int | str) -> Fold:
    """The fold by number, or for "all" every case for training and none for validation.

    Raises:
        InputError: There is no such fold.
    """
    if fold == "all":
        return Fold(
            train=tuple(sorted({case for each in splits.folds for case in (*each.train, *each.validation)})),
            validation=(),
        )
    if not 0 <= int(fold) < len(splits.folds):
        raise InputError(f"fold: the split has folds 0 to {len(splits.folds) - 1}, got {fold}", where="splits.json")
    return splits.folds[int(fold)]


def check_splits(splits: Splits, patients: Mapping[str, str]) -> None:
    """Check splits, perhaps edited by hand, against the cases that are there.

    Raises:
        InputError: A patient is on both sides of a fold, or a case is unknown, missing or given twice (up to ten
            of each are named).
    """
    problems = [
        f"fold {index}: {problem}" for index, fold in enumerate(splits.folds) for problem in _problems(fold, patients)
    ]
    if problems:
        raise InputError(
            "; ".join(problems),
            where="splits",
            fix="Correct splits.json before the run begins; for a run that has begun, give another --run_dir",
        )


def _problems(fold: Fold, patients: Mapping[str, str]) -> Iterator[str]:
    listed = Counter((*fold.train, *fold.validation))
    sides = [{patients[case] or case for case in side if case in patients} for side in (fold.train, fold.validation)]
    checks = {
        "cases that the dataset does not have": set(listed) - set(patients),
        "cases of the dataset that are in neither part": set(patients) - set(listed),
        "cases given twice": {case_id for case_id, count in listed.items() if count > 1},
        "patients in both parts": sides[0] & sides[1],
    }
    yield from (f"{what}: {name_some(sorted(names))}" for what, names in checks.items() if names)
    if not fold.validation:
        yield "no case to validate"
