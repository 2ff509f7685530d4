"""The U-Net in operations that every exporter knows: the same weights under the same names, the same outputs.

Shapes: (B, C, I, J, K).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.networks.blocks import Head
from pipeline.networks.norms import GroupNorm
from pipeline.networks.unet import UNet
from pipeline.plan import NetworkPlan


class PlainUNet(UNet):
    """A `UNet` for evaluation without slabs, checks of the size, or operations that depend on the batch or autocast.

    Args:
        in_channels, num_classes, network: As in `UNet`, whose weights it loads.
    """

    def __init__(self, in_channels: int, num_classes: int, network: NetworkPlan) -> None:
        super().__init__(in_channels, num_classes, network)
        for name, module in list(self.named_modules()):
            if isinstance(module, Head | GroupNorm):
                parent, _, child = name.rpartition(".")
                setattr(self.get_submodule(parent), child, _plain(module))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, I, J, K') of x (B, C, I, J, K'), whose size is a multiple of the network's stride."""
        output = self.run_stages(x)[1][0]
        assert isinstance(output, Tensor)
        return output


class PlainGroupNorm(nn.GroupNorm):
    """Group norm and leaky ReLU, one after the other.

    Args:
        norm: What it does the same as, with the same parameters.
    """

    def __init__(self, norm: GroupNorm) -> None:
        super().__init__(norm.num_groups, norm.num_channels, eps=norm.eps, affine=norm.affine)
        self.weight, self.bias, self.negative_slope = norm.weight, norm.bias, norm.negative_slope

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, ...) -> same shape."""
        y = super().forward(x)
        return y if self.negative_slope is None else F.leaky_relu(y, self.negative_slope)


def _plain(module: Head | GroupNorm) -> nn.Module:
    if isinstance(module, GroupNorm):
        return PlainGroupNorm(module)
    convolution = nn.Conv3d(module.in_channels, module.out_channels, 1)
    convolution.weight, convolution.bias = module.weight, module.bias
    return convolution
