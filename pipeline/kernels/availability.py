"""Whether Triton runs on a GPU: it comes with torch for CUDA on Linux, and needs a C compiler when it starts."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import in_words
from pipeline.log import get_logger
from pipeline.slabs.repeats import has_values

log = get_logger("kernels")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(x: Tensor) -> bool:
    """Whether the kernels take a tensor: on a GPU that runs them, of a usual dtype, with values."""
    return x.is_cuda and x.dtype in DTYPES and has_values(x) and _works(x.device)


@cache
def _works(device: torch.device) -> bool:
    """Whether the kernels run there; torch's own serve otherwise, and the log says why."""
    reason = reason_against(device)
    if reason:
        log.warning("this GPU runs torch's own, slower kernels: %s", reason)
    return not reason


def reason_against(device: torch.device) -> str:
    """Why the kernels do not run on a GPU, after a first norm there; "" where it comes out right."""
    from pipeline.kernels.group_norm import group_norm

    x = torch.linspace(-3, 3, 2 * 6 * 5 * 3 * 7, device=device).view(2, 6, 5, 3, 7).sin()
    try:
        found = group_norm(x, 3, None, None, eps=1e-5, negative_slope=0.01)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"Triton does not work here ({in_words(error)})"
    is_right = torch.allclose(found, F.leaky_relu(F.group_norm(x, 3), 0.01), atol=1e-4)
    return "" if is_right else "what Triton computes here is wrong"
