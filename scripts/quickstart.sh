#!/usr/bin/env bash
# The whole project in one go: make an environment, then plan, preprocess, train, predict, evaluate and report
# on the synthetic samples that come with the code. CPU only, under 5 minutes on two cores after installation.
# Usage: bash scripts/quickstart.sh [WORK_DIR]      (default quickstart_run; the same command again resumes)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

work_dir="${1:-quickstart_run}"
voxfit run --config configs/quickstart.yaml --dataset data_samples/msd_blobs --work_dir "$work_dir"
