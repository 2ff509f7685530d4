"""Convolution, group norm and leaky ReLU as one autograd function that keeps raw outputs and statistics only.

An activation is never kept: it is computed from the raw rows of the convolution before it where it is read, which costs
no convolution. Raw rows that a convolution of few channels makes are not kept either. Gradients of activations take
the memory of the raw rows that they free. Shapes: (B, C, I, J, K), rows along I.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.slabs.backward import check_unchanged, first_derivative_only, take_once
from pipeline.slabs.dtypes import compute_dtype, without_autocast
from pipeline.slabs.geometry import RowConvolution
from pipeline.slabs.normed_rows import GroupNormSpec, GroupStatistics, NormedRows
from pipeline.slabs.repeats import is_repeat
from pipeline.slabs.rows import Rows
from pipeline.slabs.store import RecomputedRows, SlabStore, slab_ranges, slab_rows

# Up to so many input channels the raw rows of a convolution are computed anew wherever they are read: with 32 channels
# behind it this costs an eighth or less of the convolution that follows.
MAX_RECOMPUTED_CHANNELS = 4


class RowConvolutions:
    """The sum of convolutions of several inputs, by rows, with both passes.

    Args:
        inputs: Activations of one size.
        layers: A convolution without bias for each.
    """

    def __init__(self, inputs: Sequence[Rows], layers: Sequence[nn.Conv3d]) -> None:
        self.inputs = tuple(inputs)
        self.device = layers[0].weight.device
        self.dtype = compute_dtype(inputs[0].dtype, self.device)
        self.convolutions = tuple(RowConvolution.of(layer, self.dtype) for layer in layers)
        self.shape = self.convolutions[0].output_shape(inputs[0].shape)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Output rows of each slab."""
        return slab_ranges(self.shape[2], slab_rows(self.shape, self.dtype))

    def is_repeat(self, start: int, stop: int) -> bool:
        """Whether work on output rows start to stop can be left out, see `pipeline.slabs.repeats`."""
        height = slab_rows(self.shape, self.dtype)
        return is_repeat(self.convolutions[0].weight, start, stop, height=height, num_rows=self.shape[2])

    def new_rows(self, start: int, stop: int) -> Tensor:
        """Output rows start to stop without values."""
        batch, channels, _, *plane = self.shape
        return torch.empty(batch, channels, stop - start, *plane, dtype=self.dtype, device=self.device)

    def compute(self, start: int, stop: int) -> Tensor:
        """Output rows start to stop."""
        first, *others = zip(self.convolutions, self.inputs, strict=True)
        out = first[0](first[0].read(first[1], start, stop))
        for convolution, rows in others:
            out += convolution(convolution.read(rows, start, stop))
        return out

    def backward(
        self, gradient: SlabStore | _Slices, wanted: Sequence[bool]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Hand the gradients of all inputs in; gradients of output rows are freed as they are used up.

        Args:
            gradient: Of all output rows.
            wanted: Whether each input needs a gradient.

        Returns:
            The gradients of the weights in float32 or better, and of the handles.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        weights = [torch.zeros_like(each.weight, dtype=wide) for each in self.convolutions]
        for start, stop in self.ranges():
            for index in range(len(self.inputs)):
                if self.is_repeat(start, stop):
                    self._pass_over_slab(index, start, stop, wanted[index])
                else:
                    weights[index] += self._backward_slab(index, gradient, start, stop, wanted[index])
            gradient.free(0, stop - self.convolutions[0].weight.shape[2] // 2)
        gradient.free(0, self.shape[2])
        handles = [rows.take_gradient() if want else None for rows, want in zip(self.inputs, wanted, strict=True)]
        return weights, handles

    def _backward_slab(self, index: int, gradient: SlabStore | _Slices, start: int, stop: int, wanted: bool) -> Tensor:
        """The part of output rows start to stop in the weight's gradient; input rows get theirs."""
        convolution, rows = self.convolutions[index], self.inputs[index]
        x = convolution.read(rows, start, stop)
        weight_gradient = convolution.weight_gradient(x, gradient.read(start, stop))
        del x
        if wanted:
            begin, end = self._input_rows(index, start, stop)
            first, until = convolution.output_range(begin, end, self.shape[2])
            found = convolution.input_gradient(gradient.read(first, until), first, begin, end, rows.shape[3:])
            rows.add_gradient(begin, found.to(rows.dtype))
        return weight_gradient

    def _pass_over_slab(self, index: int, start: int, stop: int, wanted: bool) -> None:
        rows, (begin, end) = self.inputs[index], self._input_rows(index, start, stop)
        if wanted:
            batch, channels, _, *plane = rows.shape
            shape = (batch, channels, end - begin, *plane)
            rows.add_gradient(begin, torch.empty(shape, dtype=rows.dtype, device=self.device))

    def _input_rows(self, index: int, start: int, stop: int) -> tuple[int, int]:
        """Input rows whose gradient is handed in with output rows start to stop."""
        stride = self.convolutions[index].stride[0]
        return start * stride, self.inputs[index].shape[2] if stop == self.shape[2] else stop * stride


class _Slices:
    """A whole gradient, read by rows."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def read(self, start: int, stop: int) -> Tensor:
        return self.gradient[:, :, start:stop]

    def free(self, start: int, stop: int) -> None:
        pass


def convolve_and_norm(
    inputs: Sequence[Rows],
    layers: Sequence[nn.Conv3d],
    norm: nn.GroupNorm,
    *,
    negative_slope: float,
    on_host: bool = False,
    has_one_reader: bool = False,
) -> NormedRows:
    """The activation of a norm of the summed convolutions of activations.

    Args:
        inputs: Activations (B, C, I, J, K).
        layers: A convolution without bias for each, with one output shape.
        norm: Group norm behind the sum.
        negative_slope: Of the leaky ReLU behind the norm.
        on_host: Keep raw rows and gradients in host memory.
        has_one_reader: Only one function reads the result, and sweeps twice: gradients then take the memory of the raw
            rows.
    """
    convolutions = RowConvolutions(inputs, layers)
    with without_autocast(convolutions.device), torch.no_grad():
        rows = _observe(convolutions, norm, negative_slope, on_host=on_host, in_place=has_one_reader)
    handles = [each.handle for each in inputs]
    weights = [layer.weight for layer in layers]
    # What autograd holds must not hold autograd's own output, or no step's memory is freed but by garbage collection.
    read = copy.copy(rows)
    read.handle = _Normed.apply(convolutions, rows, norm.weight, norm.bias, *weights, *handles)
    return read


def _observe(
    convolutions: RowConvolutions, norm: nn.GroupNorm, negative_slope: float, *, on_host: bool, in_place: bool
) -> NormedRows:
    shape, dtype, device = convolutions.shape, convolutions.dtype, convolutions.device
    is_cheap = sum(rows.shape[1] for rows in convolutions.inputs) <= MAX_RECOMPUTED_CHANNELS
    store = None if is_cheap else SlabStore(shape, dtype, device, on_host=on_host)
    statistics = GroupStatistics(norm.num_groups, norm.eps)
    for start, stop in convolutions.ranges():
        if convolutions.is_repeat(start, stop):
            out = convolutions.new_rows(start, stop)
        else:
            out = convolutions.compute(start, stop)
            statistics.observe(out)
        if store is not None:
            store.write(start, out)
        del out
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = (part.detach().to(wide) for part in (norm.weight, norm.bias))
    return NormedRows(
        RecomputedRows(convolutions.compute) if store is None else store,
        shape,
        dtype,
        GroupNormSpec(norm.num_groups, weight, bias, norm.eps, negative_slope),
        statistics,
        None if in_place and store is not None else SlabStore(shape, dtype, device, on_host=on_host),
    )


class _Normed(torch.autograd.Function):
    """Takes (convolutions, rows, norm weight, norm bias, weights, handles of the inputs) and gives the rows' handle."""

    @staticmethod
    def forward(ctx: Any, convolutions: RowConvolutions, rows: NormedRows, *tensors: Tensor) -> Tensor:
        ctx.convolutions, ctx.rows = convolutions, rows
        ctx.save_for_backward(*tensors)
        return rows.handle.clone()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        convolutions, rows = take_once(ctx, "convolutions"), take_once(ctx, "rows")
        check_unchanged(ctx)
        num = len(convolutions.inputs)
        with without_autocast(convolutions.device):
            weights, handles = convolutions.backward(rows.to_raw_gradient(), ctx.needs_input_grad[-num:])
            norm_gradients = rows.norm_gradients()
        return None, None, *norm_gradients, *weights, *handles


def convolve_whole(rows: Rows, layer: nn.Conv3d) -> Tensor:
    """The convolution (B, out, I, J, K) of an activation as a tensor, for stages that do not run in slabs."""
    result: Tensor = _Whole.apply(RowConvolutions([rows], [layer]), layer.weight, rows.handle)
    return result


class _Whole(torch.autograd.Function):
    """Takes (convolutions, weight, handle of the input) and gives the whole output."""

    @staticmethod
    def forward(ctx: Any, convolutions: RowConvolutions, *tensors: Tensor) -> Tensor:
        ctx.convolutions = convolutions
        ctx.save_for_backward(*tensors)
        out = torch.empty(convolutions.shape, dtype=convolutions.dtype, device=convolutions.device)
        with without_autocast(convolutions.device):
            for start, stop in convolutions.ranges():
                if not convolutions.is_repeat(start, stop):
                    out[:, :, start:stop] = convolutions.compute(start, stop)
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        convolutions = take_once(ctx, "convolutions")
        check_unchanged(ctx)
        with without_autocast(gradient.device):
            weights, handles = convolutions.backward(_Slices(gradient), ctx.needs_input_grad[-1:])
        return None, *weights, *handles
