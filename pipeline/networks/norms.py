"""Normalisation that keeps half precision in and out, and the conversion of batch norms to group norms.

Shapes: (B, C, I, J, K).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import InputError
from pipeline.kernels.availability import serves
from pipeline.kernels.group_norm import group_norm
from pipeline.plan import NormName
from pipeline.slabs.dtypes import without_autocast


class GroupNorm(nn.GroupNorm):
    """Group norm, optionally with a leaky ReLU behind it, whose output has its input's dtype under autocast too.

    CUDA autocast has `group_norm` on its float32 list, which doubles the bytes of every activation behind it; here the
    kernel takes half precision and sums in float32 inside; only mean and spread of a group are rounded to the input's
    precision, as in every half-precision call of torch's kernel. For the backward pass only the input
    and the statistics are kept: the activation works in place on the output, which the next convolution keeps anyway.
    On a GPU that runs Triton both are one operation (`kernels.group_norm`), whose output is channels last. On a CPU a
    hand-written function gained neither time nor memory over torch's two kernels.

    Args:
        num_groups: Clipped to the largest divisor of `num_channels` that is not above it.
        num_channels: C.
        negative_slope: Of the leaky ReLU behind the norm; None for no activation.
        eps: Added to the variance.
        affine: Whether there are a weight and a bias per channel.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *,
        negative_slope: float | None = None,
        eps: float = 1e-5,
        affine: bool = True,
    ) -> None:
        super().__init__(clip_num_groups(num_groups, num_channels), num_channels, eps=eps, affine=affine)
        self.negative_slope = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, ...) -> same shape and dtype."""
        if serves(x):
            slope = 1.0 if self.negative_slope is None else self.negative_slope
            return group_norm(x, self.num_groups, self.weight, self.bias, eps=self.eps, negative_slope=slope)
        with without_autocast(x.device):
            weight, bias = (None if part is None else part.to(x.dtype) for part in (self.weight, self.bias))
            y = F.group_norm(x, self.num_groups, weight, bias, self.eps)
        return y if self.negative_slope is None else F.leaky_relu_(y, self.negative_slope)


def clip_num_groups(num_groups: int, num_channels: int) -> int:
    """The largest divisor of `num_channels` that is at most `num_groups`."""
    return next(groups for groups in range(min(num_groups, num_channels), 0, -1) if num_channels % groups == 0)


def make_norm(norm: NormName, num_channels: int, *, num_groups: int, negative_slope: float | None = None) -> nn.Module:
    """A norm of (B, C, I, J, K) with a leaky ReLU behind it, if asked for.

    Instance norm is the group norm with one channel per group.
    """
    if norm == "batch":
        layer = nn.BatchNorm3d(num_channels)
        return layer if negative_slope is None else nn.Sequential(layer, nn.LeakyReLU(negative_slope, inplace=True))
    groups = num_groups if norm == "group" else num_channels
    return GroupNorm(groups, num_channels, negative_slope=negative_slope)


def replace_batchnorm(network: nn.Module, *, num_groups: int = 32) -> nn.Module:
    """Replace every batch norm of any network by a group norm with the same weight and bias.

    The very parameters are taken over, so an optimiser that was made before still trains them. A batch norm that is
    used in several places becomes one group norm in all of them.

    Args:
        network: Any network; changed in place unless it is itself a batch norm.
        num_groups: Groups of each new layer, clipped to a divisor of its channels.

    Returns:
        The network; the new layer when the network itself was a batch norm.

    Raises:
        InputError: `num_groups` is below 1.
        ValueError: A lazy batch norm does not know its channels yet; run the network once before.
    """
    if num_groups < 1:
        raise InputError(f"must be at least 1, got {num_groups}", where="num_groups")
    replaced: dict[nn.Module, GroupNorm] = {}
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if not isinstance(module, _BatchNorm):
            continue
        if module not in replaced:
            replaced[module] = _as_group_norm(module, num_groups)
        if not name:
            return replaced[module]
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, replaced[module])
    return network


def _as_group_norm(norm: _BatchNorm, num_groups: int) -> GroupNorm:
    if norm.num_features == 0:
        raise ValueError("a lazy batch norm has no channels yet: run the network once before its norms are replaced")
    layer = GroupNorm(num_groups, norm.num_features, eps=norm.eps, affine=norm.affine)
    layer.weight, layer.bias = norm.weight, norm.bias
    return layer.train(norm.training)
