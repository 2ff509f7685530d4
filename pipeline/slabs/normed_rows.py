"""Group norm and leaky ReLU of rows, with statistics over the whole tensor: only raw rows and statistics are kept.

Forward: raw rows are observed slab by slab (mean and sum of squared deviations of every group, merged as in Chan et
al. 1983); from then on an activation is one multiplication, one addition and the leaky ReLU of its raw row, computed
wherever it is read. Backward: with z the norm's output, the gradient of a raw value r is

    dr = rstd * (gamma * dz - mean(gamma * dz) - xhat * mean(gamma * dz * xhat))        (Wu and He 2018)

where both means over a group follow from the sums of dz and dz * xhat over each channel. So dr is a linear function
of dz and r, with three coefficients per channel, once every row has its dz.

Legend: B samples, C channels, G groups; rows (B, C, n, J, K), per-channel values (B, C), per-group values (B, G).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.slabs.backward import ONE_PASS
from pipeline.slabs.repeats import is_repeat
from pipeline.slabs.store import RawRows, SlabStore, slab_rows


@dataclass(frozen=True)
class GroupNormSpec:
    """Group norm and the leaky ReLU behind it.

    Attributes:
        num_groups: G.
        weight, bias: (C,), in the dtype of the statistics.
        eps: Added to the variance.
        negative_slope: Of the leaky ReLU.
    """

    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float
    negative_slope: float


class GroupStatistics:
    """Mean and variance of groups over rows that come slab by slab.

    Args:
        num_groups: G.
        eps: Of the norm; how exact a variance far below it is does not matter.
    """

    def __init__(self, num_groups: int, eps: float) -> None:
        self.num_groups, self.eps = num_groups, eps
        self._count = 0
        self._mean: Tensor | None = None
        self._deviations: Tensor | None = None
        # Weight and bias of a norm that has none, made for the first slab.
        self._unit: tuple[Tensor, Tensor] | None = None

    def observe(self, rows: Tensor) -> None:
        """Take rows (B, C, n, J, K) into account."""
        mean, variance = self._of_slab(rows)
        count = rows[0].numel() // self.num_groups
        if self._mean is None or self._deviations is None:
            self._count, self._mean, self._deviations = count, mean, variance * count
            return
        total, delta = self._count + count, mean - self._mean
        self._deviations = self._deviations + variance * count + delta.square() * (self._count * count / total)
        self._mean, self._count = self._mean + delta * (count / total), total

    def _of_slab(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, (B, G)."""
        if rows.device.type == "cuda":
            # There group norm rounds its statistics to the dtype of its input; batch norm keeps them in float32.
            return self._of_channels(rows)
        samples, channels, *voxels = rows.shape
        rows = rows.contiguous()
        _, mean, rstd = torch.native_group_norm(
            rows, *self._unit_for(rows), samples, channels, prod(voxels), self.num_groups, self.eps
        )
        return mean, (rstd.pow(-2) - self.eps).clamp(min=0)

    def _of_channels(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        x = _flat(rows)
        _, mean, rstd = torch.native_batch_norm(x, *self._unit_for(x), None, None, True, 0.0, self.eps)
        groups = (len(rows), self.num_groups, -1)
        mean, variance = mean.reshape(groups), (rstd.pow(-2) - self.eps).clamp(min=0).reshape(groups)
        of_group = mean.mean(2)
        return of_group, variance.mean(2) + (mean - of_group[:, :, None]).square().mean(2)

    def _unit_for(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self._unit is None:
            wide = torch.promote_types(rows.dtype, torch.float32)
            one = torch.ones(rows.shape[1], dtype=wide, device=rows.device)
            self._unit = one, torch.zeros_like(one)
        return self._unit

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """Both as (B, G)."""
        assert self._mean is not None, "no rows were observed"
        assert self._deviations is not None
        return self._mean, self._deviations / self._count


class NormedRows:
    """Rows of the activation of a group norm over raw rows.

    Args:
        raw: The raw rows.
        shape: (B, C, I, J, K).
        dtype: Of the activation and of gradients.
        norm: The norm and activation.
        statistics: Of all raw rows.
        gradient: Where gradients are kept; None keeps them in the place of the raw rows, which then may have one reader
            only and need a second sweep.
    """

    def __init__(
        self,
        raw: RawRows | SlabStore,
        shape: torch.Size,
        dtype: torch.dtype,
        norm: GroupNormSpec,
        statistics: GroupStatistics,
        gradient: SlabStore | None,
    ) -> None:
        self.raw, self.shape, self.dtype, self.norm, self.gradient = raw, shape, dtype, norm, gradient
        self.handle = norm.weight.new_zeros(())
        mean, variance = statistics.mean_and_variance()
        self._rstd = torch.rsqrt(variance + norm.eps)
        # (B, C): read with every slab.
        self._channel_mean, self._channel_rstd = self._by_channel(mean), self._by_channel(self._rstd)
        scale = self._channel_rstd * norm.weight
        self._activation = _ChannelwiseLine(scale, norm.bias - self._channel_mean * scale)
        # Sums over voxels of dz and dz * xhat, (B, C); slabs are added up in float64, which costs nothing.
        self._sum_dz = torch.zeros_like(scale, dtype=torch.float64)
        self._sum_dz_xhat = torch.zeros_like(self._sum_dz)
        self._in_place: _RawGradient | None = None
        self._has_swept = self._is_replaced = False

    def _by_channel(self, by_group: Tensor) -> Tensor:
        return by_group.repeat_interleave(self.shape[1] // self.norm.num_groups, dim=1)

    def read(self, start: int, stop: int) -> Tensor:
        """Activations of rows start to stop."""
        if self._is_replaced:
            raise RuntimeError(
                f"these rows are gone: the backward pass has put their gradients in their place; {ONE_PASS}"
            )
        return self._activated(self.raw.read(start, stop))

    def _activated(self, raw: Tensor) -> Tensor:
        return torch.nn.functional.leaky_relu_(self._activation(raw), self.norm.negative_slope)

    def sweeps(self) -> Iterator[bool]:
        """Two where gradients take the place of the raw rows: what they become is known after the first."""
        if self.gradient is None:
            if self._has_swept:
                raise RuntimeError(
                    f"features in slabs serve one loss and one backward pass, and had theirs; {ONE_PASS}"
                )
            self._has_swept = True
            yield False
            self._in_place = self._coefficients()
        yield True
        self._is_replaced = self.gradient is None

    def add_gradient(self, start: int, gradient: Tensor) -> None:
        """Take the gradient of activations from row `start` on; it is written to."""
        height, stop = slab_rows(self.shape, self.dtype), start + gradient.shape[2]
        if is_repeat(gradient, start, stop, height=height, num_rows=self.shape[2]):
            if self.gradient is not None:
                self.gradient.add(start, gradient, only_missing=True)
            return
        raw = self.raw.read(start, stop)
        activation = self._activated(raw)
        dz = torch.ops.aten.leaky_relu_backward.grad_input(
            gradient, activation, self.norm.negative_slope, True, grad_input=gradient
        )
        del activation
        if self._in_place is not None:
            self.raw.write(start, self._in_place.apply(dz, raw))
            return
        self._add_to_sums(dz, raw)
        if self.gradient is not None:
            self.gradient.add(start, dz)

    def _add_to_sums(self, dz: Tensor, raw: Tensor) -> None:
        mean, rstd = self._channel_mean.flatten(), self._channel_rstd.flatten()
        _, by_xhat, by_one = torch.ops.aten.native_batch_norm_backward(
            _flat(dz), _flat(raw), torch.ones_like(mean), None, None, mean, rstd, True, 0.0, [False, True, True]
        )
        self._sum_dz += by_one.view_as(self._sum_dz)
        self._sum_dz_xhat += by_xhat.view_as(self._sum_dz)

    def take_gradient(self) -> Tensor:
        """The handle's, which says nothing: the gradient is in the rows."""
        return torch.zeros_like(self.handle)

    def norm_gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of weight and bias, (C,)."""
        return self._sum_dz_xhat.sum(0), self._sum_dz.sum(0)

    def to_raw_gradient(self) -> SlabStore:
        """The gradients of all raw rows; the raw rows themselves are gone afterwards."""
        if self.gradient is None:
            assert isinstance(self.raw, SlabStore)
            return self.raw
        coefficients = self._coefficients()
        for start, stop in self.gradient.ranges():
            if not is_repeat(
                coefficients.of_raw.factor, start, stop, height=self.gradient.height, num_rows=self.shape[2]
            ):
                found = coefficients.apply(self.gradient.read(start, stop), self.raw.read(start, stop))
                # On the device a slab is read as it is, and so is changed in its place.
                if self.gradient.on_host:
                    self.gradient.write(start, found)
            self.raw.free(start, stop)
        return self.gradient

    def _coefficients(self) -> _RawGradient:
        count = prod(self.shape[1:]) // self.norm.num_groups
        rstd, weight = self._rstd.double(), self.norm.weight.double()
        groups = (len(rstd), self.norm.num_groups, -1)
        mean_dz = (weight * self._sum_dz).reshape(groups).sum(2) / count
        mean_dz_xhat = (weight * self._sum_dz_xhat).reshape(groups).sum(2) / count
        by_dz, by_raw = weight * self._channel_rstd.double(), self._by_channel(-rstd.square() * mean_dz_xhat)
        # Both lines have mean zero, so that rounding them to half precision shifts no sum over voxels.
        from_dz, from_raw = self._by_channel(-rstd * mean_dz), -by_raw * self._channel_mean.double()
        dtype = self._rstd.dtype
        of_dz = _ChannelwiseLine(by_dz.to(dtype), from_dz.to(dtype))
        return _RawGradient(of_dz, _ChannelwiseLine(by_raw.to(dtype), from_raw.to(dtype)))


class _ChannelwiseLine:
    """Multiplication and addition of one value per sample and channel each, computed in float32 or better.

    Inference batch norm with mean 0 and variance 1 is the one kernel that does this to half precision in one pass.
    """

    def __init__(self, factor: Tensor, summand: Tensor) -> None:
        self.factor, self.summand = factor.flatten(), summand.flatten()
        self._zero, self._one = torch.zeros_like(self.factor), torch.ones_like(self.factor)

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows (B, C, n, J, K) -> a new tensor like them."""
        # The operator itself: `torch.nn.functional.batch_norm` of some releases refuses the eps of 0.
        statistics = self._zero, self._one
        line = torch.batch_norm(_flat(rows), self.factor, self.summand, *statistics, False, 0.0, 0.0, False)
        return line.view(rows.shape)


class _RawGradient(NamedTuple):
    """The gradient of raw values as a sum of two lines."""

    of_dz: _ChannelwiseLine
    of_raw: _ChannelwiseLine

    def apply(self, dz: Tensor, raw: Tensor) -> Tensor:
        """The gradient of raw values, in the place of `dz`."""
        return dz.copy_(self.of_dz(dz)).add_(self.of_raw(raw))


def _flat(rows: Tensor) -> Tensor:
    """Samples as channels: (B, C, n, J, K) -> (1, B * C, n, J, K)."""
    return rows.reshape(1, -1, *rows.shape[2:])
