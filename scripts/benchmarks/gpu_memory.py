"""Predicted against measured memory of real training steps; needs a GPU, and ends with code 2 where there is none.

    python scripts/benchmarks/gpu_memory.py --out scripts/benchmarks/results
    python scripts/benchmarks/gpu_memory.py --peers ../peers --out scripts/benchmarks/results   # nnU-Net's step as well

Three parts:
1. Steps of ours over patches, classes and ways of running (48; what is predicted not to fit is left out): metered
   tensors, the predicted whole, and what PyTorch's allocator had allocated and reserved at most. The ratios of reserved
   to metered are what `pipeline.planning.budget` calls workspace and fragmentation; "outside" is what the device gave
   to this process beside its allocator, the context.
2. The headline: one step on 512 x 512 x 256, 118 classes, six stages of 32 to 320 features, in a process of its own
   whose allocator may take 24 GiB less the context (`torch.cuda.set_per_process_memory_fraction`).
3. nnU-Net's own step (float16, compiled as its trainer does and not compiled) at cubes that should fit.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peers.nnunet import NnunetWorker
from run_facts import write_results
from rungs import FEATURES, StepKind, make_plan, meter_kind
from step import Variant, make_step

from pipeline.geometry import Shape3
from pipeline.plan import Execution
from pipeline.planning.budget import estimate_overhead_bytes
from pipeline.sizes import GIB

LAST = len(FEATURES)
PATCHES: tuple[Shape3, ...] = ((96, 96, 96), (128, 128, 128), (160, 192, 96), (192, 192, 192))
CLASSES = (3, 118)
MOST_SLABS = LAST - 1
EXECUTIONS = (
    Execution(),
    Execution(recompute_stages=LAST),
    Execution(slab_stages=2),
    Execution(slab_stages=2, recompute_stages=LAST),
    Execution(slab_stages=MOST_SLABS),
    Execution(slab_stages=MOST_SLABS, offload_stages=1),
)
HEADLINE_PATCH: Shape3 = (512, 512, 256)
HEADLINE_CLASSES, HEADLINE_GIB = 118, 24
# Fastest first: the headline takes the first of these that is predicted to fit.
HEADLINE_EXECUTIONS = (
    Execution(slab_stages=1),
    Execution(slab_stages=2),
    Execution(slab_stages=MOST_SLABS),
    Execution(slab_stages=2, recompute_stages=LAST),
    Execution(slab_stages=MOST_SLABS, offload_stages=1),
    Execution(slab_stages=MOST_SLABS, offload_stages=2),
)
NNUNET_CUBES = {3: (128, 192, 256), 118: (128, 160, 192)}


@dataclass(frozen=True)
class Configuration:
    """One real step of ours."""

    patch_size: Shape3
    num_classes: int
    kind: StepKind


def _kind(execution: Execution) -> StepKind:
    return StepKind(execution=execution)


def configurations() -> list[Configuration]:
    """Every step of part 1."""
    return [Configuration(*chosen) for chosen in product(PATCHES, CLASSES, map(_kind, EXECUTIONS))]


def predict(configuration: Configuration) -> int:
    """Metered bytes of tensors; a function of its own for worker processes."""
    torch.set_num_threads(1)
    return meter_kind(configuration.kind, configuration.patch_size, configuration.num_classes).peak_bytes


def run_on_gpu(configuration: Configuration, num_steps: int = 3) -> dict[str, Any]:
    """Take real steps on an empty GPU; bytes at most, and seconds of the last step. `fits` is whether they ended."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    args = argparse.Namespace(
        device="cuda",
        batch_size=1,
        channels=1,
        classes=configuration.num_classes,
        patch_size=configuration.patch_size,
    )
    seconds = 0.0
    try:
        step = make_step(Variant(configuration.kind.name, bf16=True, kind=configuration.kind), make_plan(), args)
        for number in range(1, num_steps + 1):
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
            print(f"{configuration.kind.name}: step {number} took {seconds:.2f} s", file=sys.stderr, flush=True)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    free, total = torch.cuda.mem_get_info()
    return {
        "fits": fits,
        "seconds": seconds,
        "voxels_per_second": prod(configuration.patch_size) / seconds if fits else None,
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "outside_bytes": total - free - torch.cuda.memory_reserved(),
    }


