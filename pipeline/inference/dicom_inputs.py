"""DICOM series as cases to segment."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.datasets.case import Case
from pipeline.datasets.dataset import is_dataset_folder
from pipeline.datasets.dicom_cases import case_id_of, find_dicom_cases, matches
from pipeline.datasets.dicom_scan import Scan, scan_folder
from pipeline.errors import InputError
from pipeline.io.dicom.headers import is_dicom_file
from pipeline.io.dicom.references import SERIES_SUFFIX, write_series_file
from pipeline.io.dicom.series import Series
from pipeline.io.nifti import is_nifti_name
from pipeline.log import get_logger


def may_be_dicom(path: Path) -> bool:
    """Whether an input is to be looked through for DICOM: a DICOM file, or a folder that is nothing else we know."""
    if path.is_dir():
        return not is_dataset_folder(path) and not any(is_nifti_name(item.name) for item in path.iterdir())
    return path.is_file() and not is_nifti_name(path.name) and is_dicom_file(path)


def find_dicom_inputs(
    path: Path,
    references: Path,
    channel_names: Sequence[str],
    *,
    channels: Sequence[str] = (),
    allow_tilt: bool = False,
    num_workers: int = 1,
    case_ids: Collection[str] | None = None,
) -> tuple[Case, ...]:
    """The series under `path` as cases, one for each series of the first channel.

    Series that cannot be read are cases as well, so that they fail by name instead of being missed.

    Args:
        path: A folder, or a DICOM file.
        references: Folder for the files that stand for the series.
        channel_names: Of the network.
        channels: What chooses the series of each channel; by default its name, or, where the tree holds series of one
            modality only, all of them.
        allow_tilt: Resample series whose slices are shifted evenly against each other.
        num_workers: Processes that read headers.
        case_ids: Only these; None takes all.

    Raises:
        InputError: There is no series to segment, or a wanted case is not there.
    """
    scan = scan_folder(path, num_workers=num_workers, allow_tilt=allow_tilt)
    volumes = [series for series in scan.series if not series.left_out]
    if not volumes:
        raise InputError("holds no DICOM series of images", where=path, fix="Look at it with `voxfit inspect`")
    chosen = tuple(channels) or _channels_of(volumes, channel_names)
    if len(chosen) != len(channel_names):
        raise InputError(f"channels: {len(chosen)} are named, the network takes {len(channel_names)}")
    found = {case.case_id: case for case in _as_cases(scan, chosen, references, allow_tilt=allow_tilt)}
    for problem in sorted({str(reason) for _, reason in scan.unreadable}):
        count = sum(reason == problem for _, reason in scan.unreadable)
        get_logger("predict").warning("%d file(s) of the input: %s", count, problem)
    missing = sorted(set(case_ids or ()) - set(found))
    if missing:
        raise InputError(f"has no case {', '.join(missing)}", where=path)
    return tuple(found[case_id] for case_id in sorted(found) if case_ids is None or case_id in case_ids)


def _channels_of(volumes: Sequence[Series], channel_names: Sequence[str]) -> tuple[str, ...]:
    """The names of the network's channels where they choose series; one channel may also be the only modality.

    Raises:
        InputError: It cannot be told which series the network is for.
    """
    if all(any(matches(series, name) for series in volumes) for name in channel_names):
        return tuple(channel_names)
    modalities = sorted({series.first.modality for series in volumes})
    if len(channel_names) == 1 and len(modalities) == 1:
        return (modalities[0],)
    raise InputError(
        f"it cannot be told which series are the channels {', '.join(channel_names)} (found: {', '.join(modalities)})",
        where="channels",
        fix='Name a modality or a pattern for SeriesDescription for each, as in --channels "CT,PT"',
    )


def _as_cases(scan: Scan, channels: Sequence[str], references: Path, *, allow_tilt: bool) -> list[Case]:
    found = find_dicom_cases(scan, channels)
    cases = []
    for case in found.cases:
        files = [references / f"{case.case_id}_{index:04d}{SERIES_SUFFIX}" for index in range(len(case.series))]
        for file, series in zip(files, case.series, strict=True):
            write_series_file(file, series.paths, allow_tilt=allow_tilt)
        cases.append(Case(case_id=case.case_id, images=tuple(files), label=None, patient=case.patient))
    for series in scan.series:
        case_id = case_id_of(series)
        if case_id in found.failures:
            file = references / f"{case_id}_0000{SERIES_SUFFIX}"
            write_series_file(file, series.paths, allow_tilt=allow_tilt)
            cases.append(Case(case_id=case_id, images=(file,), label=None))
    return cases
