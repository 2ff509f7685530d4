"""Work folders in a comparison: their folds count as one run, each case by the training that held it out."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.datasets.splits import Fold, Splits
from pipeline.errors import InputError
from pipeline.plan import Rung
from pipeline.run_record import Counts, StepDown

CASES = tuple(f"case_{number:02}" for number in range(12))
HALVES = (CASES[:7], CASES[7:])
SPLITS = Splits(seed=0, folds=tuple(Fold(train=("x",), validation=half) for half in HALVES))


@pytest.fixture
def write_folds(write_run, make_dice):
    """Write a work folder of two folds; options of the trainings by fold."""

    def write(name, *, dice=None, by_fold=({}, {}), **common):
        dice = dice or make_dice()
        for fold, own in enumerate(by_fold):
            parts = {case: dice[case] for case in HALVES[fold]}
            options = {"dice": parts, "fold": fold, "splits": SPLITS, "num_folds": 2, **common, **own}
            folder = write_run(f"{name}/fold_{fold}", **options)
        return folder.parent

    return write


def test_two_cross_validations_are_paired_over_the_cases_of_all_folds(write_folds, write_run, make_dice, compare):
    first, second = make_dice(), make_dice(0.03)
    found = compare(write_folds("a", dice=first), write_folds("b", dice=second))
    alone = compare(write_run("c", dice=first), write_run("d", dice=second))
    assert [run.name for run in found.runs] == ["a", "b"]
    assert [run.state for run in found.runs] == ["finished", "finished"]
    assert [run.fold for run in found.runs] == ["0, 1", "0, 1"]
    assert found.pairs[0].num_common == len(CASES)
    assert found.pairs[0].metrics == alone.pairs[0].metrics
    assert found.means["a"] == alone.means["c"]
    # Every fold's number stands among its options, and is the same in both.
    assert "option.fold" not in found.different_settings


def test_a_cross_validation_and_one_fold_are_paired_over_the_cases_of_that_fold(write_folds, make_dice, compare):
    whole, other = write_folds("a"), write_folds("b")
    (pair,) = compare(whole, other / "fold_1").pairs
    assert (pair.num_common, pair.num_only_first, pair.num_only_second) == (len(HALVES[1]), len(HALVES[0]), 0)


def test_times_add_up_peaks_are_the_largest_and_curves_are_means(write_folds, compare):
    step = StepDown(
        counts=Counts(epoch=1, iteration=2, optimizer_step=3),
        continued_from=Counts(epoch=1, iteration=2, optimizer_step=3),
        where="backward",
        from_rung=Rung(patch_size=(16, 8, 12), batch_size=2),
        to_rung=Rung(patch_size=(16, 8, 12)),
        fallback=1,
    )
    records = (
        {"best_dice": 0.6, "best_epoch": 1, "measured_bytes": 5, "predicted_bytes": 9},
        {"best_dice": 0.8, "best_epoch": 3, "measured_bytes": 7, "predicted_bytes": 8, "step_downs": (step,)},
    )
    by_fold = tuple({"record": record, "loss": loss} for record, loss in zip(records, (1.0, 3.0), strict=True))
    (run,) = compare(write_folds("a", by_fold=by_fold)).runs
    assert (run.train_seconds, run.validation_seconds) == (2 * 3 * 60.0, 2 * 2 * 30.0)
    assert (run.epoch, run.iteration, run.optimizer_step, run.seconds_per_step) == (3, 30, 15, 12.0)
    assert run.best_dice == pytest.approx(0.7)
    assert (run.best_epoch, run.measured_bytes, run.predicted_bytes) == (None, 7, 8)
    assert run.peak_ram_bytes == 2**30 + 3
    assert run.curves["train_loss"] == pytest.approx((2.0, 1.0, 2 / 3))
    assert run.curves["val_dice_mean"][0] == pytest.approx(0.2)
    assert math.isnan(run.curves["val_dice_mean"][1])
    assert [text.split(",")[0] for text in run.step_downs] == ["in fold 1"]


def test_a_cross_validation_on_its_way_says_how_far_it_is(write_folds, compare, compare_to_page):
    found, page = compare_to_page(write_folds("a", by_fold=({}, {"is_finished": False, "epochs": 2})))
    (run,) = found.runs
    assert (run.state, run.epoch) == ("1 of 2 folds finished (fold_1 not started)", 2)
    assert len(run.curves["epoch"]) == 2
    assert "it has scores of some folds" in page
    (begun,) = compare(write_folds("b", by_fold=({}, {"is_finished": False, "epochs": 0, "dice": {}}))).runs
    assert len(begun.curves["epoch"]) == 3
    assert set(begun.scores["training"]["dice"]) == set(HALVES[0])
    three = Splits(seed=0, folds=(*SPLITS.folds, Fold(train=("x",), validation=("case_99",))))
    (some,) = compare(write_folds("d", splits=three)).runs
    assert some.state == "2 of 3 folds finished (not begun: 2)"
    (single,) = compare(write_folds("c", by_fold=({},))).runs
    assert (single.name, single.fold, single.state) == ("c", 0, "finished")


def test_a_curve_is_the_mean_of_the_folds_that_have_a_value(write_folds, compare):
    folder = write_folds("a")
    path = folder / "fold_1" / "metrics.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {"val_dice_inner": "", "noise_scale": "" if row["epoch"] == "2" else "9"}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (run,) = compare(folder).runs
    assert run.curves["val_dice_inner"][0] == pytest.approx(0.2)
    assert run.curves["noise_scale"] == (6.0, 6.0, 9.0)


def test_final_scores_count_where_every_scored_fold_has_them(write_folds, write_final_scores, make_dice, compare):
    folder, dice = write_folds("a"), make_dice(0.1)
    parts = [{case: dice[case] for case in half} for half in HALVES]
    write_final_scores(folder / "fold_0", parts[0])
    assert compare(folder).source == "training"
    begun = write_folds("b", by_fold=({}, {"is_finished": False, "dice": {}}))
    write_final_scores(begun / "fold_0", parts[0])
    assert set(compare(begun).runs[0].scores["final"]["dice"]) == set(HALVES[0])
    write_final_scores(folder / "fold_1", parts[1])
    found = compare(folder)
    assert (found.source, found.runs[0].tolerance_mm) == ("final", 1.0)
    assert found.runs[0].scores["final"]["dice"] == dice
    write_final_scores(folder / "fold_1", parts[1], tolerance_mm=2.0)
    with pytest.raises(InputError, match=r"NSD at other tolerances: fold_0 1 mm, fold_1 2 mm.*Evaluate the folds"):
        compare(folder)


@pytest.fixture
def scores_of_jobs(write_final_scores, make_dice):
    """Write scores where the jobs of `voxfit slurm` do, of these cases; gives them."""

    def write(folder, cases=CASES):
        dice = make_dice(0.1, cases=cases)
        write_final_scores(folder, dice, path=folder / "metrics.json")
        return dice

    return write


def test_scores_of_jobs_count_if_they_are_about_what_the_folds_held_out(write_folds, scores_of_jobs, compare):
    folder = write_folds("a", patient_pattern=r"case_(\d)")
    dice = scores_of_jobs(folder)
    (run,) = compare(folder).runs
    assert (run.scores["final"]["dice"], run.tolerance_mm) == (dice, 1.0)
    assert set(run.patients.values()) == {"0", "1"}
    one = write_folds("b", by_fold=({},))
    scores_of_jobs(one)
    assert set(compare(one).runs[0].scores["final"]["dice"]) == set(HALVES[0])
    for cases in ((*CASES, "a test case"), CASES[1:], HALVES[0], HALVES[1]):
        scores_of_jobs(folder, cases)
        assert compare(folder).source == "training", cases


def test_scores_of_jobs_that_are_older_than_a_training_are_not_its_own(write_folds, scores_of_jobs, compare):
    folder = write_folds("a")
    scores_of_jobs(folder)
    assert compare(folder).source == "final"
    record = folder / "fold_1" / "run.json"
    later = (folder / "metrics.json").stat().st_mtime + 60
    os.utime(record, (later, later))
    assert compare(folder).source == "training"
    begun = write_folds("b", by_fold=({}, {"is_finished": False}))
    scores_of_jobs(begun)
    assert compare(begun).source == "training"


@pytest.mark.parametrize(
    ("by_fold", "message"),
    [
        (({}, {"splits": Splits(seed=1, folds=SPLITS.folds)}), "other folds than fold_0: fold_1"),
        (({}, {"fold": 0}), "not a fold each: fold_0 holds out fold 0, fold_1 holds out fold 0"),
        (({}, {"fold": "all"}), "not a fold each: .*fold_1 holds out nothing"),
    ],
)
def test_folds_that_are_not_those_of_one_split_are_refused(by_fold, message, write_folds, compare):
    with pytest.raises(InputError, match=message):
        compare(write_folds("a", by_fold=by_fold))


def test_folds_of_other_plans_are_refused(write_folds, make_plan, compare):
    folder = write_folds("a", by_fold=({}, {"plan": make_plan(fingerprint_hash="1" * 16)}))
    with pytest.raises(InputError, match="another fingerprint_hash in the plan than fold_0: fold_1"):
        compare(folder)


def test_a_page_takes_no_place_of_other_files_in_a_work_folder(write_folds, scores_of_jobs, tmp_path, capsys):
    folder = write_folds("a")
    words = ["compare", str(folder), "--json", "--out"]
    (folder / "report.html").write_text("<title>scores</title>")
    for name, said in (("report.html", "is there already and is no comparison"), ("metrics.html", "is the place of")):
        assert main([*words, str(folder / name)]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert (folder / "report.html").read_text() == "<title>scores</title>"
    assert not (folder / "metrics.html").exists()
    for _ in range(2):
        assert main([*words, str(folder / "page.html")]) == 0


def test_a_folder_without_runs_is_refused_with_what_to_give(tmp_path, compare):
    (tmp_path / "w" / "fold_0").mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds no run .*or work folders of `voxfit run` or `voxfit slurm`"):
        compare(Path(tmp_path / "w"))
