"""Memory that was freed, handed back to the system: glibc keeps it, in pieces between what is still used."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    """The function `malloc_trim` of glibc; None on systems with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def hand_back_freed() -> None:
    """Let the system have all whole pages that nothing lies in; does nothing where the C library is not glibc.

    Its `malloc_trim(3)` does so in the middle of the heap as well. What needs that memory next takes it anew, so this
    is for the end of a piece of work and not for its inner loops.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
