"""Weights out of good, torn and foreign checkpoints."""

from __future__ import annotations

import pickle

import pytest
import torch

from pipeline.errors import InputError
from pipeline.networks.weights import read_weights


def test_weights_lose_the_network_prefix_and_leave_the_rest(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"epoch": 3, "state_dict": {"network.a.weight": torch.ones(2), "loss.x": torch.zeros(1)}}, path)
    found = read_weights(path)
    assert list(found) == ["a.weight"]
    assert torch.equal(found["a.weight"], torch.ones(2))


def test_averaged_weights_are_preferred(tmp_path):
    path = tmp_path / "best.ckpt"
    state = {"network.a": torch.ones(2)}
    torch.save({"state_dict": state, "ema_state_dict": {"a": torch.full((2,), 5.0)}}, path)
    assert read_weights(path)["a"].tolist() == [5.0, 5.0]
    torch.save({"state_dict": state, "ema_state_dict": None}, path)
    assert read_weights(path)["a"].tolist() == [1.0, 1.0]


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match=r"last.ckpt: does not exist"):
        read_weights(tmp_path / "last.ckpt")


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_torn_checkpoint_is_one_short_error(tmp_path, kept):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"network.a": torch.ones(2000)}}, path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(InputError, match=r"last.ckpt: is no readable checkpoint") as caught:
        read_weights(path)
    assert len(str(caught.value)) < 250 + len(str(path))


class _Malicious:
    def __reduce__(self):
        return print, ("code of a stranger ran",)


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"network.a": _Malicious()}}, path)
    with pytest.raises(InputError, match="is no readable checkpoint"):
        read_weights(path)
    path.write_bytes(pickle.dumps(_Malicious(), protocol=2))
    with pytest.raises(InputError, match="is no readable checkpoint"):
        read_weights(path)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"model.a": torch.ones(1)}}, {}, {"state_dict": None}, 3])
def test_a_foreign_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(InputError, match=r"other.pth: (holds no network weights|is no checkpoint)"):
        read_weights(path)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="is no readable checkpoint"):
        read_weights(tmp_path)
