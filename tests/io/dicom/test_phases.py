"""Frames at the same places become channels when every phase is whole, and are named when one is not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest

from pipeline.errors import InputError
from pipeline.io.dicom.reader import dicom_files, read_series, read_stack_of
from pipeline.io.image_file import read_layout
from pipeline.io.volume import Volume
from pipeline.synthetic_dicom import SeriesOptions, WrittenSeries, write_series
from pipeline.synthetic_dicom.faults import delete_attribute, drop_slice, set_attribute, shift_in_plane

SHAPE = (9, 7, 5)
# Keyword, values as written, and the name of the first channel in a classic and in a multi-frame file.
KEYS = [
    ("TemporalPositionIdentifier", (3.0, 1.0, 2.0), "TemporalPositionIdentifier 1", "TemporalPositionIndex 1"),
    ("EchoTime", (4.6, 2.3, 11.5), "EchoTime 2.3", "EffectiveEchoTime 2.3"),
    ("EchoNumbers", (2.0, 1.0, 3.0), "EchoNumbers 1", ""),
    ("DiffusionBValue", (1000.0, 0.0, 50.0), "DiffusionBValue 0", "DiffusionBValue 0"),
    ("TriggerTime", (510.5, 10.5, 95.0), "TriggerTime 10.5", "NominalCardiacTriggerDelayTime 10.5"),
    ("AcquisitionNumber", (2.0, 1.0, 10.0), "AcquisitionNumber 1", "FrameAcquisitionNumber 1"),
    ("InversionTime", (900.0, 90.0, 2000.0), "InversionTime 90", "InversionTimes 90"),
]


def make_volume(num_channels: int = 1) -> Volume:
    turn = nib.eulerangles.euler2mat(0.1, -0.2, 0.15) @ np.diag([0.9, 1.1, 2.5])
    array = np.random.default_rng(num_channels).permutation(num_channels * np.prod(SHAPE))
    affine = nib.affines.from_matvec(turn, [-11.0, 6.25, 40.5])
    return Volume.from_array(array.reshape(num_channels, *SHAPE).astype(float), affine)


def write(folder: Path, keyword: str | None = "EchoTime", values: tuple[float, ...] = (1.0, 2.0), **more: Any):
    options = SeriesOptions(modality="MR", phase_keyword=keyword, phase_values=values, **more)
    return write_series(folder, make_volume(len(values)), options)


def set_by_place(series: WrittenSeries, keyword: str, values: Any) -> None:
    """Give every file its own value: `values(phase, slice)`."""
    for c, phase in enumerate(series.paths):
        for k, path in enumerate(phase):
            set_attribute([path], keyword, values(c, k))


def refusal(files: list[Path]) -> str:
    with pytest.raises(InputError) as caught:
        read_series(files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize(("keyword", "values", "classic_name", "enhanced_name"), KEYS)
def test_phases_become_channels_in_rising_order(keyword, values, classic_name, enhanced_name, enhanced, tmp_path: Path):
    if enhanced and not enhanced_name:
        pytest.skip("a multi-frame file has no place for it")
    series = write(tmp_path, keyword, values, enhanced=enhanced)
    volume = read_series(series.files)
    order = np.argsort(values)
    np.testing.assert_array_equal(volume.array, series.array[order])
    np.testing.assert_allclose(volume.grid.affine, series.affine, atol=1e-6)
    names = read_stack_of(series.files).phase_names
    assert names[0] == (enhanced_name if enhanced else classic_name)
    assert [float(name.split(" ")[1]) for name in names] == sorted(values)
    assert read_layout(tmp_path).num_channels == 3


@pytest.mark.parametrize("keyword", ["EchoTime", "TemporalPositionIdentifier", "DiffusionBValue"])
def test_a_slice_that_one_phase_lacks_is_named(keyword: str, tmp_path: Path):
    series = write(tmp_path, keyword, (1.0, 2.0, 3.0))
    drop_slice(series.paths[1][2])
    message = refusal(dicom_files(tmp_path))
    assert f"3 phases by {keyword} lie at the same places" in message
    assert f"1 of them are incomplete ({keyword} 2 has 4 of 5 slices)" in message


def test_a_frame_that_one_phase_of_a_multi_frame_file_lacks_is_named(tmp_path: Path):
    series = write(tmp_path, "EchoTime", (1.0, 2.0), enhanced=True)
    dataset = pydicom.dcmread(series.files[0])
    gone = series.frame_numbers[1][3]
    dataset.PixelData = np.delete(np.frombuffer(dataset.PixelData, np.int16).reshape(10, -1), gone, 0).tobytes()
    del dataset.PerFrameFunctionalGroupsSequence[gone]
    dataset.NumberOfFrames = 9
    dataset.save_as(series.files[0])
    assert "(EffectiveEchoTime 2 has 4 of 5 slices)" in refusal(series.files)


def test_a_place_that_all_phases_lack_is_a_missing_slice(tmp_path: Path):
    series = write(tmp_path)
    for phase in series.paths:
        drop_slice(phase[2])
    assert "1 slice is missing" in refusal(dicom_files(tmp_path))


def test_magnitude_and_phase_become_channels(tmp_path: Path):
    series = write(tmp_path, "AcquisitionNumber")
    set_by_place(series, "AcquisitionNumber", lambda c, k: 1)
    set_by_place(series, "ImageType", lambda c, k: ["ORIGINAL", "PRIMARY", "PM"[c], "ND"])
    volume = read_series(series.files)
    assert read_stack_of(series.files).phase_names == ("ImageType M", "ImageType P")
    np.testing.assert_array_equal(volume.array, series.array[::-1])


@pytest.mark.parametrize("words", [("W", "F"), ("FAT", "WATER"), ("IN_PHASE", "OUT_PHASE")])
def test_water_and_fat_become_channels(words: tuple[str, str], tmp_path: Path):
    series = write(tmp_path, "AcquisitionNumber")
    set_by_place(series, "AcquisitionNumber", lambda c, k: 1)
    set_by_place(series, "ImageType", lambda c, k: ["DERIVED", "PRIMARY", "DIXON", words[c]])
    order = np.argsort(words)
    np.testing.assert_array_equal(read_series(series.files).array, series.array[order])


def test_directions_of_one_weighting_become_channels(tmp_path: Path):
    """One image without weighting, which has no direction, and three directions of one b-value."""
    series = write(tmp_path, "DiffusionBValue", (0.0, 1000.0, 1001.0, 1002.0))
    for c, direction in enumerate([None, [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]):
        set_attribute(series.paths[c], "DiffusionBValue", 1000.0 if c else 0.0)
        if direction is not None:
            set_attribute(series.paths[c], "DiffusionGradientOrientation", direction)
    volume = read_series(series.files)
    names = read_stack_of(series.files).phase_names
    assert len(names) == len(set(names)) == 4
    by_name = {name: channel for name, channel in zip(names, volume.array, strict=True)}
    for c, word in enumerate(["none", "1/0/0", "0/1/0", "0/0/1"]):
        (name,) = [name for name in names if name.endswith(word)]
        np.testing.assert_array_equal(by_name[name], series.array[c])


def test_two_keys_together_tell_what_neither_does_alone(tmp_path: Path):
    series = write(tmp_path, "EchoTime", (1.0, 2.0, 3.0, 4.0))
    set_by_place(series, "EchoTime", lambda c, k: f"{(2.5, 5)[c % 2]}")
    set_by_place(series, "InversionTime", lambda c, k: f"{(100, 900)[c // 2]}")
    volume = read_series(series.files)
    names = read_stack_of(series.files).phase_names
    expected = [f"EchoTime {echo}, InversionTime {time}" for echo in ("2.5", "5") for time in (100, 900)]
    assert list(names) == expected
    np.testing.assert_array_equal(volume.array, series.array[[0, 2, 1, 3]])


def test_two_spellings_of_one_number_are_one_phase(tmp_path: Path):
    series = write(tmp_path, "EchoTime", (2.4, 4.8))
    set_by_place(series, "EchoTime", lambda c, k: ("2.4", "4.8")[c] + ("0" if k % 2 else ""))
    np.testing.assert_array_equal(read_series(series.files).array, series.array)
    assert read_stack_of(series.files).phase_names == ("EchoTime 2.4", "EchoTime 4.8")


@pytest.mark.parametrize("keyword", ["TriggerTime", "FrameReferenceTime", "AcquisitionNumber", "AcquisitionTime"])
def test_a_value_that_counts_slices_does_not_confuse(keyword: str, tmp_path: Path):
    values = {"AcquisitionTime": lambda c, k: f"1200{10 + 5 * c + k}"}.get(keyword, lambda c, k: str(1 + 5 * c + k))
    alone = write(tmp_path / "one", "EchoTime", (2.0,))
    set_by_place(alone, keyword, values)
    volume = read_series(alone.files)
    np.testing.assert_array_equal(volume.array, alone.array)
    both = write(tmp_path / "two", "DiffusionBValue", (0.0, 800.0))
    set_by_place(both, keyword, values)
    np.testing.assert_array_equal(read_series(both.files).array, both.array)
    assert read_stack_of(both.files).phase_names == ("DiffusionBValue 0", "DiffusionBValue 800")


def test_times_that_differ_at_every_slice_are_not_made_into_phases(tmp_path: Path):
    """Nothing says which of two frames belongs to which phase; their order is not taken for an answer."""
    series = write(tmp_path, "TriggerTime", (10.0, 20.0))
    set_by_place(series, "TriggerTime", lambda c, k: f"{10 * c + k * 0.1 + 5:.1f}")
    message = refusal(series.files)
    assert re.search(r"phases by TriggerTime .* incomplete", message), message


def test_many_frames_at_one_place_are_no_volume(tmp_path: Path):
    series = write(tmp_path, "TriggerTime", (1.0, 2.0, 3.0))
    kept = [phase[2] for phase in series.paths]
    assert "all 3 slices lie at one place, which is no volume" in refusal(kept)


def test_what_nothing_tells_apart_is_named_by_number(tmp_path: Path):
    series = write(tmp_path)
    delete_attribute(series.files, "EchoTime")
    numbers = sorted(int(series.instance_numbers[c][0]) for c in (0, 1))
    message = refusal(series.files)
    assert "5 of 5 places hold more than one slice and nothing tells them apart" in message
    found = re.search(r"first at place 0: InstanceNumber (\d+), (\d+)", message)
    assert sorted(map(int, found.groups())) == numbers


def test_phases_that_lie_beside_each_other_are_refused(tmp_path: Path):
    series = write(tmp_path)
    for path in series.paths[1]:
        shift_in_plane(path, 0.4)
    assert "mm away from its even place" in refusal(series.files)


@pytest.mark.parametrize("keyword", ["EchoTime", "DiffusionBValue"])
def test_one_slice_of_another_phase_is_no_slice_of_this_volume(keyword: str, tmp_path: Path):
    """Two echoes of which each lost what the other kept fill every place once."""
    series = write(tmp_path, keyword, (2.0, 30.0))
    mixed = [*series.paths[0][:2], series.paths[1][2], *series.paths[0][3:]]
    assert f"slices of one volume differ in {keyword} (2 in 4, 30 in 1)" in refusal(mixed)
    set_by_place(series, "TemporalPositionIdentifier", lambda c, k: 1 + c)
    other = series.paths[1][3]
    set_attribute([other], keyword, 2.0 if keyword == "DiffusionBValue" else "2")
    assert "differ in" in refusal(series.files) or "incomplete" in refusal(series.files)


def test_echo_times_that_jitter_are_one_volume(tmp_path: Path):
    series = write(tmp_path, "EchoTime", (30.0,))
    set_by_place(series, "EchoTime", lambda c, k: f"{30 + 0.01 * k:.2f}")
    np.testing.assert_array_equal(read_series(series.files).array, series.array)


def test_phases_of_pet_have_slopes_of_their_own(tmp_path: Path):
    options = SeriesOptions(
        modality="PT", slope_per_slice=True, phase_keyword="TriggerTime", phase_values=(0.0, 60000.0)
    )
    series = write_series(tmp_path, make_volume(2), options)
    assert len({frame.slope for phase in read_stack_of(series.files).frames for frame in phase}) > 5
    np.testing.assert_array_equal(read_series(series.files).array, series.array.astype(np.float32))


def test_phases_in_folders_of_their_own_are_one_series(tmp_path: Path):
    series = write(tmp_path / "in")
    moved = []
    for c, phase in enumerate(series.paths):
        (tmp_path / str(c)).mkdir()
        moved += [Path(shutil.move(path, tmp_path / str(c) / path.name)) for path in phase]
    np.testing.assert_array_equal(read_series(moved).array, series.array)


def test_many_phases_are_told_apart_in_a_moment(tmp_path: Path):
    """Thirty directions, and per-slice times that no combination of has to be tried in vain for long."""
    values = tuple(float(n) for n in range(1, 31))
    series = write(tmp_path, "TemporalPositionIdentifier", values)
    set_by_place(series, "FrameReferenceTime", lambda c, k: str(7 * c + k))
    assert read_series(series.files).array.shape == (30, *SHAPE)


def item(**values: Any) -> pydicom.Dataset:
    made = pydicom.Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def direction(number: int) -> dict[str, Any]:
    axis = [float(number == place) for place in (1, 2, 3)]
    inner = [item(DiffusionGradientOrientation=axis)] if number else []
    return {"MRDiffusionSequence": item(DiffusionBValue=700.0, DiffusionGradientDirectionSequence=inner)}


def flip_angle(number: int) -> dict[str, Any]:
    return {"MRTimingAndRelatedParametersSequence": item(FlipAngle=5.0 * (number + 1))}


def dixon(number: int) -> dict[str, Any]:
    kind = ["DERIVED", "PRIMARY", "DIXON", ("WATER", "FAT", "IN_PHASE")[number]]
    return {"MRImageFrameTypeSequence": item(FrameType=kind, ComplexImageComponent="MAGNITUDE")}


@pytest.mark.parametrize(
    ("groups", "keyword"),
    [(direction, "DiffusionGradientOrientation"), (flip_angle, "FlipAngle"), (dixon, "FrameType")],
)
def test_frames_are_told_apart_by_what_their_functional_groups_say(groups: Any, keyword: str, tmp_path: Path):
    series = write(tmp_path, "TemporalPositionIdentifier", (1.0, 2.0, 3.0), enhanced=True)
    dataset = pydicom.dcmread(series.files[0])
    order = {}
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        content = frame.FrameContentSequence[0]
        number = int(content.TemporalPositionIndex) - 1
        del content.TemporalPositionIndex
        for name, group in groups(number).items():
            setattr(frame, name, [group])
        order[number] = str(groups(number))
    dataset.save_as(series.files[0])
    names = read_stack_of(dicom_files(tmp_path)).phase_names
    assert len(names) == 3
    assert all(name.startswith(keyword) for name in names)
    array = read_series(dicom_files(tmp_path)).array
    # Each channel is one of the phases that were written, and none comes twice.
    found = [[np.array_equal(channel, written) for written in series.array] for channel in array]
    assert np.array(found).sum(axis=0).tolist() == [1, 1, 1]


def test_times_of_acquisition_tell_phases_apart_where_nothing_else_does(tmp_path: Path):
    series = write(tmp_path, "AcquisitionNumber", (1.0, 2.0))
    set_by_place(series, "AcquisitionTime", lambda c, k: f"12000{c}.5")
    delete_attribute(series.files, "AcquisitionNumber")
    assert [name.split(" ")[0] for name in read_stack_of(dicom_files(tmp_path)).phase_names] == ["AcquisitionTime"] * 2
    np.testing.assert_array_equal(read_series(dicom_files(tmp_path)).array, series.array)
