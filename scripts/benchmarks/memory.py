"""Peak memory of one training step, nnU-Net's and MONAI's and ours in every way, on the same meter; needs no GPU.

    bash scripts/benchmarks/peers_environment.sh ../peers          # once, for nnU-Net's rows
    python scripts/benchmarks/memory.py --peers ../peers --out scripts/benchmarks/results
    python scripts/benchmarks/memory.py --quick                    # few sizes, few ways, no nnU-Net

Two tables for each number of classes: GiB at given patches, and the largest cube (edge a multiple of 32) under given
budgets. All networks have six stages of 32 to 320 features and two convolutions a stage; all steps run under bf16
autocast with SGD and momentum, batch 1 where a row says nothing else (nnU-Net's planner never goes below 2). Memory is
that of tensors: what a device adds is not in it, for anyone. "x" compares voxels within a budget with nnU-Net's at
batch 1, interpolated between the cube that fits and the next one, since memory is nearly linear in the voxels.

Operators follow CUDA's autocast rules, or with `--autocast cpu` those of a CPU. "+ h" are GiB of pinned host memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from math import ceil, prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peers.nnunet import NnunetWorker
from run_facts import write_results
from rungs import FEATURES, StepKind, make_plan, meter_kind, step_kinds

from pipeline.geometry import Shape3
from pipeline.planning.meter import StepMemory, meter_step
from pipeline.sizes import GIB

SIZES: tuple[Shape3, ...] = (*((edge,) * 3 for edge in (128, 192, 256, 320)), (512, 512, 256), (512,) * 3)
QUICK_SIZES: tuple[Shape3, ...] = ((128,) * 3, (256,) * 3, (512, 512, 256))
BUDGETS, QUICK_BUDGETS = (8, 11, 16, 24, 40, 80), (8, 24, 80)
EDGE_STEP, SMALLEST_EDGE, LARGEST_EDGE = 32, 64, 1280
REFERENCE = "nnU-Net, batch 1"
PEERS = (REFERENCE, "nnU-Net, batch 2", "MONAI DynUNet", "MONAI DynUNet, deep supervision")

Meter = Callable[[Shape3], StepMemory]


@dataclass(frozen=True)
class Job:
    """One row: a step at a number of classes, and what is asked of it."""

    step: str
    kind: StepKind | None
    num_classes: int
    sizes: tuple[Shape3, ...]
    budgets: tuple[int, ...]
    autocast: str
    peers: Path | None


@dataclass
class Row:
    """What a job found; memory by patch, and by budget in GiB the largest cube's edge and the voxels that would fit."""

    step: str
    num_classes: int
    memory: dict[Shape3, StepMemory] = field(default_factory=dict)
    largest: dict[int, tuple[int, float] | None] = field(default_factory=dict)
    seconds: float = 0.0


def run_job(job: Job) -> Row:
    """Meter one row."""
    torch.set_num_threads(1)
    start, row = time.perf_counter(), Row(job.step, job.num_classes)
    with nullcontext() if job.kind or "nnU-Net" not in job.step else NnunetWorker(job.peers) as worker:
        meter = _make_meter(job, worker)
        row.memory = {size: meter(size) for size in job.sizes}
        known = {size[0]: memory.peak_bytes for size, memory in row.memory.items() if len(set(size)) == 1}
        for budget in job.budgets:
            row.largest[budget] = largest_cube(lambda edge: meter((edge,) * 3).peak_bytes, budget * GIB, known)
    row.seconds = time.perf_counter() - start
    return row


def _make_meter(job: Job, worker: NnunetWorker | None) -> Meter:
    if job.kind is not None:
        return partial(meter_kind, job.kind, num_classes=job.num_classes, device_type=job.autocast)
    if worker is not None:
        request = {"num_classes": job.num_classes, "batch_size": int(job.step[-1]), "device_type": job.autocast}
        return lambda size: worker.meter(size, precision="bf16-mixed", **request)
    return partial(_meter_dynunet, job)


def _meter_dynunet(job: Job, patch_size: Shape3) -> StepMemory:
    from peers.dynunet import DynUNetLoss, make_dynunet

    with torch.device("meta"):
        network = make_dynunet(job.num_classes, FEATURES, deep_supervision="deep supervision" in job.step)
    return meter_step(network, DynUNetLoss(), patch_size=patch_size, in_channels=1, device_type=job.autocast)


