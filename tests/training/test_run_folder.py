from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from time import sleep

import pytest

from pipeline.allocation import allotted_cpus
from pipeline.artifacts import read_artifact
from pipeline.config import OptimConfig, TrainOptions
from pipeline.datasets.splits import Splits, make_splits
from pipeline.errors import InputError
from pipeline.rank_place import RankPlace
from pipeline.training.metrics_table import MetricsTable
from pipeline.training.processes import share_cpus
from pipeline.training.run_folder import RunFolder
from pipeline.training.run_lock import run_lock
from pipeline.training.settings import resolve_settings


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_changed_option_is_refused_with_both_values_and_the_ways_out(folder, plan, splits, make_config):
    folder.begin(plan, splits, make_config())
    changed = make_config(optim=OptimConfig(lr=0.5), seed=3)
    with pytest.raises(InputError) as raised:
        folder.begin(plan, splits, changed)
    message = str(raised.value)
    assert "seed (was 0, now 3)" in message
    assert "optim.lr (was auto, now 0.5)" in message
    assert "another --run_dir" in message
    assert "\n" not in message


def test_what_changes_no_result_may_change(folder, plan, splits, make_config):
    folder.begin(plan, splits, make_config())
    config = make_config("elsewhere", hardware={"num_workers": 3, "precision": "32-true"}, validate_every_n_epochs=7)
    folder.begin(plan, splits, replace(config, plan="copied/plan.json", store="/staged/store"))
    assert "num_workers: 3" in folder.config.read_text()


@pytest.mark.parametrize(
    "change", [{"max_epochs": 9}, {"iterations_per_epoch": 9}, {"fold": 1}, {"effective_batch": 8}]
)
def test_what_changes_the_result_may_not(folder, plan, splits, make_config, change):
    folder.begin(plan, splits, make_config())
    with pytest.raises(InputError, match=next(iter(change))):
        folder.begin(plan, splits, make_config(**change))


def test_a_changed_plan_is_refused_whatever_its_path(folder, plan, splits, make_config):
    folder.begin(plan, splits, make_config())
    with pytest.raises(InputError, match=r"the plan's batch_size \(was 2, now 3\)"):
        folder.begin(replace(plan, batch_size=3), splits, make_config())


def test_metrics_keep_the_rows_up_to_the_checkpoint_bit_by_bit(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path, class_names=("liver",))
    for epoch in (1, 2, 3):
        table.append({"epoch": epoch, "train_loss": 1 / 3 / epoch, "val_dice_mean": None, "seconds": 0.1})
    before = path.read_text().splitlines()
    resumed = MetricsTable(path, class_names=("liver",), keep_epochs=2)
    resumed.append({"epoch": 3, "train_loss": 0.5})
    assert path.read_text().splitlines()[:3] == before[:3]
    assert resumed.total("seconds") == pytest.approx(0.2)
    assert [row["epoch"] for row in resumed.rows] == [1, 2, 3]


