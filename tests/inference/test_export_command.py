"""`voxfit export` as a person types it, and its Python function."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from monai.networks.nets import SegResNet

from pipeline import api
from pipeline.cli import main
from pipeline.config import ExportConfig
from pipeline.errors import InputError
from pipeline.inference import onnx_export
from pipeline.plan import Plan

MakePlan = Callable[..., Plan]
MakeRun = Callable[..., Path]

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in onnx_export.PACKAGES), reason="voxfit[export] is not installed"
)


@needs_onnx
def test_the_command_writes_a_checked_onnx_file_once(
    tmp_path: Path, make_plan: MakePlan, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, out = make_run(make_plan()), tmp_path / "out" / "model.onnx"
    content = torch.load(run_dir / "checkpoints" / "best.ckpt", weights_only=True)
    other = {key: value + 0.01 for key, value in content["state_dict"].items()}
    torch.save({"state_dict": other}, run_dir / "checkpoints" / "last.ckpt")
    command = ["export", "--run_dir", str(run_dir), "--out", str(out)]
    assert main(command) == 0
    written = out.read_bytes()
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--checkpoint", "last"]) == 0
    assert out.read_bytes() != written
    assert [item.name for item in out.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "model.txt", "--format", "onnx"], "must end in .onnx"),
        (["--out", "model.onnx", "--format", "bundle"], "is a folder or ends in .zip"),
        (["--out", "b", "--overlap", "1"], "overlap: must be from 0 to below 1"),
        (["--out", "b"], "is no run folder"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["export", "--run_dir", "empty", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [item.name for item in tmp_path.iterdir()] == ["empty"]


@needs_onnx
def test_a_network_of_one_s_own_is_exported_when_it_is_given(
    tmp_path: Path, make_plan: MakePlan, make_run: MakeRun
) -> None:
    network = SegResNet(
        spatial_dims=3, init_filters=8, in_channels=1, out_channels=3, norm=("group", {"num_groups": 4})
    )
    own = make_run(make_plan(patch_size=(16, 24, 8)))
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state}, own / "checkpoints" / "best.ckpt")
    with pytest.raises(InputError, match="another network"):
        api.export(ExportConfig(run_dir=str(own), out=str(tmp_path / "model.onnx")))
    for out in ("model.onnx", "bundle"):
        assert api.export(ExportConfig(run_dir=str(own), out=str(tmp_path / out)), network=network).exists()


def test_a_bundle_replaces_an_earlier_one_only_when_asked(
    tmp_path: Path, make_plan: MakePlan, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "--run_dir", str(make_run(make_plan())), "--out", str(tmp_path / "bundle")]
    assert main(command) == 0
    (tmp_path / "bundle" / "mine.txt").write_text("kept")
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "bundle" / "mine.txt").exists()
    assert main([*command, "--overwrite"]) == 0
    assert not (tmp_path / "bundle" / "mine.txt").exists()
