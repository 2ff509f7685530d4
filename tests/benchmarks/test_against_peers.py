"""Benchmarks against the peers: lengths fitted to a time, one split for all, what is done is not done again."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.datasets.dataset import read_dataset
from pipeline.synthetic import make_synthetic_case

COMMANDS = ("accuracy", "preprocess", "data_path", "step", "table")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(load, command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["against_peers.py", command, "--help"])
    with pytest.raises(SystemExit) as ended:
        load("against_peers").main()
    assert ended.value.code == 0
    assert "options:" in capsys.readouterr().out


@given(
    seconds=st.floats(30, 1e5),
    iteration=st.floats(0.01, 30),
    epoch=st.floats(0, 10),
    validation=st.floats(0, 100),
    validations=st.integers(0, 6),
    min_iterations=st.integers(1, 8),
)
def test_a_fitted_training_is_over_in_time_and_one_more_epoch_is_not(
    load, seconds, iteration, epoch, validation, validations, min_iterations
):
    schedule = load("peers.schedule")
    pace = schedule.Pace(iteration, epoch, validation if validations else 0.0)
    for_validations = max(pace.validation, 0.1 * seconds) if validations else 0.0
    try:
        found = schedule.fit_schedule(seconds, pace, validations=validations, min_iterations=min_iterations)
    except ValueError:
        assert min_iterations * iteration + epoch > seconds - for_validations - 1e-6
        return
    assert pace.seconds_of(found) <= seconds * (1 + 1e-9)
    assert found.iterations_per_epoch >= min_iterations
    one_more = found.iterations_per_epoch * iteration + epoch
    assert pace.seconds_of(found) + one_more > seconds - for_validations - 1e-6


def test_a_training_that_is_cheap_is_divided_into_about_twenty_epochs(load):
    schedule = load("peers.schedule")
    found = schedule.fit_schedule(300, schedule.Pace(0.38, 0.1, 3.0), validations=4)
    assert 18 <= found.epochs <= 22
    assert found.num_validations <= 4
    assert schedule.Pace(0.38, 0.1, 3.0).seconds_of(found) == pytest.approx(300, rel=0.06)


def test_validations_that_take_long_are_done_less_often(load):
    schedule = load("peers.schedule")
    assert schedule.fit_schedule(300, schedule.Pace(0.5, 0, 40.0), validations=4).num_validations == 1
    assert schedule.fit_schedule(300, schedule.Pace(0.5, 0, 14.0), validations=4).num_validations == 2


def test_a_time_in_which_nothing_fits_is_refused(load):
    schedule = load("peers.schedule")
    with pytest.raises(ValueError, match=r"no epoch of 5 iteration\(s\) of 9.0 s fits into 30 s"):
        schedule.fit_schedule(30, schedule.Pace(9.0), min_iterations=5)


def test_all_sides_get_the_same_files_and_voxfits_own_split(load, project_root, tmp_path):
    cases = load("peers.raw_dataset").make_cases(project_root / "data_samples" / "msd_blobs", tmp_path, num_folds=4)
    source, raw, held_out = cases.source, read_dataset(cases.raw), read_dataset(cases.held_out)
    assert [case.case_id for case in raw.cases] == [case.case_id for case in source.cases]
    assert tuple(case.case_id for case in held_out.cases) == cases.fold.validation
    assert not set(cases.fold.train) & set(cases.fold.validation)
    for ours, theirs in zip(source.cases, raw.cases, strict=True):
        assert theirs.label.resolve() == ours.label.resolve()
        assert [path.resolve() for path in theirs.images] == [path.resolve() for path in ours.images]
        assert cases.files_of(ours.case_id) == ([str(ours.images[0].resolve())], str(ours.label.resolve()))


def test_labels_that_are_not_consecutive_are_refused(load, tmp_path):
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
    for number in range(2):
        label = np.zeros((6, 8, 10), np.uint8)
        label[2:4, 3:5, 4:6] = 7
        nib.save(nib.Nifti1Image(label.astype(np.float32), np.eye(4)), tmp_path / f"imagesTr/case{number}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / f"labelsTr/case{number}.nii.gz")
    content = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "far": 7}, "numTraining": 2}
    (tmp_path / "dataset.json").write_text(json.dumps(content | {"file_ending": ".nii.gz"}))
    with pytest.raises(SystemExit, match="label values must be 0, 1, 2"):
        load("peers.raw_dataset").make_cases(tmp_path, tmp_path / "work", num_folds=2)


def test_a_process_is_measured_with_its_children_and_bound_to_its_cpus(load, tmp_path):
    child = "import os; held = bytearray(80 << 20); held[::4096] = b'x' * len(held[::4096]); sum(range(10**7))"
    program = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r} + '; import time; time.sleep(1)'])"
    )
    program += "; import os; print(len(os.sched_getaffinity(0)))"
    runner = load("peers.processes").Runner(num_cpus=1, logs=tmp_path)
    usage = runner.run("program", [sys.executable, "-c", program])
    assert (tmp_path / "program.log").read_text().split() == ["1"]
    assert usage.peak_bytes > 80 << 20
    assert 0 < usage.cpu_seconds <= usage.wall_seconds


def test_a_limit_on_threads_of_the_shell_reaches_no_side(load, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runner = load("peers.processes").Runner(num_cpus=1, logs=tmp_path)
    runner.run("program", [sys.executable, "-c", "import os; print(os.environ.get('OMP_NUM_THREADS'))"])
    assert (tmp_path / "program.log").read_text().split() == ["None"]


def test_a_process_that_fails_is_told_with_the_end_of_its_log(load, tmp_path):
    runner = load("peers.processes").Runner(num_cpus=1, logs=tmp_path)
    with pytest.raises(SystemExit, match=r"(?s)failed with code 3.*the reason"):
        runner.run("program", [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"])


def test_the_time_of_a_training_is_that_of_its_log(load):
    log = """2026-11-25 22:41:23,500 INFO 156 training cases; 720 optimiser steps in all
