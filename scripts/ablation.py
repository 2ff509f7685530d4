"""Does a default earn its place? Variations of one recipe, several seeds, equal samples seen, into one table.

    python scripts/ablation.py --study scripts/ablations/training.yaml --dataset Task04_Hippocampus --out_dir study

A study is a YAML file: `samples` that every training sees, in `epochs` epochs; options of `voxfit plan` and `voxfit
train` that all share; and `variations`, each with the options in which it differs. The first one is what the others
are compared with. With `seams: true` the held-out cases are predicted as well, and voxels counted on which windows
disagree.

A seed draws the split, the weights, the patches and their augmentation, so the spread over seeds is that of the whole
experiment; differences are taken seed by seed, on the same split. The score is the Dice of the last epoch on the
held-out cases, never the best of several. Each training is a process of its own, one after the other; what is finished
is kept in `--out_dir`, and the same command goes on where it was. The last run of it writes the table to `results.md`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from pipeline.artifacts import read_artifact, write_artifact, write_text
from pipeline.plan import Plan, Record
from pipeline.prediction_record import read_records
from pipeline.training.metrics_table import read_rows
from pipeline.training.run_folder import RunFolder

HEADER = "| variation | Dice, mean (range) | difference, each seed | seams | steps | CPU s | noise scale |"
Options = dict[str, Any]
Variations = Mapping[str, Mapping[str, Options]]


@dataclass(frozen=True, kw_only=True)
class Study(Record):
    """What is compared.

    Attributes:
        samples: Patches that every training sees, rounded to whole optimiser steps.
        epochs: Into which they are divided; the last one is validated.
        variations: By name, `plan` and `train` options in which each differs.
        plan, train: Options of `voxfit plan` and `voxfit train` for all.
        seams: Predict the held-out cases and count voxels on which overlapping windows disagree.
    """

    samples: int
    epochs: int = 1
    variations: dict[str, dict[str, Options]]
    plan: Options = field(default_factory=dict)
    train: Options = field(default_factory=dict)
    seams: bool = False

    def options(self, command: str, name: str) -> Options:
        """Of `voxfit plan` or `voxfit train`, for a variation."""
        return {**getattr(self, command), **self.variations[name].get(command, {})}


@dataclass(frozen=True, kw_only=True)
class Result(Record):
    """One training.

    Attributes:
        name, seed: Variation and seed.
        dice: Of the last epoch, mean over cases and classes.
        class_dice: By class.
        train_loss: Of the last epoch.
        optimizer_steps: Steps in all.
        cpu_seconds: Of the whole process.
        peak_ram_bytes: Of the process.
        noise_scale: In patches; None where it was not measured.
        seam_share: Of the voxels that several windows cover, those that they disagree on; None where not measured.
    """

    name: str
    seed: int
    dice: float
    class_dice: dict[str, float]
    train_loss: float
    optimizer_steps: int
    cpu_seconds: float
    peak_ram_bytes: int
    noise_scale: float | None = None
    seam_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Results(Record):
    """All that was trained so far."""

    study: Study
    trained: tuple[Result, ...] = ()


def read_study(path: Path) -> Study:
    """A study from its YAML file.

    Raises:
        SystemExit: It is none.
    """
    try:
        study = TypeAdapter(Study).validate_json(json.dumps(yaml.safe_load(path.read_text())))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise SystemExit(f"error: {path}: {error}") from None
    wrong = sorted(name for name, options in study.variations.items() if not set(options) <= {"plan", "train"})
    if wrong or not study.variations:
        raise SystemExit(f"error: {path}: variations have `plan` and `train` options only; see {wrong or 'none'}")
    return study


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as a command takes them."""
    words = []
    for key, value in options.items():
        words += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def run_voxfit(command: str, options: Mapping[str, Any]) -> None:
    """Run a command of voxfit in a process of its own.

    Raises:
        SystemExit: It fails.
    """
    code = subprocess.run([sys.executable, "-m", "pipeline", command, *flags(options)], check=False).returncode
    if code:
        raise SystemExit(code)


