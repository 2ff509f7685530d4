"""Intensity changes on rows of single-channel volumes, each row with values of its own, on any device.

Legend: `rows` is (N, I, J, K) floating point: the channels of one patch, or of all patches of a batch. Values are (N,).
Every change returns a new tensor and touches no label. The set of changes, their ranges and their order follow nnU-Net
(Isensee et al. 2021); tests hold the results to MONAI's array transforms, which take 1.1 to 5 times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_BLUR_SIGMA = 1.0
_BLUR_RADIUS = int(4 * MAX_BLUR_SIGMA + 0.5)


class ChannelParameters(NamedTuple):
    """What was drawn for one channel, in the order it is applied; the defaults change nothing.

    Attributes:
        noise_std: Standard deviation of the Gaussian noise.
        noise_seed: Seed of the noise itself. One device always makes the same noise of it, another kind may not.
        blur_sigma: Standard deviation of the Gaussian blur in voxels, up to 1.
        brightness: Factor on all values.
        contrast: Factor on the distance from the mean; the result is clipped to the range before.
        low_resolution: Share of the resolution that is left.
        gamma: Exponent on the values scaled to 0..1; mean and standard deviation are restored.
        gamma_inverted: Apply gamma to the negative image, so that it acts on the bright end.
    """

    noise_std: float = 0.0
    noise_seed: int = 0
    blur_sigma: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0
    low_resolution: float = 1.0
    gamma: float = 1.0
    gamma_inverted: bool = False


def change_intensity(rows: Tensor, parameters: Sequence[ChannelParameters], *, kept_axis: int | None = None) -> Tensor:
    """Apply what was drawn for each row, in the order of `ChannelParameters`.

    Args:
        rows: (N, I, J, K) floating point.
        parameters: One entry per row.
        kept_axis: An axis along which nothing is blurred or thinned out, because its voxels are thick already.
    """
    result = rows
    for name, change in _CHANGES.items():
        neutral = ChannelParameters._field_defaults[name]
        chosen = [n for n, drawn in enumerate(parameters) if getattr(drawn, name) != neutral]
        if not chosen:
            continue
        drawn_here = [parameters[n] for n in chosen]
        if len(chosen) == len(rows):
            result = change(result, drawn_here, kept_axis)
            continue
        index = _beside(rows, torch.tensor(chosen))
        changed = change(result.index_select(0, index), drawn_here, kept_axis)
        result = rows.clone() if result is rows else result
        result.index_copy_(0, index, changed)
    return result


def add_noise(rows: Tensor, std: Tensor, seeds: Sequence[int]) -> Tensor:
    """Add Gaussian noise; a row's noise depends on its seed alone, not on the rows beside it."""
    noise = torch.empty_like(rows)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=torch.Generator(device=rows.device).manual_seed(seed))
    return torch.addcmul(rows, noise, _per_row(std))


