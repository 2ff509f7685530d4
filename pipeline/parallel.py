"""One function over many cases in several processes, where one bad case does not end the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from pipeline.errors import InputError, VoxfitError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Outcome(NamedTuple, Generic[Item, Result]):
    """What came of one item: a result, or the error that ended it."""

    item: Item
    result: Result | None
    error: Exception | None


def map_unordered(
    function: Callable[[Item], Result], items: Sequence[Item], *, num_workers: int
) -> Iterator[Outcome[Item, Result]]:
    """Call `function` on every item and yield outcomes as they finish.

    Errors that a file can cause come back as outcomes; defects of ours are raised. Functions and items must be
    picklable when `num_workers` is above one. Workers use one thread each, so cores are not oversubscribed.
    """
    if num_workers <= 1 or len(items) <= 1:
        yield from (_attempt(function, item) for item in items)
        return
    from joblib import Parallel, delayed, parallel_config
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    with parallel_config(backend="loky", inner_max_num_threads=1):
        pool = Parallel(n_jobs=num_workers, return_as="generator_unordered", max_nbytes=None, batch_size=1)
        try:
            yield from pool(delayed(_attempt)(function, item) for item in items)
        except TerminatedWorkerError as error:
            raise InputError(
                "a worker process was killed, most likely because memory ran out",
                where="num_workers",
                fix=f"Use fewer workers than {num_workers}, or ask for more memory",
            ) from error


def _attempt(function: Callable[[Item], Result], item: Item) -> Outcome[Item, Result]:
    try:
        return Outcome(item, function(item), None)
    except (VoxfitError, OSError, EOFError, MemoryError) as error:
        return Outcome(item, None, error)
