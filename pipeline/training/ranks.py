"""Several processes that train one network: where they meet, and what becomes of all when one of them leaves.

All ranks hold the same weights, optimiser state and counts at all times; they differ in the patches and validation
cases that they take. They talk at a few agreed places only (`Ranks.meet`): before every optimiser step, after a
validation, around files that the first one writes. A rank that cannot go on, for whatever reason, goes straight to the
next meeting and says so there, and every other one learns it at that same meeting: so nobody waits for one who left.
A rank that was killed breaks the connection, which ends the others.
"""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from pipeline.errors import InputError, StoppedError, VoxfitError
from pipeline.log import get_logger
from pipeline.networks.out_of_memory import first_line
from pipeline.rank_place import RankPlace, find_place
from pipeline.training.run_folder import Counts, Phase

T = TypeVar("T")
GOES_ON = "The same command goes on"
# Nodes of a job may start minutes apart.
START_TIMEOUT = timedelta(minutes=10)
# One rank may still validate a large case, or write to a slow disk, where the others are done.
MEETING_TIMEOUT = timedelta(hours=3)


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
    """What counts for all: an error before a stop before memory, which the next start would run out of again."""
    return min(departures, key=lambda each: (("error", "stop", "memory").index(each.kind), each.rank))


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


class Ranks:
    """The processes of a training; on its own, one whose meetings are with itself.

    Args:
        place: Of this process.
        group: What meetings go through; None for a process on its own.
    """

    def __init__(self, place: RankPlace | None = None, group: Any = None) -> None:
        self.place = place if place is not None else RankPlace()
        self._group = group
        # Whether something else is under way in which no meeting could be held.
        self._is_busy = False

    @property
    def num(self) -> int:
        """How many there are."""
        return self.place.num_ranks

    @property
    def is_first(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.place.is_first

    def meet(self, value: T | None = None) -> list[T]:
        """Wait for all ranks; their values, by rank.

        Raises:
            PeersLeftError: Some rank left instead.
            RankLostError: A rank is gone.
        """
        entries = self._gather((None, value))
        departures = [departure for departure, _ in entries if departure is not None]
        if departures:
            raise PeersLeftError(departures)
        return [each for _, each in entries]

    def from_first(self, value: T | None = None) -> T:
        """The first rank's value, for which the others wait; raises as `meet` does."""
        return self.meet(value if self.is_first else None)[0]

    def leave(self, departure: Departure) -> list[Departure]:
        """Tell the others at the next meeting; everyone who left there, this rank among them."""
        departure = replace(departure, rank=self.place.rank, host=socket.gethostname())
        if self._group is None or self._is_busy:
            return [departure]
        try:
            return [each for each, _ in self._gather((departure, None)) if each is not None]
        except RankLostError as error:
            get_logger("train").debug("%s", error)
            return [departure]

    def _gather(self, entry: tuple[Departure | None, Any]) -> list[tuple[Departure | None, Any]]:
        if self._group is None:
            return [entry]
        entries: list[Any] = [None] * self.num
        with self.busy():
            dist.all_gather_object(entries, entry, group=self._group)
        return entries

    @contextmanager
    def busy(self) -> Iterator[None]:
        """For communication in the block; when it fails, no further one is tried.

        Raises:
            RankLostError: The connection broke.
        """
        self._is_busy = True
        try:
            yield
        except RuntimeError as error:
            # Torch has no error type of its own for gloo's broken connections.
            if self._group is None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise RankLostError(
                f"another process of this training is gone, or hangs ({first_line(error)})",
                fix="Its own message stands in its log; the same command goes on from the last checkpoint",
            ) from error
        self._is_busy = False


def departure_of(error: BaseException) -> Departure:
    """An error, unless it is an out-of-memory, as others are to learn of it."""
    text = first_line(error)
    if isinstance(error, StoppedError):
        return Departure(kind="stop", message=error.what, exit_code=error.exit_code, signal=error.signal)
    if isinstance(error, VoxfitError):
        return Departure(kind="error", message=text, exit_code=error.exit_code)
    return Departure(kind="error", message=f"{type(error).__name__}: {text}")


def own_or_theirs(error: BaseException, cause: Departure) -> BaseException:
    """What ends this rank: its own error, or one that tells of the others'."""
    if not isinstance(error, PeersLeftError):
        return error
    if cause.kind == "stop":
        return StoppedError(cause.message, fix=GOES_ON, signal=cause.signal)
    return RankFailedError(cause)


@contextmanager
def open_ranks() -> Iterator[Ranks]:
    """The ranks that this process is one of; an error that leaves the block on one of them ends the block on all.

    Raises:
        RankFailedError: Another rank failed.
        InputError: The others cannot be reached.
    """
    place = find_place()
    ranks = Ranks(place, _connect(place) if place.num_ranks > 1 else None)
    try:
        yield ranks
        ranks.meet()
    except PeersLeftError as left:
        error = own_or_theirs(left, verdict(left.departures))
        error.is_said_elsewhere = not ranks.is_first
        raise error from left
    except BaseException as error:
        own = departure_of(error)
        others = ranks.leave(own)
        if isinstance(error, VoxfitError):
            # The first rank that ends for a reason says it for all that do.
            same = [each.rank for each in others if each.message == own.message]
            error.is_said_elsewhere = min(same, default=place.rank) != place.rank
        raise


def _connect(place: RankPlace) -> Any:
    """The group for meetings; gradients on GPUs go through NCCL, everything else through gloo."""
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", place.address)
        os.environ.setdefault("MASTER_PORT", str(place.port))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(
                backend, rank=place.rank, world_size=place.num_ranks, timeout=START_TIMEOUT, init_method="env://"
            )
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"the {place.num_ranks} processes of this training cannot reach each other ({first_line(error)})",
                where=f"{place.address}:{place.port}",
                fix="Check that all of them started; MASTER_ADDR and MASTER_PORT choose another place",
            ) from error
        atexit.register(_disconnect)
    return dist.new_group(backend="gloo", timeout=MEETING_TIMEOUT)


def _disconnect() -> None:
    with suppress(Exception):
        dist.destroy_process_group()


def take_own_gpu(ranks: Ranks) -> None:
    """Make the GPU of this rank the current one; each may see all of its node's, or its own only.

    Raises:
        InputError: Ranks share a GPU.
    """
    if ranks.num == 1:
        return
    torch.cuda.set_device(ranks.place.local_rank % torch.cuda.device_count())
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    taken = ranks.meet((socket.gethostname(), uuid))
    if len(set(taken)) < len(taken):
        raise InputError(
            f"{ranks.num} processes share {len(set(taken))} GPU(s)",
            where="hardware.devices",
            fix="Start as many processes on a node as it has GPUs",
        )
