"""Trainings that read from a copy of their store: the same run, stopped in the copying too, wherever the copy is."""

from __future__ import annotations

import os
import shutil
import signal
from itertools import count
from pathlib import Path
from time import sleep

import pytest
import torch

from pipeline.cli import main
from pipeline.errors import InputError, StoppedError
from pipeline.networks.unet import UNet
from pipeline.store import CaseStore, staging
from pipeline.training.trainer import fit_fold

LONG = 30.0


@pytest.fixture
def own_store(store, tmp_path) -> Path:
    """A store that a test may change."""
    return Path(shutil.copytree(store, tmp_path / "store"))


class TakesStoreAway(UNet):
    """The plan's U-Net, at whose first pass the store is gone; it may be stopped at another one."""

    def __init__(self, plan, store: Path | None = None, *, stopped_at: int = 0) -> None:
        super().__init__(plan.num_channels, plan.num_classes, plan.network, fused_head=True)
        self.store, self.stopped_at, self.passes = store, stopped_at, 0

    def forward(self, x):
        self.passes += 1
        if self.store is not None and self.store.exists():
            self.store.rename(self.store.with_name("gone"))
        if self.passes == self.stopped_at:
            raise KeyboardInterrupt
        return super().forward(x)


def network(plan, *arguments, **options) -> TakesStoreAway:
    torch.manual_seed(5)
    return TakesStoreAway(plan, *arguments, **options)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_and_validation_read_nothing_but_the_copy(
    plan, store, own_store, splits, make_config, assert_same_run, tmp_path, num_workers
):
    plain = fit_fold(plan, store, splits, make_config("plain"), network=network(plan))
    config = make_config(stage_to=str(tmp_path / "disk"), hardware={"num_workers": num_workers})
    result = fit_fold(plan, own_store, splits, config, network=network(plan, own_store))
    assert not own_store.exists()
    assert_same_run(result.run_dir, plain.run_dir)
    (copy,) = (tmp_path / "disk").iterdir()
    fold = splits.folds[0]
    assert set(CaseStore(copy).case_ids) == {*fold.train, *fold.validation}


def test_a_run_goes_on_with_another_folder_or_none(plan, store, splits, make_config, assert_same_run, tmp_path):
    plain = fit_fold(plan, store, splits, make_config("plain"), network=network(plan))
    for folder, at in (("disk_a", 3), ("disk_b", 4)):
        config = make_config(stage_to=str(tmp_path / folder))
        with pytest.raises(StoppedError):
            fit_fold(plan, store, splits, config, network=network(plan, stopped_at=at))
    assert len(list(tmp_path.glob("disk_*/voxfit-store-*/store.json"))) == 2
    result = fit_fold(plan, store, splits, make_config(), network=network(plan))
    assert_same_run(result.run_dir, plain.run_dir)


def test_a_finished_run_copies_nothing(plan, store, splits, make_config, tmp_path):
    fit_fold(plan, store, splits, make_config())
    fit_fold(plan, store, splits, make_config(stage_to=str(tmp_path / "disk")))
    assert not (tmp_path / "disk").exists()


def test_a_rehearsal_reads_the_copy_and_makes_no_other(plan, store, splits, make_config, tmp_path):
    config = make_config(stage_to=str(tmp_path / "disk"), max_epochs="auto", max_time="1h")
    with pytest.raises(StoppedError):
        fit_fold(plan, store, splits, config, network=network(plan, stopped_at=1))
    assert len(list(tmp_path.rglob("voxfit-store-*"))) == 1


def pausing_copy(marker: Path, at: int):
    """Makes the process write `marker` and pause in the middle of a file that it copies."""

    def prepare() -> None:
        real, calls = staging._blocks, count(1)

        def paused(path):
            for block in real(path):
                yield block[:100]
                if next(calls) == at:
                    marker.write_text("")
                    sleep(LONG)
                yield block[100:]

        staging._blocks = paused

    return prepare


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_while_it_copies_ends_with_75_and_keeps_what_is_whole(
    trainings, undisturbed, assert_same_run, tmp_path, number
):
    disk, run_dir, marker = tmp_path / "disk", tmp_path / "run", tmp_path / "here"
    staged = type(trainings)([*trainings.arguments, "--stage_to", str(disk)])
    process = staged.start(run_dir, pausing_copy(marker, at=8))
    while not marker.exists():
        assert process.exitcode is None
        sleep(0.005)
    os.kill(process.pid, number)
    process.join(LONG / 2)
    assert process.exitcode == 75
    assert f"while the store was copied to {disk} ({signal.Signals(number).name})" in (run_dir / "log.txt").read_text()
    (copy,) = disk.iterdir()
    kept = {path: path.stat().st_ino for path in copy.rglob("*.b2nd")}
    # Two whole cases of three files, and one file of the next.
    assert (len(kept), len(CaseStore(copy).case_ids)) == (7, 2)
    assert not list(copy.rglob("*.partial.*"))
    staged.finish(run_dir)
    assert all(path.stat().st_ino == inode for path, inode in kept.items())
    assert_same_run(run_dir, undisturbed)


def test_folds_that_start_at_the_same_time_share_a_copy_and_train_as_without(
    trainings, undisturbed, assert_same_run, tmp_path
):
    staged = type(trainings)([*trainings.arguments, "--stage_to", str(tmp_path / "disk")])
    other = type(trainings)([*staged.arguments, "--fold", "1"])
    processes = [staged.start(tmp_path / "run"), other.start(tmp_path / "other"), staged.start(tmp_path / "again")]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list((tmp_path / "disk").iterdir())) == 1
    for name in ("run", "again"):
        assert_same_run(tmp_path / name, undisturbed)
    logs = "".join((tmp_path / name / "log.txt").read_text() for name in ("run", "other", "again"))
    assert logs.count("6 case(s) copied in") == 1
    assert logs.count("0 case(s) copied, 6 were there already") == 2


def test_a_variable_that_no_shell_has_filled_in_is_refused(make_config, capsys, tmp_path):
    with pytest.raises(InputError, match="stage_to: variables are filled in by the shell only"):
        make_config(stage_to="$TMPDIR")
    assert main(["train", "--plan", "p", "--store", "s", "--run_dir", str(tmp_path / "r"), "--stage_to", "$X"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
