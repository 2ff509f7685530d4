#!/usr/bin/env bash
# Make an environment of its own, outside the checkout, with the whole of nnU-Net and its commands, and MONAI, for
# predict.py and against_peers.py.
# torch first and then held, so that all sides run the same version; about 2 GB with a CPU build of torch.
# Usage: bash scripts/benchmarks/nnunet_environment.sh FOLDER   (PYTHON=python3.12 chooses another interpreter)
set -euo pipefail
nnunet="nnunetv2==2.8.1"

[ $# -eq 1 ] || { echo "usage: bash scripts/benchmarks/nnunet_environment.sh FOLDER" >&2; exit 2; }
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
case "$(realpath -m "$1")/" in
    "$project"/*) echo "error: $1 lies in the checkout; name a folder outside it" >&2; exit 2 ;;
esac
torch="$(grep '^torch==' "$project/constraints.txt")"
monai="$(grep '^monai==' "$project/constraints.txt")"
[ -e "$1" ] || "${PYTHON:-python3}" -m venv "$1"
if ! command -v nvidia-smi > /dev/null && "$1/bin/pip" install --quiet --dry-run --report - "$torch" 2> /dev/null \
    | grep -q '"name": "nvidia'; then
    echo "error: pip would fetch several GB of CUDA libraries, and there is no GPU here." >&2
    echo "Install PyTorch's CPU build into $1 first." >&2
    exit 2
fi
"$1/bin/pip" install --quiet "$torch"
"$1/bin/pip" install --quiet --constraint <(echo "$torch") "$nnunet" "$monai"
"$1/bin/nnUNetv2_predict_from_modelfolder" --help > /dev/null
"$1/bin/python" -c 'import monai.networks.nets'
echo "Ready: $1"
