"""A tree of DICOM as archives leave it: every series is found, what is no volume is named, copies are told apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline.datasets import dicom_scan
from pipeline.datasets.dicom_scan import Scan, scan_folder
from pipeline.io.dicom.reader import read_series
from pipeline.io.volume import Volume
from pipeline.synthetic_dicom import (
    PlantedIdentity,
    SeriesOptions,
    WrittenSeries,
    write_dose_report_screen,
    write_scout,
    write_secondary_capture,
    write_series,
    write_structures,
    write_text_report,
)
from pipeline.synthetic_dicom.faults import delete_attribute, drop_slice, set_attribute, truncate_file

WHO = PlantedIdentity(patient_name="Quxley^Wibble", patient_id="WXYZ-4711")


def make_volume(shape=(9, 7, 5), num_channels: int = 1) -> Volume:
    turn = nib.eulerangles.euler2mat(0.1, -0.2, 0.15) @ np.diag([0.9, 1.1, 2.5])
    array = np.arange(num_channels * np.prod(shape)).reshape(num_channels, *shape)
    return Volume.from_array(array.astype(float), nib.affines.from_matvec(turn, [-11.0, 6.25, 40.5]))


def write(folder: Path, seed: int = 0, **more: object) -> WrittenSeries:
    return write_series(folder, make_volume(), SeriesOptions(seed=seed, series_number=seed + 1, identity=WHO, **more))


def scan(folder: Path) -> Scan:
    return scan_folder(folder, num_workers=1)


def test_series_are_found_however_deep_they_lie(tmp_path: Path):
    write(tmp_path / "a", 0)
    write(tmp_path / "b" / "c" / "d e" / "f", 1, modality="MR")
    # Two series in one folder, and files of other kinds beside them.
    write(tmp_path / "b", 2, modality="PT")
    write(tmp_path / "b", 3, enhanced=True)
    (tmp_path / "b" / "notes.txt").write_text("nothing")
    (tmp_path / "DICOMDIR").write_bytes(bytes(200))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.dcm").write_bytes(b"nothing")
    found = scan(tmp_path)
    counts = sorted((series.first.modality, len(series.headers)) for series in found.series)
    assert counts == [("CT", 1), ("CT", 5), ("MR", 5), ("PT", 5)]
    assert [series.first.path for series in found.series] == sorted(series.first.path for series in found.series)
    assert not [series.problems for series in found.series if series.problems]
    assert all(series.stack is not None and series.stack.grid.shape == (9, 7, 5) for series in found.series)
    assert found.num_other_files == 1
    assert found.unreadable == ()
    assert len({series.key for series in found.series}) == 4


def test_what_is_no_volume_is_left_out_by_name(tmp_path: Path):
    write(tmp_path, 0)
    write_scout(tmp_path, make_volume(), SeriesOptions(seed=1, series_number=2))
    write_secondary_capture(tmp_path, SeriesOptions(seed=2, series_number=3))
    write_dose_report_screen(tmp_path, SeriesOptions(seed=3, series_number=4))
    write_text_report(tmp_path, SeriesOptions(seed=4, series_number=5))
    derived = write(tmp_path, 5)
    set_attribute(derived.files, "ImageType", ["DERIVED", "SECONDARY", "SCREEN SAVE"])
    ultrasound = write(tmp_path, 6)
    set_attribute(ultrasound.files, "Modality", "US")
    found = {series.first.series_number: series for series in scan(tmp_path).series}
    assert {number: series.left_out for number, series in found.items()} == {
        "1": "",
        "2": "scout (localizer)",
        "3": "secondary capture in colours (RGB)",
        "4": "secondary capture",
        "5": "no image (SR)",
        "6": "derived screen",
        "7": "modality US; CT, MR, PT are read",
    }
    assert all((series.stack is None) == bool(series.left_out) for series in found.values())
    assert not any(series.problems for series in found.values())


@pytest.mark.parametrize("word", ["LOW_DOSE", "CT_SOM5 PROTOCOL"])
def test_original_slices_are_no_screen_whatever_their_type_says_besides(word: str, tmp_path: Path):
    series = write(tmp_path)
    set_attribute(series.files, "ImageType", ["ORIGINAL", "PRIMARY", "AXIAL", word])
    (found,) = scan(tmp_path).series
    assert found.stack is not None


def test_the_parts_of_a_series_in_two_folders_are_one(tmp_path: Path):
    series = write(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for path in series.paths[0][::2]:
        shutil.move(path, tmp_path / "b" / path.name)
    (found,) = scan(tmp_path).series
    assert found.problems == ()
    assert len(found.paths) == 5
    np.testing.assert_array_equal(read_series(found.paths).array, series.array)


def test_phases_in_two_folders_are_one_series(tmp_path: Path):
    options = SeriesOptions(modality="MR", phase_keyword="EchoTime", phase_values=(2.0, 9.0))
    series = write_series(tmp_path / "a", make_volume(num_channels=2), options)
    (tmp_path / "b").mkdir()
    for path in series.paths[1]:
        shutil.move(path, tmp_path / "b" / path.name)
    (found,) = scan(tmp_path).series
    assert found.stack is not None
    assert found.stack.phase_names == ("EchoTime 2", "EchoTime 9")


def test_copies_of_a_series_in_two_folders_are_apart(tmp_path: Path):
    series = write(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = scan(tmp_path).series
    assert (first.stack is not None, second.stack is not None) == (True, True)
    assert second.key == f"{first.key}_2"
    for one in (first, second):
        np.testing.assert_array_equal(read_series(one.paths).array, series.array)


def test_copies_of_some_slices_in_another_folder_are_left_aside_and_said(tmp_path: Path):
    series = write(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    drop_slice(tmp_path / "b" / series.paths[0][2].name)
    (found,) = scan(tmp_path).series
    np.testing.assert_array_equal(read_series(found.paths).array, series.array)
    assert "lie in another of its folders as well" in found.notes[0]


def test_parts_of_a_series_that_share_a_slice_are_one_volume(tmp_path: Path):
    series = write(tmp_path / "a")
    (tmp_path / "b").mkdir()
    middle = len(series.paths[0]) // 2
    shutil.copy(series.paths[0][middle], tmp_path / "b")
    for path in series.paths[0][middle + 1 :]:
        path.rename(tmp_path / "b" / path.name)
    (found,) = scan(tmp_path).series
    np.testing.assert_array_equal(read_series(found.paths).array, series.array)


def test_an_unreadable_file_beside_a_series_may_be_a_slice_of_it(tmp_path: Path):
    series = write(tmp_path / "a")
    write(tmp_path / "b", 1)
    # The last slice, so that no gap tells that it is missing.
    truncate_file(series.paths[0][-1], 0.02)
    series.paths[0][-1].rename(tmp_path / "a" / "torn.dcm")
    found = scan(tmp_path)
    torn, whole = found.series
    assert "1 file(s) in its folder cannot be read, so that slices may be missing" in torn.problems
    assert torn.stack is None
    assert whole.stack is not None
    assert [(path.name, bool(reason)) for path, reason in found.unreadable] == [("torn.dcm", True)]


def test_a_truncated_slice_is_a_problem_of_its_series(tmp_path: Path):
    series = write(tmp_path)
    truncate_file(series.paths[0][2], 0.95)
    (found,) = scan(tmp_path).series
    assert found.problems == (
        f"1 of 5 files ({series.paths[0][2].name}): is truncated (the file ends within its pixel data)",
    )


@pytest.mark.parametrize("keyword", ["SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"])
def test_blanked_uids_leave_a_series_whole(keyword: str, tmp_path: Path):
    for seed in (0, 1):
        series = write(tmp_path, seed)
        if seed:
            delete_attribute(series.files, keyword)
        else:
            set_attribute(series.files, keyword, "")
    first, second = sorted(scan(tmp_path).series, key=lambda series: series.first.series_number)
    assert first.stack is not None
    assert second.stack is not None
    assert first.key != second.key


def test_blanked_instances_are_no_copies_of_each_other(tmp_path: Path):
    series = write(tmp_path)
    set_attribute(series.files, "SOPInstanceUID", "")
    (found,) = scan(tmp_path).series
    assert found.problems == ()


def test_structures_are_label_objects_and_no_series(tmp_path: Path):
    series = write(tmp_path)
    square = np.array([[0.0, 0.0, 40.5], [3.0, 0.0, 40.5], [3.0, 3.0, 40.5]])
    write_structures(tmp_path / "rt.dcm", series, {"organ": [square]})
    found = scan(tmp_path)
    assert len(found.series) == 1
    (structures,) = found.label_objects
    assert structures.structure_names == ("organ",)
    assert structures.referenced_series == (series.options.series_uid,)


def test_one_and_two_workers_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dicom_scan, "FEW_FILES", 3)
    monkeypatch.setattr(dicom_scan, "FILES_PER_TASK", 4)
    for seed in range(4):
        write(tmp_path / f"p{seed % 2}" / str(seed), seed)
    write_text_report(tmp_path, SeriesOptions(seed=9))
    (tmp_path / "torn.dcm").write_bytes(b"nothing")
    (tmp_path / "notes.txt").write_text("nothing")
    one, two = (scan_folder(tmp_path, num_workers=count) for count in (1, 2))
    assert [(s.key, s.paths, s.left_out, s.problems) for s in one.series] == [
        (s.key, s.paths, s.left_out, s.problems) for s in two.series
    ]
    assert one.unreadable == two.unreadable
    assert (one.num_other_files, two.num_other_files) == (1, 1)
    for first, second in zip(one.series, two.series, strict=True):
        assert (first.stack is None) == (second.stack is None)
        if first.stack is not None:
            np.testing.assert_array_equal(first.stack.grid.affine, second.stack.grid.affine)


def test_nobody_is_named_but_everybody_is_known(tmp_path: Path):
    write(tmp_path, series_description="Head of QUXLEY")
    found = scan(tmp_path)
    (series,) = found.series
    assert series.name.startswith('series 1 "Head of ***" (CT, ')
    assert {"Quxley", "Wibble", "WXYZ-4711"} <= found.identity
    assert not any(secret.lower() in f"{series.key} {series.first!r}".lower() for secret in ("wibble", "wxyz"))


def test_a_scale_that_changes_within_ct_and_a_scout_are_noted(tmp_path: Path):
    series = write(tmp_path)
    set_attribute(series.files[2:3], "RescaleIntercept", "-1025")
    (found,) = scan(tmp_path).series
    assert found.stack is not None
    assert "changes from slice to slice" in found.notes[0]
    scout = write_scout(tmp_path, make_volume(), SeriesOptions(seed=1))
    set_attribute(scout.files, "SeriesInstanceUID", series.options.series_uid)
    set_attribute(scout.files, "PatientID", WHO.patient_id)
    (found,) = scan(tmp_path).series
    assert "1 scout image(s) in the series are left out" in found.notes
    assert scout.files[0] not in found.paths


def test_a_single_file_may_be_scanned(tmp_path: Path):
    series = write(tmp_path, enhanced=True)
    (found,) = scan(series.files[0]).series
    assert found.stack is not None
