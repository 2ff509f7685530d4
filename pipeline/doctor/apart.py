"""Modules of this package in processes of their own, whatever happens to them there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TextIO

from pipeline.errors import VoxfitError

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
MAX_MESSAGE_LENGTH = 500


class ApartError(Exception):
    """A process that was to answer ended before it was done; says how."""


def run_apart(module: str, request: str = "", *, timeout_seconds: float) -> Iterator[str]:
    """Run `python -m module` with `request` on its standard input, and give the lines that it answers as they come.

    The process is ended when nobody asks for its lines any more.

    Raises:
        ApartError: It ended otherwise than well, or is not done in time.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        try:
            # The module is looked for in the working folder first, where a user may have a folder of the same name.
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                encoding="utf-8",
                cwd=PACKAGE_PARENT,
                env=_environment(),
            )
        except OSError as error:
            raise ApartError(f"the process could not be started: {error}") from error
        late = threading.Event()
        timer = threading.Timer(timeout_seconds, _end_late, (process, late))
        timer.daemon = True
        timer.start()
        try:
            yield from _answers(process, request)
            process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        if late.is_set():
            raise ApartError(f"no answer within {timeout_seconds:g} seconds")
        if process.returncode:
            raise ApartError(_how_it_ended(process.returncode, said))


def answering(work: Callable[[TextIO], None]) -> int:
    """Do the work of such a module: what it writes to the stream it is given is the answer, in whole lines.

    What libraries print goes to standard error; an error that a user can act on ends with its message alone.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    try:
        work(answers)
    except VoxfitError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    return 0


def _environment() -> dict[str, str]:
    """Modules are found as this process finds them, also from another folder."""
    paths = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _end_late(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()
    process.kill()


def _answers(process: subprocess.Popen[str], request: str) -> Iterator[str]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin:
            process.stdin.write(request)
    except BrokenPipeError:
        # It ended before it asked; how is told by its exit code.
        pass
    with process.stdout:
        yield from process.stdout


def _how_it_ended(code: int, said: IO[str]) -> str:
    if code < 0:
        names = {each.value: each.name for each in signal.Signals}
        hint = " (as the kernel and SLURM do where memory runs out)" if -code == signal.SIGKILL else ""
        return f"the process was ended by {names.get(-code, f'signal {-code}')}{hint}"
    said.seek(0)
    lines = [line.strip() for line in said if line.strip()] or ["nothing was said"]
    return (lines[-1] if code == VoxfitError.exit_code else f"exit code {code}: {lines[-1]}")[:MAX_MESSAGE_LENGTH]
