#!/usr/bin/env bash
# Submit the whole chain: preprocess -> verify -> train (an array over folds) -> predict -> evaluate.
# New images are segmented with all folds (ensemble) as soon as these are trained.
# Written by `voxfit slurm`. Options are handed to every sbatch: bash submit.sh --partition=gpu
# Submitting it again goes on: what is in the store is kept, finished folds end at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"/../..
mkdir -p work/logs
options=("$@") submitted=()
# If one cannot be submitted, those before it would wait or run for nothing.
trap '[ $? = 0 ] || [ -z "${submitted[*]-}" ] || scancel "${submitted[@]}"' EXIT

# submit NAME [DEPENDENCY]: sets `job` to the number that SLURM gives it.
submit() {
    local after=()
    # A job whose dependency failed is cancelled, instead of waiting for ever.
    [ $# = 1 ] || after=(--dependency="$2" --kill-on-invalid-dep=yes)
    job="$(sbatch --parsable ${after[@]+"${after[@]}"} ${options[@]+"${options[@]}"} scripts/slurm/"$1.sbatch")"
    job="${job%%;*}"
    submitted+=("$job")
    echo "$1 $job"
}

submit preprocess
# afterany: also when a share failed, so that one place names every case that is missing. What follows needs all of them.
submit verify "afterany:$job"
submit train "afterok:$job"
trained="$job"
submit predict "afterok:$job"
submit evaluate "afterok:$job"
submit ensemble "afterok:$trained"
