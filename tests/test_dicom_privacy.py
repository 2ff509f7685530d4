"""Nothing that tells a patient leaves the DICOM files: searched for in all that a whole run shows and writes.

Of what is written, only DICOM segmentations may hold it, as the standard wants the study's own identity. Where folders
and files are named after patients, the references `*.series.json` and `*.structures.json` hold those names as well:
they are places of files, and reading the files needs them. Everything else must be clean, whatever things are called.
"""

from __future__ import annotations

import gzip
import logging
import re
import shutil
import subprocess
import sys
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.config import disable_value_validation

from pipeline.cli import main
from pipeline.log import get_logger
from pipeline.synthetic_dicom import PlantedIdentity, label_polygons, write_structures
from pipeline.synthetic_dicom.faults import (
    copy_file,
    delete_attribute,
    drop_slice,
    duplicate_slice,
    mix_orientations,
    set_attribute,
    shift_in_plane,
    truncate_file,
)

PATIENT = PlantedIdentity(
    patient_name="Quîxotenberg-Zörbiger^Ségolène^Xyliana^Dr",
    patient_id="ID-77Q4X13",
    birth_date="19561123",
    accession_number="ACCQ-998877",
    institution_name="Wolkenkuckucksheim Spital für Traumdeutung",
    institution_address="Luftschlossallee 7",
    referring_physician="Fürchtegott^Oktavian",
)
# As pydicom warns of, by quoting the values.
ODD_PATIENT = PlantedIdentity(
    patient_name="Quîxotenberg-Zörbiger^" + "Ségolène " * 9,
    patient_id="ID-77Q4X13" + "0" * 70,
    birth_date="19560x",
    accession_number="ACCQ-998877-TOO-LONG-TO-BE-ONE",
    institution_name="Wolkenkuckucksheim " * 5,
    referring_physician="Fürchtegott^Oktavian",
)
TELLING = (
    *("quixotenberg", "zorbig", "zoerbig", "segolene", "xyliana", "77q4x13", "accq-9988", "accq9988", "19560x"),
    *("19561123", "1956-11-23", "23.11.1956", "wolkenkuckuck", "traumdeutung", "luftschloss", "oktavian"),
    *("furchtegott", "fuerchtegott"),
)
FOLDER = "Segolene QUIXOTENBERG-ZOERBIGER/23.11.1956 ID_77Q4X13"
REFERENCES = (".series.json", ".structures.json")
TINY = ["--patch_size", "16", "16", "8", "--base_features", "4", "--max_features", "8"]
CPU = ["--hardware.accelerator", "cpu", "--hardware.num_workers", "0", "--hardware.num_threads", "1"]
STEP = ["--iterations_per_epoch", "2", "--num_folds", "2"]


# ---- the search


def told(text: str) -> list[str]:
    """What of the patient stands in a text, in any case, with or without accents."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).casefold()
    return [word for word in TELLING if word in plain]


def told_by_bytes(data: bytes) -> list[str]:
    """What stands in bytes, in the encodings that libraries write."""
    texts = (data.decode(encoding, errors="ignore") for encoding in ("utf-8", "latin-1", "utf-16-le", "utf-16-be"))
    return sorted({word for text in texts for word in told(text)})


def contents(path: Path) -> Iterator[bytes]:
    """A file as it is, and what is compressed inside of it."""
    data = path.read_bytes()
    yield data
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    if zipfile.is_zipfile(BytesIO(data)):
        with zipfile.ZipFile(BytesIO(data)) as archive:
            yield from (archive.read(name) for name in archive.namelist())
    if path.suffix in (".b2nd", ".b2frame"):
        import blosc2

        array = blosc2.open(str(path), mode="r")
        yield repr({**dict(array.schunk.meta), **array.schunk.vlmeta.getall()}).encode()


def told_by_files(folder: Path, *, but: Iterable[str] = ()) -> dict[str, list[str]]:
    """What names and contents of files tell, by file; of those whose names end like `but`, the names alone."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        words = set(told(name))
        if path.is_file() and not name.endswith(tuple(but)):
            words.update(word for data in contents(path) for word in told_by_bytes(data))
        if words:
            found[name] = sorted(words)
    return found


