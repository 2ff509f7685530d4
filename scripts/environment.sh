#!/usr/bin/env bash
# Make the virtual environment .venv in the checkout with the tested versions; does nothing when it is up to date.
# A torch (2.8 or newer) that the Python at hand already has is kept, so that a site's own CUDA build is not replaced.
# Usage: source scripts/environment.sh   (PYTHON=python3.12 chooses another interpreter)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
stamp=".venv/installed-$(cat setup.cfg pyproject.toml constraints.txt | cksum | cut -d' ' -f1)"

if [ ! -e "$stamp" ]; then
    echo "Making the environment in .venv (once; a few minutes)"
    constraints="$(mktemp)"
    if "$python" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8))' 2>/dev/null; then
        echo "Keeping the torch that $python has"
        [ -e .venv ] || "$python" -m venv --system-site-packages .venv
        grep -v '^torch==' constraints.txt > "$constraints"
    else
        [ -e .venv ] || "$python" -m venv .venv
        cp constraints.txt "$constraints"
        if ! command -v nvidia-smi > /dev/null && .venv/bin/pip install --quiet --dry-run --report - \
            --constraint "$constraints" torch 2> /dev/null | grep -q '"name": "nvidia'; then
            echo "error: pip would fetch several GB of CUDA libraries, and there is no GPU here." >&2
            echo "Install PyTorch's CPU build first (its web page tells how), or export PYTHON of an environment that has it." >&2
            exit 2
        fi
        .venv/bin/pip install --quiet --no-compile --constraint "$constraints" torch
    fi
    .venv/bin/pip install --quiet --no-compile --constraint "$constraints" --editable '.[dev]'
    # On all cores, where pip takes one. Some packages bring templates that are no Python: not an error.
    .venv/bin/python -m compileall -qq --workers 0 .venv/lib || true
    rm -f "$constraints" .venv/installed-*
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
