"""A store filled by several jobs, each its share of the cases, and the check that it is complete.

No job waits for another or knows of it. A case belongs to the share that its place among the sorted ids gives, so
shares do not overlap while the dataset stays as it is; where they do (a dataset that grew, a job started twice) a case
is made twice with the same bytes. Removing is left to `verify_store` and to a run without shares.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from pipeline.datasets.dataset import Case, Dataset
from pipeline.errors import InputError
from pipeline.log import get_logger
from pipeline.plan import Plan
from pipeline.preprocessing.preprocess import find_outdated, preprocess_cases, remove_others
from pipeline.preprocessing.sources import is_unchanged, read_case_source
from pipeline.store import CaseStore, StoreInfo, WritableStore, fill_store, lock_store

# Younger files without a record may belong to a case that is being written where locks do not reach.
LEFTOVER_SECONDS = 3600.0


def share_of(case_ids: Collection[str], share: tuple[int, int]) -> tuple[str, ...]:
    """The ids of share k of n, counted from 1; all shares together have each id once."""
    number, count = share
    return tuple(sorted(case_ids)[number - 1 :: count])


def preprocess_share(
    dataset: Dataset,
    plan: Plan,
    store_folder: Path,
    share: tuple[int, int],
    *,
    num_workers: int | str = "auto",
    leave_out: Collection[str] = (),
) -> dict[str, str]:
    """Make one share of the cases in a store that other processes, on any node, may be filling as well.

    Args:
        dataset: Training cases, the same in all shares.
        plan: The plan made for it.
        store_folder: Made where it is missing.
        share: (k, n), k from 1.
        num_workers: As for `preprocess_dataset`.
        leave_out: Ids of cases that are not to be used.

    Returns:
        Reason by case id of the cases of this share that failed.

    Raises:
        InputError: The folder is no store, or another dataset's or plan's, cannot be written, or is being filled by a
            run without shares.
    """
    known = {case.case_id: case for case in dataset.cases}
    mine = [known[case_id] for case_id in share_of(known, share) if case_id not in leave_out]
    get_logger().info("preprocess: share %d of %d has %d of %d cases", *share, len(mine), len(known))
    with fill_store(Path(store_folder), StoreInfo.of(plan), known_ids=known, shared=True) as store:
        return preprocess_cases(find_outdated(mine, store), plan, store, num_workers=num_workers)


def verify_store(
    dataset: Dataset, plan: Plan, store_folder: Path, *, leave_out: Collection[str] = ()
) -> dict[str, str]:
    """Say which cases are missing or not whole; remove cases that are not wanted and what killed processes left.

    Nothing is removed while another process fills the store.

    Returns:
        Reason by case id, sorted; empty when the store is complete.

    Raises:
        InputError: The folder is no store, or another plan's or dataset's.
    """
    store = WritableStore(Path(store_folder))
    store.check_plan(plan)
    store.check_dataset([case.case_id for case in dataset.cases])
    wanted, held = [case for case in dataset.cases if case.case_id not in leave_out], set(store.case_ids)
    problems = {case.case_id: "is missing" for case in wanted if case.case_id not in held}
    present = [case for case in wanted if case.case_id in held]
    problems |= {case.case_id: reason for case in present if (reason := _find_problem(case, store))}
    get_logger().info("preprocess: %d of %d cases are there and whole", len(wanted) - len(problems), len(wanted))
    _tidy(store, {case.case_id for case in wanted})
    return dict(sorted(problems.items()))


def _find_problem(case: Case, store: CaseStore) -> str:
    """What is wrong with a case in the store, or "": its files are read only where their size or time has changed."""
    if not store.is_whole(case.case_id):
        return "is damaged"
    try:
        if is_unchanged(case, store) or read_case_source(case, store.info).key == store.record(case.case_id).key:
            return ""
    except InputError as error:
        return str(error)
    return "was made from other files"


def _tidy(store: WritableStore, wanted: Collection[str]) -> None:
    try:
        with lock_store(store.folder):
            remove_others(store, wanted)
            store.remove_leftovers(min_age_seconds=LEFTOVER_SECONDS)
    except InputError as error:
        get_logger().warning("preprocess: nothing is removed: %s", error)
