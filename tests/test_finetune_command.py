"""`voxfit run` that begins with the weights of another `voxfit run`, as a person would type it."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from pipeline.artifacts import read_artifact
from pipeline.cli import main
from pipeline.plan import Plan
from pipeline.synthetic import make_synthetic_case, write_msd_dataset

OPTIONS = {
    "vram": "2GiB",
    "max_epochs": 1,
    "num_workers": 1,
    "plan.patch_size": "[16,24,16]",
    "plan.base_features": 4,
    "plan.max_features": 8,
    "train.num_folds": 2,
    "train.iterations_per_epoch": 2,
    "train.hardware.accelerator": "cpu",
    "train.hardware.num_workers": 0,
    "train.hardware.num_threads": 1,
}


def words(dataset: Path, work_dir: Path, **changes: object) -> list[str]:
    options = {"dataset": dataset, "work_dir": work_dir, **OPTIONS, **changes}
    return ["run", *(word for key, value in options.items() for word in (f"--{key}", str(value)))]


def make_dataset(folder: Path, *, first: int, num_classes: int) -> Path:
    cases = {
        f"case_{seed}": make_synthetic_case(
            seed, shape=(18, 26, 20), spacing=(1.0, 1.2, 0.9), num_classes=num_classes, oblique_degrees=12.0
        )
        for seed in range(first, first + 4)
    }
    write_msd_dataset(folder, cases)
    return folder


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two of different cases, with two organs and with three."""
    folder = tmp_path_factory.mktemp("data")
    return (
        make_dataset(folder / "two", first=0, num_classes=3),
        make_dataset(folder / "three", first=10, num_classes=4),
    )


@pytest.fixture(scope="module")
def source(datasets: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    work_dir = tmp_path_factory.mktemp("source") / "work"
    assert main(words(datasets[0], work_dir)) == 0
    return work_dir


def test_a_run_on_other_classes_begins_with_the_weights_and_stands_on_its_own(datasets, source, tmp_path):
    pytest.importorskip("mlflow")
    copy, tuned = shutil.copytree(source, tmp_path / "copy"), tmp_path / "tuned"
    options = {"train.init_from": copy / "fold_0", "train.freeze": "encoder", "train.tracking.name": "mlflow"}
    command = words(datasets[1], tuned, **options)
    assert main(command) == 0
    assert (tuned / "mlruns").is_dir()
    shutil.rmtree(copy)
    assert main(command) == 0
    page = tmp_path / "compare.html"
    assert main(["compare", str(source / "fold_0"), str(tuned / "fold_0"), "--out", str(page)]) == 0
    assert "option.init_from" in page.read_text()
    assert "option.freeze" in page.read_text()
    assert "option.tracking" not in page.read_text()
    image = next((datasets[1] / "imagesTr").glob("*.nii.gz"))
    prediction = ["predict", "--run_dir", str(tuned / "fold_0"), "--input", str(image), "--accelerator", "cpu"]
    assert main([*prediction, "--output", str(tmp_path / "predictions")]) == 0


def test_a_source_that_is_not_there_is_said_before_anything_is_made(datasets, source, tmp_path, capsys):
    assert main(words(datasets[1], tmp_path / "tuned", **{"train.init_from": source / "fold_7"})) == 2
    assert "fold_7: does not exist" in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists()
    # The work folder instead of the run folder in it.
    assert main(words(datasets[1], tmp_path / "tuned", **{"train.init_from": source})) == 2
    assert f"Give one of its runs: {source / 'fold_0'}" in capsys.readouterr().err


def test_another_network_is_said_before_preprocessing_and_the_advice_plans_the_same_one(
    datasets, source, tmp_path, capsys
):
    options = {"train.init_from": source / "fold_0", "plan.base_features": 8, "plan.max_features": 16}
    assert main(words(datasets[1], tmp_path / "tuned", **options)) == 2
    said = capsys.readouterr().err
    assert re.search(r"features_per_stage \(there \(4, 8.*\), here \(8, 16", said), said
    assert not (tmp_path / "tuned" / "store").exists()
    advice = re.search(r"--patch_size .*", said)
    assert advice is not None
    out = tmp_path / "again" / "plan.json"
    command = ["plan", "--dataset", str(datasets[1]), "--out", str(out), "--vram", "2GiB", "--num_workers", "1"]
    assert main([*command, *shlex.split(advice.group().rstrip("."))]) == 0
    assert read_artifact(out, Plan).network == read_artifact(source / "plan.json", Plan).network
