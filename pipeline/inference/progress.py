"""How far a prediction of many cases is and when it will be done: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from pipeline.durations import format_duration
from pipeline.log import PLAIN_SECONDS_BETWEEN_LINES, get_logger

SHORTEST_ESTIMATE_SECONDS = 2.0


class PredictionProgress:
    """Counts windows and cases, from any thread.

    Args:
        num_cases: Cases to segment.
    """

    def __init__(self, num_cases: int) -> None:
        self._num_cases = num_cases
        self._expected: dict[int, int] = {}
        self._windows: dict[int, int] = {}
        self._finished: set[int] = set()
        self._lock = threading.Lock()
        self._started = self._last_line = monotonic()
        self._bar: Any = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show a bar while the block runs, where there is a terminal."""
        if not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (BarColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            bar.add_task("predict", total=1.0)
            self._bar = bar
            yield

    def expect(self, number: int, windows: int) -> None:
        """A case begins, or begins anew, and takes so many windows."""
        with self._lock:
            self._expected[number], self._windows[number] = max(1, windows), 0

    def add(self, number: int, windows: int) -> None:
        """So many windows more of a case are computed."""
        with self._lock:
            self._windows[number] = self._windows.get(number, 0) + windows
            self._say()

    def finish(self, number: int) -> None:
        """A case is done, or failed."""
        with self._lock:
            self._finished.add(number)
            self._say(is_last=len(self._finished) == self._num_cases)

    def describe(self) -> str:
        """Such as `case 3 of 12, 41 % of its windows, about 12m left`."""
        if len(self._finished) == self._num_cases:
            return f"{self._num_cases} case(s) in {format_duration(monotonic() - self._started)}"
        begun = sorted(set(self._expected) - self._finished)
        text = f"case {min(self._num_cases, len(self._finished) + 1)} of {self._num_cases}"
        if begun:
            text += f", {self._share(begun[0]):.0%} of its windows".replace("%", " %")
        left = self._seconds_left()
        return text if left is None else f"{text}, about {format_duration(left)} left"

    def _share(self, number: int) -> float:
        return min(1.0, self._windows.get(number, 0) / self._expected[number])

    def _cases_done(self) -> float:
        """In cases, those of which windows are computed counted by their windows; the others stand for one each."""
        begun = set(self._expected) - self._finished
        return len(self._finished) + sum(map(self._share, begun))

    def _seconds_left(self) -> float | None:
        """By windows: cases that have not begun are taken to have as many as those that have, on average."""
        seconds, done = monotonic() - self._started, sum(self._windows.values())
        if seconds < SHORTEST_ESTIMATE_SECONDS or not done:
            return None
        known = sum(self._expected.values())
        unknown = self._num_cases - len(set(self._expected) | self._finished)
        left = known - done + unknown * known / len(self._expected)
        return max(0.0, left * seconds / done)

    def _say(self, *, is_last: bool = False) -> None:
        if self._bar is not None:
            share = self._cases_done() / self._num_cases
            self._bar.update(self._bar.task_ids[0], completed=share, description=self.describe())
        elif is_last or monotonic() - self._last_line > PLAIN_SECONDS_BETWEEN_LINES:
            self._last_line = monotonic()
            get_logger("predict").info("predict: %s", self.describe())
