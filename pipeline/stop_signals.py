"""Signals that ask to stop: what is in the middle of a step notes them, everything else ends at once.

SLURM sends TERM, or what `--signal` names, before it kills; a person presses Ctrl-C.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from types import FrameType
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# The last resort of a person who does not want to wait for the save.
INTERRUPTS_THAT_KILL = 3
# A step that takes longer than this is not waited for: schedulers kill half a minute after they asked.
PATIENCE_SECONDS = 12.0
# Linux's prctl: a signal for the process whose parent ends.
PR_SET_PDEATHSIG = 1
STOPPED_LINE = "stopped; the same command continues the work"
# Modules of Python that run while it imports.
IMPORT_MACHINERY = "<frozen importlib"
# A module in C that is being imported is given so long to end before it is left all the same.
IMPORT_PATIENCE_SECONDS = 10.0
SECONDS_BETWEEN_LOOKS = 0.02


class StopSignal(KeyboardInterrupt):
    """What a signal raises outside of a training; everything on the way takes it for Ctrl-C.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopNow(BaseException):
    """Leaves a training where it may be left; no Exception, so that nothing on the way takes it for a failure."""


class StopRequest:
    """Whether a training was asked to stop, by a signal or because its time is up.

    Attributes:
        signal: The first signal that came, or 0.
        reason: Why it is to stop where no signal came.
        deadline: When to stop in any case, by the monotonic clock.
        made_at: When the work began, by the monotonic clock.
        got_on: Whether something was finished that a later start need not do again.
        in_step: Whether passes of an unfinished optimiser step were made, which would be lost.
        while_checking: Called whenever the work looks here, such as between the windows of a validation.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.reason = ""
        self.deadline = math.inf
        self.made_at = monotonic()
        self.got_on = False
        self.in_step = False
        self.while_checking: Callable[[], None] | None = None
        self._since = math.inf
        self._interrupts = 0
        self._may_raise = False
        self._process = os.getpid()

    @property
    def came(self) -> bool:
        """Whether to stop as soon as that loses nothing."""
        return self.seconds_ago >= 0

    @property
    def seconds_ago(self) -> float:
        """How long ago the request came; below zero where none did."""
        return monotonic() - min(self._since, self.deadline)

    def check(self) -> None:
        """Leave, where it was asked for; from within a step only once it was waited for long enough."""
        if self.while_checking is not None:
            self.while_checking()
        if self.seconds_ago >= (PATIENCE_SECONDS if self.in_step else 0):
            raise StopNow

    @contextmanager
    def at_any_line(self) -> Iterator[None]:
        """Let a signal leave the block at once: for work that can be done again and changes nothing."""
        # In this order: a signal that comes in between is seen by the check.
        self._may_raise = True
        try:
            self.check()
            yield
        finally:
            self._may_raise = False

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """The handler of the signals."""
        if os.getpid() != self._process:
            # A child that was just forked and has not set its own handlers yet.
            return
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts >= INTERRUPTS_THAT_KILL:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
        if not self.signal:
            self.signal, self._since = number, monotonic()
            hint = "; Ctrl-C twice more ends without saving" if number == signal.SIGINT else ""
            _say(f"{signal.Signals(number).name}: stopping at the next optimiser step{hint}")
        if self._may_raise:
            self._may_raise = False
            raise StopNow


def _say(text: str) -> None:
    """Write a line past Python's streams, which cannot be entered twice."""
    try:
        os.write(2, f"{text}\n".encode())
    except OSError:
        return


@contextmanager
def stop_signals_noted() -> Iterator[StopRequest]:
    """Note signals while the block runs instead of ending; one that did not end the block goes to who listened before.

    Only the main thread can listen: in others the request stays empty. A signal that is ignored stays so.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    with handled(request.note, STOP_SIGNALS):
        if _Raised.listening and _Raised.number:
            let_imports()
            request.note(_Raised.number)
        yield request
    if request.signal:
        signal.raise_signal(request.signal)


@contextmanager
def stop_signals_raised() -> Iterator[None]:
    """Let TERM and USR1 end the block like Ctrl-C; once one of them came they are ignored until the process ends.

    Inside such a block another one does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not _Raised.listening:
        _Raised.number = 0
    outer, _Raised.listening = _Raised.listening, True
    try:
        if outer:
            yield
            return
        with handled(_end, (signal.SIGTERM, signal.SIGUSR1)):
            yield
    finally:
        _Raised.listening = outer
        let_imports()


def raised_signal() -> int:
    """The signal that was raised in the newest `stop_signals_raised`, which may have been lost on the way; 0 for none.

    What an exception is raised in may drop it or make another one of it: callbacks of the garbage collector, modules
    in C, `except` without a name.
    """
    return _Raised.number


class _Raised:
    """Which signal was raised, and whether signals are."""

    number = 0
    since = 0.0
    listening = False


class _NoImports:
    """Lets every import end: what was raised in the middle of one is often dropped there, and hundreds may follow."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> NoReturn:
        """As of any finder of modules."""
        raise StopSignal(_Raised.number)


def _end(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
    _Raised.number, _Raised.since = number, monotonic()
    if not _is_importing(frame):
        raise StopSignal(number)
    # Not here: modules in C that run Python while they begin end the whole process for an exception.
    sys.meta_path.insert(0, _NoImports)
    signal.signal(signal.SIGALRM, _end_once_imported)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_LOOKS)


def _end_once_imported(_: int, frame: FrameType | None) -> None:
    """Where no further import raises the signal."""
    if not _is_importing(frame) or monotonic() > _Raised.since + IMPORT_PATIENCE_SECONDS:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise StopSignal(_Raised.number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(IMPORT_MACHINERY):
            return True
        frame = frame.f_back
    return False


def let_imports() -> None:
    """Once the stop has got through, whoever says so may import again."""
    if _NoImports in sys.meta_path:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.meta_path.remove(_NoImports)


def end_with(parent: int) -> None:
    """Let the system kill this process as soon as the one that started it is gone, where it can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have gone before that.
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def handled(handler: Any, numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Let a handler take signals while the block runs; one that is ignored stays so.

    Only the main thread can listen: in others nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    taken = [number for number in numbers if before[number] is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in taken:
            # What was set to be ignored meanwhile stays so, unless this block itself did it.
            if handler is signal.SIG_IGN or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, before[number] or signal.SIG_DFL)
