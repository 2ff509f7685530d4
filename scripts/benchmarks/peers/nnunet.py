"""nnU-Net's step from the project's side: a worker process in nnU-Net's own environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.geometry import Shape3
from pipeline.planning.meter import StepMemory

WORKER = Path(__file__).with_name("nnunet_worker.py")
PROJECT = Path(__file__).resolve().parents[3]


class NnunetWorker:
    """A running `nnunet_worker.py`; a context manager that ends it.

    Args:
        environment: The folder that scripts/benchmarks/peers_environment.sh made.

    Raises:
        FileNotFoundError: There is no Python in it.
    """

    def __init__(self, environment: Path) -> None:
        if not (environment / "bin" / "python").exists():
            raise FileNotFoundError(f"{environment} has no bin/python; make it with peers_environment.sh")
        self._process = subprocess.Popen(
            [environment / "bin" / "python", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
        )

    def __enter__(self) -> NnunetWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def ask(self, do: str, **request: Any) -> Any:
        """The answer to one request.

        Raises:
            RuntimeError: The worker ended; what went wrong stands on standard error.
        """
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"nnU-Net's worker ended with code {self._process.wait()} at {do} {request}")
        return json.loads(line)

    def meter(self, patch_size: Shape3, **request: Any) -> StepMemory:
        """The metered peak of nnU-Net's step; see `nnunet_worker.meter` for what a request says."""
        return StepMemory(**self.ask("meter", patch_size=patch_size, **request))

    def make_step(self, name: str, **request: Any) -> Callable[[], float]:
        """A function that has the worker take one step and returns the seconds that the worker measured."""
        self.ask("make_step", name=name, **request)
        return lambda: self.ask("step", name=name)["seconds"]
