"""The comparison as one Markdown table, and Dice over training time as a figure, from the newest results on disk."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from places import RESULTS

from peers.figure import draw_accuracy
from peers.sides import LONGER, NAMES, UNMIRRORED
from peers.training_step import NNUNET, OURS

DATE = "????-??-??"
# Results on a second dataset or kind of machine by the tag in their names.
TAGGED = {"sts": "Sarcoma CT", "no-bf16": "CPU without bf16"}
NOT_MEASURED = "not measured"
Row = tuple[str, ...]
Cells = list[dict[str, Any]]
Maker = Callable[[dict[str, Any]], Iterator[Row]]


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser("table", help=__doc__, description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of NAME-DATE.json files")
    parser.add_argument("--figure", type=Path, help="SVG or PNG of Dice over training time")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the table, draw the figure."""
    print("\n".join(make_table(options.results)))
    found = newest(options.results, "accuracy")
    if options.figure is not None:
        if found is None:
            raise SystemExit(f"error: no accuracy-DATE.json in {options.results}")
        draw_accuracy(found["cells"], options.figure)


def newest(folder: Path, name: str) -> dict[str, Any] | None:
    """The results of that name with the latest date, and the file they are from; None without one."""
    paths = sorted(folder.glob(f"{name}-{DATE}.json"))
    return {**json.loads(paths[-1].read_text()), "file": paths[-1].name} if paths else None


def make_table(folder: Path) -> list[str]:
    """Lines of Markdown: a row per figure, a column per side, what was not measured said so."""
    rows: list[Row] = []
    for name, (title, make) in MAKERS.items():
        rows += _rows_of(newest(folder, name), make) or [(title, *[NOT_MEASURED] * 3, "", "")]
    for tag, data in TAGGED.items():
        for name, (_, make) in MAKERS.items():
            rows += [(f"{data}: {row[0]}", *row[1:]) for row in _rows_of(newest(folder, f"{name}-{tag}"), make)]
    head = ("", *NAMES.values(), "voxfit to nnU-Net", "measured")
    return [_line(head), "|" + "---|" * len(head), *(_line(row) for row in rows)]


def _rows_of(found: dict[str, Any] | None, make: Maker) -> list[Row]:
    """With the results that each is from; none where there are none."""
    if found is None:
        return []
    source = f"[{found['date']}]({_link(found['file'])})"
    return [(*row, source) for row in make(found)]


def _line(cells: Row) -> str:
    return f"| {' | '.join(cells)} |"


def _link(file: str) -> str:
    """From a page in docs/."""
    return f"../scripts/benchmarks/results/{file}"


def accuracy_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Mean Dice of every budget, way to predict and way in which the sides were trained, over seeds."""
    budgets = sorted({cell["minutes"] for cell in found["cells"]})
    for minutes, mirroring in itertools.product(budgets, ("none", "mirror")):
        cells = [each for each in found["cells"] if each["minutes"] == minutes and mirroring in each["predictions"]]
        for told, voxfit, peers in _compared(cells):
            told += ", predictions mirrored" if mirroring == "mirror" else ""
            shown = (describe_dice(each, mirroring) for each in (voxfit, *peers))
            yield (f"Dice after {minutes:g} min of training{told}", *shown, _gain(voxfit, peers[0], mirroring))


def _compared(cells: Cells) -> Iterator[tuple[str, Cells, list[Cells]]]:
    """What is put beside what, of one budget: what is said of it, voxfit's cells and those of each peer."""
    usual, longer = (_of(cells, side) for side in ("voxfit", LONGER))
    mirrored, unmirrored = (
        [_of(cells, f"{peer}{ending}") for peer in ("nnunet", "monai")] for ending in ("", UNMIRRORED)
    )
    if usual or (any(mirrored) and not longer):
        yield "", usual, mirrored
    if longer:
        yield ", voxfit by its recipe for long trainings", longer, mirrored
    if any(unmirrored):
        yield ", peers trained without mirroring", usual, unmirrored


