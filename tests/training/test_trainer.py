from __future__ import annotations

import csv
import json
import logging
import os
import signal

import pytest
import torch
import yaml
from torch import Tensor, nn

from pipeline.artifacts import read_artifact
from pipeline.config import AugmentationConfig, OptimConfig
from pipeline.datasets.splits import Fold, Splits, select_fold
from pipeline.errors import InputError, StoppedError
from pipeline.networks.norms import replace_batchnorm
from pipeline.networks.unet import UNet
from pipeline.networks.weights import read_weights
from pipeline.plan import Plan
from pipeline.run_record import Counts
from pipeline.training.run_folder import RunFolder
from pipeline.training.trainer import fit_fold

COLUMNS = (
    "epoch,iteration,optimizer_step,seconds,data_wait_share,peak_vram_bytes,peak_ram_bytes,lr,train_loss,"
    "val_dice_mean,val_dice_outer,val_dice_inner,validation_seconds,noise_scale"
)


def rows_of(run_dir) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_a_run_leaves_everything_in_its_folder(plan, store, splits, make_config, caplog):
    caplog.set_level(logging.INFO, "voxfit")
    config = make_config(effective_batch=4)
    result = fit_fold(plan, store, splits, config)
    folder = RunFolder(result.run_dir)
    assert read_artifact(folder.plan, Plan) == plan
    assert read_artifact(folder.splits, Splits) == splits
    assert yaml.safe_load(folder.config.read_text())["max_epochs"] == 3
    assert folder.metrics.read_text().splitlines()[0] == COLUMNS
    assert list((folder.path / "tensorboard").glob("events.*"))
    assert result.counts == Counts(epoch=3, iteration=12, optimizer_step=6)
    counts = [(row["epoch"], row["iteration"], row["optimizer_step"]) for row in rows_of(folder.path)]
    assert counts == [("1", "4", "2"), ("2", "8", "4"), ("3", "12", "6")]
    assert [bool(row["val_dice_mean"]) for row in rows_of(folder.path)] == [False, True, True]
    assert "batch 2 x accumulation 2" in caplog.text
    assert "epoch 3 of 3: train loss" in caplog.text
    assert "iteration 12, optimiser step 6" in caplog.text


def test_the_record_tells_the_best_weights_and_every_validation_case(plan, store, splits, make_config):
    result = fit_fold(plan, store, splits, make_config())
    record = json.loads((result.run_dir / "run.json").read_text())
    scores = [float(row["val_dice_mean"] or -1) for row in rows_of(result.run_dir)]
    assert record["status"] == "finished"
    assert record["best_epoch"] == scores.index(max(scores)) + 1
    assert result.best_dice == record["best_dice"] == pytest.approx(max(scores))
    assert sorted(record["validation"]) == sorted(splits.folds[0].validation)
    by_class = [sum(case[name] for case in record["validation"].values()) / 2 for name in ("outer", "inner")]
    assert sum(by_class) / 2 == pytest.approx(max(scores))


def test_checkpoints_load_safely_and_hold_counts_and_weights(plan, store, splits, make_config):
    result = fit_fold(plan, store, splits, make_config())
    network = UNet(plan.num_channels, plan.num_classes, plan.network)
    for path in (result.best_checkpoint, result.last_checkpoint):
        network.load_state_dict(read_weights(path))
        counts = torch.load(path, weights_only=True)["counts"]
        assert counts["iteration"] == 4 * counts["epoch"]
    assert counts == {"epoch": 3, "iteration": 12, "optimizer_step": 12}


def test_training_lowers_the_loss_and_finds_the_ellipsoids(plan, store, splits, make_config):
    optim = OptimConfig(name="adamw", lr=0.02)
    config = make_config(max_epochs=3, iterations_per_epoch=40, optim=optim, validate_every_n_epochs=3)
    result = fit_fold(plan, store, splits, config)
    losses = [float(row["train_loss"]) for row in rows_of(result.run_dir)]
    assert losses[-1] < 0.6 * losses[0]
    assert result.best_dice > 0.8


def test_a_finished_run_says_so_and_trains_no_further(plan, store, splits, make_config, caplog):
    first = fit_fold(plan, store, splits, make_config())
    written = first.last_checkpoint.stat().st_mtime_ns
    caplog.set_level(logging.INFO, "voxfit")
    assert fit_fold(plan, store, splits, make_config()) == first
    assert "is finished" in caplog.text
    assert first.last_checkpoint.stat().st_mtime_ns == written


