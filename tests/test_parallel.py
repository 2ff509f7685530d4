"""One function over many cases: bad cases come back as outcomes, defects and lost workers as errors."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path

import pytest

from pipeline import parallel
from pipeline.errors import InputError
from pipeline.parallel import map_unordered

BAD = {3: InputError("is bad", where="case_3", fix="Repair it"), 5: OSError(5, "Input/output error"), 6: MemoryError()}


def square(item: int) -> int:
    if item in BAD:
        raise BAD[item]
    return item * item


def divide(item: int) -> float:
    return 1 / item


def kill_at_three(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def wait_a_little(item: int) -> int:
    time.sleep(0.05)
    return item


def threads(_: int) -> tuple[int, str]:
    return os.getpid(), os.environ.get("OMP_NUM_THREADS", "")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_item_has_one_outcome_and_bad_ones_end_no_others(num_workers: int):
    outcomes = {outcome.item: outcome for outcome in map_unordered(square, range(9), num_workers=num_workers)}
    assert sorted(outcomes) == list(range(9))
    for item, outcome in outcomes.items():
        if item in BAD:
            assert outcome.result is None
            assert type(outcome.error) is type(BAD[item])
        else:
            assert outcome.result == item * item
            assert outcome.error is None


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_for_users_keeps_what_where_and_fix(num_workers: int):
    error = next(o.error for o in map_unordered(square, [1, 3], num_workers=num_workers) if o.error)
    assert isinstance(error, InputError)
    assert (error.what, error.where, error.fix) == ("is bad", "case_3", "Repair it")
    assert str(error) == "case_3: is bad. Repair it"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_defect_of_ours_is_raised(num_workers: int):
    with pytest.raises(ZeroDivisionError):
        list(map_unordered(divide, [2, 1, 0], num_workers=num_workers))


def test_a_killed_worker_is_one_clear_line_and_the_next_call_works():
    with pytest.raises(InputError, match=r"num_workers: a worker process was killed.*fewer workers than 2"):
        list(map_unordered(kill_at_three, range(6), num_workers=2))
    assert {o.result for o in map_unordered(square, [1, 2], num_workers=2)} == {1, 4}


def test_workers_are_other_processes_with_one_thread_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    results = [outcome.result for outcome in map_unordered(threads, range(4), num_workers=2)]
    assert {threads for _, threads in results} == {"1"}
    assert os.getpid() not in {pid for pid, _ in results}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_run_that_is_left_early_says_nothing(num_workers: int):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcomes = map_unordered(wait_a_little, range(12), num_workers=num_workers)
        assert next(outcomes).error is None
        outcomes.close()
    assert not [str(warning.message) for warning in caught]
    assert {o.result for o in map_unordered(square, [1, 2], num_workers=num_workers)} == {1, 4}


def test_workers_end_when_there_is_nothing_more_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "IDLE_SECONDS", 0.2)
    workers = {outcome.result[0] for outcome in map_unordered(threads, range(6), num_workers=2)}
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(("items", "num_workers"), [([4], 8), ([4, 5, 6], 1)])
def test_one_item_or_one_worker_stays_in_this_process(items: list[int], num_workers: int):
    assert {o.result[0] for o in map_unordered(threads, items, num_workers=num_workers)} == {os.getpid()}


def test_no_items_give_no_outcomes():
    assert list(map_unordered(square, [], num_workers=4)) == []
