"""Corrections to PyTorch's fake kernels where they differ from the real ones in a way that the meter would see.

Seen with torch 2.13: with half-precision inputs and float32 weights the fake batch, group and layer norms return half
statistics where the real ones return float32, and the fake backward of group norm returns a float32 gradient where
the real one has the input's dtype. And a short `torch.arange(...).tolist()`, as in MONAI's losses, raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
LONGEST_KNOWN_RANGE = 64


class CorrectedFakeKernels(TorchDispatchMode):
    """Makes fake norms and ranges behave as real CPU ones do; enter it inside `FakeTensorMode`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _DTYPES:
            return _with_dtypes(result, _DTYPES[func](args))
        if func in _RANGES and result.numel() <= LONGEST_KNOWN_RANGE:
            # Fake tensors may carry the value they are known to have; then reading it is no error.
            with unset_fake_temporarily():
                result.constant = func(*args, **kwargs)
        return result


def _with_dtypes(result: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> tuple[Tensor | None, ...]:
    return tuple(
        torch.empty_like(value, dtype=dtype) if value is not None and dtype not in (None, value.dtype) else value
        for value, dtype in zip(result, dtypes, strict=True)
    )


def _norm_dtypes(args: Sequence[Any]) -> tuple[torch.dtype | None, ...]:
    """Output as it is, statistics in the dtype of the weights (or running statistics) where there are any."""
    given = [value for value in args[1:] if isinstance(value, Tensor)]
    statistics = given[0].dtype if given else args[0].dtype
    return None, statistics, statistics


def _group_norm_backward_dtypes(args: Sequence[Any]) -> tuple[torch.dtype | None, ...]:
    return args[1].dtype, None, None


_DTYPES: dict[Any, Callable[[Sequence[Any]], tuple[torch.dtype | None, ...]]] = {
    aten.native_batch_norm.default: _norm_dtypes,
    aten.native_group_norm.default: _norm_dtypes,
    aten.native_layer_norm.default: _norm_dtypes,
    aten.native_group_norm_backward.default: _group_norm_backward_dtypes,
}
_RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
