"""Probabilities and uncertainty beside the segmentation, against what follows from whole volumes of scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.inference import prediction_bytes
from pipeline.inference.case_files import predict_files
from pipeline.inference.ensemble import Member
from pipeline.inference.export_formats import OutputFormat, output_files
from pipeline.inference.inputs import find_inputs
from pipeline.inference.outputs import OutputRequest
from pipeline.inference.predictor import Predictor
from pipeline.io.nifti import read_volume
from pipeline.io.probabilities import read_probabilities
from pipeline.io.volume import Volume
from pipeline.plan import Plan
from pipeline.preprocessing.preprocess import prepare_image
from pipeline.preprocessing.resample import resample_scores
from pipeline.preprocessing.restore import ScoreReducer
from pipeline.preprocessing.score_resampling import ScoreResampling

MakePlan = Callable[..., Plan]
SHAPE = (23, 18, 14)
# i runs to the left, the first axis of the file is k, and all is oblique: nothing is in RAS order.
AFFINE = np.array([[0.1, -1.2, 0.1, 9], [-0.1, 0.1, 1.4, -3], [0.9, 0.1, 0.1, 7], [0, 0, 0, 1.0]])
VALUES = np.array([0, 4, 7])
ALL: tuple[OutputFormat, ...] = ("nifti", "probabilities_blosc2", "entropy")


class Blurred(nn.Module):
    """Smooth scores of an image, other ones for every seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Conv3d(1, 3, 3, padding=1)
        nn.init.normal_(self.layer.weight, std=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several boxes per volume and several chunks of classes per box."""
    monkeypatch.setattr(prediction_bytes, "SLAB_BYTES", 20_000)
    monkeypatch.setattr(prediction_bytes, "CHUNK_BYTES", 4_000)


@pytest.fixture
def make_predictor(make_plan: MakePlan) -> Callable[..., Predictor]:
    """A predictor of one or several networks on a plan of another spacing than the image's."""

    def make(num_networks: int, tta_axes: tuple[int, ...] = ()) -> Predictor:
        plan = make_plan(spacing=(1.0, 1.3, 1.1))
        predictor = Predictor(Blurred(0), plan, tta_axes=tta_axes)
        windows = [(12, 16, 8), (8, 12, 16), (12, 16, 8)]
        predictor.members = tuple(Member(Blurred(seed).eval(), windows[seed], tta_axes) for seed in range(num_networks))
        return predictor

    return make


def write_image(folder: Path, name: str = "a") -> Path:
    """Noise with a margin of zeros that is cropped away."""
    folder.mkdir(exist_ok=True)
    voxels = np.zeros(SHAPE, np.float32)
    voxels[3:20, 2:, :11] = np.random.default_rng(0).normal(size=(17, 16, 11))
    nib.save(nib.Nifti1Image(voxels, AFFINE), folder / f"{name}.nii.gz")
    return folder / f"{name}.nii.gz"


def native_probabilities(predictor: Predictor, volume: Volume) -> np.ndarray:
    """(K, I, J, K) in float64: of a single network softmax after resampling, of several the mean before."""
    prepared = prepare_image(volume, predictor.plan)
    scores = predictor.reduce(prepared, lambda: ScoreReducer(prepared.native_grid.shape, 3)).scores.astype(np.float64)
    probabilities = scipy.special.softmax(scores, axis=0) if len(predictor.members) == 1 else scores
    outside = np.ones(probabilities.shape[1:], bool)
    outside[tuple(slice(a, a + n) for a, n in zip(prepared.crop_start, prepared.crop_shape, strict=True))] = False
    probabilities[:, outside] = np.array([1.0, 0, 0])[:, None]
    return probabilities


@pytest.mark.parametrize("num_networks", [1, 3])
@pytest.mark.parametrize("kind", ["probabilities_nifti", "probabilities_blosc2"])
def test_probabilities_of_all_classes_lie_on_the_native_grid_and_agree_with_the_labels(
    make_predictor: Callable[..., Predictor], tmp_path: Path, num_networks: int, kind: OutputFormat
) -> None:
    predictor, image = make_predictor(num_networks), write_image(tmp_path / "in")
    label_path, path = predict_files(predictor, find_inputs(image), tmp_path / "out", formats=("nifti", kind))
    assert path.parent.name == "probabilities"
    volume, label, found = read_volume(image), read_volume(label_path), read_probabilities(path)
    expected = native_probabilities(predictor, volume)
    np.testing.assert_allclose(found.grid.affine, volume.grid.affine, atol=1e-5)
    np.testing.assert_allclose(found.array, expected, atol=1e-5 if kind == "probabilities_nifti" else 3e-4)
    np.testing.assert_allclose(found.array.astype(np.float64).sum(axis=0), 1, atol=1e-3)
    first, second = np.sort(found.array, axis=0)[-1], np.sort(found.array, axis=0)[-2]
    assert (first > second).mean() > 0.99
    highest = VALUES[found.array.argmax(axis=0)]
    np.testing.assert_array_equal(highest[first > second], label.array[0][first > second])
    assert len(np.unique(highest)) == 3
    some = read_probabilities(path, slice(1, 3))
    np.testing.assert_array_equal(some.array, found.array[1:3])


def test_a_nifti_of_probabilities_is_read_by_others_in_the_axes_of_the_image(
    make_predictor: Callable[..., Predictor], tmp_path: Path
) -> None:
    predictor, image = make_predictor(1), write_image(tmp_path / "in")
    (path,) = predict_files(predictor, find_inputs(image), tmp_path / "out", formats=("probabilities_nifti",))
    source, found = nib.load(image), nib.load(path)
    assert found.shape == (*SHAPE, 3)
    assert found.get_data_dtype() == np.uint16
    np.testing.assert_allclose(found.affine, source.affine, atol=1e-6)
    volume = read_volume(image)
    assert volume.source is not None
    expected = volume.source.order.from_ras(native_probabilities(predictor, volume))
    np.testing.assert_allclose(np.moveaxis(found.get_fdata(), -1, 0), expected, atol=1e-5)


@pytest.mark.parametrize("num_networks", [1, 2])
def test_the_entropy_is_that_of_the_probabilities_over_that_of_even_ones(
    make_predictor: Callable[..., Predictor], tmp_path: Path, num_networks: int
) -> None:
    predictor, image = make_predictor(num_networks), write_image(tmp_path / "in")
    path = predict_files(predictor, find_inputs(image), tmp_path / "out", formats=ALL)[-1]
    assert (path.parent.name, path.name) == ("uncertainty", "a.nii.gz")
    found = read_volume(path)
    expected = scipy.stats.entropy(native_probabilities(predictor, read_volume(image)), axis=0) / np.log(3)
    np.testing.assert_allclose(found.array[0], expected, atol=1e-5)
    assert nib.load(path).get_data_dtype() == np.float32
    assert expected.max() > 0.9
    assert expected.min() == 0


def test_the_variance_is_over_networks_and_mirrored_passes(
    make_predictor: Callable[..., Predictor], tmp_path: Path
) -> None:
    predictor, image = make_predictor(2, tta_axes=(0, 2)), write_image(tmp_path / "in")
    written = predict_files(predictor, find_inputs(image), tmp_path / "out", formats=("nifti", "variance"))
    found = read_volume(written[1])
    prepared = prepare_image(read_volume(image), predictor.plan)

    class Mirrored(nn.Module):
        def __init__(self, network: nn.Module, dims: tuple[int, ...]) -> None:
            super().__init__()
            self.network, self.dims = network, dims

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x.flip(self.dims)).flip(self.dims)

    passes = []
    for member in predictor.members:
        for dims in ((), (2,), (4,), (2, 4)):
            alone = make_predictor(1)
            alone.members = (Member(Mirrored(member.network, dims), member.window),)
            scores = alone.predict_scores(torch.from_numpy(prepared.array)).double()
            passes.append(scores.softmax(0).numpy())
    variance = np.var(passes, axis=0).mean(axis=0)
    i, j, k = (slice(a, a + n) for a, n in zip(prepared.crop_start, prepared.crop_shape, strict=True))
    expected = np.zeros(found.grid.shape)
    expected[i, j, k] = resample_scores(variance[None].astype(np.float32), prepared.crop_shape, anisotropic_axis=None)[
        0
    ]
    np.testing.assert_allclose(found.array[0], expected, atol=1e-6)
    assert expected.max() > 0.01
    plain = predict_files(predictor, find_inputs(image), tmp_path / "plain")
    same = read_volume(written[0]).array == read_volume(plain[0]).array
    assert same.mean() > 0.9999


