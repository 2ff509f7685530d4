from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import PredictConfig
from pipeline.errors import InputError

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run_dir": ("a", "b", "a")}, "run_dir: stands more than once: a"),
        ({"run_dir": ()}, "run_dir: must not be empty"),
        ({"run_dir": ""}, "run_dir: must not be empty"),
        ({"tta_axes": (0, 3), "tta": "mirror"}, r"tta_axes: must be some of 0, 1 and 2, or auto, got \[0, 3\]"),
        ({"tta_axes": (), "tta": "mirror"}, "tta_axes: must be some of"),
        ({"tta_axes": (0,)}, "tta_axes: goes with tta mirror"),
        ({"uncertainty": "variance"}, "uncertainty: variance is over several runs, and run_dir names one"),
    ],
)
def test_what_cannot_be_asked_of_runs_is_refused_with_the_option_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PredictConfig(**{**PATHS, **options})


def test_a_variance_may_be_asked_of_several_runs() -> None:
    assert PredictConfig(**{**PATHS, "run_dir": ("a", "b")}, uncertainty="variance").run_dirs == ("a", "b")
    assert PredictConfig(**PATHS).run_dirs == ("run",)


def test_a_share_is_read_as_number_and_count() -> None:
    assert PredictConfig(**PATHS).share is None
    assert PredictConfig(**PATHS, shard="3/16").share == (3, 16)


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "3/", "/4", "a/b", "-1/2", "1/2/3"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="shard: must be as in 3/16, counted from 1"):
        PredictConfig(**PATHS, shard=text)
