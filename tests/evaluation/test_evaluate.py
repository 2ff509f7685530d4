from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.artifacts import read_artifact
from pipeline.errors import InputError
from pipeline.evaluation.evaluate import evaluate_folder, evaluate_pairs
from pipeline.evaluation.metrics import score_class
from pipeline.evaluation.pairs import Pair, find_references
from pipeline.evaluation.summary import Metrics, write_metrics
from pipeline.synthetic import make_synthetic_case, write_msd_dataset

WriteLabel = Callable[..., Path]

SPACING = (0.8, 1.1, 2.5)
LABELS = {"background": 0, "left": 1, "right": 5}


@pytest.fixture
def folders(tmp_path: Path, write_label_file: WriteLabel, two_boxes: NDArray[np.uint8]) -> tuple[Path, Path]:
    """Predictions and labels of three cases: perfect, shifted by a voxel, and with one class missed."""
    predictions, labels = tmp_path / "predictions", tmp_path / "labels"
    variants = {"exact": two_boxes, "shifted": np.roll(two_boxes, 1, 0), "missed": two_boxes * (two_boxes != 5)}
    for case_id, values in variants.items():
        # The prediction may lie in another axis order than its label: they are compared in space.
        write_label_file(predictions / f"{case_id}.nii.gz", values, axis_codes="LPS")
        write_label_file(labels / f"{case_id}.nii.gz", two_boxes, axis_codes="SRA")
    return predictions, labels


def test_every_case_and_class_is_scored_in_space(folders: tuple[Path, Path], two_boxes: NDArray[np.uint8]) -> None:
    metrics = evaluate_folder(*folders, tolerance_mm=0.5)
    assert [case.case_id for case in metrics.cases] == ["exact", "missed", "shifted"]
    assert metrics.labels == {"class 1": 1, "class 5": 5}
    assert metrics.cases[0].classes["class 1"].dice == 1
    expected = score_class(np.roll(two_boxes, 1, 0) == 5, two_boxes == 5, spacing=SPACING, tolerance_mm=0.5)
    found = metrics.cases[2].classes["class 5"]
    assert found.dice == expected.dice
    assert found.hd95_mm == pytest.approx(expected.hd95_mm, rel=1e-5)
    assert found.nsd == pytest.approx(expected.nsd, rel=1e-5)
    assert found.reference_ml == pytest.approx(expected.reference_ml, rel=1e-5)


def test_means_are_over_cases_then_over_classes_without_nan(folders: tuple[Path, Path]) -> None:
    metrics = evaluate_folder(*folders)
    left, right = metrics.by_class["class 1"], metrics.by_class["class 5"]
    dice = [case.classes["class 5"].dice for case in metrics.cases]
    assert right.metrics["dice"].mean == pytest.approx(np.mean(dice))
    assert right.metrics["dice"].median == pytest.approx(np.median(dice))
    assert right.metrics["dice"].std == pytest.approx(np.std(dice, ddof=1))
    assert (right.metrics["dice"].num_cases, right.metrics["hd95_mm"].num_cases) == (3, 2)
    assert (right.num_missed, right.num_invented, right.num_absent, left.num_missed) == (1, 0, 0, 0)
    assert metrics.overall["dice"] == pytest.approx((left.metrics["dice"].mean + right.metrics["dice"].mean) / 2)


