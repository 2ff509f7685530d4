"""Host buffers: used again in stream order, and counted as pinned memory takes them."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.planning.storages import StorageCounter
from pipeline.slabs.host import (
    LARGEST_SHARED_BLOCK,
    BufferPool,
    allocate_on_host,
    buffers_per_block,
    pinned_bytes,
)

MIB = 2**20


def test_a_buffer_that_was_given_up_is_the_next_one_of_its_size() -> None:
    pool = BufferPool(pin_memory=False)
    first = pool.take((3, 5, 7), torch.bfloat16)
    place = first.data_ptr()
    assert (first.shape, first.dtype, first.is_contiguous()) == ((3, 5, 7), torch.bfloat16, True)
    del first
    assert pool.take((105,), torch.float16).data_ptr() == place
    assert pool.take((105,), torch.float32).data_ptr() != place


def test_buffers_in_use_never_share_memory() -> None:
    pool = BufferPool(pin_memory=False)
    kept = [pool.take((4, 6), torch.float32).fill_(number) for number in range(20)]
    gc.collect()
    kept += [pool.take((4, 6), torch.float32).fill_(number) for number in range(20, 40)]
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(kept))


def test_a_pool_that_was_cleared_holds_nothing() -> None:
    pool = BufferPool(pin_memory=False)
    with StorageCounter() as counter:
        tensor = pool.take((10,), torch.float32)
        del tensor
        assert counter.live_bytes >= 40
        pool.clear()
        assert counter.live_bytes == 0


@given(st.integers(1, 4 * LARGEST_SHARED_BLOCK), st.integers(0, 200))
def test_pinned_memory_holds_the_buffers_and_seldom_much_more(num_bytes: int, num_buffers: int) -> None:
    number = buffers_per_block(num_bytes)
    assert number == 1 or number * num_bytes <= LARGEST_SHARED_BLOCK
    taken = pinned_bytes(num_buffers, num_bytes)
    assert taken >= num_buffers * num_bytes
    if num_buffers % number == 0 and num_bytes <= LARGEST_SHARED_BLOCK // 16:
        assert taken <= 1.13 * num_buffers * num_bytes


@pytest.mark.parametrize(("num_bytes", "number"), [(128 * MIB, 1), (176 * MIB, 11), (250 * MIB, 1), (96 * MIB, 5)])
def test_so_many_buffers_share_a_block_that_little_of_it_is_left_over(num_bytes: int, number: int) -> None:
    assert buffers_per_block(num_bytes) == number


def test_a_counter_tells_pinned_memory_by_sizes_at_their_own_peaks() -> None:
    with StorageCounter() as counter:
        first = [allocate_on_host(torch.empty(1000, dtype=torch.uint8)) for _ in range(3)]
        del first
        second = [allocate_on_host(torch.empty(5000, dtype=torch.uint8)) for _ in range(2)]
        del second
    assert counter.peak_host_bytes == 10_000
    assert counter.peak_pinned_bytes == pinned_bytes(3, 1000) + pinned_bytes(2, 5000)
