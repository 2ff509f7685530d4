"""nnU-Net's step from the project's side: a worker process in nnU-Net's own environment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers.json_worker import JsonWorker
from pipeline.geometry import Shape3
from pipeline.planning.meter import StepMemory

WORKER = Path(__file__).with_name("nnunet_worker.py")


class NnunetWorker(JsonWorker):
    """A running `nnunet_worker.py`; a context manager that ends it.

    Args:
        environment: The folder that peers_environment.sh or nnunet_environment.sh made.

    Raises:
        FileNotFoundError: There is no Python in it.
    """

    def __init__(self, environment: Path) -> None:
        if not (environment / "bin" / "python").exists():
            raise FileNotFoundError(f"{environment} has no bin/python; make it with peers_environment.sh")
        super().__init__([environment / "bin" / "python", WORKER])

    def meter(self, patch_size: Shape3, **request: Any) -> StepMemory:
        """The metered peak of nnU-Net's step; see `nnunet_worker.meter` for what a request says."""
        return StepMemory(**self.ask("meter", patch_size=patch_size, **request))

    def make_step(self, name: str, **request: Any) -> Callable[[], float]:
        """A function that has the worker take one step and returns the seconds that the worker measured."""
        self.ask("make_step", name=name, **request)
        return lambda: self.ask("step", name=name)["seconds"]