def largest_cube(
    peak_bytes: Callable[[int], int], budget_bytes: int, known: dict[int, int]
) -> tuple[int, float] | None:
    """The largest edge whose peak is within the budget, and the voxels that would fill it exactly.

    Both neighbours are metered; guesses between them come from a straight line in the voxels.

    Args:
        peak_bytes: Peak of a cube with this edge; rises with it.
        budget_bytes: What it may take.
        known: Peaks by edge so far; new ones are added.

    Returns:
        None when not even the smallest edge fits. Beyond `LARGEST_EDGE` nothing is looked for.
    """
    while True:
        low = max((edge for edge, peak in known.items() if peak <= budget_bytes), default=None)
        high = min((edge for edge, peak in known.items() if peak > budget_bytes), default=None)
        if low == LARGEST_EDGE:
            return low, float(low**3)
        if high == SMALLEST_EDGE:
            return None
        if low is not None and high == low + EDGE_STEP:
            share = (budget_bytes - known[low]) / (known[high] - known[low])
            return low, low**3 + share * (high**3 - low**3)
        edge = _next_edge(low, high, budget_bytes, known)
        known[edge] = peak_bytes(edge)


def _next_edge(low: int | None, high: int | None, budget_bytes: int, known: dict[int, int]) -> int:
    first, last = (low or SMALLEST_EDGE - EDGE_STEP) + EDGE_STEP, (high or LARGEST_EDGE + EDGE_STEP) - EDGE_STEP
    if low is None and high is None:
        return min(max(256, first), last)
    if low is not None and high is not None:
        share = (budget_bytes - known[low]) / (known[high] - known[low])
        voxels = low**3 + share * (high**3 - low**3)
        guess = int(voxels ** (1 / 3)) // EDGE_STEP * EDGE_STEP
        # From the far side of the answer the near one is asked next, so that both neighbours get known.
        guess = guess + EDGE_STEP if guess == low else guess
    else:
        voxels = _extrapolated_voxels(budget_bytes, known)
        guess = ceil(voxels ** (1 / 3) / EDGE_STEP) * EDGE_STEP
    return min(max(guess, first), last)


def _extrapolated_voxels(budget_bytes: int, known: dict[int, int]) -> float:
    """By the line through the two largest known cubes, or through the origin."""
    (last, peak), *others = sorted(known.items(), reverse=True)
    before, lower = others[0] if others else (0, 0)
    return max(0.0, last**3 + (budget_bytes - peak) * (last**3 - before**3) / max(1, peak - lower))


def ratios(rows: list[Row]) -> dict[tuple[str, int, int], float]:
    """Voxels under a budget against the reference's, by step, classes and budget; without the reference none."""
    reference = {row.num_classes: row for row in rows if row.step == REFERENCE}
    found = {}
    for row in rows:
        for budget, largest in row.largest.items():
            base = reference[row.num_classes].largest[budget] if row.num_classes in reference else None
            if largest and base:
                found[row.step, row.num_classes, budget] = largest[1] / base[1]
    return found


def tables(rows: list[Row]) -> Iterator[str]:
    """Lines of the Markdown tables."""
    by_ratio = ratios(rows)
    for num_classes in dict.fromkeys(row.num_classes for row in rows):
        some = [row for row in rows if row.num_classes == num_classes]
        yield from _table(
            f"GiB of tensors, {num_classes} classes",
            [_size_name(size) for size in some[0].memory],
            {row.step: [_gib(memory) for memory in row.memory.values()] for row in some},
        )
        yield from _table(
            f"Largest cube, {num_classes} classes",
            [f"{budget} GiB" for budget in some[0].largest],
            {
                row.step: [_cube_name(row.largest[b], by_ratio.get((row.step, num_classes, b))) for b in row.largest]
                for row in some
            },
        )


def _table(title: str, columns: list[str], lines: dict[str, list[str]]) -> Iterator[str]:
    if columns:
        yield f"\n| {title} | {' | '.join(columns)} |"
        yield "|---" * (len(columns) + 1) + "|"
        yield from (f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items())


def _gib(memory: StepMemory) -> str:
    host = f" + {memory.pinned_bytes / GIB:.1f} h" if memory.pinned_bytes else ""
    return f"{memory.peak_bytes / GIB:.1f}{host}"


