from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.datasets.splits import Fold, Splits
from pipeline.errors import TrainingDivergedError
from pipeline.geometry import Grid
from pipeline.store import StoreInfo, WritableStore
from pipeline.training.divergence import DivergenceGuard, weights_are_finite
from pipeline.training.loop_state import Pace
from pipeline.training.trainer import fit_fold


def test_a_case_that_makes_the_loss_nan_is_named_and_the_last_good_checkpoint_kept(plan, splits, make_config, tmp_path):
    """Passes go over all six cases; the bad one comes in the second epoch at the earliest."""
    store = WritableStore.create(tmp_path / "bad_store", StoreInfo.of(plan))
    names = [f"case_{index}" for index in range(12)]
    for name in names:
        image = np.full((1, 16, 8, 12), np.nan if name == "case_7" else 1.0, np.float32)
        store.write_case(name, image, np.ones((16, 8, 12), np.int16), native_grid=Grid((16, 8, 12), np.eye(4)))
    splits = Splits(seed=0, folds=(Fold(train=tuple(names), validation=("case_0",)),))
    config = make_config(batch_size=1, iterations_per_epoch=1, max_epochs=30)
    with pytest.raises(TrainingDivergedError) as raised:
        fit_fold(plan, store.folder, splits, config)
    message, last = str(raised.value), Path(config.run_dir) / "checkpoints" / "last.ckpt"
    assert "case case_7: the loss became nan" in message
    checkpoint = torch.load(last, weights_only=True)
    assert f"iteration {checkpoint['counts']['iteration'] + 1}," in message
    assert str(last) in message
    assert all(bool(torch.isfinite(value).all()) for value in checkpoint["state_dict"].values())


class Spoils(nn.Module):
    """A network whose gradients are infinite at the n-th training pass, with a finite loss."""

    def __init__(self, *, at: int) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, 3, 1)
        self.at, self.passes = at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        out = self.layer(x)
        if self.training and self.passes == self.at:
            out.register_hook(lambda gradient: gradient * float("inf"))
        return out


def test_weights_spoilt_by_the_last_step_of_an_epoch_are_not_saved(plan, store, splits, make_config):
    config = make_config(iterations_per_epoch=4)
    with pytest.raises(TrainingDivergedError, match="epoch 2: the weights became NaN"):
        fit_fold(plan, store, splits, config, network=Spoils(at=8))
    checkpoint = torch.load(Path(config.run_dir) / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["counts"]["epoch"] == 1


PACE = Pace(iterations_per_epoch=9, iterations_per_step=1)


class Position:
    """What the guard reads of a trainer."""

    current_epoch = 0


def feed(guard: DivergenceGuard, losses: list[float]) -> None:
    for index, loss in enumerate(losses):
        guard.on_train_batch_end(Position(), None, {"loss": torch.tensor(loss)}, {"case_id": ["a", "b"]}, index)
    guard.on_train_epoch_end(Position(), nn.Linear(1, 1))


def test_with_a_gradient_scaler_single_bad_losses_are_borne_and_many_in_a_row_are_not(tmp_path):
    nan, inf = float("nan"), float("inf")
    feed(DivergenceGuard(tmp_path / "last.ckpt", pace=PACE, patience=2), [1.0, nan, inf, 1.0, nan, inf])
    with pytest.raises(TrainingDivergedError, match="iteration 4, case a, b"):
        feed(DivergenceGuard(tmp_path / "last.ckpt", pace=PACE, patience=2), [1.0, nan, inf, nan, 1.0])


def test_a_single_infinite_weight_is_seen():
    network = nn.Linear(3, 3)
    assert weights_are_finite(network)
    with torch.no_grad():
        network.weight[1, 2] = float("inf")
    assert not weights_are_finite(network)


def test_the_verdict_on_a_loss_is_made_when_it_is_given_and_not_when_it_is_looked_at(tmp_path):
    """Whatever is launched after it, and may write over its memory, is not waited for."""
    guard = DivergenceGuard(tmp_path / "last.ckpt", pace=PACE)
    good, bad = torch.tensor(1.0), torch.tensor(float("inf"))
    guard.on_train_batch_end(Position(), None, {"loss": good}, {}, 0)
    good.fill_(float("nan"))
    guard.on_train_batch_end(Position(), None, {"loss": bad}, {}, 1)
    bad.fill_(1.0)
    with pytest.raises(TrainingDivergedError, match="iteration 2"):
        guard.on_train_epoch_end(Position(), nn.Linear(1, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_looking_at_a_loss_on_a_gpu_does_not_wait_for_the_iteration_after_it(tmp_path):
    guard, later = DivergenceGuard(tmp_path / "last.ckpt", pace=PACE), torch.cuda.Event()
    for index in range(2):
        loss = torch.ones((), device="cuda")
        if index == 1:
            torch.cuda._sleep(10**10)
            later.record()
        guard.on_train_batch_end(Position(), None, {"loss": loss}, {}, index)
    assert not later.query()
    torch.cuda.synchronize()
