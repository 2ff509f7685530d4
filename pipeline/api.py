"""Every stage as a function: the one module that joins the layers, and the Python interface.

Each function takes its config dataclass (of `pipeline.config` and its neighbours) and does what `voxfit COMMAND` does.
Heavy libraries are imported when a function needs them, so that importing this module is cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from pipeline.allocation import describe_allocation, resolve_num_workers
from pipeline.artifacts import read_artifact, write_artifact
from pipeline.config import (
    EvaluateConfig,
    InspectConfig,
    PlanConfig,
    PreprocessConfig,
    TrainConfig,
)
from pipeline.doctor_config import DoctorConfig
from pipeline.errors import CasesFailedError, InputError
from pipeline.export_config import ExportConfig
from pipeline.log import get_logger, log_to_file
from pipeline.plan import Plan
from pipeline.postprocess_config import PostprocessConfig
from pipeline.predict_config import PredictConfig
from pipeline.rank_place import find_place
from pipeline.status_config import StatusConfig

if TYPE_CHECKING:
    from torch import nn

    from pipeline.datasets.dicom_inspection import DicomInspection
    from pipeline.datasets.inspection import Inspection
    from pipeline.datasets.splits import Splits
    from pipeline.doctor.examination import Examination
    from pipeline.doctor.real_step import RealStep
    from pipeline.evaluation.slices import ReportCase
    from pipeline.evaluation.summary import Metrics
    from pipeline.inference.postprocess import Postprocessing
    from pipeline.status import WorkStatus
    from pipeline.store import CaseStore
    from pipeline.training.trainer import FitResult

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
    from pipeline.datasets.fingerprint import make_fingerprint
    from pipeline.datasets.inspection import find_bad_cases
    from pipeline.planning.planner import make_plan

    budget = _budget(config)
    dataset = read_dataset(config.dataset)
    num_workers = resolve_num_workers(config.num_workers)
    examined = examine_cases(dataset, num_workers=num_workers)
    left_out = find_bad_cases(dataset, examined, num_workers=num_workers, skip=config.skip_bad_cases)
    fingerprint = make_fingerprint(dataset, num_workers=num_workers, leave_out=left_out, examined=examined)
    made = make_plan(fingerprint, config, budget_bytes=budget[0], budget_note=budget[1])
    made = _probed(made, config)
    write_artifact(Path(config.out).with_name("fingerprint.json"), fingerprint)
    write_artifact(Path(config.out), made)
    return _finish(made, left_out, done=f"{config.out} was written")


def _probed(made: Plan, config: PlanConfig) -> Plan:
    """The plan after its step was run where there is a GPU."""
    from pipeline.training.probed_plan import probed, without_probe

    return probed(made) if config.probe == "auto" else without_probe(made)


def _budget(config: PlanConfig) -> tuple[int, str]:
    """The memory budget in bytes and, where the machine decided, a sentence about it."""
    from pipeline.planning.budget import budget_from_device, parse_vram

    return budget_from_device() if config.vram == "auto" else (parse_vram(config.vram), "")


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
    from pipeline.store import CaseStore
    from pipeline.training.trainer import fit_fold, fit_in_processes

    made = read_artifact(Path(config.plan), Plan)
    store = CaseStore(Path(config.store))
    store.check_plan(made)
    splits = _splits(store, config)
    place, devices = find_place(), config.hardware.devices
    if devices not in ("auto", 1) and not place.launcher:
        return fit_in_processes(config, int(devices), network)
    # The first of several processes speaks for all.
    with log_to_file(Path(config.run_dir) / "log.txt") if place.is_first else nullcontext():
        get_logger("train").info("%s", describe_allocation())
        return fit_fold(made, Path(config.store), splits, config, network=network)


def _splits(store: CaseStore, config: TrainConfig) -> Splits:
    """The run's folds: those saved in it, else new ones; checked against the store either way."""
    from pipeline.datasets.splits import Splits, check_splits, make_splits, patients_by_pattern

    if config.patient_pattern:
        patients = patients_by_pattern(store.case_ids, config.patient_pattern)
    else:
        patients = {case_id: store.record(case_id).patient or case_id for case_id in store.case_ids}
    saved = Path(config.run_dir) / "splits.json"
    if saved.is_file():
        splits = read_artifact(saved, Splits)
    else:
        splits = make_splits(patients, num_folds=config.num_folds, seed=config.seed)
    check_splits(splits, patients)
    return splits


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

    for name in ("work_dir", "store"):
        path = getattr(config, name)
        if path and not Path(path).is_dir():
            raise InputError("is no folder", where=f"{name} {path}", fix="Make it, or give one that is there")
    step = _planned_step(config) if config.plan else None
    facts = find_facts(config)
    found = conclude(config, facts, step() if step is not None else None)
    return _finish(found, found.failures, done="the machine was examined", things="part(s) of the step")


def _planned_step(config: DoctorConfig) -> Callable[[], RealStep]:
    """The step, once it is known that plan, store and folds can be read and belong together."""
    from pipeline.doctor.real_step import take_step
    from pipeline.store import CaseStore

    store, options = CaseStore(Path(config.store)), config.training()
    store.check_plan(read_artifact(Path(config.plan), Plan))
    splits = _splits(store, options)
    return partial(take_step, options, splits, Path(config.work_dir or "."))


