"""Tries a training: patches from its data workers, a few steps, a validation, a save; run as a module.

It is a process of its own, because memory that runs out may end it, and because its peaks are then its own. Each part
is answered as soon as it is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TextIO

from pydantic import TypeAdapter

from pipeline.artifacts import read_artifact
from pipeline.config import TrainConfig
from pipeline.datasets.splits import Fold, select_fold
from pipeline.doctor.apart import answering
from pipeline.doctor.facts import in_seconds
from pipeline.doctor.parts import ANSWER, Part, TrainRequest, WholeJob
from pipeline.durations import parse_duration
from pipeline.geometry import format_shape
from pipeline.plan import Plan
from pipeline.run_record import Counts
from pipeline.sizes import MIB
from pipeline.training.assembly import make_data
from pipeline.training.datamodule import PatchDataModule
from pipeline.training.epoch_report import peak_ram_bytes
from pipeline.training.processes import PREFETCH_FACTOR
from pipeline.training.rehearsal import STEPS, Rehearsal, rehearse_in
from pipeline.training.settings import Settings, resolve_settings
from pipeline.training.trainer import rehearsed

# Batches that are timed once those are used up that were made ahead.
LEAST_BATCHES = 8
MOST_SAMPLING_SECONDS = 60.0
# From this share on a training is held up by its data.
MUCH_WAITING = 0.2


def answer_request(answers: TextIO) -> None:
    """Answer the request on standard input, part by part."""
    for answer in try_training(TypeAdapter(TrainRequest).validate_json(sys.stdin.read())):
        answers.write(ANSWER.dump_json(answer).decode() + "\n")


def try_training(request: TrainRequest) -> Iterator[Part | WholeJob]:
    """Make every part but the reading of a whole case, and estimate the whole training."""
    # One device is tried; several share its iterations out.
    config = replace(request.config, hardware=replace(request.config.hardware, devices="auto"))
    plan = read_artifact(Path(config.plan), Plan)
    settings, fold = resolve_settings(plan, config), select_fold(request.splits, config.fold)
    typical = tuple(sorted(fold.validation, key=lambda case_id: case_id != request.typical))
    fold = replace(fold, validation=typical)
    yield _sample(plan, fold, config, settings)
    train = rehearsed(plan, Path(config.store), request.splits.seed)
    per_step = settings.pace.iterations_per_step
    rehearsal = rehearse_in(Path(request.folder), train, config, fold, iterations_per_step=per_step)
    yield _train(rehearsal, settings)
    yield _save(rehearsal)
    yield _validate(rehearsal, fold)
    devices = request.config.hardware.devices
    num_devices = 1 if devices == "auto" else int(devices)
    yield _whole_job(rehearsal, config, settings, num_cases=len(typical), num_devices=num_devices)


def _sample(plan: Plan, fold: Fold, config: TrainConfig, settings: Settings) -> Part:
    """Patches from the data workers alone, with nobody but this process to wait for them."""
    data = make_data(plan, Path(config.store), fold, config, settings, start=Counts())
    try:
        num, seconds, first, batch_bytes = _time_batches(data, settings.processes.num_workers)
        peak = peak_ram_bytes()
    finally:
        data.end_workers()
    patches, workers = num * settings.batch_size, settings.processes.num_workers
    left = ", augmentation on the GPU not included" if settings.augment_on_gpu else ""
    return Part(
        name="sample",
        what=f"{patches} patches of {format_shape(settings.patch_size)} voxels by {workers} data worker(s){left}",
        seconds=seconds / patches,
        rate=f"{patches / seconds:.3g} patches/s; the first after {in_seconds(first)}",
        peak_ram_bytes=peak,
        figures={
            "patches_per_second": patches / seconds,
            "first_batch_seconds": first,
            "num_workers": workers,
            # A worker holds those made ahead and the one that it makes.
            "shared_bytes": batch_bytes * workers * (PREFETCH_FACTOR + 1),
        },
    )


def _time_batches(data: PatchDataModule, num_workers: int) -> tuple[int, float, float, int]:
    """Batches and the seconds that they took, seconds until the first, and bytes of the largest."""
    ahead = min(num_workers * PREFETCH_FACTOR, data.iterations_per_epoch - 1)
    started = begun = perf_counter()
    num, first, largest = 0, 0.0, 0
    for number, item in enumerate(data.train_dataloader()):
        batch = data.on_before_batch_transfer(item, 0)
        largest = max(largest, sum(batch[name].nbytes for name in ("image", "label")))
        now = perf_counter()
        first = first or now - started
        if number < ahead:
            begun = now
            continue
        num += 1
        if num >= max(LEAST_BATCHES, 2 * num_workers) or now - started > MOST_SAMPLING_SECONDS:
            break
    return num, perf_counter() - begun, first, largest


def _train(rehearsal: Rehearsal, settings: Settings) -> Part:
    cost, record = rehearsal.cost, rehearsal.record
    per_step, waiting = settings.pace.iterations_per_step, rehearsal.data_wait_share
    rate = f"{in_seconds(cost.iteration * per_step)} a step; {waiting:.0%} waiting for data"
    figures = {"data_wait_share": waiting, "seconds_per_optimizer_step": cost.iteration * per_step}
    if record.measured_bytes:
        figures["measured_bytes"] = record.measured_bytes
    if record.predicted_bytes:
        figures["predicted_bytes"] = record.predicted_bytes
    advice = []
    if waiting > MUCH_WAITING:
        advice.append(f"{waiting:.0%} of the training is waiting for data; ask for more CPUs, or put the store nearer")
    if record.step_downs:
        rung = f"{record.step_downs[-1].from_rung} to {record.step_downs[-1].to_rung}"
        advice.append(f"memory ran out, and the step went down from {rung}; plan with a smaller --vram")
    return Part(
        name="train",
        what=f"{rehearsal.iterations} iterations, {STEPS} optimiser steps, after as many to warm up; {settings.rung}",
        seconds=cost.iteration,
        rate=rate,
        peak_ram_bytes=rehearsal.peak_ram_bytes,
        peak_vram_bytes=rehearsal.peak_vram_bytes,
        figures=figures,
        advice="; ".join(advice),
    )


def _save(rehearsal: Rehearsal) -> Part:
    size, seconds = rehearsal.checkpoint_bytes, rehearsal.cost.saving
    return Part(
        name="save",
        what=f"checkpoints of an epoch, {size / MIB:.1f} MiB each",
        seconds=seconds,
        rate=f"{size / MIB / max(seconds, 1e-3):.0f} MiB/s",
        figures={"checkpoint_bytes": size},
    )


def _validate(rehearsal: Rehearsal, fold: Fold) -> Part:
    if not fold.validation:
        return Part(name="validate", what="no cases are held out")
    seconds = rehearsal.cost.case
    return Part(
        name="validate",
        what=f"case {fold.validation[0]}",
        seconds=seconds,
        rate=f"{in_seconds(seconds * len(fold.validation))} for {len(fold.validation)} case(s)",
    )


def _whole_job(
    rehearsal: Rehearsal, config: TrainConfig, settings: Settings, *, num_cases: int, num_devices: int
) -> WholeJob:
    cost, epochs = rehearsal.cost, config.max_epochs
    if epochs == "auto":
        epochs = cost.epochs_within(parse_duration(config.max_time), config, num_cases=num_cases)
    parts = cost.seconds_of(epochs, config, num_cases=num_cases)
    return WholeJob(
        epochs=epochs,
        training_seconds=parts.training / num_devices,
        validation_seconds=parts.validation / num_devices,
        saving_seconds=parts.saving,
        ends_within_seconds=cost.iteration * settings.pace.iterations_per_step + cost.saving,
        device=rehearsal.record.device,
        precision=rehearsal.record.precision,
    )


if __name__ == "__main__":
    sys.exit(answering(answer_request))
