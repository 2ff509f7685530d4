"""Training patches from the store as a map-style dataset: item n is a pure function of the seed and n."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from pipeline.geometry import Shape3
from pipeline.sampling.augmentation import Augmentation
from pipeline.sampling.patch_sampler import PatchSampler
from pipeline.store import CaseStore


class PatchDataset(Dataset[dict[str, Any]]):
    """Patches by global sample number, read and augmented one by one; no voxels are kept.

    Item `index` is a dict of `image` float32 (C, *patch_size), `label` int16 (*patch_size) of class indices with
    `IGNORE_INDEX` for ignored voxels, `case_id`, and `index` itself. Everything drawn for it comes from
    `default_rng([seed, index])`: the number of data workers and of earlier runs does not matter. There is no length;
    `EpochSampler` says which items make an epoch.

    With `defer_augmentation`, image and label are the boxes that the augmentation needs and `augmentation` holds its
    parameters: collate with `collate_patches`, then, on the GPU,
    `images, labels = augmentation.augment_batch(batch["image"], batch["label"], batch["augmentation"])`.

    Args:
        store_folder: Folder of the store. The store keeps no file open, so the dataset can be forked and pickled.
        case_ids: Cases to draw from.
        patch_size: Patch along i, j, k.
        foreground_fraction: Share of patches that aim at foreground, see `PatchSampler`.
        seed: At least 0.
        augmentation: Applied to each patch; None leaves patches as they are stored.
        defer_augmentation: Leave applying it to the caller.

    Raises:
        InputError: The store is unusable, a case is not in it, there are no cases, or an option is out of range.
    """

    def __init__(
        self,
        store_folder: Path,
        case_ids: Sequence[str],
        *,
        patch_size: Shape3,
        foreground_fraction: float,
        seed: int,
        augmentation: Augmentation | None = None,
        defer_augmentation: bool = False,
    ) -> None:
        self.augmentation = augmentation
        self.defer_augmentation = defer_augmentation
        self.seed = seed
        self._store = CaseStore(store_folder)
        self.sampler = PatchSampler(
            [self._store.record(case_id) for case_id in case_ids],
            patch_size=patch_size,
            foreground_fraction=foreground_fraction,
            seed=seed,
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, index])
        choice = self.sampler.choose(index, rng, self._store.foreground_voxels)
        case_id, box, drawn = choice.record.case_id, choice.location, None
        if self.augmentation is not None:
            drawn = self.augmentation.draw(rng)
            box, drawn = self.augmentation.locate_box(box, drawn, choice.record.shape)
        image, label = (torch.from_numpy(array) for array in self._store.read_patch(case_id, box))
        item: dict[str, Any] = {"case_id": case_id, "index": index}
        if self.augmentation is not None and drawn is not None:
            if self.defer_augmentation:
                item["augmentation"] = drawn
            else:
                image, label = self.augmentation.augment(image, label, drawn)
        return {"image": image, "label": label, **item}


def collate_patches(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items: boxes of unequal shape are padded with zeros at their far ends, which no patch reaches.

    Returns:
        `image` (B, C, I, J, K), `label` (B, I, J, K), lists `case_id` and, where deferred, `augmentation`, and
        `index` (B,).
    """
    shapes = [item["label"].shape for item in items]
    common = [max(shape[axis] for shape in shapes) for axis in range(3)]
    batch: dict[str, Any] = {
        "image": torch.stack([_padded(item["image"], common) for item in items]),
        "label": torch.stack([_padded(item["label"], common) for item in items]),
        "case_id": [item["case_id"] for item in items],
        "index": torch.tensor([item["index"] for item in items]),
    }
    if "augmentation" in items[0]:
        batch["augmentation"] = [item["augmentation"] for item in items]
    return batch


def _padded(volume: Tensor, shape: Sequence[int]) -> Tensor:
    missing = [want - have for want, have in zip(shape, volume.shape[-3:], strict=True)]
    return F.pad(volume, [side for extra in reversed(missing) for side in (0, extra)]) if any(missing) else volume


class EpochSampler(Sampler[int]):
    """Sample numbers `first` to `first + num - 1`, in order.

    Args:
        first: Global number of the epoch's first sample.
        num: Samples of the epoch.
    """

    def __init__(self, first: int, num: int) -> None:
        self.first, self.num = first, num

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.first + self.num))

    def __len__(self) -> int:
        return self.num
