"""Cases as MONAI's tutorials prepare, cache, crop and vary them; imports MONAI and nothing of the project.

The transforms and their probabilities are those of MONAI's DynUNet tutorial; resampling, which that tutorial does with
code of its own, is MONAI's `Spacingd`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from monai import transforms as mt
from monai.data import CacheDataset, DataLoader

BOTH = ("image", "label")


def make_preparation(request: dict[str, Any], keys: Sequence[str] = BOTH) -> mt.Compose:
    """Read, orient, resample and normalise: what does not change from epoch to epoch."""
    modes = ["bilinear" if key == "image" else "nearest" for key in keys]
    return mt.Compose(
        [
            mt.LoadImaged(keys),
            mt.EnsureChannelFirstd(keys),
            mt.Orientationd(keys, axcodes="RAS"),
            mt.Spacingd(keys, pixdim=request["spacing"], mode=modes),
            _normalization(request),
        ]
    )


def _normalization(request: dict[str, Any]) -> mt.Transform:
    """CT is clipped and scaled by the data set's own figures, everything else by case and channel."""
    if request["ct"] is None:
        return mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True)
    low, high, mean, std = request["ct"]
    clip = mt.ThresholdIntensityd("image", threshold=high, above=False, cval=high)
    floor = mt.ThresholdIntensityd("image", threshold=low, above=True, cval=low)
    return mt.Compose([clip, floor, mt.NormalizeIntensityd("image", subtrahend=mean, divisor=std)])


def make_patches(request: dict[str, Any]) -> list[mt.Transform]:
    """Crop and vary: what is new in every epoch."""
    size = request["patch_size"]
    blur = {f"sigma_{axis}": (0.5, 1.15) for axis in "xyz"}
    return [
        mt.CropForegroundd(BOTH, source_key="image", allow_smaller=True),
        mt.SpatialPadd(BOTH, spatial_size=size),
        mt.RandCropByPosNegLabeld(BOTH, label_key="label", spatial_size=size, pos=2, neg=1, num_samples=1),
        mt.RandZoomd(BOTH, prob=0.15, min_zoom=0.9, max_zoom=1.2, mode=("trilinear", "nearest")),
        mt.RandGaussianNoised("image", prob=0.15, std=0.01),
        mt.RandGaussianSmoothd("image", prob=0.15, **blur),
        mt.RandScaleIntensityd("image", prob=0.15, factors=0.3),
        *[mt.RandFlipd(BOTH, prob=0.5, spatial_axis=axis) for axis in range(3) if request["mirrors"]],
        mt.EnsureTyped(BOTH, dtype=(np.float32, np.uint8), track_meta=False),
    ]


def make_training_batches(request: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of patches; all cases are prepared and kept in memory first."""
    transform = mt.Compose([*make_preparation(request).transforms, *make_patches(request)])
    cases = CacheDataset(request["train"], transform, num_workers=request["num_threads"], progress=False)
    loader = DataLoader(
        cases,
        batch_size=min(request["batch_size"], len(cases)),
        shuffle=True,
        drop_last=True,
        num_workers=request["num_threads"],
        persistent_workers=True,
    )
    return _endless(loader)


def _endless(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader


def make_validation_cases(request: dict[str, Any]) -> CacheDataset:
    """Whole cases, prepared and kept in memory."""
    return CacheDataset(
        request["validation"], make_preparation(request), num_workers=request["num_threads"], progress=False
    )
