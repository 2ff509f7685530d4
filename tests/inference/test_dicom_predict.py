"""`voxfit predict` on DICOM series: NIfTI and DICOM segmentations of the same voxels, in the study of the images."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from torch import Tensor, nn

from pipeline.cli import main
from pipeline.datasets.dataset import Case, read_dataset
from pipeline.geometry import Grid
from pipeline.inference.case_files import predict_files
from pipeline.inference.dicom_inputs import find_dicom_inputs
from pipeline.inference.predictor import Predictor
from pipeline.io.dicom.reader import dicom_files, read_series
from pipeline.io.dicom.seg_reader import iter_segments
from pipeline.io.image_file import read_label
from pipeline.io.volume import Volume
from pipeline.plan import ChannelPlan, Plan
from pipeline.synthetic_dicom import PlantedIdentity, SeriesOptions, WrittenSeries, write_series
from pipeline.synthetic_dicom.faults import drop_slice, set_attribute

SPACING = (1.5, 1.25, 3.0)
VALUES = {"organ_1": 4, "organ_2": 7}
FORMATS = ("nifti", "dicom_seg")


class NearestIntensity(nn.Module):
    """Logits that prefer the class whose known intensity is nearest."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([-((x - value).abs() / 10) for value in (100.0, 300.0, 500.0)], dim=1)


@pytest.fixture
def run_dir(make_plan: Callable[..., Plan], make_run: Callable[..., Path]) -> Path:
    """An untrained network of one CT channel, whose results are nothing but different from place to place."""
    return make_run(make_plan(spacing=SPACING, channels=(ChannelPlan(name="CT", scheme="zscore"),)))


def predict(run_dir: Path, tree: Path, output: Path, *options: str) -> int:
    words = ["--run_dir", str(run_dir), "--input", str(tree), "--output", str(output)]
    return main(["predict", *words, "--accelerator", "cpu", "--num_threads", "1", *options])


def segments_of(path: Path, series: WrittenSeries) -> np.ndarray:
    """(columns, rows, slices) class values of a DICOM segmentation by our reader on the grid of its source."""
    array = np.zeros(series.layout.grid.shape, np.int64)
    for segment in iter_segments(path, series.layout.grid, wanted=lambda name: True):
        array[segment.mask] = VALUES[segment.name]
    return array


def in_file_order(path: Path) -> np.ndarray:
    """(columns, rows, slices) of a NIfTI, which must lie as its series does."""
    return np.asarray(nib.load(path).dataobj)


def test_both_formats_hold_the_same_voxels_on_the_grid_of_the_series(
    tmp_path: Path, run_dir: Path, write_study: Any
) -> None:
    study = write_study(tmp_path / "in", names=())
    assert predict(run_dir, tmp_path / "in", tmp_path / "out", "--format", "both") == 0
    nifti, seg = sorted((tmp_path / "out").glob("*.*"), key=lambda path: path.suffix, reverse=True)
    assert (nifti.name, seg.name) == (f"{seg.stem}.nii.gz", f"{seg.stem}.dcm")
    voxels = in_file_order(nifti)
    np.testing.assert_allclose(nib.load(nifti).affine, study.series.layout.grid.affine, atol=1e-5)
    assert set(np.unique(voxels)) - {0} <= set(VALUES.values())
    assert len(np.unique(voxels)) > 1
    np.testing.assert_array_equal(segments_of(seg, study.series), voxels)


def test_a_segmentation_is_read_alike_by_highdicom_and_refers_to_its_images(
    tmp_path: Path, run_dir: Path, write_study: Any
) -> None:
    hd = pytest.importorskip("highdicom")
    study = write_study(tmp_path / "in", names=())
    assert predict(run_dir, tmp_path / "in", tmp_path / "out", "--format", "dicom_seg") == 0
    (path,) = (tmp_path / "out").glob("*.*")
    sources = [pydicom.dcmread(file) for file in study.series.paths[0]]
    seg = hd.seg.segread(path)
    # Across the slices of the source, background included where a slice has no segment.
    frames = seg.get_pixels_by_source_instance(
        [source.SOPInstanceUID for source in sources],
        ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )
    ours = segments_of(path, study.series)
    for number in range(1, seg.number_of_segments + 1):
        value = VALUES[seg.get_segment_description(number).segment_label]
        np.testing.assert_array_equal(frames[..., number - 1].transpose(2, 1, 0) == 1, ours == value)
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert seg[keyword].value == sources[0][keyword].value
    (referenced,) = seg.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == sources[0].SeriesInstanceUID
    assert {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence} == {
        source.SOPInstanceUID for source in sources
    }
    places = {tuple(map(float, source.ImagePositionPatient)) for source in sources}
    for group in seg.PerFrameFunctionalGroupsSequence:
        assert tuple(map(float, group.PlanePositionSequence[0].ImagePositionPatient)) in places


