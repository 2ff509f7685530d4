"""The noise scale as real trainings measure it, against closed forms and per-sample gradients."""

from __future__ import annotations

import csv
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from pipeline.config import OptimConfig
from pipeline.errors import InputError
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.unet import UNet
from pipeline.sampling.patch_dataset import PatchDataset
from pipeline.training.datamodule import PatchDataModule
from pipeline.training.gradient_noise import GradientNoise
from pipeline.training.module import SegmentationModule
from pipeline.training.noise_scale import NoiseReading, NoiseSums, signal_and_noise
from pipeline.training.quiet import quiet_lightning
from pipeline.training.trainer import fit_fold

STANDING_STILL = OptimConfig(name="sgd", lr=1e-12, weight_decay=0.0, momentum=0.0)
WEIGHT = torch.tensor([0.9, -0.6, 0.3, 0.5])
SPREAD = torch.tensor([2.0, 1.0, 0.5, 1.5])
NOISE_SCALE = float((SPREAD**2).sum() / (WEIGHT**2).sum())


class Points(Dataset[dict[str, Any]]):
    """Point n is a normal draw of its own: mean zero, standard deviations SPREAD."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(index + 1)
        point = (torch.randn(4, generator=rng) * SPREAD).view(1, 1, 1, 4)
        return {"image": point, "label": point[0], "case_id": str(index), "index": index}


class Overflowing(Points):
    """Every tenth point is infinite."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return item if index % 10 else {**item, "image": item["image"] * torch.inf}


class Distance(nn.Module):
    """Offset of points from WEIGHT: half its square has the gradient WEIGHT - point, in two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(WEIGHT[:1].clone()), nn.Parameter(WEIGHT[1:].clone())

    def forward(self, points: Tensor) -> Tensor:
        return torch.cat([self.first, self.second]) - points.flatten(1)


class HalfSquare(nn.Module):
    """Mean over the batch of half the squared norm."""

    def forward(self, offset: Tensor, label: Tensor) -> Tensor:
        return 0.5 * (offset**2).sum(dim=1).mean()


def fit(
    network: nn.Module,
    dataset: Dataset[dict[str, Any]],
    noise: GradientNoise | None,
    *,
    batch_size: int,
    iterations: int,
    module: SegmentationModule | None = None,
    **trainer_options: Any,
) -> None:
    loss = HalfSquare() if isinstance(dataset, Points) else make_loss()
    module = module or SegmentationModule(network, loss, optim=STANDING_STILL, total_steps=10**6)
    options = {"accelerator": "cpu", "logger": False, "max_epochs": 1, **trainer_options}
    with quiet_lightning():
        trainer = pl.Trainer(
            callbacks=[noise] if noise is not None else [],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            **options,
        )
        trainer.fit(module, datamodule=PatchDataModule(dataset, batch_size=batch_size, iterations_per_epoch=iterations))


def sums_of(noise: GradientNoise) -> dict[str, float]:
    return noise.state_dict()


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 2), (1, 4), (2, 2), (2, 4)])
def test_any_split_into_micro_batches_finds_the_noise_scale_known_in_closed_form(batch_size, accumulate):
    noise = GradientNoise()
    iterations = 600 * accumulate + 1  # one left over, which makes no pair
    fit(Distance(), Points(), noise, batch_size=batch_size, iterations=iterations, accumulate_grad_batches=accumulate)
    reading = noise.reading
    assert reading.num_steps == 600
    assert reading.standard_error < 0.2 * NOISE_SCALE
    assert abs(reading.noise_scale - NOISE_SCALE) < 3 * reading.standard_error


def store_dataset(plan: Any, store: Path) -> PatchDataset:
    cases = ("case_1", "case_2", "case_3", "case_4", "case_5")
    return PatchDataset(store, cases, patch_size=plan.patch_size, foreground_fraction=0.5, seed=3)


def make_unet(plan: Any, **options: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(plan.num_channels, plan.num_classes, plan.network, **options)


def direct_sums(plan: Any, store: Path, *, batch_size: int, accumulate: int, iterations: int) -> NoiseSums:
    """From the gradient of every patch by itself, with nothing accumulated, in float64."""
    network, dataset, loss = make_unet(plan).double(), store_dataset(plan, store), make_loss()
    gradients = []
    for index in range(batch_size * iterations):
        network.zero_grad()
        item = dataset[index]
        loss(network(item["image"][None].double()), item["label"][None]).backward()
        gradients.append(torch.cat([each.grad.flatten() for each in network.parameters()]))
    batches = torch.stack(gradients).unflatten(0, (iterations, batch_size)).mean(dim=1)
    sums = NoiseSums()
    for step in batches.split(accumulate):
        if len(step) > 1:
            small, big = float((step**2).sum(dim=1).mean()), float((step.mean(dim=0) ** 2).sum())
            sums.add(*signal_and_noise(small, big, num_batches=len(step), mean_inverse_batch=1 / batch_size))
    return sums


@pytest.mark.parametrize("recompute_stages", [0, 2])
@pytest.mark.parametrize(
    ("batch_size", "accumulate", "iterations"), [(1, 2, 4), (2, 2, 5), (1, 3, 5), (1, 4, 8)], ids=str
)
def test_a_training_sums_what_the_gradients_of_single_patches_give(
    plan, store, batch_size, accumulate, iterations, recompute_stages
):
    """Also where an epoch ends in an accumulation of fewer micro-batches, and whatever the clipping."""
    noise = GradientNoise()
    fit(
        make_unet(plan, recompute_stages=recompute_stages),
        store_dataset(plan, store),
        noise,
        batch_size=batch_size,
        iterations=iterations,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1e-3,
    )
    expected = direct_sums(plan, store, batch_size=batch_size, accumulate=accumulate, iterations=iterations)
    assert sums_of(noise) == pytest.approx(vars(expected), rel=1e-4)
    assert expected.num_steps == {4: 2, 5: 2, 8: 2}[iterations]


def half_precision(scale: float) -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


class Fused(SegmentationModule):
    """Trained with an optimiser that undoes the scale of the loss itself."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-12, weight_decay=0.0, fused=True)


