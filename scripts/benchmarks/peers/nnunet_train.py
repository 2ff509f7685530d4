"""One training by nnU-Net's own trainer, of a given length; runs in nnU-Net's environment, not in the project's.

    python nnunet_train.py < request.json      keys: epochs, iterations_per_epoch, num_threads, mirrors, out

Everything is what `nnUNetv2_train 1 3d_fullres 0 -device cpu` does, down to the threads, but three attributes of the
trainer that are meant to be set: the number of epochs, over which its polynomial learning rate falls, the iterations
of an epoch, and one validation batch an epoch instead of fifty, which would take most of a short epoch's time. Without
`mirrors` it does what its variant nnUNetTrainerNoMirroring does; that class is not taken by its name, because looking
for it imports every other variant and what these need.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

CONFIGURATION = "3d_fullres"


def run_timed(trainer: nnUNetTrainer) -> dict[str, Any]:
    """Train, and say what it took from the first iteration to the end of the last epoch."""
    starts: list[float] = []
    ends: list[list[float]] = []
    begin, step, end = trainer.on_epoch_start, trainer.train_step, trainer.on_epoch_end
    finished: list[float] = []

    def on_epoch_start() -> None:
        starts.append(time.perf_counter())
        ends.append([])
        begin()

    def train_step(batch: dict[str, Any]) -> dict[str, Any]:
        result = step(batch)
        ends[-1].append(time.perf_counter())
        return result

    def on_epoch_end() -> None:
        end()
        finished.append(time.perf_counter())

    trainer.on_epoch_start, trainer.train_step, trainer.on_epoch_end = on_epoch_start, train_step, on_epoch_end
    trainer.run_training()
    iterations = [
        after - before
        for start, times in zip(starts, ends, strict=True)
        for before, after in zip([start, *times], times, strict=False)
    ]
    own = [finish - times[-1] for finish, times in zip(finished, ends, strict=True)]
    # What has never run before is slower the first time.
    return {
        "training_seconds": finished[-1] - starts[0],
        "iteration_seconds": statistics.mean(iterations[1:] or iterations),
        "epoch_seconds": statistics.mean(own[1:] or own),
        "iterations": len(iterations),
    }


def leave_mirroring(trainer: nnUNetTrainer) -> None:
    """No axis to mirror, in training and in predictions with its checkpoints."""
    configure = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size

    def without_axes() -> tuple[Any, ...]:
        *others, _ = configure()
        trainer.inference_allowed_mirroring_axes = None
        return (*others, None)

    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size = without_axes


def describe(trainer: nnUNetTrainer) -> dict[str, Any]:
    """The settings that the planner and the trainer chose."""
    configuration = trainer.configuration_manager
    architecture = configuration.network_arch_init_kwargs
    return {
        "patch_size": [int(size) for size in configuration.patch_size],
        "batch_size": int(trainer.batch_size),
        "spacing": [float(each) for each in configuration.spacing],
        "network": configuration.network_arch_class_name.rsplit(".", 1)[-1],
        "features_per_stage": list(architecture["features_per_stage"]),
        "strides": [list(each) for each in architecture["strides"]],
        "kernel_sizes": [list(each) for each in architecture["kernel_sizes"]],
        "num_parameters": sum(each.numel() for each in trainer.network.parameters()),
        "precision": "float32" if trainer.device.type == "cpu" else "float16",
        "optimizer": f"SGD, Nesterov momentum, rate {trainer.initial_lr}, polynomial by epoch",
        "validation_batches_per_epoch": trainer.num_val_iterations_per_epoch,
        "augmentation_processes": get_allowed_n_proc_DA(),
    }


def main() -> None:
    """Train and write what it took into the file that the request names."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["num_threads"])
    trainer = get_trainer_from_args("1", CONFIGURATION, 0, device=torch.device("cpu"))
    if not request["mirrors"]:
        leave_mirroring(trainer)
    trainer.num_epochs = request["epochs"]
    trainer.num_iterations_per_epoch = request["iterations_per_epoch"]
    trainer.num_val_iterations_per_epoch = 1
    taken = run_timed(trainer)
    Path(request["out"]).write_text(json.dumps({**taken, "settings": describe(trainer)}, indent=1))


if __name__ == "__main__":
    main()
