from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

SHAPE = (9, 7, 5)


@pytest.fixture(scope="session")
def oblique() -> NDArray[np.float64]:
    """An affine with unequal spacing and oblique axes, closest to RAS."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [9, -12, 15], degrees=True).as_matrix() * [0.8, 1.1, 2.5]
    affine[:3, 3] = [-13.0, 21.5, 4.25]
    return affine


@pytest.fixture
def save(oblique: NDArray[np.float64]) -> Callable[..., Path]:
    """Write an array with nibabel alone, on the oblique grid unless another affine is given."""

    def write(path: Path, array: NDArray[Any], affine: NDArray[np.float64] | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, oblique if affine is None else affine), path)
        return path

    return write


@pytest.fixture
def save_pair(save: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """Write a random image and a label with classes 0 to 2 below one folder; `seed` makes them differ."""

    def write(image: Path, label: Path, *, seed: int) -> tuple[Path, Path]:
        rng = np.random.default_rng(seed)
        voxels = rng.integers(0, 3, SHAPE, dtype=np.uint8)
        return save(image, rng.normal(100, 20, SHAPE).astype(np.float32)), save(label, voxels)

    return write


@pytest.fixture
def write_json() -> Callable[[Path, Any], Path]:
    def write(path: Path, content: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def msd(tmp_path: Path, save_pair: Callable[..., Any], write_json: Callable[..., Path]) -> Path:
    """A Decathlon folder with cases a, b, c and d."""
    for seed, name in enumerate("abcd"):
        save_pair(tmp_path / f"imagesTr/{name}.nii.gz", tmp_path / f"labelsTr/{name}.nii.gz", seed=seed)
    entries = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in "abcd"]
    content = {"name": "Toy", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "x", "2": "y"}}
    write_json(tmp_path / "dataset.json", content | {"training": entries, "test": ["./imagesTs/t.nii.gz"]})
    return tmp_path
