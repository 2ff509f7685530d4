"""What `run.json` says of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.config import TrainConfig
from pipeline.datasets.splits import Splits
from pipeline.plan import MemoryPlan, Plan
from pipeline.training.recording import predicted_bytes
from pipeline.training.run_folder import RunFolder
from pipeline.training.trainer import fit_fold

MakeConfig = Callable[..., TrainConfig]


def test_a_plan_predicts_its_own_steps_and_no_other(plan: Plan) -> None:
    memory = MemoryPlan(budget_bytes=1, peak_bytes=12000, overhead_bytes=345, parts={"working": 12000})
    fallback = replace(plan.rung, recompute_stages=2, required_bytes=678)
    plan = replace(plan, memory=memory, fallbacks=(fallback,))
    assert predicted_bytes(plan, plan.rung) == 12345
    assert predicted_bytes(plan, fallback) == 678
    # A way of running that was chosen by hand.
    assert predicted_bytes(plan, replace(plan.rung, recompute_stages=1)) is None


def test_on_a_cpu_memory_is_measured_and_nothing_is_predicted_of_it(
    plan: Plan, store: Path, splits: Splits, make_config: MakeConfig
) -> None:
    folder = RunFolder(fit_fold(plan, store, splits, make_config(max_epochs=2)).run_dir)
    record = folder.read_record()
    assert record is not None
    assert record.predicted_bytes is None
    header, *rows = (line.split(",") for line in folder.metrics.read_text().splitlines())
    peaks = [int(row[header.index("peak_ram_bytes")]) for row in rows]
    assert len(peaks) == 2
    assert record.measured_bytes == max(peaks)
