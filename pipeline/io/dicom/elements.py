"""Typed access to DICOM elements: a missing or unusable one becomes a line that names it, never its value."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.errors import InputError


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Keep pydicom from writing values of elements to the terminal.

    Its warnings quote what they find fault with, which may be a birth date. What matters here is checked here. The
    filter is the process's own and not a thread's, so that threads decode inside of one such block.
    """
    from pydicom import config

    before = config.settings.reading_validation_mode
    config.settings.reading_validation_mode = config.IGNORE
    level, config.logger.disabled = config.logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        config.settings.reading_validation_mode = before
        config.logger.disabled = level


def text(dataset: Any, keyword: str) -> str:
    """The value of an element as text; "" where it is missing, empty or cannot be read."""
    try:
        value = dataset.get(keyword)
        return "" if value is None else str(value).strip().strip("\0")
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
        return ""


def words(dataset: Any, keyword: str) -> tuple[str, ...]:
    """The values of an element with several, as text."""
    try:
        value = dataset.get(keyword)
        if value is None or value == "":
            return ()
        values = [value] if isinstance(value, str) or not hasattr(value, "__iter__") else list(value)
        return tuple(str(item).strip() for item in values)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
        return ()


def numbers(dataset: Any, keyword: str, count: int) -> tuple[float, ...]:
    """`count` finite numbers.

    Raises:
        InputError: The element is missing, holds another count, or something that is no number.
    """
    found = words(dataset, keyword)
    if not found:
        raise InputError(f"has no {keyword}")
    try:
        values = tuple(float(item) for item in found)
    except ValueError:
        raise InputError(f"holds a {keyword} that is no number") from None
    if len(values) != count or not all(math.isfinite(value) for value in values):
        raise InputError(f"has an unusable {keyword} ({count} finite number(s) are needed)")
    return values


def number(dataset: Any, keyword: str, default: float | None = None) -> float:
    """One finite number; `default` where the element is missing or empty.

    Raises:
        InputError: It is missing and there is no default, or it is no finite number.
    """
    if default is not None and not words(dataset, keyword):
        return float(default)
    return numbers(dataset, keyword, 1)[0]


def whole_number(dataset: Any, keyword: str, default: int | None = None) -> int:
    """One whole number; as `number` otherwise."""
    value = number(dataset, keyword, default)
    if not value.is_integer():
        raise InputError(f"has an unusable {keyword} (a whole number is needed)")
    return int(value)


def items(dataset: Any, keyword: str) -> tuple[Any, ...]:
    """The items of a sequence; none where it is missing or is no sequence."""
    try:
        value = dataset.get(keyword)
        return tuple(value) if value is not None and not isinstance(value, str | bytes) else ()
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
        return ()
