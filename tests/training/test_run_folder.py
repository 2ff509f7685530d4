from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.allocation import allotted_cpus
from pipeline.config import OptimConfig
from pipeline.errors import InputError
from pipeline.training.metrics_table import MetricsTable
from pipeline.training.processes import share_cpus
from pipeline.training.run_folder import RunFolder
from pipeline.training.settings import resolve_settings


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_changed_option_is_refused_with_both_values_and_the_ways_out(folder, plan, make_config):
    folder.begin(plan, make_config())
    changed = make_config(optim=OptimConfig(lr=0.5), seed=3)
    with pytest.raises(InputError) as raised:
        folder.begin(plan, changed)
    message = str(raised.value)
    assert "seed (was 0, now 3)" in message
    assert "optim.lr (was auto, now 0.5)" in message
    assert "another --run_dir" in message
    assert "\n" not in message


def test_what_changes_no_result_may_change(folder, plan, make_config):
    folder.begin(plan, make_config())
    config = make_config("elsewhere", hardware={"num_workers": 3, "precision": "32-true"}, validate_every_n_epochs=7)
    folder.begin(plan, replace(config, plan="copied/plan.json", store="/staged/store"))
    assert "num_workers: 3" in folder.config.read_text()


@pytest.mark.parametrize(
    "change", [{"max_epochs": 9}, {"iterations_per_epoch": 9}, {"fold": 1}, {"effective_batch": 8}]
)
def test_what_changes_the_result_may_not(folder, plan, make_config, change):
    folder.begin(plan, make_config())
    with pytest.raises(InputError, match=next(iter(change))):
        folder.begin(plan, make_config(**change))


def test_a_changed_plan_is_refused_whatever_its_path(folder, plan, make_config):
    folder.begin(plan, make_config())
    with pytest.raises(InputError, match=r"the plan's batch_size \(was 2, now 3\)"):
        folder.begin(replace(plan, batch_size=3), make_config())


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


def test_the_allotted_cpus_are_shared_by_threads_and_workers():
    cpus = allotted_cpus()
    on_cpu = share_cpus(num_threads="auto", num_workers="auto", on_gpu=False, batch_bytes=1000)
    assert on_cpu == (cpus, max(1, min(16, cpus // 4)))
    on_gpu = share_cpus(num_threads="auto", num_workers="auto", on_gpu=True, batch_bytes=1000)
    assert on_gpu.num_workers == max(1, min(16, cpus - 1))
    assert share_cpus(num_threads=1, num_workers=0, on_gpu=False, batch_bytes=1000) == (1, 0)


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


def test_several_devices_are_refused(plan, make_config):
    with pytest.raises(InputError, match=r"hardware\.devices: 2 devices"):
        resolve_settings(plan, make_config(hardware={"devices": 2}))


def test_a_folder_with_a_damaged_config_is_named(folder, plan, make_config):
    folder.begin(plan, make_config())
    Path(folder.config).write_text("[unclosed")
    with pytest.raises(InputError, match=r"config\.yaml: is no config of a run"):
        folder.begin(plan, make_config())
