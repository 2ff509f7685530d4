"""Activations that are read row by row, whether they exist whole or not.

Legend: B samples, C channels, (I, J, K) voxels. Row i of an activation (B, C, I, J, K) is its plane (B, C, J, K) at i;
rows are counted along the first spatial axis everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.slabs.dtypes import compute_dtype


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

    def sweeps(self) -> Iterator[bool]:
        """Once for each time that all gradients must be handed in; true the last time.

        Gradients of a sweep that is not the last are only summed up, so that those of the last one can take the place
        of the rows: rows that were handed in then must not be read again.
        """

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
        self._rows_filled = 0

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

    def sweeps(self) -> Iterator[bool]:
        """One."""
        yield True

    def add_gradient(self, start: int, gradient: Tensor) -> None:
        """Add to the gradient, which exists whole from the first call on."""
        stop = start + gradient.shape[2]
        if self._gradient is None:
            if gradient.shape == self.shape and gradient.stride() == self.handle.stride():
                self._gradient, self._rows_filled = gradient, stop
                return
            self._gradient = torch.empty_like(self.handle)
        # Rows mostly come in order and once, so that nothing has to be set to zero before.
        if start > self._rows_filled:
            self._gradient[:, :, self._rows_filled : start] = 0
        new = max(start, self._rows_filled)
        self._gradient[:, :, start : min(new, stop)] += gradient[:, :, : max(0, min(new, stop) - start)]
        self._gradient[:, :, new:stop] = gradient[:, :, new - start :]
        self._rows_filled = max(self._rows_filled, stop)

    def take_gradient(self) -> Tensor:
        """The gradient of the whole tensor."""
        if self._gradient is None:
            return torch.zeros_like(self.handle)
        self._gradient[:, :, self._rows_filled :] = 0
        gradient, self._gradient, self._rows_filled = self._gradient, None, 0
        return gradient


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

    def compute(self, start: int, stop: int) -> Tensor:
        """Logits (B, K classes, stop - start, J, K) of rows, without a gradient, in autocast's dtype where it is on."""
        rows = self.features.read(start, stop)
        dtype = compute_dtype(rows.dtype, rows.device)
        weight, bias = self.weight.detach().flatten(1).to(dtype), self.bias.detach().to(dtype)
        logits = torch.baddbmm(bias[:, None], weight.expand(len(rows), -1, -1), rows.flatten(2).to(dtype))
        return logits.unflatten(2, rows.shape[2:])
