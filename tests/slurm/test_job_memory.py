"""The memory that job scripts ask for: from the plan, the cases and the workers, each figure with its reason."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod
from typing import Any

import pytest

from pipeline.inference.prediction_bytes import SEAM_BYTES
from pipeline.inference.predictor import Predictor
from pipeline.inference.window_batch import MOST_WINDOWS_ON_GPU
from pipeline.job_scripts.memory import (
    MOST_FOR_SCORES,
    _data_workers,
    _seam_bytes,
    evaluate_memory,
    predict_memory,
    preprocess_memory,
    train_memory,
)
from pipeline.networks.unet import UNet
from pipeline.preprocessing.score_resampling import ScoreResampling
from pipeline.sizes import GIB
from tests.slurm.conftest import JOBS, PLAN, SIZES, directives, gib, scripts


def test_every_figure_says_where_it_comes_from() -> None:
    for name in JOBS:
        text = scripts()[f"{name}.sbatch"]
        (amount,) = re.findall(r"^#SBATCH --mem=(\d+G)$", text, re.MULTILINE)
        assert f"# {amount}: " in text
    assert "# 48G: as given." in scripts(memory="48G")["train.sbatch"]


def test_training_memory_counts_workers_pinned_memory_and_the_largest_case() -> None:
    base = gib(train_memory(PLAN, SIZES, cpus=8, on_gpu=True).amount)
    offloading = replace(PLAN, memory=replace(PLAN.memory, host_bytes=40 * GIB))
    assert gib(train_memory(offloading, SIZES, cpus=8, on_gpu=True).amount) == pytest.approx(base + 50, abs=1)
    assert "40.0 GiB pinned for offloading" in train_memory(offloading, SIZES, cpus=8, on_gpu=True).reason
    assert gib(train_memory(PLAN, SIZES, cpus=16, on_gpu=True).amount) > base
    classes = replace(PLAN, labels={f"class_{value}": value for value in range(20)})
    largest = gib(train_memory(classes, SIZES, cpus=8, on_gpu=True).amount)
    assert largest - base >= int(4 * 17 * SIZES.stored_voxels / GIB)
    assert gib(train_memory(PLAN, SIZES, cpus=8, on_gpu=False).amount) > PLAN.memory.peak_bytes / GIB


def test_the_data_workers_are_those_that_training_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import allocation
    from pipeline.training import processes
    from pipeline.training.settings import _patch_bytes

    for cpus in (1, 2, 8, 64):
        monkeypatch.setattr(processes, "allotted_cpus", lambda cpus=cpus: cpus)
        monkeypatch.setattr(allocation, "allotted_cpus", lambda cpus=cpus: cpus)
        for on_gpu in (True, False):
            memory = gib(train_memory(PLAN, SIZES, cpus=cpus, on_gpu=on_gpu).amount) * GIB
            monkeypatch.setattr(allocation, "allotted_memory_bytes", lambda memory=memory: memory)
            started = processes.share_cpus(
                num_threads="auto", num_workers="auto", on_gpu=on_gpu, batch_bytes=_patch_bytes(PLAN)
            )
            assert _data_workers(PLAN, cpus, on_gpu=on_gpu)[0] == started.num_workers


def test_the_other_jobs_follow_the_cases_and_the_workers() -> None:
    larger = replace(SIZES, native_voxels=2 * SIZES.native_voxels, preparing_bytes=2 * SIZES.preparing_bytes)
    for few, many in (
        (preprocess_memory(SIZES, num_workers=2), preprocess_memory(SIZES, num_workers=4)),
        (preprocess_memory(SIZES, num_workers=4), preprocess_memory(larger, num_workers=4)),
        (evaluate_memory(SIZES, num_workers=2), evaluate_memory(larger, num_workers=2)),
        (predict_memory(PLAN, SIZES, cpus=8, on_gpu=True), predict_memory(PLAN, larger, cpus=8, on_gpu=True)),
    ):
        assert gib(few.amount) < gib(many.amount)
    # What preprocessing itself would allow in such an allotment.
    allotted = gib(preprocess_memory(SIZES, num_workers=4).amount) * GIB
    assert int(0.8 * allotted) // SIZES.preparing_bytes >= 4


@pytest.mark.parametrize("shape", [(48, 20, 24), (31, 64, 17), (16, 12, 20)])
@pytest.mark.parametrize("tta_axes", [(), (1, 2)])
@pytest.mark.parametrize("num_classes", [3, 7])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_counting_seams_is_given_what_voxfit_predict_reckons_with(
    shape: tuple[int, int, int], tta_axes: tuple[int, ...], num_classes: int, on_gpu: bool, two_stages: Any
) -> None:
    classes = {f"class_{value}": value for value in range(num_classes)}
    plan = replace(PLAN, network=two_stages(), labels=classes, patch_size=(16, 12, 20))
    sizes, cpus = replace(SIZES, stored_voxels=prod(shape)), 6
    network, at_once = UNet(plan.num_channels, num_classes, plan.network), MOST_WINDOWS_ON_GPU if on_gpu else cpus
    predictor = Predictor(network, plan, tta_axes=tta_axes, window_batch=at_once)
    predictor.count_seams = True
    reckoned = predictor.plan_memory(ScoreResampling(shape, shape)).parts["seams"]
    given = _seam_bytes(plan, sizes, cpus=cpus, on_gpu=on_gpu, mirrors=bool(tta_axes))
    if max(shape) == max(plan.patch_size):
        assert given == reckoned > 0
    assert reckoned <= given <= reckoned + SEAM_BYTES * prod(shape)


def test_a_job_asks_for_what_counting_seams_takes_and_more_where_windows_are_mirrored() -> None:
    none = predict_memory(PLAN, SIZES, cpus=8, on_gpu=True)
    plain = predict_memory(PLAN, SIZES, cpus=8, on_gpu=True, seams=True)
    mirrored = predict_memory(PLAN, SIZES, cpus=8, on_gpu=True, seams=True, mirrors=True)
    assert "for its scores and their seams" in plain.reason
    # Float32 scores of three classes of 8 windows.
    sums = 4 * 3 * 8 * prod(PLAN.patch_size) / GIB
    assert gib(mirrored.amount) - gib(plain.amount) == pytest.approx(sums / 0.8, abs=1)
    for tta, wanted in (("none", plain), ("mirror", mirrored)):
        made = scripts(tta=tta, predict_input="new")
        assert f"--mem={wanted.amount}" in directives(made["predict.sbatch"])
        assert f"# {wanted.amount}: " in made["predict.sbatch"]
        # It counts none.
        assert "seams" not in made["ensemble.sbatch"]
        assert f"--mem={none.amount}" in directives(made["ensemble.sbatch"])


def test_no_number_of_classes_makes_a_job_ask_for_more_than_a_prediction_can_be_kept_to() -> None:
    many = replace(PLAN, labels={f"class_{value}": value for value in range(118)})
    room = f"{MOST_FOR_SCORES / GIB:.1f} GiB for its scores"
    for options in ({}, {"seams": True}, {"seams": True, "mirrors": True}):
        assert room in predict_memory(many, SIZES, cpus=8, on_gpu=True, **options).reason
    assert f"{MOST_FOR_SCORES / GIB:.1f} GiB for the largest validation case" in (
        train_memory(many, SIZES, cpus=8, on_gpu=True).reason
    )