def test_without_validation_cases_best_is_last(plan, store, splits, make_config):
    result = fit_fold(plan, store, splits, make_config(fold="all"))
    assert result.best_dice is None
    assert result.best_checkpoint.read_bytes() == result.last_checkpoint.read_bytes()
    assert all(row["val_dice_mean"] == "" for row in rows_of(result.run_dir))


def test_fold_all_trains_on_every_case(splits):
    fold = select_fold(splits, "all")
    assert fold.train == tuple(f"case_{index}" for index in range(6))
    assert fold.validation == ()


def test_a_limited_validation_ends_with_all_cases(plan, store, splits, make_config):
    result = fit_fold(plan, store, splits, make_config(max_validation_cases=1))
    record = json.loads((result.run_dir / "run.json").read_text())
    assert sorted(record["validation"]) == sorted(splits.folds[0].validation)


def test_a_case_that_is_not_in_the_store_is_named(plan, store, make_config):
    odd = Splits(seed=0, folds=(Fold(train=("case_1", "ghost"), validation=("case_2",)),))
    with pytest.raises(InputError, match="not in the store: ghost"):
        fit_fold(plan, store, odd, make_config())


def test_a_fold_that_the_split_does_not_have_is_refused(plan, store, splits, make_config):
    with pytest.raises(InputError, match="folds 0 to 2, got 4"):
        fit_fold(plan, store, splits, make_config(fold=4, num_folds=5))


class Signals(nn.Module):
    """A one-layer network that sends its own process a signal at the n-th training pass."""

    def __init__(self, number: int, *, at: int) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, 3, 1)
        self.number, self.at, self.passes = number, at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        if self.training and self.passes == self.at:
            os.kill(os.getpid(), self.number)
        return self.layer(x)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_resumably_with_one_line(plan, store, splits, make_config, tmp_path, number):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(StoppedError, match="stopped on request in epoch 2") as raised:
        fit_fold(plan, store, splits, make_config(), network=Signals(number, at=6))
    assert raised.value.exit_code == 75
    assert signal.getsignal(signal.SIGINT) is before
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == ["1"]
    assert RunFolder(tmp_path / "run").last_checkpoint.is_file()
    assert fit_fold(plan, store, splits, make_config(), network=Signals(number, at=99)).counts.epoch == 3


@pytest.mark.parametrize("name", ["unet", "dynunet", "segresnet"])
def test_networks_of_monai_train_validate_and_resume(plan, store, splits, make_config, name):
    from monai.networks.nets import DynUNet, SegResNet
    from monai.networks.nets import UNet as MonaiUNet

    def build() -> nn.Module:
        if name == "unet":
            return replace_batchnorm(MonaiUNet(3, 1, 3, channels=(4, 8), strides=(2,), norm="batch"), num_groups=2)
        if name == "segresnet":
            return SegResNet(init_filters=8, in_channels=1, out_channels=3, blocks_down=(1, 1), blocks_up=(1,))
        sizes, strides = [3, 3, 3], [1, 2, 2]
        options = {"filters": [4, 8, 8], "deep_supervision": True, "deep_supr_num": 1, "norm_name": "batch"}
        return replace_batchnorm(DynUNet(3, 1, 3, sizes, strides, strides[1:], **options), num_groups=2)

    config = make_config(max_epochs=2, validate_every_n_epochs=1)
    result = fit_fold(plan, store, splits, config, network=build())
    assert result.best_dice is not None
    build().load_state_dict(read_weights(result.last_checkpoint))


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_precision_and_recomputation_are_options_that_keep_the_run_finite(plan, store, splits, make_config, precision):
    hardware = {"precision": precision, "recompute_stages": 1, "num_workers": 1}
    config = make_config(hardware=hardware, augmentation=AugmentationConfig(), optim=OptimConfig(name="adamw"))
    result = fit_fold(plan, store, splits, config)
    assert all(0 < float(row["train_loss"]) < 3 for row in rows_of(result.run_dir))
    assert all(value.dtype == torch.float32 for value in read_weights(result.last_checkpoint).values())


def largest_move(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max(float((after[key] - before[key]).abs().max()) for key in before)


def test_the_gradient_is_clipped_to_its_norm_and_zero_switches_that_off(plan, store, splits, make_config):
    moves = {}
    for norm in (1e-6, 0.0):
        network = UNet(plan.num_channels, plan.num_classes, plan.network)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        optim = OptimConfig(
            name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, warmup_fraction=0.0, gradient_clip_norm=norm
        )
        fit_fold(plan, store, splits, make_config(f"run_{norm}", optim=optim), network=network)
        moves[norm] = largest_move(before, network.state_dict())
    assert moves[1e-6] < 12 * 0.1 * 1e-6 + 1e-6  # twelve steps, and the rounding of weights near one
    assert moves[0.0] > 1e-3
