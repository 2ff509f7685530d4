"""The jobs of a cross-validation: what each asks SLURM for, and the command that it runs.

Only options that the commands have are used; a test takes every command line through the parser.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import SlurmConfig
from pipeline.config.slurm import VARIABLE
from pipeline.job_scripts.memory import (
    CaseSizes,
    Memory,
    evaluate_memory,
    predict_memory,
    preprocess_memory,
    train_memory,
)
from pipeline.plan import Plan
from pipeline.run_files import FOLD, WorkFiles

TASK = '"$SLURM_ARRAY_TASK_ID"'
CASES_PER_SHARD, MAX_SHARDS = 8, 16
DEFAULT_FOLDS = 5
PREPROCESSING_CPUS = 4


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job script.

    Attributes:
        name: Of the script's file.
        title: Its first line.
        options: sbatch's options in order, each with what it follows from, or "".
        command: Of `voxfit`.
        arguments: Of the command, as shell words.
        stops: Whether it is told to stop before its time limit and goes on later.
        launcher: What starts `voxfit`, once for each process of the job; "" for a single one.
    """

    name: str
    title: str
    options: tuple[tuple[str, str], ...]
    command: str
    arguments: tuple[str, ...]
    stops: bool = False
    launcher: str = ""


class Chain:
    """The jobs, from the options, the plan and the sizes of the cases.

    Args:
        config: Options.
        plan: The plan.
        sizes: Of the dataset's largest cases.
        num_folds: Folds of the cross-validation.
        patient_pattern: How the training tells patients, which the evaluation has to do as well.
    """

    def __init__(
        self, config: SlurmConfig, plan: Plan, sizes: CaseSizes, *, num_folds: int, patient_pattern: str = ""
    ) -> None:
        self.config, self.plan, self.sizes = config, plan, sizes
        self.num_folds, self.patient_pattern = num_folds, patient_pattern
        self.num_shards = _num_shards(config, sizes)
        self.on_gpu = config.gpus > 0

    def jobs(self) -> tuple[Job, ...]:
        """All jobs in the order in which they run."""
        found = self._preprocess(), self._verify(), self._train(), self._predict(), self._evaluate()
        return (*found, self._ensemble()) if self.config.predict_input else found

    def _preprocess(self) -> Job:
        cpus = min(self.config.cpus, PREPROCESSING_CPUS)
        memory = preprocess_memory(self.sizes, num_workers=cpus)
        return Job(
            name="preprocess",
            title=f"Every case into the store, in {self.num_shards} share(s) that need not wait for each other.",
            options=self._options("preprocess", cpus=cpus, memory=memory, array=f"1-{self.num_shards}"),
            command="preprocess",
            arguments=(*self._filling(), f"--shard {TASK}/{self.num_shards}", f"--num_workers {cpus}"),
        )

    def _verify(self) -> Job:
        memory = preprocess_memory(self.sizes, num_workers=1)
        return Job(
            name="verify",
            title="Whether the store is complete: names the cases that are missing or damaged, and then fails.",
            options=self._options("verify", cpus=1, memory=memory),
            command="preprocess",
            arguments=(*self._filling(), "--verify"),
        )

    def _train(self) -> Job:
        config, per_node = self.config, max(1, self.config.gpus)
        memory = train_memory(self.plan, self.sizes, cpus=config.cpus, on_gpu=self.on_gpu, per_node=per_node)
        if config.memory != "auto":
            memory = Memory(config.memory, "as given")
        is_shared = per_node * config.nodes > 1
        # With srun the processes are steps of the job, which get the signal without being named.
        receiver = "all processes of the training" if is_shared else "the process that this script turns into"
        signal = (
            f"--signal={'' if is_shared else 'B:'}USR1@{config.signal_seconds}",
            f"USR1 comes {config.signal_seconds} s before the time limit, to {receiver}.",
        )
        own = {"config": config.train_config, "max_epochs": _given(config.max_epochs)}
        own["num_folds"] = _given(config.num_folds)
        accelerator = "--hardware.accelerator " + ("gpu" if self.on_gpu else "cpu")
        return Job(
            name="train",
            title="Train every fold, each as a task of its own.",
            options=(
                *self._options("train", cpus=config.cpus, memory=memory, array=self._folds, num_gpus=config.gpus),
                signal,
            ),
            command="train",
            arguments=(
                *(f"--{name} {shlex.quote(value)}" for name, value in own.items() if value),
                f"--plan {_quoted(config.plan)}",
                f"--store {_quoted(self.work.store)}",
                *([f"--stage_to {_filled_in(config.stage_to)}"] if config.stage_to else []),
                f"--run_dir {_quoted(self.work.path / FOLD)}{TASK}",
                f"--fold {TASK}",
                accelerator,
            ),
            stops=True,
            # srun does not take the CPUs over from sbatch. The first process still asks for the requeue when others
            # have ended, so they must not end it at once, as some sites have it.
            launcher=f"srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task={config.cpus} " if is_shared else "",
        )

    def _predict(self) -> Job:
        memory = predict_memory(
            self.plan,
            self.sizes,
            cpus=self.config.cpus,
            on_gpu=self.on_gpu,
            seams=True,
            mirrors=self.config.tta == "mirror",
        )
        return Job(
            name="predict",
            title="Segment with every fold the cases that it held out: together, each case once.",
            options=self._options("predict", cpus=self.config.cpus, memory=memory, array=self._folds, num_gpus=1),
            command="predict",
            arguments=(
                f"--run_dir {_quoted(self.work.path / FOLD)}{TASK}",
                f"--input {_quoted(self.config.dataset)}",
                "--cases held_out",
                f"--output {_quoted(self.work.predictions)}",
                # As for the held-out cases of `voxfit run`: the report shows them.
                "--seams",
                *self._mirroring,
                "--accelerator " + ("gpu" if self.on_gpu else "cpu"),
            ),
        )

    def _ensemble(self) -> Job:
        memory = predict_memory(self.plan, self.sizes, cpus=self.config.cpus, on_gpu=self.on_gpu)
        run_dirs = " ".join(_quoted(self.work.run(fold).path) for fold in range(self.num_folds))
        return Job(
            name="ensemble",
            title="Segment new images with all folds as one: the mean of their probabilities.",
            options=self._options("ensemble", cpus=self.config.cpus, memory=memory, num_gpus=1),
            command="predict",
            arguments=(
                f"--run_dir {run_dirs}",
                f"--input {_quoted(self.config.predict_input)}",
                f"--output {_quoted(self.work.path / 'ensemble')}",
                *self._mirroring,
                "--accelerator " + ("gpu" if self.on_gpu else "cpu"),
            ),
        )

    def _evaluate(self) -> Job:
        cpus = min(self.config.cpus, PREPROCESSING_CPUS)
        return Job(
            name="evaluate",
            title="Score the predictions of all folds: metrics.json and report.html.",
            options=self._options("evaluate", cpus=cpus, memory=evaluate_memory(self.sizes, num_workers=cpus)),
            command="evaluate",
            arguments=(
                f"--predictions {_quoted(self.work.predictions)}",
                f"--labels {_quoted(self.config.dataset)}",
                f"--images {_quoted(self.config.dataset)}",
                f"--out {_quoted(self.work.scores)}",
                f"--report {_quoted(self.work.path / 'report.html')}",
                *([f"--patient_pattern {shlex.quote(self.patient_pattern)}"] if self.patient_pattern else []),
                f"--num_workers {cpus}",
            ),
        )

    @property
    def _folds(self) -> str:
        return f"0-{self.num_folds - 1}"

    @property
    def _mirroring(self) -> tuple[str, ...]:
        return () if self.config.tta == "none" else (f"--tta {self.config.tta}",)

    def _filling(self) -> tuple[str, ...]:
        config = self.config
        paths = {"dataset": _quoted(config.dataset), "plan": _quoted(config.plan), "store": _quoted(self.work.store)}
        return tuple(f"--{name} {path}" for name, path in paths.items())

    @property
    def work(self) -> WorkFiles:
        """Where everything that is made goes."""
        return WorkFiles(Path(self.config.work_dir))

    def _options(
        self, name: str, *, cpus: int, memory: Memory, array: str = "", num_gpus: int = 0
    ) -> tuple[tuple[str, str], ...]:
        config, is_training = self.config, name == "train"
        nodes, tasks = (config.nodes, max(1, config.gpus)) if is_training else (1, 1)
        shared = f"--nodes={nodes} --ntasks-per-node={tasks}"
        gres = f"--gres=gpu:{config.gpu_type + ':' if config.gpu_type else ''}{num_gpus}"
        log = str(Path(config.work_dir) / "logs" / ("%x-%A_%a.out" if array else "%x-%j.out"))
        given = {"account": config.account, "partition": config.partition, "qos": config.qos}
        return (
            (f"--job-name=voxfit-{name}", ""),
            *([(f"--array={array}", "")] if array else []),
            ("--nodes=1 --ntasks=1" if nodes * tasks == 1 else shared, ""),
            (f"--cpus-per-task={cpus}", ""),
            *([(gres, "")] if self.on_gpu and num_gpus else []),
            (f"--mem={memory.amount}", f"{memory.amount}: {memory.reason}."),
            (f"--time={config.time if is_training else config.short_time}", ""),
            ("--requeue", "A job that was pre-empted or lost its node starts again, and its log goes on."),
            ("--open-mode=append", ""),
            (f"--output={shlex.quote(log)}", ""),
            *((f"--{key}={value}", "") for key, value in given.items() if value),
            *((f"--{word.removeprefix('--')}", "") for word in config.extra.split()),
        )


def _num_shards(config: SlurmConfig, sizes: CaseSizes) -> int:
    if config.shards != "auto":
        return config.shards
    return max(1, min(MAX_SHARDS, -(-sizes.num_cases // CASES_PER_SHARD)))


def _given(value: int | str) -> str:
    """A number as a word; "" for "auto"."""
    return "" if value == "auto" else str(value)


def _filled_in(path: str) -> str:
    """A path as a shell word in which variables stand for their values; the script ends where one is not set."""
    parts, end = [], 0
    for found in VARIABLE.finditer(path):
        name = found[1] or found[2]
        parts += [path[end : found.start()] and shlex.quote(path[end : found.start()]), f'"${{{name}:?}}"']
        end = found.end()
    return "".join([*parts, path[end:] and shlex.quote(path[end:])])


def _quoted(path: str | Path) -> str:
    return shlex.quote(str(Path(path)))
