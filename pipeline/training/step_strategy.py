"""Lightning's DDP without torch's wrapper: ranks are known to Lightning, and meet only where the training says."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from lightning_fabric.plugins import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy

from pipeline.rank_place import RankPlace

T = TypeVar("T")


class PlaceEnvironment(ClusterEnvironment):
    """Tells Lightning the place that this program has found; it is not looked for again.

    Args:
        place: Of this process.
    """

    def __init__(self, place: RankPlace) -> None:
        super().__init__()
        self.place = place

    creates_processes_externally = True

    @property
    def main_address(self) -> str:
        """Where the first rank listens."""
        return self.place.address

    @property
    def main_port(self) -> int:
        """At which port."""
        return self.place.port

    @staticmethod
    def detect() -> bool:
        """Never by itself."""
        return False

    def world_size(self) -> int:
        """How many ranks there are."""
        return self.place.num_ranks

    def set_world_size(self, size: int) -> None:
        """It is known."""

    def global_rank(self) -> int:
        """Number of this rank."""
        return self.place.rank

    def set_global_rank(self, rank: int) -> None:
        """It is known."""

    def local_rank(self) -> int:
        """Number of this rank on its node."""
        return self.place.local_rank

    def node_rank(self) -> int:
        """Ranks of a node follow each other."""
        return self.place.rank // self.place.num_local_ranks


class StepStrategy(DDPStrategy):
    """DDP whose gradients are averaged by `GradientExchange`, once per optimiser step.

    Lightning's own barriers are left out: one rank may have left before them, see `pipeline.training.ranks`.

    Args:
        place: Of this process.
        device: Where its network runs.
        checkpoint_io: Writes and reads checkpoints.
    """

    def __init__(self, place: RankPlace, device: torch.device, **options: Any) -> None:
        super().__init__(parallel_devices=[device], cluster_environment=PlaceEnvironment(place), **options)
        self.device = device

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""
        return self.device

    def setup_distributed(self) -> None:
        """The ranks are connected already."""
        self.set_world_ranks()

    def configure_ddp(self) -> None:
        """The network stays as it is."""

    def barrier(self, *_: Any, **__: Any) -> None:
        """Ranks meet elsewhere."""

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Ranks come to the same values by themselves."""
        return obj
