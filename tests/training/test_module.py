from __future__ import annotations

import logging
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.precision.amp import _optimizer_handles_unscaling
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from pipeline.config import OptimConfig
from pipeline.inference.window_outputs import full_resolution
from pipeline.losses.deep_supervision import DeepSupervisionLoss
from pipeline.losses.dice_ce import DiceCELoss
from pipeline.networks.norms import replace_batchnorm
from pipeline.networks.unet import UNet
from pipeline.plan import Plan
from pipeline.sampling.patch_dataset import PatchDataset
from pipeline.training.datamodule import PatchDataModule
from pipeline.training.module import SegmentationModule
from pipeline.training.optim import make_optimizer
from pipeline.training.quiet import quiet_lightning

# case_0 has ignored voxels, and a mean over two patches of unequal counts is not the mean of their means.
CASES = ("case_1", "case_2", "case_3", "case_4", "case_5")


def train(
    plan: Plan, store: Path, *, batch_size: int, accumulate: int, iterations: int, epochs: int = 1, batch_dice=False
) -> UNet:
    torch.manual_seed(0)
    network = UNet(plan.num_channels, plan.num_classes, plan.network)
    loss = DeepSupervisionLoss(DiceCELoss(batch_dice=batch_dice))
    optim = OptimConfig(name="sgd", lr=0.05, momentum=0.9, warmup_fraction=0.0)
    module = SegmentationModule(network, loss, optim=optim, total_steps=40)
    dataset = PatchDataset(store, CASES, patch_size=plan.patch_size, foreground_fraction=0.5, seed=3)
    data = PatchDataModule(dataset, batch_size=batch_size, iterations_per_epoch=iterations)
    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=12.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, datamodule=data)
    return network


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((left - right).detach().abs().max()) for left, right in pairs)


def test_twenty_steps_of_batch_one_with_accumulation_two_equal_twenty_of_batch_two(plan, store):
    accumulated = train(plan, store, batch_size=1, accumulate=2, iterations=40)
    whole = train(plan, store, batch_size=2, accumulate=1, iterations=20)
    assert largest_difference(accumulated, whole) < 1e-5


def test_with_batch_dice_accumulation_is_another_loss(plan, store):
    accumulated = train(plan, store, batch_size=1, accumulate=2, iterations=40, batch_dice=True)
    whole = train(plan, store, batch_size=2, accumulate=1, iterations=20, batch_dice=True)
    assert largest_difference(accumulated, whole) > 1e-3


def test_what_is_left_of_an_accumulation_is_flushed_with_every_patch_weighted_alike(plan, store):
    """Three iterations at accumulation two: a step over patches 0 and 1, then half a step over patch 2."""
    lightning = train(plan, store, batch_size=1, accumulate=2, iterations=3)
    torch.manual_seed(0)
    network = UNet(plan.num_channels, plan.num_classes, plan.network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=3e-5, nesterov=True)
    dataset = PatchDataset(store, CASES, patch_size=plan.patch_size, foreground_fraction=0.5, seed=3)
    loss = DeepSupervisionLoss(DiceCELoss(batch_dice=False))
    for indices, factor in (((0, 1), 1.0), ((2,), (1 - 1 / 40) ** 0.9)):
        optimizer.param_groups[0]["lr"] = 0.05 * factor
        optimizer.zero_grad()
        for index in indices:
            (loss(network(dataset[index]["image"][None]), dataset[index]["label"][None]) / 2).backward()
        optimizer.step()
    assert largest_difference(lightning, network) < 1e-6


class Stacked(nn.Module):
    """Two heads stacked at one resolution, as MONAI's DynUNet returns them in training."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv3d(1, 3, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([head(x) for head in self.heads], dim=1)


class Pyramid(Stacked):
    """A list of outputs of falling resolution."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.heads[0](x), self.heads[1](nn.functional.avg_pool3d(x, 2))]


@pytest.mark.parametrize("network", [nn.Conv3d(1, 3, 1), Stacked(), Pyramid()], ids=["tensor", "stack", "list"])
def test_any_form_of_output_gives_a_loss_with_gradients_and_full_resolution_logits(network):
    module = SegmentationModule(network, DeepSupervisionLoss(DiceCELoss()), optim=OptimConfig(), total_steps=1)
    batch = {"image": torch.randn(2, 1, 8, 6, 4), "label": torch.randint(0, 3, (2, 8, 6, 4), dtype=torch.int16)}
    module.training_step(batch, 0).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert full_resolution(network(batch["image"])).shape == (2, 3, 8, 6, 4)


def test_the_module_keeps_no_hyperparameters_and_its_weights_lie_under_network():
    network = replace_batchnorm(nn.Sequential(nn.Conv3d(1, 4, 1), nn.BatchNorm3d(4)))
    module = SegmentationModule(network, DiceCELoss(), optim=OptimConfig(), total_steps=1)
    assert dict(module.hparams) == {}
    assert all(key.startswith("network.") for key in module.state_dict())


def test_lightning_is_quiet_only_inside_the_context():
    logger = logging.getLogger("pytorch_lightning")
    before = logger.level
    with quiet_lightning():
        assert logger.level == logging.WARNING
    assert logger.level == before


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_kernels_are_used_where_torch_has_them_and_clipping_and_the_fp16_scale_go_with_them(name):
    network = nn.Conv3d(1, 3, 1)
    optimizer = make_optimizer(network, OptimConfig(name=name))
    assert all(group["fused"] for group in optimizer.param_groups)
    assert not _optimizer_handles_unscaling(LightningOptimizer(optimizer))
    plain = make_optimizer(network.to("meta"), OptimConfig(name=name))
    assert not any(group["fused"] for group in plain.param_groups)


def test_a_checkpoint_of_a_plain_optimiser_goes_on_with_fused_kernels():
    """A flag that came back from the checkpoint would be another kernel than the one that was made ready for."""
    module = SegmentationModule(nn.Conv3d(1, 3, 1), DiceCELoss(), optim=OptimConfig(), total_steps=1)
    state = torch.optim.SGD(module.network.parameters(), lr=0.1, momentum=0.9).state_dict()
    module.on_load_checkpoint({"optimizer_states": [state]})
    assert [group["fused"] for group in state["param_groups"]] == [True]
