"""Several run folders as one prediction: which of them go together, and what comes of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from pipeline import api
from pipeline.artifacts import write_artifact
from pipeline.config import PredictConfig, PredictOptions
from pipeline.datasets.splits import Fold, Splits
from pipeline.errors import InputError
from pipeline.inference.loading import read_held_out_by_all
from pipeline.inference.postprocess import Postprocessing, Step, apply_postprocessing
from pipeline.inference.predictor import Predictor
from pipeline.inference.runs import load_runs
from pipeline.inference.sliding_window import sliding_window_scores
from pipeline.io.nifti import read_volume
from pipeline.io.volume import Volume
from pipeline.networks.unet import UNet
from pipeline.plan import ChannelPlan, Plan
from pipeline.preprocessing.preprocess import prepare_image
from pipeline.preprocessing.restore import restore_label
from pipeline.run_files import RunFiles
from pipeline.run_record import RunRecord

MakePlan, MakeRun = Callable[..., Plan], Callable[..., Path]
ON_CPU = PredictOptions(accelerator="cpu", num_threads=1)
AFFINE = np.array([[-1.1, 0.1, 0, 4], [0.1, 1.2, 0.2, -3], [0, -0.2, 0.9, 7], [0, 0, 0, 1]])


def volume_of(seed: int = 0) -> Volume:
    """A smooth image whose labels have several components."""
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 1, 6, 5, 4)).astype(np.float32))
    smooth = nn.functional.interpolate(noise, size=(25, 22, 17), mode="trilinear")[0].numpy()
    ras = np.diag([1.1, 1.2, 0.9, 1.0])
    return Volume.from_array(smooth, ras)


@pytest.fixture
def runs(make_plan: MakePlan, make_run: MakeRun) -> list[Path]:
    """Three untrained runs of one plan, one of them with another patch."""
    plan = make_plan(spacing=(1.0, 1.3, 1.1))
    plans = (plan, plan, replace(plan, patch_size=(8, 12, 16)))
    return [make_run(each, name=f"fold_{fold}", seed=fold) for fold, each in enumerate(plans)]


def expected_label(run_dirs: list[Path], volume: Volume) -> np.ndarray:
    """Softmax volumes of every run in float64, averaged, and only then resampled."""
    probabilities, plan = [], None
    for run_dir in run_dirs:
        alone = Predictor.from_runs([run_dir], ON_CPU)
        plan = alone.plan
        prepared = prepare_image(volume, plan)
        with torch.inference_mode():
            scores = sliding_window_scores(
                alone.network, torch.from_numpy(prepared.array), window=plan.patch_size, num_classes=plan.num_classes
            )
        probabilities.append(scores.double().softmax(0).numpy())
    return restore_label(np.mean(probabilities, axis=0).astype(np.float32), prepare_image(volume, plan), plan)


def test_several_runs_give_the_class_of_the_highest_mean_probability(runs: list[Path]) -> None:
    volume = volume_of()
    label = api.predict_volume(runs, volume, ON_CPU)
    assert label.grid is volume.grid
    assert len(np.unique(label.array)) == 3
    assert (label.array[0] == expected_label(runs, volume)).mean() > 0.9999
    alone = [api.predict_volume(run, volume, ON_CPU).array for run in runs]
    assert not any(np.array_equal(label.array, each) for each in alone)


def test_one_run_in_a_list_is_that_run_bit_by_bit(runs: list[Path]) -> None:
    image = torch.from_numpy(prepare_image(volume_of(), load_runs(runs[:1], ON_CPU).plan).array)
    alone = Predictor.from_runs([runs[0]], ON_CPU)
    with torch.inference_mode():
        logits = sliding_window_scores(alone.network, image, window=(12, 16, 8), num_classes=3)
    assert torch.equal(api.load_predictor(runs[:1], ON_CPU).predict_scores(image), logits)
    assert torch.equal(alone.predict_scores(image), logits)


def test_files_of_several_runs_are_written_as_of_one(runs: list[Path], tmp_path: Path) -> None:
    voxels = volume_of().array[0][::-1]
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(voxels, AFFINE), tmp_path / "in" / "a.nii.gz")
    folders = tuple(str(run) for run in runs)
    paths = {"input": str(tmp_path / "in"), "accelerator": "cpu", "num_threads": 1}
    (written,) = api.predict(PredictConfig(run_dir=folders, output=str(tmp_path / "out"), **paths))  # type: ignore[arg-type]
    label = nib.load(written)
    np.testing.assert_array_equal(label.affine, nib.load(tmp_path / "in" / "a.nii.gz").affine)
    expected = expected_label(runs, read_volume(tmp_path / "in" / "a.nii.gz"))
    assert (read_volume(written).array[0] == expected).mean() > 0.9999
    (again,) = api.predict(PredictConfig(run_dir=folders[0], output=str(tmp_path / "one"), **paths))  # type: ignore[arg-type]
    assert not np.array_equal(np.asarray(nib.load(again).dataobj), np.asarray(label.dataobj))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"background": 0, "organ_1": 4, "organ_3": 7}}, "classes .*organ_3.*, there .*organ_2"),
        ({"labels": {"background": 0, "organ_2": 7, "organ_1": 4}}, "order of the classes"),
        ({"channels": (ChannelPlan(name="T2", scheme="none"),)}, r"channels \['T2'\], there \['T1'\]"),
        ({"channels": (ChannelPlan(name="T1", scheme="zscore"),)}, "normalisation of T1 .*zscore.*, there .*none"),
        ({"target_spacing": (1.0, 1.0, 2.0)}, r"target spacing \(1.0, 1.0, 2.0\), there \(1.0, 1.0, 1.0\)"),
        ({"anisotropic_axis": 2}, "anisotropic axis 2, there None"),
    ],
)
def test_runs_that_do_not_fit_are_refused_with_the_difference(
    make_plan: MakePlan, make_run: MakeRun, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    run_dirs = [make_run(make_plan(), name="first"), make_run(make_plan(**change), name="second")]
    config = PredictConfig(
        run_dir=tuple(map(str, run_dirs)), input=str(tmp_path), output=str(tmp_path / "out"), num_threads=1
    )
    (tmp_path / "a.nii.gz").write_bytes(b"never read")
    with pytest.raises(InputError, match=f"second: does not go with .*first: {message}") as caught:
        api.predict(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_run_without_checkpoint_among_several_is_named_before_anything_is_loaded(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (runs[1] / "checkpoints" / "best.ckpt").unlink()
    monkeypatch.setattr("pipeline.inference.runs.read_weights", lambda path: pytest.fail("was read"))
    with pytest.raises(InputError, match=r"fold_1: the run has no checkpoint best\.ckpt\. Train the run first"):
        load_runs(runs, ON_CPU)


def test_a_network_of_the_users_own_takes_the_weights_of_every_run(make_plan: MakePlan, make_run: MakeRun) -> None:
    plan, own = make_plan(), nn.Conv3d(1, 3, 1)
    run_dirs = [make_run(plan, name=f"own_{value}") for value in range(3)]
    for value, run_dir in enumerate(run_dirs):
        state = {f"network.{key}": torch.full_like(tensor, value) for key, tensor in own.state_dict().items()}
        torch.save({"state_dict": state}, run_dir / "checkpoints" / "best.ckpt")
    members = load_runs(run_dirs, ON_CPU, network=own).members
    assert [member.network.state_dict()["bias"][0].item() for member in members] == [0, 1, 2]


def test_runs_of_different_precisions_are_computed_in_float32(
    runs: list[Path], record_of: Callable[..., RunRecord]
) -> None:
    write_artifact(runs[0] / "run.json", record_of(precision="bf16-mixed"))
    assert load_runs(runs, ON_CPU).precision == "32-true"


def test_every_run_mirrors_the_axes_that_it_was_trained_with_unless_axes_are_chosen(
    make_plan: MakePlan, make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    run_dirs = [
        make_run(make_plan(), name=f"mirrored_{axis}", config={"augmentation": {"mirror_axes": [axis, 2]}})
        for axis in (0, 1)
    ]
    options = replace(ON_CPU, tta="mirror")
    assert [member.tta_axes for member in load_runs(run_dirs, options).members] == [(0, 2), (1, 2)]
    with caplog.at_level(logging.WARNING):
        chosen = load_runs(run_dirs, replace(options, tta_axes=(2, 0)))
    assert [member.tta_axes for member in chosen.members] == [(0, 2), (0, 2)]
    assert "mirrored_1 was trained without mirroring axis 0" in caplog.text
    assert "mirrored_0" not in caplog.text


def test_chosen_axes_are_the_mean_over_their_mirrored_inputs(runs: list[Path]) -> None:
    predictor = api.load_predictor(runs[0], replace(ON_CPU, tta="mirror", tta_axes=(1,)))
    image = torch.randn(1, 12, 16, 8, generator=torch.Generator().manual_seed(0))
    network = predictor.network
    with torch.inference_mode():
        mean = (network(image[None]) + network(image.flip(2)[None]).flip(3))[0] / 2
    torch.testing.assert_close(predictor.predict_scores(image), mean, rtol=1e-5, atol=1e-5)


def test_held_out_cases_of_several_runs_are_those_that_none_was_trained_on(runs: list[Path]) -> None:
    folds = tuple(Fold(train=(), validation=validation) for validation in (("a", "b", "c"), ("d", "e")))
    for run_dir, fold in zip(runs, (0, 0, 1), strict=True):
        write_artifact(run_dir / "splits.json", Splits(folds=folds, seed=0))
        (run_dir / "config.yaml").write_text(f"fold: {fold}\n")
    other = (Fold(train=(), validation=("c", "x", "a")), folds[1])
    write_artifact(runs[1] / "splits.json", Splits(folds=other, seed=0))
    assert read_held_out_by_all(runs[:1]) == ("a", "b", "c")
    assert read_held_out_by_all(runs[:2]) == ("a", "c")
    with pytest.raises(InputError, match="no case was held out by all of the runs"):
        read_held_out_by_all(runs)


# ---- post-processing

KEEP = (Step(class_name="organ_1", value=4, kind="keep_largest"),)
FILL = (Step(class_name="organ_2", value=7, kind="fill_holes"),)


def choose(run_dirs: list[Path], steps: tuple[Step, ...]) -> None:
    for run_dir in run_dirs:
        write_artifact(RunFiles(run_dir).postprocessing, Postprocessing(steps=steps, min_gain=0.0, case_ids=()))


def test_what_was_chosen_for_all_runs_is_done_to_the_segmentation_unless_switched_off(runs: list[Path]) -> None:
    volume = volume_of()
    plain = api.predict_volume(runs, volume, ON_CPU).array
    choose(runs, KEEP)
    expected = apply_postprocessing(plain[0], KEEP, volume.spacing)
    assert not np.array_equal(expected, plain[0])
    np.testing.assert_array_equal(api.predict_volume(runs, volume, ON_CPU).array[0], expected)
    off = replace(ON_CPU, postprocess="none")
    np.testing.assert_array_equal(api.predict_volume(runs, volume, off).array, plain)


@pytest.mark.parametrize(("chosen", "word"), [((KEEP, None, KEEP), "fold_1 without"), ((KEEP, FILL, KEEP), "differ")])
def test_what_was_not_chosen_for_all_runs_is_left_out_with_a_warning(
    runs: list[Path],
    chosen: tuple[tuple[Step, ...] | None, ...],
    word: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for run_dir, steps in zip(runs, chosen, strict=True):
        if steps is not None:
            choose([run_dir], steps)
    with caplog.at_level(logging.WARNING):
        assert load_runs(runs, ON_CPU).postprocessing == ()
    assert word in caplog.text
    assert "voxfit postprocess" in caplog.text
    assert load_runs(runs[:1], ON_CPU).postprocessing == KEEP


def test_a_broken_choice_ends_the_prediction_before_it_begins(runs: list[Path]) -> None:
    choose(runs, KEEP)
    RunFiles(runs[2]).postprocessing.write_text("{")
    with pytest.raises(InputError, match=r"postprocessing\.json: is not valid JSON"):
        load_runs(runs, ON_CPU)
    assert load_runs(runs, replace(ON_CPU, postprocess="none")).postprocessing == ()


def test_networks_are_put_into_evaluation_mode_and_are_those_of_their_runs(runs: list[Path]) -> None:
    loaded = load_runs(runs, ON_CPU)
    members, plan = loaded.members, loaded.plan
    assert [member.window for member in members] == [(12, 16, 8), (12, 16, 8), (8, 12, 16)]
    for seed, member in enumerate(members):
        torch.manual_seed(seed)
        expected = UNet(1, 3, plan.network).state_dict()
        assert not member.network.training
        assert all(torch.equal(value, expected[key]) for key, value in member.network.state_dict().items())
