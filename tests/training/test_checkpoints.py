from __future__ import annotations

import errno
import resource
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from pipeline.errors import InputError
from pipeline.networks.out_of_memory import is_out_of_memory
from pipeline.run_record import Counts
from pipeline.training.checkpoints import COUNTS_KEY, AtomicCheckpointIO, _UnusableError, find_checkpoint
from pipeline.training.probe_memory import hold_to
from pipeline.training.run_folder import RunFolder

STATE = {"network.weight": torch.arange(6.0).reshape(2, 3)}


def save(path: Path, *, epoch: int, state=None) -> None:
    content = {
        "state_dict": state or STATE,
        COUNTS_KEY: {"epoch": epoch, "iteration": 4 * epoch, "optimizer_step": epoch},
    }
    AtomicCheckpointIO().save_checkpoint(content, path)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def test_a_checkpoint_comes_back_as_it_was_saved_and_leaves_no_other_file(folder):
    save(folder.last_checkpoint, epoch=1)
    found = AtomicCheckpointIO().load_checkpoint(folder.last_checkpoint)
    assert torch.equal(found["state_dict"]["network.weight"], STATE["network.weight"])
    assert list(folder.last_checkpoint.parent.iterdir()) == [folder.last_checkpoint]


def test_when_the_disk_is_full_the_checkpoint_before_stays_and_the_error_is_one_line(folder):
    save(folder.last_checkpoint, epoch=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError) as raised:
            save(folder.last_checkpoint, epoch=2, state={"network.weight": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(raised.value).startswith(f"{folder.last_checkpoint}: cannot write (File too large)")
    assert "\n" not in str(raised.value)
    assert find_checkpoint(folder, STATE).counts.epoch == 1
    assert list(folder.last_checkpoint.parent.iterdir()) == [folder.last_checkpoint]


def test_a_run_without_checkpoints_starts_anew(folder):
    assert find_checkpoint(folder, STATE) is None


def test_last_is_taken_before_best(folder):
    save(folder.best_checkpoint, epoch=2)
    save(folder.last_checkpoint, epoch=5)
    assert find_checkpoint(folder, STATE).counts == Counts(epoch=5, iteration=20, optimizer_step=5)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"no checkpoint at all"])
def test_files_that_are_no_checkpoints_are_named(folder, content):
    for path in (folder.last_checkpoint, folder.best_checkpoint):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"last\.ckpt: is torn") as raised:
        find_checkpoint(folder, STATE)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_of_another_network_is_refused(folder):
    save(folder.last_checkpoint, epoch=1)
    with pytest.raises(InputError, match="belongs to another network"):
        find_checkpoint(folder, {"network.weight": torch.zeros(3, 3)})


def test_a_single_wrong_byte_is_noticed(folder):
    save(folder.best_checkpoint, epoch=1, state={"network.weight": torch.zeros(2, 3)})
    save(folder.last_checkpoint, epoch=2, state={"network.weight": torch.full((2, 3), 7.0)})
    content = bytearray(folder.last_checkpoint.read_bytes())
    content[content.index(torch.full((6,), 7.0).numpy().tobytes()) + 2] ^= 1
    folder.last_checkpoint.write_bytes(content)
    assert torch.load(folder.last_checkpoint, weights_only=True)["counts"]["epoch"] == 2, "torch does not notice"
    assert find_checkpoint(folder, STATE).path == folder.best_checkpoint


def test_memory_that_runs_out_while_a_checkpoint_is_read_is_said_as_such(folder):
    """It is mapped, which takes as much of a limit as reading it."""
    save(folder.best_checkpoint, epoch=1)
    save(folder.last_checkpoint, epoch=2, state={"network.weight": torch.zeros(2**24)})
    limit = hold_to("cpu", 2**24)
    try:
        with pytest.raises(RuntimeError, match="Cannot allocate memory") as raised:
            find_checkpoint(folder, {"network.weight": torch.zeros(1)})
    finally:
        limit.lift()
    assert is_out_of_memory(raised.value)
    assert not isinstance(raised.value, InputError)


@pytest.mark.parametrize(("number", "reason"), [(errno.EIO, "Input/output error"), (errno.EACCES, "Permission denied")])
def test_a_checkpoint_that_cannot_be_read_is_not_called_torn_nor_passed_over(folder, monkeypatch, number, reason):
    def fail(self: zipfile.ZipFile) -> None:
        raise OSError(number, reason)

    for path in (folder.best_checkpoint, folder.last_checkpoint):
        save(path, epoch=1)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", fail)
    with pytest.raises(InputError) as raised:
        find_checkpoint(folder, STATE)
    assert str(raised.value).startswith(f"{folder.last_checkpoint}: cannot be read ({reason})")
    assert "Remove" not in str(raised.value)


def test_a_torn_end_is_called_torn_wherever_it_sends_the_reader(folder):
    save(folder.last_checkpoint, epoch=1)
    whole, found = folder.last_checkpoint.read_bytes(), []
    for place in range(len(whole) - 140, len(whole)):
        folder.last_checkpoint.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        # Most bytes of the end are looked at by nobody.
        with suppress(_UnusableError):
            found.append(find_checkpoint(folder, STATE).counts.epoch)
    assert set(found) <= {1}
    assert len(found) < 140