@pytest.mark.parametrize("num_networks", [1, 2])
def test_whatever_is_written_beside_it_the_segmentation_is_the_same(
    make_predictor: Callable[..., Predictor], tmp_path: Path, num_networks: int
) -> None:
    predictor, image = make_predictor(num_networks), write_image(tmp_path / "in")
    plain, all_of_it = (
        predict_files(predictor, find_inputs(image), tmp_path / name, formats=formats)[0]
        for name, formats in (("plain", ("nifti",)), ("all", ALL))
    )
    assert plain.read_bytes() == all_of_it.read_bytes()


def test_a_prediction_that_begins_anew_keeps_nothing_of_the_first_try(
    make_predictor: Callable[..., Predictor], tmp_path: Path
) -> None:
    class FailsOnce(Blurred):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().forward(x)

    image = write_image(tmp_path / "in")
    expected = predict_files(make_predictor(2), find_inputs(image), tmp_path / "expected", formats=ALL)
    again = make_predictor(2)
    again.members = (again.members[0], Member(FailsOnce(1).eval(), again.members[1].window))
    written = predict_files(again, find_inputs(image), tmp_path / "out", formats=ALL)
    for read, path, wanted in zip((read_probabilities, read_volume), written[1:], expected[1:], strict=True):
        np.testing.assert_allclose(read(path).array, read(wanted).array, atol=5e-4, rtol=0)


