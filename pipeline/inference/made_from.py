"""What a segmentation was made from, so that no folder holds those of two models or of replaced images unnoticed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.artifacts import content_hash, file_hash
from pipeline.datasets.dataset import Case
from pipeline.errors import InputError
from pipeline.inference.export_formats import OutputFormat
from pipeline.inference.predictor import Predictor
from pipeline.io.image_file import is_series, source_files
from pipeline.networks.weights import hash_weights
from pipeline.prediction_record import MadeFrom, read_records

MOST_NAMED = 3


def describe_model(predictor: Predictor) -> dict[str, str]:
    """Everything of a predictor that segmentations follow from, in words; how fast it is and where it runs are not."""
    weights = sorted(hash_weights(member.network.state_dict()) for member in predictor.members)
    axes = sorted({" ".join(map(str, member.tta_axes)) or "none" for member in predictor.members})
    steps = predictor.postprocessing
    return {
        "weights": " + ".join(weights),
        "overlap": f"{predictor.overlap:g}",
        "mirrored axes": ", ".join(axes),
        "post-processing": content_hash([repr(step) for step in steps]) if steps else "none",
        "windows of air": "left out" if predictor.skip_air else "computed",
    }


def describe_source(case: Case, model: Mapping[str, str]) -> MadeFrom:
    """What the segmentation of a case is made from.

    Raises:
        InputError: A file of the case is not there any more.
        OSError: One cannot be read.
    """
    files = _image_files(case)
    return MadeFrom(model=dict(model), image_bytes=_num_bytes(files), image_hash=_hash(files))


def check_kept(
    cases: Sequence[Case], files: Mapping[str, Mapping[OutputFormat, Path]], output: Path, model: Mapping[str, str]
) -> None:
    """Refuse to keep segmentations that this model would not make of these images.

    Those without a record, or with one of an earlier version, are taken for what they seem to be.

    Args:
        cases: To segment.
        files: Of each case, some of which may be there.
        output: Their folder.
        model: From `describe_model`.

    Raises:
        InputError: Some were made from other weights, with other options, or of other images.
    """
    there = {case.case_id: [path for path in files[case.case_id].values() if path.exists()] for case in cases}
    records = read_records(output, (case_id for case_id, paths in there.items() if paths))
    by_id = {case.case_id: case for case in cases}
    reasons = {
        case_id: "; ".join(_differences(by_id[case_id], record.made_from, there[case_id], model))
        for case_id, record in records.items()
        if record.made_from is not None
    }
    found = {case_id: reason for case_id, reason in reasons.items() if reason}
    if not found:
        return
    named = [f"{case_id} ({reason})" for case_id, reason in list(found.items())[:MOST_NAMED]]
    more = f" and {len(found) - len(named)} more" if len(found) > len(named) else ""
    raise InputError(
        f"{len(found)} segmentation(s) are there that would come out otherwise now: {', '.join(named)}{more}",
        where=output,
        fix="Make them anew with --overwrite, or choose another folder",
    )


def _differences(case: Case, before: MadeFrom, paths: Sequence[Path], model: Mapping[str, str]) -> Iterator[str]:
    for key, value in model.items():
        if before.model.get(key, value) != value:
            yield f"{key}: {before.model[key]}, now {value}"
    if _is_other_image(case, before, paths):
        yield "its image is another one now"


def _is_other_image(case: Case, before: MadeFrom, paths: Sequence[Path]) -> bool:
    """By size, and by content where the image was touched since: reading all again is what keeping saves."""
    try:
        files = _image_files(case)
        if before.image_bytes != _num_bytes(files):
            return True
        return _is_newer(files, paths) and before.image_hash != _hash(files)
    except (OSError, InputError):
        # What cannot be read now was read then.
        return False


def _num_bytes(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _hash(files: Sequence[Path]) -> str:
    return content_hash([file_hash(file) for file in files])


def _is_newer(files: Sequence[Path], segmentations: Sequence[Path]) -> bool:
    """Whether an image was changed after it was segmented, by the clock."""
    made = min(path.stat().st_mtime_ns for path in segmentations)
    return any(file.stat().st_mtime_ns > made for file in files)


def _image_files(case: Case) -> list[Path]:
    """The files of the voxels, without references to series, which are written anew for every prediction."""
    behind = [(path, source_files(path)) for path in case.images]
    return [file for path, files in behind for file in files if file != path or not is_series(path)]
