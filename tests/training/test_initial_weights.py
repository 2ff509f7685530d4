"""Trainings that begin with the weights of another run."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.cli import main
from pipeline.config import OptimConfig, TrainConfig
from pipeline.errors import InputError
from pipeline.inference.predictor import Predictor
from pipeline.networks.unet import UNet
from pipeline.networks.weights import read_weights
from pipeline.plan import ChannelPlan, Plan
from pipeline.planning.topology import make_topology
from pipeline.training.initial_source import Source, planning_advice
from pipeline.training.initial_weights import Beginning
from pipeline.training.run_folder import RunFolder
from pipeline.training.trainer import fit_fold

# Every validation counts, and one epoch has all that the tests look at.
SHORT = {"max_epochs": 1, "iterations_per_epoch": 2, "validate_every_n_epochs": 1}
# Too small a rate to change a float32 weight.
STILL = OptimConfig(lr=1e-30, weight_decay=0.0)


class PowerCutError(Exception):
    """The machine went down."""


class Tiny(nn.Module):
    """A network of one's own."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Conv3d(1, 4, 3, padding=1)
        self.out = nn.Conv3d(4, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.body(x)))


@pytest.fixture(scope="session")
def source(plan, store, splits, config_in, tmp_path_factory) -> Path:
    """A run whose best checkpoint holds averaged weights."""
    config = config_in(tmp_path_factory.mktemp("source") / "run", optim=OptimConfig(ema_decay=0.5), max_epochs=2)
    return fit_fold(plan, store, splits, config).run_dir


def with_classes(plan: Plan, *names: str) -> Plan:
    return replace(plan, labels={name: value for value, name in enumerate(("background", *names))})


def initial_of(run_dir: Path):
    return RunFolder(run_dir).read_record().initial_weights


def test_without_learning_the_first_validation_is_that_of_the_source(plan, store, splits, make_config, source):
    config = make_config(init_from=str(source), optim=STILL, **SHORT)
    result = fit_fold(plan, store, splits, config)
    before = RunFolder(source).read_record()
    assert before.best_dice > 0
    assert RunFolder(result.run_dir).read_record().validation == before.validation
    expected, found = (read_weights(RunFolder(run).best_checkpoint) for run in (source, result.run_dir))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_averaged_weights_are_taken_where_the_source_has_them_and_counts_begin_anew(
    plan, store, splits, make_config, source
):
    result = fit_fold(plan, store, splits, make_config(init_from=str(source), **SHORT))
    begun = initial_of(result.run_dir)
    best = torch.load(source / "checkpoints" / "best.ckpt", weights_only=True)
    assert (begun.averaged, begun.epoch) == (True, best["counts"]["epoch"])
    assert begun.checkpoint == str(source / "checkpoints" / "best.ckpt")
    assert begun.num_tensors == len(best["ema_state_dict"])
    assert (begun.new, begun.left_out) == ((), ())
    assert result.counts.optimizer_step == 2


def test_a_checkpoint_without_an_average_gives_the_weights_that_were_trained(plan, store, splits, make_config):
    first = fit_fold(plan, store, splits, make_config("first", **SHORT))
    config = make_config("second", init_from=str(first.last_checkpoint), optim=STILL, **SHORT)
    second = fit_fold(plan, store, splits, config)
    assert not initial_of(second.run_dir).averaged
    expected, found = read_weights(first.last_checkpoint), read_weights(second.last_checkpoint)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_other_classes_get_a_new_head_and_everything_else_is_kept(plan, store, splits, make_config, source, caplog):
    other = with_classes(plan, "outer", "inner", "third")
    config = make_config(init_from=str(source), optim=STILL, **SHORT)
    result = fit_fold(other, store, splits, config)
    expected, found = read_weights(RunFolder(source).best_checkpoint), read_weights(result.last_checkpoint)
    assert all(torch.equal(found[key], expected[key]) for key in expected if not key.startswith("heads."))
    assert found["heads.0.weight"].shape[0] == 4
    assert initial_of(result.run_dir).new == (
        "heads.0.weight (there [3, 4, 1, 1, 1], here [4, 4, 1, 1, 1])",
        "heads.0.bias (there [3], here [4])",
    )
    (said,) = [each.getMessage() for each in caplog.records if "init_from" in each.getMessage()]
    assert "heads.0.weight (there [3, 4, 1, 1, 1], here [4, 4, 1, 1, 1])" in said


