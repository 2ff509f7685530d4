"""Our own training step in every way that a plan may choose, for the benchmarks of memory and time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.geometry import Shape3
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.unet import UNet
from pipeline.plan import Execution, NetworkPlan
from pipeline.planning.executions import execution_families
from pipeline.planning.meter import StepMemory, meter_step

FEATURES = (32, 64, 128, 256, 320, 320)
PLAIN = Execution()


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """One kind of our step.

    Attributes:
        execution: How the stages are run.
        fused_head: Whether the loss takes the place of the head; always so in a training.
    """

    execution: Execution = PLAIN
    fused_head: bool = True

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"voxfit, {self.execution}" if self.fused_head else f"voxfit, {self.execution}, head not fused"


def step_kinds(network: NetworkPlan) -> list[StepKind]:
    """Rung 0, the same without the fused head, and every other way of running the stages that a plan may choose."""
    ways = [way for family in execution_families(network, may_offload=True) for way in family]
    kinds = [StepKind(execution=way) for way in ways if way != PLAIN]
    return [StepKind(), StepKind(fused_head=False), *kinds]


def make_plan(features: tuple[int, ...] = FEATURES, norm: str = "group", block: str = "plain") -> NetworkPlan:
    """An isotropic U-Net with these features."""
    stages = len(features)
    first: Shape3 = (1, 1, 1)
    return NetworkPlan(
        features_per_stage=tuple(features),
        strides=(first, *[(2, 2, 2)] * (stages - 1)),
        kernel_sizes=((3, 3, 3),) * stages,
        num_blocks_per_stage=(2,) * stages,
        norm=norm,
        block=block,
    )


def make_network(kind: StepKind, num_classes: int, plan: NetworkPlan, in_channels: int = 1) -> UNet:
    """The network that runs as the kind says."""
    return UNet(in_channels, num_classes, plan, **kind.execution._asdict(), fused_head=kind.fused_head)


def meter_kind(kind: StepKind, patch_size: Shape3, num_classes: int, device_type: str = "cuda") -> StepMemory:
    """The metered peak of one step under bf16 autocast with SGD, batch 1."""
    with torch.device("meta"):
        network = make_network(kind, num_classes, make_plan())
    return meter_step(network, make_loss(), patch_size=patch_size, in_channels=1, device_type=device_type)
