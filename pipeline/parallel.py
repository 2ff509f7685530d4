"""One function over many items: cases in processes, where a bad one does not end the others; pieces in threads."""

from __future__ import annotations

import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from pipeline.errors import InputError, VoxfitError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Workers end after so long without work: soon when what started them was killed, and not between two steps of a run.
IDLE_SECONDS = 10.0


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """What came of one item: a result, or the error that ended it."""

    item: Item
    result: Result | None
    error: Exception | None


def map_unordered(
    function: Callable[[Item], Result], items: Sequence[Item], *, num_workers: int
) -> Generator[Outcome[Item, Result], None, None]:
    """Call `function` on every item and yield outcomes as they finish.

    Errors that a file can cause come back as outcomes; defects of ours are raised. Functions and items must be
    picklable when `num_workers` is above one. Workers use one thread each, so cores are not oversubscribed. Closing
    the generator ends what has begun.
    """
    if num_workers <= 1 or len(items) <= 1:
        yield from (_attempt(function, item) for item in items)
        return
    from joblib import Parallel, delayed, parallel_config
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    _start_tracker()
    with parallel_config(backend="loky", inner_max_num_threads=1):
        pool = Parallel(
            n_jobs=num_workers,
            return_as="generator_unordered",
            max_nbytes=None,
            batch_size=1,
            idle_worker_timeout=IDLE_SECONDS,
        )
    outcomes = pool(delayed(_attempt)(function, item) for item in items)
    try:
        # `yield from` would close `outcomes` before this function can keep that quiet.
        for outcome in outcomes:  # noqa: UP028
            yield outcome
    except TerminatedWorkerError as error:
        raise InputError(
            "a worker process was killed, most likely because memory ran out",
            where="num_workers",
            fix=f"Use fewer workers than {num_workers}, or ask for more memory",
        ) from error
    finally:
        _close_quietly(outcomes)


def _start_tracker() -> None:
    """Start the process that sweeps up behind joblib with SIGUSR1 blocked, which schedulers send to a whole job."""
    from joblib.externals.loky.backend.resource_tracker import ensure_running

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _close_quietly(outcomes: Generator[Any, None, None]) -> None:
    """End a run without joblib's warning about tasks that had begun."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        outcomes.close()


def _attempt(function: Callable[[Item], Result], item: Item) -> Outcome[Item, Result]:
    try:
        return Outcome(item, function(item), None)
    except (VoxfitError, OSError, EOFError, MemoryError) as error:
        return Outcome(item, None, error)


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], pool: Executor, *, ahead: int
) -> Iterator[Result]:
    """Results in the order of the items, computed in a pool ahead of whoever takes them.

    What an item raised is raised in its turn. However it ends, nothing runs on behind it: who goes on, perhaps with
    less memory, finds its memory free.

    Args:
        function: Called in the pool.
        items: What for.
        pool: Who calls it; others may use it as well.
        ahead: Most items that are begun and not yet taken.
    """
    remaining, begun = iter(items), deque[Future[Result]]()
    try:
        begun.extend(pool.submit(function, item) for item in islice(remaining, max(1, ahead)))
        while begun:
            # Let go before the next is begun: the room for it is that of the result just taken.
            yield begun.popleft().result()
            begun.extend(pool.submit(function, item) for item in islice(remaining, 1))
    finally:
        for future in begun:
            if not future.cancel():
                future.exception()
