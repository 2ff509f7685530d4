"""Accuracy at equal compute: Dice of held-out cases after whole trainings that each took the same time."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from run_facts import dated, run_facts, write_results

from peers.arguments import add_common, add_data, make_runner, results_name
from peers.monai_side import MonaiRecipe, MonaiSide
from peers.nnunet_side import NnunetSide
from peers.processes import Runner
from peers.ratios import peer_versions
from peers.raw_dataset import FOLD, Cases, make_cases
from peers.schedule import Pace, Schedule, fit_schedule
from peers.sides import LONGER, UNMIRRORED, Side, Training
from peers.voxfit_side import VoxfitSide
from pipeline.artifacts import write_text

SIDES = ("voxfit", "nnunet", "monai", f"nnunet{UNMIRRORED}", f"monai{UNMIRRORED}", LONGER)
# Those that make a plan of their own; MONAI's networks are those of voxfit's plan.
PLANNERS = ("voxfit", LONGER, "nnunet")


class Cell(NamedTuple):
    """One training of one side."""

    side: str
    minutes: float
    seed: int

    def name_of(self, side: Side) -> str:
        """Of its folder."""
        return f"{side.key}-{self.minutes:g}min-seed{self.seed}"


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser("accuracy", help=__doc__, description=__doc__)
    add_common(parser)
    add_data(parser)
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 10, 20, 40], help="budgets of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="nnU-Net's trainer takes none: repeats")
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=SIDES[:-1], help="-unmirrored: without flips")
    parser.add_argument("--long_config", type=Path, help="YAML of `voxfit run` for voxfit-long")
    parser.add_argument("--train", choices=SIDES, nargs="+", help="train these now; of the others, what is finished")
    parser.add_argument("--mirrorings", choices=("none", "mirror"), nargs="+", default=("none", "mirror"))
    parser.add_argument("--monai_optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--monai_lr", type=float, default=0.01)
    parser.add_argument("--monai_batch_size", type=int, default=9, help="the tutorial's for the hippocampus")
    parser.set_defaults(run=run)


def order_cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Short budgets first; within a budget the sides take turns, in another order every time."""
    turn = 0
    for seed in options.seeds:
        for minutes in sorted(options.minutes):
            names = [name for name in SIDES if name in options.sides]
            shift = turn % len(names)
            yield from (Cell(name, minutes, seed) for name in names[shift:] + names[:shift])
            turn += 1


def run(options: argparse.Namespace) -> None:
    """Do every cell that is not done yet, and write the results after each."""
    if LONGER in options.sides and options.long_config is None:
        raise SystemExit(f"error: --sides {LONGER} needs --long_config")
    work, name = options.work_dir, results_name("accuracy", options)
    out = dated(options.out, name)
    given = yaml.safe_load(options.config.read_text()).get("train", {})
    split = {"num_folds": given.get("num_folds", 5), "pattern": given.get("patient_pattern", "")}
    cases = make_cases(options.dataset, work, **split)
    sides = make_sides(options, cases, make_runner(options))
    results: dict[str, Any] = {"options": _options(options), "data": _data(cases)}
    results["peer_versions"] = peer_versions(options.peers)
    results["preparation"] = {name: prepare_once(side, work) for name, side in sides.items()}
    results["plans"] = {name: sides[name].plan() for name in PLANNERS if name in options.sides}
    results["cells"] = []
    for cell in order_cells(options):
        if cell.side not in (options.train or SIDES) and not result_path(cell, sides[cell.side], work).exists():
            continue
        # The same training may have been kept under another name of its side.
        results["cells"].append(do_cell(cell, sides[cell.side], cases, options) | {"side": cell.side})
        print(describe_cell(results["cells"][-1]), flush=True)
        write_results(out, name, results)
    print(out)


def make_sides(options: argparse.Namespace, cases: Cases, runner: Runner) -> dict[str, Side]:
    """Every side by name; MONAI's takes voxfit's plan, so voxfit is always among them."""
    common, peers = {"cases": cases, "runner": runner, "work": options.work_dir}, options.peers
    voxfit = VoxfitSide(**common, config=options.config, dataset=options.dataset)
    recipe = MonaiRecipe(options.monai_optimizer, options.monai_lr, options.monai_batch_size)
    others: dict[str, Side] = {}
    for ending, mirrors in (("", True), (UNMIRRORED, False)):
        own = replace(recipe, mirrors=mirrors)
        others[f"nnunet{ending}"] = NnunetSide(**common, environment=peers, mirrors=mirrors)
        others[f"monai{ending}"] = MonaiSide(**common, environment=peers, voxfit=voxfit, recipe=own)
    if LONGER in options.sides:
        others[LONGER] = replace(voxfit, config=options.long_config)
    return {"voxfit": voxfit} | {name: others[name] for name in options.sides if name in others}


