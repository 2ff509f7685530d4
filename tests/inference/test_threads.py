"""A loaded predictor that several threads use at once gives each of them what it gives one alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch

from pipeline import api
from pipeline.config import PredictOptions
from pipeline.inference.predictor import Predictor
from pipeline.io.volume import Volume
from pipeline.plan import Plan, Precision

OPTIONS = PredictOptions(accelerator="cpu", num_threads=1, tta="mirror", tta_axes=(0,))


def volumes(count: int) -> list[Volume]:
    """Noise of other shapes and spacings."""
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        array = rng.normal(size=(1, 20 + 3 * seed, 25 - seed, 17)).astype(np.float32)
        found.append(Volume.from_array(array, np.diag([1.0 + 0.1 * seed, 1.2, 0.9, 1])))
    return found


def in_threads(predictor: Predictor, given: list[Volume]) -> list[np.ndarray]:
    start = Barrier(len(given))

    def run(volume: Volume) -> np.ndarray:
        start.wait(timeout=60)
        return predictor.predict(volume).array

    with ThreadPoolExecutor(len(given)) as pool:
        return list(pool.map(run, given))


@pytest.mark.parametrize("num_runs", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("slab_stages", [0, 1])
def test_threads_share_a_predictor_and_get_what_one_alone_gets(
    make_plan: Callable[..., Plan],
    make_run: Callable[..., Path],
    num_runs: int,
    precision: Precision,
    slab_stages: int,
) -> None:
    plan = make_plan(spacing=(1.0, 1.3, 1.1), slab_stages=slab_stages)
    run_dirs = [make_run(plan, name=f"fold_{fold}", seed=fold) for fold in range(num_runs)]
    predictor, given = api.load_predictor(run_dirs, OPTIONS), volumes(4)
    predictor.precision = precision
    expected = [predictor.predict(volume).array for volume in given]
    assert len({array.tobytes() for array in expected}) == len(given)
    for found, wanted in zip(in_threads(predictor, given), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_volume_in_memory_needs_no_file_and_leaves_none(
    make_plan: Callable[..., Plan], make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, volume = make_run(make_plan()), volumes(1)[0]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = sorted(tmp_path.rglob("*"))
    label = api.predict_volume(run_dir, volume, OPTIONS)
    assert label.array.shape == volume.array.shape
    assert label.grid is volume.grid
    np.testing.assert_array_equal(label.array, api.predict_volume(str(run_dir), volume, OPTIONS).array)
    assert sorted(tmp_path.rglob("*")) == before
    other = api.predict_volume([run_dir], volume, replace(OPTIONS, tta="none", tta_axes="auto"))
    assert not np.array_equal(other.array, label.array)
    assert not torch.is_inference_mode_enabled()
