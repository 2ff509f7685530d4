"""From the options to the scripts in a folder."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import yaml
from jinja2 import Environment, StrictUndefined

from pipeline.artifacts import read_artifact, write_text
from pipeline.config import SlurmConfig
from pipeline.errors import InputError
from pipeline.job_scripts.jobs import DEFAULT_FOLDS, Chain, Job
from pipeline.job_scripts.memory import CaseSizes
from pipeline.plan import Plan

Option = TypeVar("Option", int, str)


@dataclass(frozen=True)
class JobScripts:
    """What `voxfit slurm` wrote: the folder, and its files in the order in which they run."""

    folder: Path
    names: tuple[str, ...]


def slurm(config: SlurmConfig) -> JobScripts:
    """Write a script per job and `submit.sh`, which chains them, into `config.out`; older ones are replaced.

    Raises:
        InputError: The dataset, the plan or the training options cannot be read, or the folder cannot be written.
    """
    from pipeline.datasets.dataset import read_dataset

    plan, dataset = read_artifact(Path(config.plan), Plan), read_dataset(config.dataset)
    if config.predict_input and not Path(config.predict_input).exists():
        # Or it would be found out when everything is trained.
        raise InputError("does not exist", where=config.predict_input, fix="Give what `voxfit predict --input` takes")
    texts = render_scripts(
        config,
        plan,
        CaseSizes.of(dataset, plan),
        num_folds=read_num_folds(config),
        patient_pattern=read_patient_pattern(config),
    )
    folder = Path(config.out)
    for name, text in texts.items():
        write_text(folder / name, text)
    # SLURM ends a job at once, without a word, when the folder of its log is missing.
    (Path(config.work_dir) / "logs").mkdir(parents=True, exist_ok=True)
    return JobScripts(folder, tuple(texts))


def describe_job_scripts(scripts: JobScripts) -> str:
    """What was written, and the command that starts it."""
    names = ", ".join(scripts.names)
    return f"{scripts.folder}: {names}\nRead them, then: bash {shlex.quote(str(scripts.folder / 'submit.sh'))}"


def render_scripts(
    config: SlurmConfig, plan: Plan, sizes: CaseSizes, *, num_folds: int, patient_pattern: str = ""
) -> dict[str, str]:
    """The scripts' texts by file name."""
    jobs = Chain(config, plan, sizes, num_folds=num_folds, patient_pattern=patient_pattern).jobs()
    texts = {f"{job.name}.sbatch": _render("job.sbatch.j2", {"job": job, "setup": config.setup}) for job in jobs}
    return {**texts, "submit.sh": _render("submit.sh.j2", _places(config))}


def read_num_folds(config: SlurmConfig) -> int:
    """The folds asked for: by the options, or by the training's YAML, or the default.

    Raises:
        InputError: The YAML cannot be read.
    """
    return config.num_folds if config.num_folds != "auto" else _read_option(config, "num_folds", DEFAULT_FOLDS)


def read_patient_pattern(config: SlurmConfig) -> str:
    """How the training tells patients by case ids, by its YAML; "" where the dataset does.

    Raises:
        InputError: The YAML cannot be read.
    """
    return _read_option(config, "patient_pattern", "")


def _read_option(config: SlurmConfig, name: str, default: Option) -> Option:
    """An option of the training's YAML, of its default's type."""
    if not config.train_config:
        return default
    try:
        options = yaml.safe_load(Path(config.train_config).read_text(encoding="utf-8")) or {}
        found = options.get(name)
        return default if found is None else type(default)(found)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError, ValueError, TypeError) as error:
        what = f"holds no options of a training ({' '.join(str(error).split())})"
        raise InputError(what, where=config.train_config, fix="Give a YAML file for `voxfit train --config`") from error


def _places(config: SlurmConfig) -> dict[str, str | bool]:
    """Where submit.sh finds the rest: paths start in the folder in which `voxfit slurm` was called."""
    out, here = Path(config.out), Path.cwd()
    up = shlex.quote(os.path.relpath(here, here / out))
    start = shlex.quote(str(here)) if out.is_absolute() else f'"$(dirname "${{BASH_SOURCE[0]}}")"/{up}'
    logs = str(Path(config.work_dir) / "logs")
    return {
        "start": start,
        "jobs": shlex.quote(str(out)),
        "logs": shlex.quote(logs),
        "has_ensemble": bool(config.predict_input),
    }


def _render(template: str, values: Mapping[str, str | bool | Job]) -> str:
    source = files("pipeline.job_scripts").joinpath(template).read_text(encoding="utf-8")
    # Values are quoted for the shell where they are made.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(**values).rstrip("\n") + "\n"
