"""The table of scores that commands end with."""

from __future__ import annotations

import numpy as np
from rich.console import Console

from pipeline.evaluation.explain import describe_metrics
from pipeline.evaluation.metrics import score_class
from pipeline.evaluation.summary import CaseScores, make_metrics


def test_the_table_shows_mean_and_spread_by_class_and_every_case_that_failed() -> None:
    reference = np.zeros((9, 7, 5), bool)
    reference[2:6, 1:5, 1:4] = True
    cases = []
    for shift in (0, 1):
        prediction = np.roll(reference, shift, axis=0)
        scores = score_class(prediction, reference, spacing=(1.0, 2.0, 3.0))
        cases.append(CaseScores(case_id=f"case_{shift}", classes={"liver": scores}))
    metrics = make_metrics(cases, labels={"liver": 1}, tolerance_mm=1.0, failures={"case_9": "has no prediction"})
    console = Console(width=120, record=True)
    console.print(describe_metrics(metrics))
    text = console.export_text()
    assert "liver" in text
    assert "0.875 ± 0.177" in text
    assert "case_9: has no prediction" in text
