"""Intensities to numbers of about zero mean and unit spread, one channel at a time.

Normalisation comes before resampling, as in nnU-Net (Isensee et al. 2021): clipping removes metal and noise before
the spline can ring around them, and the voxels that count as background are still exactly 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes

from pipeline.errors import InputError
from pipeline.plan import ChannelPlan


def normalize(array: NDArray[Any], channels: tuple[ChannelPlan, ...]) -> NDArray[np.float32]:
    """Normalise every channel by its scheme; constant channels become 0.

    "zscore" takes mean and standard deviation over the whole array, or with `use_body_mask` over the body alone, and
    what is around it stays 0 (nnU-Net's `use_mask_for_norm`). The body is decided upon once for a dataset, by the
    planner: cases that each decided for themselves would look different to the network.

    Args:
        array: (C, I, J, K), cropped.
        channels: How each channel is normalised.

    Raises:
        InputError: The image holds NaN or infinite values.
    """
    body = _body_mask(array) if any(_needs_body(channel) for channel in channels) else None
    result = np.array(array, np.float32, order="C")
    if not np.isfinite(result).all():
        raise InputError("the image holds NaN or infinite values", fix="Repair the image")
    for image, channel in zip(result, channels, strict=True):
        if channel.scheme == "ct":
            _normalize_ct(image, channel)
        elif channel.scheme == "zscore":
            _normalize_zscore(image, body if channel.use_body_mask else None)
    return result


def _needs_body(channel: ChannelPlan) -> bool:
    return channel.scheme == "zscore" and channel.use_body_mask


def _body_mask(array: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Voxels that are not 0 in some channel or are enclosed by such; None when these are all voxels or none."""
    mask: NDArray[np.bool_] = (array != 0).any(axis=0)
    if not mask.all():
        # Dark tissue may be exactly 0, and must not stay the mean of the image.
        mask = binary_fill_holes(mask)
    return None if mask.all() or not mask.any() else mask


def _normalize_ct(image: NDArray[np.float32], channel: ChannelPlan) -> None:
    np.clip(image, channel.lower, channel.upper, out=image)
    image -= np.float32(channel.mean)
    image /= np.float32(channel.std if channel.std > 0 else 1.0)


def _normalize_zscore(image: NDArray[np.float32], body: NDArray[np.bool_] | None) -> None:
    voxels = image if body is None else image[body]
    constant = voxels.min() == voxels.max()
    voxels = voxels - np.float32(voxels.mean(dtype=np.float64))
    if constant:
        voxels[...] = 0.0
    else:
        voxels /= np.float32(_spread(voxels))
    if body is None:
        image[...] = voxels
    else:
        image[body] = voxels


def _spread(centred: NDArray[np.float32]) -> float:
    """Standard deviation of values of zero mean, summed in float64 part by part to keep no second array."""
    parts = centred if centred.ndim > 1 else np.array_split(centred, max(1, centred.size >> 20))
    return float(np.sqrt(sum(float(np.vdot(part, part)) for part in parts) / centred.size))
