"""What archives of hospitals hold: copies, blanked UIDs, outlines, second readers, own results, parts of series."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from pipeline.config import InspectConfig
from pipeline.datasets.dataset import read_case_label, read_dataset
from pipeline.datasets.dicom_cases import find_dicom_cases
from pipeline.datasets.dicom_dataset import write_dicom_dataset
from pipeline.datasets.dicom_scan import scan_folder
from pipeline.datasets.inspection import describe_inspection, inspect_path
from pipeline.errors import InputError
from pipeline.inference.dicom_inputs import find_dicom_inputs
from pipeline.synthetic_dicom.faults import set_attribute


def scan(folder: Path) -> Any:
    return scan_folder(folder, num_workers=1)


def set_roi_type(path: Path, name: str, kind: str) -> None:
    dataset = pydicom.dcmread(path)
    numbers = {roi.ROINumber for roi in dataset.StructureSetROISequence if roi.ROIName == name}
    items = []
    for roi in dataset.StructureSetROISequence:
        item = pydicom.Dataset()
        item.ObservationNumber = item.ReferencedROINumber = roi.ROINumber
        item.RTROIInterpretedType, item.ROIInterpreter = (kind if roi.ROINumber in numbers else "GTV"), ""
        items.append(item)
    dataset.RTROIObservationsSequence = items
    dataset.save_as(path)


def test_without_an_order_the_smaller_of_two_overlapping_classes_wins(tmp_path: Path, write_study: Any) -> None:
    study = write_study(tmp_path / "tree", names=("A lesion", "Liver"), shape=(24, 20, 12))
    # The same lesion drawn with the liver around it, under a name that comes last.
    both = write_study(tmp_path / "other", names=("Z organ",), shape=(24, 20, 12))
    dataset = pydicom.dcmread(both.structures)
    dataset.save_as(tmp_path / "tree" / "structures" / "second.dcm")
    written = write_dicom_dataset(scan(tmp_path / "tree"), tmp_path / "out" / "set.json")
    (case,) = read_dataset(written.path).cases
    label = read_case_label(case).array[0]
    values = {one.name: one.value for one in written.classes}
    assert list(values) == ["A lesion", "Liver", "Z organ"]
    larger = both.label == 1
    lesion = study.label == 1
    winner = "A lesion" if lesion.sum() < larger.sum() else "Z organ"
    assert (label[lesion & larger] == values[winner]).all()
    assert any("the smaller one wins" in note for note in written.notes)


def test_the_outline_of_the_body_is_no_class_unless_it_is_asked_for(tmp_path: Path, write_study: Any) -> None:
    study = write_study(tmp_path / "tree", names=("Body", "GTV"))
    set_roi_type(study.structures, "Body", "EXTERNAL")
    found = scan(tmp_path / "tree")
    written = write_dicom_dataset(found, tmp_path / "a.json")
    assert [one.name for one in written.classes] == ["GTV"]
    asked = write_dicom_dataset(found, tmp_path / "b.json", classes=[_class("body", 1, "Body")])
    (case,) = read_dataset(asked.path).cases
    np.testing.assert_array_equal(read_case_label(case).array[0] == 1, study.label == 1)


def _class(name: str, value: int, pattern: str) -> Any:
    from pipeline.io.dicom.structures import LabelClass

    return LabelClass(name=name, value=value, patterns=(pattern,))


def test_a_class_that_not_every_label_holds_is_said(tmp_path: Path, write_study: Any) -> None:
    write_study(tmp_path / "tree" / "a", names=("GTV", "Heart"))
    write_study(tmp_path / "tree" / "b", seed=1, names=("GTV",))
    written = write_dicom_dataset(scan(tmp_path / "tree"), tmp_path / "set.json")
    assert any("Heart in 1 of 2" in note for note in written.notes)
    assert not any("GTV in" in note for note in written.notes)


def pair(tree: Path, write_study: Any, **pet: Any) -> None:
    write_study(tree / "ct", names=())
    options = {"seed": 50, "study_seed": 0, "modality": "PT", "names": (), "is_signed": False, "shape": (9, 8, 10)}
    write_study(tree / "pt", **{**options, **pet})


def test_a_partner_of_another_patient_is_none_even_where_uids_agree(tmp_path: Path, write_study: Any) -> None:
    pair(tmp_path, write_study, patient="SOMEBODY-ELSE")
    (reason,) = find_dicom_cases(scan(tmp_path), ["CT", "PT"]).failures.values()
    assert "no series of its study and frame of reference" in reason


def test_a_partner_that_lies_elsewhere_is_none(tmp_path: Path, write_study: Any) -> None:
    pair(tmp_path, write_study)
    assert len(find_dicom_cases(scan(tmp_path), ["CT", "PT"]).cases) == 1
    for path in (tmp_path / "pt" / "image").iterdir():
        x, y, z = pydicom.dcmread(path).ImagePositionPatient
        set_attribute([path], "ImagePositionPatient", [x, y + 700, z])
    assert not find_dicom_cases(scan(tmp_path), ["CT", "PT"]).cases


def test_an_archive_that_holds_everything_twice_keeps_its_pairs(tmp_path: Path, write_study: Any) -> None:
    pair(tmp_path / "a", write_study)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    cases = find_dicom_cases(scan(tmp_path), ["CT", "PT"]).cases
    assert len(cases) == 2
    for case in cases:
        ct, pt = (series.first.path.relative_to(tmp_path).parts[0] for series in case.series)
        assert ct == pt


@pytest.mark.parametrize(("channel", "modality"), [("MR", "CT"), ("T1", "CT"), ("PET", "CT"), ("CT", "MR")])
def test_a_network_for_another_modality_is_refused_unless_it_is_meant(
    tmp_path: Path, write_study: Any, channel: str, modality: str
) -> None:
    write_study(tmp_path / "in", names=(), modality=modality)
    with pytest.raises(InputError, match=f"the network is for {channel}, and all series are {modality}"):
        find_dicom_inputs(tmp_path / "in", tmp_path / "refs", [channel])
    assert len(find_dicom_inputs(tmp_path / "in", tmp_path / "refs", [channel], channels=[modality])) == 1


def test_series_without_uids_in_two_folders_are_two_with_names_of_their_own(tmp_path: Path, write_study: Any) -> None:
    for seed in range(2):
        write_study(tmp_path / str(seed), seed=seed, names=())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for keyword in ("SeriesInstanceUID", "StudyInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        set_attribute(files, keyword, "")
    for path in files:
        dataset = pydicom.dcmread(path)
        dataset.file_meta.MediaStorageSOPInstanceUID = ""
        dataset.save_as(path, enforce_file_format=False)
    first, second = scan(tmp_path).series
    assert first.stack is not None
    assert second.stack is not None
    assert first.key != second.key
    assert "_" not in second.key


def test_a_missing_file_of_a_split_enhanced_series_is_a_problem(tmp_path: Path, write_study: Any) -> None:
    write_study(tmp_path, names=(), enhanced=True, modality="MR")
    (path,) = (tmp_path / "image").iterdir()
    set_attribute([path], "InConcatenationNumber", 1)
    set_attribute([path], "InConcatenationTotalNumber", 2)
    (series,) = scan(tmp_path).series
    assert series.stack is None
    assert "1 of the 2 files that it was split into are missing" in series.problems[0]


def test_counts_and_distances_that_the_header_contradicts_are_noted(tmp_path: Path, write_study: Any) -> None:
    study = write_study(tmp_path, names=(), modality="PT", is_signed=False)
    set_attribute(study.series.files, "NumberOfSlices", 20)
    set_attribute(study.series.files, "SpacingBetweenSlices", 1.5)
    (series,) = scan(tmp_path).series
    assert series.stack is not None
    assert series.notes == (
        "the header counts 20 slices, of which 10 are here",
        "the header says that slices are 1.5 mm apart, and they are 3 mm",
    )


def test_structures_of_an_ambiguous_space_are_called_so(tmp_path: Path, write_study: Any) -> None:
    study = write_study(tmp_path / "a")
    write_study(tmp_path / "b", seed=1, study_seed=0, names=())
    dataset = pydicom.dcmread(study.structures)
    del dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
    dataset.save_as(study.structures)
    shown = describe_inspection(inspect_path(InspectConfig(path=str(tmp_path), json=True), num_workers=1))
    assert "names no series, and 2 lie in its space" in str(shown)


def test_structures_that_name_two_series_label_each_of_them(tmp_path: Path, write_study: Any) -> None:
    study = write_study(tmp_path / "b_ct", names=("GTV",))
    other = write_study(tmp_path / "a_pt", seed=50, study_seed=0, modality="PT", names=(), is_signed=False)
    dataset = pydicom.dcmread(study.structures)
    series = dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0].RTReferencedSeriesSequence
    second = pydicom.Dataset()
    second.SeriesInstanceUID = other.series.options.series_uid
    series.append(second)
    dataset.save_as(study.structures)
    for channel in ("CT", "PT"):
        (case,) = find_dicom_cases(scan(tmp_path), [channel]).cases
        assert [label.structure_names for label in case.label_objects] == [("GTV",)]


def test_segmentations_of_our_own_are_left_aside_where_there_are_others(tmp_path: Path, write_study: Any) -> None:
    study = write_study(tmp_path, names=("GTV",))
    own = pydicom.dcmread(study.structures)
    own.SOPClassUID = own.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.66.4"
    own.Modality, own.ManufacturerModelName, own.SegmentationType = "SEG", "voxfit", "BINARY"
    segment = pydicom.Dataset()
    segment.SegmentNumber, segment.SegmentLabel = 1, "tumour"
    own.SegmentSequence = [segment]
    reference = pydicom.Dataset()
    reference.SeriesInstanceUID = study.series.options.series_uid
    own.ReferencedSeriesSequence = [reference]
    del own.StructureSetROISequence
    own.save_as(tmp_path / "own.dcm")
    (case,) = find_dicom_cases(scan(tmp_path)).cases
    assert [label.structure_names for label in case.label_objects] == [("GTV",)]
    study.structures.unlink()
    (case,) = find_dicom_cases(scan(tmp_path)).cases
    assert [label.structure_names for label in case.label_objects] == [("tumour",)]


def test_two_series_without_uids_are_ambiguous_partners(tmp_path: Path, write_study: Any) -> None:
    pair(tmp_path / "a", write_study)
    write_study(tmp_path / "b", seed=51, study_seed=0, modality="PT", names=(), is_signed=False, shape=(9, 8, 10))
    pets = [*(tmp_path / "a" / "pt" / "image").iterdir(), *(tmp_path / "b" / "image").iterdir()]
    set_attribute(pets, "SeriesInstanceUID", "")
    (reason,) = find_dicom_cases(scan(tmp_path), ["CT", "PT"]).failures.values()
    assert "2 series are of channel PT" in reason


def test_phases_of_another_kind_than_the_networks_are_a_failure_by_name(tmp_path: Path, write_study: Any) -> None:
    options = {"modality": "MR", "num_channels": 2, "names": ()}
    write_study(tmp_path / "in", phase_keyword="TemporalPositionIdentifier", phase_values=(1.0, 2.0), **options)
    found = find_dicom_cases(scan(tmp_path / "in"), ["MR"], channel_names=["EchoTime 2.4", "EchoTime 4.8"])
    (reason,) = found.failures.values()
    assert "holds phases by TemporalPositionIdentifier" in reason
    assert "by EchoTime" in reason
    fitting = ["TemporalPositionIdentifier 1", "TemporalPositionIdentifier 2"]
    assert len(find_dicom_cases(scan(tmp_path / "in"), ["MR"], channel_names=fitting).cases) == 1


def test_a_dataset_written_anew_leaves_no_references_to_series_that_are_gone(tmp_path: Path, write_study: Any) -> None:
    for seed in range(2):
        write_study(tmp_path / "tree" / str(seed), seed=seed)
    written = write_dicom_dataset(scan(tmp_path / "tree"), tmp_path / "set.json")
    before = sorted(path.name for path in (tmp_path / "set_series").iterdir())
    shutil.rmtree(tmp_path / "tree" / "1")
    write_dicom_dataset(scan(tmp_path / "tree"), written.path)
    after = sorted(path.name for path in (tmp_path / "set_series").iterdir())
    assert (len(before), len(after)) == (4, 2)
    assert len(read_dataset(written.path).cases) == 1
