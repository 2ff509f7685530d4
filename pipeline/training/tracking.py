"""What goes to a tracker besides the run folder: the rows of `metrics.csv`, each once, whatever happens in between.

A tracker is company, never a condition: what goes wrong with it is said once, and the training goes on without it. The
next start tries again and sends what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl

from pipeline.artifacts import read_artifact, to_json, write_artifact
from pipeline.config import TrackingConfig, TrainConfig, to_dict
from pipeline.datasets.splits import Fold
from pipeline.errors import InputError, first_line, in_words
from pipeline.log import get_logger
from pipeline.plan import Plan, Record
from pipeline.run_files import RunFiles
from pipeline.run_record import RunRecord
from pipeline.training.metrics_table import MetricsTable
from pipeline.training.run_folder import WHERE_ONLY, RunFolder
from pipeline.training.trackers import Outcome, TrackerRun, open_tracker

logger = get_logger("train")
# Paths stay on this machine, as does everything in which a patient's name could stand.
NOT_SENT = (*WHERE_ONLY, "init_from", "patient_pattern", "tracking")
OF_PLAN = (
    *("channels", "target_spacing", "anisotropic_axis", "median_shape", "patch_size", "batch_size"),
    *("accumulate_grad_batches", "precision", "recompute_stages", "slab_stages", "offload_stages", "network"),
)
OF_RECORD = (
    "device",
    "precision",
    "patch_size",
    "batch_size",
    "accumulate_grad_batches",
    "num_ranks",
    "num_parameters",
)


@dataclass(frozen=True, kw_only=True)
class TrackerState(Record):
    """`tracking.json`: which run of a tracker a training is, and what was sent to it.

    Attributes:
        name, uri, experiment: As in the options; with others another run begins.
        run_id: At the tracker; "" before it is known.
        is_described: Whether parameters and tags were sent.
        optimizer_step: Of the newest row that was sent.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1
    name: str
    uri: str
    experiment: str
    run_id: str = ""
    is_described: bool = False
    optimizer_step: int = 0


class Tracking(pl.Callback):
    """Sends every row of `metrics.csv` to a tracker once; stands behind the callback that saves epochs.

    Args:
        config: Which tracker.
        run_dir: The run folder.
        table: The rows.
    """

    def __init__(self, config: TrackingConfig, run_dir: Path, table: MetricsTable) -> None:
        self.config, self.run_dir, self.table = config, run_dir, table
        self._path = RunFiles(run_dir).tracking
        self._run: TrackerRun | None = None
        self._state = TrackerState(name=config.name, uri=config.uri, experiment=config.experiment)

    def begin(self, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Begin a run at the tracker or go on with the one that was begun, and send what it does not have yet."""
        with_tracker = (self._open, lambda: self._describe(parameters, tags), self._send)
        self._try(*with_tracker)

    def catch_up(self, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Send what the tracker lacks of a training that is finished; nothing is opened where it lacks nothing."""
        with suppress(InputError):
            # What cannot be read is told by what follows.
            self._recall()
        newest = max((int(row["optimizer_step"] or 0) for row in self.table.rows), default=0)
        if newest > self._state.optimizer_step or not self._state.is_described:
            self.begin(parameters, tags)
            self.end("finished")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Send the epoch's row, which is saved by now."""
        if self._run is not None:
            self._try(self._send)

    def end(self, outcome: Outcome) -> None:
        """Say how the training ended."""
        run, self._run = self._run, None
        if run is not None:
            self._try(lambda: run.close(outcome))

    def _try(self, *actions: Callable[[], None]) -> None:
        try:
            for action in actions:
                action()
        except Exception as error:
            # A tracker's libraries have errors of all kinds, and none is worth a training.
            run, self._run = self._run, None
            logger.warning(
                "%s failed (%s); the training goes on without it, and the next start sends what is missing",
                self.config.name,
                in_words(error),
            )
            _give_up(run)

    def _recall(self) -> None:
        if self._path.is_file():
            before = read_artifact(self._path, TrackerState)
            is_same = all(getattr(before, key) == getattr(self._state, key) for key in ("name", "uri", "experiment"))
            self._state = before if is_same else self._state

    def _open(self) -> None:
        self._recall()
        self._run = open_tracker(self.config, self.run_dir, self._state.run_id)
        self._keep(run_id=self._run.run_id)
        logger.info("%s: run %s in %s", self.config.name, self._run.run_id, self._run.place)

    def _describe(self, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        if self._run is not None and not self._state.is_described:
            self._run.describe(parameters, tags)
            self._keep(is_described=True)

    def _send(self) -> None:
        for row in self.table.rows:
            before, step = self._state.optimizer_step, int(row["optimizer_step"] or 0)
            if self._run is None or step <= before:
                continue
            # Written down first: a row that is lost to a kill is better than one that is there twice.
            self._keep(optimizer_step=step)
            try:
                self._run.log({key: value for key, value in row.items() if value is not None}, step)
            except Exception:
                self._keep(optimizer_step=before)
                raise

    def _keep(self, **changes: Any) -> None:
        self._state = replace(self._state, **changes)
        write_artifact(self._path, self._state)


def _give_up(run: TrackerRun | None) -> None:
    try:
        if run is not None:
            run.close("failed")
    except Exception as error:
        logger.debug("%s", first_line(error))


def track_finished(config: TrainConfig, plan: Plan, folder: RunFolder, record: RunRecord, fold: Fold) -> None:
    """Send what a tracker lacks of a finished run: it failed at the end, or is chosen only now."""
    if config.tracking.name == "none":
        return
    # "auto" was decided when the run began.
    config = replace(config, max_epochs=record.max_epochs or config.max_epochs)
    rows = {"keep_epochs": record.counts.epoch, "is_written": False}
    table = MetricsTable(folder.metrics, class_names=plan.class_names[1:], **rows)
    tags = tags_of(record, num_training=len(fold.train), num_validation=len(fold.validation))
    Tracking(config.tracking, folder.path, table).catch_up(describe_training(config, plan, record), tags)


def describe_training(config: TrainConfig, plan: Plan, record: RunRecord) -> dict[str, Any]:
    """Options, the plan and what "auto" came to, flat; without paths, cases and patients."""
    options = {key: value for key, value in to_dict(config).items() if key not in NOT_SENT}
    planned, told = (json.loads(to_json(each)) for each in (plan, record))
    found = dict(_flat(options, ""))
    found |= _flat({key: planned[key] for key in OF_PLAN}, "plan.")
    return found | dict(_flat({key: told[key] for key in OF_RECORD}, "run."))


def tags_of(record: RunRecord, *, num_training: int, num_validation: int) -> dict[str, str]:
    """What a run is found by."""
    tags = {
        "voxfit": record.versions["voxfit"],
        "fold": str(record.fold),
        "training_cases": str(num_training),
        "validation_cases": str(num_validation),
    }
    if (begun := record.initial_weights) is not None:
        tags["init_from"] = f"{begun.weights_hash}, epoch {begun.epoch}"
    return tags


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for index, each in enumerate(value):
                yield from _flat(each, f"{prefix}{key}.{index}.")
        else:
            yield f"{prefix}{key}", value
