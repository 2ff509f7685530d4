"""What a prediction is to segment, and DICOM series as cases of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.allocation import resolve_num_workers
from pipeline.config import PredictConfig
from pipeline.datasets.case import Case
from pipeline.datasets.dicom_cases import (
    CHANNEL_MODALITY,
    DicomCases,
    case_id_of,
    find_dicom_cases,
    matches,
    parse_channels,
    shown_root,
)
from pipeline.datasets.dicom_scan import Scan, is_volume_dataset, scan_folder
from pipeline.datasets.series_origin import origins_in, with_origins
from pipeline.errors import InputError
from pipeline.inference.inputs import choose_cases, find_inputs
from pipeline.inference.loading import read_plan
from pipeline.io.dicom.headers import is_dicom_file
from pipeline.io.dicom.reader import LOOK
from pipeline.io.dicom.references import SERIES_SUFFIX, write_series_file
from pipeline.io.dicom.series import Series
from pipeline.io.nifti import is_nifti_name
from pipeline.log import get_logger
from pipeline.preprocessing.shards import share_of


def may_be_dicom(path: Path) -> bool:
    """Whether an input is to be looked through for DICOM: a DICOM file, or a folder that is nothing else we know.

    A folder with NIfTI files in it is taken for these alone.
    """
    if path.is_dir():
        names = [item.name for item in path.iterdir()]
        has_nifti = any(is_nifti_name(name) for name in names)
        if has_nifti and any(name.lower().endswith(".dcm") for name in names):
            get_logger("predict").warning(
                "only the NIfTI files of the input are taken, not the DICOM files beside them"
            )
        return not has_nifti and not is_volume_dataset(path)
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
        what = "holds neither NIfTI files nor a DICOM series of images"
        raise InputError(what, where=shown_root(scan), fix=LOOK)
    chosen = tuple(channels) or _channels_of(volumes, channel_names)
    # The phases of a single series may be all the channels.
    if len(chosen) not in (1, len(channel_names)):
        what = f"{len(chosen)} are named, the network takes {len(channel_names)} ({', '.join(channel_names)})"
        raise InputError(what, where="channels", fix="Name one for each, in this order")
    cases = find_dicom_cases(scan, chosen, channel_names=channel_names)
    found = _as_cases(scan, cases, references, allow_tilt=allow_tilt)
    for problem, count in sorted(Counter(reason for _, reason in scan.unreadable).items()):
        get_logger("predict").warning("%d file(s) of the input: %s", count, problem)
    return choose_cases(found, case_ids, where=shown_root(scan), fix="Look at the ids with `voxfit inspect`")


def _channels_of(volumes: Sequence[Series], channel_names: Sequence[str]) -> tuple[str, ...]:
    """The names of the network's channels where they choose series; otherwise the only modality there is.

    Raises:
        InputError: It cannot be told which series the network is for.
    """
    if all(any(matches(series, name) for series in volumes) for name in channel_names):
        return tuple(channel_names)
    modalities = sorted({series.first.modality for series in volumes})
    expected = {CHANNEL_MODALITY.get(name.strip().casefold(), modalities[0]) for name in channel_names}
    if expected != {modalities[0]} and len(modalities) == 1:
        what = f"the network is for {', '.join(channel_names)}, and all series are {modalities[0]}"
        raise InputError(what, where="channels", fix=f"If that is meant, say so with --channels {modalities[0]}")
    has_phases = any(series.stack is not None and len(series.stack.frames) > 1 for series in volumes)
    if len(modalities) == 1 and (len(channel_names) == 1 or has_phases):
        return (modalities[0],)
    raise InputError(
        f"it cannot be told which series are the channels {', '.join(channel_names)} (found: {', '.join(modalities)})",
        where="channels",
        fix='Name a modality or a pattern for SeriesDescription for each, as in --channels "CT,PT"',
    )


def _as_cases(scan: Scan, found: DicomCases, references: Path, *, allow_tilt: bool) -> list[Case]:
    """All cases with the files that stand for their series; those that cannot be read say why when it is tried."""
    cases = []
    for case in found.cases:
        files = _series_files(case.case_id, references, len(case.series))
        for file, series in zip(files, case.series, strict=True):
            write_series_file(file, series.paths, allow_tilt=allow_tilt)
        origins = origins_in(scan, case.series)
        cases.append(Case(case_id=case.case_id, images=files, label=None, patient=case.patient, origins=origins))
    refused = {case_id_of(series): series for series in scan.series}
    for case_id, reason in found.failures.items():
        files = _series_files(case_id, references, 1)
        write_series_file(files[0], refused[case_id].paths, allow_tilt=allow_tilt, problem=reason)
        origins = origins_in(scan, [refused[case_id]])
        cases.append(Case(case_id=case_id, images=files, label=None, origins=origins))
    return cases


def _series_files(case_id: str, folder: Path, count: int) -> tuple[Path, ...]:
    return tuple(folder / f"{case_id}_{index:04d}{SERIES_SUFFIX}" for index in range(count))


def find_cases(config: PredictConfig, references: Path, case_ids: Collection[str] | None = None) -> tuple[Case, ...]:
    """The cases that a prediction is to segment, of files or of a DICOM tree.

    Args:
        config: Options of the prediction.
        references: Folder for the small files that stand for DICOM series.
        case_ids: Only these; of them the share that the options name.

    Raises:
        InputError: There is nothing to segment, or options for DICOM are given for something else.
    """
    found = _find_all(config, references, case_ids)
    if config.share is None:
        return found
    mine = share_of([case.case_id for case in found], config.share)
    cases = tuple(case for case in found if case.case_id in mine)
    get_logger("predict").info("share %s has %d of %d cases", config.shard, len(cases), len(found))
    return cases


def _find_all(config: PredictConfig, references: Path, case_ids: Collection[str] | None) -> tuple[Case, ...]:
    path = Path(config.input)
    if may_be_dicom(path):
        return find_dicom_inputs(
            path,
            references,
            [channel.name for channel in read_plan(Path(config.run_dirs[0])).channels],
            channels=parse_channels(config.channels),
            allow_tilt=config.allow_tilt,
            num_workers=resolve_num_workers("auto"),
            case_ids=case_ids,
        )
    if config.channels or config.allow_tilt:
        raise InputError("channels and allow_tilt are for folders of DICOM series", where=path, fix="Leave them out")
    everything = find_inputs(path)
    return with_origins(choose_cases(everything, case_ids, where=path), everything)
