"""Corrections to PyTorch's fake kernels where they differ from the real ones in a way that the meter would see.

Seen with torch 2.13: with half-precision inputs and float32 weights the fake batch, group and layer norms return half
statistics where the real ones return float32, and the fake backward of group norm returns a float32 gradient where
the real one has the input's dtype; that of batch norm returns a gradient that was not asked for. Softmaxes from bf16 to
float32, as GPUs have them, are refused. Some of torch's losses return a scalar whose storage is as large as the input.
And a short `torch.arange(...).tolist()`, as in MONAI's losses, raises.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

aten = torch.ops.aten
LONGEST_KNOWN_RANGE = 64
# Marks keys of this mode in torch's cache.
_KEY = "metered"


class MeterFakeMode(FakeTensorMode):
    """A fake mode whose norms, losses and ranges behave as real CPU ones do, and softmaxes as those of a GPU too.

    It also looks known operators up faster than torch does: steps in slabs are tens of thousands of small operators.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is compiled, and torch's guard against it costs a tenth of the time.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SOFTMAXES and args[2]:
            with self:
                return torch.empty_like(args[0], dtype=torch.float32, memory_format=torch.contiguous_format)
        if func in _GROUP_NORMS:
            with self:
                return _GROUP_NORMS[func](*args)
        result = self.dispatch(func, types, args, kwargs)
        if func in _DTYPES:
            with self:
                return _with_dtypes(result, _norm_dtypes(args))
        if func is aten.native_batch_norm_backward.default:
            return tuple(part if is_wanted else None for part, is_wanted in zip(result, args[9], strict=True))
        if func in _LOSSES and result.ndim == 0:
            with self:
                return torch.empty(torch.broadcast_shapes(args[0].shape, args[1].shape), dtype=result.dtype).resize_(())
        if func in _RANGES and result.numel() <= LONGEST_KNOWN_RANGE:
            # Fake tensors may carry the value they are known to have; then reading it is no error.
            with unset_fake_temporarily():
                result.constant = func(*args, **kwargs)
        return result

    def _prep_args_for_hash(self, result: list[Any], args: Any, *rest: Any) -> None:
        """Torch's key of its cache of results, with less said of dense tensors: here all have known sizes."""
        for arg in [args] if isinstance(args, dict) else args:
            if _is_dense_fake(arg) and arg.fake_mode is self and arg.constant is None:
                result += (_KEY, arg.dtype, arg.shape, arg.stride(), arg.storage_offset(), arg.requires_grad)
                result += (arg.fake_device, arg.untyped_storage().nbytes(), arg.is_inference())
            else:
                super()._prep_args_for_hash(result, arg if isinstance(arg, dict) else (arg,), *rest)


def fake_copy(module: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are fake CPU tensors; call it under `MeterFakeMode`."""
    fakes = {id(tensor): _fake_like(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    # Tensors that are plain attributes are copied for real: fake mode cannot, and they become fake where they are used.
    with unset_fake_temporarily():
        return copy.deepcopy(module, fakes)


def _fake_like(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _is_dense_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.layout is torch.strided


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


# Torch's fake group norms are sums of a dozen operators, which took 8 % of a plan's time (1.35 of 17 s).
def _group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *sizes: Any) -> tuple[Tensor, ...]:
    batch_size, _, _, num_groups, _ = sizes
    dtype = next((part.dtype for part in (weight, bias) if part is not None), x.dtype)
    mean, rstd = (torch.empty(batch_size, num_groups, dtype=dtype, device=x.device) for _ in range(2))
    return torch.empty_like(x, memory_format=suggest_memory_format(x)), mean, rstd


def _group_norm_backward(
    _: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, *sizes: Any
) -> tuple[Tensor | None, ...]:
    *_, num_channels, _, _, (wants_x, wants_weight, wants_bias) = sizes
    like = x if weight is None else weight
    dx = torch.empty_like(x, memory_format=suggest_memory_format(x)) if wants_x else None
    return dx, *(like.new_empty(num_channels) if is_wanted else None for is_wanted in (wants_weight, wants_bias))


_GROUP_NORMS: dict[Any, Callable[..., tuple[Tensor | None, ...]]] = {
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
}
_DTYPES = (aten.native_batch_norm.default, aten.native_layer_norm.default)
_LOSSES = (
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.soft_margin_loss.default,
    aten.binary_cross_entropy.default,
)
_SOFTMAXES = (aten._softmax.default, aten._log_softmax.default)
_RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
