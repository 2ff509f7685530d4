from __future__ import annotations

import pytest

from pipeline.errors import InputError
from pipeline.predict_config import PredictConfig

PATHS = {"run_dir": "run", "input": "in", "output": "out"}


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("8GiB", 8 << 30), ("1.5 GB", 3 << 29), ("512MiB", 512 << 20), ("2", 2 << 30), ("auto", None)],
)
def test_a_bound_on_host_memory_is_read_as_people_write_it(text: str, num_bytes: int | None) -> None:
    assert PredictConfig(**PATHS, max_ram=text).max_ram_bytes == num_bytes


@pytest.mark.parametrize("text", ["", "much", "-3GiB", "0", "8 apples"])
def test_what_is_no_amount_of_memory_is_refused_with_the_option_named(text: str) -> None:
    with pytest.raises(InputError, match="max_ram: must be an amount of memory such as 8GiB, or auto"):
        PredictConfig(**PATHS, max_ram=text)


def test_all_problems_come_in_one_error() -> None:
    with pytest.raises(InputError, match=r"overlap: .*; max_ram: .*; num_threads: "):
        PredictConfig(**PATHS, overlap=1.0, max_ram="x", num_threads=0)


def test_a_share_is_read_as_number_and_count() -> None:
    assert PredictConfig(**PATHS).share is None
    assert PredictConfig(**PATHS, shard="3/16").share == (3, 16)


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "3/", "/4", "a/b", "-1/2", "1/2/3"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="shard: must be as in 3/16, counted from 1"):
        PredictConfig(**PATHS, shard=text)
