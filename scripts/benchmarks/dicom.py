"""Reading a DICOM series against pydicom alone, and looking through a folder of many files.

    python scripts/benchmarks/dicom.py read --out RESULTS
    python scripts/benchmarks/dicom.py scan --out RESULTS

`read` makes a CT series per transfer syntax in a temporary folder and times `pydicom.dcmread(file).pixel_array` over
its files against `read_series`. The two take turns within one run, and the ratio of each pair is what counts: the time
of pydicom over ours. Peak memory is that of fresh processes, above what they took before they began to read. Files are
read once before, so the disk plays no part.

`scan` makes thousands of small files in nested folders and times `voxfit inspect FOLDER --json`, imports and all,
against `pydicom.dcmread(file, stop_before_pixels=True)` over the same files.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pydicom
from run_facts import write_results

from pipeline.geometry import Shape3
from pipeline.io.volume import Volume
from pipeline.synthetic_dicom import SeriesOptions, make_uid, write_series

READ_SYNTAXES = ("explicit_le", "rle", "jpeg_ls", "jpeg_lossless_sv1", "jpeg_2000")
# Run in a fresh process: peak memory in bytes above that before the reading began. Not by `ru_maxrss`, which a process
# inherits from the one that started it; VmHWM is its own, in KiB.
PEAK = """
import re, sys
from pathlib import Path
side, paths, num_threads = sys.argv[1], sorted(Path(sys.argv[2]).rglob("*.dcm")), int(sys.argv[3]) or None
import numpy, pydicom, pydicom.pixels
if side == "voxfit":
    from pipeline.io.dicom.reader import read_series
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
pydicom.dcmread(paths[0]).pixel_array
before = peak()
if side == "voxfit":
    kept = read_series(paths, num_threads=num_threads)
else:
    kept = [pydicom.dcmread(path).pixel_array for path in paths]
print(peak() - before)
"""


def make_ct(shape: Shape3, seed: int = 0) -> Volume:
    """(1, I, J, K) int16 Hounsfield units: a noisy body with smooth organs in air, which compresses as scans do."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in shape], indexing="ij", sparse=True)
    array = np.empty((1, *shape), np.int16)
    for k in range(shape[2]):
        tissue = 40 + 100 * np.sin(5 * x[..., 0] + 3 * z[0, 0, k]) * np.cos(4 * y[..., 0])
        body = x[..., 0] ** 2 + (y[..., 0] * 1.4) ** 2 < 0.8
        array[0, ..., k] = np.where(body, tissue, -1000) + rng.normal(0, 12, shape[:2])
    return Volume.from_array(np.clip(array, -1024, 3071), np.diag([0.8, 0.8, 1.5, 1.0]))


def read_with_pydicom(paths: list[Path]) -> Any:
    """What a script does that knows no better: every file in turn, one thread."""
    return [pydicom.dcmread(path).pixel_array for path in paths]


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time."""
    start = perf_counter()
    work()
    return perf_counter() - start


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Seconds of both sides in turns, the second first in every other round, after one round for warming up."""
    pairs = []
    for number in range(rounds + 1):
        order = (ours, theirs) if number % 2 else (theirs, ours)
        times = {work: seconds_of(work) for work in order}
        pairs.append((times[ours], times[theirs]))
    pairs = pairs[1:]
    ratios = sorted(other / own for own, other in pairs)
    return {
        "seconds": statistics.median(own for own, _ in pairs),
        "pydicom_seconds": statistics.median(other for _, other in pairs),
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "rounds": rounds,
    }