def prepare_once(side: Side, work: Path) -> dict[str, Any]:
    """Plan and preprocess, unless that was done in an earlier call."""
    done = work / f"{side.key}-prepared.json"
    if not done.exists():
        write_text(done, json.dumps(side.prepare(), indent=1))
    return json.loads(done.read_text())


def result_path(cell: Cell, side: Side, work: Path) -> Path:
    """Of a cell, where it is finished."""
    return work / "cells" / cell.name_of(side) / "result.json"


def do_cell(cell: Cell, side: Side, cases: Cases, options: argparse.Namespace) -> dict[str, Any]:
    """Train, predict, score; what a finished cell of an earlier call came to is read, an unfinished one begun anew."""
    name = cell.name_of(side)
    result = result_path(cell, side, options.work_dir)
    folder = result.parent
    if not result.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        schedule = fit_to(cell, side, options.work_dir)
        print(f"{name}: {schedule.epochs} epochs of {schedule.iterations_per_epoch}", flush=True)
        training = side.train(schedule, seed=cell.seed, folder=folder / "run" / name)
        keep_pace(side, training.pace, options.work_dir)
        predictions = {
            mirroring: predict_and_score(side, folder, name, cases, mirroring)
            for mirroring in side.mirrorings
            if mirroring in options.mirrorings
        }
        write_text(result, json.dumps(_tell(cell, schedule, training, predictions), indent=1))
    return json.loads(result.read_text())


def fit_to(cell: Cell, side: Side, work: Path) -> Schedule:
    """The schedule for a cell's budget, by the newest training of the side, or by a rehearsal."""
    known = work / f"{side.key}-pace.json"
    if not known.exists():
        rehearsal = work / "rehearsals" / side.key
        shutil.rmtree(rehearsal, ignore_errors=True)
        keep_pace(side, side.train(side.rehearsal, seed=0, folder=rehearsal).pace, work)
    pace = Pace(**json.loads(known.read_text()))
    try:
        return fit_schedule(60 * cell.minutes, pace, validations=side.validations, min_iterations=side.min_iterations)
    except ValueError as error:
        raise SystemExit(f"error: {cell.side}, {cell.minutes:g} minutes: {error}") from error


def keep_pace(side: Side, pace: Pace, work: Path) -> None:
    """For the schedules of later cells."""
    write_text(work / f"{side.key}-pace.json", json.dumps(asdict(pace), indent=1))


def predict_and_score(side: Side, folder: Path, name: str, cases: Cases, mirroring: str) -> dict[str, Any]:
    """Label files of the held-out cases, and their Dice by voxfit's evaluation, which scores all sides alike."""
    out, metrics = folder / f"predictions-{mirroring}", folder / f"metrics-{mirroring}.json"
    usage = side.predict(folder / "run" / name, cases.held_out / "imagesTr", out, mirroring)
    command = [sys.executable, "-m", "pipeline", "evaluate", "--predictions", out]
    command += ["--labels", cases.held_out / "labelsTr", "--out", metrics]
    Runner(num_cpus=side.runner.num_cpus, logs=side.runner.logs).run(f"evaluate-{name}-{mirroring}", command)
    found = json.loads(metrics.read_text())
    by_class = {each: scores["metrics"]["dice"]["mean"] for each, scores in found["by_class"].items()}
    if len(found["cases"]) != len(cases.fold.validation):
        raise SystemExit(f"error: {name} predicted {len(found['cases'])} of {len(cases.fold.validation)} cases")
    return {"dice": found["overall"]["dice"], "by_class": by_class, "usage": usage.rounded()}


def describe_cell(cell: dict[str, Any]) -> str:
    """One line."""
    scores = ", ".join(f"{key} {value['dice']:.4f}" for key, value in cell["predictions"].items())
    return f"{cell['side']:17} {cell['minutes']:g} min, took {cell['training_seconds'] / 60:.1f}: Dice {scores}"


def _tell(cell: Cell, schedule: Schedule, training: Training, predictions: dict[str, Any]) -> dict[str, Any]:
    patches = training.iterations * training.batch_size
    voxels = patches * training.patch_size[0] * training.patch_size[1] * training.patch_size[2]
    return {
        **cell._asdict(),
        "when": {name: value for name, value in run_facts().items() if name in ("date", "commit")},
        "schedule": asdict(schedule),
        "training_seconds": round(training.seconds, 1),
        "pace": asdict(training.pace),
        "iterations": training.iterations,
        "patches": patches,
        "voxels_per_second": round(voxels / training.seconds),
        "usage": training.usage.rounded(),
        "settings": training.settings,
        "predictions": predictions,
    }


def _data(cases: Cases) -> dict[str, Any]:
    fold = cases.fold
    return {
        "dataset": cases.source.name,
        "fold": FOLD,
        "num_train": len(fold.train),
        "num_held_out": len(fold.validation),
        "held_out": list(fold.validation),
    }


def _options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        name: value if isinstance(value, list | tuple | int | float | str) else str(value)
        for name, value in vars(options).items()
        if name not in ("run", "out", "work_dir", "peers", "dataset", "config", "long_config")
    }
