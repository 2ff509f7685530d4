"""Scores of several folds as one: means, intervals over patients, and predictions in one folder."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from pipeline.artifacts import read_artifact, write_artifact
from pipeline.errors import InputError
from pipeline.evaluation.bootstrap import Interval
from pipeline.evaluation.evaluate import evaluate_folder
from pipeline.evaluation.explain import describe_metrics
from pipeline.evaluation.metrics import METRIC_NAMES, ClassScores
from pipeline.evaluation.pooling import gather_predictions
from pipeline.evaluation.report import write_report
from pipeline.evaluation.summary import CaseScores, Metrics, make_metrics, pool_metrics, write_metrics
from pipeline.prediction_record import PredictionRecord, read_records, record_path

LABELS = {"organ": 1, "lesion": 2}
RNG = np.random.default_rng(2)
NAN = float("nan")


def scored(case_id: str, organ: float, lesion: float = NAN) -> CaseScores:
    def scores(dice: float) -> ClassScores:
        return ClassScores(**{**dict.fromkeys(METRIC_NAMES, dice), "prediction_ml": 1.0, "reference_ml": 1.0})

    return CaseScores(case_id=case_id, classes={"organ": scores(organ), "lesion": scores(lesion)})


def metrics_of(*cases: CaseScores, **options) -> Metrics:
    return make_metrics(cases, labels=LABELS, tolerance_mm=1.0, **{"failures": {}, **options})


def test_pooled_scores_are_those_of_all_cases_together_and_not_the_mean_of_the_folds():
    first = [scored(f"a{n}", RNG.random(), RNG.random()) for n in range(3)]
    second = [scored(f"b{n}", RNG.random()) for n in range(7)]
    folds = {
        "fold 0": metrics_of(*first, failures={"x": "torn"}),
        "fold 1": metrics_of(*second, failures={"y": "gone"}),
    }
    pooled = pool_metrics(folds)
    together = metrics_of(*second, *first, failures={"x": "torn", "y": "gone"})
    assert str(replace(pooled, folds={})) == str(together)
    assert pooled.by_class["organ"].metrics["dice"].mean == pytest.approx(
        np.mean([case.classes["organ"].dice for case in [*first, *second]])
    )
    assert [fold.num_cases for fold in pooled.folds.values()] == [3, 7]
    assert pooled.folds["fold 0"].dice["organ"] == pytest.approx(np.mean([c.classes["organ"].dice for c in first]))
    assert np.isnan(pooled.folds["fold 1"].dice["lesion"])


def test_every_mean_has_an_interval_around_it_and_a_metric_without_values_none():
    metrics = metrics_of(*(scored(f"a{n}", RNG.random()) for n in range(9)))
    dice = metrics.by_class["organ"].metrics["dice"]
    assert dice.interval.low < dice.mean < dice.interval.high
    # The one class with values is all of the mean over classes.
    assert metrics.overall_intervals["dice"] == dice.interval
    assert np.isnan(metrics.by_class["lesion"].metrics["dice"].interval.low)
    assert metrics.intervals is not None
    assert (metrics.intervals.unit, metrics.intervals.num_units) == ("case", 9)


def test_cases_of_a_patient_are_no_independent_witnesses():
    cases = [scored(f"p{n // 4}_{n % 4}", 0.5 + 0.05 * (n // 4)) for n in range(32)]
    patients = {case.case_id: case.case_id[:2] for case in cases}
    apart, together = metrics_of(*cases), metrics_of(*cases, patients=patients)
    widths = [each.overall_intervals["dice"].high - each.overall_intervals["dice"].low for each in (apart, together)]
    assert widths[1] > 1.5 * widths[0]
    assert together.intervals is not None
    assert (together.intervals.unit, together.intervals.num_units) == ("patient", 8)
    pooled = pool_metrics({"a": metrics_of(*cases[:16]), "b": metrics_of(*cases[16:])}, patients=patients)
    assert pooled.overall_intervals == together.overall_intervals


def test_the_intervals_are_in_the_file_the_table_and_the_report(tmp_path):
    folds = {f"fold {k}": metrics_of(*(scored(f"{k}{n}", RNG.random(), 0.5) for n in range(5))) for k in (0, 1)}
    pooled = pool_metrics(folds)
    write_metrics(tmp_path / "metrics.json", pooled)
    assert read_artifact(tmp_path / "metrics.json", Metrics) == pooled
    interval = pooled.by_class["organ"].metrics["dice"].interval
    console = Console(width=120, record=True)
    console.print(describe_metrics(pooled))
    text = console.export_text()
    assert f"{interval.low:.3f}-{interval.high:.3f}" in text
    assert "fold 1, 5 cases" in text
    assert "over 10 cases" in text
    write_report(tmp_path / "report.html", pooled)
    page = (tmp_path / "report.html").read_text()
    assert f"<small>{interval.low:.3f} to {interval.high:.3f}</small>" in page
    assert page.count("<tr><td>fold ") == 2
    assert "With fewer than 20 they are too narrow." in page


def test_metrics_of_earlier_versions_are_read_shown_and_reported_without_intervals(tmp_path):
    path = tmp_path / "metrics.json"
    write_metrics(path, metrics_of(scored("a", 0.5), scored("b", 0.75)))
    plain = json.loads(path.read_text())
    for key in ("overall_intervals", "intervals", "folds"):
        del plain[key]
    for summary in plain["by_class"].values():
        for each in summary["metrics"].values():
            del each["interval"]
    path.write_text(json.dumps(plain))
    old = read_artifact(path, Metrics)
    assert np.isnan(old.by_class["organ"].metrics["dice"].interval.low)
    console = Console(width=120, record=True)
    console.print(describe_metrics(old))
    assert "0.625" in console.export_text()
    write_report(tmp_path / "report.html", old)
    assert "bootstrap" not in (tmp_path / "report.html").read_text()


def test_patients_come_from_the_dataset_or_from_a_pattern_and_a_pattern_that_fits_no_case_is_an_error(
    tmp_path, write_label_file, two_boxes
):
    predictions = tmp_path / "predictions"
    rows = []
    for number in range(4):
        case_id = f"s{number // 2}_{number % 2}"
        write_label_file(predictions / f"{case_id}.nii.gz", np.roll(two_boxes, number, axis=0))
        label = write_label_file(tmp_path / "labels" / f"{case_id}.nii.gz", two_boxes)
        rows.append({"case_id": case_id, "image": str(label), "label": str(label), "patient": f"p{number % 2}"})
    table = tmp_path / "cases.csv"
    with table.open("w") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    by_table = evaluate_folder(predictions, table)
    by_pattern = evaluate_folder(predictions, table, patient_pattern=r"(s\d)")
    apart = evaluate_folder(predictions, tmp_path / "labels")
    units = [
        (each.intervals.unit, each.intervals.num_units) for each in (by_table, by_pattern, apart) if each.intervals
    ]
    assert units == [("patient", 2), ("patient", 2), ("case", 4)]
    assert by_table.overall == by_pattern.overall
    assert by_table.overall_intervals["dice"] != by_pattern.overall_intervals["dice"]
    other = evaluate_folder(predictions, tmp_path / "labels", seed=1)
    assert other.overall == apart.overall
    assert other.intervals is not None
    assert other.intervals.seed == 1
    with pytest.raises(InputError, match="patient_pattern"):
        evaluate_folder(predictions, table, patient_pattern=r"(x\d)")


def test_no_case_and_one_case_have_no_interval():
    assert metrics_of().overall_intervals == {}
    assert str(metrics_of(scored("a", 0.5)).overall_intervals["dice"]) == str(Interval())


def test_predictions_of_all_folds_are_gathered_and_what_was_there_before_goes(tmp_path, write_label_file, two_boxes):
    folders = [tmp_path / f"fold_{n}" for n in range(2)]
    files = [write_label_file(folder / f"case_{n}.nii.gz", two_boxes) for n, folder in enumerate(folders)]
    target = tmp_path / "all"
    write_label_file(target / "of_old.nii.gz", two_boxes)
    # One fold was segmented by a version that kept no records.
    write_artifact(record_path(folders[1], "case_1"), PredictionRecord(case_id="case_1", seconds=2, windows=3))
    for case_id in ("of_old", "case_0"):
        write_artifact(record_path(target, case_id), PredictionRecord(case_id=case_id, seconds=1, windows=9))
    for _ in range(2):
        gather_predictions(folders, target)
        assert sorted(path.name for path in target.glob("*.*")) == ["case_0.nii.gz", "case_1.nii.gz"]
        assert [path.name for path in (target / "records").iterdir()] == ["case_1.json"]
        assert read_records(target, ["case_1"])["case_1"].windows == 3
    assert files[0].samefile(target / "case_0.nii.gz")
    # A prediction that is made anew takes the old one's place here at the next call.
    files[0].unlink()
    write_label_file(files[0], two_boxes * 0)
    gather_predictions(folders, target)
    assert (target / "case_0.nii.gz").read_bytes() == files[0].read_bytes()
