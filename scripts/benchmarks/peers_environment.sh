#!/usr/bin/env bash
# Make an environment of its own, outside the checkout, with nnU-Net's network and loss for the benchmarks.
# Only what these two and the project's meter import: nnU-Net whole would bring timm and torchvision along.
# Usage: bash scripts/benchmarks/peers_environment.sh FOLDER   (PYTHON=python3.12 chooses another interpreter)
# A torch that the Python at hand already has is kept, so that on a GPU machine both sides can run the same build.
set -euo pipefail
nnunet="nnunetv2==2.8.1"
architectures="dynamic-network-architectures==0.4.4"

[ $# -eq 1 ] || { echo "usage: bash scripts/benchmarks/peers_environment.sh FOLDER" >&2; exit 2; }
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
case "$(realpath -m "$1")/" in
    "$project"/*) echo "error: $1 lies in the checkout; name a folder outside it" >&2; exit 2 ;;
esac
python="${PYTHON:-python3}"
constraints="$project/constraints.txt"

if "$python" -c 'import numpy, torch' 2> /dev/null; then
    echo "Keeping the torch that $python has"
    [ -e "$1" ] || "$python" -m venv --system-site-packages "$1"
else
    [ -e "$1" ] || "$python" -m venv "$1"
    if ! command -v nvidia-smi > /dev/null && "$1/bin/pip" install --quiet --dry-run --report - \
        --constraint "$constraints" torch 2> /dev/null | grep -q '"name": "nvidia'; then
        echo "error: pip would fetch several GB of CUDA libraries, and there is no GPU here." >&2
        echo "Install PyTorch's CPU build first, or export PYTHON of an environment that has it." >&2
        exit 2
    fi
    "$1/bin/pip" install --quiet --constraint "$constraints" torch numpy
fi
"$1/bin/pip" install --quiet --constraint "$constraints" pydantic
"$1/bin/pip" install --quiet --no-deps "$nnunet" "$architectures"
"$1/bin/python" - << 'CHECK'
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
CHECK
echo "Ready: $1/bin/python"
