"""The training of one fold, wired together: read `fit_fold` from top to bottom."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from time import monotonic

from torch import nn

from pipeline.config import TrainConfig
from pipeline.datasets.splits import Fold, Splits, select_fold
from pipeline.durations import parse_duration
from pipeline.errors import InputError
from pipeline.log import get_logger
from pipeline.plan import Plan
from pipeline.run_record import RunRecord
from pipeline.stop_signals import StopRequest, stop_signals_noted
from pipeline.store import CaseStore
from pipeline.training.attempt import Job, train_once
from pipeline.training.fit_result import FitResult
from pipeline.training.initial_weights import check_beginning
from pipeline.training.local_store import local_store
from pipeline.training.metrics_table import finished_epochs
from pipeline.training.processes import keep_freed_memory
from pipeline.training.ranks import Ranks, open_ranks, take_own_gpu
from pipeline.training.recovery import OutOfMemoryReport, free_memory, go_down
from pipeline.training.rehearsal import Train, rehearse
from pipeline.training.run_folder import RunFolder
from pipeline.training.run_lock import run_lock
from pipeline.training.settings import Settings, resolve_settings
from pipeline.training.step_down import Standing
from pipeline.training.trackers import check_tracker
from pipeline.training.tracking import track_finished
from pipeline.training.wall_clock import WallClock, read_wall_seconds

logger = get_logger("train")


def fit_fold(
    plan: Plan,
    store_folder: Path,
    splits: Splits,
    config: TrainConfig,
    *,
    network: nn.Module | None = None,
    ranks: Ranks | None = None,
) -> FitResult:
    """Train one fold, or all cases, into `config.run_dir`, or go on with what is there.

    A run that was stopped at any moment goes on from its newest checkpoint and ends with the same weights as one that
    was not (exactly on a CPU with the same number of threads): patches and random numbers are functions of the seed
    and the iteration, and everything else is in the checkpoint. A run that runs out of memory steps down the plan's
    ladder and goes on in the same way, from the last finished optimiser step.

    Args:
        plan: The plan the store was made with.
        store_folder: The store.
        splits: Folds; `config.fold` says which one.
        config: Options.
        network: Trained instead of the plan's U-Net, see `pipeline.api.train`.
        ranks: The processes that train together, where they are open already.

    Raises:
        InputError: Options do not fit the plan, the machine or the run found in the folder; cases are missing in the
            store; another process trains in the folder; memory ran out at the end of the ladder; there is no room for a
            copy of the store.
        StoppedError: Ctrl-C, SIGTERM or SIGUSR1 came, or the time is up; the same call goes on.
        TrainingDivergedError: The loss is NaN or infinite.
        RankFailedError: Another of the processes that train together failed.
    """
    if ranks is not None:
        return _fit_together(plan, store_folder, splits, config, network, ranks)
    with open_ranks() as ranks:
        return _fit_together(plan, store_folder, splits, config, network, ranks)


def _fit_together(
    plan: Plan, store_folder: Path, splits: Splits, config: TrainConfig, network: nn.Module | None, ranks: Ranks
) -> FitResult:
    folder, settings = RunFolder(Path(config.run_dir)), resolve_settings(plan, config, ranks.place)
    fold = select_fold(splits, config.fold)
    _check_cases(store_folder, fold)
    _check_same_settings(settings, ranks)
    if settings.device_type == "cuda":
        take_own_gpu(ranks)
    with _own_folder(folder, ranks), stop_signals_noted() as request:
        if ranks.is_first:
            # Before anything is written: what cannot be begun with would be what the folder goes on with.
            check_tracker(config.tracking)
            check_beginning(folder, plan, config, network)
            folder.begin(plan, splits, config)
        record = ranks.from_first(folder.read_record() if ranks.is_first else None)
        if record is not None and record.status == "finished":
            logger.info("%s is finished; to train anew takes another folder", folder.path)
            if ranks.is_first:
                track_finished(config, plan, folder, record, fold)
            return FitResult.of(folder, record)
        _check_effective_batch(record, settings)
        job = Job(
            plan=plan,
            store_folder=_staged(store_folder, fold, config.stage_to, request, ranks),
            splits=splits,
            fold=fold,
            config=config,
            folder=folder,
            settings=settings,
            network=network,
            request=request,
            ranks=ranks,
            wall_clock=WallClock(request.made_at, read_wall_seconds(folder, record)),
        )
        if config.max_epochs == "auto":
            job = _with_epochs(job, record)
            config, settings = job.config, job.settings
        step_downs = record.step_downs if record is not None else ()
        standing = Standing.of(plan, config, settings, step_downs, has_own_network=network is not None)
        start = finished_epochs(folder.metrics)
        if settings.device_type == "cpu" and not step_downs:
            keep_freed_memory()
        while isinstance(ended := train_once(job, standing, start), OutOfMemoryReport):
            free_memory(network)
            standing = go_down(folder if ranks.is_first else None, plan, config, standing, ended)
            start = ended.continues_from
        return FitResult.of(folder, ended)


def _staged(store_folder: Path, fold: Fold, stage_to: str, request: StopRequest, ranks: Ranks) -> Path:
    """The store to read from; of the processes of a node the first one copies it."""
    found = local_store(store_folder, fold, stage_to, request) if ranks.place.local_rank == 0 else None
    ranks.meet()
    return found if found is not None else local_store(store_folder, fold, stage_to, request)


def _own_folder(folder: RunFolder, ranks: Ranks) -> AbstractContextManager[None]:
    """The run folder is the first rank's to write to."""
    return run_lock(folder.path) if ranks.is_first else nullcontext()


