"""A tree of DICOM series as a dataset: the labels are the truth, voxel for voxel, and every choice is told."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest

from pipeline import api
from pipeline.cli import main
from pipeline.config import InspectConfig
from pipeline.datasets.case_reader import read_case_image, read_case_label
from pipeline.datasets.dataset import Dataset, read_dataset
from pipeline.datasets.dicom_classes import parse_classes
from pipeline.datasets.dicom_dataset import WrittenDataset
from pipeline.datasets.integrity import find_problems
from pipeline.errors import CasesFailedError, InputError
from pipeline.io.image_file import read_label, read_volume
from pipeline.io.volume import Volume
from pipeline.synthetic_dicom.faults import drop_slice, set_attribute


def write(tree: Path, out: Path, **options: Any) -> tuple[WrittenDataset, Dataset]:
    """What `voxfit inspect TREE --write_dataset OUT` made, and the dataset that it reads as."""
    found = api.inspect(InspectConfig(path=str(tree), write_dataset=str(out), num_workers=1, **options))
    assert found.written is not None
    return found.written, read_dataset(out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "set" / "thorax.json"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the project logs, also after a command has taken its log from the root logger."""
    logger = logging.getLogger("voxfit")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_labels_and_images_equal_the_truth_voxel_for_voxel(tmp_path: Path, out: Path, write_study: Any) -> None:
    studies = [write_study(tmp_path / "tree" / str(seed), seed=seed) for seed in range(2)]
    written, dataset = write(tmp_path / "tree", out)
    assert dataset.labels == {"background": 0, "GTV": 1, "Liver": 2}
    assert dataset.channel_names == ("CT",)
    assert (written.num_training, written.num_test, written.failures) == (2, 0, {})
    assert find_problems(dataset, num_workers=1) == ()
    truths = [(study.image.array, study.label) for study in studies]
    for case in dataset.cases:
        image, label = read_case_image(case), read_case_label(case)
        (truth,) = [truth for array, truth in truths if np.array_equal(array, image.array)]
        np.testing.assert_array_equal(label.array[0], truth)


@pytest.mark.parametrize("patient", ["STS_002", "STS_008"])
@pytest.mark.parametrize("kind", ["CT", "MR_T1", "PET"])
def test_real_contours_equal_the_masks_of_others(shared_data: Path, out: Path, patient: str, kind: str) -> None:
    folder = shared_data / "dicom" / "rtstruct_sts"
    _, dataset = write(folder / "dicom" / patient / kind, out)
    (case,) = dataset.cases
    mask = read_volume(folder / "nifti" / patient / f"{kind}_mask.nii.gz")
    image = read_volume(folder / "nifti" / patient / f"{kind}_image.nii.gz")
    label = read_case_label(case)
    assert label.array.any()
    assert label.grid.is_close(mask.grid)
    np.testing.assert_array_equal(label.array, mask.array)
    np.testing.assert_allclose(read_case_image(case).array, image.array, rtol=2e-6, atol=1e-3 if kind == "PET" else 0)


def test_a_real_segmentation_equals_its_nrrd(shared_data: Path, tmp_path: Path, out: Path) -> None:
    nrrd = pytest.importorskip("nrrd")
    folder = shared_data / "dicom" / "seg_dcmqi"
    shutil.copytree(folder / "ct-3slice", tmp_path / "tree" / "ct")
    shutil.copy(folder / "liver.dcm", tmp_path / "tree")
    _, dataset = write(tmp_path / "tree", out)
    truth, header = nrrd.read(str(folder / "liver_seg.nrrd"))
    label = read_case_label(dataset.cases[0])
    assert dataset.labels == {"background": 0, "Liver": 1}
    assert int((label.array == 1).sum()) == 107098
    flips = [slice(None, None, -1) if flip else slice(None) for flip in label.source.order.flipped]
    assert header["space"] == "left-posterior-superior"
    np.testing.assert_array_equal(label.array[0], truth[tuple(flips)])


