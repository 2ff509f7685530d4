"""Ask SLURM to start a job again that was stopped before it was done."""

from __future__ import annotations

import os
import re
import signal
import subprocess

from pipeline.log import get_logger
from pipeline.rank_place import find_place
from pipeline.stop_signals import handled

SECONDS_FOR_SLURM = 30
# Of the signals that stop a training, those that come from a scheduler; Ctrl-C comes from a person.
SIGNALS_OF_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1)


def requeue_after(number: int) -> bool:
    """Ask for the job to be queued again where a scheduler's signal has stopped it; whether SLURM agreed.

    Only the first task of a job asks, and only while SLURM counts the job as running. A job that a person cancels is
    "completing" by the time that TERM arrives, and stays ended; one that SLURM pre-empts to queue it again itself is so
    as well. A job that was submitted with `--no-requeue` stays ended, too.
    """
    job = slurm_job_id()
    if number not in SIGNALS_OF_SCHEDULERS or not job or not _is_first():
        return False
    # SLURM and torchrun send TERM to those that are left when the first process of a step has ended.
    with handled(signal.SIG_IGN, (signal.SIGTERM,)):
        return _requeue(job)


def _requeue(job: str) -> bool:
    logger, facts = get_logger(), ask_scontrol("show", "job", "--oneliner", job)
    if "JobState=" in facts and "JobState=RUNNING" not in facts:
        logger.info("job %s is being ended by SLURM and is not queued again from here", job)
        return False
    if re.search(r"\bRequeue=0\b", facts):
        logger.info("job %s may not be queued again; submit it with --requeue to have it go on by itself", job)
        return False
    problem = ask_scontrol("requeue", job, wants_error=True)
    logger.info("job %s: %s", job, f"could not be queued again ({problem})" if problem else "queued again")
    return not problem


def _is_first() -> bool:
    """Of processes that train together by torchrun, or of the tasks of a job, whatever they have to do together."""
    place = find_place(is_strict=False)
    return place.is_first if place.launcher == "torchrun" else os.environ.get("SLURM_PROCID", "0") == "0"


def slurm_job_id() -> str:
    """By the name that SLURM's tools take, also for a task of an array."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID", "") for part in ("JOB", "TASK"))
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    return job if re.fullmatch(r"[0-9_]+", job) else ""


def ask_scontrol(*arguments: str, wants_error: bool = False) -> str:
    """What `scontrol` says, or in one line why it failed."""
    try:
        done = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, check=False, timeout=SECONDS_FOR_SLURM
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error) if wants_error else ""
    if not wants_error:
        return done.stdout
    return " ".join(done.stderr.split()) or f"scontrol ended with {done.returncode}" if done.returncode else ""
