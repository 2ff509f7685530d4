"""The store: preprocessed cases in chunked, compressed files that are read patch by patch."""

from pipeline.store.case_store import CaseStore
from pipeline.store.filling import fill_store, lock_store
from pipeline.store.records import IGNORE_INDEX, CaseRecord, CaseSource, PatchLocation, SourceFile, StoreInfo
from pipeline.store.staging import stage_cases
from pipeline.store.writable_store import StoreWriteError, WritableStore

__all__ = [
    "IGNORE_INDEX",
    "CaseRecord",
    "CaseSource",
    "CaseStore",
    "PatchLocation",
    "SourceFile",
    "StoreInfo",
    "StoreWriteError",
    "WritableStore",
    "fill_store",
    "lock_store",
    "stage_cases",
]
