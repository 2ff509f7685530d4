from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.artifacts import to_json
from pipeline.errors import InputError
from pipeline.inference import onnx_export
from pipeline.inference.exportable import ExportableRun, check_same_outputs, load_exportable, shrink
from pipeline.inference.onnx_export import check_onnx_packages, write_onnx
from pipeline.networks.unet import UNet
from pipeline.plan import Plan

MakePlan = Callable[..., Plan]
MakeRun = Callable[..., Path]

needs_onnx = pytest.mark.skipif(
    any(onnx_export.find_spec(name) is None for name in onnx_export.PACKAGES), reason="voxfit[export] is not installed"
)


def infer(path: Path, image: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def deeper(plan: Plan, **options: Any) -> Plan:
    """A network with an anisotropic stage, which gives each axis another stride."""
    network = replace(
        plan.network,
        features_per_stage=(4, 8, 12),
        strides=((1, 1, 1), (2, 2, 2), (1, 2, 1)),
        kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        num_blocks_per_stage=(1, 2, 1),
        **options,
    )
    return replace(plan, network=network)


@needs_onnx
@pytest.mark.parametrize(
    "options", [{}, {"norm": "instance"}, {"norm": "batch"}, {"block": "residual"}], ids=lambda o: str(*o.values())
)
def test_onnxruntime_gives_the_network_s_outputs_for_any_batch_and_size(
    options: dict[str, Any], tmp_path: Path, make_plan: MakePlan, make_run: MakeRun
) -> None:
    run = load_exportable(make_run(deeper(make_plan(), **options)), "best")
    path = write_onnx(run, tmp_path / "model.onnx")
    for shape in [(1, 1, 12, 16, 8), (3, 1, 12, 16, 8), (1, 1, 6, 20, 34), (2, 1, 24, 8, 2)]:
        image = torch.randn(shape)
        with torch.inference_mode():
            torch.testing.assert_close(infer(path, image), run.reference(image), rtol=1e-4, atol=1e-5)


@needs_onnx
def test_the_file_says_what_it_is(tmp_path: Path, make_plan: MakePlan, make_run: MakeRun) -> None:
    import onnx

    plan = make_plan(spacing=(0.7, 0.8, 2.5), anisotropic_axis=2)
    model = onnx.load(write_onnx(load_exportable(make_run(plan), "best"), tmp_path / "model.onnx"))
    onnx.checker.check_model(model, full_check=True)
    said = {entry.key: entry.value for entry in model.metadata_props}
    (opset,) = (entry.version for entry in model.opset_import if entry.domain == "")
    assert said["opset"] == str(opset)
    assert json.loads(said["classes"]) == {"background": 0, "organ_1": 4, "organ_2": 7}
    assert json.loads(said["spacing_mm"]) == [0.7, 0.8, 2.5]
    assert json.loads(said["anisotropic_axis"]) == 2
    assert json.loads(said["patch_size"]) == [12, 16, 8]
    assert json.loads(said["channels"]) == [{"name": "T1", "scheme": "none"}]
    assert said["plan"] == to_json(plan)
    assert not [node for node in model.graph.node if node.domain not in ("", "ai.onnx")]
    assert {tensor.data_location for tensor in model.graph.initializer} == {onnx.TensorProto.DEFAULT}


@needs_onnx
def test_averaged_weights_are_exported_where_the_checkpoint_has_them(
    tmp_path: Path, make_plan: MakePlan, make_run: MakeRun
) -> None:
    plan = make_plan()
    run_dir = make_run(plan)
    checkpoint = run_dir / "checkpoints" / "best.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    averaged = UNet(1, 3, plan.network).eval()
    torch.save({**content, "ema_state_dict": averaged.state_dict()}, checkpoint)
    path = write_onnx(load_exportable(run_dir, "best"), tmp_path / "model.onnx")
    image = torch.randn(1, 1, 12, 16, 8)
    with torch.inference_mode():
        torch.testing.assert_close(infer(path, image), averaged(image), rtol=1e-4, atol=1e-5)


class Own(nn.Module):
    """A network of the user's own, with an output of two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, 3, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        scores = self.layer(x)
        return [scores, scores[..., ::2, ::2, ::2]]


def own_run(make_plan: MakePlan, make_run: MakeRun, network: nn.Module) -> ExportableRun:
    run_dir = make_run(make_plan())
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state}, run_dir / "checkpoints" / "best.ckpt")
    return load_exportable(run_dir, "best", network=network)


@needs_onnx
def test_a_network_of_one_s_own_is_exported_at_the_window_with_any_batch(
    tmp_path: Path, make_plan: MakePlan, make_run: MakeRun
) -> None:
    network = Own()
    path = write_onnx(own_run(make_plan, make_run, network), tmp_path / "model.onnx")
    image = torch.randn(3, 1, 12, 16, 8)
    with torch.inference_mode():
        torch.testing.assert_close(infer(path, image), network(image)[0], rtol=1e-4, atol=1e-5)


class DependsOnValues(Own):
    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(x if x.mean() > 0 else -x)


@needs_onnx
def test_a_network_that_cannot_be_exported_is_one_line_and_no_file(
    tmp_path: Path, make_plan: MakePlan, make_run: MakeRun
) -> None:
    run = own_run(make_plan, make_run, DependsOnValues())
    with pytest.raises(InputError, match="cannot be exported to ONNX") as caught:
        write_onnx(run, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.onnx"))


@needs_onnx
def test_a_file_that_differs_from_the_network_is_not_left_and_takes_no_earlier_one_s_place(
    tmp_path: Path, make_plan: MakePlan, make_run: MakeRun
) -> None:
    run = load_exportable(make_run(make_plan()), "best")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    with torch.no_grad():
        run.reference.heads[0].weight *= 1.001
    with pytest.raises(InputError, match="differs by"):
        write_onnx(run, path)
    assert path.read_bytes() == b"earlier"
    assert [item.name for item in tmp_path.iterdir() if item.is_file()] == ["model.onnx"]


@needs_onnx
def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path, make_plan: MakePlan, make_run: MakeRun) -> None:
    run = load_exportable(make_run(make_plan()), "best")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_onnx(run, tmp_path / "file" / "model.onnx")


def test_packages_that_are_missing_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(InputError, match=r"needs onnxscript, .*pip install 'voxfit\[export\]'"):
        check_onnx_packages()


@pytest.mark.parametrize("wrong", [lambda x: x * 2, lambda x: x * float("nan"), lambda x: x[..., :-1]])
def test_the_check_fails_on_other_values_on_nan_and_on_another_shape(
    wrong: Callable[[Tensor], Tensor], make_plan: MakePlan, make_run: MakeRun
) -> None:
    run = load_exportable(make_run(make_plan()), "best")
    with pytest.raises(InputError, match="nothing was written"):
        check_same_outputs(run, lambda x: wrong(run.plain(x)), [(1, 1, 12, 16, 8)], where=Path("model.onnx"))


@pytest.mark.parametrize("window", [(512, 512, 256), (96, 160, 96), (64, 1024, 48)])
def test_large_windows_are_checked_on_smaller_ones_in_multiples_of_the_stride(window: tuple[int, int, int]) -> None:
    stride = (32, 32, 16)
    found = shrink(window, stride, 96**3)
    assert 96**3 / 4 < np.prod(found) <= 96**3
    assert not np.any(np.mod(found, stride))
    assert np.all(np.less_equal(found, window))


def test_a_window_that_is_small_or_cannot_be_smaller_is_checked_as_it_is() -> None:
    assert shrink((12, 16, 8), (2, 4, 2), 96**3) == (12, 16, 8)
    assert shrink((64, 64, 64), (64, 64, 64), 8) == (64, 64, 64)


def test_a_run_without_the_checkpoint_says_which_it_has(make_plan: MakePlan, make_run: MakeRun) -> None:
    with pytest.raises(InputError, match=r"no checkpoint last\.ckpt.*--checkpoint best"):
        load_exportable(make_run(make_plan()), "last")
