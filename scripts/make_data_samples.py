"""Write `data_samples/`: three small synthetic datasets and a DICOM series, the same to the bit on every run.

python scripts/make_data_samples.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.synthetic import (
    SyntheticCase,
    make_synthetic_case,
    write_msd_dataset,
    write_nnunet_raw_dataset,
    write_table_dataset,
)
from pipeline.synthetic_dicom import SeriesOptions, label_polygons, write_series, write_structures

DATA_SAMPLES = Path(__file__).resolve().parent.parent / "data_samples"


def main(folder: Path = DATA_SAMPLES) -> None:
    """Write all sample datasets into `folder`."""
    cases = {f"blobs_{number:03d}": _blobs(number) for number in range(1, 11)}
    training = {case_id: case for case_id, case in cases.items() if case_id <= "blobs_008"}
    test_cases = {case_id: case for case_id, case in cases.items() if case_id not in training}
    write_msd_dataset(folder / "msd_blobs", training, test_cases=test_cases, name="blobs")

    two_channels = {f"pair_{number:03d}": _two_channels(number) for number in range(1, 6)}
    write_nnunet_raw_dataset(folder / "nnunet_raw_two_channels", two_channels)

    scans = {f"p{patient}_scan{scan}": _ct(10 * patient + scan) for patient in (1, 2, 3) for scan in (1, 2)}
    patients = {case_id: case_id.split("_")[0] for case_id in scans}
    write_table_dataset(folder / "table_ct", scans, patients=patients)
    _write_dicom(folder / "dicom")


def _blobs(seed: int) -> SyntheticCase:
    """MR, two organs, oblique; sizes differ a little from case to case, as real ones do."""
    shape = (38 + seed % 5, 32 - seed % 3, 22 + seed % 4)
    return make_synthetic_case(seed, shape=shape, oblique_degrees=12.0, axis_codes="RAS" if seed % 2 else "LPS")


def _two_channels(seed: int) -> SyntheticCase:
    return make_synthetic_case(
        100 + seed, shape=(28, 34, 22), spacing=(0.9, 0.8, 1.1), num_channels=2, num_classes=4, oblique_degrees=-8.0
    )


def _ct(seed: int) -> SyntheticCase:
    """CT with slices four times as thick as the pixels are wide, stored in DICOM's order of axes."""
    return make_synthetic_case(
        200 + seed, shape=(44, 40, 12), spacing=(1.0, 1.0, 4.0), oblique_degrees=5.0, modality="ct", axis_codes="LPS"
    )


def _write_dicom(folder: Path) -> None:
    """An oblique sagittal MR series in files whose names do not follow the slices, and contours of its organs."""
    case = make_synthetic_case(301, shape=(14, 24, 20), spacing=(1.5, 1.0, 1.0), oblique_degrees=7.0)
    options = SeriesOptions(
        modality="MR", is_signed=False, bits_stored=12, slice_axis=0, series_description="sample sagittal"
    )
    series = write_series(folder / "series", case.image, options)
    names = {value: name for value, name in enumerate(case.class_names) if value > 0}
    polygons = label_polygons(series, case.label.array[0], names)
    write_structures(folder / "structures.dcm", series, polygons, label="organs", decimals=3)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