def test_a_segmentation_is_the_label_of_its_series_when_the_tree_becomes_a_dataset(
    tmp_path: Path, run_dir: Path, write_study: Any
) -> None:
    write_study(tmp_path / "tree", names=())
    assert predict(run_dir, tmp_path / "tree", tmp_path / "tree" / "out", "--format", "both") == 0
    dataset = tmp_path / "set" / "again.json"
    words = ["--write_dataset", str(dataset), "--classes", "one=organ_1,two=organ_2"]
    assert main(["inspect", str(tmp_path / "tree"), *words]) == 0
    (case,) = read_dataset(dataset).cases
    assert case.label is not None
    label = read_label(case.label)
    (nifti,) = (tmp_path / "tree" / "out").glob("*.nii.gz")
    np.testing.assert_array_equal(np.array([0, 4, 7])[label.array], read_label(nifti).array)
    assert label.array.any()


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed (Debian: dicom3tools)")
@pytest.mark.parametrize("options", [{}, {"enhanced": True}, {"modality": "MR", "slice_axis": 0}])
def test_segmentations_are_valid_by_dciodvfy(
    tmp_path: Path, run_dir: Path, write_study: Any, options: dict[str, Any]
) -> None:
    write_study(tmp_path / "in", names=(), **options)
    words = ("--format", "dicom_seg", "--channels", options.get("modality", "CT"))
    assert predict(run_dir, tmp_path / "in", tmp_path / "out", *words) == 0
    (path,) = (tmp_path / "out").glob("*.*")
    found = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
    assert [line for line in (found.stdout + found.stderr).splitlines() if line.startswith("Error")] == []


def known_series(folder: Path, label: np.ndarray, grid: Grid, **options: Any) -> WrittenSeries:
    """A series whose intensities tell the class."""
    image = np.array([100.0, 300.0, 500.0], np.float32)[label][None]
    return write_series(folder, Volume(image, grid), SeriesOptions(**{"modality": "CT", **options}))


def find(tree: Path, references: Path, **options: Any) -> tuple[Case, ...]:
    return find_dicom_inputs(tree, references, ["CT"], **options)


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
def test_the_right_voxels_are_segmented_whatever_way_the_slices_lie(
    tmp_path: Path, write_study: Any, make_plan: Callable[..., Plan], slice_axis: int
) -> None:
    study = write_study(tmp_path / "unused")
    series = known_series(tmp_path / "in", study.label, study.image.grid, slice_axis=slice_axis)
    predictor = Predictor(NearestIntensity(), make_plan(spacing=SPACING))
    nifti, seg = predict_files(predictor, find(tmp_path / "in", tmp_path / "r"), tmp_path / "out", formats=FORMATS)
    expected = np.array([0, 4, 7])[study.label]
    np.testing.assert_array_equal(read_label(nifti).array[0], expected)
    np.testing.assert_array_equal(segments_of(seg, series), series.layout.slices(expected).transpose(2, 1, 0))


