"""What a computation knows of what goes on beside it in other threads: how much memory is its own, and who watches.

It belongs to the thread, so that nothing between a case and its windows has to hand it on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


def _ignore(count: int) -> None:
    """Nobody watches."""


@dataclass
class CaseNotes:
    """What a computation finds out beside its result.

    Attributes:
        windows: That the volume has, for all networks; those that two blocks need count twice.
        skipped: Those of them that hold nothing but air.
        compared, disagreeing: Voxels, see `SeamCounts`.
    """

    windows: int = 0
    skipped: int = 0
    compared: int = 0
    disagreeing: int = 0


@dataclass(frozen=True)
class CaseContext:
    """Of the case that a thread computes.

    Attributes:
        granted_bytes: What it may hold beside network, image and result; None where it is alone and takes what the
            bound leaves.
        expect: Called with the number of windows once it is known, and again when a volume is begun anew.
        on_windows: Called with the number of windows that were just computed; it may raise to end the computation.
        notes: Filled while it is computed, anew when it is begun anew.
    """

    granted_bytes: int | None = None
    expect: Callable[[int], None] = _ignore
    on_windows: Callable[[int], None] = _ignore
    notes: CaseNotes = field(default_factory=CaseNotes)

    def begin(self, windows: int) -> None:
        """A computation of so many windows begins."""
        self.expect(windows)
        self.notes.windows = windows
        self.notes.skipped = self.notes.compared = self.notes.disagreeing = 0

    def note_seams(self, compared: int, disagreeing: int) -> None:
        """So many voxels more were compared."""
        self.notes.compared += compared
        self.notes.disagreeing += disagreeing


_current: ContextVar[CaseContext] = ContextVar("case_context", default=CaseContext())  # noqa: B039


def current_case() -> CaseContext:
    """That of the case which this thread computes."""
    return _current.get()


@contextmanager
def case_context(context: CaseContext) -> Iterator[None]:
    """Compute a case while the block runs."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
