"""Damaged series end in the right volume or in one clear line; no decoder may end or hang the process.

Inputs are damaged and read in processes of their own, so that a crash is seen. A volume that is read from damaged
files must be (a) what pydicom makes of exactly these files, and (b) where the header of one file among several was
damaged, the undamaged volume: a value that contradicts the other slices must not pass.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.pixels import pixel_array

from pipeline.errors import InputError
from pipeline.io.dicom.codestream import PLUGINS
from pipeline.io.dicom.reader import dicom_files, read_series
from pipeline.io.volume import Volume
from pipeline.synthetic_dicom import PlantedIdentity, SeriesOptions, WrittenSeries, write_series

SECRET = "Zyxwv"
IDENTITY = PlantedIdentity(patient_name=f"{SECRET}^Qqq", patient_id=f"{SECRET}77", institution_name=f"{SECRET} clinic")
PLAIN = SeriesOptions(identity=IDENTITY, is_signed=True, slope=2, intercept=-1000)
SMALL, LARGE = (10, 8, 5), (34, 33, 5)
VARIANTS: dict[str, tuple[tuple[int, int, int], SeriesOptions]] = {
    "explicit": (SMALL, PLAIN),
    "implicit": (
        SMALL,
        replace(PLAIN, transfer_syntax="implicit_le", modality="PT", slope_per_slice=True, intercept=0),
    ),
    "big_endian": (SMALL, replace(PLAIN, transfer_syntax="explicit_be", modality="MR", bits_stored=12)),
    "deflated": (SMALL, replace(PLAIN, transfer_syntax="deflated")),
    "rle": (SMALL, replace(PLAIN, transfer_syntax="rle")),
    "jpeg_lossless": (LARGE, replace(PLAIN, transfer_syntax="jpeg_lossless_sv1", bits_stored=14, is_signed=False)),
    "jpeg_ls": (LARGE, replace(PLAIN, transfer_syntax="jpeg_ls")),
    "jpeg_2000": (LARGE, replace(PLAIN, transfer_syntax="jpeg_2000")),
    "enhanced": (SMALL, replace(PLAIN, modality="MR", enhanced=True)),
    "enhanced_rle": (SMALL, replace(PLAIN, enhanced=True, transfer_syntax="rle")),
    "enhanced_jpeg_lossless": (LARGE, replace(PLAIN, enhanced=True, transfer_syntax="jpeg_lossless", is_signed=False)),
}
KEYWORDS_TEXT = """
ImagePositionPatient ImageOrientationPatient PixelSpacing RescaleSlope RescaleIntercept Rows Columns BitsAllocated
BitsStored HighBit PixelRepresentation SamplesPerPixel PhotometricInterpretation PixelData SOPClassUID
SOPInstanceUID SeriesInstanceUID StudyInstanceUID FrameOfReferenceUID Modality ImageType NumberOfFrames
InstanceNumber SliceThickness SpacingBetweenSlices SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence
PatientID EchoTime AcquisitionNumber SpecificCharacterSet
"""
KEYWORDS = KEYWORDS_TEXT.split()
WRONG = ["", "nan", "1e999", "-1", "0", "abc", "1\\2", "65535", "2147483648", "1e-300", "1_0", "7", "999999999999999"]
SECONDS_EACH, LARGEST_GIB = 20, 1.5
VOXEL_SHARE = 0.05


@dataclass
class Damage:
    """What was done to a series: `place` says to which part, `is_in_one` whether to one file of several."""

    text: str
    place: str
    is_in_one: bool


def write_variant(folder: Path, name: str) -> WrittenSeries:
    shape, options = VARIANTS[name]
    turn = nib.eulerangles.euler2mat(0.1, -0.2, 0.15) @ np.diag([0.9, 1.1, 2.5])
    affine = nib.affines.from_matvec(turn, [-11.0, 6.25, 40.5])
    ramp = np.add.outer(np.add.outer(np.arange(shape[0]) * 2, np.arange(shape[1]) * 4), np.arange(shape[2]) * 6)
    noise = np.random.default_rng(5).integers(0, 20, shape) * 2
    return write_series(folder, Volume.from_array((ramp + noise).astype(float), affine), options)


def damage(files: dict[str, bytes], rng: random.Random) -> tuple[dict[str, bytes], Damage]:
    files, name = dict(files), rng.choice(sorted(files))
    kind = rng.choice(
        ["truncate", "flip", "flip_header", "flip_header", "flips", "element", "element", "element_in_all"]
    )
    is_in_one = len(files) > 1 and kind != "element_in_all"
    data = bytearray(files[name])
    pixels = max(data.find(b"\xe0\x7f\x10\x00"), data.find(b"\x7f\xe0\x00\x10"))
    if kind == "truncate":
        files[name] = bytes(data[: rng.randrange(len(data))])
        return files, Damage(f"{name} truncated to {len(files[name])}", "header", is_in_one)
    if kind.startswith("flip"):
        end = pixels if kind == "flip_header" and pixels > 0 else len(data)
        bits = [rng.randrange(8 * end) for _ in range(12 if kind == "flips" else 1)]
        for bit in bits:
            data[bit // 8] ^= 1 << bit % 8
        files[name] = bytes(data)
        # The bytes of a deflated file are header and pixels at once.
        is_mixed = pixels < 0 or any(bit // 8 >= pixels for bit in bits)
        return files, Damage(f"{name} bits {bits}", "pixels" if is_mixed else "header", is_in_one)
    keyword = rng.choice(KEYWORDS)
    value = rng.choice([None, *WRONG])
    for one in [name] if kind == "element" else sorted(files):
        files[one] = change_element(files[one], keyword, value, rng.random())
    place = "pixels" if keyword == "PixelData" else "header"
    return files, Damage(f"{kind} {name}: {keyword} = {value!r}", place, is_in_one)


def change_element(data: bytes, keyword: str, value: str | None, where: float) -> bytes:
    """Delete an element wherever it stands, or give one of its occurrences another value, as far as its VR allows."""
    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        Path(file.name).write_bytes(data)
        dataset = pydicom.dcmread(file.name)
        holders = [item for item in [dataset, *nested(dataset)] if keyword in item]
        if not holders:
            return data
        holder = holders[int(where * len(holders))]
        if value is None:
            del holder[keyword]
        else:
            try:
                is_text = holder[keyword].VR in ("DS", "IS", "CS", "UI", "LO", "SH")
                holder[keyword]._value = value if is_text else int(float(value)) % 65536
            except (ValueError, OverflowError):
                holder[keyword].clear()
        try:
            pydicom.dcmwrite(file.name, dataset)
        except Exception:
            return data
        return Path(file.name).read_bytes()


def nested(dataset: pydicom.Dataset) -> list[pydicom.Dataset]:
    found = []
    for tag in dataset.keys():  # noqa: SIM118 - iterating a dataset reads every element
        try:
            children = dataset[tag].value if dataset[tag].VR == "SQ" else []
        except (ValueError, NotImplementedError):
            children = []
        for item in children:
            found += [item, *nested(item)]
    return found


def oracle(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """(slices, rows, columns) intensities along the normal, and the file-order RAS+ affine, by pydicom alone."""
    frames = []
    for path in files:
        dataset = pydicom.dcmread(path, force=True)
        plugin = PLUGINS.get(str(dataset.file_meta.get("TransferSyntaxUID", "")), "")
        pixels = pixel_array(dataset, raw=True, decoding_plugin=plugin)
        per_frame = dataset.get("PerFrameFunctionalGroupsSequence")
        if not per_frame:
            frames.append((*geometry([dataset]), rescaled(pixels, [dataset])))
            continue
        shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])
        for image, own in zip(pixels if pixels.ndim == 3 else pixels[None], per_frame, strict=True):
            holders = [*nested(own), *(item for group in shared for item in nested(group)), dataset]
            frames.append((*geometry(holders), rescaled(image, holders)))
    row, column = frames[0][1][:3], frames[0][1][3:]
    frames.sort(key=lambda frame: float(np.cross(row, column) @ frame[0]))
    first, last = frames[0], frames[-1]
    step = (last[0] - first[0]) / (len(frames) - 1)
    row, column = (v / np.linalg.norm(v) for v in (first[1][:3], first[1][3:]))
    affine = np.eye(4)
    affine[:3] = np.column_stack([row * first[2][1], column * first[2][0], step, first[0]])
    return np.stack([frame[3] for frame in frames]), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def find(holders: list[Any], keyword: str, default: Any = None) -> Any:
    return next((holder[keyword].value for holder in holders if keyword in holder), default)


def geometry(holders: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    keywords = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    position, orientation, spacing = (np.array(find(holders, keyword), float) for keyword in keywords)
    return position, orientation, spacing


def rescaled(pixels: np.ndarray, holders: list[Any]) -> np.ndarray:
    slope, intercept = find(holders, "RescaleSlope"), find(holders, "RescaleIntercept")
    return pixels * float(1 if slope in (None, "") else slope) + float(0 if intercept in (None, "") else intercept)


def in_file_order(volume: Volume) -> np.ndarray:
    """(slices, rows, columns) of the first channel."""
    return volume.source.order.from_ras(volume.array)[0].transpose(2, 1, 0)


def largest_shift(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    corners = np.array(np.meshgrid(*[[0, n - 1] for n in shape], [1], indexing="ij")).reshape(4, -1)
    return float(np.abs((affine - other) @ corners).max())


def judge(folder: Path, truth: WrittenSeries, done: Damage) -> str:
    """How the damaged files in `folder` end; a text that begins with "WRONG" where they must not."""
    try:
        volume = read_series(dicom_files(folder), num_threads=1)
    except InputError as error:
        text = str(error)
        is_clear = text and "\n" not in text and "Traceback" not in text and SECRET.lower() not in text.lower()
        return "refused" if is_clear else f"WRONG message {text!r}"
    if not np.isfinite(volume.array).all() or volume.array.dtype != np.float32:
        return "WRONG not finite"
    array, grid = in_file_order(volume), volume.source.grid
    expected = truth.stored.values[0] * truth.stored.slopes[0][:, None, None] + truth.stored.intercept
    shift = (
        largest_shift(grid.affine, truth.layout.grid.affine, grid.shape)
        if grid.shape == truth.layout.grid.shape
        else np.inf
    )
    is_same_place = shift < VOXEL_SHARE * min(truth.layout.grid.spacing)
    if array.shape == expected.shape and np.array_equal(array, expected.astype(np.float32)) and is_same_place:
        return "unharmed"
    try:
        values, affine = oracle(dicom_files(folder))
    except Exception as error:
        # pydicom asks for more than is needed; then the other slices have to be what they were.
        if done.is_in_one and array.shape == expected.shape and is_same_place:
            return "unjudged" if len(changed_slices(array, expected)) < 2 else "WRONG in several slices"
        # A letter of a VR that is wrong, and wrong pixels: the number behind it is as it was.
        if done.place == "pixels" and "Value Representation" in str(error):
            return "unjudged"
        return f"WRONG only we can read it ({type(error).__name__}: {error})"
    if values.shape != array.shape or not np.array_equal(values.astype(np.float32), array):
        return "WRONG voxels"
    if largest_shift(grid.affine, affine, grid.shape) > VOXEL_SHARE * min(grid.spacing):
        return "WRONG affine"
    return "as damaged" if not contradicts(done, array, expected, is_same_place) else "WRONG contradiction passes"


def contradicts(done: Damage, array: np.ndarray, expected: np.ndarray, is_same_place: bool) -> bool:
    """Whether a damaged header of one file shows in more than the scale of its own slice."""
    if not done.is_in_one or done.place == "pixels":
        return False
    if not is_same_place or array.shape != expected.shape:
        return True
    changed = changed_slices(array, expected)
    if len(changed) != 1:
        return True
    # A slope and an intercept are a slice's own: what is left is a straight line from one to the other.
    before, after = expected[changed[0]].ravel(), array[changed[0]].ravel().astype(float)
    line = np.polynomial.Polynomial.fit(before, after, 1)
    return not np.allclose(line(before), after, rtol=1e-3, atol=1e-3 * max(1.0, np.abs(after).max()))


def changed_slices(array: np.ndarray, expected: np.ndarray) -> list[int]:
    return [k for k in range(len(array)) if not np.array_equal(array[k], expected[k].astype(np.float32))]


def run_batch(name: str, seed: int, count: int, log: Path) -> None:
    """Damage and read `count` times in this process; the log holds what is being done and what came out."""
    warnings.simplefilter("ignore")
    outcomes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch, log.open("w") as lines:
        truth = write_variant(Path(scratch, "whole"), name)
        whole = {path.name: path.read_bytes() for path in truth.files}
        folder = Path(scratch, "damaged")
        folder.mkdir()
        for number in range(count):
            files, done = damage(whole, random.Random(f"{name} {seed} {number}"))
            for file, data in files.items():
                (folder / file).write_bytes(data)
            print(f"{number}: {done}", file=lines, flush=True)
            signal.alarm(SECONDS_EACH)
            outcome = judge(folder, truth, done)
            signal.alarm(0)
            if outcome.startswith("WRONG"):
                print(f"{number}: {outcome}: {done}", flush=True)
            outcomes[outcome.split(" ")[0]] = outcomes.get(outcome.split(" ")[0], 0) + 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"outcomes": outcomes, "peak_gib": peak}))


def check_batch(name: str, seed: int, count: int, folder: Path) -> dict[str, int]:
    log = folder / "log.txt"
    command = [sys.executable, __file__, name, str(seed), str(count), str(log)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    last = log.read_text().splitlines()[-1] if log.is_file() else ""
    assert found.returncode == 0, f"exit code {found.returncode} after {last}\n{found.stderr[-2000:]}"
    *wrong, summary = found.stdout.splitlines()
    assert not wrong, "\n".join(wrong)
    result = json.loads(summary)
    assert result["peak_gib"] < LARGEST_GIB
    assert sum(result["outcomes"].values()) == count
    assert result["outcomes"].get("unjudged", 0) <= max(1, 0.02 * count)
    return dict(result["outcomes"])


@pytest.mark.parametrize("name", VARIANTS)
def test_damaged_series_end_in_the_right_volume_or_one_line(name: str, tmp_path: Path):
    outcomes = check_batch(name, 0, 60, tmp_path)
    assert outcomes.get("refused", 0) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_many_damaged_series_end_in_the_right_volume_or_one_line(name: str, tmp_path: Path):
    check_batch(name, 1, 200, tmp_path)


if __name__ == "__main__":
    run_batch(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
