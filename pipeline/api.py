"""Every stage as a function: the one module that joins the layers, and the Python interface.

Each function takes its config dataclass (of `pipeline.config` and its neighbours) and does what `voxfit COMMAND` does.
Heavy libraries are imported when a function needs them, so that importing this module is cheap.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from pipeline.allocation import describe_allocation, resolve_num_workers
from pipeline.artifacts import content_hash, read_artifact, to_json, write_artifact
from pipeline.config import (
    EvaluateConfig,
    InspectConfig,
    PlanConfig,
    PreprocessConfig,
    TrainConfig,
)
from pipeline.errors import CasesFailedError, InputError
from pipeline.log import get_logger, log_to_file
from pipeline.plan import Plan
from pipeline.predict_config import PredictConfig
from pipeline.status_config import StatusConfig

if TYPE_CHECKING:
    from torch import nn

    from pipeline.datasets.dataset import Case, Dataset
    from pipeline.datasets.dicom_inspection import DicomInspection
    from pipeline.datasets.inspection import Inspection
    from pipeline.datasets.splits import Splits
    from pipeline.evaluation.slices import ReportCase
    from pipeline.evaluation.summary import Metrics
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
    from pipeline.preprocessing.preprocess import preprocess_dataset
    from pipeline.preprocessing.shards import preprocess_share, verify_store
    from pipeline.store import CaseStore

    get_logger().info("preprocess: %s", describe_allocation())
    dataset, store, done = read_dataset(config.dataset), Path(config.store), f"{config.store} was filled"
    made = read_artifact(Path(config.plan), Plan)
    left_out = _left_out_by_plan(made, dataset, config)
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


def _left_out_by_plan(made: Plan, dataset: Dataset, config: PreprocessConfig) -> dict[str, str]:
    """Cases that the plan was made without; a plan without its fingerprint is checked against the dataset anew."""
    from pipeline.datasets.fingerprint import Fingerprint
    from pipeline.datasets.inspection import find_bad_cases

    path = Path(config.plan).with_name("fingerprint.json")
    if path.is_file():
        fingerprint = read_artifact(path, Fingerprint)
        if content_hash(to_json(fingerprint)) == made.fingerprint_hash:
            if fingerprint.left_out:
                get_logger("preprocess").info("cases that the plan was made without stay out; plan again to use them")
            return dict(fingerprint.left_out)
    num_workers = resolve_num_workers(config.num_workers)
    return find_bad_cases(dataset, num_workers=num_workers, skip=config.skip_bad_cases)


# ---- train


def train(config: TrainConfig, *, network: nn.Module | None = None) -> FitResult:
    """Train one fold, or all cases, into `run_dir`; the same call again resumes.

    Args:
        config: Options.
        network: Any network that maps (B, C, I, J, K) to logits (B, classes, I, J, K), or to a list of them from the
            highest resolution down, instead of the plan's U-Net. `replace_batchnorm` makes it fit for batch size 1.
    """
    from pipeline.store import CaseStore
    from pipeline.training.trainer import fit_fold

    made = read_artifact(Path(config.plan), Plan)
    store = CaseStore(Path(config.store))
    store.check_plan(made)
    splits = _splits(store, config)
    with log_to_file(Path(config.run_dir) / "log.txt"):
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
    from pipeline.inference.export import FORMATS
    from pipeline.inference.loading import read_held_out
    from pipeline.inference.predictor import Predictor

    if config.cases == "held_out":
        case_ids = read_held_out(Path(config.run_dir))
    with TemporaryDirectory() as references:
        cases = _inputs(config, Path(references), case_ids)
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
        formats = FORMATS[config.format]
        return predictor.predict_files(cases, Path(config.output), formats=formats, overwrite=config.overwrite)


def _inputs(config: PredictConfig, references: Path, case_ids: Collection[str] | None) -> tuple[Case, ...]:
    """The cases to segment; for those of a DICOM tree, small files that stand for the series go to `references`."""
    from pipeline.datasets.dicom_cases import parse_channels
    from pipeline.inference.dicom_inputs import find_dicom_inputs, may_be_dicom
    from pipeline.inference.inputs import find_inputs
    from pipeline.inference.loading import read_plan

    path = Path(config.input)
    if not may_be_dicom(path):
        if config.channels or config.allow_tilt:
            raise InputError(
                "channels and allow_tilt are for folders of DICOM series", where=path, fix="Leave them out"
            )
        return find_inputs(path, case_ids=case_ids)
    return find_dicom_inputs(
        path,
        references,
        [channel.name for channel in read_plan(Path(config.run_dir)).channels],
        channels=parse_channels(config.channels),
        allow_tilt=config.allow_tilt,
        num_workers=resolve_num_workers("auto"),
        case_ids=case_ids,
    )


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


# ---- what is shared


def _finish(result: Result, failures: Mapping[str, str], *, done: str) -> Result:
    """Give back the result, or raise it together with the cases that are not in it."""
    if failures:
        raise CasesFailedError(failures, done=done, result=result)
    return result
