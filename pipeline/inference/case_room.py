"""Who of several cases may read, compute or write now: an order, and a bound on the memory of all of them.

One case reads ahead and one writes behind those that compute. Cases of few windows compute side by side, as many as
fill the lanes; one of many windows has the lanes to itself. What does not fit beside the others waits until it is
alone, and has then what it would have had without others.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Stage = Literal["read", "compute", "write", "all"]


class CaseStopped(BaseException):
    """Ends a case in the middle; no Exception, so that nothing on the way takes it for a failure of the case."""


@dataclass
class _Place:
    """Of one case.

    Attributes:
        num_bytes: What it holds, or may come to hold in its stage.
        stage: None while it waits.
        lanes: That it computes in.
        thread: That it runs in.
    """

    num_bytes: float = 0
    stage: Stage | None = None
    lanes: int = 0
    thread: int = 0


class Room:
    """Lanes and memory of the process, shared by cases in threads of their own.

    Args:
        num_lanes: Windows that may be computed at once.
        most_bytes: What the process may hold.
        held_bytes: Says what it holds now.
    """

    def __init__(self, *, num_lanes: int, most_bytes: int, held_bytes: Callable[[], int]) -> None:
        self.num_lanes, self._most_bytes, self._held_bytes = num_lanes, most_bytes, held_bytes
        self._changed = threading.Condition()
        self._places: dict[int, _Place] = {}
        self._waiting: set[int] = set()
        self._is_stopped = False
        self._base_bytes = held_bytes()

    @contextmanager
    def case(self, number: int) -> Iterator[None]:
        """Hold a place for a case, which `enter` then leads from stage to stage."""
        with self._changed:
            if not self._places:
                self._base_bytes = self._held_bytes()
            self._places[number] = _Place(thread=threading.get_ident())
        try:
            yield
        finally:
            with self._changed:
                del self._places[number]
                self._changed.notify_all()

    def enter(self, number: int, stage: Stage, *, holds: int, needs: float, lanes: int = 0) -> bool:
        """Leave the stage that the case is in, and wait until it may enter another; the lowest number comes first.

        Args:
            number: Of the case.
            stage: "all" is everything at once, without anyone beside.
            holds: Bytes that it holds while it waits.
            needs: Bytes that it may come to hold in the stage.
            lanes: Windows that it could have computed at once.

        Returns:
            Whether it has its bytes beside others; otherwise it is alone, and may take all that is left.

        Raises:
            CaseStopped: The room was closed.
        """
        with self._changed:
            place = self._places[number]
            place.stage, place.num_bytes, place.lanes = None, holds, min(lanes, self.num_lanes)
            self._waiting.add(number)
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._is_stopped or self._may_enter(number, stage, needs))
            finally:
                self._waiting.discard(number)
                self._changed.notify_all()
            self.check()
            is_beside = stage != "all" and self._fits(number, needs)
            place.stage, place.num_bytes = stage, needs if is_beside else math.inf
            return is_beside

    def stop(self) -> None:
        """End all cases: those that wait or compute at once, those that read where Python lets them, writers finish."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
            for place in self._places.values():
                if place.stage == "read":
                    _raise_in(place.thread)

    def check(self) -> None:
        """Leave a computation after the room was closed.

        Raises:
            CaseStopped: It was.
        """
        if self._is_stopped:
            raise CaseStopped

    def _may_enter(self, number: int, stage: Stage, needs: float) -> bool:
        others = [place for other, place in self._places.items() if other != number and place.stage is not None]
        if number != min(self._waiting):
            return False
        if not others:
            return True
        if stage == "all" or not self._fits(number, needs):
            return False
        if stage == "compute":
            used = sum(place.lanes for place in others if place.stage == "compute")
            return used + self._places[number].lanes <= self.num_lanes
        return all(place.stage != stage for place in others)

    def _fits(self, number: int, needs: float) -> bool:
        others = sum(place.num_bytes for other, place in self._places.items() if other != number)
        return self._base_bytes + others + needs <= self._most_bytes


def _raise_in(thread: int) -> None:
    """Let a thread leave what it does at its next line of Python, as a signal lets the main thread."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(CaseStopped))
