"""Out-of-memory errors, forced wherever a training can have them: they cost a rung and nothing else."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from pipeline.artifacts import read_artifact, write_artifact
from pipeline.config import OptimConfig
from pipeline.errors import InputError, StoppedError
from pipeline.networks.blocks import DecoderStage
from pipeline.networks.out_of_memory import let_go
from pipeline.networks.unet import UNet
from pipeline.plan import Plan, Rung
from pipeline.run_record import Counts, RunRecord
from pipeline.training import validation
from pipeline.training.checkpoints import AtomicCheckpointIO
from pipeline.training.recovery import free_memory
from pipeline.training.run_folder import RunFolder
from pipeline.training.trainer import fit_fold

PATCH, SMALLER = (16, 8, 12), (8, 8, 8)
PLAIN = Rung(patch_size=PATCH, batch_size=2)
RECOMPUTED = tuple(replace(PLAIN, recompute_stages=stages) for stages in (1, 2))
SPLIT = replace(RECOMPUTED[1], batch_size=1, accumulate_grad_batches=2)
SMALL = replace(SPLIT, patch_size=SMALLER)
# Three iterations in steps of two: the last step of an epoch is over one iteration. Validated after epochs 2 and 3.
OPTIONS = {"effective_batch": 4, "iterations_per_epoch": 3, "max_epochs": 3, "validate_every_n_epochs": 2}
OOM = torch.OutOfMemoryError


@pytest.fixture
def ladder(plan) -> Plan:
    """Two rungs that only recompute."""
    return replace(plan, fallbacks=RECOMPUTED)


@pytest.fixture
def long_ladder(plan) -> Plan:
    """Recomputation, a smaller batch, a smaller patch."""
    return replace(plan, fallbacks=(RECOMPUTED[0], SPLIT, SMALL))


def options_with(optimizer: str = "sgd", **more) -> dict:
    return {**OPTIONS, "optim": OptimConfig(name=optimizer, ema_decay=0.9), **more}


@pytest.fixture(scope="module")
def whole(plan, store, splits, config_in, tmp_path_factory) -> dict[str, Path]:
    """Runs without an out-of-memory, by optimiser."""
    runs = {}
    for optimizer in ("sgd", "adamw"):
        config = config_in(tmp_path_factory.mktemp(optimizer), **options_with(optimizer))
        runs[optimizer] = fit_fold(plan, store, splits, config).run_dir
    return runs


class Faults:
    """Raises errors at given passes of the U-Net, counted from 1 over all attempts, while the context is open.

    Args:
        forward, backward, validation: Numbers of training passes, of their backward passes, of validation windows.
        error: Made anew for each.
    """

    def __init__(self, *, forward=(), backward=(), validation=(), error: Callable[[], Exception] = OOM) -> None:
        self.at = {"forward": set(forward), "backward": set(backward), "validation": set(validation)}
        self.passes = dict.fromkeys(self.at, 0)
        self.error = error
        self.shapes: list[tuple[int, ...]] = []
        self.networks: list[UNet] = []

    def __enter__(self) -> Faults:
        self.handles = [register_module_forward_pre_hook(self._before), register_module_forward_hook(self._after)]
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        if isinstance(module, UNet) and module.training:
            self.networks.append(module)
            self.shapes.append(tuple(inputs[0].shape))
            self._count("forward")
        # A validation need not call the network as a whole; its only decoder stage is in every window.
        if isinstance(module, DecoderStage) and not module.training:
            self._count("validation")

    def _after(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """In the middle of the backward pass, when the decoder's gradients are there and the encoder's are not."""
        network = self.networks[-1] if self.networks else None
        if network is not None and network.training and module is network.encoder[-1] and output.requires_grad:
            output.register_hook(lambda gradient: self._count("backward"))

    def _count(self, kind: str) -> None:
        self.passes[kind] += 1
        if self.passes[kind] in self.at[kind]:
            raise self.error()


def record_of(config) -> RunRecord:
    return read_artifact(RunFolder(Path(config.run_dir)).record, RunRecord)


@pytest.mark.parametrize(
    ("place", "at"),
    [
        ("forward", 1),
        ("forward", 2),
        ("forward", 6),
        ("backward", 1),
        ("backward", 3),
        ("backward", 4),
        ("backward", 8),
    ],
)
def test_an_out_of_memory_in_a_pass_changes_nothing_but_the_rung(
    ladder, store, splits, make_config, whole, assert_same_run, caplog, place, at
):
    caplog.set_level(logging.INFO, "voxfit")
    config = make_config(**options_with())
    with Faults(**{place: [at]}) as faults:
        result = fit_fold(ladder, store, splits, config)
    assert_same_run(result.run_dir, whole["sgd"])
    epochs, passes = divmod(at - 1, 3)
    counts = Counts(epoch=epochs, iteration=3 * epochs + passes - passes % 2, optimizer_step=2 * epochs + passes // 2)
    (step,) = record_of(config).step_downs
    assert (step.where, step.counts, step.continued_from, step.fallback) == (place, counts, counts, 1)
    assert (step.from_rung.recompute_stages, step.to_rung.recompute_stages) == (0, 1)
    assert faults.networks[-1].recompute_stages == 1
    (line,) = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert f"out of memory in the {place} pass after optimiser step {counts.optimizer_step}: stepping down" in line
    assert f"going on from optimiser step {counts.optimizer_step}" in line
    assert "\n" not in line
    # Nothing but the unfinished step was done again.
    assert faults.passes["forward"] == 9 + 1 + passes % 2


@pytest.fixture
def in_slabs(plan) -> Plan:
    """The first stage in slabs; below it rungs that recompute, and one that keeps less of a window on the device."""
    recomputed = replace(PLAIN, slab_stages=1, recompute_stages=2)
    return replace(plan, slab_stages=1, fallbacks=(recomputed, replace(recomputed, offload_stages=1)))


@pytest.fixture
def fail_case(monkeypatch) -> Callable[..., None]:
    """Lets the validation of the n-th case raise, counted from the call on."""

    def fail(*, at: int) -> None:
        real, calls = validation.sliding_window_labels, count(1)

        def maybe(*args, **options) -> Tensor:
            if next(calls) == at:
                raise OOM
            return real(*args, **options)

        monkeypatch.setattr(validation, "sliding_window_labels", maybe)

    return fail


@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_out_of_memory_in_a_validation_goes_to_a_rung_that_helps_it_and_does_no_training_step_again(
    in_slabs, store, splits, make_config, assert_same_run, fail_case, at
):
    whole = fit_fold(in_slabs, store, splits, make_config("whole", **options_with("adamw")))
    config = make_config(**options_with("adamw"))
    fail_case(at=at)
    with Faults() as faults:
        result = fit_fold(in_slabs, store, splits, config)
    assert_same_run(result.run_dir, whole.run_dir)
    assert faults.passes["forward"] == 9
    (step,) = record_of(config).step_downs
    epoch = step.counts.epoch
    assert (step.where, step.scores_on_host, step.fallback) == ("validation", True, 2)
    assert step.counts == Counts(epoch=epoch, iteration=3 * (epoch + 1), optimizer_step=2 * (epoch + 1))


@pytest.fixture
def fail_kernels(monkeypatch) -> Callable[..., Iterator[int]]:
    """Lets a fused kernel raise instead of doing anything at its n-th call."""

    def fail(kernel: str, *, at: int) -> Iterator[int]:
        real, calls = getattr(torch, kernel), count(1)

        def maybe(*args, **options):
            if next(calls) == at:
                raise OOM("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return real(*args, **options)

        monkeypatch.setattr(torch, kernel, maybe)
        return calls

    return fail


@pytest.mark.parametrize(("at", "step"), [(1, 0), (2, 1), (5, 4)])
def test_an_out_of_memory_before_anything_was_updated_costs_no_step(
    ladder, store, splits, make_config, whole, assert_same_run, fail_kernels, at, step
):
    """The momentum that a failed first step made is dropped."""
    fail_kernels("_fused_sgd_", at=at)
    config = make_config(**options_with("sgd"))
    result = fit_fold(ladder, store, splits, config)
    assert_same_run(result.run_dir, whole["sgd"])
    (down,) = record_of(config).step_downs
    assert down.where == "optimiser"
    assert down.counts.optimizer_step == down.continued_from.optimizer_step == step


@pytest.mark.parametrize(("at", "step", "epoch"), [(1, 0, 0), (2, 0, 0), (4, 1, 0), (6, 2, 1), (10, 4, 2)])
def test_a_step_left_half_done_is_taken_up_from_the_checkpoint_before_it(
    ladder, store, splits, make_config, whole, assert_same_run, fail_kernels, caplog, at, step, epoch
):
    """AdamW updates kernels, then norms and biases: even calls fail when half of the weights are new."""
    fail_kernels("_fused_adamw_", at=at)
    config = make_config(**options_with("adamw"))
    result = fit_fold(ladder, store, splits, config)
    assert_same_run(result.run_dir, whole["adamw"])
    (down,) = record_of(config).step_downs
    assert down.counts.optimizer_step == step
    assert down.continued_from == Counts(epoch=epoch, iteration=3 * epoch, optimizer_step=2 * epoch)
    assert ("later ones are repeated" in caplog.text) == (down.continued_from != down.counts)


@pytest.mark.parametrize(("optimizer", "at"), [("sgd", 1), ("sgd", 4), ("adamw", 2)])
def test_an_out_of_memory_after_the_update_is_no_finished_step(
    ladder, store, splits, make_config, whole, assert_same_run, optimizer, at
):
    """As where the fp16 scale is adapted, or averaged weights follow."""
    calls = count(1)

    def fail(*_) -> None:
        if next(calls) == at:
            raise OOM

    handle = register_optimizer_step_post_hook(fail)
    try:
        result = fit_fold(ladder, store, splits, make_config(**options_with(optimizer)))
    finally:
        handle.remove()
    assert_same_run(result.run_dir, whole[optimizer])


MOMENTUM = -1


class Faulty(torch.optim.SGD):
    """Plain SGD that runs out of memory at its n-th step, with some parameters, only momentum or nothing updated."""

    failing: tuple[int, int] = (0, 0)
    steps = count(1)

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        at, updated = self.failing
        if next(Faulty.steps) == at:
            with torch.no_grad():
                parameters = self.param_groups[0]["params"]
                if updated == MOMENTUM and parameters[0] in self.state:
                    self.state[parameters[0]]["momentum_buffer"].add_(1.0)
                for parameter in parameters[: max(updated, 0)]:
                    parameter.add_(1.0)
            raise OOM
        super().step()
        return loss


@pytest.mark.parametrize(("at", "updated"), [(1, 0), (1, 1), (2, 0), (2, MOMENTUM), (2, 1), (6, MOMENTUM), (6, 5)])
def test_a_parameter_changed_in_place_is_noticed_whatever_the_optimiser(
    ladder, store, splits, make_config, assert_same_run, monkeypatch, at, updated
):
    def make(network: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
        return Faulty(network.parameters(), lr=0.01, momentum=0.9, fused=False)

    monkeypatch.setattr("pipeline.training.module.make_optimizer", make)
    monkeypatch.setattr("pipeline.training.module.has_fused_kernels", lambda network: False)
    runs = []
    for name, failing in (("whole", (0, 0)), ("cut", (at, updated))):
        monkeypatch.setattr(Faulty, "failing", failing)
        monkeypatch.setattr(Faulty, "steps", count(1))
        runs.append(fit_fold(ladder, store, splits, make_config(name, **options_with())))
    assert_same_run(runs[1].run_dir, runs[0].run_dir)
    (down,) = record_of(make_config("cut")).step_downs
    assert (down.continued_from == down.counts) == (updated == 0 or at in (1, 3, 5))


def test_a_validation_that_runs_out_of_memory_does_not_take_rungs_that_cannot_help_it(
    long_ladder, store, splits, make_config
):
    config = make_config(**options_with())
    with Faults(validation=[9]) as faults:
        result = fit_fold(long_ladder, store, splits, config)
    assert [(step.where, step.fallback) for step in record_of(config).step_downs] == [("validation", 3)]
    assert faults.shapes[:6] == [(2, 1, *PATCH)] * 6
    assert faults.shapes[6:] == [(1, 1, *SMALLER)] * 6
    assert result.counts == Counts(epoch=3, iteration=9, optimizer_step=6)


def test_a_validation_that_no_rung_helps_ends_with_advice_and_is_done_again_where_there_is_room(
    ladder, store, splits, make_config, whole, assert_same_run
):
    config = make_config(**options_with())
    with Faults(validation=[9]), pytest.raises(InputError) as raised:
        fit_fold(ladder, store, splits, config)
    message = str(raised.value)
    assert message.startswith("plan.json: out of memory in the validation after optimiser step 4, and no rung below")
    assert "plain runs the windows of a validation otherwise" in message
    assert "The same command goes on from optimiser step 4" in message
    assert not record_of(config).step_downs
    with Faults() as faults:
        result = fit_fold(ladder, store, splits, config)
    assert faults.passes["forward"] == 3
    assert_same_run(result.run_dir, whole["sgd"])


def test_several_in_a_row_go_down_rung_by_rung_and_keep_the_effective_batch_and_the_patches(
    long_ladder, store, splits, make_config, whole, rows_of, caplog
):
    config = make_config(**options_with())
    with Faults(forward=[2, 3], backward=[6]) as faults:
        result = fit_fold(long_ladder, store, splits, config)
    steps = record_of(config).step_downs
    assert [(step.fallback, step.to_rung.batch_size, step.to_rung.patch_size) for step in steps] == [
        (1, 2, PATCH),
        (2, 1, PATCH),
        (3, 1, SMALLER),
    ]
    assert all(step.to_rung.batch_size * step.to_rung.accumulate_grad_batches == 4 for step in steps)
    assert "the same cases from here on, in smaller patches, and validation in smaller windows" in caplog.text
    assert faults.shapes[-1] == (1, 1, *SMALLER)
    counts = [
        tuple(int(row[key]) for key in ("epoch", "iteration", "optimizer_step")) for row in rows_of(result.run_dir)
    ]
    assert counts == [(1, 3, 2), (2, 6, 4), (3, 9, 6)]
    record = record_of(config)
    assert (record.patch_size, record.batch_size, record.accumulate_grad_batches) == (SMALLER, 1, 4)
    assert result.counts == Counts(epoch=3, iteration=9, optimizer_step=6)


def test_after_a_step_down_to_a_smaller_batch_the_training_stays_the_same_up_to_rounding(
    plan, store, splits, make_config, rows_of
):
    """Same patches, same steps, every patch weighted alike, in the partial step of an epoch and the mean loss too.

    Trained without the case that has ignored voxels: a mean over voxels of two patches is not that of their means then.
    """
    assert "case_0" not in splits.folds[1].train
    whole = fit_fold(plan, store, splits, make_config("whole", **options_with(fold=1)))
    config = make_config(**options_with(fold=1))
    with Faults(forward=[5]) as faults:
        result = fit_fold(replace(plan, fallbacks=(SPLIT,)), store, splits, config)
    assert faults.shapes[-1] == (1, 1, *PATCH)
    found, expected = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (result.run_dir, whole.run_dir)
    )
    start = UNet(plan.num_channels, plan.num_classes, plan.network).state_dict()
    moved = max(float((expected[f"network.{key}"] - value).abs().max()) for key, value in start.items())
    assert moved > 1e-2
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) < 1e-5
    for row, other in zip(rows_of(result.run_dir), rows_of(whole.run_dir), strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-5)
        assert (row["iteration"], row["optimizer_step"], row["lr"]) == (
            other["iteration"],
            other["optimizer_step"],
            other["lr"],
        )


def test_at_the_last_rung_a_run_ends_with_advice_and_goes_on_when_there_is_room(
    ladder, store, splits, make_config, whole, assert_same_run
):
    config = make_config(**options_with())
    with Faults(forward=[5, 6, 7]) as faults, pytest.raises(InputError) as raised:
        fit_fold(ladder, store, splits, config)
    message = str(raised.value)
    assert message.startswith(
        "plan.json: out of memory in the forward pass after optimiser step 2, and no rung is left"
    )
    assert "recompute 1-2" in message
    assert "GiB, of which the training held up to" in message
    assert "The same command goes on from optimiser step 2" in message
    assert "smaller --vram" in message
    assert "\n" not in message
    assert raised.value.exit_code == 2
    with faults:
        result = fit_fold(ladder, store, splits, config)
    assert faults.networks[-1].recompute_stages == 2
    assert_same_run(result.run_dir, whole["sgd"])


def test_an_option_given_by_hand_that_leaves_no_rung_is_named(ladder, store, splits, make_config):
    config = make_config(**options_with(), hardware={"recompute_stages": 0})
    with Faults(forward=[5]), pytest.raises(InputError, match="no rung is left below") as raised:
        fit_fold(ladder, store, splits, config)
    assert "leave hardware.recompute_stages to the plan, which has other rungs" in str(raised.value)


def test_a_plan_without_fallbacks_ends_at_once_and_resumably(plan, store, splits, make_config, whole, assert_same_run):
    config = make_config(**options_with())
    with Faults(backward=[6]), pytest.raises(InputError, match="no rung is left"):
        fit_fold(plan, store, splits, config)
    assert not record_of(config).step_downs
    assert_same_run(fit_fold(plan, store, splits, config).run_dir, whole["sgd"])


def test_a_run_that_is_stopped_later_goes_on_at_the_rung_it_had_reached(
    ladder, store, splits, make_config, whole, assert_same_run
):
    config = make_config(**options_with())
    with Faults(forward=[2]), Faults(forward=[8], error=KeyboardInterrupt), pytest.raises(StoppedError):
        fit_fold(ladder, store, splits, config)
    with Faults(forward=[3]) as faults:
        result = fit_fold(ladder, store, splits, config)
    assert [network.recompute_stages for network in faults.networks[:3]] == [1, 1, 1]
    assert faults.networks[-1].recompute_stages == 2
    assert [step.fallback for step in record_of(config).step_downs] == [1, 2]
    assert_same_run(result.run_dir, whole["sgd"])


@pytest.mark.parametrize(
    "error",
    [lambda: RuntimeError("CUDA error: an illegal memory access"), lambda: ValueError("more than 1 value per channel")],
)
def test_an_error_that_is_no_out_of_memory_ends_the_run_as_it_is(ladder, store, splits, make_config, error):
    config = make_config(**options_with())
    with Faults(forward=[2], error=error), pytest.raises((RuntimeError, ValueError)) as raised:
        fit_fold(ladder, store, splits, config)
    assert str(raised.value) == str(error())
    assert not record_of(config).step_downs


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OOM, "OutOfMemoryError"),
        (lambda: OOM("CUDA out of memory.\nTried a lot.\n"), "CUDA out of memory."),
        (lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        (lambda: MemoryError(), "MemoryError"),
    ],
)
def test_the_error_may_say_anything_or_nothing(ladder, store, splits, make_config, error, said):
    """A handler that looked for words in it failed once."""
    config = make_config(**options_with())
    with Faults(forward=[2], error=error):
        fit_fold(ladder, store, splits, config)
    assert [step.error for step in record_of(config).step_downs] == [said]


def test_memory_that_the_host_really_does_not_have_is_recovered_from(
    ladder, store, splits, make_config, whole, assert_same_run
):
    def exhaust() -> Exception:
        torch.empty(2**60)
        raise AssertionError

    config = make_config(**options_with())
    with Faults(backward=[4], error=exhaust):
        result = fit_fold(ladder, store, splits, config)
    assert "DefaultCPUAllocator: can't allocate memory" in record_of(config).step_downs[0].error
    assert_same_run(result.run_dir, whole["sgd"])


def test_what_the_failed_attempt_held_is_free_before_the_next_one_begins(ladder, store, splits, make_config):
    held: list[weakref.ref] = []
    alive: list[int] = []

    class Watch(Faults):
        def _after(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            super()._after(module, inputs, output)
            if self.passes["backward"] == 0 and isinstance(output, Tensor):
                held.extend([weakref.ref(output), weakref.ref(module)])

        def _before(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
            if isinstance(module, UNet) and self.passes["backward"] == 1 and not alive:
                self.networks.clear()
                alive.append(sum(each() is not None for each in held))
            super()._before(module, inputs)

    gc.disable()
    try:
        with Watch(backward=[1]):
            fit_fold(ladder, store, splits, make_config(**options_with()))
    finally:
        gc.enable()
    assert len(held) > 10
    assert alive == [0]


class Own(nn.Module):
    """A network of the user's own, whose weights exist nowhere but in this object."""

    def __init__(self, plan, *, fails_at: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Conv3d(plan.num_channels, 4, 3, padding=1), nn.GELU(), nn.Conv3d(4, 3, 1))
        self.fails_at, self.shapes = fails_at, []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.shapes.append(tuple(x.shape))
            if len(self.shapes) in self.fails_at:
                raise OOM
        return self.layers(x)


