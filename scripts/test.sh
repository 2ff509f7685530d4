#!/usr/bin/env bash
# Lint, types and tests, in the checkout's own environment (made when it is missing).
# Usage: bash scripts/test.sh            the default tests (about 20 minutes on 2 slow cores: Xeon at 2.5 GHz)
#        bash scripts/test.sh --slow     the 30 long ones as well, as CI does (27 minutes there)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

selection="not slow"
if [ "${1:-}" = "--slow" ]; then
    selection="slow or not slow"
    shift
fi

# Images of containers set it, and then every process that the tests start would compile the project anew.
unset PYTHONDONTWRITEBYTECODE

ruff check .
ruff format --check .
# Beside the tests: it takes one core for a minute where it has no cache, as in CI.
mypy &
types=$!
trap 'kill "$types" 2> /dev/null || true' EXIT
failed=0
# One thread a test process: two processes fill two cores, and results do not depend on the number of threads.
OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist loadfile -m "$selection" --durations 15 -r s "$@" || failed=$?
wait "$types" || failed=$?
exit "$failed"