def test_a_dicom_series_agrees_with_a_nifti_label_of_another_axis_order(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "many_labels_ct"
    label_file = folder / "example_seg_dicom.nii.gz"
    table = tmp_path / "cases.csv"
    series = os.path.relpath(folder / "example_ct_dicom", tmp_path)
    table.write_text(f"case_id,image,label\nct,{series},{os.path.relpath(label_file, tmp_path)}\n")
    (case,) = read_dataset(table).cases
    image, label = read_case_image(case), read_case_label(case)
    assert nib.aff2axcodes(nib.load(label_file).affine) == ("L", "A", "S")
    assert image.source is not None
    assert nib.aff2axcodes(image.source.grid.affine) == ("L", "P", "S")
    assert label.grid.is_close(image.grid)
    # Organs are denser than the air around: the label lies on the patient only where both axis orders are undone.
    assert np.median(image.array[label.array > 0]) > np.median(image.array[label.array == 0]) + 100


def write_both(tree: Path, write_study: Any, *, seed: int = 0, pet: int = 1, **options: Any) -> Any:
    """A study of a labelled CT and PET series of other spacing in one frame of reference."""
    study = write_study(tree / "ct", seed=seed, **options)
    for number in range(pet):
        write_study(
            tree / f"pt{number}",
            seed=100 * seed + number + 50,
            study_seed=seed,
            modality="PT",
            names=(),
            is_signed=False,
            shape=(9, 8, 10),
            patient=f"FAKE-{seed:04d}",
            series_description=f"PET {'AC' if number == 0 else 'NAC'}",
        )
    return study


def test_channels_are_chosen_by_modality_and_by_description(tmp_path: Path, out: Path, write_study: Any) -> None:
    study = write_both(tmp_path / "tree", write_study, pet=2)
    _, dataset = write(tmp_path / "tree", out)
    assert (dataset.channel_names, dataset.cases[0].images[1:]) == (("CT",), ())
    _, dataset = write(tmp_path / "tree", out, channels="CT, pet ac")
    (case,) = dataset.cases
    assert dataset.channel_names == ("CT", "pet ac")
    assert read_case_image(case).array.shape == (2, *study.label.shape)
    np.testing.assert_array_equal(read_case_label(case).array[0], study.label)
    first = read_case_image(case).array
    _, other = write(tmp_path / "tree", out, channels="CT,*NAC")
    assert other.cases[0].case_id == case.case_id
    assert not np.array_equal(first, read_case_image(other.cases[0]).array)


def test_missing_and_ambiguous_partners_are_reported_and_the_rest_is_written(
    tmp_path: Path, out: Path, write_study: Any
) -> None:
    for seed, pet in enumerate((1, 0, 2)):
        write_both(tmp_path / "tree" / str(seed), write_study, seed=seed, pet=pet)
    with pytest.raises(CasesFailedError) as error:
        write(tmp_path / "tree", out, channels="CT,PT")
    assert error.value.exit_code == 3
    reasons = sorted(error.value.failures.values())
    assert any("no series of its study and frame of reference is of channel PT" in reason for reason in reasons)
    assert any("2 series are of channel PT" in reason and "PET NAC" in reason for reason in reasons)
    assert len(reasons) == 2
    assert len(read_dataset(out).cases) == 1


def test_a_partner_without_a_frame_of_reference_is_not_taken_to_lie_in_the_same_space(
    tmp_path: Path, out: Path, write_study: Any
) -> None:
    study = write_both(tmp_path / "tree", write_study)
    files = [*study.series.files, *(tmp_path / "tree" / "pt0" / "image").iterdir()]
    set_attribute(files, "FrameOfReferenceUID", "")
    with pytest.raises(InputError, match="has no frame of reference"):
        write(tmp_path / "tree", out, channels="CT,PT")


def test_a_channel_that_is_not_there_is_one_line_that_says_what_is(
    tmp_path: Path, out: Path, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path / "tree")
    words = ["inspect", str(tmp_path / "tree"), "--write_dataset", str(out), "--channels", "MR"]
    assert main(words) == 2
    text = capsys.readouterr().err
    assert text == (
        "error: tree: holds no series of images for MR. Name one that is there (modalities found: CT) with --channels\n"
    )
    assert not out.parent.exists()


def test_classes_are_patterns_and_the_value_is_the_place_in_the_list(
    tmp_path: Path, out: Path, write_study: Any
) -> None:
    study = write_study(tmp_path / "tree", names=("GTV node", " Leber", "gtv-1", "Spine"), shape=(24, 20, 12))
    written, dataset = write(tmp_path / "tree", out, classes="liver = liver|Leber, tumour=GTV*,lung=Lung?")
    assert dataset.labels == {"background": 0, "liver": 1, "tumour": 2, "lung": 3}
    expected = np.array([0, 2, 1, 2, 0])[study.label]
    np.testing.assert_array_equal(read_case_label(dataset.cases[0]).array[0], expected)
    notes = "\n".join(written.notes)
    assert "structures of no class, left out: Spine" in notes
    assert "classes that no structure belongs to: lung" in notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("=GTV*", 'has no name. Write --classes "tumour=GTV*|Mass'),
        ("tumour=GTV,tumour=Mass", "tumour is named twice. Separate the patterns of a class with |"),
        ("Background=Body", "Background is no class of its own. What belongs to no class is background already"),
    ],
)
def test_wrong_classes_are_explained(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_classes(text)
    assert message in str(error.value)


def test_classes_that_nothing_matches_are_an_error_with_the_names_that_were_found(
    tmp_path: Path, out: Path, write_study: Any
) -> None:
    write_study(tmp_path / "tree")
    with pytest.raises(InputError, match=r"holds no case with a label of these classes\. Names found: GTV, Liver"):
        write(tmp_path / "tree", out, classes="tumour=CTV*")
    assert not out.parent.exists()


def test_names_with_wildcards_take_no_other_structure(tmp_path: Path, out: Path, write_study: Any) -> None:
    study = write_study(tmp_path / "tree", names=("PTV*", "PTV60", "a[b]", "ab"), shape=(24, 20, 12))
    _, dataset = write(tmp_path / "tree", out)
    assert dataset.labels == {"background": 0, "a[b]": 1, "ab": 2, "PTV*": 3, "PTV60": 4}
    np.testing.assert_array_equal(read_case_label(dataset.cases[0]).array[0], np.array([0, 3, 4, 1, 2])[study.label])


def test_a_structure_named_after_the_patient_is_a_class_of_its_own(tmp_path: Path, out: Path, write_study: Any) -> None:
    names = ("Nobody", "GTV nobody", "GTV x", "Liver")
    study = write_study(tmp_path / "tree", names=names, shape=(24, 20, 12))
    written, dataset = write(tmp_path / "tree", out)
    assert dataset.labels == {"background": 0, "GTV x": 1, "Liver": 2, "GTV ***": 3, "***": 4}
    np.testing.assert_array_equal(read_case_label(dataset.cases[0]).array[0], np.array([0, 4, 3, 1, 2])[study.label])
    assert any("***" in note for note in written.notes)
    assert not any("nobody" in path.read_text().casefold() for path in out.parent.rglob("*.json"))


def test_a_patient_with_a_short_number_has_the_classes_of_the_others(
    tmp_path: Path, out: Path, write_study: Any
) -> None:
    for seed, patient in enumerate(("12", "A-4711")):
        write_study(tmp_path / "tree" / str(seed), seed=seed, names=("Rib 12", "GTV"), patient=patient)
    _, dataset = write(tmp_path / "tree", out)
    assert dataset.labels == {"background": 0, "GTV": 1, "Rib 12": 2}


def test_several_observers_of_one_series_are_taken_together_and_told(
    tmp_path: Path, out: Path, write_study: Any
) -> None:
    first = write_study(tmp_path / "tree", names=("GTV A", "Liver"))
    write_study(tmp_path / "tree", names=("GTV B",), observer="second")
    written, dataset = write(tmp_path / "tree", out, classes="tumour=GTV*,liver=Liver")
    assert any("2 structure sets or segmentations are taken together" in note for note in written.notes)
    label = read_case_label(dataset.cases[0]).array[0]
    assert (label[first.label == 2] == 2).all()
    second = _truth_of(tmp_path, write_study, names=("GTV B",))
    np.testing.assert_array_equal(label == 1, ((first.label == 1) | (second == 1)) & (first.label != 2))


def _truth_of(tmp_path: Path, write_study: Any, **options: Any) -> np.ndarray:
    return write_study(tmp_path / "elsewhere", **options).label


def test_overlaps_are_logged_with_their_voxels_and_the_later_class_wins(
    tmp_path: Path, out: Path, write_study: Any, log: pytest.LogCaptureFixture
) -> None:
    study = write_study(tmp_path / "tree", names=("GTV", "Liver"))
    write_study(tmp_path / "tree", names=("CTV", "x"), observer="second")
    _, dataset = write(tmp_path / "tree", out, classes="gtv=GTV,ctv=CTV")
    label = read_case_label(dataset.cases[0]).array[0]
    np.testing.assert_array_equal(label, np.where(study.label == 1, 2, 0))
    assert f"{int((study.label == 1).sum())} voxels are in both gtv and ctv; they are taken as ctv" in log.text


def test_a_label_on_another_series_is_told_and_not_used(tmp_path: Path, out: Path, write_study: Any) -> None:
    write_both(tmp_path / "tree", write_study)
    with pytest.raises(InputError, match="labels of 1 CT series are not used, as cases are made of PT"):
        write(tmp_path / "tree", out, channels="PT,CT")
    write_study(tmp_path / "tree" / "mr", seed=9, modality="MR", study_seed=0, patient="FAKE-0000")
    written, dataset = write(tmp_path / "tree", out, channels="CT,PT")
    assert any("labels of 1 MR series are not used" in note for note in written.notes)
    assert len(dataset.cases) == 1


def test_cases_of_a_patient_are_grouped_and_tell_nobody(tmp_path: Path, out: Path, write_study: Any) -> None:
    for seed, patient in enumerate(("ANNA-1", "BERT-2", "ANNA-1")):
        write_study(tmp_path / "tree" / str(seed), seed=seed, patient=patient)
    _, dataset = write(tmp_path / "tree", out)
    patients = [case.patient for case in dataset.cases]
    assert len(set(patients)) == 2
    text = "".join(path.name + path.read_text() for path in out.parent.rglob("*.json"))
    assert "ANNA" not in text
    assert "BERT" not in text


def test_time_points_are_channels_and_a_series_of_other_channels_is_left_out_by_name(
    tmp_path: Path, out: Path, write_study: Any
) -> None:
    echoes = {"modality": "MR", "phase_keyword": "EchoTime", "num_channels": 2, "phase_values": (2.5, 5.0)}
    for seed in range(2):
        write_study(tmp_path / "tree" / str(seed), seed=seed, **echoes)
    write_study(tmp_path / "tree" / "single", seed=7, modality="MR")
    with pytest.raises(CasesFailedError) as error:
        write(tmp_path / "tree", out)
    (reason,) = error.value.failures.values()
    assert "holds 1 channel(s), most of the others hold 2" in reason
    dataset = read_dataset(out)
    assert dataset.channel_names == ("EchoTime 2.5", "EchoTime 5")
    assert find_problems(dataset, num_workers=1) == ()
    assert read_case_image(dataset.cases[0]).num_channels == 2


def test_phases_where_one_of_several_channels_is_expected_are_left_out_by_name(
    tmp_path: Path, out: Path, write_study: Any
) -> None:
    write_both(tmp_path / "tree" / "0", write_study)
    phases = {"phase_keyword": "AcquisitionNumber", "num_channels": 2}
    write_both(tmp_path / "tree" / "1", write_study, seed=1, **phases)
    with pytest.raises(CasesFailedError) as error:
        write(tmp_path / "tree", out, channels="CT,PT")
    assert "holds 2 phases, where one channel is expected" in next(iter(error.value.failures.values()))


def test_a_series_without_a_label_is_for_testing(tmp_path: Path, out: Path, write_study: Any) -> None:
    write_study(tmp_path / "tree" / "a")
    write_study(tmp_path / "tree" / "b", seed=1, names=())
    write_study(tmp_path / "tree" / "c", seed=2, names=("Body",))
    written, dataset = write(tmp_path / "tree", out, classes="GTV=GTV,liver=liver")
    assert (written.num_training, written.num_test) == (1, 2)
    assert [len(dataset.cases), len(dataset.test_cases)] == [1, 2]


def test_series_with_problems_are_listed_with_exit_code_3_and_the_rest_is_written(
    tmp_path: Path, out: Path, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path / "tree" / "a")
    bad = write_study(tmp_path / "tree" / "b", seed=1)
    drop_slice(bad.series.paths[0][5])
    assert main(["inspect", str(tmp_path / "tree"), "--write_dataset", str(out), "--num_workers", "1"]) == 3
    shown = capsys.readouterr()
    assert "without 1 case(s)" in shown.err
    assert "1 slice is missing" in shown.err
    assert "1 training cases, 0 test cases" in " ".join(shown.out.split())
    assert len(read_dataset(out).cases) == 1


def test_a_file_that_was_not_made_here_is_never_overwritten(tmp_path: Path, out: Path, write_study: Any) -> None:
    write_study(tmp_path / "tree")
    out.parent.mkdir()
    for content in ('{"name": "mine", "training": []}', "no JSON", "[1]"):
        out.write_text(content)
        with pytest.raises(InputError, match="is another file, which would be lost"):
            write(tmp_path / "tree", out)
        assert out.read_text() == content
    with pytest.raises(InputError, match=r"must end in \.json"):
        write(tmp_path / "tree", tmp_path / "set" / "data.yaml")


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json")}


def test_the_same_tree_gives_the_same_bytes_and_a_new_study_keeps_all_ids(
    tmp_path: Path, out: Path, write_study: Any
) -> None:
    for seed in range(2):
        write_study(tmp_path / "tree" / f"m{seed}", seed=seed)
    write(tmp_path / "tree", out)
    before = state(out.parent)
    write(tmp_path / "tree", out)
    assert state(out.parent) == before
    ids = {case.case_id for case in read_dataset(out).cases}
    write_study(tmp_path / "tree" / "a new one", seed=5)
    _, dataset = write(tmp_path / "tree", out)
    assert ids < {case.case_id for case in dataset.cases}
    after = state(out.parent)
    assert all(after[name] == content for name, content in before.items() if "_series" in name)


def test_a_dataset_may_lie_in_its_own_tree_and_be_written_anew(tmp_path: Path, write_study: Any) -> None:
    write_study(tmp_path / "tree" / "a")
    out = tmp_path / "tree" / "dataset.json"
    write(tmp_path / "tree", out)
    before = state(tmp_path)
    write(tmp_path / "tree", out)
    assert state(tmp_path) == before
    assert read_dataset(tmp_path / "tree").labels == {"background": 0, "GTV": 1, "Liver": 2}
    out.write_text('{"training": [], "labels": {}}')
    with pytest.raises(InputError, match="is a dataset already"):
        write(tmp_path / "tree", tmp_path / "tree" / "other.json")


@pytest.mark.parametrize("linked", [False, True])
def test_dataset_and_files_may_be_moved_together(tmp_path: Path, write_study: Any, linked: bool) -> None:
    home = tmp_path / "disk" / "deep" / "home"
    study = write_study(home / "tree")
    if linked:
        # Through a link, `..` does not lead back to where the link lies.
        (tmp_path / "link").symlink_to(home / "sets")
        (home / "sets").mkdir()
    write(home / "tree", (tmp_path / "link" if linked else home / "sets") / "thorax.json")
    home.rename(tmp_path / "moved")
    (case,) = read_dataset(tmp_path / "moved" / "sets" / "thorax.json").cases
    np.testing.assert_array_equal(read_case_image(case).array, study.image.array)
    np.testing.assert_array_equal(read_case_label(case).array[0], study.label)


def test_files_that_are_gone_or_changed_later_are_named_errors(tmp_path: Path, out: Path, write_study: Any) -> None:
    study = write_study(tmp_path / "tree")
    _, dataset = write(tmp_path / "tree", out)
    kept = study.series.paths[0][4].read_bytes()
    study.series.paths[0][4].write_bytes(kept[:-40])
    (image, _) = find_problems(dataset, num_workers=1)
    assert "is truncated" in image.message
    assert study.series.paths[0][4].name in image.message
    study.series.paths[0][4].unlink()
    messages = [problem.message for problem in find_problems(dataset, num_workers=1)]
    assert len(messages) == 2
    assert all(f"{study.series.paths[0][4].name}: there is no such file" in message for message in messages), messages
    study.series.paths[0][4].write_bytes(kept)
    assert study.structures is not None
    study.structures.unlink()
    (problem,) = find_problems(dataset, num_workers=1)
    assert problem.kind == "unreadable_label"


def fractional(study: Any, path: Path, values: np.ndarray) -> None:
    """A FRACTIONAL segmentation of (k, rows, columns) fractions on the images of a study, by highdicom."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    sources = [pydicom.dcmread(file) for file in study.series.paths[0]]
    description = hd.seg.SegmentDescription(1, "Liver", codes.SCT.Organ, codes.SCT.Liver, algorithm_type="MANUAL")
    path.parent.mkdir(parents=True, exist_ok=True)
    hd.seg.Segmentation(
        source_images=sources,
        pixel_array=values,
        segmentation_type="FRACTIONAL",
        segment_descriptions=[description],
        series_instance_uid=hd.UID(),
        series_number=9,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="x",
        manufacturer_model_name="x",
        software_versions="1",
        device_serial_number="1",
        max_fractional_value=200,
    ).save_as(path)


@pytest.mark.parametrize("threshold", [0.25, 0.5, 1.0])
def test_fractional_segmentations_are_cut_at_the_stated_threshold(
    tmp_path: Path, out: Path, write_study: Any, threshold: float
) -> None:
    study = write_study(tmp_path / "tree", names=())
    values = np.random.default_rng(0).choice([0.0, 0.25, 0.5, 0.75, 1.0], size=(10, 14, 16)).astype(np.float32)
    fractional(study, tmp_path / "tree" / "seg" / "f.dcm", values)
    _, dataset = write(tmp_path / "tree", out, threshold=threshold)
    expected = study.series.layout.from_slices((values >= threshold).astype(np.uint8))
    np.testing.assert_array_equal(read_case_label(dataset.cases[0]).array[0], expected)


def test_a_tilted_series_is_read_upright_with_its_label_on_one_grid(
    tmp_path: Path, out: Path, write_study: Any
) -> None:
    study = write_study(tmp_path / "tree", shear=0.3, shape=(16, 18, 10))
    with pytest.raises(InputError, match=r"tilt of 16\.7 degrees"):
        write(tmp_path / "tree", out)
    _, dataset = write(tmp_path / "tree", out, allow_tilt=True)
    (case,) = dataset.cases
    image, label = read_case_image(case), read_case_label(case)
    assert find_problems(dataset, num_workers=1) == ()
    axes = image.grid.affine[:3, :3] / image.grid.spacing
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    for value in (1, 2):
        there, here = (_centre(volume, value) for volume in (Volume(study.label[None], study.image.grid), label))
        np.testing.assert_allclose(here, there, atol=0.4)


def _centre(label: Volume, value: int) -> np.ndarray:
    return nib.affines.apply_affine(label.grid.affine, np.argwhere(label.array[0] == value).mean(axis=0))


def test_names_of_structures_are_kept_to_the_letter(tmp_path: Path, out: Path, write_study: Any) -> None:
    names = ('a,b;"c"', "<b>x</b>&amp;", "x/y z=1", "35", "ignore", "Ünicode |")
    written, dataset = write(write_study(tmp_path / "tree", names=names, shape=(24, 20, 12)).series.folder.parent, out)
    assert set(dataset.labels) == {"background", *names} - {"ignore"}
    assert dataset.ignore_value == 4
    assert "voxels of the class ignore are neither trained on nor scored" in written.notes


def test_a_structures_file_for_the_label_of_a_series_is_read_by_path(
    tmp_path: Path, out: Path, write_study: Any
) -> None:
    study = write_study(tmp_path / "tree")
    _, dataset = write(tmp_path / "tree", out)
    label = dataset.cases[0].label
    assert label is not None
    np.testing.assert_array_equal(read_label(label).array[0], study.label)
    content = json.loads(label.read_text())
    label.write_text(json.dumps({**content, "threshold": 2}))
    with pytest.raises(InputError, match="threshold: must be above 0"):
        read_label(label)