def test_all_heads_of_deep_supervision_are_new_with_other_classes_and_levels_may_be_more_or_fewer(
    plan, store, splits, make_config
):
    network = replace(
        plan.network,
        features_per_stage=(4, 4, 4, 4),
        strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 1, 1)),
        kernel_sizes=((3, 3, 3),) * 4,
        num_blocks_per_stage=(1, 1, 1, 1),
    )
    deep = replace(plan, network=network)
    first = fit_fold(deep, store, splits, make_config("deep", **SHORT))
    more = fit_fold(
        with_classes(deep, "a", "b", "c"), store, splits, make_config("m", init_from=str(first.run_dir), **SHORT)
    )
    assert [each.split()[0] for each in initial_of(more.run_dir).new] == [
        f"heads.{index}.{part}" for index in range(2) for part in ("weight", "bias")
    ]
    flat = replace(deep, network=replace(network, deep_supervision=False))
    fewer = fit_fold(flat, store, splits, make_config("f", init_from=str(first.run_dir), **SHORT))
    assert initial_of(fewer.run_dir).left_out == ("heads.1.weight", "heads.1.bias")
    assert initial_of(fewer.run_dir).new == ()


@pytest.mark.parametrize("block", ["plain", "residual"])
def test_other_channels_get_a_new_first_convolution(plan, block):
    one = replace(plan.network, block=block)
    two_channels = replace(plan, channels=(*plan.channels, ChannelPlan(name="T2", scheme="zscore")), network=one)
    there = UNet(1, 3, one)
    begun = Source(Path("best.ckpt"), there.state_dict(), False, 1, replace(plan, network=one), frozenset())
    config = TrainConfig(plan="p", store="s", run_dir="r", init_from="x")
    beginning = Beginning(plan=two_channels, config=config, validation=(), has_own_network=False)
    match = beginning._match(begun, UNet(2, 3, one))
    reads = ["encoder.0.0.first.conv.weight", "encoder.0.0.shortcut.0.weight"]
    assert list(match.new) == (["encoder.0.0.conv.weight"] if block == "plain" else reads)
    with pytest.raises(InputError, match="would begin anew and never be trained"):
        replace(beginning, config=replace(config, freeze="encoder"))._match(begun, UNet(2, 3, one))


def test_another_network_is_refused_with_what_differs_and_how_to_plan_the_same(
    plan, store, splits, make_config, source
):
    wider = replace(plan, network=replace(plan.network, features_per_stage=(4, 16)))
    with pytest.raises(InputError) as refused:
        fit_fold(wider, store, splits, make_config(init_from=str(source), **SHORT))
    said = str(refused.value)
    assert "features_per_stage (there (4, 8), here (4, 16))" in said
    assert "encoder.1.0.conv.weight (there [8, 4, 3, 3, 3], here [16, 4, 3, 3, 3])" in said
    assert "best.ckpt" in said
    assert "network" in refused.value.fix


def test_networks_that_differ_in_no_shape_are_refused_by_their_plans(plan, store, splits, make_config, source):
    """Groups of a norm are in no tensor."""
    other = replace(plan, network=replace(plan.network, num_groups=4))
    with pytest.raises(InputError, match=r"num_groups \(there 2, here 4\)"):
        fit_fold(other, store, splits, make_config(init_from=str(source), **SHORT))


def test_a_refused_start_leaves_a_folder_that_the_corrected_command_uses(plan, store, splits, make_config, source):
    with pytest.raises(InputError, match="does not exist"):
        fit_fold(plan, store, splits, make_config(init_from=str(source / "nowhere"), **SHORT))
    assert not (Path(make_config().run_dir) / "config.yaml").exists()
    result = fit_fold(plan, store, splits, make_config(init_from=str(source), **SHORT))
    assert result.counts.epoch == 1


