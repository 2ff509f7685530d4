"""voxfit against nnU-Net and MONAI on the same cases, split and CPUs: one command a comparison, and one for the table.

    bash scripts/benchmarks/nnunet_environment.sh PEERS
    python scripts/benchmarks/against_peers.py accuracy --peers PEERS --work_dir WORK \
        --dataset Task04_Hippocampus --config configs/hippocampus.yaml
    python scripts/benchmarks/against_peers.py table

Whole processes take turns; nothing of one side runs while another does. Each command has its own --help.
"""

from __future__ import annotations

import argparse
import signal
import sys

from peers import accuracy, patches, preprocess, table, training_step


def main() -> None:
    """Run the command that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (accuracy, preprocess, patches, training_step, table):
        module.add_parser(commands)
    options = parser.parse_args()
    # So that the process that runs at the moment is ended with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options.run(options)


if __name__ == "__main__":
    main()
