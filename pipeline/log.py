"""Log lines for a person at a terminal and for a file, and progress bars that vanish in batch jobs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import TypeVar

from pipeline.errors import InputError, VoxfitError

T = TypeVar("T")
LOGGER_NAME = "voxfit"
PLAIN_SECONDS_BETWEEN_LINES = 10.0


def get_logger(name: str = "") -> logging.Logger:
    """The project's logger, or its child `name`."""
    return logging.getLogger(f"{LOGGER_NAME}.{name}" if name else LOGGER_NAME)


def configure_logging(rank: int = 0) -> None:
    """Send the project's log to standard error: styled on a terminal, plain lines otherwise.

    Args:
        rank: Number of this process among those that train together; those after the first one only warn.
    """
    logger = get_logger()
    logger.setLevel(logging.WARNING if rank else logging.INFO)
    logger.propagate = False
    for handler in [h for h in logger.handlers if not isinstance(h, logging.FileHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(_console_handler())


def _console_handler() -> logging.Handler:
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        return RichHandler(console=Console(stderr=True), show_path=False, show_level=False)
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    return handler


class _StderrHandler(logging.Handler):
    """Writes to what standard error is now: notebooks and test runners replace and close it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except (OSError, ValueError):
            self.handleError(record)


class _QuietFileHandler(logging.FileHandler):
    """A full disk must not end a training, nor print a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop the line."""

    def close(self) -> None:
        """Close the file; what could not be written is dropped."""
        with suppress(OSError):
            super().close()


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append the project's log to `path` as plain lines while the context is open; a traceback as well if it ends so.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _QuietFileHandler(path, encoding="utf-8")
    except OSError as error:
        fix = "Check the folder and its permissions"
        raise InputError(f"cannot write ({error.strerror or error})", where=path, fix=fix) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = get_logger()
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    except VoxfitError as error:
        # Whoever called shows it; here it is for those who read the file later.
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, "", 0, "%s", (error,), None))
        raise
    except Exception:
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, "", 0, "a defect", (), sys.exc_info()))
        raise
    finally:
        logger.removeHandler(handler)
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
