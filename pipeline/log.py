"""Log lines for a person at a terminal and for a file, and progress bars that vanish in batch jobs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TypeVar

T = TypeVar("T")
LOGGER_NAME = "voxfit"
PLAIN_SECONDS_BETWEEN_LINES = 10.0


def get_logger(name: str = "") -> logging.Logger:
    """The project's logger, or its child `name`."""
    return logging.getLogger(f"{LOGGER_NAME}.{name}" if name else LOGGER_NAME)


def configure_logging(*, verbose: bool = False) -> None:
    """Send the project's log to standard error: styled on a terminal, plain lines otherwise."""
    logger = get_logger()
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
    for handler in [h for h in logger.handlers if not isinstance(h, logging.FileHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(_console_handler())


def _console_handler() -> logging.Handler:
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        return RichHandler(console=Console(stderr=True), show_path=False, show_level=False)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    return handler


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append the project's log to `path` as plain lines while the context is open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    get_logger().addHandler(handler)
    try:
        yield
    finally:
        get_logger().removeHandler(handler)
        handler.close()


def track(items: Iterable[T], *, description: str, total: int) -> Iterator[T]:
    """Yield `items` with a progress bar on a terminal, or a plain line every ten seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as rich_track

        yield from rich_track(items, description, total=total, console=Console(stderr=True), transient=True)
        return
    yield from _track_with_lines(items, description, total)


def _track_with_lines(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    logger, last = get_logger(), monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if done == total or monotonic() - last > PLAIN_SECONDS_BETWEEN_LINES:
            logger.info("%s: %d of %d", description, done, total)
            last = monotonic()