def peak_bytes(side: str, folder: Path, num_threads: int | None) -> int:
    """Memory that reading takes in a fresh process."""
    command = [sys.executable, "-c", PEAK, side, str(folder), str(num_threads or 0)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_read(options: argparse.Namespace) -> dict[str, Any]:
    """Times and memory per transfer syntax."""
    from pipeline.io.dicom.reader import read_series

    volume, results = clipped(make_ct(tuple(options.shape))), {}
    for syntax in options.syntaxes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            settings = SeriesOptions(transfer_syntax=syntax, bits_stored=12)
            paths = sorted(write_series(folder, volume, settings).files)
            result = paired(
                partial(read_series, paths, num_threads=options.num_threads),
                partial(read_with_pydicom, paths),
                options.rounds,
            )
            read = read_series(paths)
            np.testing.assert_array_equal(np.asarray(read.array), volume.array)
            result |= {"files_bytes": sum(path.stat().st_size for path in paths), "volume_bytes": read.array.nbytes}
            result["volume_dtype"] = str(read.array.dtype)
            result |= {
                f"peak_bytes_{side}": peak_bytes(side, folder, options.num_threads) for side in ("voxfit", "pydicom")
            }
        results[syntax] = result
        print(syntax, result, flush=True)
    return {"shape": list(options.shape), "num_threads": options.num_threads, "read": results}


def make_many_files(folder: Path, num_files: int, per_series: int = 100) -> None:
    """Small valid files of many series in nested folders: bytes of one written file with other UIDs and positions."""
    volume = Volume.from_array(np.arange(16 * 16 * per_series, dtype=np.int16).reshape(16, 16, -1) % 900, np.eye(4))
    written = write_series(folder / "template", volume, SeriesOptions(is_shuffled=False, bits_stored=12))
    templates = [(pydicom.dcmread(path).SOPInstanceUID, path.read_bytes()) for path in written.files]
    for path in written.files:
        path.unlink()
    for number in range(num_files):
        series, k = divmod(number, per_series)
        uid, data = templates[k]
        target = folder / f"patient{series // 10:03d}" / f"series{series % 10}" / f"IM{k:04d}"
        target.parent.mkdir(parents=True, exist_ok=True)
        for old, words in (
            (written.options.study_uid, ("scan study", series // 10)),
            (written.options.series_uid, ("scan series", series)),
            (written.options.frame_of_reference_uid, ("scan frame", series // 10)),
            (uid, ("scan instance", number)),
        ):
            data = data.replace(old.encode(), same_length(make_uid(*words), len(old)))
        target.write_bytes(data)


def same_length(uid: str, length: int) -> bytes:
    """A UID of exactly this length, so that no length field changes: cut, or filled with digits."""
    return uid[:length].ljust(length, "1").encode()


def clipped(volume: Volume) -> Volume:
    """Hounsfield units within 12 signed bits."""
    return Volume(np.clip(volume.array, -1024, 2047), volume.grid)


def run_scan(options: argparse.Namespace) -> dict[str, Any]:
    """Time of the command and of reading all headers with pydicom, one after the other."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        making = seconds_of(lambda: make_many_files(folder, options.num_files))
        paths = sorted(path for path in folder.rglob("*") if path.is_file())

        def inspect() -> None:
            command = [sys.executable, "-m", "pipeline", "inspect", str(folder), "--json"]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode not in (0, 3):
                raise SystemExit(done.stderr)

        def headers() -> None:
            for path in paths:
                pydicom.dcmread(path, stop_before_pixels=True)

        result = paired(inspect, headers, options.rounds)
    return {"num_files": len(paths), "making_seconds": making, "scan": result}


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["read", "scan"])
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 400), help="columns, rows, slices")
    parser.add_argument("--syntaxes", nargs="+", default=READ_SYNTAXES, choices=READ_SYNTAXES)
    parser.add_argument("--num_threads", type=int, help="of read_series; its own choice by default")
    parser.add_argument("--num_files", type=int, default=10_000, help="files to look through")
    parser.add_argument("--rounds", type=int, default=3, help="pairs that count, after one that does not")
    parser.add_argument("--out", type=Path, help="folder for the results, or a file that ends in .json")
    options = parser.parse_args()
    results = run_read(options) if options.mode == "read" else run_scan(options)
    if options.out is None:
        print(results)
        return
    print(write_results(options.out, f"dicom-{options.mode}", {**results, "decoders": decoder_versions()}))


def decoder_versions() -> dict[str, str]:
    """Versions of what decodes."""
    from importlib.metadata import PackageNotFoundError, version

    names, found = ("pydicom", "python-gdcm", "pyjpegls", "pylibjpeg-openjpeg", "pylibjpeg-rle"), {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
