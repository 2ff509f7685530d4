"""A process that answers requests, a line of JSON each, and its other end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from places import BENCHMARKS, PROJECT


class JsonWorker:
    """A running worker; a context manager that ends it.

    Args:
        command: What starts it.
        variables: Of its environment, on top of this process's.
    """

    def __init__(self, command: Sequence[str | Path], variables: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{PROJECT}:{BENCHMARKS}"} | dict(variables or {}),
        )

    def __enter__(self) -> Any:
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
            raise RuntimeError(f"the worker ended with code {self._process.wait()} at {do} {request}")
        return json.loads(line)


def answers_stream() -> TextIO:
    """Where a worker's answers go; whatever a library prints must not get between them and goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def answer_requests(answers: TextIO, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Answer every request by the function of its name until standard input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(functions[request.pop("do")](**request)) + "\n")
        answers.flush()
