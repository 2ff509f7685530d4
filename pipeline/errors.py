"""Errors that a user can act on, and the exit code each one ends a command with.

0 done; 1 a defect of ours; 2 input or options are wrong; 3 some cases failed, the rest is done;
75 stopped on request and resumable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

# Of what another library says: some put a page into a line.
LONGEST_REASON = 500
# Of many names in a message.
MOST_NAMED = 10


class VoxfitError(Exception):
    """One short message: what is wrong, where (file, case, key), and what to do.

    Args:
        what: The problem, as a sentence without a full stop.
        where: File, case or key that it was found in.
        fix: What the user can do about it.

    Attributes:
        is_said_elsewhere: Another of the processes that train together says it.
    """

    exit_code = 2
    is_said_elsewhere = False

    def __init__(self, what: str, *, where: str | Path = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, str(where), fix
        place = f"{self.where}: " if self.where else ""
        # Below a list, a line of its own.
        remedy = ("\n" if "\n" in what else ". ") + self.fix if self.fix else ""
        super().__init__(f"{place}{what}{remedy}")


class InputError(VoxfitError):
    """A file, folder, option or plan that the user gave cannot be used."""


class CasesFailedError(VoxfitError):
    """Some cases failed and were left out; everything else is done.

    Args:
        failures: Reason by case id.
        done: What was finished without them.
        things: What the failures are of, where that is no cases.
        result: What the command returns when no case fails.
    """

    exit_code = 3

    def __init__(
        self, failures: Mapping[str, str], *, done: str, things: str = "case(s)", result: object = None
    ) -> None:
        self.failures, self.result = dict(failures), result
        lines = "".join(f"\n  {case_id}: {reason}" for case_id, reason in self.failures.items())
        super().__init__(f"{done} without {len(self.failures)} {things}:{lines}")


class StoppedError(VoxfitError):
    """Stopped on request; the same command continues the work.

    Args:
        what, fix: As for any error.
        signal: Number of the signal that asked for it; 0 for none.
    """

    exit_code = 75

    def __init__(self, what: str, *, fix: str = "", signal: int = 0) -> None:
        super().__init__(what, fix=fix)
        self.signal = signal


class TrainingDivergedError(VoxfitError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its type where it says nothing."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    return line if isinstance(error, VoxfitError) else line[:LONGEST_REASON]


def in_words(error: BaseException) -> str:
    """What an error says in its first line, as a reason within a message; behind its type unless it is one of ours."""
    if isinstance(error, VoxfitError):
        return first_line(error)
    name = "memory ran out" if isinstance(error, MemoryError) else type(error).__name__
    return f"{name}: {first_line(error)}" if str(error).strip() else name


def name_some(names: Sequence[str]) -> str:
    """The first few names and how many more there are, for messages."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
