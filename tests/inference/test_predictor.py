from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.artifacts import write_artifact
from pipeline.config import PredictOptions
from pipeline.datasets.dataset import Case
from pipeline.errors import CasesFailedError, InputError
from pipeline.inference.case_files import predict_files
from pipeline.inference.inputs import find_inputs
from pipeline.inference.predictor import Predictor
from pipeline.io.volume import Volume
from pipeline.plan import ChannelPlan, Plan, Rung
from pipeline.preprocessing.restore import restore_label
from pipeline.run_record import Counts, RunRecord, StepDown
from pipeline.synthetic import SyntheticCase, make_synthetic_case

SHAPE, SPACING = (26, 21, 17), (1.0, 1.2, 1.7)
INTENSITIES = (100.0, 300.0, 500.0)
ON_CPU = PredictOptions(accelerator="cpu", num_threads=1)


class NearestIntensity(nn.Module):
    """Logits that prefer the class whose known intensity is nearest: a network whose right answer is known."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([-((x - value).abs() / 10) for value in INTENSITIES], dim=1)


class Overflowing(NearestIntensity):
    """Beyond the range of float16 under autocast, finite in float32."""

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x) * 1e6
        return scores.half() if torch.is_autocast_enabled("cpu") else scores


def truth(case: SyntheticCase) -> np.ndarray:
    """(I, J, K) class values of the plan, in RAS order."""
    return np.array([0, 4, 7], np.uint8)[case.label.array[0]]


def write_case(folder: Path, case_id: str, *, seed: int = 0, axis_codes: str = "LPS") -> SyntheticCase:
    """An image file whose intensities tell the class, in an axis order of its own, written with nibabel alone."""
    case = make_synthetic_case(seed, shape=SHAPE, spacing=SPACING, num_classes=3, axis_codes=axis_codes)
    assert case.label.source is not None
    source = case.label.source
    voxels = source.order.from_ras(np.array(INTENSITIES, np.float32)[case.label.array[0]])
    folder.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, source.grid.affine)
    image.set_sform(source.grid.affine, code=4)
    nib.save(image, folder / f"{case_id}.nii.gz")
    return case


def test_files_come_back_on_their_own_grid_with_the_right_classes(
    tmp_path: Path, make_plan: Callable[..., Plan]
) -> None:
    predictor = Predictor(NearestIntensity(), make_plan(spacing=SPACING))
    expected = {
        f"case_{codes}": write_case(tmp_path / "in", f"case_{codes}", seed=seed, axis_codes=codes)
        for seed, codes in enumerate(("RAS", "LPS", "PSR"))
    }
    written = predict_files(predictor, find_inputs(tmp_path / "in"), tmp_path / "out")
    assert sorted(path.name for path in written) == sorted(f"{case_id}.nii.gz" for case_id in expected)
    for case_id, case in expected.items():
        image = nib.load(tmp_path / "in" / f"{case_id}.nii.gz")
        label = nib.load(tmp_path / "out" / f"{case_id}.nii.gz")
        np.testing.assert_array_equal(label.affine, image.affine)
        assert label.header["sform_code"] == 4
        assert case.label.source is not None
        np.testing.assert_array_equal(np.asarray(label.dataobj), case.label.source.order.from_ras(truth(case)))


def test_a_plan_of_another_spacing_comes_back_to_the_native_grid(make_plan: Callable[..., Plan]) -> None:
    case = make_synthetic_case(1, shape=SHAPE, spacing=SPACING, num_classes=3)
    image = Volume(np.array(INTENSITIES, np.float32)[case.label.array], case.label.grid)
    label = Predictor(NearestIntensity(), make_plan(spacing=(1.3, 1.0, 1.4))).predict(image)
    assert label.grid is image.grid
    assert (label.array[0] == truth(case)).mean() > 0.95
    assert set(np.unique(label.array)) == {0, 4, 7}


def test_a_volume_below_the_window_is_segmented(make_plan: Callable[..., Plan]) -> None:
    array = np.full((1, 3, 20, 5), INTENSITIES[2], np.float32)
    label = Predictor(NearestIntensity(), make_plan()).predict(Volume.from_array(array, np.eye(4)))
    assert label.array.shape == (1, 3, 20, 5)
    assert (label.array == 7).all()


def test_a_run_predicts_as_its_network_does(make_plan: Callable[..., Plan], make_run: Callable[..., Path]) -> None:
    predictor = Predictor.from_runs([make_run(make_plan())], ON_CPU)
    assert not predictor.network.training
    assert next(predictor.network.parameters()).shape[0] == 4
    image = torch.randn(1, 12, 16, 8)
    with torch.inference_mode():
        expected = predictor.network(image[None])[0]
    torch.testing.assert_close(predictor.predict_scores(image), expected)


def test_a_run_that_stepped_down_predicts_with_the_patch_that_it_came_to(
    make_plan: Callable[..., Plan], make_run: Callable[..., Path], record_of: Callable[..., RunRecord]
) -> None:
    run_dir = make_run(make_plan())
    whole = Predictor.from_runs([run_dir], ON_CPU)
    before, after = Rung(patch_size=(12, 16, 8)), Rung(patch_size=(8, 12, 8), slab_stages=1, offload_stages=1)
    counts = {"counts": Counts(), "continued_from": Counts()}
    step_down = StepDown(where="forward", **counts, from_rung=before, to_rung=after, fallback=1)
    write_artifact(run_dir / "run.json", record_of(patch_size=after.patch_size, step_downs=(step_down,)))
    stepped_down = Predictor.from_runs([run_dir], ON_CPU)
    assert whole.plan.patch_size == (12, 16, 8)
    assert (stepped_down.plan.patch_size, stepped_down.plan.slab_stages) == ((8, 12, 8), 1)
    assert (stepped_down.network.slab_stages, stepped_down.network.offload_stages) == (1, 1)


def test_averaged_weights_are_taken_where_the_checkpoint_has_them(
    make_plan: Callable[..., Plan], make_run: Callable[..., Path]
) -> None:
    run_dir = make_run(make_plan())
    path = run_dir / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    averaged = {key.removeprefix("network."): value + 1 for key, value in content["state_dict"].items()}
    torch.save({**content, "ema_state_dict": averaged}, path)
    predictor = Predictor.from_runs([run_dir], ON_CPU)
    for key, value in predictor.network.state_dict().items():
        torch.testing.assert_close(value, averaged[key])


def test_a_network_of_the_users_own_is_loaded(make_plan: Callable[..., Plan], make_run: Callable[..., Path]) -> None:
    plan = make_plan()
    run_dir = make_run(plan)
    own = nn.Conv3d(1, 3, 1)
    state = {f"network.{key}": torch.full_like(value, 2.0) for key, value in own.state_dict().items()}
    torch.save({"state_dict": state}, run_dir / "checkpoints" / "best.ckpt")
    predictor = Predictor.from_runs([run_dir], ON_CPU, network=own)
    assert predictor.network is own
    assert (own.bias == 2).all()


def test_outputs_that_exist_are_kept_unless_overwritten(tmp_path: Path, make_plan: Callable[..., Plan]) -> None:
    write_case(tmp_path / "in", "a")
    predictor, cases = Predictor(NearestIntensity(), make_plan()), find_inputs(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"mine")
    assert predict_files(predictor, cases, tmp_path / "out") == [tmp_path / "out" / "a.nii.gz"]
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == b"mine"
    predict_files(predictor, cases, tmp_path / "out", overwrite=True)
    assert nib.load(tmp_path / "out" / "a.nii.gz").shape == SHAPE


def test_a_bad_case_is_listed_and_the_rest_is_done(tmp_path: Path, make_plan: Callable[..., Plan]) -> None:
    for name in ("a", "b", "c"):
        write_case(tmp_path / "in", name)
    torn = tmp_path / "in" / "b.nii.gz"
    torn.write_bytes(torn.read_bytes()[:-400])
    with pytest.raises(CasesFailedError) as caught:
        predict_files(Predictor(NearestIntensity(), make_plan()), find_inputs(tmp_path / "in"), tmp_path / "out")
    assert list(caught.value.failures) == ["b"]
    assert caught.value.exit_code == 3
    assert sorted(path.name for path in (tmp_path / "out").glob("*.*")) == ["a.nii.gz", "c.nii.gz"]
    assert caught.value.result == [tmp_path / "out" / "a.nii.gz", tmp_path / "out" / "c.nii.gz"]


def test_a_wrong_number_of_channels_is_one_clear_line(tmp_path: Path, make_plan: Callable[..., Plan]) -> None:
    write_case(tmp_path / "in", "a")
    channels = tuple(ChannelPlan(name=name, scheme="none") for name in ("T1", "T2"))
    predictor = Predictor(NearestIntensity(), make_plan(channels=channels))
    with pytest.raises(InputError, match=r"has 1 channel\(s\), the network takes 2 \(T1, T2\)") as caught:
        predict_files(predictor, find_inputs(tmp_path / "in"), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").glob("*.*")) == []


def test_an_output_that_cannot_be_written_stops_before_the_work(tmp_path: Path, make_plan: Callable[..., Plan]) -> None:
    (tmp_path / "out").write_text("a file")
    missing = Case(case_id="never_read", images=(tmp_path / "none.nii.gz",), label=None)
    with pytest.raises(InputError, match="out: cannot be written to"):
        predict_files(Predictor(NearestIntensity(), make_plan()), [missing], tmp_path / "out")


def test_a_run_without_the_checkpoint_says_which_it_has(
    make_plan: Callable[..., Plan], make_run: Callable[..., Path]
) -> None:
    run_dir = make_run(make_plan())
    with pytest.raises(InputError, match=r"no checkpoint last\.ckpt\. Use --checkpoint best"):
        Predictor.from_runs([run_dir], replace(ON_CPU, checkpoint="last"))
    (run_dir / "checkpoints" / "best.ckpt").unlink()
    fold = make_run(make_plan(), name="work/fold_2")
    write_artifact(fold.parent / "plan.json", make_plan())
    with pytest.raises(InputError, match=rf"is a work folder, .*Use {fold}$"):
        Predictor.from_runs([fold.parent], ON_CPU)
    with pytest.raises(InputError, match=r"no checkpoint best\.ckpt\. Train the run first"):
        Predictor.from_runs([run_dir], ON_CPU)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run folder"):
        Predictor.from_runs([tmp_path], ON_CPU)


def test_a_checkpoint_of_other_classes_is_one_clear_line(
    make_plan: Callable[..., Plan], make_run: Callable[..., Path]
) -> None:
    with pytest.raises(InputError, match="another number of classes") as caught:
        Predictor.from_runs([make_run(make_plan(), num_classes=5)], ON_CPU)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_network_names_the_first_difference(
    make_plan: Callable[..., Plan], make_run: Callable[..., Path]
) -> None:
    with pytest.raises(InputError, match=r"it lacks bias \(2 missing and \d+ more\)"):
        Predictor.from_runs([make_run(make_plan())], ON_CPU, network=nn.Conv3d(1, 3, 1))


def test_mirroring_follows_what_training_did(make_plan: Callable[..., Plan], make_run: Callable[..., Path]) -> None:
    run_dir = make_run(make_plan(), config={"augmentation": {"mirror_axes": [1, 2]}})
    mirrored = Predictor.from_runs([run_dir], replace(ON_CPU, tta="mirror"))
    assert mirrored.tta_axes == (1, 2)
    assert Predictor.from_runs([run_dir], ON_CPU).tta_axes == ()
    write_artifact(run_dir / "plan.json", replace(make_plan(), mirror_axes=(0,)))
    (run_dir / "config.yaml").write_text("augmentation: {mirror_axes: auto}")
    assert Predictor.from_runs([run_dir], replace(ON_CPU, tta="mirror")).tta_axes == (0,)
    (run_dir / "config.yaml").write_text("augmentation: {mirror: 0.0}")
    with pytest.raises(InputError, match="trained without mirroring"):
        Predictor.from_runs([run_dir], replace(ON_CPU, tta="mirror"))


def test_values_that_overflow_in_16_bits_are_computed_again_in_float32(make_plan: Callable[..., Plan]) -> None:
    predictor = Predictor(Overflowing(), make_plan(), precision="bf16-mixed")
    image = torch.full((1, 12, 16, 8), INTENSITIES[1])
    assert (predictor.predict_scores(image).argmax(0) == 1).all()


def test_values_that_are_never_finite_are_an_error(make_plan: Callable[..., Plan]) -> None:
    network = nn.Conv3d(1, 3, 1)
    nn.init.constant_(network.weight, float("nan"))
    with pytest.raises(InputError, match="not finite"):
        Predictor(network, make_plan()).predict_scores(torch.zeros(1, 12, 16, 8))


def test_a_real_hippocampus_comes_back_on_its_grid(
    shared_data: Path, tmp_path: Path, make_plan: Callable[..., Plan], make_run: Callable[..., Path]
) -> None:
    image = sorted((shared_data / "hippocampus" / "imagesTr").glob("hippocampus_*.nii.gz"))[0]
    plan = make_plan(channels=(ChannelPlan(name="MR", scheme="zscore"),), precision="auto")
    predictor = Predictor.from_runs([make_run(plan)], ON_CPU)
    (path,) = predict_files(predictor, find_inputs(image), tmp_path / "out")
    source, label = nib.load(image), nib.load(path)
    assert label.shape == source.shape
    np.testing.assert_array_equal(label.affine, source.affine)
    assert set(np.unique(label.dataobj)) <= {0, 4, 7}
    assert gzip.decompress(path.read_bytes())


@pytest.mark.parametrize("num_runs", [1, 2])
def test_scores_and_the_way_back_in_two_steps_give_the_label(
    make_plan: Callable[..., Plan], make_run: Callable[..., Path], num_runs: int
) -> None:
    plan = make_plan(spacing=(1.2, 1.0, 1.1))
    runs = [make_run(plan, name=f"run_{number}", seed=number) for number in range(num_runs)]
    predictor = Predictor.from_runs(runs, ON_CPU)
    voxels = np.random.default_rng(0).normal(size=(1, 19, 27, 14)).astype(np.float32)
    volume = Volume.from_array(voxels, np.array([[0.9, 0.2, 0, 1], [-0.2, 1.1, 0, 2], [0, 0, 1.4, 3], [0, 0, 0, 1]]))
    prepared = predictor.prepare(volume)
    scores = predictor.predict_scores(torch.from_numpy(prepared.array)).numpy()
    label = restore_label(scores, prepared, predictor.plan)
    np.testing.assert_array_equal(label, predictor.predict(volume).array[0])
    assert len(np.unique(label)) > 1
