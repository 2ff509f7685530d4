"""Small plans of networks, and how gradients are taken and compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.plan import NetworkPlan


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_plan() -> Callable[..., NetworkPlan]:
    """A plan of four stages with few features, odd channel counts and one anisotropic stage."""

    def make(**changes: Any) -> NetworkPlan:
        values: dict[str, Any] = {
            "features_per_stage": (6, 10, 12, 15),
            "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 2)),
            "kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 1)),
            "num_blocks_per_stage": (2, 1, 2, 1),
            "num_groups": 4,
        }
        return NetworkPlan(**{**values, **changes})

    return make


@pytest.fixture
def gradients_of() -> Callable[..., dict[str, Tensor]]:
    """Gradients by parameter name, and the input's as "input", of a fixed weighted sum of a network's outputs."""

    def take(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
        network.zero_grad()
        x = x.detach().clone().requires_grad_()
        outputs = network(x)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        generator = torch.Generator().manual_seed(1)
        sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs).backward()
        found = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
        return {"input": x.grad, **found}

    return take
