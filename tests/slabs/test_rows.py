"""Rows of a tensor that exists: what is handed in piece by piece adds up to its gradient."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.slabs.rows import PendingLogits, WholeRows


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 9)), max_size=6))
def test_gradients_of_any_ranges_in_any_order_add_up(pieces):
    rows = WholeRows(torch.randn(2, 3, 9, 4, 5))
    expected = torch.zeros(rows.shape)
    for start, length in pieces:
        gradient = torch.randn(2, 3, min(length, 9 - start), 4, 5)
        expected[:, :, start : start + length] += gradient
        rows.add_gradient(start, gradient.clone())
    assert torch.equal(rows.take_gradient(), expected)


def test_a_gradient_that_was_taken_is_not_part_of_the_next():
    rows = WholeRows(torch.randn(1, 2, 6, 3, 4))
    rows.add_gradient(0, torch.ones(rows.shape))
    rows.take_gradient()
    rows.add_gradient(2, torch.ones(1, 2, 1, 3, 4))
    assert float(rows.take_gradient().sum()) == 24


def test_pending_logits_have_the_shape_that_the_logits_would_have():
    pending = PendingLogits(WholeRows(torch.empty(2, 4, 5, 6, 7)), torch.empty(9, 4, 1, 1, 1), torch.empty(9))
    assert pending.shape == (2, 9, 5, 6, 7)
