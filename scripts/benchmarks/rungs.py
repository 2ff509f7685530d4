"""Our own training step at every rung of the ladder, for the benchmarks of memory and time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.geometry import Shape3
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.unet import UNet
from pipeline.plan import NetworkPlan
from pipeline.planning.meter import StepMemory, meter_step

FEATURES = (32, 64, 128, 256, 320, 320)


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One way to run our step; the numbers count stages from the highest resolution."""

    fused_head: bool = True
    recompute_stages: int = 0
    slab_stages: int = 0
    offload_stages: int = 0

    @property
    def name(self) -> str:
        """What tables call it."""
        parts = ["voxfit"] if self.fused_head else ["voxfit, head not fused"]
        if self.slab_stages:
            parts.append(f"{self.slab_stages} in slabs")
        if self.offload_stages:
            parts.append(f"{self.offload_stages} offloaded")
        if self.recompute_stages:
            parts.append(f"recompute to {self.recompute_stages}")
        return ", ".join(parts)


def every_rung(num_stages: int = len(FEATURES)) -> list[Rung]:
    """Every rung; recomputation covers the stages that do not run in slabs."""
    numbers = range(1, num_stages)
    rungs = [Rung(fused_head=False), Rung()]
    rungs += [Rung(recompute_stages=number) for number in range(1, num_stages + 1)]
    for recompute_stages in (0, num_stages):
        rungs += [Rung(slab_stages=number, recompute_stages=recompute_stages) for number in numbers]
    rungs += [Rung(slab_stages=number, offload_stages=number, recompute_stages=num_stages) for number in numbers]
    rungs += [Rung(slab_stages=num_stages - 1, offload_stages=number) for number in numbers]
    return rungs


def main_rungs(num_stages: int = len(FEATURES)) -> list[Rung]:
    """The rungs that a plan may choose: single stages down to the third, below that all or nothing."""
    most, single = num_stages - 1, range(1, min(3, num_stages))
    rungs = [Rung(fused_head=False), Rung(), *(Rung(recompute_stages=number) for number in (*single, num_stages))]
    rungs += [Rung(slab_stages=number) for number in dict.fromkeys((*single[:2], most))]
    rungs += [Rung(slab_stages=min(2, most), recompute_stages=num_stages)]
    return rungs + [Rung(slab_stages=most, offload_stages=number) for number in dict.fromkeys((*single[:2], most))]


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


def make_network(rung: Rung, num_classes: int, plan: NetworkPlan, in_channels: int = 1) -> UNet:
    """The network that runs as the rung says."""
    return UNet(
        in_channels,
        num_classes,
        plan,
        recompute_stages=rung.recompute_stages,
        slab_stages=rung.slab_stages,
        offload_stages=rung.offload_stages,
        fused_head=rung.fused_head,
    )


def meter_rung(rung: Rung, patch_size: Shape3, num_classes: int, device_type: str = "cuda") -> StepMemory:
    """The metered peak of one step under bf16 autocast with SGD, batch 1."""
    with torch.device("meta"):
        network = make_network(rung, num_classes, make_plan())
    return meter_step(network, make_loss(), patch_size=patch_size, in_channels=1, device_type=device_type)
