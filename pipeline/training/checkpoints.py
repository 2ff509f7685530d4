"""Checkpoints: written whole or not at all, found again, and never replaced by worse ones.

`checkpoints/last.ckpt` follows the start, every epoch, every few minutes and an interruption, `checkpoints/best.ckpt`
the best validation; `checkpoints/previous.ckpt` is the `last` before, by a link, should the newest one be torn. All are
Lightning checkpoints that can be resumed from, and load with `torch.load(weights_only=True)`. On top of Lightning's
keys they hold `counts` (epoch, iteration, optimizer_step) and, where an average is kept, `ema_state_dict`.
"""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import Tensor

from pipeline.artifacts import atomic_path
from pipeline.errors import InputError, first_line
from pipeline.log import get_logger
from pipeline.networks.out_of_memory import is_out_of_memory
from pipeline.run_record import Counts
from pipeline.training.divergence import DivergenceGuard
from pipeline.training.last_step import LastStep
from pipeline.training.run_folder import RunFolder
from pipeline.training.validation import ValidationResult, WholeVolumeValidation

COUNTS_KEY = "counts"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there, fsynced, once it is whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`; what stood there stays when writing fails.

        Raises:
            InputError: The disk is full, or the folder cannot be written.
        """
        path = Path(path)
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            try:
                torch.save(checkpoint, stream)
            except RuntimeError as error:
                # torch's zip writer covers up why a write failed.
                raise error.__context__ if isinstance(error.__context__, OSError) else error from error

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Read a checkpoint onto the CPU; only tensors and plain values are unpickled."""
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint


class _Best(NamedTuple):
    epoch: int | None = None
    result: ValidationResult | None = None


class CheckpointWriter(pl.Callback):
    """Saves `last` after every epoch, and `best` when the validation is better than all before.

    As long as nothing was validated, `best` is `last`. Stands last among the callbacks: what is saved has passed the
    divergence guard. `best` is written before `last`, and the epoch counts as finished in between, so that a run that
    is killed or interrupted before does the epoch's end again and comes to the same `best`. What a run starts from is
    saved as well, as `last`: that is what a first optimiser step left half done is taken up from, and a folder that
    cannot be written is found out at once.

    Args:
        folder: The run folder.
        last_step: Knows the counts.
        guard: Asked before a save within an epoch.
        validation: Whose result decides; None without validation cases.
        seconds_between_saves: Within an epoch; 0 saves at its end only.

    Attributes:
        saved: Counts of the newest `last` of this run on disk.
        save_seconds: What the slowest save took.
    """

    def __init__(
        self,
        folder: RunFolder,
        last_step: LastStep,
        *,
        guard: DivergenceGuard,
        validation: WholeVolumeValidation | None,
        seconds_between_saves: float = 0.0,
    ) -> None:
        self.folder = folder
        self.last_step = last_step
        self.guard = guard
        self.validation = validation
        self.seconds_between_saves = seconds_between_saves
        self.saved = last_step.counts
        self.save_seconds = 0.0
        self._saved_at = monotonic()
        # Of several ranks, which all have the same to save.
        self._is_first = True
        self._best = _Best()
        # What the checkpoint that is being written says.
        self._written = (last_step.counts, self._best)

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the weights in `best`; None without a validation."""
        return self._best.epoch

    @property
    def best_result(self) -> ValidationResult | None:
        """Their validation."""
        return self._best.result

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save what a run starts from, also in place of a torn `last`, which is never to become the one before."""
        self._is_first = trainer.is_global_zero
        if trainer.ckpt_path is None or Path(trainer.ckpt_path) != self.folder.last_checkpoint:
            self._save(trainer)
        self._saved_at = monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Save a finished optimiser step every few minutes."""
        due = 0 < self.seconds_between_saves <= monotonic() - self._saved_at
        if due and self.last_step.counts != self.saved:
            self.guard.check(trainer, pl_module)
            self.save_last(trainer)

    def save_last(self, trainer: pl.Trainer) -> None:
        """Save what the newest count stands for, and keep the save before."""
        self._keep_previous()
        self._save(trainer)

    def _keep_previous(self) -> None:
        # A copy would cost as much as the save.
        if self._is_first and self.folder.last_checkpoint.is_file():
            with suppress(InputError), atomic_path(self.folder.previous_checkpoint) as temporary:
                os.link(self.folder.last_checkpoint, temporary)

    def _save(self, trainer: pl.Trainer) -> None:
        self._write(trainer, self.folder.last_checkpoint, self.last_step.counts, self._best)
        self.saved = self.last_step.counts

    def _write(self, trainer: pl.Trainer, path: Path, counts: Counts, best: _Best) -> None:
        self._written, started = (counts, best), monotonic()
        if self._is_first:
            trainer.save_checkpoint(path)
        self._saved_at = monotonic()
        self.save_seconds = max(self.save_seconds, self._saved_at - started)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save what has to be saved, and count the epoch as finished once `best` is on disk."""
        finished, best = self.last_step.pace.counts(epoch=trainer.current_epoch + 1, passes=0), self._best
        result = self.validation.result if self.validation is not None else None
        if result is not None and result.mean > (best.result.mean if best.result is not None else -1.0):
            best = _Best(trainer.current_epoch + 1, result)
        if best.result is None or best is not self._best:
            self._write(trainer, self.folder.best_checkpoint, finished, best)
        self._best = best
        self.last_step.finish_epoch(finished)
        if best.result is None:
            self._keep_previous()
            if self._is_first:
                _link_or_copy(self.folder.best_checkpoint, self.folder.last_checkpoint)
            self.saved = finished
        else:
            self.save_last(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the three counts."""
        checkpoint[COUNTS_KEY] = asdict(self._written[0])

    def state_dict(self) -> dict[str, Any]:
        """The best validation so far."""
        epoch, result = self._written[1]
        return {"best_epoch": None} if result is None else {"best_epoch": epoch, "best_result": asdict(result)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best validation so far."""
        if state_dict["best_epoch"] is not None:
            self._best = _Best(state_dict["best_epoch"], ValidationResult(**state_dict["best_result"]))


def _link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where the file system has no links.

    A later `source` takes the name by a rename, so the linked file is never written to.
    """
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


class _UnusableError(InputError):
    """A checkpoint that was read and cannot be gone on from."""


class FoundCheckpoint(NamedTuple):
    """A checkpoint that a run can go on from."""

    path: Path
    counts: Counts


def find_checkpoint(folder: RunFolder, state: dict[str, Tensor]) -> FoundCheckpoint | None:
    """The newest usable checkpoint of a run: `last`, or the newer of `previous` and `best` when that is torn, or None.

    Args:
        folder: The run folder.
        state: State dict of the module that will be trained, whose keys and shapes the checkpoint must have.

    Raises:
        InputError: There are checkpoints and none is usable, or they are of another network, or one cannot be read now:
            going on from an older one would cost what is in it.
    """
    problems: list[_UnusableError] = []
    found = list(_usable([folder.last_checkpoint], state, problems))
    found = found or list(_usable([folder.previous_checkpoint, folder.best_checkpoint], state, problems))
    if not found:
        if problems:
            raise problems[0]
        return None
    newest = max(found, key=lambda each: (each.counts.optimizer_step, each.counts.epoch))
    if newest.path != folder.last_checkpoint:
        what = str(problems[0]) if problems else f"{folder.last_checkpoint} is gone"
        place = f"epoch {newest.counts.epoch}, optimiser step {newest.counts.optimizer_step}"
        get_logger("train").warning("%s; going on from %s (%s)", what, newest.path.name, place)
    return newest


def _usable(paths: list[Path], state: dict[str, Tensor], problems: list[_UnusableError]) -> Iterator[FoundCheckpoint]:
    for path in filter(Path.is_file, paths):
        try:
            yield FoundCheckpoint(path, _read_counts(path, state))
        except _UnusableError as error:
            problems.append(error)


def _read_counts(path: Path, state: dict[str, Tensor]) -> Counts:
    try:
        check_sums(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        counts, saved = Counts(**checkpoint[COUNTS_KEY]), checkpoint["state_dict"]
    except Exception as error:
        # Neither says anything about the file, but for an invalid argument: a place outside of a torn one.
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            fix = "The file may be whole: try again once it can be read"
            raise InputError(f"cannot be read ({error.strerror or error})", where=path, fix=fix) from error
        # torch.load has no error of its own: torn zips, foreign pickles and short files each raise another type.
        raise _UnusableError(
            f"is torn, or was not written by voxfit ({_first_sentence(error)})",
            where=path,
            fix="Remove it to use what else is in the run, or give another --run_dir",
        ) from error
    if {key: value.shape for key, value in saved.items()} != {key: value.shape for key, value in state.items()}:
        raise _UnusableError(
            "belongs to another network", where=path, fix="Give the same network, or another --run_dir"
        )
    return counts


def check_sums(path: Path) -> None:
    """Read a file that torch wrote, a zip, against the sums in it, which torch itself does not look at.

    Raises:
        BadZipFile: It is damaged, or no zip.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} is damaged")


def _first_sentence(error: Exception) -> str:
    return first_line(error).rstrip(" .")
