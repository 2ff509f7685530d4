"""Training batches as one endless stream that epochs cut into pieces."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from pipeline.errors import VoxfitError
from pipeline.sampling.augmentation import Augmentation
from pipeline.sampling.patch_dataset import EpochSampler, collate_patches
from pipeline.stop_signals import StopRequest
from pipeline.training.processes import PREFETCH_FACTOR, prepare_worker


class WaitClock:
    """Sums up the seconds that a training waits for data.

    Attributes:
        seconds: Since the clock was made.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the clock inside the block."""
        started = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - started


class PatchDataModule(pl.LightningDataModule):
    """Gives epoch e the samples from e * iterations * batch on, so that a resumed run sees what it would have seen.

    Sample n is the same patch whatever the number of workers and wherever the run was stopped, because the dataset
    draws everything from its seed and n.

    Args:
        dataset: Patches by global sample number, such as `PatchDataset`.
        batch_size: Patches per iteration.
        iterations_per_epoch: Batches that make an epoch, of this rank.
        start: Epochs that are done, and batches that are done of the one after them.
        num_workers: Data worker processes, kept alive over epochs; 0 makes the patches in the training process.
        pin_memory: Lay batches out for asynchronous copies to a GPU.
        augmentation: Applied to whole batches on the device of the network, for datasets that defer it.
        niceness: By how much data workers give way to the training process.

    Attributes:
        wait_clock: How long batches were waited for; what is done with them afterwards does not count.
        request: What a wait for a batch may be left for.
        share: Number of this rank, and how many there are: batches are dealt out in turn.
    """

    def __init__(
        self,
        dataset: Dataset[dict[str, Any]],
        *,
        batch_size: int,
        iterations_per_epoch: int,
        start: tuple[int, int] = (0, 0),
        num_workers: int = 0,
        pin_memory: bool = False,
        augmentation: Augmentation | None = None,
        niceness: int = 0,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.batch_size = batch_size
        self.iterations_per_epoch = iterations_per_epoch
        self.start = start
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.augmentation = augmentation
        self.niceness = niceness
        self.wait_clock = WaitClock()
        self.request = StopRequest()
        self.share = (0, 1)
        self._loader: _TimedLoader | None = None

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The batches of an epoch, which is the one to start from until the sampler is told of another."""
        epoch, batches = self.start
        sampler = StreamSampler(
            self.iterations_per_epoch, self.batch_size, first_epoch=epoch, skipped=batches, share=self.share
        )
        loader = _TimedLoader(
            _Guarded(self.dataset),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=self.pin_memory,
            worker_init_fn=partial(prepare_worker, niceness=self.niceness, parent=os.getpid()),
            persistent_workers=self.num_workers > 0,
            prefetch_factor=PREFETCH_FACTOR if self.num_workers > 0 else None,
        )
        loader.clock, loader.request = self.wait_clock, self.request
        self._loader = loader
        return loader

    def end_workers(self) -> None:
        """End the data workers, however busy, when the training is over; they ignore what torch ends them with."""
        if self._loader is not None:
            self._loader.end_workers()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Raise the error of a data worker as it was."""
        if isinstance(batch, VoxfitError):
            raise batch
        return batch

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Augment the whole batch where the network is."""
        if self.augmentation is None or "augmentation" not in batch:
            return batch
        parameters = batch["augmentation"]
        image, label = self.augmentation.augment_batch(batch["image"], batch["label"], parameters)
        return {**batch, "image": image, "label": label}


class StreamSampler(EpochSampler):
    """The sample numbers of one epoch; Lightning calls `set_epoch` before each.

    Its length is always that of a whole epoch, by which Lightning knows the last batch.

    Args:
        num_batches: Batches of an epoch, of this rank.
        batch_size: Samples of a batch.
        first_epoch: The epoch to begin with, counted from 0.
        skipped: Batches of it that were taken before.
        share: Number of this rank, and how many there are: batch b of rank r is batch b * ranks + r of all.
    """

    def __init__(
        self,
        num_batches: int,
        batch_size: int = 1,
        *,
        first_epoch: int = 0,
        skipped: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__(0, num_batches * batch_size)
        self.num_batches, self.batch_size, self.share = num_batches, batch_size, share
        self.first_epoch, self.skipped = first_epoch, skipped
        self.set_epoch(first_epoch)

    def set_epoch(self, epoch: int) -> None:
        """Go on to the samples of `epoch`, counted from 0."""
        self.epoch = epoch
        self.first = epoch * self.num * self.share[1]

    def __iter__(self) -> Iterator[int]:
        rank, num_ranks = self.share
        for batch in range(self.skipped if self.epoch == self.first_epoch else 0, self.num_batches):
            first = self.first + (batch * num_ranks + rank) * self.batch_size
            yield from range(first, first + self.batch_size)


class _TimedLoader(DataLoader[Any]):
    """A loader whose clock runs while it is waited for: until a batch is there, and until an epoch has begun.

    Attributes:
        request: What a wait may be left for.
    """

    # No arguments of its own: Lightning looks into the constructors of loaders.
    clock = WaitClock()
    request = StopRequest()
    _batches: Any = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with self.clock.running():
            self._batches = super().__iter__()
        return self._timed(self._batches)

    def end_workers(self) -> None:
        """Kill the processes without torch taking that for an error of theirs, or waiting for locks that they held."""
        batches, self._batches = self._batches, None
        workers = getattr(batches, "_workers", ())
        if not workers or batches._shutdown:
            return
        batches._shutdown = True
        if hasattr(batches, "_pin_memory_thread_done_event"):
            batches._pin_memory_thread_done_event.set()
        # What torch's handler of SIGCHLD looks at: it would raise here, in place of what the training ends with.
        _remove_worker_pids(id(batches))
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self.request.at_any_line(), self.clock.running():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch


class _Guarded(Dataset[Any]):
    """A dataset whose errors for users come through as items: a DataLoader would turn them into a page of traceback."""

    def __init__(self, dataset: Dataset[dict[str, Any]]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict[str, Any] | VoxfitError:
        try:
            return self.dataset[index]
        except VoxfitError as error:
            return error


def _collate(items: Sequence[dict[str, Any] | VoxfitError]) -> dict[str, Any] | VoxfitError:
    failed = next((item for item in items if isinstance(item, VoxfitError)), None)
    return failed if failed is not None else collate_patches(items)  # type: ignore[arg-type]
