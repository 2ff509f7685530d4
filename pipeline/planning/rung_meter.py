"""Metering of whole rungs: the project's network and loss at a patch, batch and way of running the stages."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch

from pipeline.config import PlanConfig
from pipeline.geometry import Shape3, Spacing
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.unet import UNet
from pipeline.plan import Execution, MemoryPlan, NetworkPlan, Plan, Precision, Rung
from pipeline.planning.budget import estimate_overhead_bytes
from pipeline.planning.executions import execution_families, relative_time
from pipeline.planning.meter import MakeOptimizer, OptimizerName, StepMemory, meter_step
from pipeline.planning.topology import make_topology

# Patches per optimiser step where neither the person nor a larger batch decides.
DEFAULT_EFFECTIVE_BATCH = 2
# Beside the meter's own parts: the weights that an exponential moving average keeps.
AVERAGED_WEIGHTS = "averaged weights"
# Parts that are there all through a step, however it is run.
LASTING_PARTS = ("parameters", "optimizer", AVERAGED_WEIGHTS)

# As the training takes them: they allocate nothing beside their state.
_FUSED: dict[str, MakeOptimizer] = {
    "sgd": partial(torch.optim.SGD, lr=0.01, momentum=0.99, nesterov=True, weight_decay=3e-5, fused=True),
    "adamw": partial(torch.optim.AdamW, lr=0.001, fused=True),
}

_Step = tuple[NetworkPlan, Shape3, int, bool, Execution]


@dataclass(frozen=True, kw_only=True)
class RungMeter:
    """Answers what a rung takes, and knows which it was asked about.

    Attributes:
        config: Shape of the network, precision, optimiser and effective batch.
        in_channels, num_classes: Of the dataset.
        spacing: Target spacing in millimetres.
    """

    config: PlanConfig
    in_channels: int
    num_classes: int
    spacing: Spacing
    _known: set[_Step] = field(default_factory=set, repr=False)

    @classmethod
    def of_plan(cls, plan: Plan) -> RungMeter:
        """The meter for rungs of a plan that exists; its network is to be given with every rung."""
        options = PlanConfig(dataset="", precision=plan.precision, optimizer=plan.optimizer, ema=plan.ema)
        return cls(
            config=options, in_channels=plan.num_channels, num_classes=plan.num_classes, spacing=plan.target_spacing
        )

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

    def families(
        self, patch_size: Shape3, batch_size: int, *, network: NetworkPlan | None = None
    ) -> tuple[tuple[Rung, ...], ...]:
        """Every way to run a step of `batch_size` patches, in families; memory is not predicted yet.

        Args:
            patch_size: I, J, K.
            batch_size: Patches per iteration.
            network: Trained; None takes that of the patch.
        """
        network = network or self.network_plan(patch_size)
        ways = execution_families(network, may_offload=self.config.offload == "auto")
        return tuple(tuple(self._rung(network, patch_size, batch_size, way) for way in family) for family in ways)

    def _rung(self, network: NetworkPlan, patch_size: Shape3, batch_size: int, execution: Execution) -> Rung:
        given = self.config.effective_batch
        effective_batch = DEFAULT_EFFECTIVE_BATCH if given == "auto" else given
        return Rung(
            patch_size=patch_size,
            batch_size=batch_size,
            accumulate_grad_batches=max(1, effective_batch // batch_size),
            **execution._asdict(),
            relative_time=relative_time(network, patch_size, execution, in_channels=self.in_channels),
        )

    def is_known(self, rung: Rung) -> bool:
        """Whether this meter was asked about the rung, with the network of its patch, already."""
        return _step(rung, self.network_plan(rung.patch_size)) in self._known

    def weighed(self, rung: Rung, *, network: NetworkPlan | None = None) -> Rung:
        """The rung with the memory that is predicted of it."""
        memory = self.memory(rung, network=network)
        return replace(rung, required_bytes=_required_bytes(memory), host_bytes=memory.pinned_bytes)

    def required_bytes(self, rung: Rung) -> int:
        """Metered tensors and estimated overhead of a training step."""
        return _required_bytes(self.memory(rung))

    def memory(self, rung: Rung, *, network: NetworkPlan | None = None) -> StepMemory:
        """The metered peak of a training step, by parts.

        Args:
            rung: The step.
            network: Trained; None takes that of the patch.
        """
        network = network or self.network_plan(rung.patch_size)
        step, config = _step(rung, network), self.config
        precision = "bf16-mixed" if config.precision == "auto" else config.precision
        memory = _meter(step, self.in_channels, self.num_classes, precision, config.optimizer, config.ema)
        self._known.add(step)
        return memory

    def memory_plan(self, rung: Rung, *, budget_bytes: int, network: NetworkPlan | None = None) -> MemoryPlan:
        """What a plan says of the memory of its rung."""
        memory = self.memory(rung, network=network)
        return MemoryPlan(
            budget_bytes=budget_bytes,
            peak_bytes=memory.peak_bytes,
            overhead_bytes=estimate_overhead_bytes(memory.peak_bytes),
            parts=memory.parts,
            host_bytes=memory.pinned_bytes,
        )


def _step(rung: Rung, network: NetworkPlan) -> _Step:
    return network, rung.patch_size, rung.batch_size, rung.accumulate_grad_batches > 1, rung.execution


# A step is metered once in a process: plans of one dataset under several budgets, and whoever steps down from a plan,
# ask for the same ones.
@cache
def _meter(
    step: _Step, in_channels: int, num_classes: int, precision: Precision, optimizer: OptimizerName, ema: bool
) -> StepMemory:
    network_plan, patch_size, batch_size, accumulates, execution = step
    with torch.device("meta"):
        network = UNet(in_channels, num_classes, network_plan, **execution._asdict(), fused_head=True)
    memory = meter_step(
        network,
        make_loss(),
        patch_size=patch_size,
        in_channels=in_channels,
        batch_size=batch_size,
        precision=precision,
        optimizer=_FUSED[optimizer],
        accumulate_grad_batches=2 if accumulates else 1,
    )
    return _with_average(memory, network) if ema else memory


def _required_bytes(memory: StepMemory) -> int:
    return memory.peak_bytes + estimate_overhead_bytes(memory.peak_bytes)


def _with_average(memory: StepMemory, network: torch.nn.Module) -> StepMemory:
    """Averaged weights are a second copy of parameters and buffers that lives through the whole step."""
    kept = sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])
    parts = {**memory.parts, AVERAGED_WEIGHTS: kept}
    return replace(memory, peak_bytes=memory.peak_bytes + kept, parts=parts)
