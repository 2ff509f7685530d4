"""A store filled in shares: by processes that meet, are killed, or do the same work, and the check at the end."""

from __future__ import annotations

import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.datasets.dataset import Dataset
from pipeline.errors import InputError
from pipeline.plan import Plan
from pipeline.preprocessing.preprocess import preprocess_dataset
from pipeline.preprocessing.shards import LEFTOVER_SECONDS, preprocess_share, share_of, verify_store
from pipeline.store import CaseStore, WritableStore, fill_store

MakeDataset = Callable[..., Dataset]
SHARE = """
import pickle, sys
from pathlib import Path
from pipeline.preprocessing.shards import preprocess_share
folder, dataset, plan, share = pickle.load(sys.stdin.buffer)
print(preprocess_share(dataset, plan, Path(folder), share, num_workers=1), flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def start_share(
    folder: Path, dataset: Dataset, plan: Plan, share: tuple[int, int], code: str = SHARE
) -> subprocess.Popen[bytes]:
    """A process of its own that makes a share."""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(pickle.dumps((str(folder), dataset, plan, share)))
    process.stdin.close()
    return process


def finish(processes: list[subprocess.Popen[bytes]]) -> list[str]:
    """What they print, once they have ended well."""
    outputs = []
    for process in processes:
        assert process.stdout is not None
        outputs.append(process.stdout.read().decode().strip())
        assert process.wait(60) == 0
        process.stdout.close()
    return outputs


def data_bytes(folder: Path) -> dict[str, bytes]:
    """Every data file of a store."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("cases/*.b2nd"))}


def assert_no_half_case(folder: Path) -> None:
    store = CaseStore(folder)
    for case_id in store.case_ids:
        store.read_case(case_id)


# ---- who makes what


@given(ids=st.sets(st.text(min_size=1, max_size=4), max_size=40), count=st.integers(1, 12))
def test_shares_have_every_case_once_and_are_of_even_size(ids: set[str], count: int) -> None:
    shares = [share_of(ids, (number, count)) for number in range(1, count + 1)]
    assert sorted(case_id for share in shares for case_id in share) == sorted(ids)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_together_make_the_store_that_one_run_makes_to_the_byte(
    make_dataset: MakeDataset, plan: Plan, folder: Path, tmp_path: Path
) -> None:
    dataset = make_dataset(5)
    preprocess_dataset(dataset, plan, tmp_path / "whole", num_workers=1)
    for number in (2, 1, 3):
        assert preprocess_share(dataset, plan, folder, (number, 3), num_workers=1) == {}
    assert data_bytes(folder) == data_bytes(tmp_path / "whole")
    assert verify_store(dataset, plan, folder) == {}
    assert (folder / "store.json").read_text() == (tmp_path / "whole" / "store.json").read_text()


def test_a_share_without_a_case_makes_an_empty_store(make_dataset: MakeDataset, plan: Plan, folder: Path) -> None:
    assert preprocess_share(make_dataset(2), plan, folder, (3, 3), num_workers=1) == {}
    assert CaseStore(folder).case_ids == ()


def test_a_share_tells_of_its_own_failures_only_and_takes_no_case_left_out(
    make_dataset: MakeDataset, plan: Plan, folder: Path
) -> None:
    dataset = make_dataset(4)
    dataset.cases[2].images[0].write_bytes(b"no image")
    assert preprocess_share(dataset, plan, folder, (2, 2), num_workers=1, leave_out={"case_01"}) == {}
    assert CaseStore(folder).case_ids == ("case_03",)
    assert list(preprocess_share(dataset, plan, folder, (1, 2), num_workers=1)) == ["case_02"]
    assert verify_store(dataset, plan, folder, leave_out={"case_01"}) == {"case_02": "is missing"}


# ---- processes that meet


def test_shares_that_start_at_once_with_each_twice_make_one_whole_store(
    make_dataset: MakeDataset, plan: Plan, folder: Path, tmp_path: Path
) -> None:
    dataset = make_dataset(6)
    preprocess_dataset(dataset, plan, tmp_path / "whole", num_workers=1)
    # Two jobs with the same share, and one that overlaps with all.
    shares = [(1, 2), (2, 2), (1, 2), (2, 2), (1, 1)]
    assert finish([start_share(folder, dataset, plan, share) for share in shares]) == ["{}"] * len(shares)
    assert data_bytes(folder) == data_bytes(tmp_path / "whole")
    assert verify_store(dataset, plan, folder) == {}
    assert not list(folder.rglob("*.partial.*"))


def test_without_any_file_locks_it_is_the_same(
    make_dataset: MakeDataset, plan: Plan, folder: Path, tmp_path: Path
) -> None:
    dataset = make_dataset(4)
    preprocess_dataset(dataset, plan, tmp_path / "whole", num_workers=1)
    no_locks = "import fcntl\ndef refuse(*_): raise OSError('no locks here')\nfcntl.flock = refuse\n" + SHARE
    finish([start_share(folder, dataset, plan, (1, 1), no_locks) for _ in range(3)])
    assert data_bytes(folder) == data_bytes(tmp_path / "whole")
    assert_no_half_case(folder)


def test_killed_shares_leave_no_half_case_and_their_repetition_finishes(
    make_dataset: MakeDataset, plan: Plan, folder: Path, tmp_path: Path
) -> None:
    dataset = make_dataset(16)
    preprocess_dataset(dataset, plan, tmp_path / "whole", num_workers=1)
    seed = random.Random(0)
    for _ in range(3):
        running = [start_share(folder, dataset, plan, share) for share in [(1, 2), (2, 2), (1, 2)]]
        held = len(list(folder.glob("cases/[!.]*.json")))
        # From the first case that is made here on, a kill may fall anywhere.
        while len(list(folder.glob("cases/[!.]*.json"))) == held < len(dataset.cases):
            time.sleep(0.002)
            if all(process.poll() is not None for process in running):
                break
        time.sleep(seed.uniform(0, 0.03))
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        assert_no_half_case(folder)
    missing = verify_store(dataset, plan, folder)
    assert set(missing) == {case.case_id for case in dataset.cases} - set(CaseStore(folder).case_ids)
    finish([start_share(folder, dataset, plan, share) for share in [(1, 2), (2, 2)]])
    assert verify_store(dataset, plan, folder) == {}
    whole = data_bytes(tmp_path / "whole")
    assert {name: data for name, data in data_bytes(folder).items() if name in whole} == whole


def test_a_case_that_another_process_finished_meanwhile_is_not_written_again(
    make_dataset: MakeDataset, plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(1)
    from pipeline.preprocessing import preprocess

    prepare = preprocess.prepare_image

    def slow(*arguments: object) -> object:
        monkeypatch.setattr(preprocess, "prepare_image", prepare)
        preprocess_share(dataset, plan, folder, (1, 1), num_workers=1)
        written.update({path.name: path.stat().st_mtime_ns for path in folder.glob("cases/*.b2nd")})
        return prepare(*arguments)

    written: dict[str, int] = {}
    monkeypatch.setattr(preprocess, "prepare_image", slow)
    preprocess_share(dataset, plan, folder, (1, 1), num_workers=1)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("cases/*.b2nd")} == written != {}


def test_a_run_without_shares_and_shares_keep_out_of_each_other_s_way_where_there_are_locks(
    make_dataset: MakeDataset, plan: Plan, folder: Path
) -> None:
    dataset = make_dataset(2)
    preprocess_share(dataset, plan, folder, (1, 2), num_workers=1)
    info = CaseStore(folder).info
    with fill_store(folder, info), pytest.raises(InputError, match="another process is filling"):
        preprocess_share(dataset, plan, folder, (2, 2), num_workers=1)
    with (
        fill_store(folder, info, shared=True),
        fill_store(folder, info, shared=True),
        pytest.raises(InputError, match="another process is filling"),
        fill_store(folder, info),
    ):
        pass


def test_a_share_of_another_plan_is_refused_and_takes_nothing_away(
    make_dataset: MakeDataset, plan: Plan, folder: Path
) -> None:
    dataset = make_dataset(2)
    preprocess_share(dataset, plan, folder, (1, 1), num_workers=1)
    before = data_bytes(folder)
    with pytest.raises(InputError, match=r"made by another plan \(target_spacing: .*Give another folder"):
        preprocess_share(dataset, replace(plan, target_spacing=(2, 2, 2)), folder, (1, 2), num_workers=1)
    with pytest.raises(InputError, match="made by another plan"):
        verify_store(dataset, replace(plan, target_spacing=(2, 2, 2)), folder)
    assert data_bytes(folder) == before


def test_the_store_of_another_dataset_is_neither_shared_nor_verified_and_left_as_it_is(
    make_dataset: MakeDataset, plan: Plan, folder: Path
) -> None:
    dataset = make_dataset(4)
    first, second = (replace(dataset, cases=cases) for cases in (dataset.cases[:2], dataset.cases[2:]))
    preprocess_share(first, plan, folder, (1, 1), num_workers=1)
    before = data_bytes(folder)
    told = r"store of another dataset: none of its 2 case\(s\) \(case_00, case_01\).*Give another folder"
    with pytest.raises(InputError, match=told):
        preprocess_share(second, plan, folder, (1, 2), num_workers=1)
    with pytest.raises(InputError, match=told):
        verify_store(second, plan, folder)
    assert data_bytes(folder) == before


def test_a_case_whose_data_were_swept_while_it_was_made_does_not_exist(
    make_dataset: MakeDataset, plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(1)
    write = WritableStore.write_record

    def swept_first(store: WritableStore, record: object) -> None:
        WritableStore(store.folder).sweep()
        write(store, record)

    monkeypatch.setattr(WritableStore, "write_record", swept_first)
    with pytest.raises(InputError, match=r"were removed while it was made.*Run the same command again"):
        preprocess_share(dataset, plan, folder, (1, 1), num_workers=1)
    assert CaseStore(folder).case_ids == ()


# ---- the check at the end


def test_verify_names_missing_damaged_and_outdated_cases_and_not_touched_ones(
    make_dataset: MakeDataset, plan: Plan, folder: Path
) -> None:
    dataset = make_dataset(5)
    preprocess_dataset(dataset, plan, folder, num_workers=1)
    (folder / "cases" / "case_01.json").unlink()
    image = next(folder.glob("cases/case_02.*.image.b2nd"))
    image.write_bytes(image.read_bytes()[:-1])
    import nibabel as nib

    changed = nib.load(dataset.cases[3].images[0])
    nib.save(nib.Nifti1Image(np.asarray(changed.dataobj) + np.int16(1), changed.affine), dataset.cases[3].images[0])
    os.utime(dataset.cases[4].images[0], (1, 1))
    expected = {"case_01": "is missing", "case_02": "is damaged", "case_03": "was made from other files"}
    assert verify_store(dataset, plan, folder) == expected
    assert preprocess_share(dataset, plan, folder, (1, 1), num_workers=1) == {}
    assert verify_store(dataset, plan, folder) == {}


def test_only_verify_and_a_run_without_shares_remove_cases_that_are_not_wanted(
    make_dataset: MakeDataset, plan: Plan, folder: Path, without: Callable[[Dataset, str], Dataset]
) -> None:
    dataset = make_dataset(3)
    preprocess_share(dataset, plan, folder, (1, 1), num_workers=1)
    fewer = without(dataset, "case_01")
    preprocess_share(fewer, plan, folder, (1, 1), num_workers=1, leave_out={"case_02"})
    assert CaseStore(folder).case_ids == ("case_00", "case_01", "case_02")
    assert verify_store(fewer, plan, folder, leave_out={"case_02"}) == {}
    assert CaseStore(folder).case_ids == ("case_00",)


def test_verify_removes_leftovers_only_when_nobody_can_be_writing_them(
    make_dataset: MakeDataset, plan: Plan, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make_dataset(1)
    preprocess_share(dataset, plan, folder, (1, 1), num_workers=1)
    young, old = (folder / "cases" / f"{name}.{'a' * 16}.image.b2nd" for name in ("young", "old"))
    for path in (young, old):
        path.write_bytes(b"data without a record")
    past = time.time() - LEFTOVER_SECONDS - 60
    os.utime(old, (past, past))
    logger = logging.getLogger("voxfit")
    logger.addHandler(caplog.handler)
    with fill_store(folder, CaseStore(folder).info, shared=True):
        assert verify_store(dataset, plan, folder) == {}
    logger.removeHandler(caplog.handler)
    assert "nothing is removed" in caplog.text
    assert old.exists()
    assert verify_store(dataset, plan, folder) == {}
    assert (young.exists(), old.exists()) == (True, False)


def test_verify_of_no_store_and_of_another_dataset_s_is_refused(
    make_dataset: MakeDataset, plan: Plan, folder: Path
) -> None:
    dataset = make_dataset(2)
    with pytest.raises(InputError, match="is no store"):
        verify_store(dataset, plan, folder)
    preprocess_share(dataset, plan, folder, (1, 1), num_workers=1)
    other = replace(dataset, cases=tuple(replace(case, case_id=f"x_{case.case_id}") for case in dataset.cases))
    with pytest.raises(InputError, match="another dataset"):
        verify_store(other, plan, folder)
    assert len(CaseStore(folder).case_ids) == 2
