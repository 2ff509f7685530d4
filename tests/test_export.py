"""A run that was really trained, exported by the command and run by MONAI where voxfit cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline import api, chain
from pipeline.cli import main
from pipeline.config import (
    AugmentationConfig,
    HardwareConfig,
    OptimConfig,
    PlanOptions,
    PredictConfig,
    RunConfig,
    TrainOptions,
)
from pipeline.synthetic import make_synthetic_case, write_msd_dataset

needs_runner = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("fire", "ignite")), reason="fire and pytorch-ignite are not installed"
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small MR cases with oblique affines, unequal axes and two organs."""
    cases = {
        f"case_{seed}": make_synthetic_case(
            seed, shape=(30, 38, 26), spacing=(1.0, 1.2, 1.6), num_classes=3, oblique_degrees=12.0
        )
        for seed in range(4)
    }
    folder = tmp_path_factory.mktemp("data") / "msd"
    write_msd_dataset(folder, cases)
    return folder


@pytest.fixture(scope="module")
def run_dir(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained until it segments its cases well, with averaged weights and windows smaller than the cases."""
    work = tmp_path_factory.mktemp("work")
    config = RunConfig(
        dataset=str(dataset),
        work_dir=str(work),
        vram="1GiB",
        max_epochs=5,
        num_workers=1,
        plan=PlanOptions(
            patch_size=(16, 24, 16),
            target_spacing=(1.1, 1.1, 1.5),
            base_features=8,
            max_features=16,
            effective_batch=1,
        ),
        train=TrainOptions(
            num_folds=2,
            iterations_per_epoch=80,
            optim=OptimConfig(name="adamw", lr=0.02, ema_decay=0.8),
            augmentation=AugmentationConfig(enabled=False),
            hardware=HardwareConfig(accelerator="cpu", precision="32-true", num_workers=0, num_threads=1),
        ),
    )
    chain.run(config)
    return work / "fold_0"


@needs_runner
@pytest.mark.slow
def test_monai_s_runner_segments_as_voxfit_does_without_voxfit(run_dir: Path, dataset: Path, tmp_path: Path) -> None:
    bundle, images = tmp_path / "bundle", dataset / "imagesTr"
    assert main(["export", "--run_dir", str(run_dir), "--out", str(bundle)]) == 0
    api.predict(PredictConfig(run_dir=str(run_dir), input=str(images), output=str(tmp_path / "ours"), num_threads=1))
    # A voxfit that cannot be imported stands in front of the one that is installed.
    (tmp_path / "none" / "pipeline").mkdir(parents=True)
    (tmp_path / "none" / "pipeline" / "__init__.py").write_text("raise ImportError('the bundle needs voxfit')")
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    command += ["--bundle_root", ".", "--dataset_dir", str(images), "--output_dir", str(tmp_path / "theirs")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "none")}
    done = subprocess.run(command, cwd=bundle, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = sorted((tmp_path / "ours").glob("*.nii.gz"))
    theirs = sorted((tmp_path / "theirs").glob("*_seg.nii.gz"))
    assert len(ours) == len(theirs) == 4
    for one, other in zip(map(nib.load, ours), map(nib.load, theirs), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one.affine, other.affine, atol=1e-5)
        labels = np.asanyarray(one.dataobj)
        assert len(np.unique(labels)) == 3
        agreement = float(np.mean(labels == np.asanyarray(other.dataobj)))
        print(f"agreement {agreement:.5f}")
        # One window would be the same in every voxel (tests/inference); these lie in other places.
        assert agreement > 0.97
