"""Patches per second of reading and augmenting on one thread, against MONAI's dictionary transforms doing the same.

Both sides read the same patches of the same store; MONAI's side then applies `Compose([...d])` with the same
probabilities and ranges. They take turns in short blocks within one run, so that a busy machine slows both alike, and
the ratio of each pair of blocks is what counts.

    python scripts/benchmarks/data_path.py
    python scripts/benchmarks/data_path.py --store STORE     on the cases of a store instead of synthetic ones
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from pipeline.config import AugmentationConfig
from pipeline.geometry import Grid, Shape3
from pipeline.plan import ChannelPlan
from pipeline.sampling.augmentation import Augmentation
from pipeline.sampling.patch_dataset import PatchDataset
from pipeline.store import CaseStore, StoreInfo, WritableStore

PATCH: Shape3 = (40, 56, 40)
Step = Callable[[int], Any]


def make_store(folder: Path, num_cases: int, shape: Shape3) -> None:
    """Noisy balls on a smooth background: they compress about as badly as real images."""
    info = StoreInfo(
        channels=(ChannelPlan(name="MR", scheme="zscore"),),
        labels={"background": 0, "shell": 1, "core": 2},
        ignore_value=None,
        target_spacing=(1.0, 1.0, 1.0),
        anisotropic_axis=None,
        patch_size=PATCH,
    )
    store, rng = WritableStore.create(folder, info), np.random.default_rng(0)
    places = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    for number in range(num_cases):
        radius = np.linalg.norm(places - rng.uniform(-0.3, 0.3, (3, 1, 1, 1)), axis=0)
        label = (radius < 0.6).astype(np.int16) + (radius < 0.3)
        image = (label + places[0] + 0.5 * rng.normal(size=shape)).astype(np.float32)[None]
        store.write_case(f"case{number:03d}", image, label, native_grid=Grid(shape, np.eye(4)))


def make_monai_transforms(config: AugmentationConfig) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """MONAI's dictionary transforms with the probabilities and ranges of `config`."""
    from monai import transforms as mt

    angle, both = np.pi / 6, ["image", "label"]
    gamma: dict[str, Any] = {"gamma": (0.7, 1.5), "retain_stats": True}
    return mt.Compose(
        [
            mt.EnsureChannelFirstd("label", channel_dim="no_channel"),
            # One resampling for rotation and zoom, drawn as often as ours draws one of the two.
            mt.RandAffined(
                both,
                prob=1 - (1 - config.rotate) * (1 - config.scale),
                rotate_range=[angle] * 3,
                scale_range=[(-0.3, 0.4)] * 3,
                mode=["bilinear", "nearest"],
                padding_mode="zeros",
            ),
            mt.RandGaussianNoised("image", prob=config.noise, std=0.3),
            mt.RandGaussianSmoothd("image", prob=config.blur, sigma_x=(0.5, 1), sigma_y=(0.5, 1), sigma_z=(0.5, 1)),
            mt.RandScaleIntensityd("image", factors=0.25, prob=config.brightness),
            mt.RandScaleIntensityFixedMeand("image", factors=0.25, prob=config.contrast, preserve_range=True),
            mt.RandSimulateLowResolutiond("image", prob=config.low_resolution, zoom_range=(0.5, 1)),
            mt.RandAdjustContrastd("image", prob=config.gamma / 4, invert_image=True, **gamma),
            mt.RandAdjustContrastd("image", prob=config.gamma * 3 / 4, **gamma),
            *[mt.RandFlipd(both, prob=config.mirror, spatial_axis=axis) for axis in config.mirror_axes],
        ]
    )


def seconds_of(step: Step, indices: range) -> tuple[float, float]:
    """CPU and wall time of one block; with one thread they differ by what other processes take."""
    cpu, wall = process_time(), perf_counter()
    for index in indices:
        step(index)
    return process_time() - cpu, perf_counter() - wall


def compare(ours: Step, theirs: Step, *, num_pairs: int, block: int) -> None:
    """Print patches per second of both sides and the median ratio over pairs of blocks."""
    for step in (ours, theirs):
        seconds_of(step, range(5))
    pairs = []
    for number in range(num_pairs):
        indices = range(number * block, (number + 1) * block)
        pairs.append((seconds_of(ours, indices), seconds_of(theirs, indices)))
    for clock, name in enumerate(("CPU", "wall")):
        own, other = ([side[clock] for side in sides] for sides in zip(*pairs, strict=True))
        rates = [block / statistics.median(times) for times in (own, other)]
        ratios = sorted(theirs / mine for mine, theirs in zip(own, other, strict=True))
        print(f"per {name} second: voxfit {rates[0]:.0f} patches, MONAI {rates[1]:.0f}; ", end="")
        print(f"median ratio of pairs {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def report_parts(plain: PatchDataset, augmented: PatchDataset, num: int) -> None:
    """Print how long reading alone and the whole take, and the process's peak memory."""
    read, whole = (seconds_of(dataset.__getitem__, range(num))[0] / num * 1e3 for dataset in (plain, augmented))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"reading {read:.2f} ms of {whole:.2f} ms CPU per patch; peak memory of the process {peak:.0f} MiB")


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="an existing store; synthetic cases are made without it")
    parser.add_argument("--num_cases", type=int, default=20, help="synthetic cases")
    parser.add_argument("--shape", type=int, nargs=3, default=(44, 60, 46), help="shape of synthetic cases")
    parser.add_argument("--num_pairs", type=int, default=10, help="pairs of blocks")
    parser.add_argument("--block", type=int, default=50, help="patches per block")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.store or Path(temporary) / "store"
        if options.store is None:
            make_store(folder, options.num_cases, tuple(options.shape))
        store, config = CaseStore(folder), AugmentationConfig()
        augmentation = Augmentation(config, patch_size=PATCH, num_channels=store.info.num_channels)
        arguments: dict[str, Any] = {"patch_size": PATCH, "foreground_fraction": 0.33, "seed": 0}
        plain = PatchDataset(folder, store.case_ids, **arguments)
        augmented = PatchDataset(folder, store.case_ids, augmentation=augmentation, **arguments)
        report_parts(plain, augmented, 4 * options.block)
        transforms = make_monai_transforms(config)
        compare(augmented.__getitem__, lambda n: transforms(plain[n]), num_pairs=options.num_pairs, block=options.block)


if __name__ == "__main__":
    main()
