"""What the options of every command are checked with."""

from __future__ import annotations

import re
from typing import Literal

from pipeline.errors import InputError
from pipeline.sizes import parse_bytes

Auto = Literal["auto"]


class Checked:
    """A config whose cross-field problems are all reported in one error."""

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise InputError("; ".join(problems))

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `dotted.key: problem`."""
        return []


def at_least(config: object, minimum: float, *names: str, prefix: str = "") -> list[str]:
    """A problem for each of the named values that is a number below `minimum`."""
    values = {name: getattr(config, name) for name in names}
    return [
        f"{prefix}{name}: must be at least {minimum:g}, got {value}"
        for name, value in values.items()
        if not isinstance(value, str) and value < minimum
    ]


def within_unit(config: object, *names: str, prefix: str = "") -> list[str]:
    """A problem for each of the named values outside 0 to 1."""
    values = {name: getattr(config, name) for name in names}
    return [f"{prefix}{name}: must be 0 to 1, got {value}" for name, value in values.items() if not 0 <= value <= 1]


def as_words(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """One or several words as several."""
    return (value,) if isinstance(value, str) else tuple(value)


def repeated(config: object, name: str) -> list[str]:
    """A problem where an option of one or several words has none, an empty one, or one twice."""
    words = as_words(getattr(config, name))
    if not words or not all(words):
        return [f"{name}: must not be empty"]
    twice = sorted({word for word in words if words.count(word) > 1})
    return [f"{name}: stands more than once: {', '.join(twice)}"] if twice else []


def vram_problems(vram: str) -> list[str]:
    """A problem where the option is neither "auto" nor an amount of memory."""
    return [] if vram == "auto" or parse_bytes(vram) else [f'vram: "{vram}" is no amount of memory such as 24GiB']


def parse_share(shard: str) -> tuple[int, int] | None:
    """Number and count of the shares in a text such as 3/16, counted from 1; None where there is none."""
    number, _, count = shard.partition("/")
    return (int(number), int(count)) if shard else None


def share_problems(shard: str) -> list[str]:
    """A problem where the option is no share."""
    share = parse_share(shard) if re.fullmatch(r"\d+/\d+|", shard) else (0, 0)
    if share is None or 1 <= share[0] <= share[1]:
        return []
    return [f"shard: must be as in 3/16, counted from 1, got {shard}"]
