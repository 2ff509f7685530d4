"""Augmented training patches per second of one thread, in turns, and memory by number of cases."""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from run_facts import write_results

from peers.accuracy import make_sides, prepare_once
from peers.arguments import add_common, add_data, make_runner, results_name
from peers.json_worker import JsonWorker
from peers.monai_side import MonaiSide
from peers.nnunet_side import NnunetSide
from peers.ratios import median_and_range, peer_versions
from peers.raw_dataset import Cases, make_cases
from peers.sides import NAMES, Side, write_request
from pipeline.datasets.splits import Fold

HERE = Path(__file__).parent
SIDES = tuple(NAMES)


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser("data_path", help=__doc__, description=__doc__)
    add_common(parser)
    add_data(parser)
    parser.add_argument("--num_cases", type=int, nargs="+", default=[5, 50, 195], help="cases that patches come from")
    parser.add_argument("--rounds", type=int, default=10, help="blocks of every side in turns")
    parser.add_argument("--block", type=int, default=100, help="patches per block")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="of which the ratios are")
    parser.set_defaults(run=run, sides=list(SIDES), monai_optimizer="sgd", monai_lr=0.0, monai_batch_size=1)


def run(options: argparse.Namespace) -> None:
    """Prepare once, measure every number of cases with new processes, print and write."""
    cases = make_cases(options.dataset, options.work_dir)
    sides = make_sides(options, cases, make_runner(options))
    for side in sides.values():
        prepare_once(side, options.work_dir)
    ids = [case.case_id for case in cases.source.cases]
    # Never more than there are, and each number once.
    counts = sorted({min(num, len(ids)) for num in options.num_cases})
    # After the fold that trainings use, one for each number; two of its cases stand for the validation as well.
    nnunet: NnunetSide = sides["nnunet"]
    nnunet.write_folds(Fold(train=tuple(ids[:num]), validation=tuple(ids[:num][:2])) for num in counts)
    rows = []
    for fold, num in enumerate(counts, start=1):
        with ExitStack() as stack:
            workers = {name: stack.enter_context(start_worker(name, sides, cases, ids[:num], fold)) for name in SIDES}
            rows.append({"num_cases": num, **measure(workers, options)})
        print(describe(rows[-1]), flush=True)
    settings = {"patch_size": sides["voxfit"].plan()["patch_size"], "rounds": options.rounds, "block": options.block}
    results = {
        "peer_versions": peer_versions(options.peers),
        "clock": options.clock,
        "settings": settings,
        "rows": rows,
    }
    print(write_results(options.out, results_name("data-path", options), results))


def start_worker(name: str, sides: dict[str, Side], cases: Cases, ids: list[str], fold: int) -> JsonWorker:
    """The process that makes the patches of a side, on one thread."""
    single = {"OMP_NUM_THREADS": "1"}
    if name == "nnunet":
        nnunet: Any = sides["nnunet"]
        command = [nnunet.environment / "bin" / "python", HERE / "nnunet_patch_worker.py", str(fold)]
        return JsonWorker(command, single | nnunet.variables() | {"nnUNet_n_proc_DA": "0"})
    monai: MonaiSide = sides["monai"]
    request = monai.network() | {"cases": ids, "store": str(sides["voxfit"].folder / "store")}
    request |= {"files": [monai.files(case_id) for case_id in ids]}
    path = write_request(sides["voxfit"].folder / f"patches-{name}-{len(ids)}.json", request)
    return JsonWorker([sys.executable, HERE / "patch_worker.py", name, path], single)


def measure(workers: dict[str, JsonWorker], options: argparse.Namespace) -> dict[str, Any]:
    """Every side's blocks in turns, after one that is not counted, and its memory at the end."""
    for worker in workers.values():
        worker.ask("block", num=min(20, options.block))
    rounds = []
    for number in range(options.rounds):
        names = sorted(workers, reverse=bool(number % 2))
        rounds.append({name: workers[name].ask("block", num=options.block) for name in names})
    memory = {name: worker.ask("memory") for name, worker in workers.items()}
    return {"memory": memory, **summarise(rounds, options.clock), "rounds": rounds}


def summarise(rounds: list[dict[str, dict[str, float]]], clock: str) -> dict[str, Any]:
    """Median patches per second of every side, and of voxfit's ratio to each other one, taken within a round."""
    rates = [{name: block["patches"] / block[clock] for name, block in each.items()} for each in rounds]
    others = [name for name in rates[0] if name != "voxfit"]
    ratios = {name: [each["voxfit"] / each[name] for each in rates] for name in others}
    return {
        "patches_per_second": {name: round(statistics.median(each[name] for each in rates), 1) for name in rates[0]},
        "times": {name: median_and_range(found, digits=2) for name, found in ratios.items()},
    }


def describe(row: dict[str, Any]) -> str:
    """One line."""
    parts = [
        f"{name} {rate:.0f} patches/s, {row['memory'][name]['now_bytes'] / 2**20:.0f} MiB"
        for name, rate in row["patches_per_second"].items()
    ]
    return f"{row['num_cases']} cases: " + "; ".join(parts)
