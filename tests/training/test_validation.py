from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.geometry import Grid
from pipeline.store import IGNORE_INDEX, StoreInfo, WritableStore
from pipeline.training.validation import ValidationResult, Validator, dice_by_class

SHAPES = {"a": (21, 10, 14), "b": (9, 17, 12)}


class Nearest(nn.Module):
    """Finds the class whose index is nearest to the voxel's value; gives its logits twice, as a list."""

    def forward(self, x: Tensor) -> list[Tensor]:
        logits = torch.cat([-((x - value) ** 2) for value in range(3)], dim=1)
        return [logits, logits]


@pytest.fixture
def label_store(plan, tmp_path) -> Path:
    """Cases whose image is their label."""
    store = WritableStore.create(tmp_path / "store", StoreInfo.of(plan))
    for case_id, shape in SHAPES.items():
        label = np.random.default_rng(0).integers(0, 3 if case_id == "a" else 2, shape).astype(np.int16)
        store.write_case(case_id, label[None].astype(np.float32), label, native_grid=Grid(shape, np.eye(4)))
    return store.folder


@pytest.mark.parametrize("case_id", SHAPES)
def test_a_network_that_is_right_scores_one_on_volumes_of_any_size(plan, label_store, case_id):
    validator = Validator(
        store_folder=label_store, case_ids=(case_id,), patch_size=plan.patch_size, num_classes=plan.num_classes
    )
    network = Nearest().train()
    result = validator.score(network, device=torch.device("cpu"), forward_context=nullcontext)
    absent = case_id == "b"
    assert result.by_case[case_id] == pytest.approx((1.0, float("nan") if absent else 1.0), nan_ok=True)
    assert result.mean == 1.0
    assert network.training


def test_ignored_voxels_do_not_count():
    label = np.array([[[1, 1, 0, IGNORE_INDEX]]], np.int16)
    prediction = np.array([[[1, 1, 0, 2]]])
    assert dice_by_class(prediction, label, 3) == pytest.approx((1.0, float("nan")), nan_ok=True)
    assert dice_by_class(prediction, np.abs(label), 3) == pytest.approx((0.8, 0.0))


def test_means_are_taken_over_cases_then_classes_and_leave_out_what_has_no_value():
    nan = float("nan")
    result = ValidationResult({"a": (0.2, nan), "b": (0.6, 0.9), "c": (nan, nan)}, seconds=1.0)
    assert result.by_class == pytest.approx((0.4, 0.9))
    assert result.mean == pytest.approx(0.65)
    assert np.isnan(ValidationResult({"a": (nan,)}, seconds=1.0).mean)
