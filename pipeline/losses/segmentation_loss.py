"""The loss of this project's trainings, for whoever trains with it or meters it."""

from __future__ import annotations

from pipeline.losses.deep_supervision import DeepSupervisionLoss
from pipeline.losses.dice_ce import DiceCELoss
from pipeline.store import IGNORE_INDEX


def make_loss() -> DeepSupervisionLoss:
    """Dice + cross entropy over all decoder stages, without the store's ignored voxels.

    Dice is taken per sample, so that it does not depend on how an effective batch is divided over iterations.
    """
    return DeepSupervisionLoss(DiceCELoss(ignore_index=IGNORE_INDEX, batch_dice=False))
