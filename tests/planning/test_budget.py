from __future__ import annotations

import pytest

from pipeline.errors import InputError
from pipeline.planning.budget import (
    CONTEXT_BYTES,
    budget_from_device,
    estimate_overhead_bytes,
    format_budget,
    format_need,
    parse_vram,
)
from pipeline.sizes import GIB


@pytest.mark.parametrize("text", ["24GiB", "24GB", "24", "24 gib", " 24.0 G ", "24576MiB"])
def test_common_spellings_of_an_amount_mean_the_same(text: str) -> None:
    assert parse_vram(text) == 24 * GIB


@pytest.mark.parametrize("text", ["", "auto", "0", "-8GiB", "24TiB", "8 GiB free", "1e3", "."])
def test_text_that_is_no_amount_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"vram: .* is not an amount of memory\. Write it as 24GiB") as caught:
        parse_vram(text)
    assert "\n" not in str(caught.value)


def test_the_budget_of_this_machine_comes_with_its_reason() -> None:
    budget_bytes, sentence = budget_from_device()
    assert budget_bytes > 0
    assert sentence.endswith(".")
    assert "budget" in sentence


def test_overhead_grows_with_the_step_and_is_there_for_an_empty_one() -> None:
    assert 0 < estimate_overhead_bytes(0) < estimate_overhead_bytes(GIB) < estimate_overhead_bytes(8 * GIB)


def test_a_need_above_a_budget_shows_whatever_the_difference() -> None:
    for budget in (parse_vram("0.62"), parse_vram("24"), CONTEXT_BYTES):
        assert format_budget(budget) != format_need(budget + 1024)
    assert (format_budget(parse_vram("0.62")), format_need(parse_vram("0.62") + 1024)) == ("0.62 GiB", "0.621 GiB")