def test_a_new_run_drops_the_rows_of_one_that_saved_nothing(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv", class_names=())
    table.append({"epoch": 1})
    assert MetricsTable(tmp_path / "metrics.csv", class_names=()).rows == []


def test_the_allotted_cpus_are_shared_by_threads_and_workers(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cpus = allotted_cpus()
    on_cpu = share_cpus(num_threads="auto", num_workers="auto", on_gpu=False, batch_bytes=1000)
    assert on_cpu == (cpus, max(1, min(16, cpus // 4)))
    on_gpu = share_cpus(num_threads="auto", num_workers="auto", on_gpu=True, batch_bytes=1000)
    assert on_gpu.num_workers == max(1, min(16, cpus - 1))
    assert share_cpus(num_threads=1, num_workers=0, on_gpu=False, batch_bytes=1000) == (1, 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    limited = share_cpus(num_threads="auto", num_workers="auto", on_gpu=False, batch_bytes=1000)
    assert limited == (1, on_cpu.num_workers)


def test_workers_whose_patches_do_not_fit_into_memory_are_not_started():
    huge = share_cpus(num_threads=1, num_workers="auto", on_gpu=True, batch_bytes=2**44)
    assert huge.num_workers == 1


def test_auto_takes_the_plans_batch_and_reaches_its_effective_batch(plan, make_config):
    planned = replace(plan, batch_size=2, accumulate_grad_batches=3)
    settings = resolve_settings(planned, make_config(iterations_per_epoch=7, max_epochs=2))
    assert (settings.batch_size, settings.accumulate_grad_batches, settings.total_steps) == (2, 3, 6)
    assert "6 optimiser steps in all (the last of an epoch over 1 only)" in settings.describe()
    assert resolve_settings(planned, make_config(batch_size=4)).accumulate_grad_batches == 2
    assert resolve_settings(planned, make_config(effective_batch=2)).accumulate_grad_batches == 1


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 6, 8, 10, 12, 16])
def test_an_epoch_of_the_usual_length_can_be_shared_by_the_gpus_that_nodes_have(plan, make_config, num_ranks):
    usual = make_config(iterations_per_epoch=TrainOptions.iterations_per_epoch)
    place = RankPlace(rank=1, num_ranks=num_ranks, num_local_ranks=num_ranks)
    assert resolve_settings(plan, usual, place).pace.passes_per_epoch * num_ranks == usual.iterations_per_epoch


def test_several_devices_are_refused(plan, make_config):
    with pytest.raises(InputError, match=r"hardware\.devices: 2 are asked for, and 1 process"):
        resolve_settings(plan, make_config(hardware={"devices": 2}))


def test_a_folder_with_a_damaged_config_is_named(folder, plan, splits, make_config):
    folder.begin(plan, splits, make_config())
    Path(folder.config).write_text("[unclosed")
    with pytest.raises(InputError, match=r"config\.yaml: holds no options"):
        folder.begin(plan, splits, make_config())


def test_folds_are_kept_with_the_run_and_may_be_replaced_until_something_was_trained(folder, plan, splits, make_config):
    folder.begin(plan, splits, make_config())
    assert read_artifact(folder.splits, Splits) == splits
    others = make_splits({f"case_{index}": "" for index in range(6)}, num_folds=2, seed=5)
    folder.begin(plan, others, make_config())
    assert read_artifact(folder.splits, Splits) == others


FORK = multiprocessing.get_context("fork")


def _try_to_lock(folder: Path, answers) -> None:
    try:
        with run_lock(folder):
            answers.put("")
    except InputError as error:
        answers.put(str(error))


def answer_of_another_process(folder: Path) -> str:
    answers = FORK.SimpleQueue()
    process = FORK.Process(target=_try_to_lock, args=(folder, answers))
    process.start()
    answer = answers.get()
    process.join()
    return answer


def test_a_second_process_in_a_run_folder_is_refused_with_one_line_while_the_first_is_there(tmp_path):
    folder = tmp_path / "new" / "run"
    with run_lock(folder):
        answer = answer_of_another_process(folder)
    assert answer.startswith(f"{folder}: another process is training in this folder")
    assert "--run_dir" in answer
    assert "\n" not in answer
    assert answer_of_another_process(folder) == ""


def _lock_and_fork(folder: Path, pids) -> None:
    with run_lock(folder):
        worker = FORK.Process(target=sleep, args=(60,))
        worker.start()
        pids.put(worker.pid)
        sleep(60)


def test_the_lock_ends_with_a_killed_process_even_if_a_worker_of_it_lives_on(tmp_path):
    pids = FORK.SimpleQueue()
    process = FORK.Process(target=_lock_and_fork, args=(tmp_path, pids))
    process.start()
    worker = pids.get()
    try:
        assert "another process" in answer_of_another_process(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        os.kill(worker, 0)  # is alive
        assert answer_of_another_process(tmp_path) == ""
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="run: cannot be written"), run_lock(tmp_path / "file" / "run"):
        pass
