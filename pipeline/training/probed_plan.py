"""A plan after its probe: proven, rewritten with the rung that fits, or refused."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from pipeline.errors import InputError
from pipeline.log import get_logger
from pipeline.plan import Plan, Probe, ProbedRung
from pipeline.planning.rung_meter import RungMeter
from pipeline.sizes import GIB
from pipeline.training.probe import describe_try, probe_plan

NO_GPU = "Not probed: no GPU here."
# A GPU sold with 24 GB reports somewhat less, and its owner asks for 24GiB all the same.
LARGEST_SHARE_OF_GPU = 1.1
WITHOUT = "--probe off plans without running anything"


def probed(plan: Plan) -> Plan:
    """The plan after real steps on the GPU that is present; with a note where there is none, or none of that size.

    Raises:
        InputError: No rung fits, or the step fails for another reason than memory.
    """
    if not torch.cuda.is_available():
        return _with_note(plan, NO_GPU)
    budget_bytes = plan.memory.budget_bytes
    total = int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    if budget_bytes > LARGEST_SHARE_OF_GPU * total:
        sizes = f"{total / GIB:.1f} GiB, less than the budget of {budget_bytes / GIB:.1f} GiB"
        return _with_note(plan, f"Not probed: the GPU here has {sizes}.")
    return with_probe(plan, probe_plan(plan, budget_bytes=budget_bytes, device="cuda"))


def without_probe(plan: Plan) -> Plan:
    """The plan with a note that it was not asked to be proven."""
    return _with_note(plan, "Not probed: it was switched off.")


def with_probe(plan: Plan, probe: Probe) -> Plan:
    """The plan with what the probe found, at the rung that it found.

    Raises:
        InputError: A step failed for another reason than memory, or the plan's own step does not fit and no fallback
            is known to.
    """
    errors = [each for each in probe.tried if each.outcome == "error"]
    if errors:
        raise InputError(f"the planned step fails: {describe_try(errors[0])}", where="probe", fix=WITHOUT)
    last, found = probe.tried[-1], probe.fitting
    if found is not None:
        number = next(n for n, rung in enumerate((plan.rung, *plan.fallbacks)) if rung.is_same_step(found.rung))
        rewritten = at_fallback(plan, number) if number else plan
        return replace(_with_note(rewritten, *_notes(plan, probe, found, stepped_down=number > 0)), probe=probe)
    if any(each.outcome == "out of memory" for each in probe.tried):
        raise _nothing_fits(probe)
    get_logger("plan").warning("the plan is not proven: %s", describe_try(last))
    return replace(_with_note(plan, f"Not proven on {probe.device}: {describe_try(last)}."), probe=probe)


def _nothing_fits(probe: Probe) -> InputError:
    tried = "; ".join(describe_try(each) for each in probe.tried)
    return InputError(
        f"no rung of the plan is known to fit {probe.budget_bytes / GIB:.2f} GiB on {probe.device}: {tried}",
        where="probe",
        fix=f"Plan with a smaller --vram or patch_size, or end what else takes memory there; {WITHOUT}",
    )


def _notes(plan: Plan, probe: Probe, found: ProbedRung, *, stepped_down: bool) -> tuple[str, ...]:
    tensors = f", {found.allocated_bytes / GIB:.2f} of them in tensors" if found.allocated_bytes else ""
    took = (
        f"two optimiser steps and a validation window took {found.measured_bytes / GIB:.2f} GiB{tensors}, and"
        f" {found.rung.required_bytes / GIB:.2f} were predicted"
    )
    if not stepped_down:
        return (f"Probed on {probe.device}: {took}.",)
    failures = "; ".join(describe_try(each) for each in probe.tried if each.outcome != "fits")
    return (
        f"The notes above are on {plan.rung}, which failed the probe on {probe.device}: {failures}.",
        f"The plan is therefore its fallback {found.rung}, which was run in turn: {took}.",
    )


def at_fallback(plan: Plan, number: int) -> Plan:
    """The plan with fallback `number`, from 1, as its own step and those below it as fallbacks."""
    meter = RungMeter.of_plan(plan)
    rung = meter.weighed(plan.fallbacks[number - 1], network=plan.network)
    others = [each for each in plan.candidates if not each.is_same_step(rung)]
    return replace(
        plan,
        patch_size=rung.patch_size,
        batch_size=rung.batch_size,
        accumulate_grad_batches=rung.accumulate_grad_batches,
        **rung.execution._asdict(),
        memory=meter.memory_plan(rung, budget_bytes=plan.memory.budget_bytes, network=plan.network),
        candidates=tuple(sorted([*others, rung], key=lambda each: (-prod(each.patch_size), each.relative_time))),
        fallbacks=plan.fallbacks[number:],
    )


def _with_note(plan: Plan, *notes: str) -> Plan:
    return replace(plan, notes=(*plan.notes, *notes))
