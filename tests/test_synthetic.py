"""Synthetic cases have the geometry they were asked for, and the committed samples are what the script writes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import label as connected_components

from pipeline.io.nifti import read_label, read_volume
from pipeline.synthetic import (
    make_synthetic_case,
    write_msd_dataset,
    write_nnunet_raw_dataset,
    write_table_dataset,
)

SHAPE = (30, 22, 16)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_classes", [2, 3, 6, 9])
def test_every_class_is_one_connected_organ_away_from_the_border(seed: int, num_classes: int):
    label = make_synthetic_case(seed, shape=SHAPE, num_classes=num_classes).label.array[0]
    assert sorted(np.unique(label)) == list(range(num_classes))
    for value in range(1, num_classes):
        assert connected_components(label == value)[1] == 1, value
    inner = label[1:-1, 1:-1, 1:-1]
    assert np.count_nonzero(inner) == np.count_nonzero(label)


def test_many_classes_fit_into_a_small_volume():
    label = make_synthetic_case(0, shape=(52, 44, 40), num_classes=61).label.array
    assert len(np.unique(label)) == 61


def test_classes_without_room_are_refused():
    with pytest.raises(ValueError, match="no room"):
        make_synthetic_case(0, shape=(12, 9, 7), num_classes=30)


@pytest.mark.parametrize("options", [{"num_channels": 5}, {"oblique_degrees": 60.0}, {"axis_codes": "RAA"}])
def test_arguments_out_of_range_are_refused(options: dict[str, object]):
    with pytest.raises(ValueError, match=r"out of range|name each direction once"):
        make_synthetic_case(0, **options)


def test_a_seed_decides_everything():
    first, again, other = (make_synthetic_case(seed, shape=SHAPE, num_channels=2) for seed in (4, 4, 5))
    assert first.image.array.tobytes() == again.image.array.tobytes()
    assert first.label.array.tobytes() == again.label.array.tobytes()
    assert not np.array_equal(first.label.array, other.label.array)
    assert not np.array_equal(first.image.array, other.image.array)


@pytest.mark.parametrize("degrees", [0.0, 12.0, -25.0])
def test_the_grid_is_a_rotation_of_the_asked_spacing(degrees: float):
    affine = make_synthetic_case(1, shape=SHAPE, spacing=(0.7, 1.1, 3.0), oblique_degrees=degrees).image.grid.affine
    rotation = affine[:3, :3] / [0.7, 1.1, 3.0]
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-9)
    assert np.degrees(np.arccos((np.trace(rotation) - 1) / 2)) == pytest.approx(abs(degrees), abs=1e-5)
    assert nib.aff2axcodes(affine) == ("R", "A", "S")
    centre = nib.affines.apply_affine(affine, (np.array(SHAPE) - 1) / 2)
    assert np.abs(centre).max() <= 20


@pytest.mark.parametrize("modality", ["mr", "ct"])
@pytest.mark.parametrize("channel", [0, 1])
def test_intensities_tell_the_classes_apart(modality: str, channel: int):
    case = make_synthetic_case(2, shape=SHAPE, num_channels=2, num_classes=4, modality=modality)
    image, label = case.image.array[channel], case.label.array[0]
    body = image[(label == 0) & (image != image[0, 0, 0])]
    means = [body.mean(), *(image[label == value].mean() for value in range(1, 4))]
    spread = max(body.std(), *(image[label == value].std() for value in range(1, 4)))
    assert min(np.diff(sorted(means))) > spread
    assert min(means) == means[0]
    assert means[1:] == sorted(means[1:], reverse=channel == 1)


def test_ct_is_in_hounsfield_units_with_air_around_the_body():
    image = make_synthetic_case(3, shape=SHAPE, modality="ct").image.array[0]
    label = make_synthetic_case(3, shape=SHAPE, modality="ct").label.array[0]
    assert image[0, 0, 0] == -1000
    assert abs(np.median(image[(label == 0) & (image > -1000)]) - 40) < 2


def test_mr_gain_differs_between_cases_so_that_it_must_be_normalised():
    medians = [np.median(make_synthetic_case(seed, shape=SHAPE).image.array) for seed in range(6)]
    assert max(medians) / min(medians) > 1.2


def test_intensities_are_whole_numbers_of_int16():
    image = make_synthetic_case(0, shape=SHAPE, num_channels=4, modality="ct").image.array
    np.testing.assert_array_equal(image, image.astype(np.int16))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "IAL"])
def test_files_lie_in_the_asked_axis_order_and_read_back_the_same(codes: str, tmp_path: Path):
    case = make_synthetic_case(6, shape=SHAPE, spacing=(1.0, 0.8, 2.0), num_channels=2, axis_codes=codes)
    folder = write_msd_dataset(tmp_path, {"case_1": case})
    image = read_volume(folder / "imagesTr" / "case_1.nii.gz")
    label = read_label(folder / "labelsTr" / "case_1.nii.gz")
    assert "".join(nib.aff2axcodes(nib.load(image.source.path).affine)) == codes
    np.testing.assert_array_equal(image.array, case.image.array)
    np.testing.assert_array_equal(label.array, case.label.array)
    assert image.grid.shape == label.grid.shape == case.image.grid.shape
    assert image.grid.distance_mm(case.image.grid) <= 1e-4
    assert label.grid.distance_mm(image.grid) <= 1e-6


def test_an_msd_dataset_describes_its_files(tmp_path: Path):
    cases = {f"case_{n}": make_synthetic_case(n, shape=SHAPE, num_channels=2) for n in range(3)}
    write_msd_dataset(tmp_path, cases, test_cases={"case_9": make_synthetic_case(9, shape=SHAPE, num_channels=2)})
    described = json.loads((tmp_path / "dataset.json").read_text())
    assert described["modality"] == {"0": "T1", "1": "T2"}
    assert described["labels"] == {"0": "background", "1": "organ_1", "2": "organ_2"}
    assert described["numTraining"] == len(described["training"]) == 3
    for pair in described["training"]:
        assert nib.load(tmp_path / pair["image"]).shape == (*SHAPE, 2)
        assert nib.load(tmp_path / pair["label"]).shape == SHAPE
    assert [nib.load(tmp_path / name).shape for name in described["test"]] == [(*SHAPE, 2)]


def test_an_nnunet_raw_dataset_has_one_file_per_channel(tmp_path: Path):
    case = make_synthetic_case(0, shape=SHAPE, num_channels=2)
    write_nnunet_raw_dataset(tmp_path, {"case_0": case}, test_cases={"case_1": case})
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.nii.gz"))
    assert names == [
        *(f"imagesTr/case_0_000{n}.nii.gz" for n in range(2)),
        *(f"imagesTs/case_1_000{n}.nii.gz" for n in range(2)),
        "labelsTr/case_0.nii.gz",
    ]
    described = json.loads((tmp_path / "dataset.json").read_text())
    assert described["labels"] == {"background": 0, "organ_1": 1, "organ_2": 2}
    assert described["channel_names"] == {"0": "T1", "1": "T2"}
    np.testing.assert_array_equal(read_volume(tmp_path / names[1]).array[0], case.image.array[1])


def test_a_table_names_files_and_patients(tmp_path: Path):
    cases = {f"case_{n}": make_synthetic_case(n, shape=SHAPE, modality="ct") for n in range(3)}
    table = write_table_dataset(tmp_path, cases, patients={"case_0": "p1", "case_1": "p1"})
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["patient"] for row in rows] == ["p1", "p1", "case_2"]
    for row in rows:
        assert (tmp_path / row["image_CT"]).is_file()
        assert (tmp_path / row["label"]).is_file()


def files_below(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sample_runs(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Path]]:
    """What two runs of the script write."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "again")]
    for folder in folders:
        subprocess.run([sys.executable, project_root / "scripts" / "make_data_samples.py", folder], check=True)
    return [files_below(folder) for folder in folders]


def test_the_script_writes_the_same_bytes_on_every_run(sample_runs: list[dict[str, Path]]):
    first, again = ({name: path.read_bytes() for name, path in run.items()} for run in sample_runs)
    assert first == again


def test_the_committed_samples_are_what_the_script_writes(project_root: Path, sample_runs: list[dict[str, Path]]):
    committed = files_below(project_root / "data_samples")
    assert set(committed) - {"README.md"} == set(sample_runs[0])
    for name, path in sample_runs[0].items():
        if not name.endswith(".nii.gz"):
            assert path.read_bytes() == committed[name].read_bytes(), name
            continue
        # Another zlib compresses to other bytes, and another LAPACK may round a quaternion's last digit otherwise.
        written, kept = nib.load(path), nib.load(committed[name])
        assert np.asarray(written.dataobj).tobytes() == np.asarray(kept.dataobj).tobytes(), name
        np.testing.assert_allclose(written.get_qform(), kept.get_qform(), atol=1e-5)
        np.testing.assert_array_equal(written.get_sform(), kept.get_sform())


def test_the_samples_stay_below_a_megabyte(project_root: Path):
    assert sum(path.stat().st_size for path in (project_root / "data_samples").rglob("*") if path.is_file()) < 1_000_000
