"""Training patches of voxfit or of MONAI, made on request in the project's environment on one thread.

    python patch_worker.py voxfit|monai request.json

Both have nnU-Net's transforms with nnU-Net's probabilities. voxfit reads every patch from its store; MONAI keeps the
prepared cases in memory (`CacheDataset`), crops by `RandCropByPosNegLabeld` and varies the crop.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data_path import make_monai_transforms

from peers.json_worker import answer_requests, answers_stream
from peers.patch_blocks import measure_memory, take_block
from pipeline.config import AugmentationConfig
from pipeline.sampling.augmentation import Augmentation
from pipeline.sampling.patch_dataset import PatchDataset
from pipeline.store import CaseStore

# What nnU-Net's trainer sets. It draws blur and low resolution for a patch and then for half of the channels, and
# gamma twice: 0.1 on the negative image, 0.3 on the image itself, of which ours draws one or the other.
NNUNET_PROBABILITIES = AugmentationConfig(
    rotate=0.2, scale=0.2, noise=0.1, blur=0.1, brightness=0.15, contrast=0.15, low_resolution=0.125, gamma=0.4
)


def voxfit_patches(request: dict[str, Any]) -> Callable[[], int]:
    """A function that makes one patch and says how many that were."""
    store, size = CaseStore(Path(request["store"])), tuple(request["patch_size"])
    augmentation = Augmentation(
        NNUNET_PROBABILITIES,
        patch_size=size,
        num_channels=store.info.num_channels,
        spacing=store.info.target_spacing,
        anisotropic_axis=store.info.anisotropic_axis,
    )
    options: dict[str, Any] = {"patch_size": size, "foreground_fraction": 0.33, "seed": 0}
    dataset = PatchDataset(Path(request["store"]), request["cases"], augmentation=augmentation, **options)
    numbers = iter(range(sys.maxsize))

    def make() -> int:
        dataset[next(numbers)]
        return 1

    return make


def monai_patches(request: dict[str, Any]) -> Callable[[], int]:
    """The same for MONAI; cases are prepared and kept first."""
    from monai import transforms as mt
    from monai.data import CacheDataset

    from peers.monai_data import BOTH, make_preparation

    size = request["patch_size"]
    crop = [
        mt.SpatialPadd(BOTH, spatial_size=size),
        mt.RandCropByPosNegLabeld(BOTH, label_key="label", spatial_size=size, pos=1, neg=2, num_samples=1),
    ]
    # The first one adds the channel that labels have here already.
    vary = make_monai_transforms(NNUNET_PROBABILITIES).transforms[1:]
    transform = mt.Compose([*make_preparation(request).transforms, *crop, *vary])
    dataset = CacheDataset(request["files"], transform, num_workers=1, progress=False)
    numbers = iter(range(sys.maxsize))

    def make() -> int:
        return len(dataset[next(numbers) % len(dataset)])

    return make


def main() -> None:
    """Answer requests until standard input ends."""
    answers = answers_stream()
    torch.set_num_threads(1)
    request = json.loads(Path(sys.argv[2]).read_text())
    make = {"voxfit": voxfit_patches, "monai": monai_patches}[sys.argv[1]](request)
    answer_requests(answers, {"block": lambda num: take_block(make, num), "memory": measure_memory})


if __name__ == "__main__":
    main()
