"""The examination: facts of this place, and what a real step says of the whole job in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import DoctorConfig
from pipeline.doctor import gpu, machine, slurm_job, software
from pipeline.doctor.facts import Section, find
from pipeline.doctor.folders import find_in_folder, find_in_store
from pipeline.doctor.parts import WholeJob
from pipeline.doctor.real_step import NOT_REACHED, RealStep
from pipeline.durations import format_duration, parse_duration
from pipeline.sizes import format_bytes

# Peaks vary with the patch and with what a library caches.
SAFE_SHARE_OF_MEMORY = 0.9
MACHINE = {
    "CPUs": machine.find_cpus,
    "memory": machine.find_memory,
    "threads": machine.find_threads,
    "limits": machine.find_limits,
    "shared memory": machine.find_shared_memory,
    "temporary folder": machine.find_temporary_folder,
    "terminal": machine.find_terminal,
}


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        sections: Facts.
        step: None where none was asked for.
        prospects: What the step means for the whole job here, in sentences.
        advice: Everything that is wrong or could be better, each with what to do.
        as_json: How it is to be shown.
    """

    sections: tuple[Section, ...]
    step: RealStep | None
    prospects: tuple[str, ...]
    advice: tuple[str, ...]
    as_json: bool = False

    @property
    def failures(self) -> dict[str, str]:
        """Why parts of the step failed, by name."""
        parts = self.step.parts if self.step is not None else ()
        return {part.name: part.problem for part in parts if part.problem and part.problem != NOT_REACHED}


def find_facts(config: DoctorConfig) -> tuple[Section, ...]:
    """Everything that can be found out without a plan."""
    work_dir = Path(config.work_dir or ".")
    folders = {"work folder": partial(find_in_folder, work_dir, timed=bool(config.work_dir))}
    if config.store:
        folders["store"] = partial(find_in_store, Path(config.store))
    return (
        find("CPUs and memory", MACHINE),
        find("GPU", {"GPU": gpu.find_gpu}),
        find("SLURM", {"job": slurm_job.find_job}),
        find("folders", folders),
        find("software", {"packages": software.find_versions, "DICOM decoders": software.find_decoders}),
    )


def conclude(config: DoctorConfig, sections: tuple[Section, ...], step: RealStep | None) -> Examination:
    """What facts and step say together."""
    values = {fact.name: fact.value for section in sections for fact in section.facts}
    advice = [fact.advice for section in sections for fact in section.facts if fact.advice]
    prospects: list[str] = []
    if step is not None:
        advice += [part.advice for part in step.parts if part.advice]
        advice += _memory_advice(step, values)
        if step.job is not None:
            prospects += _prospects(step.job, config, values)
            advice += _time_advice(step.job, values)
    return Examination(sections, step, tuple(prospects), tuple(advice), config.json)


def _memory_advice(step: RealStep, values: dict[str, Any]) -> Iterator[str]:
    parts = {part.name: part for part in step.parts}
    allotted = min(filter(None, (values.get(name) for name in ("memory", "memory granted"))), default=0)
    peak = max(part.peak_ram_bytes for part in step.parts)
    if allotted and peak > SAFE_SHARE_OF_MEMORY * allotted:
        sizes = f"{format_bytes(peak)} of memory, {format_bytes(allotted)} are allotted"
        yield f"the step took {sizes}; ask for more (SLURM: --mem)"
    gpu, took = values.get("GPU 0"), parts["train"].figures.get("measured_bytes")
    if gpu and took and took > SAFE_SHARE_OF_MEMORY * gpu["total_bytes"]:
        total = format_bytes(gpu["total_bytes"])
        yield f"the step took {format_bytes(took)} of the GPU's {total}; plan with a smaller --vram to be safe"
    shared, free = parts["sample"].figures.get("shared_bytes"), values.get(str(machine.SHARED_MEMORY))
    if shared and free is not None and shared > free:
        yield (
            f"patches of the data workers may take {format_bytes(shared)} of {machine.SHARED_MEMORY}, which has"
            f" {format_bytes(free)} free; give the container more, or use fewer --hardware.num_workers"
        )


def _prospects(job: WholeJob, config: DoctorConfig, values: dict[str, Any]) -> Iterator[str]:
    """What the whole training takes, and how many starts."""
    shares = {"training": job.training_seconds, "validations": job.validation_seconds, "saves": job.saving_seconds}
    named = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in shares.items())
    yield (
        f"the whole training of {job.epochs} epochs on {job.device} in {job.precision} would take"
        f" {job.seconds / 3600:.2f} hours ({named})"
    )
    if config.max_time:
        yield from _starts(job, parse_duration(config.max_time), f"max_time {config.max_time}")
    elif values.get("time limit"):
        yield from _starts(job, values["time limit"], "the job's time limit")
    left = values.get("time left")
    if left is not None:
        fits = "fits" if job.seconds <= left else "does not fit"
        yield f"it {fits} into the {format_duration(left)} that are left of this job"


def _starts(job: WholeJob, seconds: float, limit: str) -> Iterator[str]:
    # Each start ends before the last step that would go beyond.
    usable = max(1.0, seconds - job.ends_within_seconds)
    count = math.ceil(job.seconds / usable)
    yield f"that is {count} start(s) of {format_duration(seconds)} each ({limit})"


def _time_advice(job: WholeJob, values: dict[str, Any]) -> Iterator[str]:
    signal = values.get("signal")
    if signal and job.ends_within_seconds > signal:
        needed = format_duration(job.ends_within_seconds)
        yield (
            f"the signal comes {signal} s before the time limit, and a step and a save take {needed}; ask for more"
            " with #SBATCH --signal"
        )