def test_a_tilted_series_is_segmented_upright_and_on_its_own_slices(
    tmp_path: Path, write_study: Any, make_plan: Callable[..., Plan], run_dir: Path, capsys: Any
) -> None:
    study = write_study(tmp_path / "unused", shear=0.3, shape=(20, 24, 14))
    series = known_series(tmp_path / "in", study.label, study.image.grid)
    assert predict(run_dir, tmp_path / "in", tmp_path / "no") == 2
    assert "tilt of 16.7 degrees" in capsys.readouterr().err
    cases = find(tmp_path / "in", tmp_path / "r", allow_tilt=True)
    predictor = Predictor(NearestIntensity(), make_plan(spacing=SPACING))
    nifti, seg = predict_files(predictor, cases, tmp_path / "out", formats=FORMATS)
    axes = nib.load(nifti).affine[:3, :3] / nib.affines.voxel_sizes(nib.load(nifti).affine)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-5)
    expected = series.layout.slices(np.array([0, 4, 7])[study.label]).transpose(2, 1, 0)
    found = segments_of(seg, series)
    for value in VALUES.values():
        overlap = (
            2 * ((found == value) & (expected == value)).sum() / ((found == value).sum() + (expected == value).sum())
        )
        assert overlap > 0.8
    assert predict(run_dir, tmp_path / "in", tmp_path / "both", "--format", "both", "--allow_tilt") == 0


def test_outputs_that_exist_are_kept_unless_overwritten(tmp_path: Path, run_dir: Path, write_study: Any) -> None:
    for seed in range(2):
        write_study(tmp_path / "in" / str(seed), seed=seed, names=())
    arguments = (run_dir, tmp_path / "in", tmp_path / "out", "--format", "both")
    assert predict(*arguments) == 0
    first, *others = sorted((tmp_path / "out").glob("*.*"))
    before = {path: path.stat().st_mtime_ns for path in others}
    for path in (first, first.with_name(f"{first.stem}.nii.gz")):
        path.unlink()
    assert predict(*arguments) == 0
    assert first.is_file()
    assert all(
        path.stat().st_mtime_ns == time for path, time in before.items() if path.stem.split(".")[0] != first.stem
    )
    assert predict(*arguments, "--overwrite") == 0
    assert all(path.stat().st_mtime_ns > time for path, time in before.items())


