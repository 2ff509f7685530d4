"""One real step of a training, part by part, in processes of their own; nothing of it is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.artifacts import read_artifact, to_json
from pipeline.config import DoctorConfig, TrainConfig
from pipeline.datasets.splits import Splits, select_fold
from pipeline.doctor.apart import ApartError, run_apart
from pipeline.doctor.parts import ANSWER, PARTS, Part, ReadRequest, TrainRequest, WholeJob
from pipeline.errors import in_words
from pipeline.log import get_logger
from pipeline.plan import Plan
from pipeline.run_files import RunFiles
from pipeline.store import CaseStore
from pipeline.training.run_splits import splits_of_run

READING_SECONDS, TRAINING_SECONDS = 1800.0, 6 * 3600.0
NOT_REACHED = "not reached"
logger = get_logger("doctor")


@dataclass(frozen=True)
class RealStep:
    """What came of a step.

    Attributes:
        parts: Of every name one, in order.
        job: None where a part failed that it follows from.
    """

    parts: tuple[Part, ...]
    job: WholeJob | None


def planned_step(config: DoctorConfig) -> Callable[[], RealStep]:
    """The step, once it is known that plan, store and folds can be read and belong together.

    Raises:
        InputError: They cannot, or do not.
    """
    store, options = CaseStore(Path(config.store)), config.training()
    store.check_plan(read_artifact(Path(config.plan), Plan))
    return partial(take_step, options, splits_of_run(store, options), Path(config.work_dir or "."))


def take_step(config: TrainConfig, splits: Splits, work_dir: Path) -> RealStep:
    """Read, sample, train, save and validate with the real plan and store on the real device.

    Args:
        config: Options of the training; its run folder is not touched.
        splits: Its folds, which the store has the cases of.
        work_dir: Where a folder is made for what the training writes, and removed.

    Raises:
        InputError: There is no such fold, or a record of the store is damaged.
    """
    # The processes run in another folder.
    config = replace(config, plan=str(Path(config.plan).resolve()), store=str(Path(config.store).resolve()))
    store = CaseStore(Path(config.store))
    typical = typical_case(store, select_fold(splits, config.fold).validation or store.case_ids)
    logger.info("reading a case, then sampling, training and validating for a few steps; nothing of it is kept")
    answers = [_read(ReadRequest(store=config.store, case_id=typical)), *_train(config, splits, typical, work_dir)]
    by_name = {answer.name: answer for answer in answers if isinstance(answer, Part)}
    parts = tuple(by_name.get(name, Part(name=name, problem=NOT_REACHED)) for name in PARTS)
    return RealStep(parts, next((answer for answer in answers if isinstance(answer, WholeJob)), None))


def typical_case(store: CaseStore, case_ids: Sequence[str]) -> str:
    """The case whose number of voxels is nearest to the mean."""
    voxels = {}
    for case_id in case_ids:
        i, j, k = store.record(case_id).shape
        voxels[case_id] = i * j * k
    mean = sum(voxels.values()) / len(voxels)
    return min(voxels, key=lambda case_id: abs(voxels[case_id] - mean))


def _read(request: ReadRequest) -> Part:
    try:
        lines = list(run_apart("pipeline.doctor.reading", to_json(request), timeout_seconds=READING_SECONDS))
        answer = ANSWER.validate_json(lines[-1])
    except (ApartError, ValueError, IndexError) as error:
        return Part(name="read", what=f"case {request.case_id}", problem=_problem(error))
    return answer if isinstance(answer, Part) else Part(name="read", problem="it gave another answer")


def _train(config: TrainConfig, splits: Splits, typical: str, work_dir: Path) -> Iterator[Part | WholeJob]:
    """The answers of a training until it is done, or fails: then with what is known of the part that it failed in."""
    sampled = False
    try:
        with TemporaryDirectory(prefix=".doctor.", dir=work_dir.resolve(), ignore_cleanup_errors=True) as made:
            folder = Path(made) / "run"
            request = to_json(TrainRequest(config=config, splits=splits, typical=typical, folder=str(folder)))
            try:
                for line in run_apart("pipeline.doctor.training", request, timeout_seconds=TRAINING_SECONDS):
                    sampled = True
                    yield ANSWER.validate_json(line)
            except (ApartError, ValueError) as error:
                problem = _problem(error)
                yield from _failed(folder, problem) if sampled else [Part(name="sample", problem=problem)]
    except OSError as error:
        yield Part(name="save", problem=f"{work_dir} cannot be written ({in_words(error)})")


def _failed(folder: Path, problem: str) -> Iterator[Part]:
    """The part that a training failed in, by what it left; and what it took until then, where it said so."""
    beat, steps = _heartbeat(folder), 0
    if beat:
        steps = beat["total_steps"] // beat["max_epochs"]
    if "cannot write" in problem:
        yield Part(name="save", problem=problem)
    elif beat and beat["optimizer_step"] >= (_finished_epochs(folder) + 1) * steps:
        yield Part(name="validate", problem=problem)
    else:
        yield Part(name="train", problem=problem)
        return
    if beat and beat["seconds_per_step"] is not None:
        yield Part(
            name="train",
            what="the optimiser steps until then",
            rate=f"{beat['seconds_per_step']:.3g} s a step",
            peak_ram_bytes=beat["peak_ram_bytes"],
            peak_vram_bytes=beat["peak_vram_bytes"],
            figures={"seconds_per_optimizer_step": beat["seconds_per_step"]},
        )


def _heartbeat(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(RunFiles(folder).heartbeat.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _finished_epochs(folder: Path) -> int:
    try:
        return len(RunFiles(folder).metrics.read_text(encoding="utf-8").splitlines()) - 1
    except OSError:
        return 0


def _problem(error: Exception) -> str:
    return str(error) if isinstance(error, ApartError) else in_words(error)
