from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline.artifacts import read_artifact, write_artifact
from pipeline.datasets.dataset import read_dataset
from pipeline.datasets.examination import examine_cases
from pipeline.datasets.fingerprint import Fingerprint, make_fingerprint
from pipeline.errors import CasesFailedError, InputError

Save = Callable[..., Path]
SHAPE = (9, 7, 5)


def _arrays(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    image, label = (nib.load(folder / f"{part}Tr/{name}.nii.gz") for part in ("images", "labels"))
    return np.asarray(image.dataobj, np.float64), np.asarray(label.dataobj)


def test_statistics_are_those_of_all_foreground_voxels(msd: Path) -> None:
    values = np.concatenate([image[label > 0] for image, label in (_arrays(msd, name) for name in "abcd")])
    (channel,) = make_fingerprint(read_dataset(msd), num_workers=1).channels
    expected = [*np.percentile(values, [0.5, 99.5]), values.mean(), values.std(), values.min(), values.max()]
    found = [channel.lower, channel.upper, channel.mean, channel.std, channel.minimum, channel.maximum]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_sizes_are_those_of_the_files_in_ras_order(msd: Path, save: Save) -> None:
    image, label = _arrays(msd, "a")
    image[:2], image[:, -1:], image[:, :, :1] = 0, 0, 0
    path = save(msd / "imagesTr/a.nii.gz", image)
    turned = nib.load(path).as_reoriented([[1, -1], [2, 1], [0, -1]])
    nib.save(turned, path)
    fingerprint = make_fingerprint(read_dataset(msd), num_workers=1)
    case = fingerprint.cases[0]
    assert (case.shape, case.cropped_shape) == (SHAPE, (7, 6, 4))
    np.testing.assert_allclose(case.spacing, (0.8, 1.1, 2.5), atol=1e-6)
    assert case.voxels_by_class == tuple(np.bincount(label.ravel(), minlength=3))


def test_ignored_voxels_are_neither_a_class_nor_foreground(msd: Path, save: Save) -> None:
    image, label = _arrays(msd, "a")
    image[label == 2] = 1e6
    save(msd / "imagesTr/a.nii.gz", image)
    dataset = read_dataset(msd)
    ignoring = replace(dataset, labels={"background": 0, "x": 1}, ignore_value=2, cases=dataset.cases[:1])
    fingerprint = make_fingerprint(ignoring, num_workers=1)
    assert fingerprint.channels[0].maximum == image[label == 1].max()
    assert fingerprint.cases[0].voxels_by_class == tuple(np.bincount(label.ravel())[:2])


def test_a_large_case_is_sampled_so_that_it_does_not_outweigh_the_others(msd: Path, save: Save) -> None:
    shape = (40, 38, 36)
    rng = np.random.default_rng(5)
    for name, level in (("a", 0.0), ("b", 1000.0)):
        save(msd / f"imagesTr/{name}.nii.gz", rng.normal(level, 1, shape).astype(np.float32))
    save(msd / "labelsTr/a.nii.gz", np.ones(shape, np.uint8))
    half = np.zeros(shape, np.uint8)
    half[:20] = 1
    save(msd / "labelsTr/b.nii.gz", half)
    dataset = read_dataset(msd)
    dataset = replace(dataset, cases=dataset.cases[:2])
    first, second = (make_fingerprint(dataset, num_workers=1) for _ in range(2))
    assert first == second
    # 54,720 and 27,360 foreground voxels give 10,000 each, so the mean lies half way.
    assert first.channels[0].mean == pytest.approx(500, abs=0.1)
    assert examine_cases(dataset, num_workers=1)[0].measured.foreground.shape == (1, 10_000)  # type: ignore[union-attr]


def test_the_extremes_are_of_every_voxel_not_only_of_the_sample(msd: Path, save: Save) -> None:
    voxels = np.zeros((40, 38, 36), np.float32)
    voxels[17, 23, 5], voxels[18, 3, 30] = 777, -555
    save(msd / "imagesTr/a.nii.gz", voxels)
    save(msd / "labelsTr/a.nii.gz", np.ones(voxels.shape, np.uint8))
    (channel,) = make_fingerprint(read_dataset(msd), num_workers=1).channels
    assert (channel.minimum, channel.maximum) == (-555, 777)


def test_cases_left_out_are_recorded_and_not_read(msd: Path) -> None:
    (msd / "imagesTr/b.nii.gz").write_bytes(b"torn")
    dataset = read_dataset(msd)
    fingerprint = make_fingerprint(dataset, num_workers=1, leave_out={"b": "is torn"})
    assert [case.case_id for case in fingerprint.cases] == ["a", "c", "d"]
    assert fingerprint.left_out == {"b": "is torn"}
    examined = examine_cases(dataset, num_workers=1)
    again = make_fingerprint(dataset, num_workers=1, leave_out={"b": "is torn"}, examined=examined)
    assert again == fingerprint


def test_all_cases_that_fail_are_named_at_once(msd: Path) -> None:
    for name in "bd":
        (msd / f"imagesTr/{name}.nii.gz").write_bytes(b"torn")
    with pytest.raises(CasesFailedError) as caught:
        make_fingerprint(read_dataset(msd), num_workers=1)
    assert set(caught.value.failures) == {"b", "d"}


def test_leaving_out_every_case_is_an_error(msd: Path) -> None:
    with pytest.raises(InputError, match="no case is left"):
        make_fingerprint(read_dataset(msd), num_workers=1, leave_out=dict.fromkeys("abcd", "no"))


def test_it_is_read_back_from_its_file_unchanged(msd: Path, tmp_path: Path) -> None:
    fingerprint = make_fingerprint(read_dataset(msd), num_workers=1, leave_out={"c": "why not"})
    write_artifact(tmp_path / "fingerprint.json", fingerprint)
    assert read_artifact(tmp_path / "fingerprint.json", Fingerprint) == fingerprint
    assert str(tmp_path) not in (tmp_path / "fingerprint.json").read_text()


def test_a_second_channel_is_measured_on_the_grid_of_the_first(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "sts/STS_001"
    row = ",".join(str(folder / f"{name}.nii.gz") for name in ("CT_image", "PET_image", "CT_mask"))
    (tmp_path / "sts.csv").write_text(f"case_id,image_CT,image_PET,label\nSTS_001,{row}\n")
    dataset = read_dataset(tmp_path / "sts.csv")
    (examined,) = examine_cases(dataset, num_workers=1)
    assert examined.problems == ()
    assert "resampled to channel 0" in examined.notes[0]
    fingerprint = make_fingerprint(dataset, num_workers=1, examined=[examined])
    # The tumour's SUV, against the PET's own mask on the PET's own grid.
    pet, mask = (np.asarray(nib.load(folder / f"PET_{name}.nii.gz").dataobj) for name in ("image", "mask"))
    assert fingerprint.channels[1].mean == pytest.approx(pet[mask > 0].mean(), rel=0.05)