def _progress(row: Row) -> str:
    peaks = [f"{_size_name(size)}: {_gib(memory)}" for size, memory in row.memory.items()]
    cubes = [f"{budget} GiB: {_cube_name(found, None)}" for budget, found in row.largest.items()]
    return f"{row.step}, {row.num_classes} classes ({row.seconds:.0f} s): {'; '.join([*peaks, *cubes])}"


def _size_name(size: Shape3) -> str:
    return f"{size[0]}^3" if len(set(size)) == 1 else " x ".join(map(str, size))


def _cube_name(largest: tuple[int, float] | None, ratio: float | None) -> str:
    if largest is None:
        return f"below {SMALLEST_EDGE}"
    return f"{largest[0]}^3" + (f" ({ratio:.1f}x)" if ratio else "")


def as_json(rows: list[Row]) -> dict[str, Any]:
    """All rows, for files."""
    by_ratio = ratios(rows)
    memory = [
        {"step": row.step, "num_classes": row.num_classes, "patch_size": size, "voxels": prod(size), **asdict(memory)}
        for row in rows
        for size, memory in row.memory.items()
    ]
    largest = [
        {
            "step": row.step,
            "num_classes": row.num_classes,
            "budget_gib": budget,
            "largest_cube": found and found[0],
            "voxels_that_fit": found and round(found[1]),
            "ratio": by_ratio.get((row.step, row.num_classes, budget)),
        }
        for row in rows
        for budget, found in row.largest.items()
    ]
    return {"features_per_stage": FEATURES, "reference": REFERENCE, "memory": memory, "largest": largest}


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """One job for each row of the tables."""
    sizes = tuple(map(tuple, options.size)) if options.size else QUICK_SIZES if options.quick else SIZES
    budgets = tuple(options.budgets) if options.budgets is not None else QUICK_BUDGETS if options.quick else BUDGETS
    kinds = [kind for kind in step_kinds(make_plan()) if not options.quick or _is_telling(kind)]
    steps: dict[str, StepKind | None] = {name: None for name in PEERS if options.peers or "nnU-Net" not in name}
    steps |= {kind.name: kind for kind in kinds}
    wanted = {name: kind for name, kind in steps.items() if not options.only or any(w in name for w in options.only)}
    return [
        Job(name, kind, num_classes, sizes, budgets, options.autocast, options.peers)
        for num_classes in options.classes
        for name, kind in wanted.items()
    ]


def _is_telling(kind: StepKind) -> bool:
    recompute_stages, slab_stages, offload_stages = kind.execution
    return recompute_stages in (0, len(FEATURES)) and slab_stages in (0, len(FEATURES) - 1) and offload_stages < 2


def main() -> None:
    """Meter, print the tables, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="environment that peers_environment.sh made; without it no nnU-Net")
    parser.add_argument("--classes", type=int, nargs="+", default=(3, 118))
    parser.add_argument("--size", type=int, nargs=3, action="append", help="a patch to meter; may be given many times")
    parser.add_argument("--budgets", type=int, nargs="*", help="GiB; none leaves out the search for the largest cubes")
    parser.add_argument("--autocast", choices=("cuda", "cpu"), default="cuda", help="whose rules for operators")
    parser.add_argument("--only", nargs="+", help="rows whose name contains one of these")
    parser.add_argument("--quick", action="store_true", help="few patches, budgets and ways of running")
    parser.add_argument("--num_workers", type=int, default=2, help="rows metered at a time")
    parser.add_argument("--out", type=Path, help="folder for memory-DATE.json, or a file that ends in .json")
    options = parser.parse_args()
    jobs, rows = make_jobs(options), []
    with ProcessPoolExecutor(options.num_workers, mp_context=get_context("spawn")) as pool:
        for row in pool.map(run_job, jobs):
            rows.append(row)
            print(_progress(row), flush=True)
    print("\n".join(tables(rows)))
    if options.out:
        settings: dict[str, Any] = {"autocast": options.autocast}
        if options.peers:
            with NnunetWorker(options.peers) as worker:
                settings["peer_versions"] = worker.ask("versions")
        print(f"\nWritten to {write_results(options.out, 'memory', settings | as_json(rows))}")


if __name__ == "__main__":
    main()