# ---- the archive


def rename_after_patient(folder: Path, files: Iterable[Path]) -> None:
    for number, file in enumerate(files):
        file.rename(file.with_name(f"Zörbiger_ID77Q4X13_{number:03d}.dcm"))


def write_archive(tree: Path, write_study: Callable[..., Any], *, named: bool) -> None:
    """Three studies of two identities with everything planted, in folders and files called after the patient or not."""
    for seed, identity in enumerate((PATIENT, ODD_PATIENT, PATIENT)):
        folder = tree / (FOLDER if named else "plain") / str(seed)
        with disable_value_validation(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = write_study(
                folder,
                seed=seed,
                names=("GTV Ségolène", "Liver"),
                identity=identity,
                series_description="Thorax ZÖRBIGER 77Q4X13",
                observer="Quixotenberg" if named else "observer",
            )
            # Structures that make the reader warn, by name.
            polygons = label_polygons(study.series, study.label, {1: "GTV Ségolène"})
            polygons["Zoerbiger point"] = [polygons["GTV Ségolène"][0][:1]]
            write_structures(folder / "structures" / "second.dcm", study.series, polygons, label="second")
        if named:
            rename_after_patient(folder, study.series.files)


def voxfit(*words: str | Path, code: int = 0) -> str:
    """What a command in a process of its own shows on both channels."""
    call = [sys.executable, "-m", "pipeline", *map(str, words)]
    done = subprocess.run(call, capture_output=True, check=False)
    shown = (done.stdout + done.stderr).decode()
    assert done.returncode == code, shown
    return shown


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, write_study: Callable[..., Any]) -> tuple[Path, str]:
    """The folder that every command has written to, and all that they have shown."""
    tree, work = tmp_path_factory.mktemp("archive"), tmp_path_factory.mktemp("work")
    write_archive(tree, write_study, named=True)
    dataset, workers = work / "set" / "thorax.json", ("--num_workers", "1")
    predict = ("predict", "--run_dir", work / "run", "--accelerator", "cpu", "--num_threads", "1")
    plan, store = work / "plan.json", work / "store"
    run_options = [f"--plan.{word[2:]}" if word.startswith("--") else word for word in TINY]
    run_options += [f"--train.{word[2:]}" if word.startswith("--") else word for word in (*STEP, *CPU)]
    shown = [
        voxfit("inspect", tree, *workers),
        voxfit("inspect", tree, "--json", *workers),
        voxfit("inspect", tree, "--write_dataset", dataset, *workers),
        voxfit("inspect", dataset, *workers),
        voxfit("run", "--dataset", dataset, "--work_dir", work / "chain", "--max_epochs", "1", *workers, *run_options),
        voxfit("plan", "--dataset", dataset, "--out", plan, *TINY, *workers),
        voxfit("preprocess", "--dataset", dataset, "--plan", plan, "--store", store, *workers),
        voxfit("train", "--plan", plan, "--store", store, "--run_dir", work / "run", "--max_epochs", "1", *STEP, *CPU),
        voxfit(*predict, "--input", tree, "--output", work / "both", "--format", "both"),
        voxfit(*predict, "--input", dataset, "--output", work / "seg", "--format", "dicom_seg"),
        voxfit(
            *("evaluate", "--predictions", work / "both", "--labels", dataset, "--out", work / "metrics.json"),
            *("--images", dataset, "--report", work / "report.html", "--run_dir", work / "run", *workers),
        ),
    ]
    return work, "\n".join(shown)


def test_a_whole_run_shows_and_writes_nothing_of_the_patient(whole_run: tuple[Path, str]) -> None:
    work, shown = whole_run
    assert told(shown) == []
    assert "***" in shown
    segmentations = tuple(f"{path.parent.name}/{path.name}" for path in work.rglob("*.dcm"))
    assert len(segmentations) == 6
    assert told_by_files(work, but=(*segmentations, *REFERENCES)) == {}