def test_a_network_of_ones_own_skips_rungs_that_only_run_the_plans_network_otherwise(
    long_ladder, store, splits, make_config
):
    config, network = make_config(**options_with()), Own(long_ladder, fails_at=(1, 4))
    fit_fold(long_ladder, store, splits, config, network=network)
    assert [step.fallback for step in record_of(config).step_downs] == [2, 3]
    assert [network.shapes[index] for index in (0, 1, 4)] == [(2, 1, *PATCH), (1, 1, *PATCH), (1, 1, *SMALLER)]
    assert all(step.to_rung.recompute_stages == 0 for step in record_of(config).step_downs)


def test_a_first_step_left_half_done_gives_a_network_of_ones_own_back_as_it_came(
    plan, store, splits, make_config, assert_same_run, fail_kernels
):
    split = replace(plan, fallbacks=(SPLIT,))
    runs = []
    for name in ("half", "before"):
        config, network = make_config(name, **options_with("adamw", batch_size="auto")), Own(plan)
        fail_kernels("_fused_adamw_", at=2 if name == "half" else 1)
        runs.append(fit_fold(split, store, splits, config, network=network).run_dir)
        assert record_of(config).step_downs[0].where == "optimiser"
    assert_same_run(*runs)


def test_the_last_scoring_of_all_cases_may_run_out_of_memory_too(
    in_slabs, store, splits, make_config, rows_of, fail_case
):
    """One case is scored after the second and the third epoch, and both at the end."""
    options = options_with(max_validation_cases=1)
    whole = fit_fold(in_slabs, store, splits, make_config("whole", **options))
    config = make_config(**options)
    fail_case(at=4)
    with Faults() as faults:
        result = fit_fold(in_slabs, store, splits, config)
    assert (result.best_dice, result.counts) == (whole.best_dice, whole.counts)
    assert record_of(config).validation == record_of(make_config("whole")).validation
    assert faults.passes["forward"] == 9
    assert rows_of(result.run_dir) == rows_of(whole.run_dir)
    assert [step.where for step in record_of(config).step_downs] == ["validation"]