def blur(rows: Tensor, sigma: Tensor, *, kept_axis: int | None = None) -> Tensor:
    """Convolve with a Gaussian that is integrated over each voxel, edges replicated.

    A sum of shifted copies per axis: faster on one thread than a convolution, which cannot give each row its kernel.
    """
    offsets = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, dtype=rows.dtype, device=rows.device)
    edges = torch.stack([offsets - 0.5, offsets + 0.5]) / (sigma[:, None, None] * 2**0.5)
    weights = torch.erf(edges).diff(dim=1)[:, 0]
    weights = weights / weights.sum(dim=1, keepdim=True)
    for axis in (axis for axis in range(3) if axis != kept_axis):
        pads = [_BLUR_RADIUS if side // 2 == 2 - axis else 0 for side in range(6)]
        padded, extent = F.pad(rows, pads, mode="replicate"), rows.shape[1 + axis]
        rows = torch.zeros_like(rows)
        for tap in range(weights.shape[1]):
            rows.addcmul_(padded.narrow(1 + axis, tap, extent), _per_row(weights[:, tap]))
    return rows


def scale_contrast(rows: Tensor, factor: Tensor) -> Tensor:
    """Stretch or shrink values about the row's mean, clipped to the range they had."""
    low, high = _range(rows)
    mean = rows.mean(dim=(1, 2, 3), keepdim=True)
    stretched = ((rows - mean) * _per_row(factor)).add_(mean)
    return torch.minimum(torch.maximum(stretched, low), high)


def lower_resolution(rows: Tensor, fractions: Sequence[float], *, kept_axis: int | None = None) -> Tensor:
    """Thin out by nearest neighbour, then interpolate linearly back to the same shape.

    Neighbours are chosen by voxel centres ("nearest-exact"), so that the image does not shift against its label.
    """
    shape = list(rows.shape[1:])
    result = torch.empty_like(rows)
    for row, fraction, target in zip(rows, fractions, result, strict=True):
        coarse = [n if axis == kept_axis else max(1, round(n * fraction)) for axis, n in enumerate(shape)]
        thinned = F.interpolate(row[None, None], coarse, mode="nearest-exact")
        target.copy_(F.interpolate(thinned, shape, mode="trilinear", align_corners=False)[0, 0])
    return result


def change_gamma(rows: Tensor, gamma: Tensor, inverted: Tensor) -> Tensor:
    """Raise values, scaled to 0..1 over the row, to the power `gamma`; mean and standard deviation are restored."""
    sign = _per_row(1 - 2 * inverted.to(rows.dtype))
    signed = rows * sign
    low, high = _range(signed)
    mean, std = _mean_and_std(signed)
    bent = signed.sub_(low).div_((high - low).clamp_min(1e-7)).pow_(_per_row(gamma))
    bent_mean, bent_std = _mean_and_std(bent)
    return bent.sub_(bent_mean).mul_(std / bent_std.clamp_min(1e-8)).add_(mean).mul_(sign)


def _per_row(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _range(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.amin(dim=(1, 2, 3), keepdim=True), rows.amax(dim=(1, 2, 3), keepdim=True)


def _mean_and_std(rows: Tensor) -> tuple[Tensor, Tensor]:
    # Two passes: ten times as fast on a CPU as torch.std_mean, and sums of torch.mean stay exact on large volumes.
    mean = rows.mean(dim=(1, 2, 3), keepdim=True)
    return mean, (rows - mean).square_().mean(dim=(1, 2, 3), keepdim=True).sqrt_()


Drawn = Sequence[ChannelParameters]


def _values(rows: Tensor, drawn: Drawn, name: str) -> Tensor:
    return _beside(rows, torch.tensor([getattr(parameters, name) for parameters in drawn], dtype=rows.dtype))


def _beside(rows: Tensor, values: Tensor) -> Tensor:
    """`values`, made on the CPU, on the device of `rows`; a GPU is not waited for, which takes pinned memory."""
    return values.pin_memory().to(rows.device, non_blocking=True) if rows.is_cuda else values.to(rows.device)


def _noise(rows: Tensor, drawn: Drawn, _: int | None) -> Tensor:
    return add_noise(rows, _values(rows, drawn, "noise_std"), [parameters.noise_seed for parameters in drawn])


def _blur(rows: Tensor, drawn: Drawn, kept_axis: int | None) -> Tensor:
    return blur(rows, _values(rows, drawn, "blur_sigma"), kept_axis=kept_axis)


def _brightness(rows: Tensor, drawn: Drawn, _: int | None) -> Tensor:
    return rows * _per_row(_values(rows, drawn, "brightness"))


def _contrast(rows: Tensor, drawn: Drawn, _: int | None) -> Tensor:
    return scale_contrast(rows, _values(rows, drawn, "contrast"))


def _low_resolution(rows: Tensor, drawn: Drawn, kept_axis: int | None) -> Tensor:
    return lower_resolution(rows, [parameters.low_resolution for parameters in drawn], kept_axis=kept_axis)


def _gamma(rows: Tensor, drawn: Drawn, _: int | None) -> Tensor:
    return change_gamma(rows, _values(rows, drawn, "gamma"), _values(rows, drawn, "gamma_inverted"))


_CHANGES: dict[str, Callable[[Tensor, Drawn, int | None], Tensor]] = {
    "noise_std": _noise,
    "blur_sigma": _blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "low_resolution": _low_resolution,
    "gamma": _gamma,
}
