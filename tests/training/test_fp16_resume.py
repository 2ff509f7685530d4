"""Trainings in fp16, whose gradient scale moves and leaves out steps, go on from a stop to the same end bit by bit.

A CPU computes in fp16 as well, only slowly, so that Lightning offers it on GPUs alone: here its plugin for fp16 and
torch's scaler, both as they are, are put into a trainer on a CPU.
"""

from __future__ import annotations

import random
import signal
from itertools import pairwise
from pathlib import Path
from time import sleep

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision

from pipeline.config import AugmentationConfig, OptimConfig
from pipeline.errors import StoppedError
from pipeline.networks.precision import PrecisionChoice
from pipeline.networks.unet import UNet
from pipeline.training import settings
from pipeline.training.last_step import LastStep
from pipeline.training.run_folder import RunFolder
from pipeline.training.trainer import fit_fold

SCALER_KEY = "MixedPrecision"
OPTIONS = {
    "effective_batch": 4,
    "iterations_per_epoch": 5,
    "max_epochs": 4,
    "validate_every_n_epochs": 2,
    "augmentation": AugmentationConfig(),
    "optim": OptimConfig(name="adamw", ema_decay=0.9),
}
# Above what fp16 holds, so that it falls first; then it grows after every second good step until it falls again.
INIT_SCALE, GROWTH_INTERVAL = 2.0**22, 2


@pytest.fixture(scope="module")
def fp16():
    """Trainings of this module compute in fp16 with a scaler."""
    real = pl.Trainer

    def make_trainer(**options) -> pl.Trainer:
        scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE, growth_interval=GROWTH_INTERVAL)
        assert options.pop("precision") == "16-mixed"
        options["plugins"] = [*options["plugins"], MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        return real(**options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pl, "Trainer", make_trainer)
        patched.setattr(settings, "choose_precision", lambda *_, **__: PrecisionChoice("16-mixed", "for this test"))
        yield


class Stopped(UNet):
    """The plan's U-Net, stopped at a training pass; notes the dtype that it gives."""

    def __init__(self, plan, *, at: int = 0, by: int = 0) -> None:
        torch.manual_seed(5)
        super().__init__(plan.num_channels, plan.num_classes, plan.network)
        self.at, self.by, self.passes, self.dtypes = at, by, 0, set()

    def forward(self, x):
        self.passes += self.training
        if self.training and self.passes == self.at:
            if not self.by:
                raise KeyboardInterrupt
            signal.raise_signal(self.by)
        output = super().forward(x)
        self.dtypes.add(output[0].dtype)
        return output


def scaler_state(run_dir: Path) -> dict:
    return torch.load(RunFolder(run_dir).last_checkpoint, weights_only=True)[SCALER_KEY]


@pytest.fixture(scope="module")
def whole(fp16, plan, store, splits, config_in, tmp_path_factory) -> Path:
    """The run folder of a training that was not stopped; in it the scale rose, and fell, where a step was left out."""
    scales, left_out, real = [], [], LastStep.on_train_batch_end

    def watched(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self.counts.optimizer_step:
            scales.append(trainer.precision_plugin.scaler.get_scale())
            left_out.append(not self._stepped)
        real(self, trainer, pl_module, outputs, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LastStep, "on_train_batch_end", watched)
        network = Stopped(plan)
        config = config_in(tmp_path_factory.mktemp("whole") / "run", **OPTIONS)
        run_dir = fit_fold(plan, store, splits, config, network=network).run_dir
    assert torch.float16 in network.dtypes
    falls = [after < before for before, after in zip([INIT_SCALE, *scales], scales, strict=False)]
    assert falls == left_out
    assert 2 <= sum(left_out) <= len(left_out) - 4
    assert any(after > before for before, after in pairwise(scales))
    # Left out in the middle of the training as well, and not in its first steps only.
    assert any(left_out[4:])
    return run_dir


@pytest.mark.parametrize(
    ("at", "by"), [(2, 0), (3, signal.SIGTERM), (5, 0), (6, signal.SIGTERM), (9, 0), (11, signal.SIGTERM), (18, 0)]
)
def test_a_stopped_training_goes_on_with_the_scale_and_its_count_of_good_steps(
    plan, store, splits, make_config, whole, assert_same_run, at, by
):
    config = make_config(**OPTIONS)
    with pytest.raises(StoppedError):
        fit_fold(plan, store, splits, config, network=Stopped(plan, at=at, by=by))
    assert scaler_state(Path(config.run_dir)).keys() >= {"scale", "_growth_tracker"}
    run_dir = fit_fold(plan, store, splits, config, network=Stopped(plan)).run_dir
    assert_same_run(run_dir, whole)
    assert scaler_state(run_dir) == scaler_state(whole)


def test_a_training_that_is_killed_again_and_again_gets_to_the_same_end(fp16, trainings, assert_same_run, tmp_path):
    saving = type(trainings)([*trainings.arguments, "--save_every_minutes", "1e-9"])
    saving.finish(tmp_path / "whole")
    moments, kills, code = random.Random(16), 0, None
    while code != 0:
        process = saving.start(tmp_path / "run")
        heartbeat = tmp_path / "run" / "heartbeat.json"
        before = heartbeat.stat().st_mtime_ns if heartbeat.exists() else 0
        while process.exitcode is None and (not heartbeat.exists() or heartbeat.stat().st_mtime_ns == before):
            sleep(0.002)
        # Longer with every kill, so that it comes to its end on a slow machine as well.
        sleep(moments.uniform(0, 0.3) * (1 + kills / 5))
        process.kill()
        process.join()
        code, kills = process.exitcode, kills + (process.exitcode != 0)
        assert kills < 60
    assert kills >= 2
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert scaler_state(tmp_path / "run") == scaler_state(tmp_path / "whole")
