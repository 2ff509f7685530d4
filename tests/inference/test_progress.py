"""How far a prediction is, in words: cases, windows, time that is left."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.inference import progress
from pipeline.inference.progress import PredictionProgress

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "monotonic", made)
    return made


def test_a_line_says_case_windows_and_time_left(clock: Clock) -> None:
    shown = PredictionProgress(12)
    for number in range(2):
        shown.expect(number, 100)
        shown.add(number, 100)
        shown.finish(number)
    shown.expect(2, 100)
    clock.now += 241
    shown.add(2, 41)
    # A second for each window, 59 left of this case and 100 for each of nine others.
    assert shown.describe() == "case 3 of 12, 41 % of its windows, about 15m59s left"


def test_cases_that_have_not_begun_count_as_the_others_do_on_average(clock: Clock) -> None:
    shown = PredictionProgress(4)
    shown.expect(0, 10)
    shown.add(0, 10)
    shown.finish(0)
    shown.expect(1, 30)
    clock.now += 10
    # 10 windows in 10 s; 30 left of this one and 20 for each of two others.
    assert shown.describe() == "case 2 of 4, 0 % of its windows, about 1m10s left"


def test_a_volume_that_begins_anew_begins_at_zero(clock: Clock) -> None:
    shown = PredictionProgress(2)
    shown.expect(0, 10)
    shown.add(0, 9)
    shown.expect(0, 20)
    shown.add(0, 5)
    clock.now += 5
    assert shown.describe() == "case 1 of 2, 25 % of its windows, about 35s left"


def test_nothing_is_estimated_from_nothing(clock: Clock) -> None:
    shown = PredictionProgress(2)
    assert shown.describe() == "case 1 of 2"
    clock.now += 100
    assert shown.describe() == "case 1 of 2"


def test_cases_that_fail_before_they_begin_are_not_waited_for(clock: Clock) -> None:
    shown = PredictionProgress(3)
    shown.finish(0)
    shown.expect(1, 10)
    shown.add(1, 5)
    clock.now += 10
    assert shown.describe() == "case 2 of 3, 50 % of its windows, about 30s left"


def test_lines_come_seldom_and_at_the_end(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    shown = PredictionProgress(1)
    with caplog.at_level(logging.INFO):
        shown.expect(0, 100)
        for _ in range(100):
            clock.now += 0.5
            shown.add(0, 1)
        shown.finish(0)
    assert len(caplog.messages) == 5
    assert caplog.messages[0].startswith("predict: case 1 of 1, 21 % of its windows, about ")
    assert caplog.messages[-1] == "predict: 1 case(s) in 50s"


CODE = """
from pipeline.log import configure_logging
from pipeline.inference.progress import PredictionProgress
configure_logging()
shown = PredictionProgress(2)
with shown.shown():
    for number in range(2):
        shown.expect(number, 4)
        shown.add(number, 2)
        shown._bar and shown._bar.refresh()
        shown.finish(number)
"""


def test_a_terminal_has_a_bar() -> None:
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", CODE], env=environment, stderr=slave, check=True, timeout=60)
    os.close(slave)
    text = os.read(master, 100_000).decode()
    os.close(master)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "━" in plain
    assert "case 1 of 2, 50 % of its windows" in plain
