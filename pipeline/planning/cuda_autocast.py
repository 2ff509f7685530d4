"""CUDA's autocast rules on CPU tensors, real or fake.

Autocast decides by device which operators run in half precision and which in float32, and CPU and CUDA differ: CUDA
takes norms of torch's own to float32, which doubles the activations behind them, CPUs take poolings and paddings.
The lists are those of torch 2.13 (`ATen/autocast_mode.h`), described in "CUDA Ops that can autocast to float32" of
PyTorch's documentation of `torch.amp`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import Library, fallthrough_kernel
from torch.utils._pytree import tree_iter, tree_map_only

Kernel = Callable[..., Any]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOWER_PRECISION = _names(
    """_convolution _convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm
    bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell
    rnn_relu_cell _scaled_dot_product_flash_attention scaled_dot_product_attention"""
)
FLOAT32 = _names(
    """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
    pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim
    nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d
    hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss
    soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm
    logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d
    upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa
    upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa norm.Scalar norm.ScalarOpt_dim"""
)
FLOAT32_RESULT = _names(
    """prod prod.dim_int cumprod cumsum linalg_vector_norm linalg_matrix_norm linalg_matrix_norm.str_ord sum
    sum.dim_IntList"""
)
# As above, and the GPU's own kernels read half precision without a float32 copy of it, as the CPU's do not.
SOFTMAXES = {"softmax.int": torch.ops.aten._softmax, "log_softmax.int": torch.ops.aten._log_softmax}
WIDEST = _names("""addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add""")

_KEY = "AutocastCPU"
_LOCK = threading.RLock()
_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def cuda_autocast_rules() -> Iterator[None]:
    """Let `torch.autocast("cpu", ...)` follow CUDA's lists inside the block.

    Rules belong to operators and so to the whole process: CPU autocast of other threads follows them too meanwhile.
    """
    with _LOCK:
        library = Library("aten", "IMPL")
        try:
            _register(library)
            yield
        finally:
            library._destroy()


def _register(library: Library) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel", UserWarning)
        for name, kernel in _kernels().items():
            library.impl(name, kernel, _KEY)


def _kernels() -> dict[str, Kernel]:
    """What differs from the CPU's own rules, by operator."""
    on_cpu = _registered(_KEY)
    kernels = {name: fallthrough_kernel for name in on_cpu - LOWER_PRECISION}
    rules = {
        _run_in_half: LOWER_PRECISION - on_cpu,
        _run_in_float32: FLOAT32,
        _ask_for_float32: FLOAT32_RESULT,
        _run_in_widest: WIDEST,
        _softmax: SOFTMAXES,
    }
    for rule, names in rules.items():
        # Other releases of torch may lack some.
        kernels |= {name: rule(name) for name in names if _exists(name)}
    return kernels


def _registered(key: str) -> set[str]:
    """Torch's own operators with a kernel there; torchvision and others bring theirs, which stay as they are."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name.removeprefix("aten::") for name in names if name.startswith("aten::")}


def _exists(name: str) -> bool:
    return torch._C._dispatch_has_kernel(f"aten::{name}")


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _kernel(name: str, change: Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, Any]]) -> Kernel:
    """The operator itself without autocast, on changed arguments."""
    operator = _operator(name)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            args, kwargs = change(args, kwargs)
            return operator(*args, **kwargs)

    return run


def _run_in_half(name: str) -> Kernel:
    return _kernel(name, lambda args, kwargs: _cast((args, kwargs), torch.get_autocast_dtype("cpu")))


def _run_in_float32(name: str) -> Kernel:
    return _kernel(name, lambda args, kwargs: _cast((args, kwargs), torch.float32))


def _run_in_widest(name: str) -> Kernel:
    def change(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        dtypes = {leaf.dtype for leaf in tree_iter((args, kwargs)) if _is_cast(leaf)}
        widest = torch.float32 if torch.float32 in dtypes else torch.get_autocast_dtype("cpu")
        return _cast((args, kwargs), widest)

    return _kernel(name, change)


def _ask_for_float32(name: str) -> Kernel:
    dtype = _position_of_dtype(name)

    def change(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = kwargs.get("dtype") if dtype is None or dtype >= len(args) else args[dtype]
        return args, kwargs if given is not None or not _is_cast(args[0]) else {**kwargs, "dtype": torch.float32}

    return _kernel(name, change)


def _position_of_dtype(name: str) -> int | None:
    """Index among positional arguments, or None where it is given by name only."""
    arguments = _operator(name)._schema.arguments
    return next((i for i, part in enumerate(arguments) if part.name == "dtype" and not part.kwarg_only), None)


def _softmax(name: str) -> Kernel:
    ask = _ask_for_float32(name)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def run(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
        if dtype in (None, torch.float32) and x.dtype in _HALF and isinstance(x, FakeTensor):
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return SOFTMAXES[name](x, dim, True)
        return ask(x, dim, dtype=dtype)

    return run


def _is_cast(value: Any) -> bool:
    """Whether autocast touches it: no integers, no float64."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if _is_cast(tensor) else tensor, tree)
