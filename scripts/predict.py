"""Predict from Python: `python scripts/predict.py --run_dir run --input IN --output OUT` is `voxfit predict`."""

import sys

from pipeline.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
