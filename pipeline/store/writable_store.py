"""`WritableStore`: a store that cases are written into, whole or not at all.

A case's data files come first and its record is renamed in last, so a killed run leaves at most files that no record
speaks of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import to_json, write_artifact
from pipeline.errors import InputError
from pipeline.geometry import Grid, Shape3, Spacing
from pipeline.log import get_logger
from pipeline.store.case_store import DATA_KINDS, CaseStore, info_path
from pipeline.store.chunks import WrittenFile, fitted_chunks, write_array
from pipeline.store.foreground import count_voxels, sample_foreground
from pipeline.store.records import CaseRecord, CaseSource, PatchLocation, StoreInfo


class StoreWriteError(InputError):
    """The store cannot be written: no fault of the case that was to be, and no use trying the next one."""


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise StoreWriteError(error.what, where=error.where, fix=error.fix) from error


class WritableStore(CaseStore):
    """A store whose cases may be written and removed.

    Args:
        folder: A folder with `store.json`.
        shared: Beside other processes that write: a case's data files then stay when another version of it takes their
            place.

    Raises:
        InputError: The folder is no store, or one of another version.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        super().__init__(folder)
        self.shared = shared

    @classmethod
    def create(cls, folder: Path, info: StoreInfo, *, shared: bool = False) -> WritableStore:
        """Open the store in `folder` for writing, making it where there is none.

        Cases made with other settings than `info`'s go, with a warning, before it takes effect, so that no store ever
        mixes them; in a shared store, where another process may be making some, they are an error.

        Raises:
            InputError: The folder holds other files but no store, has a store of another version, or cannot be
                written.
        """
        folder = Path(folder)
        if not info_path(folder).is_file():
            refuse_foreign_folder(folder)
            write_artifact(info_path(folder), info)
        store = cls(folder, shared=shared)
        if differences := store.info.differences(info):
            if shared:
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
        self._check_id(case_id)
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
        if self.shared:
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
        self._check_id(record.case_id)
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
        if key is not None and not self.shared:
            self._remove_data(case_id, key)

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

    def _key_of(self, case_id: str) -> str | None:
        """The key of a case that is here and readable."""
        try:
            return self.record(case_id).key
        except InputError:
            return None

    def _forget(self, case_id: str) -> None:
        self._check_id(case_id)
        self._record_path(case_id).unlink(missing_ok=True)
        self._records.pop(case_id, None)

    def _remove_data(self, case_id: str, key: str) -> None:
        for kind in DATA_KINDS:
            self._data_path(case_id, key, kind).unlink(missing_ok=True)

    def _check_id(self, case_id: str) -> None:
        if case_id in ("", ".", "..") or "/" in case_id or case_id.startswith("."):
            raise InputError(f"case id {case_id!r} is not safe as a file name", where=self.folder)


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