def test_nothing_is_left_of_a_case_that_fails_half_way(
    make_predictor: Callable[..., Predictor], tmp_path: Path
) -> None:
    class Broken(Blurred):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * (float("nan") if self.calls > 2 else 1)

    image, predictor = write_image(tmp_path / "in"), make_predictor(2)
    predictor.members = (predictor.members[0], Member(Broken(1).eval(), (12, 16, 8)))
    with pytest.raises(InputError, match="not finite"):
        predict_files(predictor, find_inputs(image), tmp_path / "out", formats=ALL)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_a_variance_of_one_network_is_refused_and_nothing_is_written(
    make_predictor: Callable[..., Predictor], tmp_path: Path
) -> None:
    image = write_image(tmp_path / "in")
    with pytest.raises(InputError, match="a variance is over several networks"):
        predict_files(make_predictor(1), find_inputs(image), tmp_path / "out", formats=("nifti", "variance"))
    assert list((tmp_path / "out").iterdir()) == []


def test_only_what_is_missing_is_written_when_more_is_asked_for_later(
    make_predictor: Callable[..., Predictor], tmp_path: Path
) -> None:
    predictor, image = make_predictor(1), write_image(tmp_path / "in")
    predict_files(predictor, find_inputs(image), tmp_path / "out")
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"mine")
    predict_files(predictor, find_inputs(image), tmp_path / "out", formats=ALL)
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == b"mine"
    assert all(path.is_file() for path in output_files("a", tmp_path / "out", ALL).values())


def test_the_buffers_of_probabilities_count_towards_the_memory(make_predictor: Callable[..., Predictor]) -> None:
    predictor, resampling = make_predictor(1), ScoreResampling((64, 64, 64), (64, 64, 64))
    request = OutputRequest.of({"entropy": Path("x")}, gives_probabilities=False)
    plain, more = predictor.plan_memory(resampling), predictor.plan_memory(resampling, request=request)
    assert more.parts["slab"] - plain.parts["slab"] == 4 * (3 + 4) * plain.rows * 64 * 64
    assert OutputRequest.of({"nifti": Path("x")}, gives_probabilities=False).num_buffered(3) == 0