def _gain(voxfit: Cells, nnunet: Cells, mirroring: str) -> str:
    return f"{mean_dice(voxfit, mirroring) - mean_dice(nnunet, mirroring):+.3f}" if voxfit and nnunet else ""


def _of(cells: Cells, side: str) -> Cells:
    return [cell for cell in cells if cell["side"] == side]


def mean_dice(cells: Cells, mirroring: str) -> float:
    """Over the seeds of one budget."""
    return statistics.mean(cell["predictions"][mirroring]["dice"] for cell in cells)


def describe_dice(cells: Cells, mirroring: str) -> str:
    """Mean over seeds, their least and largest where there are several, and the minutes that training really took."""
    if not cells:
        return NOT_MEASURED
    minutes = statistics.mean(cell["training_seconds"] for cell in cells) / 60
    scores = [cell["predictions"][mirroring]["dice"] for cell in cells]
    spread = f" ({min(scores):.3f} to {max(scores):.3f})" if len(scores) > 1 else ""
    return f"{mean_dice(cells, mirroring):.3f}{spread}, took {minutes:.1f} min"


def preprocess_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Seconds and memory of planning and preprocessing."""
    yield from _process_rows(f"Plan and preprocess {found['num_cases']} cases", found)


def predict_rows(found: dict[str, Any]) -> Iterator[Row]:
    """The same of predictions."""
    for mirroring, part in found["mirrorings"].items():
        told = "mirrored" if mirroring == "mirror" else "not mirrored"
        yield from _process_rows(f"Predict {found['cases']} cases, {told}", part)


def _process_rows(what: str, part: dict[str, Any]) -> Iterator[Row]:
    """Medians of the rounds, and the ratio within them."""
    units = {"wall_seconds": ("wall", "s", 1), "cpu_seconds": ("CPU", "s", 1), "peak_bytes": ("memory", "GiB", 2**30)}
    for measure, (told, unit, size) in units.items():
        shown = [
            statistics.median([each[side][measure] for each in part["rounds"]]) / size for side in ("voxfit", "nnunet")
        ]
        digits = 2 if unit == "GiB" else 1
        ratio = f"{part['ratios'][measure]['median']:.2f}"
        yield (f"{what}, {told}", *(f"{value:.{digits}f} {unit}" for value in shown), NOT_MEASURED, ratio)


def patch_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Patches per second and memory, for every number of cases."""
    for row in found["rows"]:
        cases, rates = f"{row['num_cases']} cases", row["patches_per_second"]
        ratio = f"{row['times']['nnunet']['median']:.2f}"
        told = "CPU second" if found["clock"] == "cpu" else "second"
        yield (f"Augmented patches per {told}, one thread, {cases}", *(f"{rates[side]:.0f}" for side in NAMES), ratio)
        memory = {side: row["memory"][side]["now_bytes"] for side in NAMES}
        shown = (f"{memory[side] / 2**30:.2f} GiB" for side in NAMES)
        yield (f"Memory of that process, {cases}", *shown, f"{memory['voxfit'] / memory['nnunet']:.2f}")


def step_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Voxels per second of a training step."""
    steps = {step["variant"]: step for step in found["steps"]}
    batch = found["settings"]["batch_size"]
    names = {"voxfit": OURS, "nnunet": NNUNET, "monai": "MONAI DynUNet float32"}
    speeds = (f"{steps[name]['voxels_per_second'] / 1000:.0f}" for name in names.values())
    times = 1 / steps[OURS]["ratio"]
    yield (f"Training step, thousand voxels/s, batch {batch} (voxfit bf16, others float32)", *speeds, f"{times:.2f}")


MAKERS: dict[str, tuple[str, Maker]] = {
    "accuracy": ("Dice at equal training time", accuracy_rows),
    "preprocess": ("Plan and preprocess", preprocess_rows),
    "data-path": ("Augmented patches", patch_rows),
    "peers-step-batch2": ("Training step, batch 2", step_rows),
    "peers-step-batch7": ("Training step, batch 7", step_rows),
    "predict": ("Predict", predict_rows),
}