class Trainings:
    """The trainings of a study.

    Args:
        study: What differs.
        dataset: To plan and to preprocess.
        folder: For plans, store, runs and results.
    """

    def __init__(self, study: Study, dataset: str, folder: Path) -> None:
        self.study, self.dataset, self.folder = study, dataset, folder
        self._results = folder / "results.json"

    def done(self) -> tuple[Result, ...]:
        """What is finished.

        Raises:
            SystemExit: It is of a study with other options.
        """
        if not self._results.exists():
            return ()
        found = read_artifact(self._results, Results)
        if found.study != self.study:
            raise SystemExit(f"error: {self._results} is of another study; choose another --out_dir")
        return found.trained

    def train(self, name: str, seed: int) -> None:
        """Train one variation with one seed and keep what came of it."""
        run_dir = self.folder / "runs" / f"{name.replace(' ', '_')}-{seed}"
        plan = self._plan(name)
        step = plan.batch_size * plan.accumulate_grad_batches
        steps_per_epoch = max(1, round(self.study.samples / self.study.epochs / step))
        train = {
            "plan": self._plan_path(name),
            "store": self.folder / "store",
            "run_dir": run_dir,
            "seed": seed,
            "max_epochs": self.study.epochs,
            "validate_every_n_epochs": self.study.epochs,
            "iterations_per_epoch": steps_per_epoch * plan.accumulate_grad_batches,
            **self.study.options("train", name),
        }
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_voxfit("train", train)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        result = self._result(name, seed, run_dir, cpu_seconds)
        if self.study.seams:
            result = replace(result, seam_share=self._seam_share(run_dir))
        write_artifact(self._results, Results(study=self.study, trained=(*self.done(), result)))

    def _seam_share(self, run_dir: Path) -> float:
        """Of the compared voxels of all held-out cases, by the last weights."""
        out = run_dir / "predictions"
        options = {"run_dir": run_dir, "input": self.dataset, "output": out, "cases": "held_out", "checkpoint": "last"}
        run_voxfit("predict", {**options, "seams": True, "num_threads": 1})
        case_ids = [path.stem for path in (out / "records").glob("*.json")]
        records = read_records(out, case_ids).values()
        compared, disagreeing = (
            sum(getattr(record, name) or 0 for record in records) for name in ("compared_voxels", "disagreeing_voxels")
        )
        return disagreeing / compared

    def _plan_path(self, name: str) -> Path:
        return self.folder / "plans" / name.replace(" ", "_") / "plan.json"

    def _plan(self, name: str) -> Plan:
        """The plan of a variation, made where it is missing, and with the first one the store."""
        path = self._plan_path(name)
        if not path.exists():
            run_voxfit("plan", {"dataset": self.dataset, "out": path, **self.study.options("plan", name)})
            run_voxfit("preprocess", {"dataset": self.dataset, "plan": path, "store": self.folder / "store"})
        return read_artifact(path, Plan)

    def _result(self, name: str, seed: int, run_dir: Path, cpu_seconds: float) -> Result:
        rows, prefix = read_rows(RunFolder(run_dir).metrics), "val_dice_"
        last = rows[-1]
        dice = {key.removeprefix(prefix): value for key, value in last.items() if key.startswith(prefix)}
        return Result(
            name=name,
            seed=seed,
            dice=dice.pop("mean"),
            class_dice=dice,
            train_loss=last["train_loss"],
            optimizer_steps=last["optimizer_step"],
            cpu_seconds=round(cpu_seconds, 1),
            peak_ram_bytes=max(row["peak_ram_bytes"] for row in rows),
            noise_scale=last["noise_scale"],
        )


def describe(results: Sequence[Result], names: Sequence[str]) -> str:
    """The table, as Markdown: means and spreads over seeds, and differences from the first variation seed by seed."""
    lines = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    first = {result.seed: result.dice for result in results if result.name == names[0]}
    for name in names:
        own = [result for result in results if result.name == name]
        if not own:
            continue
        scores = [result.dice for result in own]
        differences = [f"{result.dice - first[result.seed]:+.3f}" for result in own if result.seed in first]
        seams = [result.seam_share for result in own if result.seam_share is not None]
        noise = [result.noise_scale for result in own if result.noise_scale is not None]
        cells = (
            name,
            f"{mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})",
            ", ".join(differences) if name != names[0] else "",
            f"{mean(seams):.1%}" if seams else "",
            str(own[0].optimizer_steps),
            f"{median(result.cpu_seconds for result in own):.0f}",
            f"{median(noise):.2g}" if noise else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Train what is missing, seed by seed, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="variations to train now")
    options = parser.parse_args()
    study = read_study(options.study)
    trainings = Trainings(study, options.dataset, options.out_dir)
    names = options.only or list(study.variations)
    if unknown := sorted(set(names) - set(study.variations)):
        parser.error(f"{options.study} has no variation {', '.join(unknown)}")
    for seed in options.seeds:
        for name in names:
            if (name, seed) not in {(result.name, result.seed) for result in trainings.done()}:
                trainings.train(name, seed)
    table = describe(trainings.done(), list(study.variations))
    write_text(options.out_dir / "results.md", table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
