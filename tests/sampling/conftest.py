"""A small store with what real ones have: unequal axes, several channels, a rare class, ignored voxels, odd cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.geometry import Grid, Shape3
from pipeline.plan import ChannelPlan
from pipeline.store import IGNORE_INDEX, CaseRecord, StoreInfo, WritableStore

PATCH: Shape3 = (12, 16, 10)
SHAPES: dict[str, Shape3] = {
    "large": (30, 26, 22),
    "small": (9, 11, 8),
    "flat": (28, 20, 6),
    "empty": (20, 24, 18),
    "constant": (36, 36, 34),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_case(case_id: str) -> tuple[np.ndarray, np.ndarray]:
    """Image (2, I, J, K) and label (I, J, K): a block of class 1, a single voxel of class 2, a few ignored voxels."""
    shape = SHAPES[case_id]
    rng = np.random.default_rng(len(case_id))
    label = np.zeros(shape, np.int16)
    if case_id in ("large", "small", "flat"):
        label[2:7, 3:9, 1:5] = 1
        label[shape[0] - 1, 0, 3] = 2
        label[0:2, shape[1] - 2 :, :] = IGNORE_INDEX
    image = rng.normal(size=(2, *shape)).astype(np.float32) + 2 * label
    return (np.ones_like(image) if case_id == "constant" else image.astype(np.float32)), label


@pytest.fixture(scope="session")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampling") / "store"
    info = StoreInfo(
        channels=(ChannelPlan(name="T1", scheme="zscore"), ChannelPlan(name="T2", scheme="zscore")),
        labels={"background": 0, "block": 1, "dot": 2},
        ignore_value=9,
        target_spacing=(1.0, 1.0, 1.0),
        anisotropic_axis=None,
        patch_size=PATCH,
    )
    store = WritableStore.create(folder, info)
    for case_id, shape in SHAPES.items():
        image, label = make_case(case_id)
        store.write_case(case_id, image, label, native_grid=Grid(shape, np.eye(4)))
    return folder


def make_record(case_id: str, shape: Shape3, voxels_by_class: tuple[int, ...] = (10, 10, 0, 10)) -> CaseRecord:
    return CaseRecord(
        case_id=case_id,
        patient=case_id,
        shape=shape,
        spacing=(1.0, 1.0, 1.0),
        voxels_by_class=voxels_by_class,
        native_shape=shape,
        crop_start=(0, 0, 0),
        crop_shape=shape,
        native_affine=tuple(tuple(row) for row in np.eye(4).tolist()),
        key="0" * 16,
        files=(),
        data_bytes={},
    )
