"""Spans of time as people and SLURM write them."""

from __future__ import annotations

import re

from pipeline.errors import InputError

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_WITH_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
# SLURM: minutes, minutes:seconds, hours:minutes:seconds; after days- it is hours, hours:minutes, hours:minutes:seconds.
_OF_SLURM = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def parse_duration(text: str) -> int:
    """Seconds of `90m`, `11h30m`, `2d`, or of a time as SLURM writes it: `690` (minutes), `11:30:00`, `2-03:00:00`.

    Raises:
        InputError: The text is neither, or no time at all.
    """
    text = text.strip().lower()
    seconds = 0
    if text and (found := _WITH_UNITS.fullmatch(text)):
        seconds = sum(int(number or 0) * unit for number, unit in zip(found.groups(), UNITS.values(), strict=True))
    elif found := _OF_SLURM.fullmatch(text):
        seconds = _seconds_of_slurm(*found.groups())
    if seconds <= 0:
        raise InputError(f'"{text}" is no span of time', fix="Write it as 90m, 11h30m, 2d or, like SLURM, 2-03:00:00")
    return seconds


def _seconds_of_slurm(days: str | None, *numbers: str | None) -> int:
    first, second, third = (int(number or 0) for number in numbers)
    if days is not None:
        return int(days) * 86400 + first * 3600 + second * 60 + third
    if numbers[2] is None:
        return first * 60 + second
    return first * 3600 + second * 60 + third


def format_duration(seconds: float) -> str:
    """The two largest units: `2d3h`, `11h30m`, `6m12s`, `4s`."""
    left, parts = max(0, round(seconds)), []
    for name, unit in UNITS.items():
        count, left = divmod(left, unit)
        parts.append(f"{count}{name}" if count else "")
    first = next((index for index, part in enumerate(parts) if part), len(parts) - 1)
    return "".join(parts[first : first + 2]) or "0s"


def time_problems(max_time: str) -> list[str]:
    """A problem where the option is no span of time."""
    try:
        if max_time:
            parse_duration(max_time)
    except InputError as error:
        return [f"max_time: {error}"]
    return []


def epoch_problems(max_epochs: int | str, max_time: str) -> list[str]:
    """A problem where the number of epochs has nothing to follow from."""
    return ["max_epochs: auto needs a max_time"] if max_epochs == "auto" and not max_time else []
