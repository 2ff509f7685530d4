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
        """Nothing here asks for it."""
        return 0


class StepStrategy(DDPStrategy):
    """DDP whose gradients are averaged by `GradientExchange`, once per optimiser step.

    Everything that Lightning itself would have ranks wait for is left out: one may have left before, see
    `pipeline.training.ranks`.

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

    def _configure_launcher(self) -> None:
        """No process is to be started; the launcher would set the number of threads as well."""
        self._launcher = None

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

    def reduce(self, tensor: T, *_: Any, **__: Any) -> T:
        """Of such values the mean is the value."""
        return tensor

    def all_gather(self, tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """This rank's own."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """The same on all ranks."""
        return decision
