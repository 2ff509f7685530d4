"""Planning and preprocessing, whole processes in turn: wall time, CPU time, peak memory."""

from __future__ import annotations

import argparse
import shutil
from typing import Any

from run_facts import write_results

from peers.accuracy import make_sides
from peers.arguments import add_common, add_data, make_runner, results_name
from peers.ratios import MEASURES, describe_ratios, peer_versions, ratios_of
from peers.raw_dataset import make_cases


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser("preprocess", help=__doc__, description=__doc__)
    add_common(parser)
    add_data(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(run=run, sides=["nnunet"], monai_optimizer="sgd", monai_lr=0.0, monai_batch_size=1)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write."""
    options.work_dir /= "preprocess"
    cases = make_cases(options.dataset, options.work_dir)
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(options.rounds):
        sides = make_sides(options, cases, make_runner(options))
        taken = {}
        for name in sorted(sides, reverse=bool(number % 2)):
            # Nothing is left of an earlier round that could be read instead of made.
            shutil.rmtree(sides[name].folder, ignore_errors=True)
            parts = sides[name].prepare()
            taken[name] = add_up(list(parts.values())) | {"parts": parts}
            print(name, {key: taken[name][key] for key in MEASURES}, flush=True)
        rounds.append(taken)
    results: dict[str, Any] = {"peer_versions": peer_versions(options.peers)}
    results |= {"dataset": cases.source.name, "num_cases": len(cases.source.cases)}
    results |= {"num_cpus": options.num_cpus, "ratios": ratios_of(rounds), "rounds": rounds}
    print(describe_ratios(results["ratios"]))
    print(write_results(options.out, results_name("preprocess", options), results))


def add_up(parts: list[dict[str, float]]) -> dict[str, float]:
    """One after the other: seconds add up, of memory the largest counts."""
    return {
        "wall_seconds": round(sum(part["wall_seconds"] for part in parts), 2),
        "cpu_seconds": round(sum(part["cpu_seconds"] for part in parts), 2),
        "peak_bytes": max(part["peak_bytes"] for part in parts),
    }