@pytest.mark.parametrize("kind", [SegmentationModule, Fused])
def test_a_scaled_loss_gives_the_same_noise_scale(kind):
    """The scale grows every fourth step."""
    found = []
    for plugins in ([], [half_precision(2.0**3)], [half_precision(2.0**12)]):
        noise, network = GradientNoise(), Distance()
        module = kind(network, HalfSquare(), optim=STANDING_STILL, total_steps=10**6)
        fit(
            network,
            Points(),
            noise,
            batch_size=1,
            iterations=160,
            module=module,
            accumulate_grad_batches=2,
            plugins=plugins,
        )
        found.append(sums_of(noise))
    assert found[0]["num_steps"] == 80
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_steps_that_the_scaler_leaves_out_are_left_out_here():
    noise = GradientNoise()
    plugins = [half_precision(2.0**10)]
    fit(Distance(), Overflowing(), noise, batch_size=1, iterations=1000, accumulate_grad_batches=2, plugins=plugins)
    reading = noise.reading
    assert reading.num_steps == 400
    assert abs(reading.noise_scale - NOISE_SCALE) < 3 * reading.standard_error


class Watch(TorchDispatchMode):
    """Counts the bytes that operations put out, and reads of tensors by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.reads = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        for each in result if isinstance(result, (tuple, list)) else [result]:
            self.bytes += each.nbytes if isinstance(each, Tensor) else 0
        return result


class Watched(pl.Callback):
    """Watches the second epoch's iterations, from the start of the first to the end of the last."""

    def __init__(self) -> None:
        self.watch = Watch()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.watch.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            self.watch.__exit__(None, None, None)


def test_no_gradient_is_copied_no_number_is_read_and_the_training_stays_the_same(plan, store):
    weights, watches = [], []
    for noise in (None, GradientNoise()):
        network, watched = make_unet(plan), Watched()
        module = SegmentationModule(network, make_loss(), optim=OptimConfig(lr=0.05), total_steps=6)
        with quiet_lightning():
            trainer = pl.Trainer(
                accelerator="cpu",
                max_epochs=1,
                accumulate_grad_batches=3,
                callbacks=[watched, *([noise] if noise else [])],
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
            )
            data = PatchDataModule(store_dataset(plan, store), batch_size=1, iterations_per_epoch=6)
            trainer.fit(module, datamodule=data)
        weights.append(torch.cat([each.detach().flatten() for each in network.parameters()]))
        watches.append(watched.watch)
    plain, measured = watches
    num_tensors = len(list(network.parameters()))
    gradient_bytes = weights[0].nbytes
    assert measured.bytes > plain.bytes
    # Six micro-batches: a few numbers a tensor each; a single copy of all gradients in each would be far more.
    assert measured.bytes - plain.bytes < 6 * num_tensors * 64 < 6 * gradient_bytes / 4
    assert measured.reads == plain.reads
    assert torch.equal(*weights)


