from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.artifacts import read_artifact, write_artifact
from pipeline.cli import main
from pipeline.datasets.splits import Fold, Splits
from pipeline.errors import InputError
from pipeline.evaluation.metrics import dice
from pipeline.inference.postprocess import Postprocessing, Step, apply_postprocessing
from pipeline.inference.postprocess_choice import choose_postprocessing, try_steps
from pipeline.plan import Plan

SHAPE, SPACING = (26, 30, 22), (1.0, 1.2, 1.5)
AFFINE = np.array([[1.0, 0.1, 0.0, 4.0], [-0.1, 1.19, 0.1, -3.0], [0.0, -0.1, 1.497, 8.0], [0, 0, 0, 1]])
LABELS = {"background": 0, "one": 1, "pair": 2}


@dataclass(frozen=True)
class Case:
    case_id: str
    prediction: Path
    reference: Path


def truth() -> NDArray[np.uint8]:
    """One organ in one piece, and one in two."""
    label = np.zeros(SHAPE, np.uint8)
    label[3:11, 4:14, 5:15] = 1
    label[16:22, 4:10, 5:15] = 2
    label[16:22, 20:26, 5:15] = 2
    return label


def with_specks(label: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Specks of both classes, far from either, and a hole in the first."""
    rng = np.random.default_rng(seed)
    found = label.copy()
    for value in (1, 2):
        i, j, k = rng.integers([12, 12, 17], [14, 17, 19])
        found[i : i + 2, j : j + 2, k : k + 2] = value
    found[5:8, 7:10, 8:11] = 0
    found[16, 4, 5 + seed] = 0
    return found


def write_cases(folder: Path, predictions: dict[str, NDArray[Any]], references: dict[str, NDArray[Any]]) -> list[Case]:
    for name, labels in (("predictions", predictions), ("labels", references)):
        (folder / name).mkdir(exist_ok=True)
        for case_id, label in labels.items():
            nib.save(nib.Nifti1Image(label, AFFINE), folder / name / f"{case_id}.nii.gz")
    return [
        Case(case_id, folder / "predictions" / f"{case_id}.nii.gz", folder / "labels" / f"{case_id}.nii.gz")
        for case_id in predictions
    ]


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    predictions = {f"case_{seed}": with_specks(truth(), seed) for seed in range(6)}
    return write_cases(tmp_path, predictions, dict.fromkeys(predictions, truth()))


def kinds(chosen: Postprocessing) -> dict[str, set[str]]:
    return {name: {step.kind for step in chosen.steps if step.class_name == name} for name in ("one", "pair")}


def test_each_class_gets_what_helps_it_and_the_figures_are_those_of_doing_it(cases: list[Case]) -> None:
    chosen = choose_postprocessing(cases, LABELS)
    # Of two true pieces the largest alone would be half of the organ.
    assert kinds(chosen) == {"one": {"keep_largest", "fill_holes"}, "pair": {"remove_small"}}
    scores: dict[str, list[float]] = {"before": [], "after": []}
    for case in cases:
        found = np.asarray(nib.load(case.prediction).dataobj)
        done = apply_postprocessing(found, chosen.steps, SPACING)
        scores["before"].append(dice(found == 2, truth() == 2))
        scores["after"].append(dice(done == 2, truth() == 2))
    (trial,) = (trial for trial in chosen.trials if trial.step.class_name == "pair" and trial.is_accepted)
    assert trial.dice_before == pytest.approx(np.mean(scores["before"]), abs=1e-5)
    assert trial.dice_after == pytest.approx(np.mean(scores["after"]), abs=1e-5)
    assert (trial.num_better, trial.num_worse, trial.num_cases) == (6, 0, 6)
    assert chosen.case_ids == tuple(f"case_{seed}" for seed in range(6))


def test_predictions_that_are_right_are_left_alone(tmp_path: Path) -> None:
    labels = {f"case_{seed}": truth() for seed in range(5)}
    assert choose_postprocessing(write_cases(tmp_path, labels, labels), LABELS).steps == ()


def test_a_gain_below_the_threshold_is_left(cases: list[Case]) -> None:
    chosen = choose_postprocessing(cases, LABELS, min_gain=0.5)
    assert chosen.steps == ()
    assert chosen.trials
    assert not any(trial.is_accepted for trial in chosen.trials)


def test_a_class_that_is_false_altogether_counts_when_it_is_taken_away(tmp_path: Path) -> None:
    reference = np.where(truth() == 1, 1, 0).astype(np.uint8)
    predictions = {f"case_{seed}": with_specks(reference, seed) for seed in range(4)}
    chosen = choose_postprocessing(write_cases(tmp_path, predictions, dict.fromkeys(predictions, reference)), LABELS)
    assert kinds(chosen)["pair"] == {"remove_small"}


def test_ignored_voxels_take_no_part(tmp_path: Path) -> None:
    predictions = {f"case_{seed}": with_specks(truth(), seed) for seed in range(4)}
    references = {
        case_id: np.where((found != truth()) & (truth() == 0), 9, truth()).astype(np.uint8)
        for case_id, found in predictions.items()
    }
    chosen = choose_postprocessing(write_cases(tmp_path, predictions, references), LABELS, ignore_value=9)
    # The specks lie where nobody knows what is right; only the hole is known to be wrong.
    assert kinds(chosen) == {"one": {"fill_holes"}, "pair": set()}


STEPS = [Step(class_name="one", value=1, kind="keep_largest"), Step(class_name="one", value=1, kind="fill_holes")]


def test_what_helps_on_average_by_one_lucky_case_is_not_taken() -> None:
    dice_by_case = [np.array([0.5, 0.95, 0.5])] + [np.array([0.9, 0.88, 0.9])] * 5
    trial = try_steps(STEPS, dice_by_case, min_gain=0.002)
    assert trial is not None
    assert np.mean([row[1] - row[0] for row in dice_by_case]) > 0.05
    assert (trial.num_better, trial.num_worse) == (1, 5)
    assert not trial.is_accepted


def test_the_gain_is_that_of_cases_which_the_choice_was_not_made_on() -> None:
    # The first step helps one case much, the second the four others a little. Without the one case the second is
    # chosen, which does nothing for it; without any of the four the first, which does nothing for that one.
    dice_by_case = [np.array([0.4, 0.9, 0.4])] + [np.array([0.5, 0.5, 0.6])] * 4
    trial = try_steps(STEPS, dice_by_case, min_gain=0.002)
    assert trial is not None
    assert trial.step == STEPS[0]
    assert trial.dice_after == trial.dice_before == pytest.approx(0.48)
    assert not trial.is_accepted


def test_choosing_the_best_of_many_by_chance_is_seen_through() -> None:
    rng = np.random.default_rng(0)
    steps = [Step(class_name="one", value=1, kind="remove_small", min_volume_mm3=1.0 + n) for n in range(9)]
    by_gain, taken = 0, 0
    for _ in range(60):
        gains = 0.02 * rng.standard_normal((8, 9))
        trial = try_steps(steps, list(0.8 + np.hstack([np.zeros((8, 1)), gains])), min_gain=0.002)
        by_gain += gains.mean(axis=0).max() > 0.002
        taken += trial is not None and trial.is_accepted
    assert by_gain > 55
    assert taken <= 15


def test_a_class_of_too_few_cases_is_left() -> None:
    assert try_steps(STEPS, [np.array([0.5, 0.9, 0.9])] * 3 + [None] * 5, min_gain=0.002) is None


def test_too_few_cases_and_files_that_do_not_belong_together_are_one_line(tmp_path: Path, cases: list[Case]) -> None:
    with pytest.raises(InputError, match="at least 4 held-out cases, got 3"):
        choose_postprocessing(cases[:3], LABELS)
    nib.save(nib.Nifti1Image(truth()[1:], AFFINE), cases[0].reference)
    with pytest.raises(InputError, match=r"case_0: cannot be used .*different grids"):
        choose_postprocessing(cases, LABELS)


def test_several_processes_choose_the_same(cases: list[Case]) -> None:
    assert choose_postprocessing(cases, LABELS, num_workers=2) == choose_postprocessing(cases, LABELS)


def test_the_command_chooses_by_the_cases_that_the_run_held_out(
    tmp_path: Path, cases: list[Case], make_plan: Callable[..., Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    write_artifact(run_dir / "plan.json", make_plan(labels=LABELS))
    held_out = tuple(case.case_id for case in cases[:4])
    others = tuple(case.case_id for case in cases[4:])
    splits = Splits(folds=(Fold(train=others, validation=held_out), Fold(train=held_out, validation=others)), seed=0)
    write_artifact(run_dir / "splits.json", splits)
    (run_dir / "config.yaml").write_text("fold: 0\n")
    cases[0].prediction.parent.rename(run_dir / "validation")
    command = ["postprocess", "--run_dir", str(run_dir), "--labels", str(tmp_path / "labels")]
    assert main(command) == 0
    chosen = read_artifact(run_dir / "postprocessing.json", Postprocessing)
    assert chosen.case_ids == held_out
    assert kinds(chosen)["one"] == {"keep_largest", "fill_holes"}
    assert "take one: keep_largest: mean Dice 0." in capsys.readouterr().out
    assert main([*command, "--cases", "all"]) == 0
    assert len(read_artifact(run_dir / "postprocessing.json", Postprocessing).case_ids) == 6