def test_memory_that_runs_out_while_a_batch_is_made_ready_is_said_to_have_done_so(
    ladder, store, splits, make_config, whole, assert_same_run, monkeypatch
):
    from pipeline.training.datamodule import PatchDataModule

    real, calls = PatchDataModule.on_after_batch_transfer, count(1)

    def fail(self, batch, dataloader_idx):
        if next(calls) == 4:
            raise OOM
        return real(self, batch, dataloader_idx)

    monkeypatch.setattr(PatchDataModule, "on_after_batch_transfer", fail)
    config = make_config(**options_with())
    assert_same_run(fit_fold(ladder, store, splits, config).run_dir, whole["sgd"])
    assert [step.where for step in record_of(config).step_downs] == ["data"]


def test_memory_that_is_short_before_the_first_batch_costs_a_rung_too(
    ladder, store, splits, make_config, whole, assert_same_run, monkeypatch
):
    real, calls = UNet._apply, count(1)

    def fail(self, *args, **options):
        """Where the network goes to its device."""
        if next(calls) == 1:
            raise OOM
        return real(self, *args, **options)

    monkeypatch.setattr(UNet, "_apply", fail)
    config = make_config(**options_with())
    assert_same_run(fit_fold(ladder, store, splits, config).run_dir, whole["sgd"])
    assert [step.where for step in record_of(config).step_downs] == ["start"]


