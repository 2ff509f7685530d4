"""Everything that is wrong with a dataset, by case, before anything is made from it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.artifacts import file_hash
from pipeline.datasets.case import Case, Dataset
from pipeline.datasets.case_checks import Problem
from pipeline.datasets.examination import Examined, examine_cases
from pipeline.datasets.listing import stem_of
from pipeline.errors import name_some
from pipeline.io.image_file import source_files

__all__ = ["Problem", "find_problems"]


def find_problems(
    dataset: Dataset, *, num_workers: int, examined: Sequence[Examined] | None = None
) -> tuple[Problem, ...]:
    """All problems of all training cases, sorted by case id.

    Every case is read to the end whatever is found in others. A file in the dataset's folders that no case uses is a
    problem of the kind "unlisted_file", which `Problem.is_warning` tells from those that spoil a case.

    Args:
        dataset: The dataset.
        num_workers: Processes that read cases.
        examined: What `examine_cases` found already; the cases are read when it is left out.
    """
    if examined is None:
        examined = examine_cases(dataset, num_workers=num_workers)
    case_by_id = {case.case_id: case for case in dataset.cases}
    problems = [problem for one in examined for problem in one.problems]
    problems += _duplicates("label", {one.case_id: one.label_hash for one in examined}, case_by_id)
    problems += _duplicates("image", {one.case_id: one.image_hash for one in examined}, case_by_id)
    problems += _unlisted(dataset)
    return tuple(sorted(problems, key=lambda problem: problem.case_id))


def _duplicates(what: str, hashes: Mapping[str, str], case_by_id: Mapping[str, Case]) -> Iterator[Problem]:
    """A problem for each case whose voxels another case has too; which of them is right cannot be seen."""
    groups: dict[str, list[str]] = defaultdict(list)
    for case_id, digest in hashes.items():
        if digest:
            groups[digest].append(case_id)
    for group in groups.values():
        if len(group) > 1:
            how = "byte for byte" if _files_are_equal([_files(case_by_id[case_id], what) for case_id in group]) else ""
            for case_id in group:
                others = name_some([other for other in group if other != case_id])
                message = f"the {what} is the same as that of {others} ({how or 'voxel for voxel, in another file'})"
                yield Problem(case_id=case_id, kind=f"duplicate_{what}", message=message)


def _files(case: Case, what: str) -> tuple[Path, ...]:
    paths = case.images if what == "image" else (case.label,) if case.label else ()
    return tuple(file for path in paths for file in source_files(path))


def _files_are_equal(groups: Sequence[tuple[Path, ...]]) -> bool:
    return len({tuple(file_hash(path) for path in group) for group in groups}) == 1


def _unlisted(dataset: Dataset) -> Iterator[Problem]:
    for path in dataset.unlisted_files:
        place = os.path.relpath(path, dataset.root)
        yield Problem(case_id=stem_of(path), kind="unlisted_file", message=f"no case of the dataset uses {place}")
