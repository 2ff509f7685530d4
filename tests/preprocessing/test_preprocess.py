"""From files to the store: geometry kept, resumed case by case, nothing redone that need not be."""

from __future__ import annotations

import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline.datasets.dataset import Case, Dataset, read_case_image, read_case_label, read_dataset
from pipeline.errors import InputError
from pipeline.geometry import spacing_of
from pipeline.io.volume import Volume
from pipeline.plan import ChannelPlan, Plan
from pipeline.preprocessing.preprocess import prepare_image, prepare_label, preprocess_dataset
from pipeline.preprocessing.restore import restore_label
from pipeline.preprocessing.workers import estimate_case_bytes, fitting_num_workers
from pipeline.store import IGNORE_INDEX, CaseStore

MakeDataset = Callable[..., Dataset]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def fill(dataset: Dataset, plan: Plan, folder: Path, **options: object) -> dict[str, str]:
    return preprocess_dataset(dataset, plan, folder, **{"num_workers": 1, "leave_out": {}, **options})


def data_times(folder: Path) -> dict[str, int]:
    """When each data file was written: equal times mean that it was not made anew."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("cases/*.b2nd"))}


def remade(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name.split(".")[0] for name, written in after.items() if before.get(name) != written}


def contents(folder: Path) -> dict[str, tuple]:
    """Everything a store says of its cases, voxels included, without times."""
    store = CaseStore(folder)
    result = {}
    for case_id in store.case_ids:
        record = replace(store.record(case_id), files=())
        image, label = store.read_case(case_id)
        voxels = [store.foreground_voxels(case_id, index).tobytes() for index in (1, 2)]
        result[case_id] = (record, image.tobytes(), label.tobytes(), voxels)
    return result


# ---- one case


def test_a_case_is_cropped_resampled_and_normalised_on_its_ras_grid(
    make_dataset: MakeDataset, plan: Plan, folder: Path
) -> None:
    dataset = make_dataset()
    assert fill(dataset, plan, folder) == {}
    store = CaseStore(folder)
    assert store.case_ids == ("case_00", "case_01", "case_02")
    native = read_case_image(dataset.cases[0])
    image, label = store.read_case("case_00")
    record = store.record("case_00")
    # File axes are L, I, P: two planes of zeros begin the first (they end R), one ends the third (it begins A).
    assert record.native_shape == native.grid.shape == (19, 16, 14)
    assert (record.crop_start, record.crop_shape) == ((0, 1, 0), (17, 15, 14))
    assert record.patient == "p_case_00"
    np.testing.assert_allclose(record.spacing, plan.target_spacing, rtol=0.06)
    expected = np.round(np.array(record.crop_shape) * native.spacing / np.array(plan.target_spacing))
    np.testing.assert_array_equal(record.shape, expected)
    assert image.shape == (1, *record.shape)
    assert abs(image.mean()) < 0.1
    assert set(np.unique(label)) == {IGNORE_INDEX, 0, 1, 2}


def test_training_and_prediction_see_the_same_voxels(make_dataset: MakeDataset, plan: Plan, folder: Path) -> None:
    dataset = make_dataset(1, num_channels=2)
    two = replace(plan, channels=(plan.channels[0], ChannelPlan(name="CT", scheme="ct", upper=80, mean=60, std=9)))
    assert fill(dataset, two, folder) == {}
    image, label = CaseStore(folder).read_case("case_00")
    prepared = prepare_image(read_case_image(dataset.cases[0]), two)
    np.testing.assert_array_equal(image, prepared.array)
    np.testing.assert_array_equal(label, prepare_label(read_case_label(dataset.cases[0]), prepared, two))


def test_organs_are_where_their_voxels_are_in_space(make_dataset: MakeDataset, plan: Plan) -> None:
    case = make_dataset(1).cases[0]
    prepared = prepare_image(read_case_image(case), plan)
    label = prepare_label(read_case_label(case), prepared, plan)
    file = nib.load(case.label)

    def centre(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
        return affine[:3, :3] @ np.argwhere(mask).mean(axis=0) + affine[:3, 3]

    for value, index in ((3, 1), (7, 2)):
        truth = centre(np.asarray(file.dataobj) == value, file.affine)
        # Half a voxel: the edge of a tube as thin as this one falls on other voxel centres.
        assert np.linalg.norm(centre(label == index, prepared.grid.affine) - truth) < 0.6


def test_at_the_native_spacing_voxels_are_those_of_the_file(make_dataset: MakeDataset, plan: Plan) -> None:
    case = make_dataset(1).cases[0]
    volume = read_case_image(case)
    same = replace(plan, target_spacing=volume.spacing, channels=(ChannelPlan(name="x", scheme="none"),))
    prepared = prepare_image(volume, same)
    box = tuple(slice(a, a + n) for a, n in zip(prepared.crop_start, prepared.crop_shape, strict=True))
    np.testing.assert_array_equal(prepared.array, volume.array[(slice(None), *box)])


def test_a_wrong_number_of_channels_and_nan_are_said_with_the_file(make_dataset: MakeDataset, plan: Plan) -> None:
    volume = read_case_image(make_dataset(1, num_channels=2).cases[0])
    with pytest.raises(InputError, match=r"case_00_0000.nii.gz: has 2 channel\(s\), the plan has 1 \(T1\)"):
        prepare_image(volume, plan)
    broken = Volume(np.full_like(volume.array[:1], np.nan), volume.grid, volume.source)
    with pytest.raises(InputError, match=r"case_00_0000.nii.gz: the image holds NaN"):
        prepare_image(broken, plan)


def test_an_image_of_zeros_is_prepared_whole(plan: Plan) -> None:
    prepared = prepare_image(Volume.from_array(np.zeros((6, 8, 5)), np.diag([1.2, 1.6, 1.3, 1])), plan)
    assert prepared.crop_shape == (6, 8, 5)
    np.testing.assert_array_equal(prepared.array, np.zeros((1, 6, 8, 5)))


# ---- resuming


def test_a_second_run_writes_nothing(make_dataset: MakeDataset, plan: Plan, folder: Path) -> None:
    dataset = make_dataset()
    fill(dataset, plan, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    assert fill(dataset, plan, folder) == {}
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"} == before


def test_a_touched_file_is_hashed_again_but_its_case_is_not_made_anew(
    make_dataset: MakeDataset, plan: Plan, folder: Path
) -> None:
    dataset = make_dataset()
    fill(dataset, plan, folder)
    before = data_times(folder)
    os.utime(dataset.cases[1].images[0], ns=(1, 1))
    assert fill(dataset, plan, folder) == {}
    assert data_times(folder) == before
    assert CaseStore(folder).record("case_01").files[0].mtime_ns == 1


@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_changed_file_redoes_its_case_alone(make_dataset: MakeDataset, plan: Plan, folder: Path, kind: str) -> None:
    dataset = make_dataset()
    fill(dataset, plan, folder)
    before, old = data_times(folder), contents(folder)
    path = dataset.cases[1].label if kind == "label" else dataset.cases[1].images[0]
    file = nib.load(path)
    voxels = np.asarray(file.dataobj).copy()
    voxels[10, 8, 5] = 0
    nib.save(nib.Nifti1Image(voxels, file.affine), path)
    assert fill(dataset, plan, folder) == {}
    assert remade(before, data_times(folder)) == {"case_01"}
    assert len(data_times(folder)) == 9
    new = contents(folder)
    assert {case_id for case_id in new if new[case_id] != old[case_id]} == {"case_01"}


def test_plan_keys_that_voxels_do_not_follow_from_redo_nothing(
    make_dataset: MakeDataset, plan: Plan, folder: Path
) -> None:
    dataset = make_dataset()
    fill(dataset, plan, folder)
    before = data_times(folder)
    other = replace(plan, patch_size=(8, 16, 8), batch_size=4, labels={"bg": 0, "a": 3, "b": 7}, dataset_name="renamed")
    assert fill(dataset, other, folder) == {}
    assert data_times(folder) == before
    assert CaseStore(folder).info.patch_size == (8, 16, 8)
    CaseStore(folder).check_plan(other)


@pytest.mark.parametrize(
    "change",
    [
        {"target_spacing": (1.2, 1.6, 1.8)},
        {"anisotropic_axis": 1},
        {"channels": (ChannelPlan(name="T1", scheme="none"),)},
        {"channels": (ChannelPlan(name="T1", scheme="zscore", use_body_mask=True),)},
        {"labels": {"background": 0, "vessel": 7, "organ": 3}},
    ],
)
def test_plan_keys_that_voxels_follow_from_redo_every_case(
    make_dataset: MakeDataset, plan: Plan, folder: Path, change: dict
) -> None:
    dataset = make_dataset(2)
    fill(dataset, plan, folder)
    before, old = data_times(folder), contents(folder)
    other = replace(plan, **change)
    assert fill(dataset, other, folder) == {}
    assert remade(before, data_times(folder)) == {"case_00", "case_01"}
    assert all(contents(folder)[case_id] != old[case_id] for case_id in old)
    CaseStore(folder).check_plan(other)


def test_cases_that_another_plan_made_are_announced_with_what_differs_before_they_go(
    make_dataset: MakeDataset, plan: Plan, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make_dataset(2)
    with caplog.at_level(logging.WARNING):
        fill(dataset, plan, folder)
        fill(dataset, replace(plan, patch_size=(8, 16, 8)), folder)
        assert not caplog.messages
        fill(dataset, replace(plan, target_spacing=(1.2, 1.6, 1.8)), folder)
    (message,) = caplog.messages
    assert "target_spacing: [1.2, 1.6, 1.3], the plan has [1.2, 1.6, 1.8]" in message
    assert "2 case(s) are removed" in message


@pytest.mark.parametrize("change", [{}, {"target_spacing": (1.2, 1.6, 1.8)}])
def test_the_store_of_another_dataset_is_refused_and_left_as_it_is(
    make_dataset: MakeDataset, plan: Plan, folder: Path, change: dict
) -> None:
    dataset = make_dataset(4)
    fill(replace(dataset, cases=dataset.cases[:2]), plan, folder)
    before = contents(folder)
    with pytest.raises(InputError, match=r"store of another dataset: none of its 2 case\(s\) \(case_00, case_01\)"):
        fill(replace(dataset, cases=dataset.cases[2:]), replace(plan, **change), folder)
    assert contents(folder) == before
    assert CaseStore(folder).info.target_spacing == plan.target_spacing


def test_an_empty_store_and_one_of_cases_left_out_may_be_filled(
    make_dataset: MakeDataset, plan: Plan, folder: Path
) -> None:
    dataset = make_dataset(4)
    everything = {case.case_id: "bad" for case in dataset.cases}
    fill(replace(dataset, cases=dataset.cases[:2]), plan, folder, leave_out=everything)
    assert CaseStore(folder).case_ids == ()
    fill(replace(dataset, cases=dataset.cases[2:]), plan, folder)
    fill(dataset, plan, folder, leave_out={"case_02": "bad", "case_03": "bad"})
    assert CaseStore(folder).case_ids == ("case_00", "case_01")


def test_cases_that_left_the_dataset_or_are_left_out_leave_the_store(
    make_dataset: MakeDataset, plan: Plan, folder: Path, without: Callable[[Dataset, str], Dataset]
) -> None:
    dataset = make_dataset()
    fill(dataset, plan, folder)
    assert fill(without(dataset, "case_00"), plan, folder, leave_out={"case_02": "bad"}) == {}
    assert CaseStore(folder).case_ids == ("case_01",)
    assert {name.split(".")[0] for name in data_times(folder)} == {"case_01"}


def test_a_damaged_case_is_made_anew(make_dataset: MakeDataset, plan: Plan, folder: Path) -> None:
    dataset = make_dataset()
    fill(dataset, plan, folder)
    before, old = data_times(folder), contents(folder)
    path = next(folder.glob("cases/case_01.*.image.b2nd"))
    path.write_bytes(path.read_bytes()[:-7])
    (folder / "cases" / "case_02.json").write_text('{"case_id": "case_0')
    assert fill(dataset, plan, folder) == {}
    assert remade(before, data_times(folder)) == {"case_01", "case_02"}
    assert contents(folder) == old


def test_a_new_patient_is_noted_without_redoing_the_case(make_dataset: MakeDataset, plan: Plan, folder: Path) -> None:
    dataset = make_dataset(1)
    fill(dataset, plan, folder)
    before = data_times(folder)
    fill(replace(dataset, cases=(replace(dataset.cases[0], patient="someone"),)), plan, folder)
    assert data_times(folder) == before
    assert CaseStore(folder).record("case_00").patient == "someone"


# ---- failures


@pytest.mark.parametrize("num_workers", [1, 2])
def test_bad_cases_are_returned_with_their_reasons_and_the_rest_is_done(
    make_dataset: MakeDataset, plan: Plan, folder: Path, num_workers: int
) -> None:
    dataset = make_dataset(5)
    fill(dataset, plan, folder)
    truncated = dataset.cases[1].images[0]
    truncated.write_bytes(truncated.read_bytes()[:200])
    wild = nib.load(dataset.cases[3].label)
    nib.save(nib.Nifti1Image(np.asarray(wild.dataobj) + np.uint8(40), wild.affine), dataset.cases[3].label)
    no_label = replace(dataset.cases[4], label=None)
    failures = fill(replace(dataset, cases=(*dataset.cases[:4], no_label)), plan, folder, num_workers=num_workers)
    assert list(failures) == ["case_01", "case_03", "case_04"]
    assert "case_01_0000.nii.gz" in failures["case_01"]
    assert "the label holds [40, 43, 47, 49], the plan knows [0, 3, 7, 9]" in failures["case_03"]
    assert "has no label" in failures["case_04"]
    assert all("\n" not in reason for reason in failures.values())
    # What the store held of them was made from other files.
    assert CaseStore(folder).case_ids == ("case_00", "case_02")


def test_a_missing_file_is_a_failure_of_its_case(make_dataset: MakeDataset, plan: Plan, folder: Path) -> None:
    dataset = make_dataset(2)
    dataset.cases[0].images[0].unlink()
    failures = fill(dataset, plan, folder)
    assert list(failures) == ["case_00"]
    assert "case_00_0000.nii.gz: cannot be read" in failures["case_00"]


def test_a_folder_of_other_files_is_refused_before_anything_is_written(make_dataset: MakeDataset, plan: Plan) -> None:
    dataset = make_dataset(1)
    before = sorted(dataset.root.rglob("*"))
    with pytest.raises(InputError, match="holds files but is no store"):
        fill(dataset, plan, dataset.root)
    assert sorted(dataset.root.rglob("*")) == before


# ---- killed, and in parallel


NUM_KILLED = 24
RUN = """
import pickle, resource, signal, sys
from pathlib import Path
from pipeline.preprocessing.preprocess import preprocess_dataset
dataset, plan, folder, num_workers, largest_file = pickle.load(sys.stdin.buffer)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
preprocess_dataset(dataset, plan, Path(folder), num_workers=num_workers, leave_out={})
"""


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_run_goes_on_where_it_was_and_ends_as_if_it_had_not_been_killed(
    make_dataset: MakeDataset, plan: Plan, folder: Path, tmp_path: Path, num_workers: int
) -> None:
    dataset = make_dataset(NUM_KILLED)
    fill(dataset, plan, tmp_path / "uninterrupted")
    with subprocess.Popen([sys.executable, "-c", RUN], stdin=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None
        process.stdin.write(pickle.dumps((dataset, plan, str(folder), num_workers, resource.RLIM_INFINITY)))
        process.stdin.close()
        while len(list(folder.glob("cases/case_*.json"))) < 3 and process.poll() is None:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
    finished = CaseStore(folder).case_ids
    assert 3 <= len(finished) < NUM_KILLED
    before = data_times(folder)
    assert fill(dataset, plan, folder) == {}
    assert remade(before, data_times(folder)) == {case.case_id for case in dataset.cases} - set(finished)
    assert contents(folder) == contents(tmp_path / "uninterrupted")
    assert not list(folder.rglob("*.partial.*"))
    assert len(data_times(folder)) == 3 * NUM_KILLED


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_store_that_cannot_be_written_ends_the_run_and_keeps_what_is_there(
    make_dataset: MakeDataset, plan: Plan, folder: Path, num_workers: int
) -> None:
    dataset = make_dataset(4)
    fill(replace(dataset, cases=dataset.cases[:2]), plan, folder)
    before = contents(folder)
    payload = pickle.dumps((dataset, plan, str(folder), num_workers, 5000))
    done = subprocess.run([sys.executable, "-c", RUN], input=payload, capture_output=True, check=False)
    last = done.stderr.decode().strip().splitlines()[-1]
    assert "StoreWriteError" in last
    assert "cannot write" in last
    assert b"Warning" not in done.stderr
    assert contents(folder) == before
    assert not list(folder.rglob("*.partial.*"))


def test_workers_and_one_process_make_the_same_store(
    make_dataset: MakeDataset, plan: Plan, folder: Path, tmp_path: Path
) -> None:
    dataset = make_dataset(4)
    fill(dataset, plan, tmp_path / "one", num_workers=1)
    fill(dataset, plan, folder, num_workers=2)
    assert contents(folder) == contents(tmp_path / "one")


def test_neither_this_process_nor_a_worker_imports_torch_monai_or_lightning() -> None:
    script = (
        "import sys; import pipeline.preprocessing.restore; from pipeline.parallel import map_unordered\n"
        "from pipeline.preprocessing.preprocess import preprocess_case\n"
        "heavy = lambda case: (preprocess_case.__name__, {'torch', 'monai', 'pytorch_lightning'} & set(sys.modules))\n"
        "print(heavy(0), *(outcome.result for outcome in map_unordered(heavy, [1, 2], num_workers=2)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == " ".join(["('preprocess_case', set())"] * 3)


def test_little_work_starts_no_processes_and_large_cases_start_fewer(
    make_dataset: MakeDataset, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = make_dataset(3).cases
    assert fitting_num_workers(cases, plan, "auto") == 1
    assert fitting_num_workers(cases, plan, 3) == 3
    needed = estimate_case_bytes(cases, plan)
    monkeypatch.setattr("pipeline.preprocessing.workers.FEW_BYTES", 0)
    monkeypatch.setattr("pipeline.allocation.allotted_cpus", lambda: 8)
    for room, expected in ((8, 8), (3, 3), (0.5, 1)):
        monkeypatch.setattr("pipeline.allocation.allotted_memory_bytes", lambda room=room: int(needed * room / 0.8) + 8)
        assert fitting_num_workers(cases, plan, "auto") == expected


def test_the_memory_estimate_grows_with_the_largest_case_and_the_resolution(
    make_dataset: MakeDataset, plan: Plan
) -> None:
    cases = make_dataset(3).cases
    base = estimate_case_bytes(cases[:1], plan)
    assert estimate_case_bytes(cases, plan) > base
    assert estimate_case_bytes(cases[:1], replace(plan, target_spacing=(0.3, 0.3, 0.3))) > base
    broken = Case(case_id="x", images=(cases[0].images[0].with_name("none.nii.gz"),), label=None)
    assert estimate_case_bytes([broken], plan) < base


# ---- real volumes


def test_real_labels_survive_there_and_back(shared_data: Path, plan: Plan) -> None:
    dataset = read_dataset(shared_data / "hippocampus")
    real = replace(plan, labels=dataset.labels, ignore_value=None, target_spacing=(0.8, 1.1, 1.25))
    case = dataset.cases[7]
    label = read_case_label(case)
    prepared = prepare_image(read_case_image(case), real)
    indices = prepare_label(label, prepared, real)
    scores = np.stack([indices == index for index in range(real.num_classes)]).astype(np.float32)
    restored = restore_label(scores, prepared, real)
    for value in (1, 2):
        a, b = restored == value, label.array[0] == value
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.93


def test_a_real_spinal_cord_of_thick_slices_comes_back_on_its_own_grid(shared_data: Path, plan: Plan) -> None:
    images = sorted(shared_data.glob("spinal_cord/**/*.nii.gz"))
    volume = min((read_case_image(Case(case_id="x", images=(path,), label=None)) for path in images), key=_num_voxels)
    axis = int(np.argmax(volume.spacing))
    spacing = list(volume.spacing)
    spacing[axis] /= 1.5
    thick = replace(plan, target_spacing=tuple(spacing), anisotropic_axis=axis)
    prepared = prepare_image(volume, thick)
    np.testing.assert_allclose(prepared.grid.spacing, spacing, rtol=0.1)
    scores = np.zeros((3, *prepared.grid.shape), np.float32)
    scores[1] = prepared.array[0]
    restored = restore_label(scores, prepared, thick)
    assert restored.shape == volume.grid.shape
    np.testing.assert_allclose(spacing_of(prepared.native_grid.affine), volume.spacing)


def _num_voxels(volume: Volume) -> int:
    return volume.array.size
