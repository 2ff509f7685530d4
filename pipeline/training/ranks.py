"""Several processes that train one network: where they meet, and how each learns that another one has left.

All ranks hold the same weights, optimiser state and counts at all times; they differ in the patches and validation
cases that they take. They talk at a few agreed places only (`Ranks.meet`): before every optimiser step, after a
validation, around files that the first one writes. A rank that cannot go on, for whatever reason, goes straight to the
next meeting and says so there, and every other one learns it at that same meeting. Tensors are exchanged right after a
meeting at which all were there (`Ranks.exchange`); a rank that fails within that, or is killed, breaks the connection
by its end, which ends the others.
"""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.errors import InputError, VoxfitError, first_line
from pipeline.log import get_logger
from pipeline.rank_place import RankPlace, find_place
from pipeline.training.departures import (
    Departure,
    PeersLeftError,
    RankFailedError,
    RankLostError,
    departure_of,
    own_or_theirs,
    verdict,
)

T = TypeVar("T")
# Nodes of a job may start minutes apart.
START_TIMEOUT = timedelta(minutes=10)
# On a GPU it counts from when an exchange is queued, behind the passes before it.
EXCHANGE_TIMEOUT = timedelta(hours=1)
# One rank may still validate a large case, or write to a slow disk, where the others are done.
MEETING_TIMEOUT = timedelta(hours=3)


class Ranks:
    """The processes of a training; on its own, one whose meetings are with itself.

    Args:
        place: Of this process.
        meetings: What meetings go through; None for a process on its own.
        tensors: What tensors go through.
    """

    def __init__(self, place: RankPlace | None = None, meetings: Any = None, tensors: Any = None) -> None:
        self.place = place if place is not None else RankPlace()
        self._meetings, self._tensors = meetings, tensors
        self._is_talking = False
        self._told: list[Departure] = []

    @property
    def num(self) -> int:
        """How many there are."""
        return self.place.num_ranks

    @property
    def is_first(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.place.is_first

    @property
    def is_cut_off(self) -> bool:
        """Whether something failed while ranks talked: the others are somewhere else, and cannot be met any more."""
        return self._is_talking

    def meet(self, value: T | None = None) -> list[T]:
        """Wait for all ranks; their values, by rank.

        Raises:
            PeersLeftError: Some rank left instead.
            RankLostError: A rank is gone.
        """
        entries = self._gather((None, value))
        departures = [departure for departure, _ in entries if departure is not None]
        if departures:
            self._told = departures
            raise PeersLeftError(departures)
        return [each for _, each in entries]

    def from_first(self, value: T | None = None) -> T:
        """The first rank's value, for which the others wait; raises as `meet` does."""
        return self.meet(value if self.is_first else None)[0]

    def leave(self, departure: Departure) -> list[Departure]:
        """Tell the others at the next meeting, unless all know already that some left; everyone who did, in any case.

        Once they have agreed to go on all the same, `go_on` begins anew.
        """
        if self._told:
            return self._told
        self._told = [replace(departure, rank=self.place.rank, host=socket.gethostname())]
        if self._meetings is None or self.is_cut_off:
            return self._told
        try:
            self._told = [each for each, _ in self._gather((self._told[0], None)) if each is not None]
        except RankLostError as error:
            get_logger("train").debug("%s", error)
        return self._told

    def go_on(self) -> None:
        """Forget who left: all are there again."""
        self._told = []

    def close(self) -> None:
        """Free what they talked through; not where they are cut off, since it would wait for what was under way.

        Gloo's threads would live on with it, and one that frees a tensor while the interpreter ends aborts the process
        (pytorch/pytorch 179291).
        """
        if self._meetings is None or self.is_cut_off:
            return
        groups, self._meetings, self._tensors = [self._meetings, self._tensors], None, None
        while groups:
            dist.destroy_process_group(groups.pop())

    def _gather(self, entry: tuple[Departure | None, Any]) -> list[tuple[Departure | None, Any]]:
        if self._meetings is None:
            return [entry]
        entries: list[Any] = [None] * self.num
        with self._talking():
            dist.all_gather_object(entries, entry, group=self._meetings)
        return entries

    @contextmanager
    def exchange(self) -> Iterator[Any]:
        """The group for tensors, to be used right after a meeting, when all ranks use it.

        Raises:
            RankLostError: The connection broke.
        """
        with self._talking():
            yield self._tensors

    @contextmanager
    def _talking(self) -> Iterator[None]:
        if self.is_cut_off:
            raise RankLostError("the other processes of this training cannot be reached any more")
        self._is_talking = True
        try:
            yield
        except RuntimeError as error:
            # Torch has no error type of its own for broken connections.
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RankLostError(
                f"another process of this training is gone, or hangs ({first_line(error)})",
                fix="Its own message stands in its log; the same command goes on from the last checkpoint",
            ) from error
        self._is_talking = False


@contextmanager
def open_ranks() -> Iterator[Ranks]:
    """The ranks that this process is one of; an error that leaves the block on one of them ends the block on all.

    Raises:
        RankFailedError: Another rank failed.
        StoppedError: Another rank was asked to stop.
        InputError: The others cannot be reached.
    """
    place = find_place()
    ranks = Ranks(place, *_connect(place)) if place.num_ranks > 1 else Ranks(place)
    try:
        yield ranks
        ranks.meet()
    except PeersLeftError as left:
        error = own_or_theirs(left, verdict(left.departures))
        _say_once(error, ranks, left.departures)
        raise error from left
    except BaseException as error:
        _say_once(error, ranks, ranks.leave(departure_of(error)))
        raise
    finally:
        ranks.close()


def _say_once(error: BaseException, ranks: Ranks, departures: list[Departure] | tuple[Departure, ...]) -> None:
    """The first rank that ends for a reason says it for all that do, and the first of all what others failed for."""
    if not isinstance(error, VoxfitError):
        return
    same = [each.rank for each in departures if each.message == departure_of(error).message]
    speaker = 0 if isinstance(error, RankFailedError) else min(same, default=ranks.place.rank)
    error.is_said_elsewhere = speaker != ranks.place.rank


def _connect(place: RankPlace) -> tuple[Any, Any]:
    """The groups for meetings and for tensors; those on GPUs go through NCCL, everything else through gloo."""
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
    return dist.new_group(backend="gloo", timeout=MEETING_TIMEOUT), dist.new_group(timeout=EXCHANGE_TIMEOUT)


def _disconnect() -> None:
    with suppress(Exception):
        dist.destroy_process_group()


def take_own_gpu(ranks: Ranks) -> None:
    """Make the GPU of this rank the current one; each may see all of its node's, or its own only.

    Raises:
        InputError: Ranks share a GPU, or the GPUs cannot exchange tensors.
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
    try:
        with ranks.exchange() as group:
            # Now, because it takes memory of its own, and because what is wrong with it is found out here.
            dist.all_reduce(torch.ones(1, device="cuda"), group=group)
            torch.cuda.synchronize()
    except RankLostError as error:
        fix = "NCCL_DEBUG=INFO tells more"
        raise InputError(
            f"the GPUs cannot exchange tensors: {error.what}", where="hardware.devices", fix=fix
        ) from error
