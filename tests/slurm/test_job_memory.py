"""The memory that job scripts ask for: from the plan, the cases and the workers, each figure with its reason."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pipeline.job_scripts.memory import _data_workers, evaluate_memory, predict_memory, preprocess_memory, train_memory
from pipeline.plan import GIB
from tests.slurm.conftest import JOBS, PLAN, SIZES, gib, scripts


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
    classes = replace(PLAN, labels={f"class_{value}": value for value in range(118)})
    largest = gib(train_memory(classes, SIZES, cpus=8, on_gpu=True).amount)
    assert largest - base > 4 * 115 * SIZES.stored_voxels / GIB
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
        (predict_memory(PLAN, SIZES, on_gpu=True), predict_memory(PLAN, larger, on_gpu=True)),
    ):
        assert gib(few.amount) < gib(many.amount)
    # What preprocessing itself would allow in such an allotment.
    allotted = gib(preprocess_memory(SIZES, num_workers=4).amount) * GIB
    assert int(0.8 * allotted) // SIZES.preparing_bytes >= 4
