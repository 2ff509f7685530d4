"""What a case was made from, and whether that has changed since."""

from __future__ import annotations

from pathlib import Path

from pipeline.artifacts import content_hash, file_hash
from pipeline.datasets.dataset import Case
from pipeline.errors import InputError
from pipeline.io.image_file import source_files
from pipeline.store import CaseSource, CaseStore, SourceFile, StoreInfo


def read_case_source(case: Case, info: StoreInfo) -> CaseSource:
    """Hash a case's files; the key also holds the settings, and no path.

    Raises:
        InputError: The case is incomplete, or a file cannot be read.
    """
    if not case.images or case.label is None:
        raise InputError(f"has no {'label' if case.images else 'image'}", where=case.case_id)
    files = tuple(_read_state(path) for path in _paths(case))
    return CaseSource(patient=case.patient, key=_key(files, info), files=files)


def is_unchanged(case: Case, store: CaseStore) -> bool:
    """Whether the store holds the case as its files, told by size and time of change, and the settings make it."""
    if not store.is_whole(case.case_id):
        return False
    record = store.record(case.case_id)
    if (record.patient, record.key) != (case.patient, _key(record.files, store.info)):
        return False
    try:
        found = [(status.st_size, status.st_mtime_ns) for status in (path.stat() for path in _paths(case))]
    except (OSError, InputError):
        return False
    return found == [(file.size, file.mtime_ns) for file in record.files]


def _paths(case: Case) -> list[Path]:
    """Everything that a case's voxels come from, the slices of a DICOM series among it."""
    return [file for path in (*case.images, *([case.label] if case.label else [])) for file in source_files(path)]


def _read_state(path: Path) -> SourceFile:
    try:
        # Before the bytes are read: a change while they are shows as another time when it is next compared.
        status = path.stat()
        return SourceFile(size=status.st_size, mtime_ns=status.st_mtime_ns, sha256=file_hash(path))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=path.name, fix="Check the file") from error


def _key(files: tuple[SourceFile, ...], info: StoreInfo) -> str:
    return content_hash([file.sha256 for file in files], info.settings)
