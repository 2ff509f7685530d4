"""`CaseStore`: cases of a folder, written whole or not at all and read patch by patch.

Layout: `store.json` (`StoreInfo`) and, in `cases/`, for each case its record `<case>.json` and the data files
`<case>.<key>.image.b2nd`, `.label.b2nd` and `.voxels.b2nd`. A case exists if and only if its record does: data files
come first and the record is renamed in last, so a killed run leaves at most files that no record speaks of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import read_artifact, to_json, write_artifact
from pipeline.errors import InputError
from pipeline.geometry import Grid, Shape3, Spacing
from pipeline.log import get_logger
from pipeline.plan import Plan
from pipeline.store.chunks import WrittenFile, fitted_chunks, read_array, write_array
from pipeline.store.foreground import MAX_SAMPLED_VOXELS, count_voxels, sample_foreground
from pipeline.store.records import CaseRecord, CaseSource, PatchLocation, StoreInfo

Mode = Literal["r", "a", "shared"]
DATA_KINDS = ("image", "label", "voxels")
MAKE_FIX = "Run `voxfit preprocess` first"
REDO_FIX = "Run `voxfit preprocess` again: it redoes what is damaged"


class StoreWriteError(InputError):
    """The store cannot be written: no fault of the case that was to be, and no use trying the next one."""


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise StoreWriteError(error.what, where=error.where, fix=error.fix) from error


class CaseStore:
    """Preprocessed cases in a folder.

    Nothing stays open between calls (opening a file takes 0.1 ms), so a store can be pickled, forked and shared by
    data workers, and any number of cases takes no file handles. Decompression uses the calling thread alone.

    Args:
        folder: A folder with `store.json`.
        mode: "r" writes nothing; "a" allows cases to be written and removed; "shared" as well, beside other processes
            that do: a case's data files then stay when another version of it takes their place.

    Raises:
        InputError: The folder is no store, or one of another version.
    """

    def __init__(self, folder: Path, *, mode: Mode = "r") -> None:
        self.folder, self.mode = Path(folder), mode
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

    @classmethod
    def create(cls, folder: Path, info: StoreInfo, *, mode: Mode = "a") -> CaseStore:
        """Open the store in `folder` for writing, making it where there is none.

        Cases made with other settings than `info`'s go, with a warning, before it takes effect, so that no store ever
        mixes them; in mode "shared", where another process may be making some, they are an error.

        Raises:
            InputError: The folder holds other files but no store, has a store of another version, or cannot be
                written.
        """
        folder = Path(folder)
        if not info_path(folder).is_file():
            refuse_foreign_folder(folder)
            write_artifact(info_path(folder), info)
        store = cls(folder, mode=mode)
        if differences := store.info.differences(info):
            if mode == "shared":
                what = f"was made by another plan ({'; '.join(differences)})"
                raise InputError(what, where=folder, fix="Give another folder, or run `voxfit preprocess` unsharded")
            store._remove_all("; ".join(differences))
        # As text, because equal dictionaries may differ in their order, which numbers the classes.
        if to_json(store.info) != to_json(info):
            write_artifact(info_path(folder), info)
            store.info = info
        return store

    def _remove_all(self, reason: str) -> None:
        case_ids = self.case_ids
        if case_ids:
            line = "%s: made by another plan (%s); its %d case(s) are removed and made anew"
            get_logger("store").warning(line, self.folder, reason, len(case_ids))
        for case_id in case_ids:
            self.remove_case(case_id)

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

    def write_case(
        self,
        case_id: str,
        image: NDArray[np.float32],
        label: NDArray[Any],
        *,
        native_grid: Grid,
        crop: PatchLocation | None = None,
        source: CaseSource | None = None,
    ) -> CaseRecord:
        """Store a case, in place of an older one of the same id.

        Args:
            case_id: Safe as a file name.
            image: (C, I, J, K).
            label: Class indices (I, J, K) on the same voxels, `IGNORE_INDEX` where ignored.
            native_grid: The whole image's grid in RAS order.
            crop: The box of it that the arrays cover; all of it by default.
            source: Patient, key and files.

        Raises:
            StoreWriteError: The folder cannot be written.
            InputError: The case id is not safe as a file name.
        """
        self._check_writable(case_id)
        if image.shape != (self.info.num_channels, *label.shape):
            raise ValueError(f"image {image.shape} is not {self.info.num_channels} channels of {label.shape}")
        source, crop = source or CaseSource(), crop or PatchLocation((0, 0, 0), native_grid.shape)
        counts = count_voxels(label, self.info.num_classes)
        old_key = self._key_of(case_id)
        if old_key == source.key:
            # The new files take the place of those that the old record speaks of, so the record goes first.
            self._forget(case_id)
        written = self._write_data(case_id, source.key, image, label, counts)
        record = CaseRecord(
            case_id=case_id,
            patient=source.patient,
            shape=(label.shape[0], label.shape[1], label.shape[2]),
            spacing=_stored_spacing(native_grid, crop.size, label.shape),
            voxels_by_class=counts,
            native_shape=native_grid.shape,
            crop_start=crop.start,
            crop_shape=crop.size,
            native_affine=tuple(tuple(float(value) for value in row) for row in native_grid.affine),
            key=source.key,
            files=source.files,
            data_bytes={kind: file.size for kind, file in written.items()},
            data_crc32={kind: file.crc32 for kind, file in written.items()},
        )
        self.write_record(record)
        if self.mode == "shared":
            self._check_still_whole(case_id)
        elif old_key is not None and old_key != source.key:
            self._remove_data(case_id, old_key)
        return record

    def _check_still_whole(self, case_id: str) -> None:
        """A sweep in another process can have taken data files that had no record yet: then the case must not exist."""
        if not self.is_whole(case_id):
            self._forget(case_id)
            what = f"files of case {case_id} were removed while it was made"
            raise StoreWriteError(what, where=self.folder, fix="Run the same command again")

    def write_record(self, record: CaseRecord) -> None:
        """Put a record in place: the moment from which its case exists."""
        self._check_writable(record.case_id)
        with _writing():
            write_artifact(self._record_path(record.case_id), record)
        self._records[record.case_id] = record

    def refresh(self, case_id: str, source: CaseSource) -> bool:
        """Note new patient and file states where the stored voxels are already those of `source`; whether they are."""
        if self._key_of(case_id) != source.key or not self.is_whole(case_id):
            return False
        self.write_record(replace(self.record(case_id), patient=source.patient, files=source.files))
        return True

    def remove_case(self, case_id: str) -> None:
        """Take a case out of the store, its record first."""
        key = self._key_of(case_id)
        self._forget(case_id)
        if key is not None and self.mode != "shared":
            self._remove_data(case_id, key)

    def is_whole(self, case_id: str) -> bool:
        """Whether the case has a readable record and data files of the right size."""
        try:
            for kind in DATA_KINDS:
                self.data_file(case_id, kind)
        except InputError:
            return False
        return True

    def sweep(self) -> None:
        """Remove what killed runs left, damaged cases, and data files that no record speaks of."""
        for case_id in self.case_ids:
            if not self.is_whole(case_id):
                self._forget(case_id)
        self.remove_leftovers()

    def remove_leftovers(self, *, min_age_seconds: float = 0.0) -> None:
        """Remove temporary files, and data files that no record speaks of, once they are `min_age_seconds` old."""
        kept = {f"{case_id}.{self._key_of(case_id)}.{kind}.b2nd" for case_id in self.case_ids for kind in DATA_KINDS}
        newest = self._time_there() - min_age_seconds if min_age_seconds else float("inf")
        for path in self._cases.glob("*"):
            is_temporary = path.name.startswith(".") and ".partial." in path.name
            if not is_temporary and (path.suffix != ".b2nd" or path.name in kept):
                continue
            with suppress(FileNotFoundError):
                if path.stat().st_mtime <= newest:
                    path.unlink()

    def _time_there(self) -> float:
        """The file system's own time: a server's clock may differ from this machine's."""
        path = self.folder / ".lock"
        path.touch()
        return path.stat().st_mtime

    def _read(self, case_id: str, kind: str, part: Any) -> NDArray[Any]:
        path = self.data_file(case_id, kind)
        try:
            return read_array(path, part)
        except (RuntimeError, OSError, ValueError) as error:
            raise InputError(f"the {kind} of case {case_id} is damaged", where=path, fix=REDO_FIX) from error

    def _write_data(
        self, case_id: str, key: str, image: NDArray[np.float32], label: NDArray[Any], counts: tuple[int, ...]
    ) -> dict[str, WrittenFile]:
        """Write the three data files; what was written by kind."""
        chunks, blocks = fitted_chunks(image.shape, self.info.patch_size)
        stored_label = label.astype(np.int8 if self.info.num_classes <= 127 else np.int16, copy=False)
        voxels = sample_foreground(label, counts, case_id=case_id)
        paths = {kind: self._data_path(case_id, key, kind) for kind in DATA_KINDS}
        image = image.astype(np.float32, copy=False)
        with _writing():
            return {
                "image": write_array(paths["image"], image, chunks=chunks, blocks=blocks),
                "label": write_array(paths["label"], stored_label, chunks=chunks[1:], blocks=blocks[1:]),
                "voxels": write_array(paths["voxels"], voxels),
            }

    def _forget(self, case_id: str) -> None:
        self._check_writable(case_id)
        self._record_path(case_id).unlink(missing_ok=True)
        self._records.pop(case_id, None)

    def _remove_data(self, case_id: str, key: str) -> None:
        for kind in DATA_KINDS:
            self._data_path(case_id, key, kind).unlink(missing_ok=True)

    def _key_of(self, case_id: str) -> str | None:
        """The key of a case that is here and readable."""
        try:
            return self.record(case_id).key
        except InputError:
            return None

    def _check_writable(self, case_id: str) -> None:
        if self.mode == "r":
            raise ValueError("the store was opened for reading only")
        if case_id in ("", ".", "..") or "/" in case_id or case_id.startswith("."):
            raise InputError(f"case id {case_id!r} is not safe as a file name", where=self.folder)

    def _record_path(self, case_id: str) -> Path:
        return self._cases / f"{case_id}.json"

    def _data_path(self, case_id: str, key: str, kind: str) -> Path:
        return self._cases / f"{case_id}.{key}.{kind}.b2nd"


def info_path(folder: Path) -> Path:
    """The file that makes a folder a store."""
    return folder / "store.json"


def refuse_foreign_folder(folder: Path) -> None:
    """Raise `InputError` when `folder` holds files but no store."""
    if info_path(folder).is_file() or not folder.exists():
        return
    names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} if folder.is_dir() else {""}
    # Another process may have made it a store since it was looked for.
    if names and info_path(folder).name not in names:
        raise InputError("holds files but is no store", where=folder, fix="Give a new or an empty folder")


def _stored_spacing(native: Grid, crop_shape: Shape3, shape: tuple[int, ...]) -> Spacing:
    """Voxel size of a crop that was resampled to `shape`."""
    i, j, k = (mm * n / stored for mm, n, stored in zip(native.spacing, crop_shape, shape, strict=True))
    return i, j, k
