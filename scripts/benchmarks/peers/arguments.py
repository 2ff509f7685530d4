"""Options that the commands against the peers have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from places import RESULTS

from peers.processes import Runner


def add_common(parser: argparse.ArgumentParser) -> None:
    """Where the peers are, where to work, where results go."""
    parser.add_argument("--peers", type=Path, required=True, help="environment made by nnunet_environment.sh")
    parser.add_argument("--work_dir", type=Path, required=True, help="what is finished there is not done again")
    parser.add_argument("--num_cpus", type=int, default=2, help="CPUs that every process may use")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for NAME-DATE.json, or a .json file")


def add_data(parser: argparse.ArgumentParser) -> None:
    """What all sides work on, and voxfit's recipe."""
    parser.add_argument("--dataset", type=Path, required=True, help="any dataset that voxfit reads")
    parser.add_argument("--config", type=Path, required=True, help="YAML of `voxfit run` for voxfit's side")
    parser.add_argument("--tag", default="", help="of a second dataset or machine: NAME-TAG-DATE.json")


def results_name(name: str, options: argparse.Namespace) -> str:
    """Of the results of a command, with the tag where there is one."""
    return f"{name}-{options.tag}" if options.tag else name


def make_runner(options: argparse.Namespace) -> Runner:
    """Starts the processes of all sides alike."""
    return Runner(num_cpus=options.num_cpus, logs=options.work_dir / "logs")
