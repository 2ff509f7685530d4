"""What "auto" comes to: the options of a training resolved against the plan and the machine."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pipeline.config import HardwareConfig, TrainConfig
from pipeline.errors import InputError
from pipeline.geometry import Shape3, format_shape
from pipeline.networks.precision import DeviceType, PrecisionChoice, choose_device_type, choose_precision
from pipeline.plan import Execution, Plan, Rung
from pipeline.rank_place import RankPlace
from pipeline.training.loop_state import Pace
from pipeline.training.optim import accumulation_for
from pipeline.training.processes import Processes, share_cpus

IMAGE_BYTES = 4
LABEL_BYTES = 2


class Settings(NamedTuple):
    """Resolved options of a training.

    Attributes:
        device_type: Where the network runs.
        precision: By Lightning's name, and why.
        patch_size: Training patch and window of the validation along i, j, k.
        batch_size: Patches per pass, which is an iteration unless the training has stepped down to a smaller batch.
        pace: How an epoch is cut up.
        total_steps: Optimiser steps of the whole training.
        execution: How the stages of the plan's U-Net are run.
        processes: Threads and data workers.
        augment_on_gpu: In batch on the GPU instead of patch by patch in data workers.
    """

    device_type: DeviceType
    precision: PrecisionChoice
    patch_size: Shape3
    batch_size: int
    pace: Pace
    total_steps: int
    execution: Execution
    processes: Processes
    augment_on_gpu: bool

    @property
    def accumulate_grad_batches(self) -> int:
        """Passes of a rank per optimiser step."""
        return self.pace.passes_per_step

    @property
    def rung(self) -> Rung:
        """Patch, batch and execution as a rung."""
        return Rung(
            patch_size=self.patch_size,
            batch_size=self.batch_size,
            accumulate_grad_batches=self.accumulate_grad_batches,
            **self.execution._asdict(),
        )

    def at_rung(self, rung: Rung) -> Settings:
        """The same training as these settings of its start, run as `rung` says, whose batch divides theirs."""
        return self._replace(
            patch_size=rung.patch_size,
            batch_size=rung.batch_size,
            pace=self.pace._replace(passes_per_iteration=self.batch_size // rung.batch_size),
            execution=rung.execution,
        )

    @property
    def device_name(self) -> str:
        """The GPU's name, or "cpu"."""
        return torch.cuda.get_device_name() if self.device_type == "cuda" else "cpu"

    def _describe_batch(self) -> str:
        ranks = f" x {self.pace.num_ranks} processes" if self.pace.num_ranks > 1 else ""
        return f"batch {self.batch_size} x accumulation {self.accumulate_grad_batches}{ranks}"

    def describe(self) -> str:
        """The settings as a line for the log."""
        left = self.pace.passes_per_epoch % self.pace.passes_per_step
        flushed = f" (the last of an epoch over {left} only)" if left else ""
        return (
            f"device {self.device_name}; precision {self.precision.precision} ({self.precision.reason}); "
            f"patch {format_shape(self.patch_size)}, {self.execution}; "
            f"{self._describe_batch()}; "
            f"{self.processes.num_threads} thread(s) for the network, {self.processes.num_workers} data worker(s); "
            f"{self.total_steps} optimiser steps in all{flushed}"
        )


def resolve_settings(plan: Plan, config: TrainConfig, place: RankPlace | None = None) -> Settings:
    """Every "auto" replaced by the plan's value or by what the machine offers; epochs stay to be decided (1 meanwhile).

    Args:
        plan: The plan.
        config: Options.
        place: Of this process among those that train together; None for one on its own.

    Raises:
        InputError: A GPU is asked for where there is none, or the effective batch is no multiple of the batch, or the
            network cannot run its stages as asked, or what is asked for cannot be shared out evenly.
    """
    hardware, place = config.hardware, place or RankPlace()
    _check_devices(hardware, place)
    device_type = choose_device_type(hardware.accelerator)
    batch_size = plan.batch_size if config.batch_size == "auto" else config.batch_size
    accumulate = _accumulation(plan, config, batch_size, num_ranks=place.num_ranks)
    pace = Pace(config.iterations_per_epoch, accumulate, num_ranks=place.num_ranks, rank=place.rank)
    planned = plan.precision if hardware.precision == "auto" else hardware.precision
    return Settings(
        device_type=device_type,
        precision=choose_precision(planned, device_type=device_type),
        patch_size=plan.patch_size,
        batch_size=batch_size,
        pace=pace,
        total_steps=pace.steps_per_epoch * (1 if config.max_epochs == "auto" else config.max_epochs),
        execution=_execution(plan, config),
        processes=share_cpus(
            num_threads=hardware.num_threads,
            num_workers=hardware.num_workers,
            on_gpu=device_type == "cuda",
            batch_bytes=batch_size * _patch_bytes(plan),
        ),
        augment_on_gpu=device_type == "cuda" and config.augmentation.device != "cpu",
    )


def _check_devices(hardware: HardwareConfig, place: RankPlace) -> None:
    if hardware.devices not in ("auto", place.num_local_ranks):
        raise InputError(
            f"{hardware.devices} are asked for, and {place.num_local_ranks} process(es) were started on this node",
            where="hardware.devices",
            fix="Start one process for each, by srun, torchrun or the `voxfit train` command alone, or leave it out",
        )


def _accumulation(plan: Plan, config: TrainConfig, batch_size: int, *, num_ranks: int) -> int:
    """Iterations per optimiser step, over all ranks; "auto" reaches the plan's effective batch or the next multiple."""
    if config.iterations_per_epoch % num_ranks:
        fewer = config.iterations_per_epoch - config.iterations_per_epoch % num_ranks
        raise InputError(
            f"{config.iterations_per_epoch} cannot be shared out evenly over {num_ranks} processes",
            where="iterations_per_epoch",
            fix=f"Use {fewer + num_ranks}" + (f" or {fewer}" if fewer else ""),
        )
    together = batch_size * num_ranks
    if config.effective_batch == "auto":
        return -(-plan.effective_batch // together) * num_ranks
    if config.effective_batch % together and num_ranks > 1:
        raise InputError(
            f"{config.effective_batch} is not a multiple of {num_ranks} processes x batch_size {batch_size}",
            where="effective_batch",
            fix=f"Use {config.effective_batch - config.effective_batch % together + together}",
        )
    return accumulation_for(batch_size=batch_size, effective_batch=config.effective_batch)


def _execution(plan: Plan, config: TrainConfig) -> Execution:
    """The plan's way of running the stages, with options given by hand in place of its own."""
    execution = options_over(plan.execution, config.hardware)
    if problems := execution.problems(plan.network):
        raise InputError("; ".join(f"hardware.{problem}" for problem in problems))
    return execution


def options_over(execution: Execution, hardware: HardwareConfig) -> Execution:
    """A way of running the stages with options given by hand in place of its own; it may be one that no network has."""
    options = {name: getattr(hardware, name) for name in Execution._fields}
    execution = execution._replace(**{name: value for name, value in options.items() if value != "auto"})
    if options["offload_stages"] == "auto":
        # Fewer stages in slabs leave fewer to offload.
        execution = execution._replace(offload_stages=min(execution.offload_stages, execution.slab_stages))
    return execution


def _patch_bytes(plan: Plan) -> int:
    i, j, k = plan.patch_size
    return i * j * k * (plan.num_channels * IMAGE_BYTES + LABEL_BYTES)
