"""Groups of options that a training has: optimiser, augmentation, hardware, tracking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.checks import Auto, Checked, at_least, within_unit


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Checked):
    """Optimiser, schedule and what goes with them."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw: with a cosine schedule; sgd: Nesterov momentum 0.99 with a polynomial one, which takes many more steps."""
    schedule: Literal["auto", "poly", "cosine", "constant"] = "auto"
    """How the learning rate falls after the warm-up; auto is poly for sgd and cosine for adamw."""
    lr: float | Auto = "auto"
    """Peak learning rate; auto is 0.01 for sgd and 0.001 for adamw."""
    weight_decay: float = 3e-5
    """Weight decay; norms and biases are left out of it with adamw."""
    momentum: float = 0.99
    """Momentum of sgd."""
    warmup_fraction: float = 0.02
    """Share of all optimiser steps over which the learning rate rises from zero."""
    gradient_clip_norm: float = 12.0
    """Largest norm of the whole gradient; 0 switches clipping off."""
    ema_decay: float = 0.0
    """Decay per optimiser step of the averaged weights that are validated and predicted with; 0 is off."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `group.key: problem`."""
        found = at_least(self, 0, "weight_decay", "gradient_clip_norm", prefix="optim.")
        found += within_unit(self, "warmup_fraction", "ema_decay", "momentum", prefix="optim.")
        if not isinstance(self.lr, str) and self.lr <= 0:
            found.append(f"optim.lr: must be positive, got {self.lr}")
        return found


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig(Checked):
    """Random changes to training patches; each is drawn on its own, with the given probability."""

    enabled: bool = True
    """Switch all of them off at once."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where they are computed; auto is the GPU in batch when there is one, data workers otherwise."""
    mirror: float = 0.5
    """Per allowed axis."""
    mirror_axes: tuple[int, ...] | Auto = "auto"
    """Axes (i, j, k) that may be mirrored; auto is the plan's: those along which no two classes keep an order."""
    rotate: float = 0.2
    """Rotation about all axes by up to 30 degrees; in the plane only when the patch is anisotropic."""
    scale: float = 0.2
    """Zoom by a factor of 0.7 to 1.4."""
    noise: float = 0.1
    """Gaussian noise with a variance of up to 0.1."""
    blur: float = 0.1
    """Gaussian blur with a sigma of 0.5 to 1 voxels."""
    brightness: float = 0.15
    """Multiplication by 0.75 to 1.25."""
    contrast: float = 0.15
    """Stretch about the mean by 0.75 to 1.25, clipped to the patch's range."""
    low_resolution: float = 0.1
    """Down to 0.5 to 1 of the resolution and up again."""
    gamma: float = 0.2
    """Gamma of 0.7 to 1.5, with mean and spread kept."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `group.key: problem`."""
        names = ("mirror", "rotate", "scale", "noise", "blur", "brightness", "contrast", "low_resolution", "gamma")
        found = within_unit(self, *names, prefix="augmentation.")
        if not isinstance(self.mirror_axes, str) and not set(self.mirror_axes) <= {0, 1, 2}:
            found.append(f"augmentation.mirror_axes: only 0, 1 and 2 exist, got {list(self.mirror_axes)}")
        return found

    def mirrored_axes(self, planned: tuple[int, ...]) -> tuple[int, ...]:
        """Axes that patches are mirrored along.

        Args:
            planned: Those of the plan.
        """
        if not (self.enabled and self.mirror):
            return ()
        return planned if isinstance(self.mirror_axes, str) else self.mirror_axes


@dataclass(frozen=True, kw_only=True)
class HardwareConfig(Checked):
    """Device, precision and processes."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the network runs."""
    devices: int | Auto = "auto"
    """GPUs, a process each, on this node; auto is what srun or torchrun started, else one."""
    precision: Literal["auto", "bf16-mixed", "16-mixed", "32-true"] = "auto"
    """auto: the plan's, else bf16 where the device has it, fp16 with a scaler on older GPUs, float32 otherwise."""
    num_workers: int | Auto = "auto"
    """Data workers; auto follows the CPUs this job was allotted."""
    num_threads: int | Auto = "auto"
    """Threads of the network on a CPU; auto takes the allotted CPUs, or as many as OMP_NUM_THREADS allows."""
    recompute_stages: int | Auto = "auto"
    """Stages, from the highest resolution, whose activations are recomputed; auto is the plan's."""
    slab_stages: int | Auto = "auto"
    """Stages, from the highest resolution, that run in slabs instead; auto is the plan's."""
    offload_stages: int | Auto = "auto"
    """Slab stages, from the highest resolution, whose kept tensors lie in host memory; auto is the plan's."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `group.key: problem`."""
        found = at_least(self, 1, "devices", "num_threads", prefix="hardware.")
        counts = ("num_workers", "recompute_stages", "slab_stages", "offload_stages")
        return found + at_least(self, 0, *counts, prefix="hardware.")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Checked):
    """A tracker that the figures of metrics.csv go to as well; none leaves this machine without a uri."""

    name: Literal["none", "mlflow", "wandb"] = "none"
    """Whose: MLflow's (pip install 'voxfit[mlflow]') or Weights & Biases' (pip install 'voxfit[wandb]')."""
    uri: str = ""
    """Server, or another store of MLflow's; by default the folder mlruns beside the run folder, or wandb in it."""
    experiment: str = "voxfit"
    """Experiment of MLflow's, or project of Weights & Biases'."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `group.key: problem`."""
        found = [] if self.experiment.strip() else ["tracking.experiment: must not be empty"]
        if self.name == "wandb" and self.uri and not self.uri.startswith(("http://", "https://")):
            found.append(f"tracking.uri: must be the http(s) address of a W&B server, got {self.uri}")
        return found
