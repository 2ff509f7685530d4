"""A trained run as something to export: its network in plain operations, and what another program must reproduce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.artifacts import to_json
from pipeline.errors import InputError, first_line
from pipeline.geometry import Shape3
from pipeline.inference.loading import as_trained, find_checkpoint, load_weights, read_plan
from pipeline.inference.window_outputs import full_resolution
from pipeline.networks.plain_form import PlainUNet
from pipeline.networks.unet import UNet
from pipeline.networks.weights import read_weights
from pipeline.plan import Plan

# Of the outputs' largest absolute value.
TOLERANCE = 1e-4
# A whole window may be half a CT; the check of an export is worth seconds and some hundred MiB.
CHECKED_VOXELS = 96**3


@dataclass(frozen=True, eq=False)
class ExportableRun:
    """A run's network, twice, and its plan.

    Attributes:
        plan: With the patch that the run came to train with, which is the window.
        plain: Gives logits (B, K, I, J, K') of (B, C, I, J, K'), in operations that exporters know.
        reference: What `plain` and every export of it is compared with: the network that `voxfit predict` uses.
        stride: Sizes that the network takes are multiples of it; None for a network of the user's own, which is only
            known to take the window.
        checkpoint: "best" or "last".
    """

    plan: Plan
    plain: nn.Module
    reference: nn.Module
    stride: Shape3 | None
    checkpoint: str

    @property
    def window(self) -> Shape3:
        """Of the sliding window."""
        return self.plan.patch_size

    @property
    def plan_json(self) -> str:
        """The plan without the steps that were not taken."""
        return to_json(replace(self.plan, candidates=(), fallbacks=()))

    def checked_shapes(self) -> list[tuple[int, ...]]:
        """Inputs that an export is checked on: two batch sizes, and two spatial sizes where the network allows it."""
        channels = self.plan.num_channels
        if self.stride is None:
            return [(batch, channels, *self.window) for batch in (1, 2)]
        largest = shrink(self.window, self.stride, CHECKED_VOXELS)
        other = tuple(2 * step for step in self.stride)
        return [(1, channels, *largest), (2, channels, *other)]


def load_exportable(run_dir: Path, checkpoint: str, *, network: nn.Module | None = None) -> ExportableRun:
    """Read a run's plan and weights.

    Args:
        run_dir: The run folder.
        checkpoint: "best" or "last"; averaged (EMA) weights where it has them.
        network: The network of one's own that the run was trained with; None builds the plan's U-Net.

    Raises:
        InputError: The run has no plan or no such checkpoint, or the weights are another network's.
    """
    plan = as_trained(read_plan(run_dir), run_dir)
    weights = read_weights(find_checkpoint(run_dir, checkpoint))
    if network is not None:
        load_weights(network, weights, where=run_dir)
        own = _FullResolution(network).eval().cpu().float()
        return ExportableRun(plan, own, own, None, checkpoint)
    reference = UNet(plan.num_channels, plan.num_classes, plan.network).eval()
    load_weights(reference, weights, where=run_dir)
    plain = PlainUNet(plan.num_channels, plan.num_classes, plan.network)
    plain.load_state_dict(reference.state_dict())
    return ExportableRun(plan, plain, reference, plan.network.total_stride, checkpoint)


class _FullResolution(nn.Module):
    """A network's scores at full resolution, without those of deep supervision."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return full_resolution(self.network(x))


def shrink(size: Shape3, stride: Shape3, max_voxels: int) -> Shape3:
    """The size, halved along its longest axes until it has at most `max_voxels`, in multiples of the stride."""
    sides = list(size)
    while prod(sides) > max_voxels:
        axis = max(range(3), key=lambda a: sides[a] / stride[a])
        if sides[axis] < 2 * stride[axis]:
            break
        sides[axis] = sides[axis] // 2 // stride[axis] * stride[axis]
    return sides[0], sides[1], sides[2]


@torch.inference_mode()
def check_same_outputs(
    run: ExportableRun, exported: Callable[[Tensor], Tensor], shapes: Sequence[tuple[int, ...]], *, where: Path
) -> float:
    """Compare an export with the run's own network on random images.

    Args:
        run: The run.
        exported: The network as it was written and read again.
        shapes: Of the images, (B, C, I, J, K).
        where: For the message.

    Returns:
        The largest absolute difference over the largest absolute output.

    Raises:
        InputError: It is above `TOLERANCE`, or the export does not take one of the shapes.
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for shape in shapes:
        image = torch.randn(shape, generator=generator)
        expected = run.reference(image)
        try:
            difference = (exported(image) - expected).abs().max().item()
        except Exception as error:
            raise InputError(
                f"the exported network does not run on {list(shape)} ({first_line(error)}); nothing was written",
                where=where,
            ) from error
        scale = expected.abs().max().item()
        relative = difference / scale if scale > 0 else difference
        # Written so that a NaN is no pass.
        if not relative <= TOLERANCE:
            raise InputError(
                f"the exported network differs by {relative:.2g} of its outputs' scale on {list(shape)}, more than"
                f" {TOLERANCE:g}; nothing was written",
                where=where,
            )
        worst = max(worst, relative)
    return worst
