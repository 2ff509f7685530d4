"""The 3D U-Net that a NetworkPlan describes. Shapes: (B, C, I, J, K)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.kernels.availability import serves
from pipeline.kernels.tensors import channels_last
from pipeline.networks.blocks import DecoderStage, Head, make_encoder_stage
from pipeline.networks.recompute import recompute
from pipeline.networks.slab_stages import run_in_slabs
from pipeline.plan import Execution, NetworkPlan
from pipeline.slabs.rows import PendingLogits, WholeRows

Outputs = Tensor | PendingLogits | list[Tensor | PendingLogits]


class UNet(nn.Module):
    """A 3D U-Net with plain or residual blocks, without concatenation of skip and up-sampled tensors.

    Args:
        in_channels: Input channels.
        num_classes: Classes, background included.
        network: Stages, highest resolution first; the last one is the bottleneck.
        recompute_stages: Number of stages, from the highest resolution, whose encoder and decoder activations are
            recomputed in the backward pass instead of kept. Outputs and gradients stay the same.
        slab_stages: Number of stages, from the highest resolution, that run in slabs: of their activations only the
            raw outputs of convolutions are kept. They are not recomputed.
        offload_stages: Number of slab stages, from the highest resolution, whose kept tensors lie in host memory.
        fused_head: Give `PendingLogits` instead of logits while gradients are recorded in train mode; losses of this
            project take the logits from them voxels by voxels.

    Raises:
        InputError: The network cannot run its stages so, see `Execution.problems`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        network: NetworkPlan,
        *,
        recompute_stages: int = 0,
        slab_stages: int = 0,
        offload_stages: int = 0,
        fused_head: bool = False,
    ) -> None:
        super().__init__()
        if problems := Execution(recompute_stages, slab_stages, offload_stages).problems(network):
            raise InputError("; ".join(problems))
        self.recompute_stages = recompute_stages
        self.slab_stages = slab_stages
        self.offload_stages = offload_stages
        self.fused_head = fused_head
        self.total_stride = network.total_stride
        self._is_encoder_frozen = False
        channels = (in_channels, *network.features_per_stage)
        self.encoder = nn.ModuleList(
            make_encoder_stage(channels[index], network, index) for index in range(network.num_stages)
        )
        self.decoder = nn.ModuleList(DecoderStage(network, index) for index in range(network.num_stages - 1))
        self.heads = nn.ModuleList(
            Head(network.features_per_stage[index], num_classes) for index in range(num_heads(network))
        )

    def freeze_encoder(self) -> None:
        """Keep the encoder as it is from here on: it gets no gradients, and batch norms keep their statistics."""
        self._is_encoder_frozen = True
        self.encoder.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> UNet:
        """Train mode, but for batch norms that are frozen, or evaluation mode."""
        super().train(mode)
        if self._is_encoder_frozen:
            for module in self.encoder.modules():
                if isinstance(module, nn.BatchNorm3d):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> Outputs:
        """Logits (B, K, I, J, K) of x (B, C, I, J, K).

        In train mode with more than one head a list, highest resolution first. See `fused_head` for what stands for
        logits then.

        Raises:
            InputError: The size is not a multiple of the network's stride.
        """
        is_recorded = self.training and torch.is_grad_enabled()
        outputs = self._outputs(x, pending=self.fused_head and is_recorded)
        return outputs if len(outputs) > 1 else outputs[0]

    def pending_logits(self, x: Tensor) -> PendingLogits:
        """The logits of the highest resolution before they are computed, to be taken by rows.

        Args:
            x: (B, C, I, J, K).
        """
        output = self._outputs(x, pending=True)[0]
        assert isinstance(output, PendingLogits)
        return output

    @property
    def num_features(self) -> int:
        """Channels that the logits of the highest resolution are made from."""
        return self.heads[0].in_channels

    def _outputs(self, x: Tensor, *, pending: bool) -> list[Tensor | PendingLogits]:
        if any(size % stride for size, stride in zip(x.shape[2:], self.total_stride, strict=True)):
            shape, stride = list(x.shape[2:]), list(self.total_stride)
            raise InputError(f"size {shape} is not a multiple of the network's stride {stride}", where="patch_size")
        if self.slab_stages:
            return run_in_slabs(self, x, pending=pending)
        return self.run_stages(x, pending=pending)[1]

    def run_stages(
        self, x: Tensor, *, first: int = 0, pending: bool = False
    ) -> tuple[Tensor, list[Tensor | PendingLogits]]:
        """The stages from `first` on, down to the bottleneck and up again.

        Args:
            x: Input of the network, or for a later stage what its first convolution gave.
            first: The highest-resolution stage to run.
            pending: Leave logits to whoever takes the outputs.

        Returns:
            The activation of decoder stage `first`, and the outputs of the heads from there on down.
        """
        if serves(x):
            x = channels_last(x)
        skips = []
        for index, stage in enumerate(self.encoder[first:], start=first):
            # What comes from stages in slabs is convolved already.
            is_convolved = first > 0 and index == first
            x = self._run(index, nn.Sequential(stage[0].norm, *stage[1:]) if is_convolved else stage, x)
            skips.append(x)
        x = skips.pop()
        outputs: list[Tensor | PendingLogits] = []
        for index in reversed(range(first, len(self.decoder))):
            x = self._run(index, self.decoder[index], x, skips.pop())
            if index < self.num_outputs:
                outputs.insert(0, self._head(index, x, pending=pending))
        return x, outputs

    @property
    def num_outputs(self) -> int:
        """Heads that are computed: all of them in train mode."""
        return len(self.heads) if self.training else 1

    def _head(self, index: int, x: Tensor, *, pending: bool) -> Tensor | PendingLogits:
        head = self.heads[index]
        if pending:
            return PendingLogits(WholeRows(x), head.weight, head.bias)
        return head(x)

    def _run(self, index: int, stage: nn.Module, *inputs: Tensor) -> Tensor:
        if index < self.recompute_stages and torch.is_grad_enabled():
            return recompute(stage, *inputs)
        return stage(*inputs)


def num_heads(network: NetworkPlan) -> int:
    """Heads that have a loss: with deep supervision one per decoder stage but the lowest, and at least one.

    nnU-Net puts a head on the lowest decoder stage too and gives its loss weight zero; ours leaves it out.
    """
    return max(1, network.num_stages - 2) if network.deep_supervision else 1
