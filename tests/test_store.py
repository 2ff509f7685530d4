"""The store: whole cases or none, patches as numpy would cut them, clear errors for damage and foreign folders."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.geometry import Grid
from pipeline.plan import ChannelPlan, Plan
from pipeline.store import (
    IGNORE_INDEX,
    CaseSource,
    CaseStore,
    PatchLocation,
    SourceFile,
    StoreInfo,
    WritableStore,
    fill_store,
)
from pipeline.store.chunks import fitted_chunks, read_array, write_array
from pipeline.store.foreground import MAX_SAMPLED_VOXELS

SHAPE = (33, 21, 40)
OBLIQUE = np.array([[1.0, 0.2, 0.0, -8.0], [-0.2, 1.0, 0.1, 3.0], [0.0, -0.1, 1.5, 11.0], [0, 0, 0, 1]])
INFO = StoreInfo(
    channels=(ChannelPlan(name="T1", scheme="zscore"), ChannelPlan(name="CT", scheme="ct", upper=300.0)),
    labels={"background": 0, "organ": 5, "vessel": 2},
    ignore_value=9,
    target_spacing=(1.0, 1.0, 1.5),
    anisotropic_axis=None,
    patch_size=(16, 12, 20),
)


def make_arrays(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, shape, dtype=np.int16)
    label[4:7, 5:9, 2:3] = 2
    label[:2] = IGNORE_INDEX
    return rng.normal(size=(2, *shape)).astype(np.float32), label


@pytest.fixture
def store(tmp_path: Path) -> WritableStore:
    store = WritableStore.create(tmp_path / "store", INFO)
    store.write_case("case_a", *make_arrays(), native_grid=Grid(SHAPE, OBLIQUE))
    return store


def files_of(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ---- reading


def test_a_patch_is_the_cut_of_the_zero_padded_volume_wherever_it_lies(store: WritableStore) -> None:
    image, label = make_arrays()
    reader = CaseStore(store.folder)
    rng, margin = np.random.default_rng(1), 30
    padded_image = np.pad(image, [(0, 0)] + [(margin, margin)] * 3)
    padded_label = np.pad(label, margin)
    for _ in range(40):
        size = tuple(int(n) for n in rng.integers(1, 29, 3))
        start = tuple(int(rng.integers(-margin, n + margin - s + 1)) for n, s in zip(SHAPE, size, strict=True))
        cut = tuple(slice(a + margin, a + margin + n) for a, n in zip(start, size, strict=True))
        got_image, got_label = reader.read_patch("case_a", PatchLocation(start, size))
        assert (got_image.dtype, got_label.dtype) == (np.float32, np.int16)
        np.testing.assert_array_equal(got_image, padded_image[(slice(None), *cut)])
        np.testing.assert_array_equal(got_label, padded_label[cut])


def test_a_patch_wholly_outside_is_zero(store: WritableStore) -> None:
    image, label = store.read_patch("case_a", PatchLocation((SHAPE[0], 0, 0), (3, 4, 5)))
    assert image.shape == (2, 3, 4, 5)
    assert not image.any()
    assert not label.any()


def test_a_case_comes_back_to_the_bit_with_its_ignored_voxels(store: WritableStore) -> None:
    image, label = store.read_case("case_a")
    np.testing.assert_array_equal(image, make_arrays()[0])
    np.testing.assert_array_equal(label, make_arrays()[1])
    assert (label == IGNORE_INDEX).sum() == 2 * SHAPE[1] * SHAPE[2]


def test_hundreds_of_classes_are_stored_exactly(tmp_path: Path) -> None:
    info = replace(INFO, labels={f"class_{value}": value for value in range(300)})
    store = WritableStore.create(tmp_path / "store", info)
    label = np.arange(6 * 10 * 5, dtype=np.int16).reshape(6, 10, 5)
    store.write_case("case", np.zeros((2, 6, 10, 5), np.float32), label, native_grid=Grid(label.shape, OBLIQUE))
    np.testing.assert_array_equal(store.read_case("case")[1], label)
    np.testing.assert_array_equal(store.foreground_voxels("case", 299), [[5, 9, 4]])


def test_the_record_says_where_the_stored_box_lies(tmp_path: Path) -> None:
    store = WritableStore.create(tmp_path / "store", INFO)
    image, label = make_arrays(shape=(10, 12, 14))
    crop = PatchLocation((3, 4, 5), (20, 12, 7))
    source = CaseSource(patient="p1", key="k" * 16, files=(SourceFile(size=1, mtime_ns=2, sha256="x"),))
    store.write_case("case", image, label, native_grid=Grid((40, 30, 20), OBLIQUE), crop=crop, source=source)
    record = CaseStore(store.folder).record("case")
    native = np.linalg.norm(OBLIQUE[:3, :3], axis=0)
    np.testing.assert_allclose(record.spacing, native * [2, 1, 0.5])
    np.testing.assert_array_equal(record.native_affine, OBLIQUE)
    assert (record.native_shape, record.crop_start, record.crop_shape) == ((40, 30, 20), crop.start, crop.size)
    assert (record.patient, record.key, record.files) == ("p1", "k" * 16, source.files)


# ---- foreground


def test_the_foreground_sample_lies_in_its_class_and_true_counts_are_in_the_record(store: WritableStore) -> None:
    label = make_arrays()[1]
    counts = store.record("case_a").voxels_by_class
    assert counts == tuple(int((label == index).sum()) for index in range(3))
    assert counts[1] > MAX_SAMPLED_VOXELS
    large, small = store.foreground_voxels("case_a", 1), store.foreground_voxels("case_a", 2)
    assert len(np.unique(large, axis=0)) == len(large) == MAX_SAMPLED_VOXELS
    assert (label[tuple(large.T)] == 1).all()
    np.testing.assert_array_equal(small, np.argwhere(label == 2))


def test_the_sample_is_spread_evenly_over_the_class(store: WritableStore) -> None:
    places = np.argwhere(make_arrays()[1] == 1)
    sample = store.foreground_voxels("case_a", 1)
    # The mean of n draws without replacement from N lies within five standard errors.
    error = places.std(axis=0) * np.sqrt((1 / len(sample)) - (1 / len(places)))
    assert (np.abs(sample.mean(axis=0) - places.mean(axis=0)) < 5 * error).all()


def test_a_case_made_anew_has_the_same_sample_and_another_case_another(store: WritableStore) -> None:
    before = store.foreground_voxels("case_a", 1)
    store.write_case("case_a", *make_arrays(), native_grid=Grid(SHAPE, OBLIQUE), source=CaseSource(key="1" * 16))
    store.write_case("case_b", *make_arrays(), native_grid=Grid(SHAPE, OBLIQUE))
    np.testing.assert_array_equal(store.foreground_voxels("case_a", 1), before)
    assert not np.array_equal(store.foreground_voxels("case_b", 1), before)


def test_a_class_that_a_case_lacks_has_no_voxels(tmp_path: Path) -> None:
    store = WritableStore.create(tmp_path / "store", INFO)
    store.write_case(
        "empty", np.ones((2, 4, 5, 6), np.float32), np.zeros((4, 5, 6)), native_grid=Grid((4, 5, 6), OBLIQUE)
    )
    assert store.foreground_voxels("empty", 2).shape == (0, 3)
    with pytest.raises(ValueError, match="class 0"):
        store.foreground_voxels("empty", 0)


# ---- processes and handles


def test_reading_many_cases_keeps_no_file_open(tmp_path: Path) -> None:
    store = WritableStore.create(tmp_path / "store", INFO)
    image, label = make_arrays(shape=(5, 6, 7))
    for index in range(60):
        store.write_case(f"case_{index:02}", image, label, native_grid=Grid((5, 6, 7), OBLIQUE))
    reader = CaseStore(store.folder)
    reader.read_case("case_00")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for case_id in reader.case_ids:
        reader.read_case(case_id)
        reader.foreground_voxels(case_id, 1)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_store_that_was_used_can_be_sent_to_another_process_and_carries_no_records(store: WritableStore) -> None:
    reader = CaseStore(store.folder)
    unused = pickle.dumps(reader)
    total = float(reader.read_case("case_a")[0].sum())
    assert pickle.dumps(reader) == unused
    script = "import pickle, sys; s = pickle.load(sys.stdin.buffer); print(float(s.read_case('case_a')[0].sum()))"
    done = subprocess.run([sys.executable, "-c", script], input=unused, capture_output=True, check=True)
    assert float(done.stdout) == total


def test_reading_writes_nothing_and_a_reader_cannot_write(store: WritableStore) -> None:
    before = files_of(store.folder)
    reader = CaseStore(store.folder)
    reader.read_case(reader.case_ids[0])
    reader.foreground_voxels("case_a", 1)
    assert reader.is_whole("case_a")
    assert files_of(store.folder) == before
    with pytest.raises(AttributeError):
        reader.remove_case("case_a")  # type: ignore[attr-defined]
    assert files_of(store.folder) == before


def test_a_second_process_cannot_fill_the_same_store_and_a_dead_one_does_not_block_it(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with fill_store(folder, INFO):
        pass
    script = (
        "import sys, time; from pathlib import Path; from pipeline.store import CaseStore, fill_store\n"
        "folder = Path(sys.argv[1])\n"
        "with fill_store(folder, CaseStore(folder).info): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(InputError, match="another process is filling"), fill_store(folder, INFO):
            pass
        process.kill()
    with fill_store(folder, INFO) as store:
        assert store.case_ids == ()


# ---- whole or not at all


def test_a_case_without_its_record_does_not_exist_and_its_leftovers_are_swept(store: WritableStore) -> None:
    store.write_case("case_b", *make_arrays(1), native_grid=Grid(SHAPE, OBLIQUE))
    (store.folder / "cases" / "case_b.json").unlink()
    (store.folder / "cases" / ".77.partial.case_c.json").write_text("{")
    reopened = WritableStore(store.folder)
    assert reopened.case_ids == ("case_a",)
    reopened.sweep()
    names = {path.name.split(".")[0] for path in (store.folder / "cases").iterdir()}
    assert names == {"case_a"}
    np.testing.assert_array_equal(reopened.read_case("case_a")[1], make_arrays()[1])


def test_a_case_written_again_replaces_the_old_one_and_its_files(store: WritableStore) -> None:
    image, label = make_arrays(5)
    store.write_case("case_a", image, label, native_grid=Grid(SHAPE, OBLIQUE), source=CaseSource(key="a" * 16))
    np.testing.assert_array_equal(CaseStore(store.folder).read_case("case_a")[0], image)
    assert len(list((store.folder / "cases").iterdir())) == 4


def test_a_write_that_fails_for_want_of_space_leaves_the_old_case_as_it_was(store: WritableStore) -> None:
    before = files_of(store.folder)
    script = (
        "import resource, signal, sys; from pathlib import Path; import numpy as np\n"
        "from pipeline.geometry import Grid; from pipeline.store import CaseSource, WritableStore\n"
        "store = WritableStore(Path(sys.argv[1]))\n"
        "image = np.random.default_rng(0).normal(size=(2, 33, 21, 40)).astype(np.float32)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "grid, source = Grid((33, 21, 40), np.eye(4)), CaseSource(key='b' * 16)\n"
        "store.write_case('case_a', image, np.zeros(grid.shape, np.int16), native_grid=grid, source=source)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(store.folder)], capture_output=True, text=True, check=False
    )
    assert "StoreWriteError" in done.stderr.splitlines()[-1]
    assert "cannot write" in done.stderr.splitlines()[-1]
    assert files_of(store.folder) == before
    np.testing.assert_array_equal(CaseStore(store.folder).read_case("case_a")[0], make_arrays()[0])


def test_data_are_safe_from_a_power_cut_before_their_record_is_in_place_and_names_with_it(
    store: WritableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, fsync, replace_file = [], os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        done.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name.split(".")[-2:]))
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        done.append(("name", target.name.split(".")[-2:]))
        return replace_file(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    store.write_case("case_b", *make_arrays(), native_grid=Grid(SHAPE, OBLIQUE))
    files = [["image", "b2nd"], ["label", "b2nd"], ["voxels", "b2nd"], ["case_b", "json"]]
    assert done == [*((what, file) for file in files for what in ("sync", "name")), ("sync", ["cases"])]


def test_a_case_id_that_is_no_file_name_is_refused(store: WritableStore) -> None:
    before = files_of(store.folder.parent)
    for case_id in ("../x", "a/b", ".hidden", ""):
        with pytest.raises(InputError, match="not safe as a file name"):
            store.write_case(case_id, *make_arrays(), native_grid=Grid(SHAPE, OBLIQUE))
    assert files_of(store.folder.parent) == before


# ---- damage and foreign folders


@pytest.mark.parametrize("keep_bytes", [0, 20, 3000])
@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_truncated_data_file_is_named_with_its_case(store: WritableStore, kind: str, keep_bytes: int) -> None:
    path = next((store.folder / "cases").glob(f"*.{kind}.b2nd"))
    path.write_bytes(path.read_bytes()[:keep_bytes])
    with pytest.raises(InputError, match=f"{kind} of case case_a is damaged") as caught:
        CaseStore(store.folder).read_case("case_a")
    assert "\n" not in str(caught.value)
    assert not store.is_whole("case_a")


def test_a_data_file_of_the_right_size_but_other_content_is_named_with_its_case(store: WritableStore) -> None:
    path = next((store.folder / "cases").glob("*.image.b2nd"))
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match="image of case case_a is damaged"):
        CaseStore(store.folder).read_case("case_a")


def test_a_missing_data_file_and_a_missing_case_are_named(store: WritableStore) -> None:
    next((store.folder / "cases").glob("*.voxels.b2nd")).unlink()
    with pytest.raises(InputError, match="voxels of case case_a is damaged"):
        store.foreground_voxels("case_a", 1)
    with pytest.raises(InputError, match="holds no case case_z"):
        store.record("case_z")


def test_a_folder_that_is_no_store_is_refused_for_reading_and_left_alone_when_filling(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is no store"):
        CaseStore(tmp_path)
    for _ in range(2):
        with pytest.raises(InputError, match="holds files but is no store"), fill_store(tmp_path, INFO):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_store_of_another_schema_version_is_refused(store: WritableStore) -> None:
    path = store.folder / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 7}))
    with pytest.raises(InputError, match="schema version 7"):
        CaseStore(store.folder)
    with pytest.raises(InputError, match="schema version 7"):
        WritableStore.create(store.folder, INFO)


@pytest.fixture
def plan(plan_of: Callable[..., Plan]) -> Plan:
    return plan_of(
        channels=INFO.channels,
        labels=INFO.labels,
        ignore_value=INFO.ignore_value,
        target_spacing=INFO.target_spacing,
        median_shape=SHAPE,
        patch_size=(16, 12, 20),
    )


def test_a_store_of_another_plan_names_every_difference(store: WritableStore, plan: Plan) -> None:
    store.check_plan(plan)
    other = replace(plan, target_spacing=(2.0, 1.0, 1.5), labels={"background": 0, "organ": 5, "bone": 3})
    with pytest.raises(InputError) as caught:
        store.check_plan(other)
    message = str(caught.value)
    assert "target_spacing: [1.0, 1.0, 1.5], the plan has [2.0, 1.0, 1.5]" in message
    assert "labels: [0, 5, 2], the plan has [0, 5, 3]" in message
    assert "ignore_value" not in message


def test_what_voxels_do_not_depend_on_may_differ_but_other_names_are_warned_of(
    store: WritableStore, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    renamed = (replace(plan.channels[0], name="FLAIR", mean=3.0, std=7.0), plan.channels[1])
    store.check_plan(replace(plan, patch_size=(8, 8, 8)))
    assert not caplog.text
    store.check_plan(replace(plan, patch_size=(8, 8, 8), labels={"b": 0, "o": 5, "v": 2}, channels=renamed))
    assert "is it the store of another dataset?" in caplog.text
    assert "the plan has ['b', 'o', 'v']" in caplog.text
    with pytest.raises(InputError, match="channels"):
        store.check_plan(replace(plan, channels=(plan.channels[0], replace(plan.channels[1], mean=3.0))))
    with pytest.raises(InputError, match=r"channels: .*\['zscore'\].*the plan has .*\['zscore', 'body'\]"):
        store.check_plan(replace(plan, channels=(replace(plan.channels[0], use_body_mask=True), plan.channels[1])))
    store.check_plan(replace(plan, channels=(plan.channels[0], replace(plan.channels[1], use_body_mask=True))))


def test_cases_of_other_settings_are_gone_as_soon_as_the_store_has_new_ones(store: WritableStore) -> None:
    other_patch = replace(INFO, patch_size=(8, 8, 8))
    assert WritableStore.create(store.folder, other_patch).case_ids == ("case_a",)
    assert CaseStore(store.folder).info == other_patch
    assert WritableStore.create(store.folder, replace(INFO, target_spacing=(3.0, 3.0, 3.0))).case_ids == ()
    assert list((store.folder / "cases").iterdir()) == []


# ---- chunks


@pytest.mark.parametrize("shape", [(1, 35, 50, 36), (2, 512, 512, 91), (3, 7, 1, 300), (130, 129, 128)])
@pytest.mark.parametrize("patch", [(40, 56, 40), (16, 256, 256), (1, 1, 1)])
def test_chunks_are_even_and_no_longer_than_the_patch(shape: tuple[int, ...], patch: tuple[int, int, int]) -> None:
    chunks, blocks = fitted_chunks(shape, patch)
    assert len(chunks) == len(blocks) == len(shape)
    for n, size, chunk, block in zip(shape[-3:], patch, chunks[-3:], blocks[-3:], strict=True):
        assert 1 <= block <= chunk <= min(n, size, 128)
        assert block <= 32
        # Less than one voxel per part is padding.
        assert -(-n // chunk) * chunk - n < -(-n // chunk)
    assert all(n == 1 for n in (*chunks[:-3], *blocks[:-3]))


def test_a_patch_reads_less_than_the_file(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(1, 60, 60, 60)).astype(np.float32)
    chunks, blocks = fitted_chunks(array.shape, (20, 20, 20))
    size = write_array(tmp_path / "a.b2nd", array, chunks=chunks, blocks=blocks).size
    damaged = bytearray((tmp_path / "a.b2nd").read_bytes())
    # Chunks lie in order: what is in the middle of the file does not matter to the first corner.
    damaged[size // 2 : size // 2 + 1000] = bytes(1000)
    (tmp_path / "a.b2nd").write_bytes(damaged)
    part = (slice(None), slice(0, 20), slice(0, 20), slice(0, 20))
    np.testing.assert_array_equal(read_array(tmp_path / "a.b2nd", part), array[part])
