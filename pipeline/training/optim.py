"""Optimisers and learning-rate schedules, counted in optimiser steps.

Three counts are kept apart everywhere: an *iteration* is one forward and backward pass over `batch_size` patches, an
*optimiser step* follows after `accumulate_grad_batches` of them, and an *epoch* is a fixed number of iterations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from pipeline.config import OptimConfig
from pipeline.errors import InputError

DEFAULT_LR = {"sgd": 0.01, "adamw": 0.001}
POLY_EXPONENT = 0.9
Decay = Literal["poly", "cosine", "constant"]


def accumulation_for(*, batch_size: int, effective_batch: int) -> int:
    """Iterations per optimiser step.

    Raises:
        InputError: `effective_batch` is no multiple of `batch_size`.
    """
    if effective_batch % batch_size:
        raise InputError(
            f"{effective_batch} is not a multiple of batch_size {batch_size}",
            where="effective_batch",
            fix=f"Use {effective_batch - effective_batch % batch_size + batch_size}",
        )
    return effective_batch // batch_size


def steps_per_epoch(*, iterations_per_epoch: int, accumulate_grad_batches: int) -> int:
    """Optimiser steps of an epoch; what is left of an accumulation at its end is flushed as a step of its own."""
    return math.ceil(iterations_per_epoch / accumulate_grad_batches)


def make_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW with weight decay on kernels only.

    With `adamw`, parameters of one axis (norm weights and all biases) are left out of the weight decay; with `sgd` it
    acts on all, as in nnU-Net (Isensee et al. 2021). Torch's fused kernels are used where they exist: they allocate
    nothing, so an out-of-memory cannot leave a step half done. Parameters that need no gradient are left out.
    """
    optimizer = _make_optimizer(network, config, fused=has_fused_kernels(network))
    # Fused optimisers could undo the scale of fp16 gradients themselves, and Lightning refuses to clip for those. Told
    # that they cannot, it undoes the scale before it clips, as for all others.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def has_fused_kernels(network: nn.Module) -> bool:
    """Whether torch has fused optimiser kernels for all parameters: floating-point ones on a CPU or a CUDA device."""
    return all(
        parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point() for parameter in network.parameters()
    )


def _make_optimizer(network: nn.Module, config: OptimConfig, *, fused: bool) -> torch.optim.Optimizer:
    lr = DEFAULT_LR[config.name] if config.lr == "auto" else float(config.lr)
    if config.name == "sgd":
        return torch.optim.SGD(
            [parameter for parameter in network.parameters() if parameter.requires_grad],
            lr=lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
            fused=fused,
        )
    return torch.optim.AdamW(list(_adamw_groups(network, config.weight_decay)), lr=lr, fused=fused)


def _adamw_groups(network: nn.Module, weight_decay: float) -> Iterator[dict[str, Any]]:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    kernels = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    for group, decay in ((kernels, weight_decay), (others, 0.0)):
        if group:
            yield {"params": group, "weight_decay": decay}


def make_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, *, total_steps: int) -> LambdaLR:
    """The schedule after a linear warm-up; by itself polynomial for sgd and cosine for adamw.

    Args:
        optimizer: Its groups' rates are the peak.
        config: Kind of optimiser and schedule, and length of the warm-up.
        total_steps: Optimiser steps of the whole training.
    """
    warmup_steps = round(config.warmup_fraction * total_steps)
    own: Decay = "poly" if config.name == "sgd" else "cosine"
    decay = own if config.schedule == "auto" else config.schedule

    # A plain function, because LambdaLR would put the attributes of an object into the checkpoint and restore them.
    def factor(step: int) -> float:
        return learning_rate_factor(step, total_steps=total_steps, warmup_steps=warmup_steps, decay=decay)

    return LambdaLR(optimizer, factor)


def learning_rate_factor(step: int, *, total_steps: int, warmup_steps: int, decay: Decay) -> float:
    """Share of the peak learning rate that optimiser step `step` (from 0) uses; never zero before `total_steps`.

    Warm-up rises linearly, its last step being the peak. Then (1 - progress) ** 0.9 (DeepLab's "poly", Chen et al.
    2017), half a cosine (Loshchilov and Hutter 2017), or the peak throughout.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return float((1 - progress) ** POLY_EXPONENT)
