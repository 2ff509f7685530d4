"""What is wrong with a step that a user brings, in one line: checked up front, or where it fails on fake tensors."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from pipeline.errors import InputError, VoxfitError
from pipeline.geometry import Shape3, format_shape

# Writes the whole traceback of an operator that fails to stderr, before the error itself arrives.
_TORCHS_LOG = logging.getLogger("torch._subclasses.fake_tensor")


@contextmanager
def told_as_input_error(
    network: nn.Module, *, patch_size: Shape3, in_channels: int, batch_size: int = 1
) -> Iterator[None]:
    """Turn whatever a step raises inside the block into an `InputError` that names the network and its input.

    Args:
        network: That is run.
        patch_size: I, J, K.
        in_channels: C.
        batch_size: B.

    Raises:
        InputError: Also before the block, where a size is below 1.
    """
    if len(patch_size) != 3 or min(*patch_size, in_channels, batch_size) < 1:
        sizes = f"patch_size {list(patch_size)}, in_channels {in_channels}, batch_size {batch_size}"
        raise InputError(
            f"three edges of a patch and numbers of at least 1 are needed, got {sizes}", where="patch_size"
        )
    is_disabled, _TORCHS_LOG.disabled = _TORCHS_LOG.disabled, True
    try:
        yield
    except VoxfitError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise InputError(
            f"the step cannot be metered because it reads the value of a tensor ({error})",
            where=type(network).__name__,
            fix="Decide by shapes instead of values in the network and the loss, or set patch_size by hand",
        ) from error
    except Exception as error:
        given = f"patch {format_shape(patch_size)}, {in_channels} channel(s) and batch {batch_size}"
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise InputError(
            f"the step fails with {given} ({type(error).__name__}: {reason})",
            where=type(network).__name__,
            fix="Check that the network takes such a patch, and that the loss takes what it gives",
        ) from error
    finally:
        _TORCHS_LOG.disabled = is_disabled


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    """Refuse a value that is none of the known ones.

    Raises:
        InputError: It is none of them.
    """
    if value not in known:
        raise InputError(f'"{value}" is none of {", ".join(known)}', where=name)
