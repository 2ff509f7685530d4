"""Segmentations that are kept are those that would be made: other weights, options and images are refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.artifacts import read_artifact, write_artifact
from pipeline.errors import InputError
from pipeline.inference.case_files import predict_files
from pipeline.inference.ensemble import Member
from pipeline.inference.inputs import find_inputs
from pipeline.inference.made_from import describe_model
from pipeline.inference.postprocess import Step
from pipeline.inference.predictor import Predictor
from pipeline.plan import Plan
from pipeline.prediction_record import PredictionRecord, record_path

AFFINE = np.array([[0.9, 0.1, 0.0, 4.0], [-0.1, 1.19, 0.1, -3.0], [0.0, -0.1, 1.497, 8.0], [0, 0, 0, 1]])
SHAPE = (11, 14, 8)


class Threshold(nn.Module):
    """Foreground above a learnt threshold."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.value).repeat(1, 2, 1, 1, 1) * x.new_tensor([-1, 1]).view(2, 1, 1, 1)


def write_images(folder: Path, case_ids: Sequence[str], *, seed: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    for number, case_id in enumerate(case_ids):
        voxels = np.random.default_rng(seed + number).normal(size=SHAPE).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, AFFINE), folder / f"{case_id}.nii")
    return folder


@pytest.fixture
def make_predictor(make_plan: Callable[..., Plan]) -> Callable[..., Predictor]:
    plan = make_plan(labels={"background": 0, "organ": 4}, spacing=(0.9, 1.2, 1.5))
    return lambda value=0.0, **options: Predictor(Threshold(value), plan, **options)


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def with_postprocessing(predictor: Predictor) -> Predictor:
    predictor.postprocessing = (Step(class_name="organ", value=4, kind="keep_largest"),)
    return predictor


def with_air(predictor: Predictor) -> Predictor:
    predictor.skip_air = True
    return predictor


def with_another(predictor: Predictor) -> Predictor:
    predictor.members = (*predictor.members, Member(Threshold(0.5), predictor.plan.patch_size))
    return predictor


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda make: make(0.25), "weights: "),
        (lambda make: make(overlap=0.75), "overlap: 0.5, now 0.75"),
        (lambda make: make(tta_axes=(0, 2)), "mirrored axes: none, now 0 2"),
        (lambda make: with_postprocessing(make()), "post-processing: none, now "),
        (lambda make: with_air(make()), "windows of air: computed, now left out"),
        (lambda make: with_another(make()), "weights: "),
    ],
)
def test_segmentations_of_another_model_are_refused_untouched_and_made_anew_on_request(
    tmp_path: Path, make_predictor: Callable[..., Predictor], change: Callable[[Any], Predictor], said: str
) -> None:
    images, out = write_images(tmp_path / "in", ["a", "b"]), tmp_path / "out"
    predict_files(make_predictor(), find_inputs(images), out)
    before = content(out)
    other = change(make_predictor)
    write_images(images, ["a", "b", "c"])
    with pytest.raises(InputError) as caught:
        predict_files(other, find_inputs(images), out)
    assert "2 segmentation(s) are there that would come out otherwise now: a (" in caught.value.what
    assert said in caught.value.what
    assert "--overwrite" in caught.value.fix
    assert content(out) == before
    predict_files(other, find_inputs(images), out, overwrite=True)
    predict_files(other, find_inputs(images), out)


def test_the_same_model_goes_on_whatever_computes_it(tmp_path: Path, make_predictor: Callable[..., Predictor]) -> None:
    images, out = write_images(tmp_path / "in", ["a"]), tmp_path / "out"
    predict_files(make_predictor(), find_inputs(images), out)
    before = content(out)
    write_images(images, ["b"], seed=1)
    predict_files(make_predictor(window_batch=3, precision="bf16-mixed", max_ram=2 << 30), find_inputs(images), out)
    assert before.items() <= content(out).items()
    assert (out / "b.nii.gz").is_file()


def test_the_order_of_networks_makes_no_other_model(make_predictor: Callable[..., Predictor]) -> None:
    there, back = with_another(make_predictor()), with_another(make_predictor())
    back.members = back.members[::-1]
    assert describe_model(there) == describe_model(back) != describe_model(make_predictor())


def test_a_replaced_image_is_told_by_its_size_or_its_content_and_a_copy_is_not_one(
    tmp_path: Path, make_predictor: Callable[..., Predictor]
) -> None:
    images, out = write_images(tmp_path / "in", ["a", "b"]), tmp_path / "out"
    predict_files(make_predictor(), find_inputs(images), out)
    later = (out / "b.nii.gz").stat().st_mtime + 60
    os.utime(images / "a.nii", (later, later))
    predict_files(make_predictor(), find_inputs(images), out)
    write_images(images, ["a"], seed=9)
    os.utime(images / "a.nii", (later, later))
    with pytest.raises(InputError, match=r"1 segmentation.*: a \(its image is another one now\)"):
        predict_files(make_predictor(), find_inputs(images), out)
    write_images(images, ["a"])
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 9), np.float32), AFFINE), images / "a.nii")
    os.utime(images / "a.nii", (1, 1))
    with pytest.raises(InputError, match=r"its image is another one now"):
        predict_files(make_predictor(), find_inputs(images), out)


def test_a_record_of_an_earlier_version_refuses_nothing(
    tmp_path: Path, make_predictor: Callable[..., Predictor]
) -> None:
    images, out = write_images(tmp_path / "in", ["a"]), tmp_path / "out"
    predict_files(make_predictor(), find_inputs(images), out)
    record = read_artifact(record_path(out, "a"), PredictionRecord)
    assert record.made_from is not None
    write_artifact(record_path(out, "a"), PredictionRecord(case_id="a", seconds=record.seconds, windows=record.windows))
    before = content(out)
    predict_files(make_predictor(0.5), find_inputs(images), out)
    assert content(out) == before
