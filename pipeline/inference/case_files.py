"""Many cases from files to files: while one is computed the next is read and prepared, and the last one written."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from math import inf, prod
from pathlib import Path
from time import monotonic

from pipeline.artifacts import check_writable, write_artifact
from pipeline.datasets.case import SeriesOrigin
from pipeline.datasets.dataset import Case, read_case_image
from pipeline.datasets.series_origin import say_origin
from pipeline.errors import CasesFailedError, InputError, VoxfitError, in_words
from pipeline.inference.attempts import held_bytes, most_bytes
from pipeline.inference.case_context import CaseContext, case_context
from pipeline.inference.case_room import Room
from pipeline.inference.export import check_formats, check_inputs, write_outputs
from pipeline.inference.export_formats import OutputFormat, output_files
from pipeline.inference.leftovers import remove_leftovers
from pipeline.inference.made_from import check_kept, describe_model, describe_source
from pipeline.inference.predictor import Predictor
from pipeline.inference.progress import PredictionProgress
from pipeline.io.image_file import source_files
from pipeline.log import get_logger
from pipeline.networks.out_of_memory import is_out_of_memory, let_go
from pipeline.prediction_record import PredictionRecord, record_path
from pipeline.preprocessing.restore import NativeScores
from pipeline.preprocessing.workers import PROCESS_BYTES, estimate_case_bytes

OTHER_FOLDER = "Choose another folder"
# A label in the widest type that its file may have, beside the label itself.
WRITTEN_VOXEL_BYTES = 8
SECONDS_ASLEEP = 0.2

# Of the formats, those that a record tells of.
SEGMENTATIONS = {"nifti", "dicom_seg"}

Files = Mapping[OutputFormat, Path]


def predict_files(
    predictor: Predictor,
    cases: Sequence[Case],
    output: Path,
    *,
    formats: Sequence[OutputFormat] = ("nifti",),
    overwrite: bool = False,
) -> list[Path]:
    """Segment cases into `output/<case_id>.nii.gz` or `.dcm`, each on the grid of its own first image, atomically.

    How each was segmented is said in `output/records/<case_id>.json`.

    A case that fails does not end the others. Outputs that exist are kept unless `overwrite`, and refused where they
    are another model's or another image's, as far as their records tell. What is stopped ends
    with whole files only, and goes on where it was. The results do not depend on what ran beside what.

    Args:
        predictor: The network; its `max_ram` bounds all cases in flight together.
        cases: Images to segment.
        output: Folder.
        formats: What is written of each case; "dicom_seg" needs DICOM series.
        overwrite: Segment again what is there already.

    Returns:
        The files of all cases, kept ones included.

    Raises:
        InputError: The folder cannot be written to, is where the images lie under the same names, the disk is full,
        or the only case failed.
        CasesFailedError: Some of several cases failed; it lists them, and its result are the other files.
    """
    check_inputs(cases, formats)
    check_writable(output, fix=OTHER_FOLDER)
    files = {case.case_id: output_files(case.case_id, output, formats) for case in cases}
    _check_not_an_input(cases, files)
    model = describe_model(predictor)
    if not overwrite:
        check_kept(cases, files, output, model)
    remove_leftovers([*_all_paths(files), *(record_path(output, case_id) for case_id in files)])
    todo = {case_id: _open_files(paths, overwrite=overwrite) for case_id, paths in files.items()}
    open_cases = [case for case in cases if todo[case.case_id]]
    if len(open_cases) < len(cases):
        get_logger("predict").info("%d output(s) are there already and are kept", len(cases) - len(open_cases))
        for case in cases:
            if not todo[case.case_id]:
                _say_result(case, files[case.case_id])
    failures = _CaseThreads(predictor, [(case, todo[case.case_id]) for case in open_cases], output, model).run()
    origins = {case.case_id: case.origins for case in open_cases}
    if len(cases) == 1:
        # Of a single case the error itself says most.
        for case_id, error in failures.items():
            if isinstance(error, VoxfitError):
                raise _with_origins(error, origins[case_id])
    if failures:
        done = {case_id: paths for case_id, paths in files.items() if case_id not in failures}
        reasons = {case_id: say_origin(in_words(error), origins[case_id]) for case_id, error in failures.items()}
        raise CasesFailedError(reasons, done=f"{len(done)} case(s) segmented", result=_all_paths(done))
    return _all_paths(files)


# ---- side by side


class _CaseThreads:
    """Cases in threads of their own, each from its files to its files; a room says whose turn it is."""

    def __init__(
        self, predictor: Predictor, cases: Sequence[tuple[Case, Files]], output: Path, model: Mapping[str, str]
    ) -> None:
        self._predictor, self._cases, self._output, self._model = predictor, cases, output, model
        lanes = predictor.threads.count if predictor.threads is not None else 1
        self._room = Room(num_lanes=lanes, most_bytes=most_bytes(predictor.max_ram), held_bytes=held_bytes)
        self._progress = PredictionProgress(len(cases))

    def run(self) -> dict[str, Exception]:
        """Segment all of them; gives what those that failed failed with.

        Raises:
            InputError: The disk is full: the next case would need the space as well.
        """
        failures: dict[int, Exception] = {}
        # One ahead and one behind those that compute.
        with self._progress.shown(), ThreadPoolExecutor(self._room.num_lanes + 2, "case") as pool:
            numbers = {pool.submit(self._attempt, number): number for number in range(len(self._cases))}
            try:
                for future in _as_they_end(numbers):
                    if (error := _failure(future)) is not None:
                        failures[numbers[future]] = error
                    self._progress.finish(numbers[future])
            except BaseException:
                for future in numbers:
                    future.cancel()
                self._room.stop()
                raise
        return {self._cases[number][0].case_id: failures[number] for number in sorted(failures)}

    def _attempt(self, number: int) -> None:
        """Segment a case, and once more without others beside it where memory was not enough for all."""
        with self._room.case(number):
            try:
                self._segment(number)
                return
            except Exception as error:
                if len(self._cases) == 1 or not is_out_of_memory(error):
                    raise
                let_go(error)
            get_logger("predict").warning("%s: out of memory, once more alone", self._cases[number][0].case_id)
            self._room.enter(number, "all", holds=0, needs=inf)
            self._segment(number, is_alone=True)

    def _segment(self, number: int, *, is_alone: bool = False) -> None:
        case, files = self._cases[number]
        predictor, enter = self._predictor, _stay if is_alone else partial(self._room.enter, number)
        enter("read", holds=0, needs=self._reading_bytes(case))
        image = read_case_image(case)
        check_formats(image, files)
        prepared, grid, source = predictor.prepare(image), image.grid, image.source
        del image
        resampling = NativeScores.of(prepared, predictor.plan).resampling
        memory = predictor.plan_memory(resampling, request=predictor.request_of(files))
        held = prepared.array.nbytes + WRITTEN_VOXEL_BYTES * prod(grid.shape)
        is_beside = enter("compute", holds=held, needs=held + memory.num_bytes, lanes=memory.num_windows)
        context = self._context(number, memory.num_bytes if is_beside else None)
        started = monotonic()
        with case_context(context):
            prediction = predictor.segment(prepared, grid, source, files)
        record = _make_record(case.case_id, monotonic() - started, context, counts_seams=predictor.count_seams)
        label = prediction.label
        del prepared
        _say_record(record, predictor)
        enter("write", holds=label.array.nbytes, needs=label.array.nbytes + WRITTEN_VOXEL_BYTES * label.array.size)
        write_outputs(prediction, files, predictor.plan)
        if SEGMENTATIONS & files.keys():
            record = replace(record, made_from=describe_source(case, self._model))
            write_artifact(record_path(self._output, case.case_id), record)
        _say_result(case, files)

    def _reading_bytes(self, case: Case) -> int:
        """What reading and preparing takes at most; of a single case nobody asks."""
        if len(self._cases) == 1:
            return 0
        return estimate_case_bytes([case], self._predictor.plan) - PROCESS_BYTES

    def _context(self, number: int, granted_bytes: int | None) -> CaseContext:
        def on_windows(count: int) -> None:
            self._room.check()
            self._progress.add(number, count)

        return CaseContext(granted_bytes, partial(self._progress.expect, number), on_windows)


def _as_they_end(futures: Collection[Future[None]]) -> Iterator[Future[None]]:
    """Wakes now and then: a signal that another thread was given is handled by this one only once it is awake."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=SECONDS_ASLEEP, return_when=FIRST_COMPLETED)
        yield from done


