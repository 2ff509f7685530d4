"""Plans and tiny data sets of NIfTI files with unequal axes, an oblique affine and file axes that are not RAS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from pipeline.datasets.dataset import Case, Dataset
from pipeline.plan import ChannelPlan, Plan

MakeDataset = Callable[..., Dataset]
LABELS = {"background": 0, "organ": 3, "vessel": 7}
# File axes run L, I, P: neither the order nor the direction is RAS; the angles stay oblique.
LIP_OBLIQUE = np.array([[-1.0, 0.1, 0.0, 60.0], [0.0, 0.2, -2.0, 40.0], [0.05, -1.5, 0.2, 9.0], [0, 0, 0, 1]])


@pytest.fixture
def plan(plan_of: Callable[..., Plan]) -> Plan:
    return plan_of(
        dataset_name="tiny",
        fingerprint_hash="0" * 16,
        channels=(ChannelPlan(name="T1", scheme="zscore"),),
        labels=LABELS,
        ignore_value=9,
        target_spacing=(1.2, 1.6, 1.3),
        median_shape=(20, 16, 14),
        patch_size=(16, 8, 12),
    )


def write_case_files(folder: Path, case_id: str, *, seed: int, num_channels: int = 1) -> Case:
    """A noisy case with an organ and a vessel, zero margins and one ignored slab, in file order L, I, P."""
    rng = np.random.default_rng(seed)
    shape = (19 + seed % 3, 14, 16)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    label = np.zeros(shape, np.uint8)
    label[x**2 + y**2 + z**2 < 0.5] = 3
    label[(x - 0.2) ** 2 + z**2 < 0.08] = 7
    label[:, :3] = 9
    image = rng.integers(50, 90, (num_channels, *shape)).astype(np.int16) + 20 * (label == 3)
    image[:, :2] = 0
    image[:, :, :, -1:] = 0
    paths = [folder / f"{case_id}_{channel:04}.nii.gz" for channel in range(num_channels)]
    for path, channel in zip(paths, image, strict=True):
        nib.save(nib.Nifti1Image(channel.astype(np.int16), LIP_OBLIQUE), path)
    nib.save(nib.Nifti1Image(label, LIP_OBLIQUE), folder / f"{case_id}_label.nii.gz")
    return Case(case_id=case_id, images=tuple(paths), label=folder / f"{case_id}_label.nii.gz", patient=f"p_{case_id}")


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    def make(num_cases: int = 3, **options: Any) -> Dataset:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        cases = tuple(write_case_files(folder, f"case_{index:02}", seed=index, **options) for index in range(num_cases))
        names = tuple(f"channel_{index}" for index in range(options.get("num_channels", 1)))
        return Dataset(
            name="tiny", root=folder, channel_names=names, labels=LABELS, ignore_value=9, cases=cases, test_cases=()
        )

    return make


@pytest.fixture
def without(make_dataset: MakeDataset) -> Callable[[Dataset, str], Dataset]:
    """The same data set without one case."""
    return lambda dataset, case_id: replace(
        dataset, cases=tuple(case for case in dataset.cases if case.case_id != case_id)
    )
