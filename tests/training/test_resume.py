from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.artifacts import read_artifact, write_artifact
from pipeline.config import AugmentationConfig, OptimConfig
from pipeline.datasets.splits import Splits, make_splits
from pipeline.errors import InputError
from pipeline.geometry import Grid
from pipeline.networks.unet import UNet
from pipeline.plan import NetworkPlan, Plan
from pipeline.run_record import RunRecord
from pipeline.store import StoreInfo, WritableStore
from pipeline.training.run_folder import RunFolder
from pipeline.training.trainer import fit_fold
from tests.training.conftest import assert_equal, read_rows


class PowerCutError(Exception):
    """The machine went down."""


class Dropping(nn.Module):
    """The plan's U-Net with dropout, which fails at a given training pass."""

    def __init__(self, plan, *, fails_at: int = 10**9) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.unet = UNet(plan.num_channels, plan.num_classes, plan.network)
        self.dropout = nn.Dropout3d(0.2)
        self.fails_at, self.passes = fails_at, 0

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        self.passes += self.training
        if self.passes == self.fails_at:
            raise PowerCutError
        output = self.unet(x)
        return [self.dropout(each) for each in output] if isinstance(output, list) else self.dropout(output)


def state_of(run_dir: Path) -> dict:
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "counts")}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_cut_off_again_and_again_ends_bit_by_bit_like_one_that_was_not(
    plan, store, splits, make_config, optimizer
):
    options = {
        "effective_batch": 4,
        "iterations_per_epoch": 5,
        "max_epochs": 4,
        "augmentation": AugmentationConfig(),
        "optim": OptimConfig(name=optimizer, ema_decay=0.9),
    }
    whole = fit_fold(plan, store, splits, make_config("whole", **options), network=Dropping(plan))
    # In the first epoch, with nothing saved; in the second; at the very start of what was the third; in the last.
    for fails_at in (2, 9, 6, 1, 3):
        config = make_config("cut", **options)
        with pytest.raises(PowerCutError):
            fit_fold(plan, store, splits, config, network=Dropping(plan, fails_at=fails_at))
    cut = fit_fold(plan, store, splits, make_config("cut", **options), network=Dropping(plan))
    assert_equal(state_of(cut.run_dir), state_of(whole.run_dir))
    assert read_rows(cut.run_dir) == read_rows(whole.run_dir)
    assert (cut.best_dice, cut.counts) == (whole.best_dice, whole.counts)
    averages = [torch.load(each.best_checkpoint, weights_only=True)["ema_state_dict"] for each in (cut, whole)]
    assert_equal(*averages)


def test_data_workers_and_validation_interval_may_change_on_resume(plan, store, splits, make_config):
    whole = fit_fold(plan, store, splits, make_config("whole"), network=Dropping(plan))
    with pytest.raises(PowerCutError):
        fit_fold(plan, store, splits, make_config("cut"), network=Dropping(plan, fails_at=6))
    config = make_config("cut", hardware={"num_workers": 2}, validate_every_n_epochs=3)
    cut = fit_fold(plan, store, splits, config, network=Dropping(plan))
    assert_equal(state_of(cut.run_dir)["state_dict"], state_of(whole.run_dir)["state_dict"])