def test_an_out_of_memory_while_the_last_step_is_saved_falls_back_on_the_checkpoint_before(
    ladder, store, splits, make_config, whole, assert_same_run, monkeypatch
):
    real, calls = AtomicCheckpointIO.save_checkpoint, count(1)

    def fail(self, *args, **options):
        """The start and the first epoch are saved before."""
        if next(calls) == 3:
            raise MemoryError
        real(self, *args, **options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", fail)
    config = make_config(**options_with(validate_every_n_epochs=3))
    with Faults(forward=[6]):
        result = fit_fold(ladder, store, splits, config)
    (step,) = record_of(config).step_downs
    assert (step.counts.optimizer_step, step.continued_from.optimizer_step) == (3, 2)
    monkeypatch.undo()
    other = fit_fold(ladder, store, splits, make_config("other", **options_with(validate_every_n_epochs=3)))
    assert_same_run(result.run_dir, other.run_dir)


def fail_once(monkeypatch, name: str, *, at: int = 1, error: Callable[[], Exception] = OOM) -> None:
    """Lets what `name` names raise at its n-th call."""
    module, _, attribute = name.rpartition(".")
    owner = resolve_name(module)
    real, calls = getattr(owner, attribute), count(1)

    def maybe(*args, **options):
        if next(calls) == at:
            raise error()
        return real(*args, **options)

    monkeypatch.setattr(owner, attribute, maybe)


@pytest.mark.parametrize("attempt", [1, 2])
@pytest.mark.parametrize(
    "part",
    [
        *(f"pipeline.training.attempt.{part}" for part in ("make_network", "find_checkpoint", "make_data")),
        *("pipeline.training.ema.deepcopy", "pipeline.training.attempt.make_trainer"),
    ],
)
def test_memory_may_run_out_before_there_is_a_training(
    ladder, store, splits, make_config, whole, assert_same_run, monkeypatch, part, attempt
):
    fail_once(monkeypatch, part, at=attempt)
    config = make_config(**options_with())
    with Faults(forward=[5] if attempt == 2 else []):
        result = fit_fold(ladder, store, splits, config)
    assert_same_run(result.run_dir, whole["sgd"])
    step = record_of(config).step_downs[-1]
    after = Counts(epoch=1, iteration=3, optimizer_step=2) if attempt == 2 else Counts()
    assert (step.where, step.counts, step.continued_from, step.fallback) == ("start", after, after, attempt)


def test_memory_that_a_run_lacks_to_read_what_it_goes_on_from_does_not_say_that_it_begins_anew(
    plan, store, splits, make_config, whole, assert_same_run, monkeypatch
):
    config = make_config(**options_with())
    with Faults(forward=[8], error=KeyboardInterrupt), pytest.raises(StoppedError):
        fit_fold(plan, store, splits, config)
    fail_once(monkeypatch, "pipeline.training.attempt.find_checkpoint")
    with pytest.raises(InputError, match="The same command goes on from optimiser step 4 where there is more"):
        fit_fold(plan, store, splits, config)
    assert_same_run(fit_fold(plan, store, splits, config).run_dir, whole["sgd"])


def test_memory_that_runs_out_while_weights_are_read_back_costs_a_rung(
    ladder, store, splits, make_config, whole, assert_same_run, monkeypatch
):
    """Which `load_state_dict` reports as an error of another type, without a cause."""
    real, calls = Tensor.copy_, count(1)

    def copy(self: Tensor, *args, **options) -> Tensor:
        if isinstance(self, nn.Parameter) and next(calls) == 1:
            raise OOM("CUDA out of memory. Tried to allocate 2.00 MiB.")
        return real(self, *args, **options)

    monkeypatch.setattr(Tensor, "copy_", copy)
    config = make_config(**options_with())
    with Faults(forward=[5]):
        result = fit_fold(ladder, store, splits, config)
    assert_same_run(result.run_dir, whole["sgd"])
    assert [step.where for step in record_of(config).step_downs] == ["forward", "start"]


def test_a_shortage_that_hides_how_much_memory_there_is_is_recovered_from_all_the_same(
    ladder, store, splits, make_config, whole, assert_same_run, monkeypatch, caplog
):
    fail_once(monkeypatch, "pipeline.training.recovery.allotted_memory_bytes", error=MemoryError)
    config = make_config(**options_with())
    with Faults(forward=[2]):
        result = fit_fold(ladder, store, splits, config)
    assert_same_run(result.run_dir, whole["sgd"])
    assert "how much memory there is cannot be told" in caplog.text


def test_a_run_that_is_stopped_and_has_no_memory_to_save_the_last_step_is_stopped_all_the_same(
    ladder, store, splits, make_config, whole, assert_same_run, monkeypatch
):
    fail_once(monkeypatch, "pipeline.training.checkpoints.AtomicCheckpointIO.save_checkpoint", at=3, error=MemoryError)
    config = make_config(**options_with())
    with Faults(forward=[6], error=KeyboardInterrupt), pytest.raises(StoppedError):
        fit_fold(ladder, store, splits, config)
    assert_same_run(fit_fold(ladder, store, splits, config).run_dir, whole["sgd"])


def test_a_data_worker_without_memory_costs_no_rung(long_ladder, store, splits, make_config, monkeypatch):
    fail_once(monkeypatch, "pipeline.sampling.patch_dataset.PatchDataset.__getitem__", error=MemoryError)
    config = make_config(**options_with(hardware={"num_workers": 1}))
    with pytest.raises(InputError, match=r"hardware\.num_workers: a data worker ran out of host memory"):
        fit_fold(long_ladder, store, splits, config)
    assert not record_of(config).step_downs


REALLY_SHORT = """
import sys
from dataclasses import replace
from pathlib import Path
from pipeline.artifacts import read_artifact, write_artifact
from pipeline.config import TrainConfig
from pipeline.config import AugmentationConfig, HardwareConfig, OptimConfig
from pipeline.datasets.splits import Splits
from pipeline.plan import Plan
from pipeline.training.probe_memory import hold_to
from pipeline.training.trainer import fit_fold
folder, store = (Path(argument) for argument in sys.argv[1:3])
plan, splits = read_artifact(folder / "plan.json", Plan), read_artifact(folder / "splits.json", Splits)
def run(name, plan, epochs):
    config = TrainConfig(
        plan="plan.json", store=str(store), run_dir=str(folder / name), max_epochs=epochs, iterations_per_epoch=1,
        fold="all", optim=OptimConfig(name="adamw", ema_decay=0.9), augmentation=AugmentationConfig(enabled=False),
        hardware=HardwareConfig(accelerator="cpu", num_workers=0, num_threads=1),
    )
    fit_fold(plan, store, splits, config)
run("small", replace(plan, patch_size=(16, 16, 16), fallbacks=()), 1)
hold_to("cpu", 300 * 2**20)
run("run", plan, 2)
"""


def test_a_process_that_really_runs_short_of_memory_steps_down_and_finishes(plan, store, splits, tmp_path):
    """A step of the plan takes twice the limit, one of the last rung a tenth of it."""
    large = Rung(patch_size=(64, 64, 64), batch_size=2)
    half = replace(large, batch_size=1, accumulate_grad_batches=2)
    rungs = (replace(large, recompute_stages=1), half, *(replace(half, patch_size=(size,) * 3) for size in (32, 16)))
    network = replace(plan.network, features_per_stage=(16, 32), num_blocks_per_stage=(2, 2))
    short = replace(plan, patch_size=large.patch_size, network=network, fallbacks=rungs)
    write_artifact(tmp_path / "plan.json", short)
    write_artifact(tmp_path / "splits.json", splits)
    done = subprocess.run(
        [sys.executable, "-c", REALLY_SHORT, tmp_path, store], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = read_artifact(tmp_path / "run" / "run.json", RunRecord)
    assert record.status == "finished"
    assert record.counts == Counts(epoch=2, iteration=2, optimizer_step=2)
    assert record.step_downs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_gpu_that_really_runs_out_of_memory_is_recovered_from(ladder, store, splits, make_config, precision):
    """A hook asks for more than the card has, in the forward and in the backward pass."""

    def exhaust() -> Exception:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
        raise AssertionError

    config = make_config(**options_with(hardware={"accelerator": "gpu", "precision": precision}))
    with Faults(forward=[2], backward=[5], error=exhaust) as faults:
        result = fit_fold(ladder, store, splits, config)
    assert result.counts == Counts(epoch=3, iteration=9, optimizer_step=6)
    assert [step.where for step in record_of(config).step_downs] == ["forward", "backward"]
    assert all("CUDA out of memory" in step.error for step in record_of(config).step_downs)
    assert faults.networks[-1].recompute_stages == 2


def test_what_a_first_step_made_before_it_failed_is_dropped(
    ladder, store, splits, make_config, whole, assert_same_run, monkeypatch
):
    """Half of AdamW's state for a parameter would be taken for all of it."""
    real, calls = torch.zeros_like, count(1)

    def maybe(like: Tensor, **options) -> Tensor:
        if isinstance(like, nn.Parameter) and next(calls) == 4:
            raise OOM
        return real(like, **options)

    monkeypatch.setattr(torch, "zeros_like", maybe)
    config = make_config(**options_with("adamw"))
    assert_same_run(fit_fold(ladder, store, splits, config).run_dir, whole["adamw"])
    assert [step.where for step in record_of(config).step_downs] == ["optimiser"]


def test_an_error_lets_go_of_what_its_frames_hold_whoever_else_holds_the_frames():
    held = []

    def fail() -> None:
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        try:
            raise ValueError
        except ValueError:
            raise OOM from None

    try:
        fail()
    except OOM as error:
        frame = error.__traceback__.tb_next.tb_frame
        assert held[0]() is not None
        let_go(error)
        assert not frame.f_locals
        assert held[0]() is None


def test_what_a_failed_backward_pass_leaves_undone_is_let_go(plan: Plan) -> None:
    network = UNet(1, 3, plan.network)
    start = torch.randn(1, 1, *PATCH, requires_grad=True)
    kept = start.exp()
    alive = weakref.ref(kept.untyped_storage())

    def run_out_of_memory(_: Tensor) -> None:
        raise OOM("made up")

    network.decoder[0].merge.norm.weight.register_hook(run_out_of_memory)
    value = sum(output.square().mean() for output in network.train()(kept))
    del kept
    with pytest.raises(OOM) as caught:
        value.backward()
    let_go(caught.value)
    del value, caught
    gc.collect()
    assert alive() is not None
    free_memory(network)
    assert alive() is None
