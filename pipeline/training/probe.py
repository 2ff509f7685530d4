"""Proof of a plan: real steps of its rungs, each in a fresh process, down to the first that fits.

No answer is inferred from another size: what is taken was itself run and fitted, and the rung above it was run and ran
out of memory. (Ultralytics' AutoBatch extrapolates from small batches; its issues 1451 and 4679, and 9287 of YOLOv5,
tell how that ends.)
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError

from pipeline.artifacts import to_json
from pipeline.log import get_logger
from pipeline.plan import Plan, Probe, ProbedRung, ProbeOutcome, Rung
from pipeline.sizes import GIB
from pipeline.training.probe_step import StepRequest

STEP_MODULE = "pipeline.training.probe_step"
PACKAGE_PARENT = Path(__file__).resolve().parents[2]
# For one step, the start of its process included: seconds to minutes; libraries may come from a slow file system.
TIMEOUT_SECONDS = 1200.0

logger = get_logger("plan")


def probe_plan(plan: Plan, *, budget_bytes: int, device: Literal["cpu", "cuda"] = "cuda") -> Probe:
    """Run the plan's step, and where it runs out of memory its fallbacks, until the first that fits is found.

    After each failure the distance doubles, because memory is seldom predicted far off; then the rungs between the
    last failure and the first fit are bisected. The search ends early with an outcome that does not answer the
    question, such as an error of another kind.

    Args:
        plan: Its step and fallbacks are the ladder, largest first.
        budget_bytes: What a step may take; a GPU that has more is limited to it.
        device: "cpu" measures this machine's memory instead, which is not what the plan predicts.

    Returns:
        What came of each rung that was run; see `Probe.fitting`.
    """
    ladder = [plan.rung, *plan.fallbacks]
    tried: list[ProbedRung] = []

    def run(number: int) -> ProbeOutcome:
        request = StepRequest(plan=plan, rung=ladder[number], device=device, budget_bytes=budget_bytes)
        tried.append(_settled(run_apart(request), request))
        logger.info("probe: %s", describe_try(tried[-1]))
        return tried[-1].outcome

    search_ladder(len(ladder), run)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return Probe(device=name, budget_bytes=budget_bytes, tried=tuple(tried))


def search_ladder(num_rungs: int, run: Callable[[int], ProbeOutcome]) -> int | None:
    """Number of a rung that fits below one that runs out of memory, both of them run; 0 where it fits itself.

    Args:
        num_rungs: Of the ladder, 0 being the largest.
        run: Runs a rung by its number.

    Returns:
        None when the last rung runs out of memory. With an outcome that is no answer the search ends, with the first
        rung that was found to fit until then.
    """
    failed, fitting = -1, num_rungs
    while fitting - failed > 1:
        found_one = fitting < num_rungs
        number = (failed + fitting) // 2 if found_one else min(max(0, 2 * failed + 1), num_rungs - 1)
        outcome = run(number)
        if outcome == "fits":
            fitting = number
        elif outcome == "out of memory":
            failed = number
        else:
            break
    return fitting if fitting < num_rungs else None


def _settled(tried: ProbedRung, request: StepRequest) -> ProbedRung:
    """An out-of-memory in place of an error where the step, once it may, runs and takes more than the budget.

    Libraries that allocate on their own do not always say what they lack: oneDNN "could not create a primitive", and
    cuDNN finds no engine when there is no room for its workspace.
    """
    if tried.outcome != "error" or request.budget_bytes is None:
        return tried
    freely = run_apart(replace(request, budget_bytes=None))
    if freely.outcome != "fits" or freely.measured_bytes <= request.budget_bytes:
        return tried
    message = f"{tried.message}; without the limit it runs and takes {freely.measured_bytes / GIB:.2f} GiB"
    return replace(tried, outcome="out of memory", message=message)


def run_apart(request: StepRequest, *, timeout_seconds: float = TIMEOUT_SECONDS) -> ProbedRung:
    """Run a step in a process of its own, whatever happens to it."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", STEP_MODULE],
            input=to_json(request),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_seconds,
            # The module is looked for in the working folder first, where a user may have a folder of the same name.
            cwd=PACKAGE_PARENT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        message = f"no answer within {timeout_seconds:g} seconds"
        return ProbedRung(rung=request.rung, outcome="timed out", message=message)
    except OSError as error:
        return ProbedRung(rung=request.rung, outcome="died", message=f"the process could not be started: {error}")
    return _answer(request.rung, done)


def _answer(rung: Rung, done: subprocess.CompletedProcess[str]) -> ProbedRung:
    if done.returncode < 0:
        return ProbedRung(rung=rung, outcome="died", message=_ended_by(-done.returncode))
    try:
        if done.returncode == 0:
            return TypeAdapter(ProbedRung).validate_json(done.stdout)
    except ValidationError:
        return ProbedRung(rung=rung, outcome="error", message="the process gave no answer")
    lines = done.stderr.strip().splitlines() or [""]
    return ProbedRung(rung=rung, outcome="error", message=f"exit code {done.returncode}: {lines[-1].strip()}")


def _ended_by(number: int) -> str:
    names = {each.value: each.name for each in signal.Signals}
    hint = " (as the kernel and schedulers do where host memory runs out)" if number == signal.SIGKILL else ""
    return f"the process was ended by {names.get(number, f'signal {number}')}{hint}"


def describe_try(tried: ProbedRung) -> str:
    """A sentence on what came of a rung."""
    rung = tried.rung
    taken = f", measured {tried.measured_bytes / GIB:.2f} GiB" if tried.outcome == "fits" else ""
    message = f" ({tried.message})" if tried.message else ""
    return f"{rung}: {tried.outcome}{taken}, predicted {rung.required_bytes / GIB:.2f} GiB{message}"