def _stay(stage: str, **_: float) -> bool:
    """A case that is alone anyway goes from stage to stage without asking."""
    return False


def _make_record(case_id: str, seconds: float, context: CaseContext, *, counts_seams: bool) -> PredictionRecord:
    notes = context.notes
    return PredictionRecord(
        case_id=case_id,
        seconds=round(seconds, 3),
        windows=notes.windows,
        air_windows=notes.skipped,
        compared_voxels=notes.compared if counts_seams else None,
        disagreeing_voxels=notes.disagreeing if counts_seams else None,
    )


def _say_record(record: PredictionRecord, predictor: Predictor) -> None:
    """Log what was asked for beside the segmentation."""
    logger, case_id = get_logger("predict"), record.case_id
    if predictor.skip_air:
        share = record.air_windows / max(1, record.windows)
        logger.info("%s: %d of %d windows (%.0f %%) are air", case_id, record.air_windows, record.windows, 100 * share)
    # Where windows overlap nowhere in what was found there is nothing to say.
    if record.compared_voxels:
        share, compared = record.seam_share or 0, record.compared_voxels
        text = f"{case_id}: overlapping windows disagree on {share:.1%} of {compared} voxels".replace("%", " %")
        if record.has_many_seams:
            logger.warning("%s; give a larger --overlap, or train with a larger patch", text)
        else:
            logger.info("%s", text)


