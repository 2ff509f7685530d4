"""The figures of an epoch: times, losses, and where they are written."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import Dataset

from pipeline.config import OptimConfig
from pipeline.losses.dice_ce import DiceCELoss
from pipeline.training.datamodule import PatchDataModule
from pipeline.training.epoch_report import EpochTimer
from pipeline.training.metrics_table import COUNT_COLUMNS
from pipeline.training.module import SegmentationModule
from pipeline.training.quiet import quiet_lightning
from pipeline.training.trainer import fit_fold

ITERATIONS = 4
DATA_SECONDS, TRANSFER_SECONDS, STEP_SECONDS = 0.05, 0.03, 0.02


def rows_of(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


class Slow(Dataset):
    """Patches that take their time."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sleep(DATA_SECONDS)
        return {"image": torch.zeros(1, 4, 4, 4), "label": torch.zeros(4, 4, 4).short(), "case_id": "", "index": index}


class SlowTransfer(PatchDataModule):
    """Waits after a batch is there, as the host does where it waits for a GPU."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        sleep(TRANSFER_SECONDS)
        return super().on_before_batch_transfer(batch, dataloader_idx)


class SlowNetwork(nn.Module):
    """A network that takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        sleep(STEP_SECONDS)
        return self.layer(x)


class Times(pl.Callback):
    """Keeps what the timer before it found."""

    def __init__(self, timer: EpochTimer) -> None:
        self.timer, self.found = timer, []

    def on_train_epoch_end(self, *_: Any) -> None:
        self.found.append((self.timer.seconds, self.timer.wait_seconds))


def test_only_the_waiting_for_batches_is_booked_as_waiting_epoch_by_epoch():
    data = SlowTransfer(Slow(), batch_size=1, iterations_per_epoch=ITERATIONS)
    timer = EpochTimer(data.wait_clock)
    times = Times(timer)
    module = SegmentationModule(SlowNetwork(), DiceCELoss(), optim=OptimConfig(), total_steps=9)
    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=2,
            callbacks=[timer, times],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, datamodule=data)
    assert len(times.found) == 2
    for seconds, waited in times.found:
        assert waited >= ITERATIONS * DATA_SECONDS
        assert seconds - waited >= ITERATIONS * (TRANSFER_SECONDS + STEP_SECONDS)
    assert data.wait_clock.seconds == pytest.approx(sum(waited for _, waited in times.found), abs=0.05)


def test_the_share_of_waiting_is_that_of_the_seconds_and_above_zero_where_patches_are_made_in_between(
    plan, store, splits, make_config
):
    for row in rows_of(fit_fold(plan, store, splits, make_config()).run_dir):
        assert 0 < float(row["data_wait_share"]) < 1
        assert row["peak_vram_bytes"] == "0"


@pytest.mark.parametrize("iterations", [4, 5], ids=["whole", "with a remainder"])
def test_the_train_loss_is_the_mean_over_micro_batches_whatever_the_accumulation(
    plan, store, splits, make_config, iterations
):
    """At a rate near zero both runs see the same patches with the same weights."""
    losses = []
    for effective_batch in (2, 4):
        optim = OptimConfig(name="sgd", lr=1e-12, weight_decay=0.0)
        options = {"iterations_per_epoch": iterations, "max_epochs": 2, "effective_batch": effective_batch}
        config = make_config(f"run_{effective_batch}", optim=optim, **options)
        losses.append([float(row["train_loss"]) for row in rows_of(fit_fold(plan, store, splits, config).run_dir)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][0] != losses[0][1]


def test_tensorboard_shows_the_figures_of_the_table_at_the_optimiser_step(plan, store, splits, make_config):
    run_dir = fit_fold(plan, store, splits, make_config(effective_batch=4)).run_dir
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    rows = rows_of(run_dir)
    for column in set(rows[0]) - set(COUNT_COLUMNS):
        expected = [(int(row["optimizer_step"]), float(row[column])) for row in rows if row[column]]
        found = [(event.step, event.value) for event in events.Scalars(column)] if expected else []
        assert [step for step, _ in found] == [step for step, _ in expected], column
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6), column
    assert [event.step for event in events.Scalars("train_loss")] == [2, 4, 6]


PAGE_FAULTS = """
import ctypes, resource, sys
from pipeline.training.processes import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def use():
    block = libc.malloc(ctypes.c_size_t(24 * 2**20))
    ctypes.memset(block, 1, 24 * 2**20)
    libc.free(block)
libc.mallopt(-3, 2**17) if sys.argv[1] == "given back" else use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PAGE_FAULTS, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step():
    given_back = page_faults("given back")
    if given_back < 1000:
        pytest.skip("fresh memory costs no page faults worth counting here")
    assert page_faults("kept") < given_back / 10
