"""From a case's files to a case of the store, in parallel and resumable case by case."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.dataset import Case, Dataset, read_case_image, read_case_label
from pipeline.errors import InputError, in_words, name_some
from pipeline.geometry import Grid, Shape3, cropped_grid, respaced_grid
from pipeline.io.volume import Volume
from pipeline.log import get_logger, track
from pipeline.parallel import map_unordered
from pipeline.plan import Plan
from pipeline.preprocessing.crop import foreground_location
from pipeline.preprocessing.labels import class_indices
from pipeline.preprocessing.normalize import normalize
from pipeline.preprocessing.resample import resample_image, resample_label
from pipeline.preprocessing.sources import is_unchanged, read_case_source
from pipeline.preprocessing.workers import fitting_num_workers
from pipeline.store import CaseStore, PatchLocation, StoreInfo, StoreWriteError, WritableStore, fill_store


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as the network sees it, and where it came from.

    Attributes:
        array: (C, I, J, K) at the target spacing, normalised.
        native_grid: The whole image's grid in RAS order.
        crop_start, crop_shape: The box of native voxels that `array` covers.
        grid: Of `array`.
    """

    array: NDArray[np.float32]
    native_grid: Grid
    crop_start: Shape3
    crop_shape: Shape3
    grid: Grid

    @property
    def crop(self) -> PatchLocation:
        """The box of native voxels that `array` covers."""
        return PatchLocation(self.crop_start, self.crop_shape)


def prepare_image(volume: Volume, plan: Plan) -> PreparedImage:
    """Crop to the foreground, normalise, resample to the target spacing: the same for training and prediction.

    Args:
        volume: (C, I, J, K) in RAS order.
        plan: Spacing and normalisation.

    Raises:
        InputError: The image has other channels than the plan, or NaN or infinite values.
    """
    where = volume.source.path if volume.source else ""
    if volume.num_channels != plan.num_channels:
        names = ", ".join(channel.name for channel in plan.channels)
        raise InputError(
            f"has {volume.num_channels} channel(s), the plan has {plan.num_channels} ({names})", where=where
        )
    crop = foreground_location(volume)
    try:
        normalized = normalize(_cut(volume.array, crop), plan.channels)
    except InputError as error:
        raise InputError(error.what, where=where, fix=error.fix) from error
    grid = respaced_grid(cropped_grid(volume.grid, crop.start, crop.size), plan.target_spacing)
    array = resample_image(normalized, grid.shape, anisotropic_axis=plan.anisotropic_axis)
    return PreparedImage(array, volume.grid, crop.start, crop.size, grid)


def prepare_label(label: Volume, prepared: PreparedImage, plan: Plan) -> NDArray[np.int16]:
    """Class indices (I, J, K) on the voxels of a prepared image; ignored voxels are `IGNORE_INDEX`.

    Args:
        label: (1, I, J, K) label values on the image's native grid.
        prepared: The image.
        plan: Says which value is which class.

    Raises:
        InputError: The label has another shape than its image, or a value that the plan does not know.
    """
    where = label.source.path if label.source else ""
    if label.grid.shape != prepared.native_grid.shape:
        raise InputError(f"has shape {label.grid.shape}, its image {prepared.native_grid.shape}", where=where)
    try:
        indices = class_indices(_cut(label.array, prepared.crop)[0], plan)
    except InputError as error:
        raise InputError(error.what, where=where, fix=error.fix) from error
    return resample_label(
        indices, prepared.grid.shape, num_classes=plan.num_classes, anisotropic_axis=plan.anisotropic_axis
    )


def _cut(array: NDArray[Any], box: PatchLocation) -> NDArray[Any]:
    i, j, k = (slice(start, start + size) for start, size in zip(box.start, box.size, strict=True))
    return array[:, i, j, k]


def preprocess_dataset(
    dataset: Dataset,
    plan: Plan,
    store_folder: Path,
    *,
    num_workers: int | str = "auto",
    leave_out: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Bring the store up to date with the dataset and the plan, one case at a time.

    A case is made anew when the content of one of its files or a setting of the plan that its voxels follow from has
    changed, or when its data are damaged; so a killed run goes on where it was. Cases that the dataset no longer has,
    that are left out or that fail are not in the store afterwards. Another patch size changes the chunks of new cases
    only.

    Args:
        dataset: Training cases.
        plan: The plan made for it.
        store_folder: Made where it is missing.
        num_workers: Processes; "auto" takes the allotted CPUs, fewer where memory is short or there is little to do.
        leave_out: Reason by id of cases that are not to be used.

    Returns:
        Reason by case id of the cases that failed.

    Raises:
        InputError: The folder is no store or another dataset's, cannot be written (a full disk), or is being filled
            by another process; finished cases stay.
    """
    cases = [case for case in dataset.cases if case.case_id not in (leave_out or {})]
    known = {case.case_id for case in dataset.cases}
    with fill_store(Path(store_folder), StoreInfo.of(plan), known_ids=known) as store:
        remove_others(store, {case.case_id for case in cases})
        todo = find_outdated(cases, store)
        return preprocess_cases(todo, plan, store, num_workers=num_workers)


def preprocess_case(case: Case, *, plan: Plan, store: WritableStore) -> None:
    """Make one case and store it, or only note the files' new state when their content is what it was.

    Raises:
        InputError: A file cannot be read, or does not fit the plan.
    """
    source = read_case_source(case, store.info)
    if store.refresh(case.case_id, source):
        return
    image = read_case_image(case)
    prepared = prepare_image(image, plan)
    label = prepare_label(read_case_label(case, grid=image.grid), prepared, plan)
    # In a shared store another process may have made it meanwhile; writing it again would take it away for a moment.
    if store.refresh(case.case_id, source):
        return
    store.write_case(
        case.case_id, prepared.array, label, native_grid=prepared.native_grid, crop=prepared.crop, source=source
    )


def preprocess_cases(
    cases: Sequence[Case], plan: Plan, store: WritableStore, *, num_workers: int | str
) -> dict[str, str]:
    """Make cases in parallel; those that fail are not in the store afterwards.

    Returns:
        Reason by case id of the cases that failed, sorted.

    Raises:
        InputError: The store cannot be written.
    """
    processes = fitting_num_workers(cases, plan, num_workers)
    failures = {}
    with closing(map_unordered(partial(preprocess_case, plan=plan, store=store), cases, num_workers=processes)) as made:
        for outcome in track(made, description="preprocess", total=len(cases)):
            if isinstance(outcome.error, StoreWriteError):
                raise outcome.error
            if outcome.error is not None:
                reason = in_words(outcome.error)
                failures[outcome.item.case_id] = reason
                get_logger().warning("%s: %s", outcome.item.case_id, reason)
    for case_id in set(failures) & set(store.case_ids):
        store.remove_case(case_id)
    return dict(sorted(failures.items()))


def remove_others(store: WritableStore, wanted: Collection[str]) -> None:
    """Take cases other than the wanted ones out of the store, and say so."""
    others = [case_id for case_id in store.case_ids if case_id not in wanted]
    for case_id in others:
        store.remove_case(case_id)
    if others:
        get_logger().info("preprocess: removed %d case(s) no longer wanted: %s", len(others), name_some(others))


def find_outdated(cases: Sequence[Case], store: CaseStore) -> list[Case]:
    """The cases that the store does not hold as their files and the settings make them; says how many it does."""
    todo = [case for case in cases if not is_unchanged(case, store)]
    if len(todo) < len(cases):
        get_logger().info("preprocess: %d of %d cases are up to date", len(cases) - len(todo), len(cases))
    return todo
