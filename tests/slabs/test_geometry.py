"""Convolutions by rows against torch's convolution of the whole tensor and its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.slabs.geometry import RowConvolution
from pipeline.slabs.rows import WholeRows

KERNELS = [(3, 3, 3), (1, 3, 3), (5, 3, 1), (1, 1, 1)]
STRIDES = [(1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 1, 1)]


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.sampled_from(KERNELS),
    stride=st.sampled_from(STRIDES),
    size=st.tuples(st.integers(1, 13), st.integers(3, 7), st.integers(3, 8)),
    rows=st.integers(1, 6),
)
def test_rows_of_output_and_gradients_are_those_of_the_whole_convolution(kernel, stride, size, rows):
    layer = nn.Conv3d(2, 3, kernel, stride, tuple(k // 2 for k in kernel), bias=False).double()
    x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    whole = layer(x)
    gradient = torch.randn_like(whole)
    whole.backward(gradient)

    convolution, source = RowConvolution.of(layer, torch.float64), WholeRows(x)
    num_rows = whole.shape[2]
    assert convolution.output_shape(x.shape) == whole.shape
    outputs, by_weight = [], torch.zeros_like(layer.weight)
    for start in range(0, num_rows, rows):
        read = convolution.read(source, start, min(start + rows, num_rows))
        outputs.append(convolution(read))
        by_weight += convolution.weight_gradient(read, gradient[:, :, start : start + rows])
    torch.testing.assert_close(torch.cat(outputs, dim=2), whole.detach())
    torch.testing.assert_close(by_weight, layer.weight.grad)

    by_input = []
    for start in range(0, size[0], rows):
        stop = min(start + rows, size[0])
        first, until = convolution.output_range(start, stop, num_rows)
        reached = gradient[:, :, first:until]
        by_input.append(convolution.input_gradient(reached, first, start, stop, x.shape[3:]))
    torch.testing.assert_close(torch.cat(by_input, dim=2), x.grad)


@pytest.mark.parametrize("stride", STRIDES)
def test_input_rows_need_no_output_rows_that_have_no_part_in_them(stride):
    convolution = RowConvolution(torch.zeros(1, 1, 3, 3, 3), stride, (1, 1, 1))
    for row in range(12):
        first, until = convolution.output_range(row, row + 1, 12 // stride[0])
        reached = [out for out in range(12 // stride[0]) if abs(out * stride[0] - row) <= 1]
        assert list(range(first, until)) == reached
