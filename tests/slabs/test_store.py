"""Tensors kept as slabs: what is written comes back, wherever it lies, and is gone once it is freed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.planning.storages import StorageCounter
from pipeline.slabs.store import MAX_SLABS, SlabStore, slab_ranges, slab_rows

SHAPE = torch.Size([2, 3, 11, 4, 5])
CPU = torch.device("cpu")


def make_store(*, height: int = 4, on_host: bool = False) -> SlabStore:
    store = SlabStore(SHAPE, torch.float32, CPU, on_host=on_host)
    store.height = height
    return store


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 11), min_size=2, max_size=8),
    height=st.integers(1, 11),
    on_host=st.booleans(),
)
def test_rows_that_were_written_and_added_in_any_pieces_read_as_one_tensor(cuts, height, on_host):
    store = make_store(height=height, on_host=on_host)
    expected = torch.zeros(SHAPE)
    ends = sorted(cuts)
    for number, (start, stop) in enumerate(pairwise(ends)):
        rows = torch.randn(2, 3, stop - start, 4, 5)
        if number % 2 and stop > start:
            store.add(start, rows.clone())
            expected[:, :, start:stop] += rows
        elif stop > start:
            store.write(start, rows.clone())
            expected[:, :, start:stop] = rows
    for start in range(11):
        for stop in range(start + 1, 12):
            assert torch.equal(store.read(start, stop), expected[:, :, start:stop])


def test_a_slab_lives_until_rows_up_to_its_end_are_freed():
    store, counter = make_store(), StorageCounter()
    with counter:
        store.write(0, torch.ones(SHAPE))
        whole = counter.live_bytes
        store.free(0, 3)
        assert counter.live_bytes == whole
        store.free(0, 4)
        assert counter.live_bytes == whole - 2 * 3 * 4 * 4 * 5 * 4
        store.free(0, 11)
        assert counter.live_bytes == 0


def test_a_slab_keeps_nothing_of_the_larger_tensor_that_its_rows_are_a_view_of():
    store, counter = make_store(), StorageCounter()
    with counter:
        larger = torch.ones(2, 3, 40, 4, 5)
        store.write(0, larger[:, :, 7:18])
        del larger
        assert counter.live_bytes == SHAPE.numel() * 4


def test_slabs_on_the_host_are_not_changed_through_what_was_read():
    store = make_store(on_host=True)
    store.write(0, torch.ones(SHAPE))
    store.read(0, 4).zero_()
    assert bool((store.read(0, 4) == 1).all())


@pytest.mark.parametrize("rows", [1, 2, 5, 64, 1000])
@pytest.mark.parametrize("plane", [(4, 5), (512, 512)])
def test_slabs_cover_all_rows_in_few_even_pieces(rows, plane):
    height = slab_rows(torch.Size([1, 32, rows, *plane]), torch.bfloat16)
    ranges = list(slab_ranges(rows, height))
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == rows
    assert len(ranges) <= MAX_SLABS + 1
    assert height % 2 == 0 or height == rows
