"""How the batch changes a training: one plan at several batches, equal samples seen, on one page.

    python scripts/batch_size_study.py --plan plan.json --store store --out_dir study --batches 1 2 4 1x4 --samples 9600

Any option of `voxfit train` may follow, such as --optim.name adamw --optim.lr 0.001.

A batch is B or BxA: B patches at once, accumulated A times before an optimiser step. 4 and 1x4 see the same patches in
every step, and differ in memory and time and in what the loss sums over. Every training sees the same number of patches
in the same number of epochs, so larger batches take fewer optimiser steps. The learning rate is the same for all unless
`--lr_rule` scales it from the first batch: `linear` (Goyal et al. 2017, for SGD) or `sqrt` (Malladi et al. 2022, for
Adam).

The gradient noise scale is measured between accumulated batches: it needs one that is accumulated, such as 1x4.

Each training is a process of its own, so that peaks of memory are its own; the same command again goes on where it
was. Written into `--out_dir`: a run folder per batch, compare.html and compare.json. One seed each says nothing of the
spread between seeds: repeat with `--seed` and another `--out_dir` before a conclusion is drawn from small differences.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from math import lcm, sqrt
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from pipeline import api
from pipeline.cli import parse
from pipeline.config import CompareConfig
from pipeline.evaluation.comparison import ComparedRun
from pipeline.sizes import GIB

SPEC = re.compile(r"([1-9]\d*)(?:x([1-9]\d*))?")
# What the study decides itself, and by which of its own options.
DECIDED = {
    "run_dir": "--out_dir",
    "max_epochs": "--epochs",
    "batch_size": "--batches",
    "effective_batch": "--batches",
    "iterations_per_epoch": "--samples",
}
DEFAULT_LR = {"sgd": 0.01, "adamw": 0.001}


class Batch(NamedTuple):
    """Patches at once, and how often they are accumulated."""

    size: int
    accumulation: int = 1

    @property
    def effective(self) -> int:
        """Patches per optimiser step."""
        return self.size * self.accumulation

    @property
    def name(self) -> str:
        """Of its run folder."""
        return f"batch_{self.size}" + (f"x{self.accumulation}" if self.accumulation > 1 else "")


def parse_batch(text: str) -> Batch:
    """A batch from `4` or `1x4`."""
    match = SPEC.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"a batch is B or BxA, such as 4 or 1x4, got {text}")
    return Batch(int(match[1]), int(match[2] or 1))


def samples_per_epoch(samples: int, epochs: int, batches: list[Batch]) -> int:
    """Patches of an epoch: about samples / epochs, and whole optimiser steps of every batch."""
    unit = lcm(*(batch.effective for batch in batches))
    return max(1, round(samples / epochs / unit)) * unit


def scaled_rate(rate: float, batch: Batch, first: Batch, rule: str) -> float:
    """The learning rate of a batch, from that of the first one."""
    ratio = batch.effective / first.effective
    return rate * {"none": 1.0, "linear": ratio, "sqrt": sqrt(ratio)}[rule]


def decided_options(rest: list[str]) -> str:
    """What to say of options of the training that the study decides itself; "" where there are none."""
    given = [word[2:].split("=", 1)[0] for word in rest if word.startswith("--")]
    return ", ".join(f"--{name} follows from {DECIDED[name]}" for name in given if name in DECIDED)


def train_command(batch: Batch, per_epoch: int, options: argparse.Namespace, rest: list[str]) -> list[str]:
    """The arguments of `voxfit` that train with a batch."""
    command = [
        "train",
        "--plan",
        options.plan,
        "--store",
        options.store,
        "--run_dir",
        f"{options.out_dir}/{batch.name}",
    ]
    command += ["--validate_every_n_epochs", "1", *rest, "--max_epochs", str(options.epochs)]
    command += ["--batch_size", str(batch.size), "--effective_batch", str(batch.effective)]
    command += ["--iterations_per_epoch", str(per_epoch // batch.size)]
    if options.lr_rule != "none":
        _, config = parse(command)
        rate = DEFAULT_LR[config.optim.name] if config.optim.lr == "auto" else config.optim.lr
        command += ["--optim.lr", repr(scaled_rate(rate, batch, options.batches[0], options.lr_rule))]
    parse(command)
    return command


def describe(runs: tuple[ComparedRun, ...], batches: list[Batch]) -> Table:
    """What the batch changed, in a line each."""
    table = Table(
        "batch", "effective", "steps", "patches", "last loss", "best Dice", "noise scale", "s/patch", "VRAM, RAM GiB"
    )
    for run, batch in zip(runs, batches, strict=True):
        peaks = ["-" if size is None else f"{size / GIB:.2f}" for size in (run.peak_vram_bytes, run.peak_ram_bytes)]
        loss, noise = (_last(run, column) for column in ("train_loss", "noise_scale"))
        table.add_row(
            *(batch.name, str(batch.effective), str(run.optimizer_step), str(run.samples), loss),
            *("-" if run.best_dice is None else f"{run.best_dice:.4f}", noise),
            *(f"{run.train_seconds / run.samples:.4f}" if run.samples else "-", ", ".join(peaks)),
        )
    return table


def _last(run: ComparedRun, column: str) -> str:
    known = [value for value in run.curves.get(column, ()) if value == value]
    return f"{known[-1]:.4g}" if known else "-"


def main() -> int:
    """Train with every batch, compare, print the table; ends with the exit code of a training that did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--out_dir", required=True)
    parser.add_argument("--batches", nargs="+", type=parse_batch, required=True)
    parser.add_argument("--samples", type=int, required=True, help="patches that every training sees, about")
    parser.add_argument("--epochs", type=int, default=10, help="into which they are divided")
    parser.add_argument("--lr_rule", choices=("none", "linear", "sqrt"), default="none")
    options, rest = parser.parse_known_args()
    if len(set(options.batches)) < len(options.batches) or min(options.samples, options.epochs) < 1:
        parser.error("give every batch once, and positive samples and epochs")
    if decided := decided_options(rest):
        parser.error(f"leave out what the study decides itself: {decided}")
    per_epoch = samples_per_epoch(options.samples, options.epochs, options.batches)
    print(f"{per_epoch} patches an epoch, {per_epoch * options.epochs} in all, for every batch")
    commands = [train_command(batch, per_epoch, options, rest) for batch in options.batches]
    for command in commands:
        code = subprocess.run([sys.executable, "-m", "pipeline", *command], check=False).returncode
        if code:
            return code
    folders = tuple(f"{options.out_dir}/{batch.name}" for batch in options.batches)
    found = api.compare(CompareConfig(runs=folders, out=f"{options.out_dir}/compare.html", json=True))
    Console(width=120).print(describe(found.runs, options.batches))
    return 0


if __name__ == "__main__":
    sys.exit(main())
