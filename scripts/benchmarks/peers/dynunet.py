"""MONAI's DynUNet at the size of nnU-Net's network, and the loss that goes with it."""

from __future__ import annotations

from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet
from torch import Tensor, nn


def make_dynunet(
    num_classes: int, features: tuple[int, ...], *, in_channels: int = 1, deep_supervision: bool = False
) -> DynUNet:
    """The network; with deep supervision it has as many heads as ours.

    It takes lower outputs to full resolution and stacks them, so deep supervision costs it whole sets of logits.
    """
    stages = len(features)
    return DynUNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=num_classes,
        kernel_size=[3] * stages,
        strides=[1] + [2] * (stages - 1),
        upsample_kernel_size=[2] * (stages - 1),
        filters=list(features),
        deep_supervision=deep_supervision,
        deep_supr_num=max(1, stages - 3),
    )


class DynUNetLoss(nn.Module):
    """MONAI's Dice + cross entropy, with deep supervision the weighted mean over the stacked outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Logits (B, K, I, J, K') or a stack of them (B, heads, K, I, J, K'), target (B, I, J, K') -> scalar."""
        heads = outputs.unbind(1) if outputs.ndim == 6 else [outputs]
        weights = [0.5**index for index in range(len(heads))]
        values = [self.loss(logits, target[:, None]) for logits in heads]
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