def test_a_whole_run_writes_all_that_is_searched(whole_run: tuple[Path, str]) -> None:
    work, _ = whole_run
    kinds = {path.suffix for path in work.rglob("*") if path.is_file()}
    assert kinds >= {".json", ".yaml", ".csv", ".html", ".ckpt", ".b2nd", ".gz", ".txt", ".dcm"}
    assert any("tfevents" in path.name for path in work.rglob("*"))


def test_segmentations_carry_the_identity_that_the_standard_asks_for(whole_run: tuple[Path, str]) -> None:
    work, _ = whole_run
    names = {str(pydicom.dcmread(path).PatientName) for path in (work / "seg").glob("*.dcm")}
    assert any(name.startswith("Quîxotenberg") for name in names)


def test_references_hold_names_of_files_and_nothing_from_inside(
    whole_run: tuple[Path, str], tmp_path: Path, write_study: Callable[..., Any]
) -> None:
    work, _ = whole_run
    references = [path for path in work.rglob("*.json") if path.name.endswith(REFERENCES)]
    assert len(references) == 6
    for path in references:
        without_places = re.sub(r'"[^"]*\.dcm"', "", path.read_text())
        assert told(without_places) == []
    write_archive(tmp_path / "tree", write_study, named=False)
    voxfit("inspect", tmp_path / "tree", "--write_dataset", tmp_path / "set" / "thorax.json", "--num_workers", "1")
    assert len(list((tmp_path / "set").rglob("*.structures.json"))) == 3
    assert told_by_files(tmp_path / "set") == {}


# ---- what goes wrong


