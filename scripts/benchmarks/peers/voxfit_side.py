"""voxfit's side: plan, preprocess, train and predict by its own commands, each a process of its own."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from peers.processes import TRAINING_SAMPLE_SECONDS, Usage
from peers.raw_dataset import FOLD
from peers.schedule import Pace, Schedule
from peers.sides import KeyedSide, Training
from pipeline.artifacts import write_artifact
from pipeline.config import OptimConfig
from pipeline.training.metrics_table import read_rows
from pipeline.training.run_folder import RunFolder

COMMAND = (sys.executable, "-m", "pipeline")


@dataclass(frozen=True, kw_only=True)
class VoxfitSide(KeyedSide):
    """voxfit with the options of a configuration of `voxfit run`."""

    config: Path
    dataset: Path

    name = "voxfit"
    rehearsal = Schedule(epochs=2, iterations_per_epoch=24, validate_every=1)
    min_iterations = 1
    validations = 4
    mirrorings = ("none", "mirror")

    @property
    def choices(self) -> tuple[object, ...]:
        """Its configuration."""
        return (self._options(),)

    def prepare(self) -> dict[str, dict[str, float]]:
        """`voxfit plan` and `voxfit preprocess`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        plan, store = self.folder / "plan.json", self.folder / "store"
        options = self._write("plan", {**self._plan_options(), "dataset": str(self.dataset), "out": str(plan)})
        planned = self.runner.run("voxfit-plan", [*COMMAND, "plan", "--config", options])
        command = [*COMMAND, "preprocess", "--dataset", self.dataset, "--plan", plan, "--store", store]
        return {"plan": planned.rounded(), "preprocess": self.runner.run("voxfit-preprocess", command).rounded()}

    def plan(self) -> dict[str, Any]:
        """The plan, as it is written."""
        return json.loads((self.folder / "plan.json").read_text())

    def train(self, schedule: Schedule, *, seed: int, folder: Path) -> Training:
        """`voxfit train`; the time is that of its log, from its first line, before workers start, to its last epoch."""
        options = {
            **self._options().get("train", {}),
            "plan": str(self.folder / "plan.json"),
            "store": str(self.folder / "store"),
            "run_dir": str(folder),
            "fold": FOLD,
            "seed": seed,
            "max_epochs": schedule.epochs,
            "iterations_per_epoch": schedule.iterations_per_epoch,
            "validate_every_n_epochs": schedule.validate_every,
        }
        folder.mkdir(parents=True)
        write_artifact(folder / "splits.json", self.cases.splits)
        command = [*COMMAND, "train", "--config", self._write(f"train-{folder.name}", options)]
        usage = self.runner.run(f"voxfit-train-{folder.name}", command, sample_seconds=TRAINING_SAMPLE_SECONDS)
        return self._read(folder, schedule, usage)

    def predict(self, folder: Path, images: Path, out: Path, mirroring: str) -> Usage:
        """`voxfit predict`."""
        command = [*COMMAND, "predict", "--run_dir", folder, "--checkpoint", "last", "--postprocess", "none"]
        command += ["--input", images, "--output", out, "--tta", mirroring]
        return self.runner.run(f"voxfit-predict-{folder.name}-{mirroring}", command)

    def _options(self) -> dict[str, Any]:
        return yaml.safe_load(self.config.read_text())

    def _plan_options(self) -> dict[str, Any]:
        """Those that `voxfit run` gives to its plan."""
        run = self._options()
        optim = run.get("train", {}).get("optim", {})
        own = {"optimizer": optim.get("name", OptimConfig().name), "ema": optim.get("ema_decay", 0) > 0}
        return {**run.get("plan", {}), **own, "vram": run.get("vram", "auto")}

    def _write(self, name: str, options: dict[str, Any]) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(options))
        return path

    def _read(self, folder: Path, schedule: Schedule, usage: Usage) -> Training:
        rows = read_rows(RunFolder(folder).metrics)
        later = rows[1:] or rows
        seconds = sum(row["seconds"] for row in rows)
        scored = [row["validation_seconds"] for row in rows if row["validation_seconds"]]
        whole = logged_seconds((folder / "log.txt").read_text())
        pace = Pace(
            iteration=sum(row["seconds"] for row in later) / len(later) / schedule.iterations_per_epoch,
            epoch=max(0.0, whole - seconds - sum(scored)) / len(rows),
            validation=sum(scored) / len(scored),
        )
        record = json.loads((folder / "run.json").read_text())
        told = ("precision", "num_threads", "num_workers", "num_parameters", "accumulate_grad_batches", "best_dice")
        return Training(
            seconds=whole,
            pace=pace,
            iterations=rows[-1]["iteration"],
            batch_size=record["batch_size"],
            patch_size=tuple(record["patch_size"]),
            usage=usage,
            settings={**{name: record[name] for name in told}, "options": self._options()},
        )


def logged_seconds(log: str) -> float:
    """From the line that begins a training to that of its last epoch."""
    times = [
        datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f")
        for line in log.splitlines()
        if "optimiser steps in all" in line or " INFO epoch " in line
    ]
    return (times[-1] - times[0]).total_seconds()