def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_refused_series_is_named_and_the_others_are_done_without_touching_the_input(
    tmp_path: Path, run_dir: Path, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_study(tmp_path / "in" / "a", names=())
    gap = write_study(tmp_path / "in" / "b", seed=1, names=(), series_number=5)
    torn = write_study(tmp_path / "in" / "c", seed=2, names=(), series_number=6)
    drop_slice(gap.series.paths[0][4])
    # The last slice, without which the others are an even stack: only the folder shows that one is missing.
    torn.series.paths[0][9].write_bytes(b"nothing of DICOM")
    before = listing(tmp_path / "in")
    assert predict(run_dir, tmp_path / "in", tmp_path / "out", "--format", "both") == 3
    text = capsys.readouterr().err
    assert "without 2 case(s)" in text
    assert "1 slice is missing" in text
    assert 'series 5 "thorax" (CT' in text
    assert 'series 6 "thorax" (CT' in text
    assert "1 file(s) in its folder cannot be read, so that slices may be missing" in text
    assert {path.name.split(".")[1] for path in (tmp_path / "out").glob("*.*")} == {"nii", "dcm"}
    assert len(list((tmp_path / "out").glob("*.*"))) == 2
    assert listing(tmp_path / "in") == before
    assert good.series.files


def test_a_single_refused_series_is_one_line_with_exit_code_2(
    tmp_path: Path, run_dir: Path, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path / "in", names=())
    drop_slice(study.series.paths[0][4])
    assert predict(run_dir, tmp_path / "in", tmp_path / "out") == 2
    message = capsys.readouterr().err.split("error: ")[1]
    assert message.count("\n") == 1
    assert message.startswith('series 1 "thorax" (CT, ')
    assert "1 slice is missing" in message


def test_a_dicom_segmentation_of_nifti_is_one_clear_line(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(np.zeros((12, 16, 8), np.float32), np.eye(4)), tmp_path / "in" / "a.nii.gz")
    assert predict(run_dir, tmp_path / "in", tmp_path / "out", "--format", "dicom_seg") == 2
    message = capsys.readouterr().err.split("error: ")[1]
    assert message == "a DICOM segmentation refers to a DICOM series, and the input has none. Use --format nifti\n"
    (tmp_path / "in" / "b.nii.gz").write_bytes((tmp_path / "in" / "a.nii.gz").read_bytes())
    assert predict(run_dir, tmp_path / "in", tmp_path / "out", "--format", "dicom_seg") == 2


def test_what_no_segmentation_can_refer_to_is_told_before_anything_is_computed(
    tmp_path: Path, run_dir: Path, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path / "in", names=(), identity=PlantedIdentity(patient_name="Müller^Eva"))
    files = [file.rename(file.with_name(f"Eva_Muller_{k}.dcm")) for k, file in enumerate(study.series.files)]
    set_attribute(files, "FrameOfReferenceUID", "")
    assert predict(run_dir, tmp_path / "in", tmp_path / "out", "--format", "both") == 2
    text = capsys.readouterr().err
    assert "lacks FrameOfReferenceUID" in text
    assert "Muller" not in text
    assert list((tmp_path / "out").glob("*.*")) == []
    assert predict(run_dir, tmp_path / "in", tmp_path / "out") == 0


def two_channels(make_plan: Callable[..., Plan], *names: str) -> Plan:
    return make_plan(spacing=SPACING, channels=tuple(ChannelPlan(name=name, scheme="zscore") for name in names))


def write_pet(folder: Path, write_study: Any, *, seed: int = 0, **options: Any) -> Any:
    settings = {"modality": "PT", "is_signed": False, "shape": (9, 8, 10), "patient": f"FAKE-{seed:04d}", **options}
    return write_study(folder, seed=seed + 50, study_seed=seed, names=(), **settings)


def test_channels_of_several_series_are_found_and_those_without_a_partner_named(
    tmp_path: Path, make_plan: Any, make_run: Any, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(two_channels(make_plan, "CT", "PET"))
    study = write_study(tmp_path / "in" / "a", names=())
    write_pet(tmp_path / "in" / "a_pet", write_study)
    write_study(tmp_path / "in" / "b", seed=1, names=())
    assert predict(run_dir, tmp_path / "in", tmp_path / "out", "--format", "both") == 3
    assert "no series of its study and frame of reference is of channel PET" in capsys.readouterr().err
    (seg,) = (tmp_path / "out").glob("*.dcm")
    np.testing.assert_array_equal(segments_of(seg, study.series), in_file_order(seg.with_suffix(".nii.gz")))
    assert predict(run_dir, tmp_path / "in", tmp_path / "out", "--channels", "CT,PT,MR") == 2
    assert "channels: 3 are named, the network takes 2 (CT, PET)" in capsys.readouterr().err


def test_a_refused_partner_is_the_reason_that_is_given(
    tmp_path: Path, make_plan: Any, make_run: Any, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path / "in" / "a", names=())
    pet = write_pet(tmp_path / "in" / "a_pet", write_study)
    drop_slice(pet.series.paths[0][4])
    assert predict(make_run(two_channels(make_plan, "CT", "PT")), tmp_path / "in", tmp_path / "out") == 2
    text = capsys.readouterr().err
    assert "(PT, " in text
    assert "1 slice is missing" in text


@pytest.mark.parametrize("options", [(), ("--channels", "MR")])
def test_phases_of_one_series_are_the_channels_of_a_network(
    tmp_path: Path, make_plan: Any, make_run: Any, write_study: Any, options: tuple[str, ...], capsys: Any
) -> None:
    run_dir = make_run(two_channels(make_plan, "EchoTime 2.5", "EchoTime 5"))
    echoes = {"modality": "MR", "phase_keyword": "EchoTime", "phase_values": (2.5, 5.0)}
    study = write_study(tmp_path / "in" / "a", names=(), num_channels=2, **echoes)
    write_study(tmp_path / "in" / "b", seed=1, names=(), modality="MR")
    assert predict(run_dir, tmp_path / "in", tmp_path / "out", "--format", "both", *options) == 3
    assert "holds 1 channel(s), 2 are needed" in capsys.readouterr().err
    (seg,) = (tmp_path / "out").glob("*.dcm")
    np.testing.assert_array_equal(segments_of(seg, study.series), in_file_order(seg.with_suffix(".nii.gz")))


def test_series_that_cannot_be_told_apart_are_one_line_that_says_how_to(
    tmp_path: Path, make_plan: Any, make_run: Any, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(two_channels(make_plan, "first", "second"))
    write_study(tmp_path / "in" / "a", names=())
    write_pet(tmp_path / "in" / "a_pet", write_study)
    assert predict(run_dir, tmp_path / "in", tmp_path / "out") == 2
    text = capsys.readouterr().err
    assert "it cannot be told which series are the channels first, second (found: CT, PT)" in text
    assert predict(run_dir, tmp_path / "in", tmp_path / "out", "--channels", "CT,PT") == 0


def test_several_series_of_one_study_are_cases_of_their_own(tmp_path: Path, run_dir: Path, write_study: Any) -> None:
    first = write_study(tmp_path / "in" / "a", names=())
    second = write_study(tmp_path / "in" / "b", seed=1, study_seed=0, names=(), patient="FAKE-0000")
    assert predict(run_dir, tmp_path / "in", tmp_path / "out", "--format", "both") == 0
    segs = sorted((tmp_path / "out").glob("*.dcm"))
    series = {pydicom.dcmread(seg).ReferencedSeriesSequence[0].SeriesInstanceUID: seg for seg in segs}
    for study in (first, second):
        seg = series[study.series.options.series_uid]
        np.testing.assert_array_equal(segments_of(seg, study.series), in_file_order(seg.with_suffix(".nii.gz")))


def test_the_folder_of_a_series_and_a_multi_frame_file_are_inputs(
    tmp_path: Path, run_dir: Path, write_study: Any
) -> None:
    classic = write_study(tmp_path / "a", names=())
    enhanced = write_study(tmp_path / "b", seed=1, names=(), enhanced=True)
    for number, path in enumerate((classic.series.folder, enhanced.series.files[0])):
        assert predict(run_dir, path, tmp_path / f"out{number}", "--format", "both") == 0
        assert len(list((tmp_path / f"out{number}").glob("*.*"))) == 2


def test_outputs_beside_the_images_are_no_input_of_the_next_call(
    tmp_path: Path, run_dir: Path, write_study: Any
) -> None:
    study = write_study(tmp_path / "in", names=())
    output = study.series.folder
    assert predict(run_dir, tmp_path / "in", output, "--format", "dicom_seg") == 0
    (seg,) = output.glob("case_*.dcm")
    before = seg.stat().st_mtime_ns
    assert predict(run_dir, tmp_path / "in", output, "--format", "dicom_seg") == 0
    assert seg.stat().st_mtime_ns == before
    assert read_series([file for file in dicom_files(output) if file != seg]).array.shape == (1, *study.label.shape)


def test_of_nifti_and_dicom_in_one_folder_the_nifti_files_are_taken_and_it_is_said(
    tmp_path: Path, run_dir: Path, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, names=())
    nib.save(nib.Nifti1Image(np.ones((12, 16, 8), np.float32), np.eye(4)), study.series.folder / "a.nii.gz")
    assert predict(run_dir, study.series.folder, tmp_path / "out") == 0
    assert "not the DICOM files beside them" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("*.*")] == ["a.nii.gz"]


@pytest.mark.parametrize("content", [None, "notes.txt", "report"])
def test_a_folder_without_images_is_one_line(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    from pipeline.synthetic_dicom import write_text_report

    (tmp_path / "in").mkdir()
    if content == "report":
        write_text_report(tmp_path / "in", SeriesOptions())
    elif content:
        (tmp_path / "in" / content).write_text("x")
    assert predict(run_dir, tmp_path / "in", tmp_path / "out") == 2
    message = capsys.readouterr().err.split("error: ")[1]
    assert message.startswith("in: holds neither NIfTI files nor a DICOM series of images")
    assert message.count("\n") == 1


def test_errors_name_no_folder_after_the_patient(
    tmp_path: Path, run_dir: Path, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = PlantedIdentity(patient_name="Müller^Eva", patient_id="P-99817")
    root = tmp_path / "Mueller_Eva_P99817"
    study = write_study(root, names=(), identity=identity)
    for k, file in enumerate(study.series.paths[0]):
        file.rename(file.with_name(f"EVA_MULLER_{k}.dcm"))
    (root / "image" / "EVA_MULLER_4.dcm").write_bytes(b"nothing")
    assert predict(run_dir, root, tmp_path / "out") == 2
    assert predict(run_dir, root, tmp_path / "out", "--channels", "MR") == 2
    text = capsys.readouterr().err.casefold()
    assert "slices may be missing" in text
    assert "holds no series of images for mr" in text
    assert [word for word in ("müller", "mueller", "muller", "eva", "99817") if word in text] == []
    assert list((tmp_path / "out").glob("*.*")) == []
