"""`CaseStore`: cases of a folder, read patch by patch.

Layout: `store.json` (`StoreInfo`) and, in `cases/`, for each case its record `<case>.json` and the data files
`<case>.<key>.image.b2nd`, `.label.b2nd` and `.voxels.b2nd`. A case exists if and only if its record does.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import read_artifact
from pipeline.errors import InputError, name_some
from pipeline.log import get_logger
from pipeline.plan import Plan
from pipeline.store.chunks import read_array
from pipeline.store.foreground import MAX_SAMPLED_VOXELS
from pipeline.store.records import CaseRecord, PatchLocation, StoreInfo

DATA_KINDS = ("image", "label", "voxels")
MAKE_FIX = "Run `voxfit preprocess` first"
REDO_FIX = "Run `voxfit preprocess` again: it redoes what is damaged"


class CaseStore:
    """Preprocessed cases in a folder.

    Nothing stays open between calls (opening a file takes 0.1 ms), so a store can be pickled, forked and shared by
    data workers, and any number of cases takes no file handles. Decompression uses the calling thread alone.

    Args:
        folder: A folder with `store.json`.

    Raises:
        InputError: The folder is no store, or one of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = info_path(self.folder)
        if not path.is_file():
            raise InputError("is no store (there is no store.json in it)", where=folder, fix=MAKE_FIX)
        try:
            self.info = read_artifact(path, StoreInfo)
        except InputError as error:
            fix = "Delete this store or give another folder, and run `voxfit preprocess`"
            raise InputError(error.what, where=path, fix=fix) from error
        self._cases = self.folder / "cases"
        self._records: dict[str, CaseRecord] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the records read so far: they would be sent along with every task of a worker."""
        return {**self.__dict__, "_records": {}}

    def check_plan(self, plan: Plan) -> None:
        """Raise `InputError` naming what differs when the store was made by another plan.

        Patch size and the names of channels and classes may differ, as voxels do not depend on them; but other names
        can be another dataset's, so they are warned of.
        """
        differences = self.info.differences(StoreInfo.of(plan))
        if differences:
            fix = "Run `voxfit preprocess` with this plan, or give the plan that the store was made with"
            raise InputError(f"was made by another plan ({'; '.join(differences)})", where=self.folder, fix=fix)
        for difference in self.info.name_differences(StoreInfo.of(plan)):
            line = "%s: %s; the same by another name, or is it the store of another dataset?"
            get_logger("store").warning(line, self.folder, difference)

    def check_dataset(self, known_ids: Collection[str]) -> None:
        """Raise `InputError` when the store holds cases, but none of those that a dataset has."""
        held = self.case_ids
        if held and not set(held) & set(known_ids):
            raise InputError(
                f"is the store of another dataset: none of its {len(held)} case(s) ({name_some(held)}) is in this one",
                where=self.folder,
                fix="Give another folder, or delete this one if nobody needs it",
            )

    @property
    def case_ids(self) -> tuple[str, ...]:
        """Finished cases, sorted."""
        return tuple(sorted(path.name.removesuffix(".json") for path in self._cases.glob("[!.]*.json")))

    def record(self, case_id: str) -> CaseRecord:
        """What is known of a case without reading its voxels.

        Raises:
            InputError: There is no such case, or its record is damaged.
        """
        if case_id not in self._records:
            path = self._record_path(case_id)
            if not path.is_file():
                raise InputError(f"holds no case {case_id}", where=self.folder, fix=MAKE_FIX)
            self._records[case_id] = read_artifact(path, CaseRecord)
        return self._records[case_id]

    def data_file(self, case_id: str, kind: str) -> Path:
        """A data file of a case, `kind` being one of `DATA_KINDS`.

        Raises:
            InputError: There is no such case, or the file is missing or has not the size that it was written with.
        """
        record = self.record(case_id)
        path, expected = self._data_path(case_id, record.key, kind), record.data_bytes.get(kind)
        found = path.stat().st_size if path.is_file() else 0
        if found != expected:
            what = f"the {kind} of case {case_id} is damaged ({found} of {expected} bytes)"
            raise InputError(what, where=path, fix=REDO_FIX)
        return path

    def read_patch(self, case_id: str, location: PatchLocation) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        """Read a box of voxels; only the blocks it touches are decompressed.

        Returns:
            Image (C, *size) and class indices (*size). Outside the volume both are 0, the mean of a normalised
            image and the background; ignored voxels are `IGNORE_INDEX`.

        Raises:
            InputError: There is no such case, or its data files are damaged.
        """
        overlap = location.overlap(self.record(case_id).shape)
        image = np.zeros((self.info.num_channels, *location.size), np.float32)
        label = np.zeros(location.size, np.int16)
        if overlap is not None:
            in_volume, in_box = overlap
            all_channels = slice(None)
            image[all_channels, in_box[0], in_box[1], in_box[2]] = self._read(
                case_id, "image", (all_channels, *in_volume)
            )
            label[in_box] = self._read(case_id, "label", in_volume)
        return image, label

    def read_case(self, case_id: str) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        """Image (C, I, J, K) and class indices (I, J, K) of a whole case; raises as `read_patch`."""
        return self.read_patch(case_id, PatchLocation((0, 0, 0), self.record(case_id).shape))

    def foreground_voxels(self, case_id: str, class_index: int) -> NDArray[np.int32]:
        """Voxels (N, 3) of a class: all of them, or 10,000 drawn evenly with a seed that follows from the case.

        Args:
            case_id: A finished case.
            class_index: 1 or above; the background is not sampled.
        """
        if not 1 <= class_index < self.info.num_classes:
            raise ValueError(f"class {class_index} is not from 1 to {self.info.num_classes - 1}")
        rows_by_class = [min(count, MAX_SAMPLED_VOXELS) for count in self.record(case_id).voxels_by_class]
        first = sum(rows_by_class[1:class_index])
        return self._read(case_id, "voxels", slice(first, first + rows_by_class[class_index]))

    def is_whole(self, case_id: str) -> bool:
        """Whether the case has a readable record and data files of the right size."""
        try:
            for kind in DATA_KINDS:
                self.data_file(case_id, kind)
        except InputError:
            return False
        return True

    def _read(self, case_id: str, kind: str, part: Any) -> NDArray[Any]:
        path = self.data_file(case_id, kind)
        try:
            return read_array(path, part)
        except (RuntimeError, OSError, ValueError) as error:
            raise InputError(f"the {kind} of case {case_id} is damaged", where=path, fix=REDO_FIX) from error

    def _record_path(self, case_id: str) -> Path:
        return self._cases / f"{case_id}.json"

    def _data_path(self, case_id: str, key: str, kind: str) -> Path:
        return self._cases / f"{case_id}.{key}.{kind}.b2nd"


def info_path(folder: Path) -> Path:
    """The file that makes a folder a store."""
    return folder / "store.json"