def test_a_process_killed_at_random_moments_resumes_to_the_same_end(plan, store, splits, make_config):
    """Each start is killed up to 0.06 s after an epoch's row: while saving, or in one of the epochs after."""
    options = {"max_epochs": 25, "iterations_per_epoch": 2, "validate_every_n_epochs": 3}
    whole = fit_fold(plan, store, splits, make_config("whole", **options))
    config, moments = make_config("killed", **options), random.Random(0)
    metrics = Path(config.run_dir) / "metrics.csv"
    for _ in range(4):
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        process = multiprocessing.get_context("fork").Process(target=fit_fold, args=(plan, store, splits, config))
        process.start()
        while not metrics.exists() or metrics.stat().st_mtime_ns == before:
            assert process.exitcode is None
            sleep(0.002)
        sleep(moments.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    (Path(config.run_dir) / "checkpoints" / ".1.partial.last.ckpt").write_bytes(b"half a checkpoint")
    killed = fit_fold(plan, store, splits, config)
    assert not list(Path(config.run_dir).rglob("*.partial.*"))
    assert_equal(state_of(killed.run_dir), state_of(whole.run_dir))
    assert read_rows(killed.run_dir) == read_rows(whole.run_dir)


@pytest.mark.parametrize(
    ("torn", "used"),
    [
        # Epoch 3 ended last, without a validation, and epoch 2 with one.
        (["last.ckpt"], "previous.ckpt (epoch 2, optimiser step 8)"),
        (["last.ckpt", "previous.ckpt"], "best.ckpt (epoch 2, optimiser step 8)"),
        (["last.ckpt", "best.ckpt"], "previous.ckpt (epoch 2, optimiser step 8)"),
    ],
)
def test_torn_checkpoints_are_named_and_the_newest_whole_one_is_used(
    plan, store, splits, make_config, caplog, torn, used
):
    options = {"max_epochs": 4, "validate_every_n_epochs": 2}
    whole = fit_fold(plan, store, splits, make_config("whole", **options), network=Dropping(plan))
    with pytest.raises(PowerCutError):
        fit_fold(plan, store, splits, make_config("torn", **options), network=Dropping(plan, fails_at=14))
    checkpoints = Path(make_config("torn").run_dir) / "checkpoints"
    for name in torn:
        # A new file: `previous` and `last` may be the same one.
        half = (checkpoints / name).read_bytes()[: (checkpoints / name).stat().st_size // 2]
        (checkpoints / name).unlink()
        (checkpoints / name).write_bytes(half)
    caplog.set_level(logging.WARNING, "voxfit")
    cut = fit_fold(plan, store, splits, make_config("torn", **options), network=Dropping(plan))
    assert "last.ckpt: is torn" in caplog.text
    assert f"going on from {used}" in caplog.text
    assert_equal(state_of(cut.run_dir), state_of(whole.run_dir))
    assert read_rows(cut.run_dir) == read_rows(whole.run_dir)


def test_a_torn_checkpoint_never_becomes_the_one_before(plan, store, splits, make_config):
    """Stopped right after it was gone on from another one: what was saved then is whole, and so is what is kept."""
    with pytest.raises(PowerCutError):
        fit_fold(plan, store, splits, make_config(), network=Dropping(plan, fails_at=10))
    folder = RunFolder(Path(make_config().run_dir))
    folder.last_checkpoint.unlink()
    folder.last_checkpoint.write_bytes(b"torn")
    with pytest.raises(PowerCutError):
        fit_fold(plan, store, splits, make_config(), network=Dropping(plan, fails_at=1))
    for path, epoch in ((folder.last_checkpoint, 2), (folder.previous_checkpoint, 1)):
        assert torch.load(path, weights_only=True)["counts"]["epoch"] == epoch


def test_saves_within_an_epoch_change_nothing_and_are_gone_on_from(plan, store, splits, make_config):
    options = {"effective_batch": 4, "iterations_per_epoch": 5, "optim": OptimConfig(name="adamw", ema_decay=0.9)}
    whole = fit_fold(plan, store, splits, make_config("whole", **options), network=Dropping(plan))
    config = make_config("saved", **options, save_every_minutes=1e-9)
    with pytest.raises(PowerCutError):
        fit_fold(plan, store, splits, config, network=Dropping(plan, fails_at=9))
    last = RunFolder(Path(config.run_dir)).last_checkpoint
    # Three passes of the second epoch were made, the first two of which are a step.
    assert torch.load(last, weights_only=True)["counts"] == {"epoch": 1, "iteration": 7, "optimizer_step": 4}
    saved = fit_fold(plan, store, splits, make_config("saved", **options), network=Dropping(plan))
    assert_equal(state_of(saved.run_dir), state_of(whole.run_dir))
    assert read_rows(saved.run_dir) == read_rows(whole.run_dir)


def test_a_run_killed_after_its_last_epoch_only_writes_its_record(plan, store, splits, make_config):
    whole = fit_fold(plan, store, splits, make_config())
    record = whole.run_dir / "run.json"
    finished = record.read_text()
    record.write_text(finished.replace('"finished"', '"running"'))
    rows, written = read_rows(whole.run_dir), whole.last_checkpoint.stat().st_mtime_ns
    assert fit_fold(plan, store, splits, make_config()) == whole
    before, after = json.loads(finished), json.loads(record.read_text())
    # This start took time as well.
    assert after.pop("wall_seconds") > before.pop("wall_seconds")
    assert after == before
    assert read_rows(whole.run_dir) == rows
    assert whole.last_checkpoint.stat().st_mtime_ns == written


@pytest.mark.parametrize("deleted", [True, False])
def test_a_run_does_not_go_on_with_other_folds_even_if_they_were_made_anew(
    plan, store, splits, make_config, tmp_path, deleted
):
    with pytest.raises(PowerCutError):
        fit_fold(plan, store, splits, make_config(), network=Dropping(plan, fails_at=6))
    folder = RunFolder(tmp_path / "run")
    others = make_splits({f"case_{index}": "" for index in range(6)}, num_folds=3, seed=9)
    assert others.folds[0] != splits.folds[0]
    folder.splits.unlink() if deleted else write_artifact(folder.splits, others)
    with pytest.raises(InputError, match="the folds are not those the run was trained with") as raised:
        fit_fold(plan, store, others, make_config(), network=Dropping(plan))
    assert "give another --run_dir" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert fit_fold(plan, store, splits, make_config(), network=Dropping(plan)).counts.epoch == 3
    assert read_artifact(folder.splits, Splits) == splits


def test_a_record_without_a_hash_is_compared_by_the_saved_folds(plan, store, splits, make_config, tmp_path):
    with pytest.raises(PowerCutError):
        fit_fold(plan, store, splits, make_config(), network=Dropping(plan, fails_at=6))
    folder = RunFolder(tmp_path / "run")
    record = read_artifact(folder.record, RunRecord)
    assert record.splits_hash
    write_artifact(folder.record, replace(record, splits_hash=""))
    others = make_splits({f"case_{index}": "" for index in range(6)}, num_folds=3, seed=9)
    with pytest.raises(InputError, match="the folds are not those"):
        fit_fold(plan, store, others, make_config(), network=Dropping(plan))
    assert fit_fold(plan, store, splits, make_config(), network=Dropping(plan)).counts.epoch == 3


@pytest.fixture
def thick_plan(plan) -> Plan:
    """Thick slices, two channels, four stages with losses of their own for the lower ones."""
    network = NetworkPlan(
        features_per_stage=(4, 8, 8, 8),
        strides=((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2)),
        kernel_sizes=((3, 3, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
        num_blocks_per_stage=(1, 1, 1, 1),
        num_decoder_blocks=1,
        num_groups=2,
        deep_supervision=True,
    )
    channels = (*plan.channels, replace(plan.channels[0], name="T2"))
    shape = {"target_spacing": (1.0, 1.0, 4.0), "anisotropic_axis": 2, "patch_size": (16, 24, 8)}
    return replace(plan, channels=channels, network=network, **shape)


@pytest.fixture
def thick_store(thick_plan, tmp_path) -> Path:
    """Cases whose classes are the signs of the two channels, plus noise."""
    store = WritableStore.create(tmp_path / "thick_store", StoreInfo.of(thick_plan))
    for index in range(6):
        rng, shape = np.random.default_rng(index), (22 - index, 25 + index, 7 + index)
        i, j, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
        outer, inner = i**2 + j**2 < 0.7, i**2 + j**2 < 0.3
        image = np.stack([outer, inner]) + 0.2 * rng.standard_normal((2, *shape))
        label = outer.astype(np.int16) + inner
        store.write_case(f"case_{index}", image.astype(np.float32), label, native_grid=Grid(shape, np.eye(4)))
    return store.folder


def test_thick_slices_two_channels_and_deep_supervision_train_and_resume(thick_plan, thick_store, splits, make_config):
    options = {
        "store": str(thick_store),
        "iterations_per_epoch": 12,
        "augmentation": AugmentationConfig(),
        "optim": OptimConfig(name="adamw", lr=0.02),
    }
    assert len(UNet(2, 3, thick_plan.network)(torch.zeros(1, 2, 16, 24, 8))) > 1
    whole = fit_fold(thick_plan, thick_store, splits, make_config("whole", **options), network=Dropping(thick_plan))
    config = make_config("cut", **options)
    with pytest.raises(PowerCutError):
        fit_fold(thick_plan, thick_store, splits, config, network=Dropping(thick_plan, fails_at=20))
    cut = fit_fold(thick_plan, thick_store, splits, config, network=Dropping(thick_plan))
    assert_equal(state_of(cut.run_dir), state_of(whole.run_dir))
    assert read_rows(cut.run_dir) == read_rows(whole.run_dir)
    losses = [float(row["train_loss"]) for row in read_rows(whole.run_dir)]
    assert losses[-1] < 0.8 * losses[0]
