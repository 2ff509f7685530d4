"""Whole volumes through the network while it trains: per-class Dice on the stored validation cases.

Shapes: images (C, I, J, K), labels (I, J, K) class indices, scores (K, I, J, K).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.evaluation.metrics import dice
from pipeline.geometry import Shape3
from pipeline.inference.attempts import plan_host_memory
from pipeline.inference.prediction_memory import PredictionMemory
from pipeline.inference.streamed_labels import plan_label_memory, sliding_window_labels
from pipeline.inference.windows import SlidingWindow
from pipeline.networks.precision import free_vram_bytes
from pipeline.stop_signals import StopRequest
from pipeline.store import CaseStore
from pipeline.training.ranks import Ranks
from pipeline.training.validation_progress import ScoredCases, validation_key

SCORE_SHARE_OF_FREE_MEMORY = 0.5


@dataclass(frozen=True)
class ValidationResult:
    """Dice of a validation.

    Attributes:
        by_case: Dice per foreground class by case; NaN where the case has none of the class and none was predicted.
        seconds: Wall time, of all starts that had a part in it.
    """

    by_case: dict[str, tuple[float, ...]]
    seconds: float

    @property
    def by_class(self) -> tuple[float, ...]:
        """Mean over cases per foreground class, NaNs left out; NaN when nothing is left."""
        return tuple(_mean(column) for column in zip(*self.by_case.values(), strict=True))

    @property
    def mean(self) -> float:
        """Mean over the classes."""
        return _mean(self.by_class)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


@dataclass(frozen=True, kw_only=True)
class Validator:
    """Segments stored cases with a network and scores them.

    Attributes:
        store_folder: The store.
        case_ids: Cases to score.
        patch_size: The training patch, which is the window: group statistics are those of training.
        num_classes: Background included.
        overlap: Of neighbouring windows.
        scores_on_host: Add up the scores of a volume in host memory, even where the GPU seems to have room.
        request: What a validation is left for, which may take many minutes; looked at before every window.
        ranks: Share the cases out among them, the largest first, and put the results together.
        progress: File that keeps the scores of cases that are done, for when it is left; None keeps none.
    """

    store_folder: Path
    case_ids: tuple[str, ...]
    patch_size: Shape3
    num_classes: int
    overlap: float = 0.5
    scores_on_host: bool = False
    request: StopRequest = field(default_factory=StopRequest)
    ranks: Ranks = field(default_factory=Ranks)
    progress: Path | None = None

    def limited_to(self, count: int) -> Validator:
        """The same for the first `count` cases; 0 takes all."""
        return replace(self, case_ids=self.case_ids[:count]) if count else self

    def score(
        self, network: nn.Module, *, device: torch.device, forward_context: Callable[[], AbstractContextManager[Any]]
    ) -> ValidationResult:
        """Dice of every case, on all ranks; those that an earlier start scored with the same weights stay as they are.

        Args:
            network: On `device`; put into evaluation mode meanwhile.
            device: Where the windows are computed.
            forward_context: Opened around the network, for its precision.
        """
        store = CaseStore(self.store_folder)
        with self.request.at_any_line(), evaluating(network), forward_context():
            known = ScoredCases(self.progress, self._key(network, store, device))
            todo = [case_id for case_id in self._share(store) if case_id not in known.by_case]
            # A rank that has nothing to do is not one that cannot get on.
            self.request.got_on |= not todo
            for case_id in todo:
                self.request.check()
                started, (image, label) = perf_counter(), store.read_case(case_id)
                scores = dice_by_class(self._segment(network, image, device), label, self.num_classes)
                known.add(case_id, scores, seconds=perf_counter() - started)
                self.request.got_on = True
        found = self.ranks.meet((known.by_case, known.seconds))
        all_scores = {case_id: dices for each, _ in found for case_id, dices in each.items()}
        # In the order of the cases, in which means are summed up.
        by_case = {case_id: all_scores[case_id] for case_id in self.case_ids}
        return ValidationResult(by_case, max(seconds for _, seconds in found))

    def _share(self, store: CaseStore) -> tuple[str, ...]:
        """The cases of this rank: dealt out from the largest down, so that no rank is waited for long."""
        if self.ranks.num == 1:
            return self.case_ids
        by_size = sorted(self.case_ids, key=lambda case_id: (-prod(store.record(case_id).shape), case_id))
        return tuple(by_size[self.ranks.place.rank :: self.ranks.num])

    def _key(self, network: nn.Module, store: CaseStore, device: torch.device) -> str:
        precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        cases = {case_id: store.record(case_id).key for case_id in self.case_ids}
        return validation_key(network, self.patch_size, self.num_classes, self.overlap, device.type, precision, cases)

    def _segment(self, network: nn.Module, image: NDArray[np.float32], device: torch.device) -> NDArray[Any]:
        volume = torch.from_numpy(image)
        shape = (volume.shape[1], volume.shape[2], volume.shape[3])
        sliding = SlidingWindow(
            window=self.patch_size, num_classes=self.num_classes, overlap=self.overlap, device=device
        )

        def plan_memory(window_batch: int, max_bytes: int | None) -> PredictionMemory:
            return plan_label_memory(network, shape, sliding, num_channels=len(volume), max_bytes=max_bytes)

        memory = plan_memory(1, None)
        if device.type == "cuda" and self._scores_fit(volume, memory, device):
            volume = volume.to(device)
        else:
            memory = plan_host_memory(plan_memory, window_batch=1, max_ram=None, result_bytes=volume[0].numel())
        segmentation: NDArray[Any] = sliding_window_labels(
            _Watching(network, self.request), volume, sliding, memory
        ).numpy()
        return segmentation

    def _scores_fit(self, volume: Tensor, memory: PredictionMemory, device: torch.device) -> bool:
        if self.scores_on_host:
            return False
        return memory.num_bytes + 4 * volume.numel() < SCORE_SHARE_OF_FREE_MEMORY * free_vram_bytes(device)


class _Watching:
    """A network that looks for a request to stop before every window."""

    def __init__(self, network: nn.Module, request: StopRequest) -> None:
        self.network, self.request = network, request

    def __call__(self, windows: Tensor) -> Any:
        self.request.check()
        return self.network(windows)

    @property
    def pending_logits(self) -> Any:
        """The network's own, if it has one; it is asked for with every window."""
        self.request.check()
        return self.network.pending_logits

    @property
    def num_features(self) -> Any:
        """The network's own, if it has one."""
        return self.network.num_features


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, and back to the mode that it was in."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def dice_by_class(prediction: NDArray[Any], label: NDArray[Any], num_classes: int) -> tuple[float, ...]:
    """Dice of each foreground class over the voxels that are not ignored (label below 0)."""
    counted = label >= 0
    # Plain floats: numpy's would make the checkpoint unreadable with `weights_only=True`.
    return tuple(float(dice((prediction == c) & counted, label == c)) for c in range(1, num_classes))


class WholeVolumeValidation(pl.Callback):
    """Validates every few epochs and after the last one; `result` is that of the epoch just ended, or None.

    Args:
        validator: Cases and windows.
        every_n_epochs: Epochs between validations.
        max_epochs: Epochs of the training.
        network: What is validated: the weights' average, or None for the trained network.
    """

    def __init__(
        self, validator: Validator, *, every_n_epochs: int, max_epochs: int, network: nn.Module | None = None
    ) -> None:
        self.validator = validator
        self.every_n_epochs = every_n_epochs
        self.max_epochs = max_epochs
        self.network = network
        self.result: ValidationResult | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Validate when it is time."""
        due = self.is_due(trainer.current_epoch + 1)
        self.result = self._validate(trainer, pl_module) if due else None

    def is_due(self, epoch: int) -> bool:
        """Whether epoch number `epoch`, from 1, ends with a validation."""
        return bool(self.validator.case_ids) and (epoch % self.every_n_epochs == 0 or epoch == self.max_epochs)

    def _validate(self, trainer: pl.Trainer, pl_module: Any) -> ValidationResult:
        network = self.network if self.network is not None else pl_module.network
        context = trainer.precision_plugin.forward_context
        return self.validator.score(network, device=pl_module.device, forward_context=context)
