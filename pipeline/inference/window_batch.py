"""How many windows are in the network at once: on a GPU a batch of them, on a CPU each on cores of its own."""

from __future__ import annotations

from math import prod
from typing import Literal

import torch

from pipeline.allocation import allotted_cpus
from pipeline.inference.attempts import held_bytes, most_bytes
from pipeline.inference.predictor import Predictor
from pipeline.inference.window_memory import window_bytes
from pipeline.inference.window_outputs import WindowOutputs
from pipeline.inference.window_threads import WindowThreads, cores_per_window
from pipeline.log import get_logger
from pipeline.networks.precision import autocast, free_vram_bytes
from pipeline.networks.unet import UNet

# Of what is free, that windows may take at once: scores may take as much, and the volumes are not read yet.
WINDOWS_SHARE = 0.4
# Beyond it a GPU is busy with windows of any size, and the last batch of a row is less full.
MOST_WINDOWS_ON_GPU = 8


def set_window_batch(predictor: Predictor, option: int | Literal["auto"]) -> None:
    """Let a predictor compute several windows at once.

    On a GPU "auto" measures what a window takes, and takes as many as fit its free memory. On a CPU windows are never
    put into one batch, which is not faster; the threads that torch was given are divided among them instead. Networks
    other than ours stay with one call at a time: whether they may be called in several threads is not known.

    Args:
        predictor: On whose device the network lies already.
        option: Windows at once.
    """
    predictor.num_threads = torch.get_num_threads()
    if predictor.device_type == "cuda":
        # Nobody has told torch yet how many it may take.
        predictor.num_threads = min(predictor.num_threads, allotted_cpus())
        predictor.window_batch = _fitting_batch(predictor) if option == "auto" else option
        get_logger("predict").info("%d window(s) at a time", predictor.window_batch)
        return
    if not all(isinstance(member.network, UNet) for member in predictor.members):
        predictor.window_batch = 1 if option == "auto" else option
        return
    count = min(predictor.num_threads, _fitting_count(predictor) if option == "auto" else option)
    predictor.window_batch = count
    if count > 1:
        torch.set_num_threads(cores_per_window(predictor.num_threads, count))
        predictor.threads = WindowThreads(count)
    get_logger("predict").info("%d window(s) at a time, %d thread(s) for each", count, torch.get_num_threads())


def _fitting_count(predictor: Predictor) -> int:
    """Windows that the host's memory is enough for, by an estimate."""
    sliding, channels = predictor.sliding(1), predictor.plan.num_channels
    each = max(
        window_bytes(sliding.for_network(member.window, ()), channels, member.network) for member in predictor.members
    )
    free = most_bytes(predictor.max_ram) - held_bytes()
    return max(1, int(WINDOWS_SHARE * free / each))


@torch.inference_mode()
def _fitting_batch(predictor: Predictor) -> int:
    """Windows that the GPU's memory is enough for, by what the second pass of one takes in the largest network."""
    largest = max(predictor.members, key=lambda member: prod(member.window))
    shape = (1, predictor.plan.num_channels, *largest.window)
    outputs = WindowOutputs(largest.network, predictor.plan.num_classes, of_features=False)
    before = taken = 0
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with autocast(predictor.precision, "cuda"):
            for _ in outputs.rows(torch.zeros(shape, device="cuda")):
                pass
        taken = torch.cuda.max_memory_allocated() - before
    return max(1, min(MOST_WINDOWS_ON_GPU, int(WINDOWS_SHARE * free_vram_bytes() / max(1, taken))))
