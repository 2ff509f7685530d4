"""Weights of a finished or running training, read from its checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError

NETWORK_PREFIX = "network."
EMA_KEY = "ema_state_dict"


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The network's weights of a checkpoint, on the CPU; the averaged (EMA) ones where it has them.

    Only tensors and plain values are unpickled, so a checkpoint from elsewhere cannot run code.

    Args:
        checkpoint: A `last.ckpt` or `best.ckpt` of a run.

    Returns:
        Tensors by the key that the network's own `load_state_dict` takes.

    Raises:
        InputError: The file is missing, torn, no checkpoint, or holds no network of ours.
    """
    return weights_of(load_checkpoint(checkpoint), checkpoint)


def weights_of(content: Mapping[str, Any], checkpoint: Path) -> dict[str, Tensor]:
    """The same of a checkpoint that was read.

    Raises:
        InputError: It holds no network of ours.
    """
    if has_averaged(content):
        return dict(content[EMA_KEY])
    state = content.get("state_dict")
    # Files of other programs have all kinds of things under this name.
    items = state.items() if isinstance(state, Mapping) else ()
    weights = {
        key[len(NETWORK_PREFIX) :]: value
        for key, value in items
        if isinstance(key, str) and key.startswith(NETWORK_PREFIX)
    }
    if not weights:
        raise InputError(
            "holds no network weights", where=checkpoint, fix="Give a checkpoint written by `voxfit train`"
        )
    return weights


def has_averaged(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint that was read has averaged weights."""
    averaged = content.get(EMA_KEY)
    return isinstance(averaged, Mapping) and len(averaged) > 0


def hash_weights(weights: Mapping[str, Any]) -> str:
    """A short hash of names and values; what is no tensor is left out."""
    digest = hashlib.sha256()
    for key, value in sorted(weights.items()):
        if isinstance(value, Tensor):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """All of a checkpoint, on the CPU; only tensors and plain values are unpickled.

    Raises:
        InputError: The file is missing, torn, or no checkpoint.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError("does not exist", where=checkpoint, fix="Check the run folder") from error
    except Exception as error:
        # torch.load has no error of its own: torn zips, foreign pickles and short files each raise another type.
        raise InputError(
            "is no readable checkpoint (torn, or not written by voxfit)",
            where=checkpoint,
            fix="Use the other checkpoint of the run",
        ) from error
    if not isinstance(content, dict):
        raise InputError("is no checkpoint", where=checkpoint, fix="Give a checkpoint written by `voxfit train`")
    return content
