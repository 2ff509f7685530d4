"""Amounts of memory as people write and read them."""

from __future__ import annotations

import pytest

from pipeline.sizes import GIB, MIB, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(3.24 * GIB, "3.2 GiB"), (GIB // 2, "0.5 GiB"), (102 * MIB, "102 MiB"), (0.3 * MIB, "0.3 MiB"), (0, "0 MiB")],
)
def test_memory_is_said_in_gib_and_small_amounts_in_mib(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize("num_bytes", [5 * GIB, 40 * MIB])
def test_what_is_said_can_be_given_as_an_option(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == num_bytes