def test_the_advice_of_a_planned_network_gives_that_network(plan):
    patch, spacing = (96, 64, 32), (0.8, 0.8, 2.5)
    options = {"base_features": 8, "max_features": 48, "block": "residual", "norm": "instance", "num_groups": 4}
    planned = replace(
        plan,
        patch_size=patch,
        target_spacing=spacing,
        network=make_topology(patch, spacing, **options),
    )
    said = planning_advice(planned)
    words = dict(part.split(" ", 1) for part in said.split(" --")[1:])
    assert {key: str(value) for key, value in options.items()}.items() <= words.items()
    assert (words["patch_size"], words["target_spacing"]) == ('"[96, 64, 32]"', '"[0.8, 0.8, 2.5]"')


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda source, folder: folder / "gone", "does not exist"),
        (lambda source, folder: folder, "no run folder"),
        (lambda source, folder: source.parent, "Give one of its runs: .*run"),
        (lambda source, folder: _torn(source, folder), "no readable checkpoint"),
        (lambda source, folder: _flipped(source, folder), "is damaged"),
        (lambda source, folder: _text(folder), "no readable checkpoint"),
        (lambda source, folder: _foreign(folder), "holds no network weights"),
        (lambda source, folder: _of_another(folder), "none of its tensors"),
        (lambda source, folder: _saved(folder, {"state_dict": [1, 2]}), "holds no network weights"),
        (lambda source, folder: _saved(folder, {"state_dict": {7: torch.zeros(3)}}), "holds no network weights"),
        (lambda source, folder: _saved(folder, {"ema_state_dict": torch.zeros(3)}), "holds no network weights"),
        (lambda source, folder: _saved(folder, {"state_dict": {"network.a": 3}, "counts": {"epoch": None}}), "none of"),
        (lambda source, folder: _diverged(source, folder), "1 of .* tensors hold NaN or infinity, the first is heads"),
        (lambda source, folder: _only_last(source, folder), "no best checkpoint yet.*last.ckpt"),
    ],
)
def test_what_is_no_source_is_named(plan, store, splits, make_config, source, tmp_path, make, expected):
    folder = tmp_path / "given"
    folder.mkdir()
    with pytest.raises(InputError, match=expected):
        fit_fold(plan, store, splits, make_config(init_from=str(make(source, folder)), **SHORT))


def _torn(source: Path, folder: Path) -> Path:
    (folder / "x.ckpt").write_bytes((source / "checkpoints" / "best.ckpt").read_bytes()[:-2000])
    return folder / "x.ckpt"


def _flipped(source: Path, folder: Path) -> Path:
    weights = read_weights(source / "checkpoints" / "best.ckpt")["encoder.1.0.conv.weight"]
    content = (source / "checkpoints" / "best.ckpt").read_bytes()
    place = content.index(weights.numpy().tobytes())
    (folder / "x.ckpt").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    return folder / "x.ckpt"


def _text(folder: Path) -> Path:
    (folder / "x.ckpt").write_text("weights")
    return folder / "x.ckpt"


def _foreign(folder: Path) -> Path:
    torch.save({"model": torch.zeros(3)}, folder / "x.ckpt")
    return folder / "x.ckpt"


def _of_another(folder: Path) -> Path:
    torch.save({"state_dict": {"network.a": torch.zeros(3)}}, folder / "x.ckpt")
    return folder / "x.ckpt"


def _saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "x.ckpt")
    return folder / "x.ckpt"


def _diverged(source: Path, folder: Path) -> Path:
    weights = read_weights(source / "checkpoints" / "best.ckpt")
    weights["heads.0.bias"][1] = torch.nan
    return _saved(folder, {"state_dict": {f"network.{key}": value for key, value in weights.items()}})


def _only_last(source: Path, folder: Path) -> Path:
    (folder / "checkpoints").mkdir()
    shutil.copy(source / "checkpoints" / "last.ckpt", folder / "checkpoints")
    return folder


