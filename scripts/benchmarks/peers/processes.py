"""Whole processes measured from outside: wall time, CPU time and peak memory of the process and all that it starts."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from places import PROJECT

# Reading the memory of a large process takes milliseconds of CPU, which long trainings need not pay often.
SAMPLE_SECONDS = 0.2
TRAINING_SAMPLE_SECONDS = 2.0
# A limit of the shell that binds one side and not another, which sets its threads itself, would be no comparison.
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Usage:
    """What a process and its children took.

    Attributes:
        wall_seconds: From start to end.
        cpu_seconds: User and system time of all of them that were waited for.
        peak_bytes: Largest sum of proportional set sizes, so that memory they share counts once; sampled.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int

    def rounded(self) -> dict[str, float]:
        """For a results file."""
        return {key: round(value, 2) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Runner:
    """Starts processes on the first `num_cpus` CPUs that this one may use, one after the other.

    Attributes:
        num_cpus: How many; every side sees these only, and is told so where it does not look by itself.
        logs: Folder for what they say.
    """

    num_cpus: int
    logs: Path

    def run(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        variables: Mapping[str, str] | None = None,
        stdin: Path | None = None,
        sample_seconds: float = SAMPLE_SECONDS,
    ) -> Usage:
        """Run to the end, with the file `stdin` as its standard input.

        Raises:
            SystemExit: It failed; the end of its log is shown.
        """
        words = [str(word) for word in command]
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{name}.log"
        before, started = _children_cpu(), time.perf_counter()
        with log.open("w") as stream, (stdin or Path(os.devnull)).open() as source:
            process = subprocess.Popen(
                words,
                env=_environment() | dict(variables or {}),
                stdin=source,
                stdout=stream,
                stderr=subprocess.STDOUT,
                preexec_fn=self._bind(),
            )
            peak = _watch(process, sample_seconds)
        wall = time.perf_counter() - started
        if process.returncode:
            raise SystemExit(f"failed with code {process.returncode}: {shlex.join(words)}\n{log.read_text()[-4000:]}")
        return Usage(wall_seconds=wall, cpu_seconds=_children_cpu() - before, peak_bytes=peak)

    def _bind(self) -> Callable[[], None]:
        cpus = sorted(os.sched_getaffinity(0))[: self.num_cpus]
        return lambda: os.sched_setaffinity(0, cpus)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in THREAD_LIMITS}
    return kept | {"PYTHONPATH": str(PROJECT)}


def _watch(process: subprocess.Popen[bytes], sample_seconds: float) -> int:
    """Wait for the end; the peak of the tree's memory. Ends the process where this one is interrupted."""
    root, peak = psutil.Process(process.pid), 0
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=sample_seconds)
                return peak
            peak = max(peak, _tree_bytes(root))
    finally:
        if process.poll() is None:
            _end(root)
            process.wait()


def _end(root: psutil.Process) -> None:
    """End the whole tree: workers may outlive the process that started them."""
    for process in [*root.children(recursive=True), root]:
        with suppress(psutil.Error):
            process.terminate()


def _tree_bytes(root: psutil.Process) -> int:
    total = 0
    with suppress(psutil.Error):
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
