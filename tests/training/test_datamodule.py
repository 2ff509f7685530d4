from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import Dataset

from pipeline.config import AugmentationConfig
from pipeline.errors import InputError
from pipeline.sampling.augmentation import Augmentation
from pipeline.sampling.patch_dataset import PatchDataset
from pipeline.stop_signals import StopRequest
from pipeline.store import CaseStore
from pipeline.training.datamodule import PatchDataModule
from pipeline.training.processes import torch_threads
from pipeline.training.stops import stops_as_errors


def make_dataset(plan, store, **options) -> PatchDataset:
    cases = CaseStore(store).case_ids
    return PatchDataset(store, cases, patch_size=plan.patch_size, foreground_fraction=0.5, seed=1, **options)


def batches(plan, store, *, epochs: int, num_workers: int) -> list[dict]:
    data = PatchDataModule(make_dataset(plan, store), batch_size=2, iterations_per_epoch=3, num_workers=num_workers)
    loader, found = data.train_dataloader(), []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        found += list(loader)
    return found


def test_epochs_cut_one_endless_stream_into_pieces(plan, store):
    found = batches(plan, store, epochs=3, num_workers=0)
    assert torch.cat([batch["index"] for batch in found]).tolist() == list(range(18))


def test_data_workers_give_the_same_batches_as_none(plan, store):
    alone, together = (batches(plan, store, epochs=2, num_workers=n) for n in (0, 2))
    for a, b in zip(alone, together, strict=True):
        assert a["case_id"] == b["case_id"]
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_error_of_a_data_worker_arrives_as_it_was(plan, store, num_workers, tmp_path):
    damaged = Path(shutil.copytree(store, tmp_path / "store"))
    dataset = make_dataset(plan, damaged)
    for path in damaged.glob("cases/*.image.b2nd"):
        path.write_bytes(path.read_bytes()[:100])
    data = PatchDataModule(dataset, batch_size=2, iterations_per_epoch=1, num_workers=num_workers)
    with pytest.raises(InputError) as raised:
        data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert "Run `voxfit preprocess` again" in str(raised.value)
    assert "Traceback" not in str(raised.value)


def test_deferred_augmentation_of_a_batch_equals_that_of_its_patches(plan, store):
    augmentation = Augmentation(
        AugmentationConfig(mirror=1.0, brightness=1.0, noise=0.0), patch_size=plan.patch_size, num_channels=1
    )
    options = {"batch_size": 2, "iterations_per_epoch": 1}
    eager = PatchDataModule(make_dataset(plan, store, augmentation=augmentation), **options)
    deferred = make_dataset(plan, store, augmentation=augmentation, defer_augmentation=True)
    lazy = PatchDataModule(deferred, **options, augmentation=augmentation)
    expected = next(iter(eager.train_dataloader()))
    found = lazy.on_after_batch_transfer(next(iter(lazy.train_dataloader())), 0)
    assert torch.allclose(found["image"], expected["image"], atol=1e-5)
    assert torch.equal(found["label"], expected["label"])


def test_the_stream_needs_no_trainer(plan, store):
    data = PatchDataModule(make_dataset(plan, store), batch_size=1, iterations_per_epoch=1)
    assert isinstance(data, pl.LightningDataModule)
    assert next(iter(data.train_dataloader()))["index"].tolist() == [0]


class Confides(Dataset):
    """Items that tell the number of threads, whether Ctrl-C is ignored, and the niceness where they are made."""

    def __getitem__(self, index: int) -> dict:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        facts = torch.tensor([torch.get_num_threads(), ignored, os.nice(0)]).reshape(3, 1, 1, 1)
        return {"image": facts, "label": facts[0], "case_id": "", "index": index}


def test_a_data_worker_has_one_thread_leaves_ctrl_c_to_the_training_and_gives_way():
    before = os.nice(0)
    data = PatchDataModule(Confides(), batch_size=1, iterations_per_epoch=1, num_workers=1, niceness=3)
    with torch_threads(2):
        batch = next(iter(data.train_dataloader()))
        assert torch.get_num_threads() == 2
    assert batch["image"].flatten().tolist() == [1, 1, before + 3]
    assert os.nice(0) == before
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


class Dies(Dataset):
    """Kills the process that asks for an item, as the kernel does when memory runs out."""

    def __getitem__(self, index: int) -> dict:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


def test_a_killed_data_worker_is_said_in_one_line():
    data = PatchDataModule(Dies(), batch_size=1, iterations_per_epoch=1, num_workers=1)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(InputError, match="a data worker was killed") as raised, stops_as_errors(trainer, StopRequest()):
        next(iter(data.train_dataloader()))
    assert "hardware.num_workers" in str(raised.value)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_data_worker_killed_while_it_hands_over_a_batch_is_said_in_one_line(error):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(InputError, match="a data worker was killed"), stops_as_errors(trainer, StopRequest()):
        raise error


class FailsOnce(Dataset):
    """An error for users in the first sample, and work without end in those after it."""

    def __getitem__(self, index: int) -> dict:
        if index == 0:
            raise InputError("case_1 is damaged")
        time.sleep(600)
        return {}


@contextmanager
def closing_workers(data: PatchDataModule) -> Iterator[None]:
    """End them on the way out, as a training does."""
    try:
        yield
    finally:
        data.end_workers()


def test_workers_that_are_ended_while_they_work_do_not_hide_the_error_that_ends_a_training():
    data = PatchDataModule(FailsOnce(), batch_size=1, iterations_per_epoch=8, num_workers=2)
    before = set(psutil.Process().children())
    batch = next(iter(data.train_dataloader()))
    workers = set(psutil.Process().children()) - before
    with pytest.raises(InputError, match="case_1 is damaged"), closing_workers(data):
        data.on_before_batch_transfer(batch, 0)
    assert len(workers) == 2
    assert not any(worker.is_running() for worker in workers)
    data.end_workers()


class Fails(Dataset):
    """Raises where an item is asked for."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, index: int) -> dict:
        raise self.error


@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (MemoryError(), InputError, "a data worker ran out of host memory"),
        (
            RuntimeError("shape mismatch in the store"),
            RuntimeError,
            "Original Traceback[^$]*shape mismatch",
        ),
        (ValueError("killed by signal"), ValueError, "Original Traceback[^$]*killed by signal"),
    ],
)
def test_an_error_in_a_data_worker_is_said_for_what_it_is(error, expected, said):
    data = PatchDataModule(Fails(error), batch_size=1, iterations_per_epoch=1, num_workers=1)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(expected, match=said) as raised, stops_as_errors(trainer, StopRequest()):
        next(iter(data.train_dataloader()))
    if expected is InputError:
        assert str(raised.value).startswith("hardware.num_workers: ")
        assert "\n" not in str(raised.value)
