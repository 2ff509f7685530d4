"""What the options of every command are checked with."""

from __future__ import annotations

from typing import Literal

from pipeline.errors import InputError

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
