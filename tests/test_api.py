"""The commands, one after the other, on small synthetic data, as a person would use them."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np
import pytest

from pipeline import api, chain
from pipeline.artifacts import read_artifact, write_artifact
from pipeline.cli import main
from pipeline.config import (
    AugmentationConfig,
    CompareConfig,
    EvaluateConfig,
    HardwareConfig,
    InspectConfig,
    OptimConfig,
    PlanConfig,
    PlanOptions,
    PredictConfig,
    PreprocessConfig,
    RunConfig,
    TrainConfig,
    TrainOptions,
)
from pipeline.datasets.splits import Fold, Splits
from pipeline.errors import CasesFailedError, InputError
from pipeline.evaluation.summary import Metrics
from pipeline.inference.postprocess import Postprocessing, Step
from pipeline.prediction_record import read_records
from pipeline.run_record import RunRecord
from pipeline.saved_config import write_config
from pipeline.store import CaseStore
from pipeline.synthetic import make_synthetic_case, write_msd_dataset

PLAN = PlanOptions(patch_size=(16, 24, 16), base_features=4, max_features=8, effective_batch=2)
TRAIN = TrainOptions(
    num_folds=2,
    iterations_per_epoch=3,
    optim=OptimConfig(name="adamw", lr=0.01, ema_decay=0.9),
    augmentation=AugmentationConfig(),
    hardware=HardwareConfig(accelerator="cpu", num_workers=0, num_threads=1),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small MR cases with oblique affines, unequal axes and two organs."""
    cases = {
        f"case_{seed}": make_synthetic_case(
            seed, shape=(18, 26, 20), spacing=(1.0, 1.2, 0.9), num_classes=3, oblique_degrees=12.0
        )
        for seed in range(4)
    }
    folder = tmp_path_factory.mktemp("data") / "msd"
    write_msd_dataset(folder, cases)
    return folder


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of `voxfit run` on the cases."""
    work_dir = tmp_path_factory.mktemp("work")
    chain.run(run_config(dataset, work_dir))
    return work_dir


def run_config(dataset: Path, work_dir: Path, **changes: object) -> RunConfig:
    options = {"dataset": str(dataset), "work_dir": str(work_dir), "vram": "2GiB", "max_epochs": 2, "num_workers": 1}
    return RunConfig(**{**options, "plan": PLAN, "train": TRAIN, **changes})  # type: ignore[arg-type]


def state_of(folder: Path) -> dict[str, int]:
    """Modification times of everything that was computed."""
    kept = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".ckpt", ".b2nd", ".gz")]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in kept}


def test_one_call_does_everything_and_leaves_every_file_of_the_design(finished: Path) -> None:
    for name in ("plan.json", "fingerprint.json", "store", "log.txt", "config.yaml"):
        assert (finished / name).exists(), name
    run_dir = finished / "fold_0"
    for name in ("config.yaml", "plan.json", "splits.json", "run.json", "metrics.csv", "log.txt", "report.html"):
        assert (run_dir / name).is_file(), name
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    metrics = json.loads((run_dir / "validation" / "metrics.json").read_text())
    assert set(metrics["by_class"]) == {"organ_1", "organ_2"}
    assert len(metrics["cases"]) == 2
    records = read_records(run_dir / "validation", [case["case_id"] for case in metrics["cases"]])
    shares = [record.seam_share for record in records.values()]
    assert len(shares) == 2
    assert all(
        f'<td data-value="{share}">{share:.1%}</td>' in (run_dir / "report.html").read_text() for share in shares
    )


def test_the_same_call_again_recomputes_nothing(dataset: Path, finished: Path) -> None:
    before = state_of(finished)
    chain.run(run_config(dataset, finished))
    assert state_of(finished) == before


def test_where_and_how_long_the_work_is_done_may_change(dataset: Path, finished: Path, tmp_path: Path) -> None:
    before = state_of(finished)
    chain.run(run_config(dataset, finished, train=replace(TRAIN, stage_to=str(tmp_path / "disk"), max_time="1h")))
    assert state_of(finished) == before


def test_other_options_in_the_same_folder_are_refused_and_named(dataset: Path, finished: Path) -> None:
    with pytest.raises(InputError, match=r"made with other options: max_epochs \(was 2, now 3\)"):
        chain.run(run_config(dataset, finished, max_epochs=3))


def test_predictions_lie_on_the_grid_of_their_images(dataset: Path, finished: Path) -> None:
    for path in (finished / "fold_0" / "validation").glob("*.nii.gz"):
        image, prediction = (nibabel.load(file) for file in (dataset / "imagesTr" / path.name, path))
        assert prediction.shape == image.shape
        np.testing.assert_array_equal(prediction.affine, image.affine)
        assert prediction.header["sform_code"] == image.header["sform_code"]
        assert set(np.unique(np.asarray(prediction.dataobj))) <= {0, 1, 2}


def test_predict_and_evaluate_give_what_the_run_gave(dataset: Path, finished: Path, tmp_path: Path) -> None:
    run_dir = finished / "fold_0"
    written = api.predict(
        PredictConfig(run_dir=str(run_dir), input=str(dataset / "imagesTr"), output=str(tmp_path), num_threads=1)
    )
    assert len(written) == 4
    for path in (run_dir / "validation").glob("*.nii.gz"):
        ours, again = (np.asarray(nibabel.load(file).dataobj) for file in (path, tmp_path / path.name))
        np.testing.assert_array_equal(ours, again)
    held_out = {path.name.split(".")[0] for path in (run_dir / "validation").glob("*.nii.gz")}
    settings = EvaluateConfig(
        predictions=str(tmp_path), labels=str(dataset), out=str(tmp_path / "m.json"), num_workers=1
    )
    metrics = api.evaluate(settings, case_ids=held_out)
    assert json.loads((tmp_path / "m.json").read_text()) == json.loads(
        (run_dir / "validation" / "metrics.json").read_text()
    )
    assert metrics.failures == {}


def test_the_stages_by_hand_end_in_the_same_weights_as_the_run(dataset: Path, finished: Path, tmp_path: Path) -> None:
    import torch

    plan_path, store, run_dir = tmp_path / "plan.json", tmp_path / "store", tmp_path / "run"
    plan = {name: getattr(PLAN, name) for name in ("patch_size", "base_features", "max_features", "effective_batch")}
    api.plan(PlanConfig(dataset=str(dataset), out=str(plan_path), vram="2GiB", num_workers=1, **plan))
    api.preprocess(PreprocessConfig(dataset=str(dataset), plan=str(plan_path), store=str(store), num_workers=1))
    train = {item: getattr(TRAIN, item) for item in TRAIN.__dataclass_fields__}
    api.train(TrainConfig(plan=str(plan_path), store=str(store), run_dir=str(run_dir), max_epochs=2, **train))
    ours, by_run = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (run_dir, finished / "fold_0")
    )
    assert ours.keys() == by_run.keys()
    assert all(torch.equal(ours[key], by_run[key]) for key in ours)


@pytest.fixture
def dirty(dataset: Path, tmp_path: Path) -> Path:
    """The dataset with a truncated image and a missing label."""
    folder = tmp_path / "dirty"
    shutil.copytree(dataset, folder)
    image = folder / "imagesTr" / "case_1.nii.gz"
    image.write_bytes(image.read_bytes()[:200])
    (folder / "labelsTr" / "case_2.nii.gz").unlink()
    return folder


def test_bad_cases_stop_the_run_before_anything_is_made(dirty: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        chain.run(run_config(dirty, tmp_path / "work"))
    assert "case_1" in str(error.value)
    assert "case_2" in str(error.value)
    assert "--skip_bad_cases" in str(error.value)
    assert not (tmp_path / "work" / "plan.json").exists()


def test_bad_cases_are_left_out_on_request_and_end_with_exit_code_3(dirty: Path, tmp_path: Path) -> None:
    with pytest.raises(CasesFailedError) as error:
        api.plan(
            PlanConfig(
                dataset=str(dirty), out=str(tmp_path / "plan.json"), vram="2GiB", skip_bad_cases=True, num_workers=1
            )
        )
    assert set(error.value.failures) == {"case_1", "case_2"}
    assert error.value.exit_code == 3
    assert (tmp_path / "plan.json").is_file()
    settings = PreprocessConfig(
        dataset=str(dirty),
        plan=str(tmp_path / "plan.json"),
        store=str(tmp_path / "s"),
        num_workers=1,
        skip_bad_cases=True,
    )
    with pytest.raises(CasesFailedError) as error:
        api.preprocess(settings)
    assert set(error.value.failures) == {"case_1", "case_2"}
    assert CaseStore(tmp_path / "s").case_ids == ("case_0", "case_3")


def test_a_case_without_foreground_is_listed_and_trains_all_the_same(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "healthy"
    shutil.copytree(dataset, folder)
    label = folder / "labelsTr" / "case_0.nii.gz"
    image = nibabel.load(label)
    nibabel.save(nibabel.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), label)
    inspection = api.inspect(InspectConfig(path=str(folder), num_workers=1))
    assert [problem.kind for problem in inspection.problems] == ["empty_label"]
    result = chain.run(run_config(folder, tmp_path / "work", max_epochs=1))
    assert result.report.is_file()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda plan: plan.update(schema_version=99), "has schema version 99"),
        (lambda plan: plan.pop("labels"), "labels: missing"),
        (lambda plan: plan.update(patch_size=[15, 24, 16]), "patch_size: [15, 24, 16] is not a multiple"),
        (lambda plan: plan.update(target_spacing=[9.0, 9.0, 9.0]), "target_spacing"),
    ],
)
def test_a_spoilt_plan_is_one_clear_line_and_the_run_is_untouched(
    finished: Path, tmp_path: Path, edit: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = json.loads((finished / "plan.json").read_text())
    edit(plan)  # type: ignore[operator]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    before = state_of(finished)
    store, run_dir = str(finished / "store"), str(tmp_path / "run")
    code = main(["train", "--plan", str(path), "--store", store, "--run_dir", run_dir, "--max_epochs", "1"])
    text = capsys.readouterr().err
    assert code == 2
    assert message in text
    assert "Traceback" not in text
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert state_of(finished) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "{tmp}"],
        ["plan", "--dataset", "{tmp}/nowhere"],
        ["plan", "--dataset", "{data}", "--vram", "lots", "--out", "{tmp}/p.json"],
        ["preprocess", "--dataset", "{data}", "--plan", "{tmp}/none.json", "--store", "{tmp}/s"],
        ["train", "--plan", "{work}/plan.json", "--store", "{tmp}", "--run_dir", "{tmp}/r"],
        ["predict", "--run_dir", "{tmp}", "--input", "{data}", "--output", "{tmp}/o"],
        ["predict", "--run_dir", "{work}/fold_0", "--input", "{tmp}/none.nii.gz", "--output", "{tmp}/o"],
        ["evaluate", "--predictions", "{tmp}", "--labels", "{data}", "--out", "{tmp}/m.json"],
    ],
    ids=lambda arguments: " ".join(arguments[:4]),
)
def test_bad_input_is_one_short_message_with_exit_code_2(
    arguments: list[str], dataset: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([word.format(tmp=tmp_path, data=dataset, work=finished) for word in arguments])
    text = capsys.readouterr().err
    assert code == 2, text
    message = text[text.index("error:") :]
    assert message.count("\n") == 1
    assert "Traceback" not in text


def test_a_run_without_bad_cases_ends_with_exit_code_3_and_everything_done(
    dirty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "--dataset", str(dirty), "--work_dir", str(tmp_path / "work"), "--skip_bad_cases"]
    arguments += ["--max_epochs", "1", "--vram", "2GiB", "--num_workers", "1", "--plan.patch_size", "16", "24", "16"]
    arguments += ["--plan.base_features", "4", "--train.num_folds", "2", "--train.iterations_per_epoch", "2"]
    arguments += ["--train.hardware.num_workers", "0", "--train.hardware.num_threads", "1"]
    assert main(arguments) == 3
    text = capsys.readouterr()
    assert "case_1" in text.err
    assert "case_2" in text.err
    assert "mean over classes" in text.out
    assert (tmp_path / "work" / "fold_0" / "report.html").is_file()


def test_a_held_out_case_that_cannot_be_predicted_does_not_lose_the_scores_of_the_others(
    dataset: Path, finished: Path, tmp_path: Path
) -> None:
    folder, work_dir = tmp_path / "data", tmp_path / "work"
    shutil.copytree(dataset, folder)
    shutil.copytree(finished, work_dir)
    # The store takes a file of the same size and time for unchanged, so that only the prediction meets what is wrong.
    predictions = sorted((work_dir / "fold_0" / "validation").glob("*.nii.gz"))
    predictions[0].unlink()
    image = folder / "imagesTr" / predictions[0].name
    state = image.stat()
    image.write_bytes(bytes(state.st_size))
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
    config = run_config(folder, work_dir)
    write_config(work_dir / "config.yaml", config)
    with pytest.raises(CasesFailedError) as error:
        chain.run(config)
    lost = predictions[0].name.split(".")[0]
    assert set(error.value.failures) == {lost}
    result = error.value.result
    assert isinstance(result, chain.RunResult)
    assert [case.case_id for case in result.metrics.cases] == [predictions[1].name.split(".")[0]]


def test_another_fold_goes_into_the_same_work_folder(dataset: Path, finished: Path, tmp_path: Path) -> None:
    work_dir = tmp_path / "work"
    shutil.copytree(finished, work_dir)
    before = state_of(work_dir / "fold_0")
    chain.run(run_config(dataset, work_dir, fold=1, max_epochs=2))
    assert (work_dir / "fold_1" / "report.html").is_file()
    assert state_of(work_dir / "fold_0") == before


@pytest.mark.parametrize("fold", [0, "all"])
def test_a_plan_that_was_edited_after_a_training_is_refused_before_the_store_is_made_anew(
    dataset: Path, finished: Path, tmp_path: Path, fold: int | Literal["all"]
) -> None:
    work_dir = tmp_path / "work"
    shutil.copytree(finished, work_dir)
    plan = json.loads((work_dir / "plan.json").read_text()) | {"target_spacing": [1.5, 1.5, 1.5]}
    (work_dir / "plan.json").write_text(json.dumps(plan))
    before = state_of(work_dir)
    with pytest.raises(InputError, match=r"fold_0: was begun with another plan: .*target_spacing"):
        chain.run(run_config(dataset, work_dir, fold=fold))
    assert state_of(work_dir) == before
    # As the message says.
    shutil.copy(work_dir / "fold_0" / "plan.json", work_dir / "plan.json")
    chain.run(run_config(dataset, work_dir))
    assert state_of(work_dir) == before


def test_all_folds_are_run_one_after_the_other_and_pooled(dataset: Path, finished: Path, tmp_path: Path) -> None:
    work_dir = tmp_path / "work"
    shutil.copytree(finished, work_dir)
    before = state_of(work_dir / "fold_0")
    result = chain.run(run_config(dataset, work_dir, fold="all"))
    assert state_of(work_dir / "fold_0") == before
    assert [case.case_id for case in result.metrics.cases] == [f"case_{number}" for number in range(4)]
    folder = work_dir / "cross_validation"
    assert result.report == folder / "report.html"
    page = result.report.read_text()
    assert page.count("<td>fold ") == 2
    records = read_records(folder / "predictions", [case.case_id for case in result.metrics.cases])
    assert len(records) == 4
    assert all(f'<td data-value="{record.seam_share}">' in page for record in records.values())
    assert "95 % intervals of the mean" in page
    assert read_artifact(folder / "metrics.json", Metrics) == result.metrics
    # Scoring the predictions together gives what the folds gave one by one.
    out = tmp_path / "metrics.json"
    together = api.evaluate(
        EvaluateConfig(predictions=str(folder / "predictions"), labels=str(dataset), out=str(out), num_workers=1)
    )
    assert replace(result.metrics, folds={}) == together
    for number, (name, fold) in enumerate(result.metrics.folds.items()):
        own = read_artifact(work_dir / f"fold_{number}" / "validation" / "metrics.json", Metrics)
        assert (name, fold.num_cases, fold.overall) == (f"fold {number}", 2, own.overall)
    page = tmp_path / "page.html"
    (run,) = api.compare(CompareConfig(runs=(str(work_dir),), out=str(page), scores="final")).runs
    assert {case: set(each) for case, each in run.scores["final"]["dice"].items()} == {
        case.case_id: set(case.classes) for case in together.cases
    }
    everything = state_of(work_dir)
    chain.run(run_config(dataset, work_dir, fold="all"))
    kept = {name: time for name, time in state_of(work_dir).items() if not name.startswith("cross_validation")}
    assert kept == {name: time for name, time in everything.items() if name in kept}
    assert len(kept) == len(everything) - 4


def test_patients_of_the_pattern_that_made_the_folds_are_those_of_the_intervals(dataset: Path, tmp_path: Path) -> None:
    # Cases 0 and 1 are of one patient, 2 and 3 of another.
    train = replace(TRAIN, patient_pattern=r"(case_(?=[01])|cas(?=e_[23]))")
    metrics = chain.run(run_config(dataset, tmp_path, fold="all", max_epochs=1, train=train)).metrics
    single = read_artifact(tmp_path / "fold_0" / "validation" / "metrics.json", Metrics)
    found = [(each.intervals.unit, each.intervals.num_units) for each in (metrics, single) if each.intervals]
    assert found == [("patient", 2), ("patient", 1)]


def test_folds_of_another_split_are_not_pooled(dataset: Path, finished: Path, tmp_path: Path) -> None:
    work_dir = tmp_path / "work"
    shutil.copytree(finished, work_dir)
    chain.run(run_config(dataset, work_dir, fold=1))
    path = work_dir / "fold_1" / "splits.json"
    splits = read_artifact(path, Splits)
    write_artifact(path, replace(splits, seed=7))
    record = json.loads((work_dir / "fold_1" / "run.json").read_text()) | {"splits_hash": ""}
    (work_dir / "fold_1" / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="other folds than fold_0: fold_1"):
        chain.run(run_config(dataset, work_dir, fold="all"))
    assert not (work_dir / "cross_validation").exists()


def test_a_call_that_failed_before_the_plan_does_not_bind_the_folder(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        chain.run(run_config(dataset / "nowhere", tmp_path, max_epochs=1))
    with pytest.raises(InputError, match="lots"):
        chain.run(run_config(dataset, tmp_path, vram="lots"))
    assert not (tmp_path / "fingerprint.json").exists()
    assert chain.run(run_config(dataset, tmp_path, max_epochs=1)).report.is_file()


def test_an_interrupted_run_is_finished_by_the_same_command(dataset: Path, finished: Path, tmp_path: Path) -> None:
    work_dir = tmp_path / "work"
    shutil.copytree(finished, work_dir)
    run_dir = work_dir / "fold_0"
    first, second = sorted((run_dir / "validation").glob("*.nii.gz"))
    kept, expected = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    (run_dir / "report.html").unlink()
    for path in (work_dir / "store" / "cases").glob("case_2*"):
        path.unlink()
    chain.run(run_config(dataset, work_dir))
    assert first.stat().st_mtime_ns == kept
    assert (
        nibabel.load(second).get_fdata().tolist()
        == nibabel.Nifti1Image.from_bytes(gzip.decompress(expected)).get_fdata().tolist()
    )
    assert (run_dir / "report.html").is_file()
    assert "case_2" in CaseStore(work_dir / "store").case_ids


def test_a_plan_that_fits_nothing_leaves_the_old_plan_and_fingerprint(dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    good = PlanConfig(dataset=str(dataset), out=str(path), vram="2GiB", num_workers=1, base_features=4, max_features=8)
    api.plan(good)
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    with pytest.raises(InputError):
        api.plan(PlanConfig(dataset=str(dataset), out=str(path), vram="0.01GiB", num_workers=1))
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before


def test_patients_found_by_a_pattern_stay_on_one_side(dataset: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = {item: getattr(TRAIN, item) for item in TRAIN.__dataclass_fields__}
    options["patient_pattern"] = r"case_(\d)"
    paths = {"plan": str(finished / "plan.json"), "store": str(finished / "store"), "run_dir": str(folder)}
    api.train(TrainConfig(**options, **paths, max_epochs=1))
    splits = json.loads((folder / "splits.json").read_text())
    for fold in splits["folds"]:
        assert not set(fold["train"]) & set(fold["validation"])
    options["patient_pattern"] = r"patient_(\d)"
    paths["run_dir"] = str(tmp_path / "other")
    with pytest.raises(InputError, match="pattern"):
        api.train(TrainConfig(**options, **paths, max_epochs=1))
    assert not (tmp_path / "other" / "checkpoints").exists()


def test_folds_of_ones_own_are_those_that_lie_in_the_run_folder(dataset: Path, finished: Path, tmp_path: Path) -> None:
    cases = CaseStore(finished / "store").case_ids
    folds = tuple(Fold(train=tuple(c for c in cases if c != case), validation=(case,)) for case in cases[:3])
    options = {item: getattr(TRAIN, item) for item in TRAIN.__dataclass_fields__} | {"num_folds": 3}
    paths = {"plan": str(finished / "plan.json"), "store": str(finished / "store")}
    write_artifact(tmp_path / "own" / "splits.json", Splits(folds=folds, seed=0))
    api.train(TrainConfig(**options, **paths, run_dir=str(tmp_path / "own"), fold=2, max_epochs=1))
    assert read_artifact(tmp_path / "own" / "splits.json", Splits).folds == folds
    assert set(read_artifact(tmp_path / "own" / "run.json", RunRecord).validation) == {cases[2]}
    lacking = (replace(folds[0], train=folds[0].train[1:]), *folds[1:])
    write_artifact(tmp_path / "other" / "splits.json", Splits(folds=lacking, seed=0))
    with pytest.raises(InputError, match=f"fold 0: cases of the dataset that are in neither part: {cases[1]}"):
        api.train(TrainConfig(**options, **paths, run_dir=str(tmp_path / "other"), max_epochs=1))


def test_the_inspection_is_json_for_programs(
    dirty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["inspect", str(dirty), "--json", "--num_workers", "1"]) == 3
    shown = json.loads(capsys.readouterr().out)
    assert {problem["case_id"] for problem in shown["problems"]} == {"case_1", "case_2"}
    assert main(["inspect", str(dirty), "--num_workers", "1"]) == 3
    assert "case_1: " in capsys.readouterr().out


def test_predictions_never_take_the_place_of_their_images(dataset: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(dataset / "imagesTr", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    settings = PredictConfig(run_dir=str(finished / "fold_0"), input=str(folder), output=str(folder), overwrite=True)
    with pytest.raises(InputError, match="would be overwritten"):
        api.predict(settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_truncated_image_is_named_and_the_other_outputs_are_written(
    dataset: Path, finished: Path, tmp_path: Path
) -> None:
    folder, output = tmp_path / "images", tmp_path / "out"
    shutil.copytree(dataset / "imagesTr", folder)
    torn = folder / "case_3.nii.gz"
    torn.write_bytes(torn.read_bytes()[:500])
    settings = PredictConfig(run_dir=str(finished / "fold_0"), input=str(folder), output=str(output), num_threads=1)
    with pytest.raises(CasesFailedError) as error:
        api.predict(settings)
    assert set(error.value.failures) == {"case_3"}
    assert {path.name for path in output.glob("*.*")} == {"case_0.nii.gz", "case_1.nii.gz", "case_2.nii.gz"}


def test_metrics_of_an_evaluation_do_not_touch_the_metrics_of_the_training(
    dataset: Path, finished: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished / "fold_0", run_dir)
    before = (run_dir / "metrics.csv").read_bytes()
    settings = EvaluateConfig(
        predictions=str(run_dir / "validation"),
        labels=str(dataset / "labelsTr"),
        images=str(dataset),
        out=str(run_dir / "metrics.json"),
        report=str(run_dir / "again.html"),
        run_dir=str(run_dir),
        num_workers=1,
    )
    metrics = api.evaluate(settings, case_ids={path.name.split(".")[0] for path in run_dir.glob("validation/*.nii.gz")})
    assert set(metrics.labels) == {"organ_1", "organ_2"}
    assert (run_dir / "metrics.csv").read_bytes() == before
    assert (run_dir / "metrics_cases.csv").is_file()
    with pytest.raises(InputError, match=r"must end in \.json"):
        EvaluateConfig(predictions="p", labels="l", out="metrics.csv")


def test_shares_fill_the_store_that_the_run_made_and_verify_says_so(
    dataset: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset", str(dataset), "--plan", str(finished / "plan.json"), "--store", str(tmp_path / "store")]
    assert main(["preprocess", *options, "--shard", "1/2"]) == 0
    assert "allotted" in capsys.readouterr().err
    assert main(["preprocess", *options, "--verify"]) == 3
    assert "is missing" in capsys.readouterr().err
    assert main(["preprocess", *options, "--shard", "2/2"]) == 0
    assert main(["preprocess", *options, "--verify"]) == 0
    made, whole = (
        {path.name: path.read_bytes() for path in (folder / "cases").glob("*.b2nd")}
        for folder in (tmp_path / "store", finished / "store")
    )
    assert made == whole


def test_a_run_segments_the_cases_that_it_held_out(dataset: Path, finished: Path, tmp_path: Path) -> None:
    run_dir = finished / "fold_0"
    options = {"input": str(dataset), "cases": "held_out", "accelerator": "cpu"}
    made = api.predict(PredictConfig(run_dir=str(run_dir), output=str(tmp_path / "out"), **options))
    assert {path.name for path in made} == {path.name for path in (run_dir / "validation").glob("*.nii.gz")}
    trained_on_all = tmp_path / "run"
    shutil.copytree(run_dir, trained_on_all)
    config = (run_dir / "config.yaml").read_text()
    (trained_on_all / "config.yaml").write_text(config.replace("fold: 0", "fold: all"))
    with pytest.raises(InputError, match=r"held out no fold \(fold: all\).*Use --cases all"):
        api.predict(PredictConfig(run_dir=str(trained_on_all), output=str(tmp_path / "out_2"), **options))


def test_held_out_cases_are_not_changed_by_what_they_have_chosen_and_others_are(
    dataset: Path, finished: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "fold_0"
    shutil.copytree(finished / "fold_0", run_dir)
    steps = tuple(
        Step(class_name=name, value=value, kind="remove_small", min_volume_mm3=1e9)
        for name, value in (("organ_1", 1), ("organ_2", 2))
    )
    write_artifact(run_dir / "postprocessing.json", Postprocessing(steps=steps, min_gain=0.0, case_ids=()))
    options = {"run_dir": str(run_dir), "input": str(dataset), "num_threads": 1}
    held_out = api.predict(PredictConfig(**options, output=str(tmp_path / "held_out"), cases="held_out"))  # type: ignore[arg-type]
    for path in held_out:
        expected = nibabel.load(finished / "fold_0" / "validation" / path.name)
        np.testing.assert_array_equal(nibabel.load(path).dataobj, expected.dataobj)
    assert any(np.any(nibabel.load(path).dataobj) for path in held_out)
    for path in api.predict(PredictConfig(**options, output=str(tmp_path / "all"))):  # type: ignore[arg-type]
        assert not np.any(nibabel.load(path).dataobj)
