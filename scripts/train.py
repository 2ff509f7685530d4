"""Train from Python: `python scripts/train.py --plan plan.json --store store --run_dir run` is `voxfit train`."""

import sys

from pipeline.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