def test_metrics_are_the_same_after_json_and_in_parallel(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = evaluate_folder(*folders)
    monkeypatch.setattr("pipeline.evaluation.evaluate.SERIAL_SECONDS", 0)
    write_metrics(tmp_path / "metrics.json", metrics)
    again = read_artifact(tmp_path / "metrics.json", Metrics)
    assert repr(again) == repr(metrics) == repr(evaluate_folder(*folders, num_workers=2))
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["cases"][1]["classes"]["class 5"]["hd95_mm"] is None
    assert "NaN" not in (tmp_path / "metrics.json").read_text()
    rows = (tmp_path / "metrics_cases.csv").read_text().splitlines()
    assert rows[0].startswith("case_id,class,dice,iou,nsd,hd95_mm")
    assert len(rows) == 1 + 3 * 2
    assert rows[4].startswith("missed,class 5,0,0,0,,,")


def test_declared_classes_get_their_names_and_absent_ones_count_as_such(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    predictions, labels = folders
    pair = Pair(case_id="exact", prediction=predictions / "exact.nii.gz", reference=labels / "exact.nii.gz")
    metrics = evaluate_pairs([pair], labels={**LABELS, "never": 9})
    assert list(metrics.by_class) == ["left", "right", "never"]
    assert metrics.by_class["never"].num_absent == 1
    assert np.isnan(metrics.by_class["never"].metrics["dice"].mean)
    assert metrics.overall["dice"] == 1


def test_ignored_voxels_take_no_part(
    tmp_path: Path, write_label_file: WriteLabel, two_boxes: NDArray[np.uint8]
) -> None:
    reference, prediction = two_boxes.copy(), two_boxes.copy()
    reference[0:4] = 255
    prediction[0:2] = 1
    paths = [
        write_label_file(tmp_path / f"{name}.nii.gz", values)
        for name, values in (("prediction", prediction), ("reference", reference))
    ]
    pair = Pair(case_id="a", prediction=paths[0], reference=paths[1])
    metrics = evaluate_pairs([pair], labels=LABELS, ignore_value=255)
    assert metrics.overall["dice"] == 1
    assert metrics.failures == {}
    refused = evaluate_pairs([pair], labels=LABELS)
    assert refused.failures == {"a": "prediction or label holds values that are no class: 255"}


def test_every_case_that_cannot_be_scored_is_listed(
    folders: tuple[Path, Path], write_label_file: WriteLabel, two_boxes: NDArray[np.uint8]
) -> None:
    predictions, labels = folders
    write_label_file(labels / "unpredicted.nii.gz", two_boxes)
    for name, values, shift in (("cropped", two_boxes[:-1], 0.0), ("moved", two_boxes, 3.0), ("torn", two_boxes, 0.0)):
        write_label_file(labels / f"{name}.nii.gz", two_boxes)
        write_label_file(predictions / f"{name}.nii.gz", values, shift_mm=shift)
    torn = predictions / "torn.nii.gz"
    torn.write_bytes(torn.read_bytes()[:-60])
    metrics = evaluate_folder(predictions, labels)
    assert len(metrics.cases) == 3
    assert list(metrics.failures) == ["cropped", "moved", "torn", "unpredicted"]
    assert "differ in shape (14 x 11 x 9 and 15 x 11 x 9" in metrics.failures["cropped"]
    assert "3 mm apart" in metrics.failures["moved"]
    assert "torn.nii.gz" in metrics.failures["torn"]
    assert metrics.failures["unpredicted"] == "has no prediction"


def test_scores_do_not_depend_on_how_classes_are_cut_out(
    tmp_path: Path, write_label_file: WriteLabel, two_boxes: NDArray[np.uint8]
) -> None:
    rng = np.random.default_rng(0)
    # The class -2 switches the cutting off; the others are scattered, so that boxes overlap.
    plain = [rng.choice([0, 0, 0, 2, 3, 40], two_boxes.shape).astype(np.int16) for _ in range(2)]
    scores = []
    for marker in (0, -2):
        pair = []
        for name, values in zip(("p", "r"), plain, strict=True):
            marked = values.copy()
            marked[0, 0, 0] = marker
            pair.append(write_label_file(tmp_path / f"{name}{marker}.nii.gz", marked))
        labels = {"background": 0, "a": 2, "b": 3, "c": 40, "absent": 60, "marker": -2}
        metrics = evaluate_pairs([Pair(case_id="x", prediction=pair[0], reference=pair[1])], labels=labels)
        scores.append({name: repr(metrics.cases[0].classes[name]) for name in ("a", "b", "c", "absent")})
    assert scores[0] == scores[1]


def test_chosen_cases_must_be_there(folders: tuple[Path, Path]) -> None:
    metrics = evaluate_folder(*folders, case_ids=["exact", "nowhere"])
    assert [case.case_id for case in metrics.cases] == ["exact"]
    assert metrics.failures == {"nowhere": "has no reference label"}


def test_a_dataset_gives_names_and_only_its_predicted_cases_are_asked_for(
    tmp_path: Path, write_label_file: WriteLabel
) -> None:
    cases = {f"c{seed}": make_synthetic_case(seed, shape=(20, 16, 14), num_classes=3) for seed in range(2)}
    root = write_msd_dataset(tmp_path / "set", cases)
    predicted = tmp_path / "predictions" / "c1.nii.gz"
    predicted.parent.mkdir()
    predicted.write_bytes((root / "labelsTr" / "c1.nii.gz").read_bytes())
    metrics = evaluate_folder(predicted.parent, root)
    assert metrics.labels == {"organ_1": 1, "organ_2": 2}
    assert metrics.overall["dice"] == 1
    assert metrics.failures == {}
    assert set(find_references(root).paths) == {"c0", "c1"}


@pytest.mark.parametrize(
    ("predictions", "message"),
    [("nowhere", "is no folder"), ("empty", "holds no NIfTI file"), ("other", "no prediction belongs to a label")],
)
def test_folders_that_do_not_fit_are_one_clear_line(
    tmp_path: Path, folders: tuple[Path, Path], write_label_file: WriteLabel, predictions: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    write_label_file(tmp_path / "other" / "somebody.nii.gz", np.zeros((2, 3, 4), np.uint8))
    with pytest.raises(InputError, match=message) as caught:
        evaluate_folder(tmp_path / predictions, folders[1])
    assert "\n" not in str(caught.value)


def test_real_labels_score_perfectly_against_themselves(shared_data: Path, tmp_path: Path) -> None:
    labels = shared_data / "hippocampus" / "labelsTr"
    for path in sorted(labels.glob("hippocampus_*.nii.gz"))[:2]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    metrics = evaluate_folder(tmp_path, tmp_path)
    assert metrics.overall["dice"] == metrics.overall["nsd"] == 1
    assert metrics.overall["hd95_mm"] == metrics.overall["assd_mm"] == 0
