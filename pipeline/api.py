"""Every stage as a function: the one module that joins the layers, and the Python interface.

Each function takes its config dataclass (of `pipeline.config`) and does what `voxfit COMMAND` does.
Heavy libraries are imported when a function needs them, so that importing this module is cheap.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from pipeline.allocation import describe_allocation, resolve_num_workers
from pipeline.artifacts import read_artifact, write_artifact
from pipeline.config import (
    CompareConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    InspectConfig,
    PlanConfig,
    PostprocessConfig,
    PredictConfig,
    PredictOptions,
    PreprocessConfig,
    StatusConfig,
    TrainConfig,
)
from pipeline.errors import CasesFailedError, InputError
from pipeline.log import get_logger, log_to_file
from pipeline.plan import Plan
from pipeline.rank_place import find_place
from pipeline.run_files import RunFiles

if TYPE_CHECKING:
    from torch import nn

    from pipeline.datasets.dicom_inspection import DicomInspection
    from pipeline.datasets.inspection import Inspection
    from pipeline.doctor.examination import Examination
    from pipeline.evaluation.comparison import Comparison
    from pipeline.evaluation.summary import Metrics
    from pipeline.inference.postprocess import Postprocessing
    from pipeline.inference.predictor import Predictor
    from pipeline.io.volume import Volume
    from pipeline.status import WorkStatus
    from pipeline.store import CaseStore
    from pipeline.training.fit_result import FitResult
    from pipeline.training.ranks import Ranks

Result = TypeVar("Result")


# ---- inspect


def inspect(config: InspectConfig) -> Inspection | DicomInspection:
    """Read a dataset or a tree of DICOM files and check every case; problems are part of the result, not errors.

    Raises:
        CasesFailedError: A dataset was written without series that cannot be read.
    """
    from pipeline.datasets.inspection import inspect_path

    found = inspect_path(config, num_workers=resolve_num_workers(config.num_workers))
    written = getattr(found, "written", None)
    return _finish(found, written.failures if written else {}, done=f"{config.write_dataset} was written")


# ---- plan


def plan(config: PlanConfig) -> Plan:
    """Check the dataset, measure it, run the planned step where there is a GPU, and write plan and fingerprint.

    Raises:
        InputError: The dataset has problems and `skip_bad_cases` is off, or nothing fits the budget, by prediction or
            when it was run on the GPU that is present.
        CasesFailedError: The plan was made without bad cases.
    """
    from pipeline.datasets.dataset import read_dataset
    from pipeline.datasets.examination import examine_cases
    from pipeline.datasets.fingerprint import fingerprint_path, make_fingerprint
    from pipeline.datasets.inspection import find_bad_cases
    from pipeline.planning.budget import find_budget
    from pipeline.planning.planner import make_plan

    budget = find_budget(config.vram)
    dataset = read_dataset(config.dataset)
    num_workers = resolve_num_workers(config.num_workers)
    examined = examine_cases(dataset, num_workers=num_workers)
    left_out = find_bad_cases(dataset, examined, num_workers=num_workers, skip=config.skip_bad_cases)
    fingerprint = make_fingerprint(dataset, num_workers=num_workers, leave_out=left_out, examined=examined)
    made = make_plan(fingerprint, config, budget_bytes=budget[0], budget_note=budget[1])
    made = _probed(made, config)
    write_artifact(fingerprint_path(Path(config.out)), fingerprint)
    write_artifact(Path(config.out), made)
    return _finish(made, left_out, done=f"{config.out} was written")


def _probed(made: Plan, config: PlanConfig) -> Plan:
    """The plan after its step was run where there is a GPU."""
    from pipeline.training.probed_plan import probed, without_probe

    return probed(made) if config.probe == "auto" else without_probe(made)


# ---- preprocess


def preprocess(config: PreprocessConfig) -> CaseStore:
    """Bring the store up to date with the dataset and the plan, case by case.

    Raises:
        CasesFailedError: Some cases were left out or failed; with `skip_bad_cases` off nothing is started
            when a case has problems. A share tells of its own cases only, and `verify` of what the store lacks.
    """
    from pipeline.datasets.dataset import read_dataset
    from pipeline.preprocessing.left_out import left_out_by_plan
    from pipeline.preprocessing.preprocess import preprocess_dataset
    from pipeline.preprocessing.shards import preprocess_share, verify_store
    from pipeline.store import CaseStore

    get_logger().info("preprocess: %s", describe_allocation())
    dataset, store, done = read_dataset(config.dataset), Path(config.store), f"{config.store} was filled"
    made = read_artifact(Path(config.plan), Plan)
    left_out = left_out_by_plan(made, dataset, config)
    if config.verify:
        lacking = verify_store(dataset, made, store, leave_out=left_out)
        return _finish(CaseStore(store), lacking, done=f"{config.store} is filled")
    if config.share is not None:
        workers = config.num_workers
        failures = preprocess_share(dataset, made, store, config.share, num_workers=workers, leave_out=left_out)
        return _finish(CaseStore(store), failures, done=f"share {config.shard} of {config.store} was made")
    failures = preprocess_dataset(dataset, made, store, num_workers=config.num_workers, leave_out=left_out)
    if failures and not config.skip_bad_cases:
        raise CasesFailedError({**left_out, **failures}, done=done)
    return _finish(CaseStore(store), {**left_out, **failures}, done=done)


# ---- train


def train(config: TrainConfig, *, network: nn.Module | None = None) -> FitResult:
    """Train one fold, or all cases, into `run_dir`; the same call again resumes.

    Args:
        config: Options.
        network: Any network that maps (B, C, I, J, K) to logits (B, classes, I, J, K), or to a list of them from the
            highest resolution down, instead of the plan's U-Net. `replace_batchnorm` makes it fit for batch size 1.

    With `hardware.devices` above 1 this starts that many processes and waits for them, unless `srun` or `torchrun` have
    started this one as one of several.
    """
    if find_place().num_ranks == 1:
        return _train(config, network)
    from pipeline.training.ranks import open_ranks

    with open_ranks() as ranks:
        # In here, so that what one of them cannot read is told to all.
        return _train(config, network, ranks)


def _train(config: TrainConfig, network: nn.Module | None, ranks: Ranks | None = None) -> FitResult:
    from pipeline.store import CaseStore
    from pipeline.training.run_splits import splits_of_run

    made = read_artifact(Path(config.plan), Plan)
    store = CaseStore(Path(config.store))
    store.check_plan(made)
    splits = splits_of_run(store, config)
    place, devices = find_place(), config.hardware.devices
    if devices not in ("auto", 1) and not place.launcher:
        from pipeline.training.device_processes import fit_in_processes

        return fit_in_processes(config, int(devices), network)
    from pipeline.training.trainer import fit_fold

    # The first of several processes speaks for all.
    with log_to_file(RunFiles(Path(config.run_dir)).log) if place.is_first else nullcontext():
        get_logger("train").info("%s", describe_allocation())
        return fit_fold(made, Path(config.store), splits, config, network=network, ranks=ranks)


# ---- status


def status(config: StatusConfig) -> WorkStatus:
    """How far the trainings in a folder are, and whether they are alive, stopped, finished or gone."""
    from pipeline.status import read_status

    return read_status(config)


# ---- doctor


def doctor(config: DoctorConfig) -> Examination:
    """What this machine or job offers and what is wrong with it; with a plan and a store, one real step of everything.

    Raises:
        InputError: A folder is missing, or plan and store do not belong together.
        CasesFailedError: Parts of the step failed; the result has the rest.
    """
    from pipeline.doctor.examination import conclude, find_facts
    from pipeline.doctor.real_step import planned_step

    for name in ("work_dir", "store"):
        path = getattr(config, name)
        if path and not Path(path).is_dir():
            raise InputError("is no folder", where=f"{name} {path}", fix="Make it, or give one that is there")
    step = planned_step(config) if config.plan else None
    facts = find_facts(config)
    found = conclude(config, facts, step() if step is not None else None)
    return _finish(found, found.failures, done="the machine was examined", things="part(s) of the step")


# ---- predict


def predict(
    config: PredictConfig, *, network: nn.Module | None = None, case_ids: Collection[str] | None = None
) -> list[Path]:
    """Segment what `input` names with a trained run, or with several as one; one file per case in `output`.

    Args:
        config: Options.
        network: The network of one's own that the run was trained with.
        case_ids: Only these cases of the input.

    Raises:
        CasesFailedError: Some cases failed; the rest is written.
    """
    from pipeline.inference.case_files import predict_files
    from pipeline.inference.dicom_inputs import find_cases
    from pipeline.inference.export_formats import output_formats
    from pipeline.inference.loading import read_held_out_by_all
    from pipeline.inference.window_batch import set_window_batch

    run_dirs = [Path(folder) for folder in config.run_dirs]
    if config.cases == "held_out":
        case_ids = read_held_out_by_all(run_dirs)
        # What these cases themselves have chosen would flatter their scores, and hide what it was chosen by.
        config = replace(config, postprocess="none")
    with TemporaryDirectory() as references:
        cases = find_cases(config, Path(references), case_ids)
        predictor = load_predictor(run_dirs, config, network=network)
        set_window_batch(predictor, config.window_batch)
        predictor.skip_air, predictor.count_seams = config.skip_air, config.seams
        formats = output_formats(config)
        return predict_files(predictor, cases, Path(config.output), formats=formats, overwrite=config.overwrite)


def load_predictor(
    run_dir: str | Path | Sequence[str | Path],
    options: PredictOptions | None = None,
    *,
    network: nn.Module | None = None,
) -> Predictor:
    """Load trained runs once, to segment many volumes with `Predictor.predict`, also from several threads.

    Args:
        run_dir: A run folder, or several: the probabilities of their networks are averaged.
        options: How they are asked; None for the defaults of `voxfit predict`.
        network: The network of one's own that the runs were trained with.
    """
    from pipeline.inference.predictor import Predictor

    run_dirs = [run_dir] if isinstance(run_dir, str | Path) else run_dir
    return Predictor.from_runs([Path(folder) for folder in run_dirs], options, network=network)


def predict_volume(
    run_dir: str | Path | Sequence[str | Path],
    volume: Volume,
    options: PredictOptions | None = None,
    *,
    network: nn.Module | None = None,
) -> Volume:
    """Segment one volume in memory; no file is written.

    Args:
        run_dir: As in `load_predictor`, which saves loading the runs again for the next volume.
        volume: (C, I, J, K) intensities in RAS order, as `pipeline.io.image_file.read_volume` gives them.
        options: As in `load_predictor`.
        network: As in `load_predictor`.

    Returns:
        (1, I, J, K) class values on the volume's own grid.
    """
    return load_predictor(run_dir, options, network=network).predict(volume)


# ---- export


def export(config: ExportConfig, *, network: nn.Module | None = None) -> Path:
    """Write a trained run as ONNX or as a MONAI bundle, compared with the run's own network before it is kept.

    Args:
        config: Options.
        network: The network of one's own that the run was trained with.
    """
    from pipeline.inference.export_target import check_target
    from pipeline.inference.exportable import load_exportable
    from pipeline.inference.monai_bundle import write_bundle
    from pipeline.inference.onnx_export import check_onnx_packages, write_onnx

    out = Path(config.out)
    check_target(out, is_folder=config.kind == "bundle" and out.suffix != ".zip", overwrite=config.overwrite)
    if config.kind == "onnx":
        check_onnx_packages()
    run = load_exportable(Path(config.run_dir), config.checkpoint, network=network)
    return write_onnx(run, out) if config.kind == "onnx" else write_bundle(run, out, overlap=config.overlap)


# ---- evaluate


def evaluate(
    config: EvaluateConfig, *, case_ids: Collection[str] | None = None, facts: Mapping[str, str] | None = None
) -> Metrics:
    """Score a folder of predictions; writes JSON, CSV and, on request, the report.

    Args:
        config: Options.
        case_ids: Cases that must be there; by default those that have a prediction.
        facts: What the report says at its top, in order.

    Raises:
        CasesFailedError: Some cases could not be scored; the rest is written.
    """
    from pipeline.assessment import write_evaluation_report
    from pipeline.evaluation.evaluate import evaluate_folder
    from pipeline.evaluation.summary import write_metrics

    metrics = evaluate_folder(
        Path(config.predictions),
        Path(config.labels),
        case_ids=case_ids,
        tolerance_mm=config.tolerance_mm,
        num_workers=resolve_num_workers(config.num_workers),
        patient_pattern=config.patient_pattern,
        seed=config.seed,
    )
    write_metrics(Path(config.out), metrics)
    if config.report:
        write_evaluation_report(config, metrics, facts)
    return _finish(metrics, metrics.failures, done=f"{len(metrics.cases)} case(s) evaluated")


# ---- compare


def compare(config: CompareConfig) -> Comparison:
    """Put runs or cross-validations side by side, finished or not, on one page; nothing in their folders is touched.

    Raises:
        InputError: A folder holds no run or cannot be read, or the page would take the place of other files.
    """
    from pipeline.evaluation.compare import compare_runs
    from pipeline.evaluation.compare_page import write_comparison
    from pipeline.training.compared_folders import check_page_place, read_compared_runs

    out = Path(config.out)
    check_page_place(out, with_json=config.json)
    found = compare_runs(read_compared_runs(config.runs), scores=config.scores, seed=config.seed)
    write_comparison(out, found)
    if config.json:
        write_artifact(out.with_suffix(".json"), found)
    get_logger("compare").info("page: %s", out)
    return found


# ---- postprocess


def postprocess(config: PostprocessConfig) -> Postprocessing:
    """Choose the post-processing that improves held-out predictions, and write it into the run folders."""
    from pipeline.assessment import postprocess_runs

    return postprocess_runs(config)


def _finish(result: Result, failures: Mapping[str, str], *, done: str, things: str = "case(s)") -> Result:
    """Give back the result, or raise it together with the cases that are not in it."""
    if failures:
        raise CasesFailedError(failures, done=done, things=things, result=result)
    return result