class FailsAt(nn.Module):
    """Distance that fails at a given pass."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.distance, self.at, self.passes = Distance(), at, 0

    def forward(self, points: Tensor) -> Tensor:
        self.passes += 1
        if self.passes == self.at:
            raise RuntimeError("broken")
        return self.distance(points)


def test_hooks_are_gone_after_a_training_and_after_a_failed_one():
    for at in (4, 99):
        noise, network = GradientNoise(), FailsAt(at)
        with pytest.raises(RuntimeError, match="broken") if at == 4 else nullcontext():
            fit(network, Points(), noise, batch_size=1, iterations=6, accumulate_grad_batches=2)
        assert sums_of(noise)["num_steps"] == (1 if at == 4 else 3)
        assert not any(each._backward_hooks for each in network.parameters())


class FailsToClip(SegmentationModule):
    """Runs out of memory in its third optimiser step, after all gradients are there."""

    steps = 0

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("out of memory")


def test_an_optimiser_step_that_failed_is_not_counted_because_it_will_be_repeated():
    noise, network = GradientNoise(), Distance()
    module = FailsToClip(network, HalfSquare(), optim=STANDING_STILL, total_steps=99)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(network, Points(), noise, batch_size=1, iterations=8, module=module, accumulate_grad_batches=2)
    assert sums_of(noise)["num_steps"] == 2


class InPieces(nn.Module):
    """Uses its weights twice, each time with a backward pass of its own inside the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.distance = Distance()

    def forward(self, points: Tensor) -> Tensor:
        points = points.requires_grad_()
        first = checkpoint(self.distance, points, use_reentrant=True)
        return first + checkpoint(self.distance, points, use_reentrant=True)


def test_gradients_that_arrive_in_pieces_are_said_once_and_not_measured(caplog):
    caplog.set_level(logging.WARNING, "voxfit")
    noise = GradientNoise()
    fit(InPieces(), Points(), noise, batch_size=1, iterations=200, accumulate_grad_batches=2, max_epochs=2)
    assert caplog.text.count("arrive in pieces") == 1
    assert noise.reading is None
    assert noise.describe() == ""


def rows_of(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_without_accumulation_the_column_is_empty_and_the_log_says_why_once(plan, store, splits, make_config, caplog):
    caplog.set_level(logging.INFO, "voxfit")
    result = fit_fold(plan, store, splits, make_config(effective_batch=2))
    assert [row["noise_scale"] for row in rows_of(result.run_dir)] == ["", "", ""]
    assert caplog.text.count("the gradient noise scale is not measured") == 1
    assert "an effective_batch of at least twice batch_size" in caplog.text
    assert "noise scale not yet known" not in caplog.text


class Stops(nn.Module):
    """The plan's U-Net, which fails at a given training pass."""

    def __init__(self, plan: Any, error: Exception | None = None, *, at: int = 10**9) -> None:
        super().__init__()
        self.unet, self.error, self.at, self.passes = make_unet(plan), error, at, 0

    def forward(self, x: Tensor) -> Any:
        self.passes += self.training
        if self.error is not None and self.passes == self.at:
            raise self.error
        return self.unet(x)


@pytest.mark.parametrize("error", [RuntimeError("the machine went down"), torch.OutOfMemoryError("out of memory")])
def test_a_resumed_run_has_the_noise_scale_of_one_that_was_not_cut_and_reports_it(
    plan, store, splits, make_config, caplog, error
):
    """It goes on from the end of an epoch, or after an out-of-memory from the last finished optimiser step."""
    caplog.set_level(logging.INFO, "voxfit")
    options = {
        "batch_size": 1,
        "effective_batch": 3,
        "iterations_per_epoch": 83,  # the last step of an epoch has two micro-batches
        "max_epochs": 3,
        "validate_every_n_epochs": 9,
        "optim": STANDING_STILL,
    }
    whole = fit_fold(plan, store, splits, make_config("whole", **options), network=Stops(plan))
    text = caplog.text
    with pytest.raises((RuntimeError, InputError), match=str(error)):
        fit_fold(plan, store, splits, make_config("cut", **options), network=Stops(plan, error, at=120))
    cut = fit_fold(plan, store, splits, make_config("cut", **options), network=Stops(plan))
    states = [
        torch.load(result.last_checkpoint, weights_only=True)["callbacks"]["GradientNoise"] for result in (whole, cut)
    ]
    assert states[0] == states[1]
    assert states[0]["num_steps"] == 3 * 28
    columns = [[row["noise_scale"] for row in rows_of(result.run_dir)] for result in (whole, cut)]
    assert columns[0] == columns[1]
    assert columns[0][0] == ""
    assert float(columns[0][2]) == NoiseSums(**states[0]).read().noise_scale > 0
    assert "noise scale not yet known (28 of 50 steps)" in text
    assert NoiseSums(**states[0]).read().describe(batch_size=1, effective_batch=3) in text


def test_an_epoch_without_any_pair_reads_nothing():
    noise = GradientNoise()
    fit(Distance(), Points(), noise, batch_size=1, iterations=1, accumulate_grad_batches=2)
    assert noise.reading == NoiseReading(0)