def _check_same_settings(settings: Settings, ranks: Ranks) -> None:
    """Ranks on other kinds of machines may come to other settings, with which they cannot train together."""
    own = {
        "device": settings.device_type,
        "precision": settings.precision.precision,
        "patch": settings.patch_size,
        "batch": settings.batch_size,
        "execution": settings.execution,
        "steps": settings.pace._replace(rank=0),
    }
    found = ranks.meet(own)
    for name in own:
        values = [str(each[name]) for each in found]
        if len(set(values)) > 1:
            raise InputError(
                f"the processes of this training differ in {name}: {', '.join(sorted(set(values)))}",
                where="hardware",
                fix="Start them on machines of one kind, or set accelerator and precision",
            )


def _check_effective_batch(record: RunRecord | None, settings: Settings) -> None:
    """A run goes on with any number of processes, as long as an optimiser step sees as many patches."""
    if record is None:
        return
    before = record.batch_size * record.accumulate_grad_batches * record.num_ranks
    now = settings.batch_size * settings.accumulate_grad_batches * settings.pace.num_ranks
    if before != now:
        raise InputError(
            f"an optimiser step would see {now} patches on {settings.pace.num_ranks} process(es), and saw {before}",
            where="effective_batch",
            fix=f"Use a number of processes that divides it, {record.num_ranks} as before, or give another --run_dir",
        )


def _with_epochs(job: Job, record: RunRecord | None) -> Job:
    """The job with the number of epochs that was decided before, or that fits into its time; the same on all ranks."""
    epochs = record.max_epochs if record is not None else None
    if epochs is None:
        train = rehearsed(job.plan, job.store_folder, job.splits.seed, job.network, job.ranks)
        per_step = job.settings.pace.iterations_per_step
        rehearsal = rehearse(train, job.config, job.fold, iterations_per_step=per_step, ranks=job.ranks)
        left = parse_duration(job.config.max_time) - (monotonic() - job.request.made_at)
        # Ranks share the cases out.
        num_cases = -(-len(job.fold.validation) // job.ranks.num)
        epochs = job.ranks.from_first(rehearsal.cost.epochs_within(left, job.config, num_cases=num_cases))
        logger.info("max_epochs: %d epochs fit into %s", epochs, job.config.max_time)
    settings = job.settings._replace(total_steps=job.settings.pace.steps_per_epoch * epochs)
    return replace(job, config=replace(job.config, max_epochs=epochs), settings=settings)


def rehearsed(
    plan: Plan, store_folder: Path, seed: int, network: nn.Module | None = None, ranks: Ranks | None = None
) -> Train:
    """The training that a rehearsal runs: of cases as given, with a copy of the network."""

    def train(config: TrainConfig, fold: Fold) -> None:
        splits = Splits(seed=seed, folds=(fold,))
        own = replace(config, fold=0)
        _fit_together(plan, store_folder, splits, own, deepcopy(network), ranks or Ranks())

    return train


def _check_cases(store_folder: Path, fold: Fold) -> None:
    missing = sorted({*fold.train, *fold.validation} - set(CaseStore(store_folder).case_ids))
    if missing:
        raise InputError(
            f"{len(missing)} case(s) of the split are not in the store: {', '.join(missing[:10])}",
            where=store_folder,
            fix="Run `voxfit preprocess` for them",
        )
