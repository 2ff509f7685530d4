"""`voxfit inspect` of a tree of DICOM files: every fact and problem, and nothing that tells the patient."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.synthetic_dicom import (
    PlantedIdentity,
    SeriesOptions,
    write_dose_report_screen,
    write_scout,
    write_secondary_capture,
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

Facts = dict[str, Any]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Callable[..., Facts]:
    """The JSON of `voxfit inspect PATH --json`, which must end with code 0."""

    def run(path: Path, *options: str) -> Facts:
        assert main(["inspect", str(path), "--json", "--num_workers", "1", *options]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def table_of(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> str:
    assert main(["inspect", str(path), "--num_workers", "1", *options]) == 0
    return capsys.readouterr().out


def test_every_fact_of_a_series_is_there(tmp_path: Path, write_study: Any, inspect: Any) -> None:
    study = write_study(tmp_path / "a" / "b" / "c", transfer_syntax="jpeg_ls", series_number=7)
    shown = inspect(tmp_path)
    (facts,) = shown["series"]
    assert facts == {
        "case_id": facts["case_id"],
        "folder": "a/b/c/image",
        "number": "7",
        "description": "thorax",
        "modality": "CT",
        "num_files": 10,
        "size": [16, 14, 10],
        "spacing": [1.5, 1.25, 3.0],
        "orientation": "LPS",
        "transfer_syntaxes": ["JPEG-LS Lossless"],
        "phases": [],
        "labels": ["GTV", "Liver"],
        "left_out": "",
        "problems": [],
        "notes": [],
    }
    assert facts["case_id"].startswith("case_")
    assert shown["problems"] == []
    assert len(study.series.files) == 10


def test_phases_and_multi_frame_files_are_told(tmp_path: Path, write_study: Any, inspect: Any) -> None:
    echoes = {"phase_keyword": "EchoTime", "phase_values": (2.5, 4.75)}
    write_study(tmp_path / "echoes", names=(), modality="MR", num_channels=2, **echoes)
    write_study(tmp_path / "enhanced", seed=1, names=(), modality="MR", enhanced=True)
    by_folder = {facts["folder"]: facts for facts in inspect(tmp_path)["series"]}
    assert by_folder["echoes/image"]["phases"] == ["EchoTime 2.5", "EchoTime 4.75"]
    assert by_folder["echoes/image"]["num_files"] == 20
    assert by_folder["enhanced/image"]["num_files"] == 1
    assert by_folder["enhanced/image"]["size"] == [16, 14, 10]


def test_what_is_no_volume_is_named_and_left_out(tmp_path: Path, write_study: Any, inspect: Any) -> None:
    study = write_study(tmp_path)
    for number, write in enumerate((write_secondary_capture, write_dose_report_screen, write_text_report), start=10):
        write(tmp_path / "others", SeriesOptions(seed=number, series_number=number))
    write_scout(tmp_path / "others", study.image, SeriesOptions(seed=20, series_number=20))
    (tmp_path / "notes.txt").write_text("not DICOM")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    shown = inspect(tmp_path)
    reasons = {facts["number"]: facts["left_out"] for facts in shown["series"]}
    assert reasons == {
        "1": "",
        "10": "secondary capture in colours (RGB)",
        "11": "secondary capture",
        "12": "no image (SR)",
        "20": "scout (localizer)",
    }
    assert shown["num_other_files"] == 1
    assert shown["problems"] == []


def gap(files: list[Path]) -> None:
    drop_slice(files[4])


def tilt(files: list[Path]) -> None:
    for k, file in enumerate(files):
        shift_in_plane(file, 0.8 * k)


def no_pixels(files: list[Path]) -> None:
    delete_attribute(files[:1], "PixelData")


def colours(files: list[Path]) -> None:
    set_attribute(files, "PhotometricInterpretation", "PALETTE COLOR")


PROBLEMS = {
    "1 slice is missing": gap,
    "places hold more than one slice": lambda files: duplicate_slice(files[3]),
    "copies of the same file": lambda files: copy_file(files[3], "again.dcm"),
    "unevenly spaced": lambda files: jitter_spacing(files, 0.9),
    "tilt of": tilt,
    "away from its even place": lambda files: shift_in_plane(files[4], 1.0),
    "different orientations": lambda files: mix_orientations(files[:3]),
    "is truncated": lambda files: truncate_file(files[2], 0.9),
    "has no pixel data": no_pixels,
    "the pixels are colours": colours,
    "has no ImagePositionPatient": lambda files: delete_attribute(files[:2], "ImagePositionPatient"),
    "2 different patients": lambda files: set_attribute(files[:2], "PatientID", "OTHER"),
    "2 different frames of reference": lambda files: set_attribute(files[:2], "FrameOfReferenceUID", "1.2.3"),
}


@pytest.mark.parametrize("expected", PROBLEMS)
def test_every_kind_of_problem_is_told_in_table_and_json(
    tmp_path: Path, write_study: Any, inspect: Any, capsys: pytest.CaptureFixture[str], expected: str
) -> None:
    study = write_study(tmp_path / "bad", names=())
    write_study(tmp_path / "good", seed=1, names=())
    PROBLEMS[expected](list(study.series.paths[0]))
    bad, good = inspect(tmp_path)["series"]
    assert expected in "; ".join(bad["problems"])
    assert bad["size"] is None
    assert good["problems"] == []
    table = " ".join(table_of(capsys, tmp_path).split())
    assert "problems: 1" in table
    assert expected in table
    assert "(refused)" in table


def test_a_file_that_cannot_be_read_is_a_problem_of_the_tree_and_of_the_series_beside_it(
    tmp_path: Path, write_study: Any, inspect: Any
) -> None:
    study = write_study(tmp_path, names=())
    study.series.paths[0][9].write_bytes(b"nothing of DICOM")
    shown = inspect(tmp_path)
    assert shown["problems"] == [f"image/{study.series.paths[0][9].name} is damaged, or no DICOM file"]
    assert "slices may be missing" in shown["series"][0]["problems"][0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_listed_is_a_problem(tmp_path: Path, write_study: Any, inspect: Any) -> None:
    write_study(tmp_path / "open", names=())
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    assert inspect(tmp_path)["problems"] == ["closed cannot be read (Permission denied)"]


def test_folders_behind_links_are_looked_through_once(tmp_path: Path, write_study: Any, inspect: Any) -> None:
    write_study(tmp_path / "store" / "a", names=())
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "a" / "loop").symlink_to(tmp_path / "tree")
    (facts,) = inspect(tmp_path / "tree")["series"]
    assert facts["folder"] == "linked/a/image"
    assert facts["problems"] == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes on this system")
def test_pipes_and_links_to_nowhere_do_not_stop_the_inspection(tmp_path: Path, write_study: Any, inspect: Any) -> None:
    write_study(tmp_path, names=())
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "none")
    shown = inspect(tmp_path)
    assert shown["problems"] == ["link cannot be read (No such file or directory)"]
    assert shown["num_other_files"] == 1


def test_structures_without_their_series_are_a_problem(tmp_path: Path, write_study: Any, inspect: Any) -> None:
    study = write_study(tmp_path / "a", names=("GTV",))
    write_study(tmp_path / "b", seed=1)
    for file in study.series.files:
        file.unlink()
    assert inspect(tmp_path)["problems"] == [
        "a/structures/observer.dcm (RTSTRUCT: GTV) refers to a series that is not here"
    ]


def test_text_that_looks_like_markup_is_shown_as_it_is(
    tmp_path: Path, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path / "[red]x", names=("GTV [/b]",), series_description="[bold] :smile: [/x]")
    drop_slice(study.series.paths[0][4])
    table = table_of(capsys, tmp_path)
    for text in ("[bold]", ":smile:", "[/x]", "GTV [/b]", "[red]x/image"):
        assert text in table


PATIENT = PlantedIdentity(
    patient_name="Müller-Grün^José",
    patient_id="PAT 4711",
    birth_date="19560312",
    accession_number="ACC0815X",
    institution_name="Klinik am Berg",
    referring_physician="Quack^Salber",
)
TELLING = (
    *("müller", "grün", "muller", "mueller", "josé", "jose", "pat4711", "4711", "19560312", "12.03.1956"),
    *("acc0815x", "berg", "quack", "salber"),
)


@pytest.mark.parametrize("fault", [None, gap, no_pixels, lambda files: truncate_file(files[0], 0.2)])
def test_nothing_tells_the_patient_whatever_is_named_after_it(
    tmp_path: Path, write_study: Any, capsys: pytest.CaptureFixture[str], fault: Callable[..., None] | None
) -> None:
    root = tmp_path / "JOSE_MUELLER" / "Mueller, José (PAT4711) 12.03.1956"
    description = "Thorax Müller Grün acc0815x, Dr. Salber, KLINIK AM BERG"
    study = write_study(root, names=("GTV José",), identity=PATIENT, series_description=description)
    named = [file.rename(file.with_name(f"josé_muller_PAT-4711_{k}.dcm")) for k, file in enumerate(study.series.files)]
    if fault is not None:
        fault(named)
    for path in (tmp_path, tmp_path / "JOSE_MUELLER", root / "image", named[1]):
        for options in ([], ["--json"]):
            assert main(["inspect", str(path), *options, "--num_workers", "1"]) == 0
            out = capsys.readouterr()
            shown = json.dumps(json.loads(out.out), ensure_ascii=False) if options else out.out
            shown = (shown + out.err).casefold()
            assert "thorax" in shown
            assert [word for word in TELLING if word in shown] == []


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["inspect", *words, "--num_workers", "1"]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_an_empty_folder_is_an_error_that_says_what_was_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds neither a dataset nor DICOM files" in refused(capsys, str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    assert "holds neither a dataset nor DICOM files" in refused(capsys, str(tmp_path))
    assert "no such file or folder" in refused(capsys, str(tmp_path / "none"))


def test_a_single_file_is_a_series_of_one(tmp_path: Path, write_study: Any, inspect: Any) -> None:
    study = write_study(tmp_path, enhanced=True, names=())
    (facts,) = inspect(study.series.files[0])["series"]
    assert facts["size"] == [16, 14, 10]


def test_nifti_files_beside_dicom_are_counted_and_not_read(
    tmp_path: Path, write_study: Any, inspect: Any, save: Callable[..., Path]
) -> None:
    write_study(tmp_path, names=())
    save(tmp_path / "image" / "converted.nii.gz", np.zeros((2, 2, 2), np.int16))
    shown = inspect(tmp_path)
    assert (len(shown["series"]), shown["num_other_files"]) == (1, 1)


def test_folders_called_images_and_labels_may_hold_dicom(tmp_path: Path, write_study: Any, inspect: Any) -> None:
    study = write_study(tmp_path)
    (tmp_path / "image").rename(tmp_path / "images")
    (tmp_path / "structures").rename(tmp_path / "labels")
    (facts,) = inspect(tmp_path)["series"]
    assert (facts["folder"], facts["labels"]) == ("images", ["GTV", "Liver"])
    assert len(study.series.files) == 10


def test_options_of_a_dataset_are_not_ignored_in_silence(
    tmp_path: Path, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path)
    assert "--write_dataset" in refused(capsys, str(tmp_path), "--classes", "a=GTV*")
    assert "--write_dataset" in refused(capsys, str(tmp_path), "--channels", "CT")
