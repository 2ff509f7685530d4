"""Whose turn it is among cases side by side: order, one ahead and one behind, lanes, memory, and the end of all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import sleep

import pytest

from pipeline.inference.case_room import CaseStopped, Room

SHORT = 0.05


class Cases:
    """Cases in threads that take the stages they are told to, so that tests say what happens when."""

    def __init__(self, room: Room) -> None:
        self.room, self.pool = room, ThreadPoolExecutor(8)
        self.leave = [threading.Event() for _ in range(8)]

    def start(self, number: int) -> None:
        entered = threading.Event()

        def live() -> None:
            with self.room.case(number):
                entered.set()
                self.leave[number].wait(20)

        self.pool.submit(live)
        assert entered.wait(20)

    def enter(self, number: int, stage: str, *, holds: int = 0, needs: float = 0, lanes: int = 1) -> Future[bool]:
        return self.pool.submit(self.room.enter, number, stage, holds=holds, needs=needs, lanes=lanes)


def close(cases: Cases) -> None:
    cases.room.stop()
    for event in cases.leave:
        event.set()
    cases.pool.shutdown(wait=True)


@pytest.fixture
def make_cases() -> Callable[..., Cases]:
    def make(*, num_lanes: int = 1, most_bytes: int = 100) -> Cases:
        cases = Cases(Room(num_lanes=num_lanes, most_bytes=most_bytes, held_bytes=lambda: 10))
        for number in range(4):
            cases.start(number)
        return cases

    return make


def has_to_wait(future: Future[bool]) -> bool:
    sleep(SHORT)
    return not future.done()


@pytest.mark.parametrize("stage", ["read", "write"])
def test_one_case_reads_and_one_writes_beside_one_that_computes(make_cases: Callable[..., Cases], stage: str) -> None:
    cases = make_cases()
    try:
        assert cases.enter(0, "compute").result(20)
        assert cases.enter(1, stage).result(20)
        second = cases.enter(2, stage)
        assert has_to_wait(second)
        cases.leave[1].set()
        assert second.result(20)
    finally:
        close(cases)


def test_cases_of_one_window_share_the_lanes_and_one_of_many_has_them_alone(make_cases: Callable[..., Cases]) -> None:
    cases = make_cases(num_lanes=2)
    try:
        assert cases.enter(0, "compute", lanes=1).result(20)
        assert cases.enter(1, "compute", lanes=1).result(20)
        large = cases.enter(2, "compute", lanes=60)
        assert has_to_wait(large)
        cases.leave[0].set()
        assert has_to_wait(large)
        cases.leave[1].set()
        assert large.result(20)
    finally:
        close(cases)


def test_the_lowest_number_comes_first_whoever_asked_first(make_cases: Callable[..., Cases]) -> None:
    cases = make_cases()
    try:
        assert cases.enter(0, "compute").result(20)
        third = cases.enter(3, "compute")
        assert has_to_wait(third)
        first = cases.enter(1, "compute")
        assert has_to_wait(first)
        cases.leave[0].set()
        assert first.result(20)
        assert has_to_wait(third)
    finally:
        close(cases)


def test_what_does_not_fit_beside_others_waits_until_it_is_alone(make_cases: Callable[..., Cases]) -> None:
    # 100 in all, 10 of them for the process itself.
    cases = make_cases(most_bytes=100)
    try:
        assert cases.enter(0, "compute", needs=50).result(20)
        assert cases.enter(1, "read", needs=40).result(20)
        too_large = cases.enter(2, "write", needs=1)
        assert has_to_wait(too_large)
        cases.leave[0].set()
        assert too_large.result(20)
    finally:
        close(cases)


def test_what_fits_nowhere_is_alone_and_is_told_so(make_cases: Callable[..., Cases]) -> None:
    cases = make_cases(most_bytes=100)
    try:
        assert cases.enter(0, "read", needs=5).result(20) is True
        huge = cases.enter(0, "compute", holds=5, needs=500)
        assert huge.result(20) is False
        # As long as it runs nothing else may, not even what needs nothing.
        other = cases.enter(1, "read", needs=0)
        assert has_to_wait(other)
        assert cases.enter(0, "write", needs=5).result(20) is True
        assert other.result(20)
    finally:
        close(cases)


def test_what_a_waiting_case_holds_counts(make_cases: Callable[..., Cases]) -> None:
    cases = make_cases(most_bytes=100)
    try:
        assert cases.enter(0, "compute", needs=30).result(20)
        waiting = cases.enter(2, "compute", holds=50, needs=60)
        assert has_to_wait(waiting)
        too_much = cases.enter(1, "read", needs=20)
        assert has_to_wait(too_much)
        cases.leave[0].set()
        assert too_much.result(20)
    finally:
        close(cases)


def test_a_stop_ends_those_who_wait_and_those_who_look(make_cases: Callable[..., Cases]) -> None:
    cases = make_cases()
    try:
        assert cases.enter(0, "compute").result(20)
        waiting = cases.enter(1, "compute")
        assert has_to_wait(waiting)
        cases.room.check()
        cases.room.stop()
        with pytest.raises(CaseStopped):
            waiting.result(20)
        with pytest.raises(CaseStopped):
            cases.room.check()
    finally:
        close(cases)


def test_a_stop_ends_one_who_reads_in_the_middle_and_lets_one_who_writes_finish() -> None:
    room = Room(num_lanes=1, most_bytes=100, held_bytes=lambda: 0)
    ended: dict[str, str] = {}
    both = threading.Barrier(3, timeout=20)

    def live(number: int, stage: str) -> None:
        try:
            with room.case(number):
                room.enter(number, stage, holds=0, needs=0)
                both.wait()
                for _ in range(20 if stage == "write" else 2000):
                    sleep(0.005)
            ended[stage] = "finished"
        except CaseStopped:
            ended[stage] = "stopped"

    with ThreadPoolExecutor(2) as pool:
        pool.submit(live, 0, "write")
        pool.submit(live, 1, "read")
        both.wait()
        room.stop()
    assert ended == {"write": "finished", "read": "stopped"}