def failing_at(*numbers: int, error: type[Exception] = PowerCutError):
    """A forward pass of the U-Net that fails at given training passes."""
    plain, passes = UNet.forward, []

    def forward(network: UNet, x: Tensor):
        passes.extend([x.shape] * network.training)
        if network.training and len(passes) in numbers:
            raise error
        return plain(network, x)

    return forward


def test_a_run_goes_on_and_predicts_without_its_source(plan, store, splits, make_config, source, tmp_path, monkeypatch):
    copy = shutil.copytree(source, tmp_path / "copy")
    options = {"init_from": str(copy), "freeze": "encoder", "iterations_per_epoch": 2, "validate_every_n_epochs": 1}
    whole = fit_fold(plan, store, splits, make_config("whole", max_epochs=2, **options))
    config = make_config("cut", max_epochs=2, **options)
    with monkeypatch.context() as patch:
        patch.setattr(UNet, "forward", failing_at(4))
        with pytest.raises(PowerCutError):
            fit_fold(plan, store, splits, config)
    begun = initial_of(Path(config.run_dir))
    shutil.rmtree(copy)
    cut = fit_fold(plan, store, splits, config)
    assert initial_of(cut.run_dir) == begun == initial_of(whole.run_dir)
    expected, found = read_weights(whole.last_checkpoint), read_weights(cut.last_checkpoint)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert Predictor.from_runs([cut.run_dir]) is not None


def test_another_source_on_resume_is_another_option(plan, store, splits, make_config, source):
    fit_fold(plan, store, splits, make_config(init_from=str(source), **SHORT))
    with pytest.raises(InputError, match=r"init_from \(was .*run, now \)"):
        fit_fold(plan, store, splits, make_config(**SHORT))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_frozen_encoder_stays_bit_by_bit_while_the_rest_learns(plan, store, splits, make_config, source, optimizer):
    optim = OptimConfig(name=optimizer, weight_decay=0.1, ema_decay=0.9)
    config = make_config(init_from=str(source), freeze="encoder", optim=optim, effective_batch=4)
    result = fit_fold(plan, store, splits, config)
    expected = read_weights(RunFolder(source).best_checkpoint)
    checkpoint = torch.load(result.last_checkpoint, weights_only=True)
    trained = {key.removeprefix("network."): value for key, value in checkpoint["state_dict"].items()}
    for found in (trained, checkpoint["ema_state_dict"]):
        for key, value in expected.items():
            assert torch.equal(found[key], value) == key.startswith("encoder."), key
    (optimizer_state,) = checkpoint["optimizer_states"]
    held = [index for group in optimizer_state["param_groups"] for index in group["params"]]
    assert len(held) == len(optimizer_state["state"]) == sum(not key.startswith("encoder.") for key in expected)


def test_a_step_down_goes_on_with_the_weights_and_the_frozen_encoder(
    plan, store, splits, make_config, source, monkeypatch
):
    leaner = replace(plan.rung, recompute_stages=2)
    ladder = replace(plan, fallbacks=(leaner,))
    options = {"init_from": str(source), "freeze": "encoder", "iterations_per_epoch": 3, "max_epochs": 2}
    whole = fit_fold(ladder, store, splits, make_config("whole", **options))
    with monkeypatch.context() as patch:
        patch.setattr(UNet, "forward", failing_at(5, error=torch.OutOfMemoryError))
        result = fit_fold(ladder, store, splits, make_config("down", **options))
    assert len(RunFolder(result.run_dir).read_record().step_downs) == 1
    assert initial_of(result.run_dir) == initial_of(whole.run_dir)
    expected, found = read_weights(whole.last_checkpoint), read_weights(result.last_checkpoint)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_frozen_batch_norm_keeps_its_running_statistics(plan, store, splits, make_config):
    batch = replace(plan, network=replace(plan.network, norm="batch"))
    first = fit_fold(batch, store, splits, make_config("first", **SHORT))
    config = make_config("second", init_from=str(first.run_dir), freeze="encoder", **SHORT)
    second = fit_fold(batch, store, splits, config)
    expected, found = read_weights(first.best_checkpoint), read_weights(second.last_checkpoint)
    statistics = [key for key in expected if "running_mean" in key]
    assert statistics
    for key in statistics:
        assert torch.equal(found[key], expected[key]) == key.startswith("encoder."), key


