"""Imports of large libraries, without looking for garbage that they do not make."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Let the garbage collector rest while the block imports.

    PyTorch and Lightning make some hundred thousand objects that stay, and looking through all of them again and again
    took 13 to 14 % of the CPU time of their imports (medians of five on CPython 3.11).
    """
    rests = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if rests:
            gc.enable()
