from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.config import AugmentationConfig
from pipeline.errors import InputError
from pipeline.sampling.augmentation import Augmentation
from pipeline.sampling.patch_dataset import EpochSampler, PatchDataset, collate_patches
from pipeline.store import IGNORE_INDEX, CaseStore
from tests.sampling.conftest import PATCH, SHAPES, make_case

OFTEN = AugmentationConfig(rotate=0.6, scale=0.6, noise=0.5, blur=0.4, gamma=0.5, contrast=0.5, low_resolution=0.4)


def make_dataset(folder: Path, *, case_ids: tuple[str, ...] = tuple(SHAPES), **options: Any) -> PatchDataset:
    given = {"patch_size": PATCH, "foreground_fraction": 0.5, "seed": 11, **options}
    return PatchDataset(folder, case_ids, **given)


def make_augmentation(config: AugmentationConfig = OFTEN) -> Augmentation:
    return Augmentation(config, patch_size=PATCH, num_channels=2)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["case_id"] == other["case_id"]
    assert one["index"] == other["index"]
    assert torch.equal(one["image"], other["image"])
    assert torch.equal(one["label"], other["label"])


def test_items_have_the_promised_shapes_and_types(store_folder: Path) -> None:
    item = make_dataset(store_folder, augmentation=make_augmentation())[5]
    assert item["image"].shape == (2, *PATCH)
    assert item["image"].dtype == torch.float32
    assert item["label"].shape == PATCH
    assert item["label"].dtype == torch.int16
    assert item["index"] == 5


def test_without_augmentation_items_are_the_voxels_of_the_case(store_folder: Path) -> None:
    dataset = make_dataset(store_folder)
    for index in range(15):
        item = dataset[index]
        location = dataset.sampler.choose(
            index, np.random.default_rng([11, index]), CaseStore(store_folder).foreground_voxels
        ).location
        image, label = make_case(item["case_id"])
        pads = [(max(0, -s), max(0, s + p - n)) for s, p, n in zip(location.start, PATCH, label.shape, strict=True)]
        part = tuple(slice(max(0, s), max(0, s) + p) for s, p in zip(location.start, PATCH, strict=True))
        np.testing.assert_array_equal(item["image"], np.pad(image, [(0, 0), *pads])[(slice(None), *part)])
        np.testing.assert_array_equal(item["label"], np.pad(label, pads)[part])


def test_the_number_of_workers_does_not_change_the_patches(store_folder: Path) -> None:
    dataset = make_dataset(store_folder, augmentation=make_augmentation())
    here = list(DataLoader(dataset, batch_size=2, sampler=EpochSampler(6, 10)))
    there = list(DataLoader(dataset, batch_size=2, sampler=EpochSampler(6, 10), num_workers=2))
    assert len(here) == len(there) == 5
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["label"], other["label"])
        assert one["case_id"] == other["case_id"]
        assert torch.equal(one["index"], other["index"])


def test_an_item_does_not_depend_on_what_was_read_before(store_folder: Path) -> None:
    dataset = make_dataset(store_folder, augmentation=make_augmentation())
    forward = [dataset[index] for index in range(8)]
    fresh = make_dataset(store_folder, augmentation=make_augmentation())
    for index in reversed(range(8)):
        assert_same(forward[index], fresh[index])


def test_a_deferred_batch_gives_what_the_workers_would(store_folder: Path) -> None:
    augmentation = make_augmentation()
    direct = make_dataset(store_folder, augmentation=augmentation)
    deferred = make_dataset(store_folder, augmentation=augmentation, defer_augmentation=True)
    for first in range(0, 24, 4):
        batch = collate_patches([deferred[index] for index in range(first, first + 4)])
        images, labels = augmentation.augment_batch(batch["image"], batch["label"], batch["augmentation"])
        expected = collate_patches([direct[index] for index in range(first, first + 4)])
        torch.testing.assert_close(images, expected["image"], atol=2e-4, rtol=0)
        assert (labels == expected["label"]).float().mean() > 0.9995
        assert batch["case_id"] == expected["case_id"]


def test_a_deferred_batch_survives_lightning_taking_it_apart(store_folder: Path) -> None:
    from lightning_utilities.core.apply_func import apply_to_collection

    dataset = make_dataset(store_folder, augmentation=make_augmentation(), defer_augmentation=True)
    batch = next(iter(DataLoader(dataset, 3, sampler=EpochSampler(0, 3), num_workers=1, collate_fn=collate_patches)))
    moved = apply_to_collection(batch, torch.Tensor, lambda tensor: tensor.clone())
    assert moved["augmentation"] == batch["augmentation"]
    assert type(moved["augmentation"][0]) is type(batch["augmentation"][0])


def test_rotation_and_zoom_bring_no_padding_into_the_corners(store_folder: Path) -> None:
    never = dict.fromkeys(("noise", "blur", "brightness", "contrast", "low_resolution", "gamma"), 0.0)
    config, size = AugmentationConfig(rotate=1.0, scale=1.0, **never), (6, 8, 5)
    augmentation = Augmentation(config, patch_size=size, num_channels=2)
    dataset = make_dataset(store_folder, case_ids=("constant",), augmentation=augmentation, patch_size=size)
    reach = np.linalg.norm((np.array(size) - 1) / 2) / 0.7
    inside = 0
    for index in range(60):
        start = np.array(dataset.sampler.choose(index, np.random.default_rng([11, index]), _no_voxels).location.start)
        centre = start + (np.array(size) - 1) / 2
        if (centre >= reach).all() and (centre <= np.array(SHAPES["constant"]) - 1 - reach).all():
            torch.testing.assert_close(dataset[index]["image"], torch.ones(2, *size), atol=1e-5, rtol=0)
            inside += 1
    assert inside >= 10


def _no_voxels(case_id: str, class_index: int) -> Any:
    raise AssertionError(f"{case_id} has no class {class_index}")


def test_ignored_voxels_reach_the_patch_and_rare_classes_are_seen(store_folder: Path) -> None:
    dataset = make_dataset(store_folder, augmentation=make_augmentation(), foreground_fraction=1.0)
    seen = {int(value) for index in range(40) for value in dataset[index]["label"].unique()}
    assert seen == {IGNORE_INDEX, 0, 1, 2}


def test_datasets_can_be_sent_to_another_process(store_folder: Path) -> None:
    dataset = make_dataset(store_folder, augmentation=make_augmentation())
    expected = dataset[3]
    assert_same(pickle.loads(pickle.dumps(dataset))[3], expected)


def test_an_epoch_is_a_run_of_sample_numbers() -> None:
    assert list(EpochSampler(250, 4)) == [250, 251, 252, 253]
    assert len(EpochSampler(250, 4)) == 4


def test_a_case_that_is_not_in_the_store_is_named(store_folder: Path) -> None:
    with pytest.raises(InputError, match="elsewhere"):
        make_dataset(store_folder, case_ids=("large", "elsewhere"))
