"""`scripts/batch_size_study.py`: trainings that differ in their batch and in nothing else that matters."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from types import ModuleType

import pytest

from pipeline import api
from pipeline.artifacts import read_artifact
from pipeline.config import PlanConfig, PreprocessConfig
from pipeline.evaluation.comparison import Comparison

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "batch_size_study.py"
OPTIONS = (
    "--num_folds",
    "4",
    "--hardware.accelerator",
    "cpu",
    "--hardware.num_threads",
    "1",
    "--hardware.num_workers",
    "0",
)


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("batch_size_study", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(300)
def test_every_batch_sees_the_same_samples_in_a_run_of_its_own_on_one_page(tmp_path):
    dataset, plan, store = ROOT / "data_samples" / "msd_blobs", tmp_path / "plan.json", tmp_path / "store"
    api.plan(PlanConfig(dataset=str(dataset), out=str(plan), vram="2GiB", base_features=4, num_workers=1))
    api.preprocess(PreprocessConfig(dataset=str(dataset), plan=str(plan), store=str(store), num_workers=1))
    out = tmp_path / "study"
    command = [sys.executable, str(SCRIPT), "--plan", str(plan), "--store", str(store), "--out_dir", str(out)]
    command += ["--batches", "1", "4", "1x4", "--samples", "15", "--epochs", "2", "--lr_rule", "sqrt", *OPTIONS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = read_artifact(out / "compare.json", Comparison)
    assert [run.samples for run in found.runs] == [16, 16, 16]
    assert [run.optimizer_step for run in found.runs] == [16, 4, 4]
    assert found.different_settings["option.optim.lr"] == ("0.001", "0.002", "0.002")
    assert set(found.different_settings) == {
        *("option.batch_size", "option.effective_batch", "option.iterations_per_epoch", "option.optim.lr"),
        *("run.batch_size", "run.accumulate_grad_batches"),
    }
    # The same patches: four at once, or one after the other.
    at_once, accumulated = (run.curves["train_loss"] for run in found.runs[1:])
    assert accumulated == pytest.approx(at_once, rel=0.05)
    assert "batch_1x4" in done.stdout
    assert (out / "compare.html").is_file()


def test_epochs_are_whole_steps_of_every_batch(study):
    batches = [study.parse_batch(text) for text in ("1", "6", "2x2")]
    per_epoch = study.samples_per_epoch(1000, 10, batches)
    assert per_epoch == 96
    assert all(per_epoch % batch.effective == 0 for batch in batches)
    assert study.samples_per_epoch(1, 10, batches) == 12


@pytest.mark.parametrize("text", ["0", "4x", "x4", "4x0", "-1", "1.5"])
def test_what_is_no_batch_is_refused(study, text):
    with pytest.raises(ArgumentTypeError, match=f"got {text}"):
        study.parse_batch(text)


def test_a_wrong_option_of_the_training_is_told_before_anything_is_trained(tmp_path):
    command = [sys.executable, str(SCRIPT), "--plan", "p", "--store", "s", "--out_dir", str(tmp_path / "o")]
    command += ["--batches", "1", "--samples", "8", "--optim.lrr", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean optim.lr?" in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--max_epochs", "3"), "--max_epochs follows from --epochs"),
        (("--run_dir=elsewhere",), "--run_dir follows from --out_dir"),
        (("--batch_size", "2"), "--batch_size follows from --batches"),
    ],
)
def test_options_that_the_study_decides_itself_are_refused_and_neither_ignored_nor_followed(tmp_path, given, said):
    command = [sys.executable, str(SCRIPT), "--plan", "p", "--store", "s", "--out_dir", str(tmp_path / "o")]
    command += ["--batches", "1", "--samples", "8", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "o").exists()
