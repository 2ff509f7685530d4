"""Activations that are read row by row, whether they exist whole or not.

Legend: B samples, C channels, (I, J, K) voxels. Row i of an activation (B, C, I, J, K) is its plane (B, C, J, K) at i;
rows are counted along the first spatial axis everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """An activation (B, C, I, J, K) as autograd functions of this project take it.

    A function gives `handle` to `torch.autograd.Function.apply`, reads rows in its forward and backward pass, hands in
    the gradient of every row by `add_gradient`, and returns `take_gradient()` as the gradient of `handle`.

    Attributes:
        handle: What autograd sees. It may be a scalar that only stands for the activation.
        shape: (B, C, I, J, K).
        dtype: Of the rows and their gradients.
    """

    @property
    def handle(self) -> Tensor:
        """What autograd sees."""

    @property
    def shape(self) -> torch.Size:
        """(B, C, I, J, K)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows and of their gradients."""

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop as (B, C, stop - start, J, K), within the activation; not to be written to."""

    def add_gradient(self, start: int, gradient: Tensor) -> None:
        """Add the gradient (B, C, n, J, K) of n rows from `start` on; the tensor may be kept and written to."""

    def take_gradient(self) -> Tensor:
        """What a function returns for `handle`; call it once all its rows have their gradient."""


class WholeRows:
    """Rows of a tensor that exists.

    Args:
        tensor: (B, C, I, J, K).
    """

    def __init__(self, tensor: Tensor) -> None:
        self.handle = tensor
        self._gradient: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(B, C, I, J, K)."""
        return self.handle.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self.handle.dtype

    def read(self, start: int, stop: int) -> Tensor:
        """A view of the rows."""
        return self.handle.detach()[:, :, start:stop]

    def add_gradient(self, start: int, gradient: Tensor) -> None:
        """Add to the gradient, which exists whole from the first call on."""
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.handle)
        self._gradient[:, :, start : start + gradient.shape[2]] += gradient

    def take_gradient(self) -> Tensor:
        """The gradient of the whole tensor."""
        gradient, self._gradient = self._gradient, None
        return torch.zeros_like(self.handle) if gradient is None else gradient


@dataclass(frozen=True)
class PendingLogits:
    """Logits that were not computed: the loss takes them from the features, voxels by voxels.

    Attributes:
        features: (B, C, I, J, K).
        weight: (K classes, C) or (K classes, C, 1, 1, 1) of the 1x1x1 convolution.
        bias: (K classes,).
    """

    features: Rows
    weight: Tensor
    bias: Tensor

    @property
    def shape(self) -> torch.Size:
        """(B, K classes, I, J, K) of the logits."""
        batch, _, *voxels = self.features.shape
        return torch.Size([batch, len(self.weight), *voxels])
