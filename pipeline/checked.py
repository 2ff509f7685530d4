"""What all option groups share: checks whose findings are reported in one error."""

from __future__ import annotations

from pipeline.durations import parse_duration
from pipeline.errors import InputError


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


def fold_problems(fold: int | str, num_folds: int) -> list[str]:
    """A problem where the split has no such fold."""
    if isinstance(fold, str) or 0 <= fold < num_folds:
        return []
    return [f"fold: must be 0 to {num_folds - 1} with num_folds {num_folds}, got {fold}"]
