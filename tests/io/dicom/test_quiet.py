"""Silence of libraries while DICOM is read, also where several threads read at once."""

from __future__ import annotations

import logging
import threading
import warnings

from pydicom import config

from pipeline.io.dicom.quiet import quiet_dicom


def state() -> tuple[int, list[object], int]:
    return logging.getLogger("pydicom").level, list(warnings.filters), config.settings.reading_validation_mode


def test_blocks_of_several_threads_that_overlap_are_silent_to_the_last_and_leave_nothing_behind() -> None:
    before, entered, leave = state(), threading.Event(), threading.Event()
    seen: list[int] = []

    def second() -> None:
        with quiet_dicom():
            entered.set()
            leave.wait(10)
            seen.append(logging.getLogger("pydicom").level)

    thread = threading.Thread(target=second)
    with quiet_dicom():
        thread.start()
        assert entered.wait(10)
    # The first block has ended and the second has not.
    assert logging.getLogger("pydicom").level > logging.CRITICAL
    leave.set()
    thread.join()
    assert seen == [logging.CRITICAL + 1]
    assert state() == before


def test_blocks_within_each_other_end_with_the_outer_one() -> None:
    before = state()
    with quiet_dicom():
        with quiet_dicom():
            pass
        assert logging.getLogger("highdicom").level > logging.CRITICAL
    assert state() == before