def compare(chosen: Sequence[Configuration], metered: Sequence[int]) -> list[dict[str, Any]]:
    """Part 1: every configuration that is predicted to fit, really run."""
    rows = []
    for configuration, metered_bytes in zip(chosen, metered, strict=True):
        predicted = metered_bytes + estimate_overhead_bytes(metered_bytes)
        if predicted > torch.cuda.mem_get_info()[1]:
            continue
        found = {"metered_bytes": metered_bytes, "predicted_bytes": predicted, **run_on_gpu(configuration)}
        rows.append({**asdict(configuration), "name": configuration.kind.name, **found})
        print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    names = ("metered", "predicted", "allocated", "reserved", "outside")
    values = "".join(f"{row[f'{name}_bytes'] / GIB:8.2f} {name}" for name in names)
    end = f"{row['seconds']:8.3f} s" if row["fits"] else "  out of memory"
    return f"{row['name']:44}{row['patch_size']!s:18}{row['num_classes']:5} classes{values}{end}"


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the comparison says: ratios to the metered bytes, and how often a prediction was too low."""
    run = [row for row in rows if row["fits"]]
    if not run:
        return {"num_run": 0, "num_out_of_memory": len(rows)}
    whole = [row["reserved_bytes"] + row["outside_bytes"] for row in run]
    return {
        "num_run": len(run),
        "num_out_of_memory": len(rows) - len(run),
        "allocated_to_metered": _spread([row["allocated_bytes"] / row["metered_bytes"] for row in run]),
        "reserved_to_metered": _spread([row["reserved_bytes"] / row["metered_bytes"] for row in run]),
        "outside_gib": _spread([row["outside_bytes"] / GIB for row in run]),
        "measured_to_predicted": _spread([b / row["predicted_bytes"] for b, row in zip(whole, run, strict=True)]),
        "num_predicted_too_low": sum(b > row["predicted_bytes"] for b, row in zip(whole, run, strict=True)),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def choose_headline(budget_bytes: int) -> tuple[Configuration, int]:
    """The fastest way that is predicted to fit, else the leanest, and its metered bytes."""
    tried = []
    for execution in HEADLINE_EXECUTIONS:
        configuration = Configuration(HEADLINE_PATCH, HEADLINE_CLASSES, _kind(execution))
        tried.append((configuration, predict(configuration)))
        print(f"{configuration.kind.name}: {tried[-1][1] / GIB:.2f} GiB of tensors", file=sys.stderr, flush=True)
        if tried[-1][1] + estimate_overhead_bytes(tried[-1][1]) <= budget_bytes:
            return tried[-1]
    return min(tried, key=lambda pair: pair[1])


def run_headline(budget_bytes: int) -> dict[str, Any]:
    """Part 2, to be called in a process of its own: the context counts within the budget."""
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info()
    context = total - free
    torch.cuda.set_per_process_memory_fraction((budget_bytes - context) / total)
    configuration, metered_bytes = choose_headline(budget_bytes)
    found = {"budget_bytes": budget_bytes, "context_bytes": context, "metered_bytes": metered_bytes}
    found["predicted_bytes"] = metered_bytes + estimate_overhead_bytes(metered_bytes)
    return {**asdict(configuration), "name": configuration.kind.name, **found, **run_on_gpu(configuration, 2)}


def headline_in_a_process(budget_gib: float) -> dict[str, Any]:
    """Part 2 from here."""
    command = [sys.executable, __file__, "--headline_only", "--budget", str(budget_gib)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_nnunet(environment: Path) -> list[dict[str, Any]]:
    """Part 3: a worker for each step, so that one that runs out of memory does not end the others."""
    rows = []
    for (num_classes, edges), compiled in product(NNUNET_CUBES.items(), (True, False)):
        for edge in edges:
            row: dict[str, Any] = {"num_classes": num_classes, "edge": edge, "compiled": compiled}
            rows.append(row)
            try:
                with NnunetWorker(environment) as worker:
                    row["metered_bytes"] = _metered_nnunet(worker, edge, num_classes)
                    row |= _nnunet_step(worker, edge, num_classes, compiled)
            except RuntimeError as error:
                row["error"] = str(error)
            print(row, flush=True)
    return rows


def _metered_nnunet(worker: NnunetWorker, edge: int, num_classes: int) -> int:
    request = {"num_classes": num_classes, "batch_size": 1, "precision": "16-mixed", "device_type": "cuda"}
    return worker.meter((edge,) * 3, **request).peak_bytes


def _nnunet_step(worker: NnunetWorker, edge: int, num_classes: int, compiled: bool) -> dict[str, Any]:
    step = worker.make_step(
        "nnU-Net",
        features=FEATURES,
        in_channels=1,
        num_classes=num_classes,
        patch_size=(edge,) * 3,
        batch_size=1,
        device="cuda",
        clock="wall",
        num_threads=1,
        precision="own",
        compiled=compiled,
    )
    seconds = [step() for _ in range(3)][-1]
    peak = worker.ask("cuda_peak")
    bytes_found = {f"{name}_bytes": value for name, value in peak.items()}
    return {"seconds": seconds, "voxels_per_second": edge**3 / seconds, **bytes_found}


def main() -> None:
    """Run the three parts, print, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="environment that peers_environment.sh made, with a CUDA torch")
    parser.add_argument("--budget", type=float, default=HEADLINE_GIB, help="GiB of the headline")
    parser.add_argument("--headline_only", action="store_true", help="part 2 alone, as JSON on the last line")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that meter")
    parser.add_argument("--out", type=Path, help="folder for gpu_memory-DATE.json, or a file that ends in .json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: gpu_memory.py needs a GPU, and torch sees none here", file=sys.stderr)
        raise SystemExit(2)
    if options.headline_only:
        print(json.dumps(run_headline(int(options.budget * GIB))))
        return
    chosen = configurations()
    with ProcessPoolExecutor(options.num_workers, mp_context=get_context("spawn")) as pool:
        metered = list(pool.map(predict, chosen))
    results: dict[str, Any] = {"configurations": compare(chosen, metered)}
    results["summary"] = summarise(results["configurations"])
    print(json.dumps(results["summary"], indent=1))
    gc.collect()
    torch.cuda.empty_cache()
    results["headline"] = headline_in_a_process(options.budget)
    print(_line(results["headline"]))
    if options.peers:
        results["nnunet"] = run_nnunet(options.peers)
    if options.out:
        print(f"Written to {write_results(options.out, 'gpu_memory', results)}")


if __name__ == "__main__":
    main()
