"""What `run.json` says of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import TrainConfig
from pipeline.datasets.splits import Splits
from pipeline.plan import MemoryPlan, Plan
from pipeline.training.run_folder import RunFolder
from pipeline.training.trainer import fit_fold

MakeConfig = Callable[..., TrainConfig]


@pytest.mark.parametrize(("recompute_stages", "predicted"), [("auto", 12345), (1, None)])
def test_predicted_and_measured_memory_stand_side_by_side(
    plan: Plan, store: Path, splits: Splits, make_config: MakeConfig, recompute_stages: object, predicted: int | None
) -> None:
    plan = replace(plan, memory=MemoryPlan(budget_bytes=1, peak_bytes=12000, overhead_bytes=345, parts={}))
    config = make_config(max_epochs=2, hardware={"recompute_stages": recompute_stages})
    folder = RunFolder(fit_fold(plan, store, splits, config).run_dir)
    record = folder.read_record()
    assert record is not None
    # A way of running that was chosen by hand is none that the plan predicts.
    assert record.predicted_bytes == predicted
    header, *rows = (line.split(",") for line in folder.metrics.read_text().splitlines())
    peaks = [int(row[header.index("peak_ram_bytes")]) for row in rows]
    assert len(peaks) == 2
    assert record.measured_bytes == max(peaks)