def test_what_the_plans_see_otherwise_is_listed(plan, store, splits, make_config, source, caplog):
    channel = ChannelPlan(name="CT", scheme="ct", lower=-100, upper=300, mean=50, std=80)
    other = replace(with_classes(plan, "liver", "tumour"), target_spacing=(1.0, 2.0, 1.5), channels=(channel,))
    result = fit_fold(other, store, splits, make_config(init_from=str(source), fold=1, **SHORT))
    differences = initial_of(result.run_dir).differences
    assert differences == (
        "voxels are of 1 x 1 x 1.5 mm there and of 1 x 2 x 1.5 mm here",
        "channel 1 is T1 (zscore) there and CT (ct: clipped to -100 .. 300, mean 50, std 80) here",
        "the head was kept, though its classes are outer, inner there and liver, tumour here",
        "2 of 2 validation cases have the names of cases that the weights were trained on, which would flatter their"
        " scores",
    )
    assert all(each in caplog.text for each in differences)


def test_nothing_is_listed_where_nothing_differs(plan, store, splits, make_config, source, caplog):
    caplog.set_level(logging.WARNING, "voxfit")
    result = fit_fold(plan, store, splits, make_config(init_from=str(source), **SHORT))
    assert initial_of(result.run_dir).differences == ()
    assert "init_from" not in caplog.text


def test_a_network_of_one_s_own_begins_with_its_own_weights_and_a_new_head_for_other_classes(
    plan, store, splits, make_config
):
    first = fit_fold(plan, store, splits, make_config("first", **SHORT), network=Tiny())
    again = make_config("again", init_from=str(first.run_dir), optim=STILL, **SHORT)
    second = fit_fold(plan, store, splits, again, network=Tiny())
    expected, found = read_weights(first.best_checkpoint), read_weights(second.last_checkpoint)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    other = make_config("other", init_from=str(first.run_dir), **SHORT)
    third = fit_fold(with_classes(plan, "a", "b", "c"), store, splits, other, network=Tiny(4))
    assert [each.split()[0] for each in initial_of(third.run_dir).new] == ["out.weight", "out.bias"]
    config = make_config("frozen", init_from=str(first.run_dir), freeze="encoder", **SHORT)
    with pytest.raises(InputError, match="freeze encoder: is for the plan's U-Net"):
        fit_fold(plan, store, splits, config, network=Tiny())


def test_frozen_parameters_of_a_network_of_one_s_own_are_not_trained(plan, store, splits, make_config):
    network = Tiny()
    network.body.requires_grad_(False)
    before = network.body.weight.clone()
    fit_fold(plan, store, splits, make_config(optim=OptimConfig(weight_decay=0.1), **SHORT), network=network)
    assert torch.equal(network.body.weight, before)


def test_freeze_without_a_source_is_refused(make_config):
    with pytest.raises(InputError, match="freeze: encoder goes with init_from"):
        make_config(freeze="encoder")


def test_ranks_begin_alike_and_one_of_them_says_so(ranked_trainings, trainings, source, tmp_path, capfd):
    """The sum over two processes is that of one."""
    words = ("--init_from", str(source), "--freeze", "encoder", "--max_epochs", "2", "--iterations_per_epoch", "4")
    # Of this fold the source has seen the validation cases, which is worth a warning.
    words += ("--fold", "1")
    ranked_trainings.finish(tmp_path / "two", 2, *words)
    assert capfd.readouterr().err.count("would flatter their scores") == 1
    assert main(["train", *trainings.arguments, *words, "--run_dir", str(tmp_path / "one")]) == 0
    one, two = (read_weights(RunFolder(tmp_path / name).last_checkpoint) for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5)
    assert initial_of(tmp_path / "one") == initial_of(tmp_path / "two")
    begun = read_weights(RunFolder(source).best_checkpoint)
    assert all(torch.equal(two[key], value) for key, value in begun.items() if key.startswith("encoder."))
