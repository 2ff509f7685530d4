"""Copies of a store on another disk: whole cases whatever happens to the copying, and always those of the store."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from time import sleep

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.geometry import Grid
from pipeline.plan import ChannelPlan
from pipeline.store import CaseSource, CaseStore, StoreInfo, WritableStore, stage_cases, staging
from pipeline.store.case_store import DATA_KINDS

SHAPE = (40, 24, 52)
OBLIQUE = np.array([[1.0, 0.2, 0.0, -8.0], [-0.2, 1.0, 0.1, 3.0], [0.0, -0.1, 1.5, 11.0], [0, 0, 0, 1]])
INFO = StoreInfo(
    channels=(ChannelPlan(name="T1", scheme="zscore"),),
    labels={"background": 0, "organ": 1},
    ignore_value=None,
    target_spacing=(1.0, 1.0, 1.5),
    anisotropic_axis=None,
    patch_size=(16, 12, 20),
)
CASES = tuple(f"case_{index}" for index in range(6))


def write_case(store: WritableStore, case_id: str, *, seed: int, key: str = "a" * 16) -> None:
    rng = np.random.default_rng(seed)
    image, label = rng.normal(size=(1, *SHAPE)).astype(np.float32), rng.integers(0, 2, SHAPE, dtype=np.int16)
    store.write_case(case_id, image, label, native_grid=Grid(SHAPE, OBLIQUE), source=CaseSource(key=key))


@pytest.fixture
def store(tmp_path: Path) -> WritableStore:
    store = WritableStore.create(tmp_path / "store", INFO)
    for index, case_id in enumerate(CASES):
        write_case(store, case_id, seed=index)
    return store


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """What a write to any file would change."""
    statuses = {path: path.stat() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    return {str(path.relative_to(folder)): (status.st_ino, status.st_ctime_ns) for path, status in statuses.items()}


def assert_copied(copy: Path, store: CaseStore, case_ids: tuple[str, ...]) -> None:
    """Every case of the copy, and all of `case_ids`, are those of the store, byte by byte."""
    copied, original = CaseStore(copy), CaseStore(store.folder)
    assert set(copied.case_ids) >= set(case_ids)
    for case_id in copied.case_ids:
        assert copied.record(case_id) == original.record(case_id)
        for kind in DATA_KINDS:
            assert copied.data_file(case_id, kind).read_bytes() == original.data_file(case_id, kind).read_bytes()


def in_process(function: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


def test_the_cases_asked_for_are_copied_and_the_store_is_only_read(store: CaseStore, disk: Path) -> None:
    before = state_of(store.folder)
    copy = stage_cases(store.folder, CASES[:2], disk)
    assert copy.parent == disk
    assert CaseStore(copy).case_ids == CASES[:2]
    assert_copied(copy, store, CASES[:2])
    assert state_of(store.folder) == before
    assert not (store.folder / ".lock").exists()


def test_what_is_there_is_kept_and_the_rest_is_added(
    store: CaseStore, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = stage_cases(store.folder, CASES[:2], disk)
    before = state_of(copy)
    logging.getLogger("voxfit").propagate = True
    with caplog.at_level(logging.INFO, "voxfit"):
        assert stage_cases(store.folder, CASES, disk) == copy
    assert before.items() <= state_of(copy).items()
    assert_copied(copy, store, CASES)
    assert re.search(r"4 case\(s\) copied in [\d.]+ s \([\d.]+ [MG]iB/s\), 2 were there already", caplog.text)


def test_a_copy_that_is_killed_again_and_again_holds_whole_cases_only_and_gets_done(
    store: CaseStore, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments, kills = random.Random(3), 0
    # Many small writes, so that a kill comes in the middle of a file.
    monkeypatch.setattr(staging, "BLOCK_BYTES", 1 << 10)
    torn = 0
    for _ in range(200):
        left = set(disk.rglob("*.partial.*"))
        process = in_process(lambda: stage_cases(store.folder, CASES, disk) and None)
        # A slow machine takes its time to start a process.
        while process.is_alive() and not set(disk.rglob("*.partial.*")) - left:
            sleep(0.001)
        sleep(moments.uniform(0, 0.003))
        process.kill()
        process.join()
        kills += process.exitcode != 0
        torn += bool(list(disk.rglob("*.partial.*")))
        for copy in disk.glob("*/store.json"):
            assert_copied(copy.parent, store, ())
        if process.exitcode == 0:
            break
    assert kills >= 3
    assert torn
    copy = stage_cases(store.folder, CASES, disk)
    assert_copied(copy, store, CASES)
    assert not list(disk.rglob("*.partial.*"))


def stage_and_count(store: CaseStore, case_ids: tuple[str, ...], disk: Path, out: Path) -> None:
    """Copy, and note how many cases were copied."""
    counts, real = [], staging.track
    staging.track = lambda items, **options: real([counts.append(1) or item for item in items], **options)
    stage_cases(store.folder, case_ids, disk)
    out.write_text(str(len(counts)))


@pytest.mark.parametrize("has_locks", [True, False])
def test_trainings_that_copy_at_the_same_time_share_one_whole_copy(
    store: CaseStore, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool
) -> None:
    if not has_locks:

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", refuse)
    wanted = [CASES[:4], CASES[2:], CASES, CASES]
    processes = [
        in_process(lambda index=index: stage_and_count(store, wanted[index], disk, tmp_path / f"{index}.txt"))
        for index in range(len(wanted))
    ]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    (copy,) = disk.iterdir()
    assert_copied(copy, store, CASES)
    assert not list(disk.rglob("*.partial.*"))
    copied = sum(int((tmp_path / f"{index}.txt").read_text()) for index in range(len(wanted)))
    assert copied == len(CASES) if has_locks else copied >= len(CASES)


def test_a_case_that_was_made_anew_at_its_source_is_copied_again(store: WritableStore, disk: Path) -> None:
    copy = stage_cases(store.folder, CASES, disk)
    before, old = state_of(copy), CaseStore(copy).data_file(CASES[1], "image")
    write_case(store, CASES[1], seed=77, key="b" * 16)
    assert stage_cases(store.folder, CASES, disk) == copy
    assert_copied(copy, store, CASES)
    changed = {name for name, state in state_of(copy).items() if before.get(name) != state}
    assert all(name.startswith(f"cases/{CASES[1]}.") for name in changed)
    # A training that began before may be reading it.
    assert old.is_file()


def test_a_data_file_that_was_put_right_under_its_old_name_is_copied_again(store: WritableStore, disk: Path) -> None:
    path = store.data_file(CASES[0], "image")
    times = path.stat().st_mtime_ns - 5 * 10**9
    os.utime(path, ns=(times, times))
    copy = stage_cases(store.folder, CASES[:1], disk)
    here = CaseStore(copy).data_file(CASES[0], "image")
    inode = here.stat().st_ino
    os.utime(path)
    stage_cases(store.folder, CASES[:1], disk)
    assert here.stat().st_ino != inode
    assert_copied(copy, store, CASES[:1])


@pytest.mark.parametrize("damage", ["cut short", "deleted", "record deleted"])
def test_a_copy_that_lost_something_is_completed(store: CaseStore, disk: Path, damage: str) -> None:
    copy = stage_cases(store.folder, CASES, disk)
    path = CaseStore(copy).data_file(CASES[3], "label")
    if damage == "cut short":
        os.truncate(path, 100)
    elif damage == "deleted":
        path.unlink()
    else:
        (copy / "cases" / f"{CASES[3]}.json").unlink()
    stage_cases(store.folder, CASES, disk)
    assert_copied(copy, store, CASES)


def test_bytes_that_are_not_those_that_were_written_do_not_become_a_copy(store: CaseStore, disk: Path) -> None:
    path = store.data_file(CASES[1], "image")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"image.b2nd: is damaged: its bytes are not those .* Delete it and run"):
        stage_cases(store.folder, CASES, disk)
    (copy,) = disk.iterdir()
    assert CaseStore(copy).case_ids == CASES[:1]
    assert not list(copy.rglob("*.partial.*"))
    # The advice helps.
    path.unlink()
    assert not store.is_whole(CASES[1])


def test_a_damaged_case_is_named_before_anything_is_copied(store: CaseStore, disk: Path) -> None:
    os.truncate(store.data_file(CASES[5], "voxels"), 10)
    with pytest.raises(InputError, match="voxels of case case_5 is damaged"):
        stage_cases(store.folder, CASES, disk)
    assert not list(disk.rglob("*.b2nd"))


def test_too_little_room_is_refused_before_anything_is_copied(store: CaseStore, disk: Path, tmp_path: Path) -> None:
    """With a file that takes no room where it is, and more than there is as a copy."""
    size, path = shutil.disk_usage(tmp_path).free + (1 << 30), store.data_file(CASES[2], "image")
    os.truncate(path, size)
    record = store.folder / "cases" / f"{CASES[2]}.json"
    values = json.loads(record.read_text())
    values["data_bytes"]["image"] = size
    record.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"GiB of the store are to be copied here and .* are free. Give --stage_to"):
        stage_cases(store.folder, CASES, disk)
    assert not list(disk.rglob("*.b2nd"))
    stage_cases(store.folder, CASES[3:], disk)


def test_a_case_of_an_earlier_version_has_no_checksum_and_is_copied_all_the_same(store: CaseStore, disk: Path) -> None:
    record = store.folder / "cases" / f"{CASES[0]}.json"
    values = json.loads(record.read_text())
    assert set(values.pop("data_crc32")) == set(DATA_KINDS)
    record.write_text(json.dumps(values))
    copy = stage_cases(store.folder, CASES[:1], disk)
    before = state_of(copy)
    assert_copied(stage_cases(store.folder, CASES[:1], disk), store, CASES[:1])
    assert state_of(copy) == before


def test_other_stores_have_folders_of_their_own(store: CaseStore, disk: Path, tmp_path: Path) -> None:
    other = WritableStore.create(tmp_path / "other", INFO)
    write_case(other, CASES[0], seed=50)
    copies = [stage_cases(each.folder, CASES[:1], disk) for each in (store, other)]
    assert copies[0] != copies[1]
    for copy, each in zip(copies, (store, other), strict=True):
        assert_copied(copy, each, CASES[:1])


def test_a_folder_that_cannot_be_made_is_one_message(store: CaseStore, disk: Path) -> None:
    disk.write_text("a file")
    with pytest.raises(InputError, match=r"cannot be written .* or leave stage_to out"):
        stage_cases(store.folder, CASES, disk)