def _say_result(case: Case, files: Files) -> None:
    """Log which DICOM series the files of a case belong to: the names of the files tell nobody."""
    if case.origins:
        names = ", ".join(path.name for path in files.values())
        get_logger("predict").info("%s: %s", case.case_id, say_origin(names, case.origins))


def _with_origins(error: VoxfitError, origins: Sequence[SeriesOrigin]) -> VoxfitError:
    """The error with the series that it is about."""
    if not origins or not isinstance(error, InputError):
        return error
    what = f"{error.where}: {error.what}" if error.where else error.what
    return InputError(say_origin(what, origins), fix=error.fix)


def _failure(future: Future[None]) -> Exception | None:
    """What a case failed with.

    Raises:
        Exception: What all cases end with: a full disk, or a defect of ours.
    """
    error = future.exception()
    if error is None:
        return None
    if not isinstance(error, (VoxfitError, OSError, MemoryError)) and not is_out_of_memory(error):
        raise error
    if _is_disk_full(error):
        raise error
    assert isinstance(error, Exception)
    return error


# ---- files


def _open_files(paths: Files, *, overwrite: bool) -> dict[OutputFormat, Path]:
    """The files of a case that are still to be written."""
    return {kind: path for kind, path in paths.items() if overwrite or not path.exists()}


def _all_paths(files: Mapping[str, Files]) -> list[Path]:
    return [path for paths in files.values() for path in paths.values()]


def _check_not_an_input(cases: Sequence[Case], files: Mapping[str, Files]) -> None:
    for case in cases:
        inputs = {file.resolve() for image in case.images for file in _files_of(image)}
        for path in files[case.case_id].values():
            if path.resolve() in inputs:
                raise InputError("is an image that would be overwritten", where=path, fix=OTHER_FOLDER)


def _files_of(image: Path) -> tuple[Path, ...]:
    """What stands behind an image; when that cannot be told, the case fails for this when its turn comes."""
    try:
        return source_files(image)
    except InputError:
        return (image,)


def _is_disk_full(error: BaseException) -> bool:
    return any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in (error, error.__cause__))
