"""Starts a command in several processes of this machine that work together, and ends them together."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from time import monotonic, sleep
from types import FrameType

from pipeline.errors import StoppedError, VoxfitError
from pipeline.rank_place import TORCHRUN_NAMES
from pipeline.stop_signals import STOP_SIGNALS, end_with, handled

LOCALHOST = "127.0.0.1"
POLL_SECONDS = 0.1
# Once one has failed the others learn it at their next meeting; a connection that broke may take a step to be noticed.
GRACE_SECONDS = 60.0


class ProcessesFailedError(VoxfitError):
    """One of the processes failed, and has said why.

    Args:
        rank: Its number.
        code: What it ended with; below zero the signal that killed it.
    """

    def __init__(self, rank: int, code: int) -> None:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        advice = "Most likely memory ran out: look at the job's limit" if code == -signal.SIGKILL else ""
        super().__init__(f"process {rank} of this training {how}", fix=advice)
        # The command itself was not killed.
        self.exit_code = code if code > 0 else 1


def run_in_processes(arguments: Sequence[str], num: int) -> None:
    """Run `voxfit` with `arguments` in `num` processes that find each other as those of torchrun do, and wait for all.

    Signals that ask to stop are handed on. When one process fails, the others are given a minute to end by themselves.

    Raises:
        StoppedError: They were stopped and can go on.
        ProcessesFailedError: One of them failed.
    """
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        port = probe.getsockname()[1]
    processes: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        asked.append(number)
        for process in processes:
            process.send_signal(number)

    with handled(hand_on, STOP_SIGNALS):
        try:
            for rank in range(num):
                processes.append(_start(arguments, rank, num, port))
                for number in asked:
                    processes[-1].send_signal(number)
            _wait(processes)
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        _judge([code for code in codes if code is not None], asked)


def _start(arguments: Sequence[str], rank: int, num: int, port: int) -> subprocess.Popen[bytes]:
    values = (rank, num, rank, num, LOCALHOST, port)
    environment = {name: str(value) for name, value in zip(TORCHRUN_NAMES, values, strict=True)}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments],
        env={**os.environ, **environment},
        # A group of its own: what a terminal sends to this process is handed on, so that it comes once.
        start_new_session=True,
        preexec_fn=partial(end_with, os.getpid()),
    )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or some time after the first one failed."""
    deadline = math.inf
    while any(process.poll() is None for process in processes) and monotonic() < deadline:
        if deadline == math.inf and any(process.poll() for process in processes):
            deadline = monotonic() + GRACE_SECONDS
        sleep(POLL_SECONDS)


def _judge(codes: Sequence[int], asked: Sequence[int]) -> None:
    """What those that ended by themselves came to; others were ended because one of them had failed."""
    stopped = {StoppedError.exit_code, *(-number for number in asked)}
    failed = [(rank, code) for rank, code in enumerate(codes) if code and code not in stopped]
    if failed:
        # One that was killed comes first: the others only lost it.
        raise ProcessesFailedError(*min(failed, key=lambda each: each[1]))
    if any(codes):
        error = StoppedError("the processes of this training were stopped", fix="The same command goes on")
        # The first of them has said it, and has asked the scheduler to start the job again.
        error.is_said_elsewhere = StoppedError.exit_code in codes
        error.signal = 0 if error.is_said_elsewhere else asked[0]
        raise error
