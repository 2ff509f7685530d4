"""One loss over the outputs of several decoder stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.slabs.rows import PendingLogits

Outputs = Tensor | PendingLogits


class DeepSupervisionLoss(nn.Module):
    """The weighted mean of a loss over outputs of falling resolution; each weight is half the one before.

    No output gets weight zero: networks of this project have no head on the lowest decoder stage, which nnU-Net
    gives weight zero.

    Args:
        loss: Called with (logits (B, K, I, J, K), target (B, I, J, K)).
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Outputs | Sequence[Outputs], target: Tensor) -> Tensor:
        """The loss as a scalar.

        Args:
            outputs: Logits (B, K, I, J, K) or what stands for them, a sequence of them with the highest resolution
                first, or a stack (B, heads, K, I, J, K) at one resolution as MONAI's DynUNet returns in training.
            target: (B, I, J, K) class indices at the highest resolution; taken to lower ones by nearest neighbour.
        """
        heads = _as_list(outputs)
        weights = [2.0**-index for index in range(len(heads))]
        losses = [self.loss(logits, downsample_target(target, logits.shape[2:])) for logits in heads]
        return sum(w * value for w, value in zip(weights, losses, strict=True)) / sum(weights)


def _as_list(outputs: Outputs | Sequence[Outputs]) -> list[Outputs]:
    if isinstance(outputs, PendingLogits):
        return [outputs]
    if isinstance(outputs, Tensor):
        return list(outputs.unbind(1)) if outputs.ndim == 6 else [outputs]
    return list(outputs)


def downsample_target(target: Tensor, shape: Sequence[int]) -> Tensor:
    """The target (B, I, J, K) at another shape by nearest voxel centre (the upper one where two are as near)."""
    for axis, size in enumerate(shape, start=1):
        length = target.shape[axis]
        factor, rest = divmod(length, size)
        if rest:
            centres = (torch.arange(size, device=target.device) * 2 + 1) * length
            target = target.index_select(axis, centres.div(2 * size, rounding_mode="floor"))
        elif factor > 1:
            # A view: where an operator takes longer to start than to run, as on a GPU, six fewer an axis.
            target = target[(slice(None),) * axis + (slice(factor // 2, None, factor),)]
    return target
