"""Metering of whole rungs: the project's network and loss at a patch, batch and recomputation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from pipeline.config import PlanConfig
from pipeline.geometry import Shape3, Spacing
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.unet import UNet
from pipeline.plan import NetworkPlan
from pipeline.planning.budget import estimate_overhead_bytes
from pipeline.planning.candidates import Rung
from pipeline.planning.meter import StepMemory, meter_step
from pipeline.planning.topology import make_topology, step_flops


@dataclass(frozen=True, kw_only=True)
class RungMeter:
    """Answers what a rung takes; each is metered once.

    Attributes:
        config: Shape of the network, precision and effective batch.
        in_channels, num_classes: Of the dataset.
        spacing: Target spacing in millimetres.
    """

    config: PlanConfig
    in_channels: int
    num_classes: int
    spacing: Spacing
    _known: dict[Rung, StepMemory] = field(default_factory=dict, repr=False)

    def network_plan(self, patch_size: Shape3) -> NetworkPlan:
        """The network for a patch."""
        return make_topology(
            patch_size,
            self.spacing,
            base_features=self.config.base_features,
            max_features=self.config.max_features,
            block=self.config.block,
            norm=self.config.norm,
            num_groups=self.config.num_groups,
            deep_supervision=self.config.deep_supervision,
        )

    def accumulate_grad_batches(self, rung: Rung) -> int:
        """Iterations per optimiser step."""
        return max(1, self.config.effective_batch // rung.batch_size)

    def fully_recomputed(self, rung: Rung) -> Rung:
        """The same rung with every stage recomputed."""
        return replace(rung, recompute_stages=self.network_plan(rung.patch_size).num_stages)

    def required_bytes(self, rung: Rung) -> int:
        """Metered tensors and estimated overhead of a training step."""
        peak_bytes = self.memory(rung).peak_bytes
        return peak_bytes + estimate_overhead_bytes(peak_bytes)

    def memory(self, rung: Rung) -> StepMemory:
        """The metered peak of a training step, by parts."""
        network = self.network_plan(rung.patch_size)
        # More recomputed stages than there are change nothing.
        rung = replace(rung, recompute_stages=min(rung.recompute_stages, network.num_stages))
        if rung not in self._known:
            self._known[rung] = self._meter(rung, network)
        return self._known[rung]

    def relative_time(self, rung: Rung) -> float:
        """Time of a step against the same step without recomputation, by the operations of its convolutions."""
        network = self.network_plan(rung.patch_size)
        plain = step_flops(network, rung.patch_size, in_channels=self.in_channels)
        recomputed = step_flops(
            network, rung.patch_size, in_channels=self.in_channels, recompute_stages=rung.recompute_stages
        )
        return recomputed / plain

    def _meter(self, rung: Rung, network_plan: NetworkPlan) -> StepMemory:
        with torch.device("meta"):
            network = UNet(self.in_channels, self.num_classes, network_plan, recompute_stages=rung.recompute_stages)
        return meter_step(
            network,
            make_loss(),
            patch_size=rung.patch_size,
            in_channels=self.in_channels,
            batch_size=rung.batch_size,
            precision="bf16-mixed" if self.config.precision == "auto" else self.config.precision,
            accumulate_grad_batches=self.accumulate_grad_batches(rung),
        )
