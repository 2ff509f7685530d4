from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts import read_artifact, write_artifact
from pipeline.datasets.splits import Fold, Splits, check_splits, make_splits, patients_by_pattern
from pipeline.errors import InputError

PATIENTS = {"a1": "A", "a2": "A", "b": "", "c": "", "d": "D", "e": "E"}


@st.composite
def patients_and_folds(draw: st.DrawFn) -> tuple[dict[str, str], int]:
    """Patients with 1 to 6 cases each, some of them nameless, and a number of folds that they can fill."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=25))
    patients = {f"p{number}_{case}": f"P{number}" for number, size in enumerate(sizes) for case in range(size)}
    nameless = draw(st.sets(st.sampled_from(sorted(patients))))
    patients |= dict.fromkeys(nameless, "")
    groups = len({patient or case for case, patient in patients.items()})
    return patients, draw(st.integers(2, min(8, groups)))


@given(patients_and_folds(), st.integers(0, 2**31))
def test_every_case_is_validated_once_and_no_patient_is_on_both_sides(
    drawn: tuple[dict[str, str], int], seed: int
) -> None:
    patients, num_folds = drawn
    splits = make_splits(patients, num_folds=num_folds, seed=seed)
    validated = Counter(case for fold in splits.folds for case in fold.validation)
    assert validated == Counter(dict.fromkeys(patients, 1))
    for fold in splits.folds:
        assert sorted((*fold.train, *fold.validation)) == sorted(patients)
        sides = [{patients[case] for case in side} - {""} for side in (fold.train, fold.validation)]
        assert not sides[0] & sides[1]
    check_splits(splits, patients)


@given(patients_and_folds(), st.integers(0, 2**31))
def test_fold_sizes_differ_by_at_most_the_largest_patient(drawn: tuple[dict[str, str], int], seed: int) -> None:
    patients, num_folds = drawn
    sizes = [len(fold.validation) for fold in make_splits(patients, num_folds=num_folds, seed=seed).folds]
    largest = max(Counter(patient or case for case, patient in patients.items()).values())
    assert max(sizes) - min(sizes) <= largest
    assert min(sizes) > 0


@pytest.mark.parametrize("seed", range(8))
def test_large_patients_are_placed_first_so_that_small_ones_even_the_folds_out(seed: int) -> None:
    patients = {f"case_{number}": "large" if number < 4 else "" for number in range(12)}
    splits = make_splits(patients, num_folds=3, seed=seed)
    assert [len(fold.validation) for fold in splits.folds] == [4, 4, 4]


@given(patients_and_folds(), st.integers(0, 2**31), st.randoms())
def test_the_order_of_cases_does_not_matter(drawn: tuple[dict[str, str], int], seed: int, random: Random) -> None:
    patients, num_folds = drawn
    items = list(patients.items())
    random.shuffle(items)
    assert make_splits(dict(items), num_folds=num_folds, seed=seed) == make_splits(
        patients, num_folds=num_folds, seed=seed
    )


def test_the_seed_decides_and_stays_the_same_for_ever() -> None:
    patients = dict.fromkeys("abcdefghij", "")
    folds = [fold.validation for fold in make_splits(patients, num_folds=5, seed=0).folds]
    # Written down from the first version: a change would split every finished run's data anew.
    assert folds == [("a", "h"), ("f", "i"), ("c", "g"), ("b", "d"), ("e", "j")]
    assert folds != [fold.validation for fold in make_splits(patients, num_folds=5, seed=1).folds]


@pytest.mark.parametrize("num_folds", [0, 1, 6])
def test_folds_that_cannot_be_filled_are_refused(num_folds: int) -> None:
    with pytest.raises(InputError, match=rf"num_folds: {num_folds} folds cannot be made of 5 patient"):
        make_splits(PATIENTS, num_folds=num_folds, seed=0)


def test_splits_are_read_back_from_their_file(tmp_path: Path) -> None:
    splits = make_splits(PATIENTS, num_folds=2, seed=3)
    write_artifact(tmp_path / "splits.json", splits)
    assert read_artifact(tmp_path / "splits.json", Splits) == splits


def test_the_pattern_takes_its_first_group_as_the_patient() -> None:
    found = patients_by_pattern(["P01_scan1", "P01_scan2", "P02_scan1"], r"^(P\d+)_scan(\d)")
    assert found == {"P01_scan1": "P01", "P01_scan2": "P01", "P02_scan1": "P02"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(P\d+", "no regular expression"),
        (r"P\d+", "has no group"),
        (r"(P\d+)", "finds no patient in x7, y8"),
        (r"P\d+()", "finds no patient in P01"),
        (r"P|(x)", "finds no patient in P01"),
    ],
)
def test_a_pattern_that_does_not_work_is_refused(pattern: str, message: str) -> None:
    ids = ["P01", "x7", "y8"] if "x7, y8" in message else ["P01"]
    with pytest.raises(InputError, match=message):
        patients_by_pattern(ids, pattern)


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (Fold(train=("a1", "b", "c", "d"), validation=("a2", "e")), r"fold 1: patients in both parts: A"),
        (Fold(train=("b", "c", "d"), validation=("a1", "a2", "e", "z")), "does not have: z"),
        (Fold(train=("b",), validation=("a1", "a2", "e")), "in neither part: c, d"),
        (Fold(train=("b", "c", "d", "e"), validation=("a1", "a2", "e")), "given twice: e; .*both parts: E"),
        (Fold(train=tuple(PATIENTS), validation=()), "no case to validate"),
    ],
)
def test_edited_splits_are_checked_and_the_culprits_named(fold: Fold, message: str) -> None:
    good = make_splits(PATIENTS, num_folds=2, seed=0)
    check_splits(good, PATIENTS)
    with pytest.raises(InputError, match=message):
        check_splits(replace(good, folds=(good.folds[0], fold)), PATIENTS)
