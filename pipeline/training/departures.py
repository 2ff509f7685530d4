"""Why one of several processes that train together cannot go on, and what that means for the others."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.errors import StoppedError, VoxfitError, first_line, in_words
from pipeline.run_record import Counts, Phase

GOES_ON = "The same command goes on"


@dataclass(frozen=True, kw_only=True)
class Departure:
    """Why a rank cannot go on.

    Attributes:
        kind: A request to stop, memory that ran out, or any other error.
        message: In one line.
        rank: Whose.
        host: Where it runs.
        exit_code: What the error ends a command with.
        signal: Number of the signal that asked to stop; 0 for none.
        where, counts, memory: Of an out-of-memory: what was being done, the last finished step, how much there was.
    """

    kind: Literal["stop", "memory", "error"]
    message: str
    rank: int = 0
    host: str = ""
    exit_code: int = 1
    signal: int = 0
    where: Phase = "start"
    counts: Counts = field(default_factory=Counts)
    memory: str = ""


def verdict(departures: Sequence[Departure]) -> Departure:
    """What counts for all: an error before a stop before memory, which the next start would run out of again.

    Of several stops one by a signal, after which a scheduler is asked to start the job again.
    """
    kinds = ("error", "stop", "memory")
    return min(departures, key=lambda each: (kinds.index(each.kind), not each.signal, each.rank))


class PeersLeftError(BaseException):
    """Other ranks left. No Exception, so that nothing on the way takes it for a failure of its own.

    Args:
        departures: Of all that left.
    """

    def __init__(self, departures: Sequence[Departure]) -> None:
        super().__init__("; ".join(f"rank {each.rank}: {each.message}" for each in departures))
        self.departures = tuple(departures)


class RankFailedError(VoxfitError):
    """A training ends because one of its other processes failed.

    Args:
        departure: That of the failed one.
    """

    def __init__(self, departure: Departure) -> None:
        super().__init__(f"rank {departure.rank} on {departure.host} failed: {departure.message}")
        self.exit_code = departure.exit_code


class RankLostError(VoxfitError):
    """The connection to another process of a training broke."""

    exit_code = 1


def departure_of(error: BaseException) -> Departure:
    """An error, unless it is an out-of-memory, as others are to learn of it."""
    text = first_line(error)
    if isinstance(error, StoppedError):
        return Departure(kind="stop", message=error.what, exit_code=error.exit_code, signal=error.signal)
    if isinstance(error, KeyboardInterrupt):
        # Outside of the training itself signals are raised where they come.
        number = getattr(error, "number", signal.SIGINT)
        what = f"stopped on request ({signal.Signals(number).name})"
        return Departure(kind="stop", message=what, exit_code=StoppedError.exit_code, signal=number)
    if isinstance(error, VoxfitError):
        return Departure(kind="error", message=text, exit_code=error.exit_code)
    return Departure(kind="error", message=in_words(error))


def own_or_theirs(error: BaseException, cause: Departure) -> BaseException:
    """What ends this rank: its own error, or one that tells of the others'."""
    if isinstance(error, StoppedError) and cause.kind == "stop":
        error.signal = error.signal or cause.signal
    if not isinstance(error, PeersLeftError):
        return error
    if cause.kind == "stop":
        return StoppedError(cause.message, fix=GOES_ON, signal=cause.signal)
    return RankFailedError(cause)