class Watch(logging.Handler):
    """Keeps every line that any library logs."""

    def __init__(self) -> None:
        super().__init__(level=logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def show(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Run a command in this process: what it shows, logs and warns of by whatever library."""
    watch = Watch()
    watched = [logging.getLogger(name) for name in ("", "pydicom", "highdicom")]
    for logger in watched:
        logger.addHandler(watch)

    def run(*words: str | Path, code: int) -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert main([str(word) for word in words]) == code
        captured = capfd.readouterr()
        return "\n".join([captured.out, captured.err, *watch.lines, *(str(one.message) for one in caught)])

    yield run
    for logger in watched:
        logger.removeHandler(watch)


def damage(files: list[Path]) -> None:
    files[3].write_bytes(b"nothing of DICOM")


FAULTS: dict[str, Callable[[list[Path]], object]] = {
    "missing": lambda files: drop_slice(files[4]),
    "doubled": lambda files: duplicate_slice(files[4]),
    "copied": lambda files: copy_file(files[4], "Segolene.dcm"),
    "tilted": lambda files: [shift_in_plane(file, 0.9 * k) for k, file in enumerate(files)],
    "turned": lambda files: mix_orientations(files[:3]),
    "truncated": lambda files: truncate_file(files[3], 0.95),
    "cut in the header": lambda files: truncate_file(files[3], 0.3),
    "damaged": damage,
    "without pixels": lambda files: delete_attribute(files[:1], "PixelData"),
    "without places": lambda files: delete_attribute(files, "ImagePositionPatient"),
    "in colours": lambda files: set_attribute(files, "PhotometricInterpretation", "RGB"),
    "of two patients": lambda files: set_attribute(files[:3], "PatientID", "ID-77Q4X13-B"),
    "of two sizes": lambda files: set_attribute(files[:1], "Rows", 7),
}


@pytest.fixture
def series(tmp_path: Path, write_study: Callable[..., Any]) -> tuple[Path, list[Path]]:
    """An archive of one good study and one to be spoilt, with the files of that one in the order of its slices."""
    tree = tmp_path / "tree"
    options = {"names": ("GTV Ségolène",), "observer": "Zoerbiger", "series_description": "Thorax Zörbiger"}
    write_study(tree / FOLDER / "good", identity=PATIENT, **options)
    study = write_study(tree / FOLDER / "bad", seed=1, identity=PATIENT, **options)
    files = [file.with_name(f"Zörbiger_77Q4X13_{k:03d}.dcm") for k, file in enumerate(study.series.paths[0])]
    for old, new in zip(study.series.paths[0], files, strict=True):
        old.rename(new)
    return tree, files


@pytest.fixture(scope="module")
def run_dir(whole_run: tuple[Path, str]) -> Path:
    return whole_run[0] / "run"


@pytest.mark.parametrize("fault", FAULTS)
def test_refusals_of_trees_tell_nothing(
    tmp_path: Path, show: Callable[..., str], series: tuple[Path, list[Path]], run_dir: Path, fault: str
) -> None:
    tree, files = series
    with disable_value_validation():
        FAULTS[fault](files)
    dataset = tmp_path / "set" / "d.json"
    predict = ("predict", "--run_dir", run_dir, "--accelerator", "cpu", "--num_threads", "1")
    shown = [
        show("inspect", tree, code=0),
        show("inspect", tree, "--json", code=0),
        show("inspect", tree / FOLDER / "bad", code=0),
        show("inspect", tree, "--write_dataset", dataset, code=3),
        show("inspect", tree / FOLDER / "bad", "--write_dataset", tmp_path / "set" / "bad.json", code=2),
        show(*predict, "--input", tree, "--output", tmp_path / "out", "--format", "both", code=3),
        show(*predict, "--input", tree / FOLDER / "bad", "--output", tmp_path / "out2", code=2),
    ]
    assert "bad" in shown[0]
    assert told("\n".join(shown)) == []
    assert told_by_files(tmp_path / "set", but=REFERENCES) == {}
    assert {path.suffix for path in (tmp_path / "out").iterdir() if path.is_file()} == {".gz", ".dcm"}
    assert told_by_files(tmp_path / "out", but=[".dcm"]) == {}


LATER: dict[str, Callable[[list[Path], Path], object]] = {
    "missing": lambda files, _: files[3].unlink(),
    "truncated": lambda files, _: truncate_file(files[3], 0.95),
    "damaged": lambda files, _: damage(files),
    "all damaged": lambda files, _: [file.write_bytes(b"nothing of DICOM") for file in files],
    "structures missing": lambda _, structures: structures.unlink(),
    "structures damaged": lambda _, structures: structures.write_bytes(b"nothing of DICOM"),
    "structures cut": lambda _, structures: truncate_file(structures, 0.9),
    "contours off": lambda _, structures: move_contours(structures),
}


def move_contours(structures: Path) -> None:
    dataset = pydicom.dcmread(structures)
    contour = dataset.ROIContourSequence[0].ContourSequence[0]
    contour.ContourData = [value + (1.2 if k % 3 == 2 else 0.4) for k, value in enumerate(contour.ContourData)]
    dataset.save_as(structures)


@pytest.mark.parametrize("fault", LATER)
def test_refusals_of_a_dataset_whose_files_have_changed_tell_nothing(
    tmp_path: Path, show: Callable[..., str], series: tuple[Path, list[Path]], run_dir: Path, fault: str
) -> None:
    tree, files = series
    dataset, store = tmp_path / "set" / "d.json", tmp_path / "store"
    voxfit_options = ("--num_workers", "1")
    show("inspect", tree, "--write_dataset", dataset, code=0)
    with disable_value_validation():
        LATER[fault](files, tree / FOLDER / "bad" / "structures" / "Zoerbiger.dcm")
    plan = run_dir.parent / "plan.json"
    is_image = "structures" not in fault and "contours" not in fault
    predict = ("predict", "--run_dir", run_dir, "--accelerator", "cpu", "--num_threads", "1", "--format", "dicom_seg")
    shown = [
        show("inspect", dataset, *voxfit_options, code=3),
        show("plan", "--dataset", dataset, "--out", tmp_path / "p.json", *TINY, *voxfit_options, code=2),
        show("preprocess", "--dataset", dataset, "--plan", plan, "--store", store, *voxfit_options, code=3),
        show(
            *("preprocess", "--dataset", dataset, "--plan", plan, "--store", store, "--skip_bad_cases"),
            *voxfit_options,
            code=3,
        ),
        show(*predict, "--input", dataset, "--output", tmp_path / "out", code=3 if is_image else 0),
    ]
    assert "case_" in shown[0]
    assert told("\n".join(shown)) == []
    assert told_by_files(store) == {}
    assert told_by_files(tmp_path / "out", but=[".dcm"]) == {}


def test_a_frame_that_cannot_be_decoded_tells_nothing(
    tmp_path: Path, show: Callable[..., str], write_study: Callable[..., Any], run_dir: Path
) -> None:
    options = {"names": ("GTV Ségolène",), "series_description": "Thorax Zörbiger", "transfer_syntax": "jpeg_ls"}
    study = write_study(tmp_path / "tree" / FOLDER, identity=PATIENT, **options)
    dataset = tmp_path / "set" / "d.json"
    rename_after_patient(study.series.folder, study.series.files)
    file = sorted(study.series.folder.iterdir())[4]
    show("inspect", tmp_path / "tree", "--write_dataset", dataset, code=0)
    data = bytearray(file.read_bytes())
    start = data.rindex(b"\xff\xd8\xff") + 2
    data[start : start + 20] = bytes(20)
    file.write_bytes(data)
    predict = ("predict", "--run_dir", run_dir, "--accelerator", "cpu", "--num_threads", "1")
    shown = [
        show("inspect", dataset, "--num_workers", "1", code=3),
        show(*predict, "--input", tmp_path / "tree", "--output", tmp_path / "out", code=2),
    ]
    assert all("cannot be decoded" in text for text in shown), shown
    assert told("\n".join(shown)) == []


# ---- the search finds what it is for


@pytest.mark.parametrize(
    "text",
    ["QUIXOTENBERG", "Xyliana, Se\u0301gole\u0300ne", "id-77q4x13", "born 23.11.1956", "Dr. FÜRCHTEGOTT", "accq998877"],
)
def test_the_search_finds_each_spelling_in_text_and_in_files_of_each_kind(tmp_path: Path, text: str) -> None:
    assert told(f"a line with {text} in it")
    (tmp_path / "plain.txt").write_text(text)
    (tmp_path / "wide.bin").write_bytes(text.encode("utf-16-le"))
    (tmp_path / "volume.nii.gz").write_bytes(gzip.compress(text.encode()))
    np.savez_compressed(tmp_path / "arrays.npz", name=np.array(list(text.encode()), np.uint8))
    (tmp_path / f"{text}.csv").touch()
    assert sorted(told_by_files(tmp_path)) == sorted(path.name for path in tmp_path.iterdir())


def test_the_search_finds_what_is_stored_beside_an_array(tmp_path: Path) -> None:
    import blosc2

    array = blosc2.asarray(np.zeros((4, 4)), urlpath=str(tmp_path / "case.b2nd"), mode="w")
    array.schunk.vlmeta["source"] = "x" * 4000 + "Quixotenberg"
    assert told_by_files(tmp_path) == {"case.b2nd": ["quixotenberg"]}


def test_the_search_finds_leaks_of_logs_warnings_and_libraries(
    show: Callable[..., str], series: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.datasets import dicom_inspection

    real = dicom_inspection.hide
    tree, _ = series
    leaks: list[Callable[[], object]] = [
        lambda: get_logger("dicom").warning("reading %s", "Ségolène"),
        lambda: logging.getLogger("pydicom").warning("Invalid value for PatientID: 77Q4X13"),
        lambda: warnings.warn("Invalid value for VR DA: '19560x'.", stacklevel=1),
        lambda: print("QUIXOTENBERG"),
    ]
    for leak in leaks:

        def leaking(*arguments: Any, leak: Callable[[], object] = leak) -> str:
            leak()
            return real(*arguments)

        monkeypatch.setattr(dicom_inspection, "hide", leaking)
        assert told(show("inspect", tree, code=0))
    monkeypatch.setattr(dicom_inspection, "hide", lambda line, identity: line)
    assert told(show("inspect", tree, code=0))


def test_a_copy_of_the_archive_is_found(tmp_path: Path, series: tuple[Path, list[Path]]) -> None:
    shutil.copytree(series[0], tmp_path / "copy")
    assert len(told_by_files(tmp_path / "copy", but=[".dcm"])) >= 20
