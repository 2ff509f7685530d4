"""Many cases at once: the files of one after the other, in bounded memory, and whole however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import CasesFailedError
from pipeline.inference import attempts, case_files
from pipeline.inference.case_files import predict_files
from pipeline.inference.inputs import find_inputs
from pipeline.inference.predictor import Predictor
from pipeline.inference.window_batch import set_window_batch
from pipeline.io.image_file import read_volume, write_label
from pipeline.io.volume import Volume
from pipeline.networks.unet import UNet
from pipeline.plan import Plan
from pipeline.preprocessing.preprocess import PreparedImage
from pipeline.preprocessing.restore import NativeScores

ROOT = Path(__file__).resolve().parents[2]
# Of one window and of many.
SHAPES = ((12, 16, 8), (25, 33, 20), (7, 9, 8), (12, 15, 8), (30, 16, 22), (11, 16, 7))


def write_cases(folder: Path, shapes: tuple[tuple[int, int, int], ...] = SHAPES) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, shape in enumerate(shapes):
        voxels = generator.normal(size=shape).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.3, 0.8, 1])), folder / f"case_{number}.nii.gz")


class Watched(Predictor):
    """A predictor that says what it does at a time."""

    def watch(self, during: Callable[[str], None] = lambda what: None) -> Watched:
        self.now: list[str] = []
        self.most: dict[str, int] = {}
        self._lock, self._during = threading.Lock(), during
        return self

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        with self._lock:
            self.now.append(what)
            for each in {*self.now, "all"}:
                count = len(self.now) if each == "all" else self.now.count(each)
                self.most[each] = max(self.most.get(each, 0), count)
        try:
            self._during(what)
            yield
        finally:
            with self._lock:
                self.now.remove(what)

    def prepare(self, volume: Volume) -> PreparedImage:
        with self._doing("prepare"):
            return super().prepare(volume)

    def segment(self, prepared: PreparedImage, *written: Any) -> Any:
        with self._doing("segment"):
            return super().segment(prepared, *written)


@pytest.fixture
def make_predictor(make_plan: Callable[..., Plan]) -> Callable[..., Watched]:
    def make(*, during: Callable[[str], None] = lambda what: None, **options: Any) -> Watched:
        torch.manual_seed(1)
        plan = make_plan(spacing=(1.1, 1.2, 0.9))
        return Watched(UNet(1, 3, plan.network), plan, **options).watch(during)

    return make


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def expected_bytes(predictor: Predictor, folder: Path, out: Path) -> dict[str, bytes]:
    """Files of the same names, each case on its own, read, predicted and written here."""
    written = {}
    for path in sorted(folder.iterdir()):
        write_label(out / path.name, predictor.predict(read_volume(path)))
        written[path.name] = np.asarray(nib.load(out / path.name).dataobj).tobytes()
    return written


def found_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: np.asarray(nib.load(path).dataobj).tobytes() for path in sorted(folder.glob("*.*"))}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("window_batch", [1, 2, "auto"])
def test_files_are_those_of_one_case_after_the_other(
    tmp_path: Path, make_predictor: Callable[..., Watched], window_batch: int | str
) -> None:
    write_cases(tmp_path / "in")
    expected = expected_bytes(make_predictor(), tmp_path / "in", tmp_path / "expected")
    assert len({voxels for voxels in expected.values()}) == len(SHAPES)
    predictor = make_predictor()
    set_window_batch(predictor, window_batch)
    assert (predictor.threads is not None) == (window_batch != 1)
    predict_files(predictor, find_inputs(tmp_path / "in"), tmp_path / "out")
    assert found_bytes(tmp_path / "out") == expected


def test_the_next_case_is_prepared_while_one_is_computed(
    tmp_path: Path, make_predictor: Callable[..., Watched]
) -> None:
    write_cases(tmp_path / "in", SHAPES[:3])
    prepared = threading.Semaphore(0)

    def during(what: str) -> None:
        if what == "prepare":
            prepared.release()
        # Of the first two cases, whose next one is to be there by now; the third has none.
        elif len(computed) < 2:
            computed.append(what)
            assert prepared.acquire(timeout=20)
            assert len(computed) == 2 or prepared.acquire(timeout=20)

    computed: list[str] = []
    predictor = make_predictor(during=during)
    predict_files(predictor, find_inputs(tmp_path / "in"), tmp_path / "out")
    assert len(computed) == 2
    assert predictor.most["segment"] == 1


@pytest.mark.parametrize(("num_bytes_more", "most_at_once"), [(0, 1), (10 << 20, 2)])
def test_cases_come_one_after_the_other_where_there_is_no_room_for_two(
    tmp_path: Path,
    make_predictor: Callable[..., Watched],
    monkeypatch: pytest.MonkeyPatch,
    num_bytes_more: int,
    most_at_once: int,
) -> None:
    shape = (25, 33, 20)
    write_cases(tmp_path / "in", (shape,) * 4)
    expected = expected_bytes(make_predictor(), tmp_path / "in", tmp_path / "expected")
    predictor = make_predictor(during=lambda what: sleep(0.02))
    prepared = predictor.prepare(read_volume(tmp_path / "in" / "case_0.nii.gz"))
    memory = predictor.plan_memory(NativeScores.of(prepared, predictor.plan).resampling)
    # What the process holds besides does not matter here, and changes.
    for module in (attempts, case_files):
        monkeypatch.setattr(module, "held_bytes", lambda: 0)
    predictor.watch(during=lambda what: sleep(0.02))
    predictor.max_ram = memory.num_bytes + prepared.array.nbytes + 8 * 25 * 33 * 20 + num_bytes_more
    predict_files(predictor, find_inputs(tmp_path / "in"), tmp_path / "out")
    assert found_bytes(tmp_path / "out") == expected
    assert predictor.most["all"] == most_at_once


def test_memory_that_runs_out_beside_another_case_is_enough_alone(
    tmp_path: Path, make_predictor: Callable[..., Watched], caplog: pytest.LogCaptureFixture
) -> None:
    write_cases(tmp_path / "in")
    expected = expected_bytes(make_predictor(), tmp_path / "in", tmp_path / "expected")

    def during(what: str) -> None:
        if what == "segment" and not failed:
            failed.append(what)
            raise MemoryError("for two")

    failed: list[str] = []
    predictor = make_predictor(during=during)
    predict_files(predictor, find_inputs(tmp_path / "in"), tmp_path / "out")
    assert found_bytes(tmp_path / "out") == expected
    assert caplog.text.count(": out of memory, once more alone") == 1


def test_memory_that_is_not_enough_alone_either_is_a_failure_of_that_case(
    tmp_path: Path, make_predictor: Callable[..., Watched]
) -> None:
    write_cases(tmp_path / "in", SHAPES[:3])

    class Short(Watched):
        def segment(self, prepared: PreparedImage, *written: Any) -> Any:
            if prepared.native_grid.shape == SHAPES[1]:
                raise MemoryError("far too large")
            return super().segment(prepared, *written)

    predictor = make_predictor()
    predictor.__class__ = Short
    with pytest.raises(CasesFailedError) as caught:
        predict_files(predictor, find_inputs(tmp_path / "in"), tmp_path / "out")
    assert caught.value.failures == {"case_1": "memory ran out: far too large"}
    assert sorted(path.name for path in (tmp_path / "out").glob("*.*")) == ["case_0.nii.gz", "case_2.nii.gz"]


def test_a_defect_ends_all_cases_with_whole_files_only(tmp_path: Path, make_predictor: Callable[..., Watched]) -> None:
    write_cases(tmp_path / "in")

    def during(what: str) -> None:
        counted.append(what)
        if counted.count("segment") == 3:
            raise ZeroDivisionError

    counted: list[str] = []
    with pytest.raises(ZeroDivisionError):
        predict_files(make_predictor(during=during), find_inputs(tmp_path / "in"), tmp_path / "out")
    written = found_bytes(tmp_path / "out")
    assert 1 <= len(written) <= 4
    assert not any(name.startswith(".") for name in written)


@pytest.mark.timeout(300)
def test_every_signal_leaves_whole_files_and_the_same_command_goes_on(
    tmp_path: Path, make_plan: Callable[..., Plan], make_run: Callable[..., Path]
) -> None:
    write_cases(tmp_path / "in", ((60, 70, 50),) * 10)
    run_dir, out = make_run(make_plan()), tmp_path / "out"
    options = ["--run_dir", str(run_dir), "--input", str(tmp_path / "in"), "--output", str(out), "--num_threads", "2"]
    command = [sys.executable, "-m", "pipeline", "predict", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    before: dict[str, bytes] = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        process = start()
        while len(list(out.glob("case_*"))) <= len(before):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            sleep(0.01)
        asked = monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 75, errors
        assert "Traceback" not in errors
        assert monotonic() - asked < 20
        after = found_bytes(out)
        assert len(before) < len(after) < 10
        assert not any(name.startswith(".") for name in after)
        assert {name: after[name] for name in before} == before
        before = after
    process = start()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"{len(before)} output(s) are there already and are kept" in errors
    after = found_bytes(out)
    assert len(after) == 10
    assert {name: after[name] for name in before} == before


def test_ctrl_c_ends_a_volume_between_two_of_its_windows(tmp_path: Path, make_plan: Callable[..., Plan]) -> None:
    write_cases(tmp_path / "in", ((60, 70, 50), (12, 16, 8)))
    calls: list[int] = []

    class Interrupting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGINT)
            sleep(0.01)
            return x.expand(-1, 3, -1, -1, -1)

    with pytest.raises(KeyboardInterrupt):
        predict_files(Predictor(Interrupting(), make_plan()), find_inputs(tmp_path / "in"), tmp_path / "out")
    assert len(calls) < 100
    # The small case is on its way beside the large one, and may have been through before.
    assert {path.name for path in (tmp_path / "out").glob("*.*")} <= {"case_1.nii.gz"}


@pytest.mark.timeout(200)
def test_shares_at_the_same_time_make_each_case_once_in_one_folder(
    tmp_path: Path, make_plan: Callable[..., Plan], make_run: Callable[..., Path]
) -> None:
    write_cases(tmp_path / "in")
    run_dir = make_run(make_plan())
    options = ["--run_dir", str(run_dir), "--input", str(tmp_path / "in"), "--num_threads", "1"]
    command = [sys.executable, "-m", "pipeline", "predict", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shares = [
        subprocess.Popen(
            [*command, "--output", str(tmp_path / "shared"), "--shard", f"{number}/3"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2, 3)
    ]
    errors = [process.communicate(timeout=120)[1] for process in shares]
    assert [process.returncode for process in shares] == [0, 0, 0], errors
    assert all(f"share {number}/3 has 2 of 6 cases" in text for number, text in enumerate(errors, start=1))
    assert not any("already" in text for text in errors)
    subprocess.run([*command, "--output", str(tmp_path / "alone")], env=environment, check=True, capture_output=True)
    assert found_bytes(tmp_path / "shared") == found_bytes(tmp_path / "alone")