2026-11-25 22:41:46,800 INFO epoch 1 of 2: train loss 1.4811
2026-11-25 22:42:11,000 INFO epoch 2 of 2: train loss 0.8966
2026-11-25 22:42:19,000 INFO best weights are of epoch 2
"""
    assert load("peers.voxfit_side").logged_seconds(log) == pytest.approx(47.5)


class CountedSide:
    """A side that trains nothing and remembers what it was asked to."""

    name, key, rehearsal, min_iterations, validations, mirrorings = "voxfit", "voxfit-1", "rehearsal", 1, 0, ()

    def __init__(self, accuracy) -> None:
        self.accuracy, self.asked = accuracy, []

    def train(self, schedule, *, seed, folder):
        self.asked.append(schedule)
        folder.mkdir(parents=True)
        pace = self.accuracy.Pace(iteration=2.0)
        usage = importlib.import_module("peers.processes").Usage(1.0, 1.0, 1)
        return self.accuracy.Training(60.0, pace, 30, 2, (4, 6, 8), usage, {})


def test_a_finished_cell_is_read_and_an_unfinished_one_begun_anew(load, tmp_path):
    accuracy = load("peers.accuracy")
    side, options = CountedSide(accuracy), argparse.Namespace(work_dir=tmp_path, mirrorings=())
    cell = accuracy.Cell("voxfit", 1, 0)
    left = tmp_path / "cells" / cell.name_of(side) / "run" / cell.name_of(side)
    left.mkdir(parents=True)
    first = accuracy.do_cell(cell, side, None, options)
    assert side.asked[0] == "rehearsal"
    assert side.asked[1].iterations * 2.0 <= 60
    assert first["patches"] == 60
    assert accuracy.do_cell(cell, side, None, options) == first
    assert len(side.asked) == 2
    side.key = "voxfit-2"
    accuracy.do_cell(cell, side, None, options)
    assert len(side.asked) == 4


def test_a_side_that_does_something_else_has_another_key(load, project_root, tmp_path):
    raw_dataset, sides = load("peers.raw_dataset"), load("peers.sides")
    dataset = project_root / "data_samples" / "msd_blobs"
    cases = raw_dataset.make_cases(dataset, tmp_path, num_folds=4)
    others = raw_dataset.make_cases(dataset, tmp_path, num_folds=4, seed=1)
    keys = [
        sides.make_key("voxfit", cases, 2, {"lr": 0.1}),
        sides.make_key("voxfit", cases, 2, {"lr": 0.2}),
        sides.make_key("voxfit", cases, 1, {"lr": 0.1}),
        sides.make_key("voxfit", others, 2, {"lr": 0.1}),
    ]
    assert len(set(keys)) == 4
    assert sides.make_key("voxfit", cases, 2, {"lr": 0.1}) == keys[0]


def test_every_side_has_a_key_and_a_folder_of_its_own_by_what_it_was_told(load, project_root, tmp_path):
    raw_dataset, accuracy = load("peers.raw_dataset"), load("peers.accuracy")
    cases = raw_dataset.make_cases(project_root / "data_samples" / "msd_blobs", tmp_path, num_folds=4)
    common = {"cases": cases, "runner": load("peers.processes").Runner(num_cpus=2, logs=tmp_path), "work": tmp_path}
    (tmp_path / "a.yaml").write_text("train: {seed: 1}\n")
    (tmp_path / "b.yaml").write_text("train: {seed: 2}\n")
    (tmp_path / "c.yaml").write_text("# the same\ntrain: {seed: 1}\n")
    a, b, c = (accuracy.VoxfitSide(**common, config=tmp_path / f"{n}.yaml", dataset=tmp_path) for n in "abc")
    nnunet, unmirrored = (accuracy.NnunetSide(**common, environment=tmp_path, mirrors=each) for each in (True, False))
    assert a.folder == c.folder == tmp_path / a.key
    assert len({a.folder, b.folder, nnunet.folder, unmirrored.folder}) == 4
    make_key = load("peers.sides").make_key
    assert a.key == make_key("voxfit", cases, 2, {"train": {"seed": 1}})
    assert nnunet.key == make_key("nnunet", cases, 2, True)
    assert unmirrored.mirrorings == ("none",)


def test_the_sides_take_turns_in_another_order_for_every_budget(load):
    accuracy = load("peers.accuracy")
    options = argparse.Namespace(seeds=[0], minutes=[20, 5, 10], sides=accuracy.SIDES)
    cells = list(accuracy.order_cells(options))
    assert [cell.minutes for cell in cells] == [5] * 6 + [10] * 6 + [20] * 6
    assert len({cells[index].side for index in (0, 6, 12)}) == 3


@pytest.mark.parametrize("mirrors", [True, False])
def test_monais_patches_are_flipped_only_where_that_was_asked_for(load, mirrors):
    transforms = load("peers.monai_data").make_patches({"patch_size": (8, 8, 8), "mirrors": mirrors})
    assert sum(type(each).__name__ == "RandFlipd" for each in transforms) == (3 if mirrors else 0)


def test_monais_side_trains_and_predicts_on_the_native_grid(load, project_root, tmp_path):
    """Its worker, in this environment: it needs MONAI and nothing of the project."""
    affine = np.array([[0, -1.5, 0, 7], [1.1, 0, 0.2, -4], [0, 0.1, 2.0, 3], [0, 0, 0, 1.0]])
    files = []
    for number in range(3):
        made = make_synthetic_case(number, shape=(14, 18, 12))
        image, label = tmp_path / f"case{number}_0000.nii.gz", tmp_path / f"case{number}.nii.gz"
        nib.save(nib.Nifti1Image(made.image.array[0].astype(np.float32), affine), image)
        nib.save(nib.Nifti1Image((made.label.array[0] > 0).astype(np.uint8), affine), label)
        files.append({"image": [str(image)], "label": str(label)})
    request = {"seed": 0, "num_threads": 1, "optimizer": "sgd", "lr": 0.01, "batch_size": 2, "ct": None}
    request["mirrors"] = True
    request |= {"in_channels": 1, "num_classes": 2, "patch_size": [16, 16, 16], "spacing": [1.0, 1.5, 2.0]}
    request |= {"features": [4, 8, 8], "strides": [[1] * 3, [2] * 3, [2] * 3], "kernel_sizes": [[3] * 3] * 3}
    request |= {
        "epochs": 2,
        "iterations_per_epoch": 2,
        "validate_every": 1,
        "train": files[:2],
        "validation": files[2:],
    }
    request |= {"weights": str(tmp_path / "weights.pt"), "out": str(tmp_path / "out.json")}
    request |= {"cases": [{"case_id": "case2", "image": files[2]["image"]}], "predictions": str(tmp_path / "predicted")}
    (tmp_path / "predicted").mkdir()
    benchmarks = project_root / "scripts" / "benchmarks"
    for do in ("train", "predict"):
        done = subprocess.run(
            [sys.executable, benchmarks / "peers" / "monai_worker.py", do],
            input=json.dumps(request),
            env={"PYTHONPATH": str(benchmarks), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        if do == "train":
            assert json.loads(Path(request["out"]).read_text())["iterations"] == 4
    found = nib.load(tmp_path / "predicted" / "case2.nii.gz")
    assert found.shape == (14, 18, 12)
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)
    assert set(np.unique(np.asarray(found.dataobj))) <= {0, 1}
