"""Records of predictions: written whole with each case, read by the report, and never in the way of a segmentation."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from torch import Tensor, nn

from pipeline.artifacts import read_artifact, write_artifact
from pipeline.errors import CasesFailedError, InputError
from pipeline.inference.case_files import predict_files
from pipeline.inference.inputs import find_inputs
from pipeline.inference.predictor import Predictor
from pipeline.plan import Plan
from pipeline.prediction_record import MANY_SEAMS, PredictionRecord, read_records, record_path

AFFINE = np.array([[0.9, 0.1, 0.0, 4.0], [-0.1, 1.19, 0.1, -3.0], [0.0, -0.1, 1.497, 8.0], [0, 0, 0, 1]])
Predict = Callable[..., None]
RECORD = PredictionRecord(case_id="a", seconds=1.5, windows=8, compared_voxels=200, disagreeing_voxels=30)


class OfMean(nn.Module):
    """Foreground where a voxel is above its window's mean, so that windows may disagree."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(dim=(2, 3, 4), keepdim=True)).repeat(1, 2, 1, 1, 1) * x.new_tensor([-1, 1]).view(2, 1, 1, 1)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A case of one window and one of several."""
    folder = tmp_path / "in"
    folder.mkdir()
    for case_id, shape in (("one", (11, 14, 8)), ("several", (19, 30, 13))):
        voxels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, AFFINE), folder / f"{case_id}.nii.gz")
    return folder


@pytest.fixture
def plan(plan_of: Callable[..., Plan]) -> Plan:
    labels, spacing = {"background": 0, "organ": 4}, (0.9, 1.2, 1.5)
    return plan_of(labels=labels, target_spacing=spacing, patch_size=(12, 16, 8), precision="32-true")


@pytest.fixture
def predict(plan: Plan) -> Predict:
    def run(images: Path, out: Path, *, seams: bool = True, network: nn.Module | None = None, **options: Any) -> None:
        predictor = Predictor(network or OfMean(), plan)
        predictor.count_seams = seams
        predict_files(predictor, find_inputs(images), out, **options)

    return run


def test_each_segmentation_has_a_record_of_windows_time_and_seams(
    predict: Predict, images: Path, tmp_path: Path
) -> None:
    predict(images, tmp_path / "out")
    found = read_records(tmp_path / "out", ["one", "several", "none of these"])
    assert list(found) == ["one", "several"]
    assert found["one"].windows == 1
    assert found["several"].windows > 1
    # One window has nothing to disagree with.
    assert found["one"].compared_voxels == 0
    assert found["one"].seam_share is None
    assert 0 < (found["several"].seam_share or 0) < 1
    assert all(record.seconds > 0 for record in found.values())


def test_what_was_not_counted_is_not_said_to_be_none(predict: Predict, images: Path, tmp_path: Path) -> None:
    predict(images, tmp_path / "out", seams=False)
    record = read_records(tmp_path / "out", ["several"])["several"]
    assert (record.compared_voxels, record.seam_share, record.has_many_seams) == (None, None, False)


def test_a_segmentation_that_is_kept_keeps_its_record(predict: Predict, images: Path, tmp_path: Path) -> None:
    predict(images, tmp_path / "out")
    before = record_path(tmp_path / "out", "several").read_bytes()
    predict(images, tmp_path / "out", seams=False)
    assert record_path(tmp_path / "out", "several").read_bytes() == before
    # Maps that are made later are no news of the segmentation.
    predict(images, tmp_path / "out", seams=False, formats=("nifti", "entropy"))
    assert (tmp_path / "out" / "uncertainty" / "several.nii.gz").is_file()
    assert record_path(tmp_path / "out", "several").read_bytes() == before
    predict(images, tmp_path / "out", seams=False, overwrite=True)
    assert record_path(tmp_path / "out", "several").read_bytes() != before


def test_a_case_that_fails_has_no_record(predict: Predict, images: Path, tmp_path: Path) -> None:
    class Short(OfMean):
        def forward(self, x: Tensor) -> Tensor:
            # The smaller case is padded to a window.
            if not (x == 0).any():
                raise MemoryError
            return super().forward(x)

    with pytest.raises(CasesFailedError):
        predict(images, tmp_path / "out", network=Short())
    assert [path.name for path in (tmp_path / "out").rglob("*.json")] == ["one.json"]


@pytest.mark.parametrize(("share", "many"), [(MANY_SEAMS - 0.01, False), (MANY_SEAMS + 0.01, True)])
def test_many_seams_are_those_beyond_the_stated_level(share: float, many: bool) -> None:
    record = replace(RECORD, compared_voxels=10_000, disagreeing_voxels=round(share * 10_000))
    assert record.has_many_seams is many


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_artifact(record_path(tmp_path, "a"), RECORD)
    assert read_records(tmp_path, ["a"]) == {"a": RECORD}
    plain = json.loads(record_path(tmp_path, "a").read_text())
    assert plain["schema_version"] == 1
    assert plain["disagreeing_voxels"] == 30


@pytest.mark.parametrize("text", ['{"schema_version": 2}', "[]", "{", '{"schema_version": 1, "case_id": "a"}'])
def test_a_record_that_cannot_be_read_is_warned_of_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    write_artifact(record_path(tmp_path, "b"), replace(RECORD, case_id="b"))
    path = record_path(tmp_path, "a")
    path.write_text(text)
    with pytest.raises(InputError):
        read_artifact(path, PredictionRecord)
    with caplog.at_level(logging.WARNING):
        assert list(read_records(tmp_path, ["a", "b"])) == ["b"]
    assert str(path) in caplog.text
