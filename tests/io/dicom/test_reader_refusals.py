"""Series that must not be read: every fault ends in one line that names the series and what is wrong, and nobody."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.sequence import Sequence

from pipeline.errors import InputError
from pipeline.io.dicom import reader
from pipeline.io.dicom.reader import dicom_files, read_series
from pipeline.io.image_file import read_volume
from pipeline.io.volume import Volume
from pipeline.synthetic_dicom import (
    PlantedIdentity,
    SeriesOptions,
    WrittenSeries,
    write_dose_report_screen,
    write_scout,
    write_secondary_capture,
    write_series,
    write_text_report,
)
from pipeline.synthetic_dicom.faults import (
    copy_file,
    delete_attribute,
    drop_slice,
    duplicate_slice,
    jitter_spacing,
    mix_orientations,
    set_attribute,
    shift_in_plane,
    truncate_file,
)

WHO = PlantedIdentity(
    patient_name="Quxley^Wibble",
    patient_id="WXYZ-4711",
    birth_date="19370428",
    accession_number="ACCNO99871",
    institution_name="Zyzzyva Infirmary",
    referring_physician="Plugh^Xyzzy",
    comments="seen by Dr Frobozz",
)
SECRETS = ("quxley", "wibble", "wxyz", "19370428", "accno99871", "zyzzyva", "plugh", "frobozz")
OPTIONS = SeriesOptions(identity=WHO, series_description="Abdomen of Quxley WXYZ-4711", series_number=4)
SPACING = (0.9, 1.1, 2.5)


def make_volume(shape=(13, 11, 7), num_channels: int = 1) -> Volume:
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, -0.1, 0.2) @ np.diag(SPACING), [-30.0, 12.0, 7.0])
    array = np.arange(num_channels * np.prod(shape)).reshape(num_channels, *shape)
    return Volume.from_array(array.astype(float), affine)


def write(folder: Path, **changes: object) -> WrittenSeries:
    return write_series(folder, make_volume(), SeriesOptions(**(plain_options() | changes)))


def plain_options() -> dict[str, object]:
    return {name: getattr(OPTIONS, name) for name in ("identity", "series_description", "series_number")}


def refusal(folder: Path) -> str:
    """The line that a folder ends in, checked for what no line may hold."""
    with pytest.raises(InputError) as caught:
        read_volume(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert not [secret for secret in SECRETS if secret in message.lower()], message
    return message


FAULTS: dict[str, tuple[Callable[[WrittenSeries], object], str]] = {
    "missing": (lambda s: drop_slice(s.paths[0][3]), r"1 slice is missing .*2.5 mm apart.* between .* and .* mm"),
    "two missing": (lambda s: [drop_slice(s.paths[0][k]) for k in (2, 3)], r"2 slices are missing"),
    "duplicate": (lambda s: duplicate_slice(s.paths[0][2]), r"1 of 7 places hold more than one slice.* InstanceNumber"),
    "changed duplicate": (lambda s: duplicate_slice(s.paths[0][2], changes_pixels=True), r"more than one slice"),
    "copy": (lambda s: copy_file(s.paths[0][2], "again.dcm"), r"1 slice\(s\) are there more than once"),
    "shifted": (lambda s: shift_in_plane(s.paths[0][2], 0.8), r"slice 3 of 7 \(InstanceNumber \d+\) lies 0.8 mm away"),
    "jitter": (lambda s: jitter_spacing(s.paths[0], 0.5), r"unevenly spaced, .* mm apart \(tolerance 0.0\d+ mm\)"),
    "orientations": (lambda s: mix_orientations(s.paths[0][:2]), r"2 different orientations"),
    "few degrees": (lambda s: mix_orientations(s.paths[0][:2], 0.5), r"2 different orientations"),
    "truncated": (lambda s: truncate_file(s.paths[0][1], 0.9), r"1 of 7 files \(S004_\d+.dcm\): is truncated"),
    "truncated header": (lambda s: truncate_file(s.paths[0][1], 0.3), r"S004_\d+.dcm|belong to 2 series"),
    "sizes": (lambda s: set_attribute(s.paths[0][:1], "Rows", 10), r"holds more pixels than its size says"),
    "rows too many": (lambda s: set_attribute(s.paths[0][:1], "Rows", 65535), r"fewer pixels than its size needs"),
    "pixel size": (lambda s: set_attribute(s.paths[0][:2], "PixelSpacing", ["1.2", "0.9"]), r"different pixel sizes"),
    "negative size": (
        lambda s: set_attribute(s.files, "PixelSpacing", ["-1", "1"]),
        r"7 of 7 .* unusable PixelSpacing",
    ),
    "tiny size": (lambda s: set_attribute(s.files, "PixelSpacing", ["1e-9", "1e-9"]), r"singular|one place|different"),
    "slope 0": (lambda s: set_attribute(s.paths[0][:1], "RescaleSlope", "0"), r"unusable RescaleSlope \(it is 0\)"),
    "slope nan": (lambda s: set_raw(s.paths[0][:1], "RescaleSlope", "nan"), r"unusable RescaleSlope"),
    "slope inf": (lambda s: set_raw(s.paths[0][:1], "RescaleSlope", "1e999"), r"unusable RescaleSlope"),
    "slope huge": (lambda s: set_raw(s.paths[0][:1], "RescaleSlope", "1e300"), r"unusable RescaleSlope"),
    "slope text": (lambda s: set_raw(s.paths[0][:1], "RescaleSlope", "one"), r"RescaleSlope that is no number"),
    "intercept with _": (lambda s: set_raw(s.files, "RescaleIntercept", "1_0"), r"RescaleIntercept that is no number"),
    "some slopes": (lambda s: delete_attribute(s.paths[0][:2], "RescaleSlope"), r"2 of 7 slices have no RescaleSlope"),
    "position text": (
        lambda s: set_raw(s.files[:1], "ImagePositionPatient", "a\\b\\c"),
        r"ImagePositionPatient that is",
    ),
    "two positions": (lambda s: set_raw(s.files[:1], "ImagePositionPatient", "1\\2"), r"unusable ImagePositionPatient"),
    "no right angle": (lambda s: set_raw(s.files, "ImageOrientationPatient", "1\\0\\0\\1\\0\\0"), r"right angle"),
    "sign": (lambda s: set_attribute(s.files, "PixelRepresentation", 2), r"unusable PixelRepresentation"),
    "one sign": (lambda s: set_attribute(s.files[:1], "PixelRepresentation", 0), r"stored in different ways"),
    "bits": (lambda s: set_attribute(s.files, "BitsStored", 17), r"17 bits"),
    "high bit": (lambda s: [set_attribute(s.files, *x) for x in (("BitsStored", 12), ("HighBit", 15))], r"high bit 15"),
    "patients": (lambda s: set_attribute(s.files[:1], "PatientID", "WXYZ-0815"), r"belong to 2 different patients"),
    "studies": (lambda s: set_attribute(s.files[:1], "StudyInstanceUID", "1.2.3"), r"belong to 2 different studies"),
    "places": (
        lambda s: set_attribute(s.files[:1], "FrameOfReferenceUID", "1.2.3"),
        r"2 different frames of reference",
    ),
    "table": (lambda s: set_attribute(s.files, "ModalityLUTSequence", Sequence([pydicom.Dataset()])), r"ModalityLUT"),
    "several frames": (lambda s: set_attribute(s.files[:1], "NumberOfFrames", 2), r"fewer pixels|several frames"),
    "many frames": (lambda s: set_attribute(s.files[:1], "NumberOfFrames", 2**31 - 1), r"fewer pixels"),
    "palette": (lambda s: set_attribute(s.files, "PhotometricInterpretation", "PALETTE COLOR"), r"PALETTE COLOR"),
    "empty file": (lambda s: s.paths[0][1].write_bytes(b""), r"S004_\d+.dcm: is damaged, or no DICOM file"),
    "text file": (lambda s: (s.folder / "readme.dcm").write_text("hello"), r"readme.dcm: is damaged, or no DICOM file"),
    "echoes": (lambda s: set_attribute(s.files[:1], "EchoTime", "30"), r"differ in EchoTime \(none in 6, 30 in 1\)"),
}
MISSING = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "BitsAllocated"]
MISSING += ["PixelRepresentation", "PixelData", "BitsStored"]


def set_raw(paths: list[Path], keyword: str, value: str) -> None:
    """Give an element a text that pydicom would not write."""
    for path in paths:
        dataset = pydicom.dcmread(path)
        tag = pydicom.tag.Tag(keyword)
        raw = value.encode() + b" " * (len(value) % 2)
        dataset._dict[tag] = pydicom.dataelem.RawDataElement(tag, "DS", len(raw), raw, 0, False, True)
        dataset.save_as(path)


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_ends_in_a_line_that_names_it(name: str, tmp_path: Path):
    fault, words = FAULTS[name]
    series = write(tmp_path)
    assert read_volume(tmp_path).array.shape == (1, 13, 11, 7)
    fault(series)
    message = refusal(tmp_path)
    assert re.search(words, message), message
    if not re.search(r"is damaged|belong to 2 series", words):
        assert message.startswith('series 4 "Abdomen of *** ***" (CT, '), message


@pytest.mark.parametrize("in_all", [False, True])
@pytest.mark.parametrize("keyword", MISSING)
def test_what_a_slice_needs_is_never_made_up(keyword: str, in_all: bool, tmp_path: Path):
    series = write(tmp_path)
    delete_attribute(series.files if in_all else series.files[2:3], keyword)
    message = refusal(tmp_path)
    words = {"Rows": "hold no image|no image", "PixelData": "has no pixel data"}.get(keyword, f"has no {keyword}")
    assert re.search(words, message), message
    if not (in_all and keyword == "Rows"):
        assert f"{7 if in_all else 1} of 7 files (S004_" in message


@pytest.mark.parametrize(
    "keyword", ["PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence", "NumberOfFrames"]
)
def test_an_enhanced_file_without_its_groups_is_refused(keyword: str, tmp_path: Path):
    series = write(tmp_path, enhanced=True)
    delete_attribute(series.files, keyword)
    assert "1 of 1 files" in refusal(tmp_path)


@pytest.mark.parametrize("count", [6, 8, 2**31 - 1])
def test_another_number_of_frames_than_there_are_places_is_refused(count: int, tmp_path: Path):
    series = write(tmp_path, enhanced=True)
    set_attribute(series.files, "NumberOfFrames", count)
    assert re.search("frames, but says of 7|pixels", refusal(tmp_path))


def test_a_missing_frame_of_an_enhanced_file_is_named(tmp_path: Path):
    series = write(tmp_path, enhanced=True)
    dataset = pydicom.dcmread(series.files[0])
    gone = series.frame_numbers[0][3]
    frames = np.frombuffer(dataset.PixelData, np.int16).reshape(7, -1)
    dataset.PixelData = np.delete(frames, gone, axis=0).tobytes()
    del dataset.PerFrameFunctionalGroupsSequence[gone]
    dataset.NumberOfFrames = 6
    dataset.save_as(series.files[0])
    assert "1 slice is missing" in refusal(tmp_path)


@pytest.mark.parametrize("syntax", ["rle", "jpeg_lossless_sv1", "jpeg_ls", "jpeg_2000", "deflated", "explicit_be"])
@pytest.mark.parametrize("fraction", [0.999, 0.8, 0.1])
def test_truncated_files_are_refused_in_every_syntax(syntax, fraction: float, tmp_path: Path):
    series = write_series(tmp_path, make_volume((36, 33, 3)), SeriesOptions(**plain_options(), transfer_syntax=syntax))
    truncate_file(series.files[1], fraction)
    assert re.search(r"truncated|damaged|no pixel data|no image|2 series", refusal(tmp_path))


@pytest.mark.parametrize("syntax", ["rle", "jpeg_lossless_sv1", "jpeg_ls", "jpeg_2000"])
@pytest.mark.parametrize("keep", [0.5, 0.95])
def test_frames_that_end_early_within_whole_files_are_refused(syntax, keep: float, tmp_path: Path):
    """Their decoders would fill the rest, or take minutes."""
    series = write_series(tmp_path, make_volume((36, 33, 3)), SeriesOptions(**plain_options(), transfer_syntax=syntax))
    dataset = pydicom.dcmread(series.files[1])
    (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    cut = frame[: int(len(frame) * keep) // 2 * 2]
    dataset.PixelData = pydicom.encaps.encapsulate([cut], has_bot=False)
    dataset.save_as(series.files[1])
    assert re.search(rf"{series.files[1].name}: frame 0 cannot be decoded", refusal(tmp_path))


@pytest.mark.parametrize("syntax", ["rle", "jpeg_lossless_sv1", "jpeg_ls", "jpeg_2000"])
@pytest.mark.parametrize(("rows", "columns"), [(65535, 65535), (32, 36), (33, 34)])
def test_frames_of_another_size_than_the_header_says_are_refused(syntax, rows: int, columns: int, tmp_path: Path):
    series = write_series(tmp_path, make_volume((36, 33, 3)), SeriesOptions(**plain_options(), transfer_syntax=syntax))
    set_attribute(series.files, "Rows", rows)
    set_attribute(series.files, "Columns", columns)
    assert re.search("cannot be decoded|no memory", refusal(tmp_path))


def test_different_sizes_are_named(tmp_path: Path):
    write(tmp_path)
    other = write_series(tmp_path, make_volume((13, 10, 1)), SeriesOptions(**plain_options() | {"series_number": 5}))
    set_attribute(other.files, "SOPInstanceUID", "1.2.3.4")
    assert "different sizes (13 x 10, 13 x 11)" in refusal(tmp_path)


def test_colours_are_refused(tmp_path: Path):
    series = write(tmp_path)
    for path in series.files:
        dataset = pydicom.dcmread(path)
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
        dataset.PixelData = dataset.PixelData * 3
        dataset.save_as(path)
    assert "the pixels are colours (RGB), not intensities" in refusal(tmp_path)


def test_a_single_slice_without_a_thickness_has_no_extent(tmp_path: Path):
    series = write_series(tmp_path, make_volume((13, 11, 1)), OPTIONS)
    delete_attribute(series.files, "SliceThickness")
    assert "single slice without a SliceThickness" in refusal(tmp_path)


def test_what_is_no_volume_says_what_it_is(tmp_path: Path):
    makers = {
        "scout": lambda folder: write_scout(folder, make_volume(), OPTIONS),
        "secondary capture in colours": lambda folder: write_secondary_capture(folder, OPTIONS),
        "secondary capture": lambda folder: write_dose_report_screen(folder, OPTIONS),
        "no image": lambda folder: write_text_report(folder, OPTIONS),
    }
    for number, (words, make) in enumerate(makers.items()):
        make(tmp_path / str(number))
        assert f"is no volume: {words}" in refusal(tmp_path / str(number))


def test_several_series_in_one_folder_are_named(tmp_path: Path):
    write(tmp_path)
    write(tmp_path, series_number=9, seed=7, series_description="second")
    message = refusal(tmp_path)
    assert "belong to 2 series" in message
    assert 'series 4 "Abdomen of *** ***"' in message
    assert 'series 9 "second"' in message


def test_folders_without_dicom_and_missing_files_are_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("nothing")
    assert "a folder holds no DICOM files" in refusal(tmp_path)
    with pytest.raises(InputError, match=r"gone.dcm: there is no such file"):
        read_series([tmp_path / "gone.dcm"])
    with pytest.raises(InputError, match="no files of a series"):
        read_series([])


def test_a_dicomdir_and_hidden_or_other_files_are_passed_over(tmp_path: Path):
    series = write(tmp_path)
    for name in ("DICOMDIR", "dicomdir", ".hidden.dcm", "._S004_0001.dcm", "notes.txt"):
        (tmp_path / name).write_bytes(b"nothing")
    (tmp_path / "deeper.dcm").mkdir()
    assert dicom_files(tmp_path) == sorted(series.files)
    np.testing.assert_array_equal(read_volume(tmp_path).array, series.array)


def test_files_without_a_suffix_or_a_preamble_are_dicom(tmp_path: Path):
    series = write(tmp_path, transfer_syntax="implicit_le")
    for number, path in enumerate(series.files):
        dataset = pydicom.dcmread(path)
        path.unlink()
        del dataset.file_meta
        pydicom.dcmwrite(tmp_path / f"IM{number}", dataset, implicit_vr=True, little_endian=True)
    assert len(dicom_files(tmp_path)) == 7
    np.testing.assert_array_equal(read_volume(tmp_path).array, series.array)


def test_names_of_files_that_are_names_of_people_are_hidden(tmp_path: Path):
    series = write_series(
        tmp_path, make_volume((36, 33, 3)), SeriesOptions(**plain_options(), transfer_syntax="jpeg_2000")
    )
    path = series.files[1].rename(tmp_path / "Quxley_Wibble_2.dcm")
    dataset = pydicom.dcmread(path)
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f" + bytes(200)], has_bot=False)
    dataset.save_as(path)
    assert "***_2.dcm: frame 0 cannot be decoded" in refusal(tmp_path)
    truncate_file(path, 0.9)
    assert "1 of 3 files (***_2.dcm): is truncated" in refusal(tmp_path)


def test_a_damaged_length_does_not_spill_the_patient_into_a_message(tmp_path: Path):
    """An element whose length is too large holds what stands behind it, up to the patient's name."""
    for keyword in (b"\x08\x00\x60\x00CS", b"\x08\x00\x3e\x10LO", b"\x20\x00\x11\x00IS"):
        series = write(tmp_path)
        for path in series.files:
            data = bytearray(path.read_bytes())
            place = data.find(keyword) + 6
            data[place : place + 2] = (400).to_bytes(2, "little")
            path.write_bytes(bytes(data))
        refusal(tmp_path)


def test_every_secret_of_the_test_is_planted():
    planted = " ".join(asdict(WHO).values()).lower()
    assert all(secret in planted for secret in SECRETS)
    assert reader.LOOK.startswith("Look at it with")