# ---- predict


def predict(
    config: PredictConfig, *, network: nn.Module | None = None, case_ids: Collection[str] | None = None
) -> list[Path]:
    """Segment what `input` names with a trained run, one file per case in `output`.

    Args:
        config: Options.
        network: The network of one's own that the run was trained with.
        case_ids: Only these cases of the input.

    Raises:
        CasesFailedError: Some cases failed; the rest is written.
    """
    from pipeline.inference.case_files import predict_files
    from pipeline.inference.dicom_inputs import find_cases
    from pipeline.inference.export import FORMATS
    from pipeline.inference.loading import read_held_out
    from pipeline.inference.predictor import Predictor
    from pipeline.inference.window_batch import set_window_batch
    from pipeline.preprocessing.shards import share_of

    if config.cases == "held_out":
        case_ids = read_held_out(Path(config.run_dir))
    with TemporaryDirectory() as references:
        cases = find_cases(config, Path(references), case_ids)
        if config.share is not None:
            mine, total = share_of([case.case_id for case in cases], config.share), len(cases)
            cases = tuple(case for case in cases if case.case_id in mine)
            get_logger("predict").info("share %s has %d of %d cases", config.shard, len(cases), total)
        predictor = Predictor.from_run(
            Path(config.run_dir),
            checkpoint=config.checkpoint,
            accelerator=config.accelerator,
            num_threads=config.num_threads,
            overlap=config.overlap,
            tta=config.tta,
            network=network,
            max_ram=config.max_ram_bytes,
        )
        set_window_batch(predictor, config.window_batch)
        predictor.skip_air, predictor.count_seams = config.skip_air, config.seams
        formats = FORMATS[config.format]
        return predict_files(predictor, cases, Path(config.output), formats=formats, overwrite=config.overwrite)


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
    from pipeline.evaluation.evaluate import evaluate_folder
    from pipeline.evaluation.summary import write_metrics

    metrics = evaluate_folder(
        Path(config.predictions),
        Path(config.labels),
        case_ids=case_ids,
        tolerance_mm=config.tolerance_mm,
        num_workers=resolve_num_workers(config.num_workers),
    )
    write_metrics(Path(config.out), metrics)
    if config.report:
        _write_report(config, metrics, facts)
    return _finish(metrics, metrics.failures, done=f"{len(metrics.cases)} case(s) evaluated")


def _write_report(config: EvaluateConfig, metrics: Metrics, facts: Mapping[str, str] | None) -> None:
    from pipeline.evaluation.report import write_report

    curves = Path(config.run_dir) / "metrics.csv" if config.run_dir else None
    facts = {"predictions": Path(config.predictions).name, **(facts or {})}
    cases = _shown_cases(config, metrics) if config.images else []
    title = facts.get("dataset", "Evaluation")
    write_report(Path(config.report), metrics, title=title, facts=facts, curves_csv=curves, cases=cases)
    get_logger("evaluate").info("report: %s", config.report)


def _shown_cases(config: EvaluateConfig, metrics: Metrics) -> list[ReportCase]:
    """The volumes that the report shows."""
    from pipeline.evaluation.pairs import find_references, list_volumes
    from pipeline.evaluation.shown_cases import read_shown_cases
    from pipeline.inference.inputs import find_inputs

    return read_shown_cases(
        metrics,
        images={case.case_id: case for case in find_inputs(Path(config.images))},
        references=find_references(Path(config.labels)).paths,
        predictions=list_volumes(Path(config.predictions)),
    )


# ---- postprocess


def postprocess(config: PostprocessConfig) -> Postprocessing:
    """Choose the post-processing that improves held-out predictions, and write it into the run folder."""
    from pipeline.evaluation.pairs import find_references, list_volumes, pair_cases
    from pipeline.inference.loading import read_held_out, read_plan
    from pipeline.inference.postprocess import FILE_NAME
    from pipeline.inference.postprocess_choice import choose_postprocessing

    run_dir = Path(config.run_dir)
    made = read_plan(run_dir)
    found = list_volumes(Path(config.predictions) if config.predictions else run_dir / "validation")
    references = find_references(Path(config.labels)).paths
    wanted = set(found) & set(references)
    if config.cases == "held_out":
        wanted &= set(read_held_out(run_dir))
    chosen = choose_postprocessing(
        pair_cases(found, references, wanted)[0],
        made.labels,
        ignore_value=made.ignore_value,
        min_gain=config.min_gain,
        num_workers=resolve_num_workers(config.num_workers),
    )
    write_artifact(run_dir / FILE_NAME, chosen)
    return chosen


# ---- what is shared


def _finish(result: Result, failures: Mapping[str, str], *, done: str, things: str = "case(s)") -> Result:
    """Give back the result, or raise it together with the cases that are not in it."""
    if failures:
        raise CasesFailedError(failures, done=done, things=things, result=result)
    return result
