"""Where a training stands on its plan's ladder, and where it goes from there when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import dropwhile

from pipeline.config import TrainConfig
from pipeline.plan import Execution, Plan, Rung
from pipeline.run_record import Phase, StepDown
from pipeline.training.settings import Settings, options_over

# The rest of a rung, recomputation and batch, is about training passes.
CHANGES_A_WINDOW = ("patch_size", "slab_stages", "offload_stages")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a training is run now, and what is left below.

    Attributes:
        rung: As it is run: options given by hand in place of the rung's, the batch a divisor of the run's own.
        fallback: Its number among the plan's fallbacks, from 1; 0 is the plan's own step.
        below: Rungs that the training can step down to, with their numbers.
        scores_on_host: Whether validations add up their scores in host memory.
    """

    rung: Rung
    fallback: int = 0
    below: tuple[tuple[int, Rung], ...] = ()
    scores_on_host: bool = False

    @classmethod
    def of(
        cls,
        plan: Plan,
        config: TrainConfig,
        settings: Settings,
        step_downs: tuple[StepDown, ...],
        *,
        has_own_network: bool,
    ) -> Standing:
        """Where a training stands that begins, or goes on after it has stepped down.

        Args:
            plan: Its fallbacks are the ladder.
            config: Options given by hand win over those of the rungs; rungs that come to nothing less are left out.
            settings: As resolved for the plan's own step.
            step_downs: Of the run so far.
            has_own_network: The network is not the plan's, so rungs that only run that one otherwise are left out.
        """
        adapt = _Adapter(plan, config, settings, has_own_network)
        rung, fallback = adapt.options_over(settings.rung), 0
        if step_downs:
            rung, fallback = adapt.options_over(step_downs[-1].to_rung), step_downs[-1].fallback
        on_host = any(step.scores_on_host for step in step_downs)
        below = tuple(adapt.ladder(above=rung, first=fallback))
        return cls(rung=rung, fallback=fallback, below=below, scores_on_host=on_host)

    def step_down(self, where: Phase, *, on_gpu: bool) -> Standing | None:
        """What to do about an out-of-memory: the next standing, or None where no rung below helps.

        The decision hangs on its arguments alone, so that a training in several processes can take it in one of them
        and tell the others. A validation first moves its scores to the host, where they were not there yet: that costs
        the training nothing. Then it goes to the next rung whose windows are run otherwise: no other one helps it.

        Args:
            where: What the training was doing.
            on_gpu: Whether it runs on a GPU.
        """
        if where == "validation" and on_gpu and not self.scores_on_host:
            return replace(self, scores_on_host=True)
        below = self.below
        if where == "validation":
            below = tuple(dropwhile(lambda each: _window(each[1]) == _window(self.rung), below))
        if not below:
            return None
        (fallback, rung), *rest = below
        on_host = self.scores_on_host or where == "validation"
        return Standing(rung=rung, fallback=fallback, below=tuple(rest), scores_on_host=on_host)


@dataclass(frozen=True)
class _Adapter:
    """Makes the plan's rungs those of a training with options of its own."""

    plan: Plan
    config: TrainConfig
    settings: Settings
    has_own_network: bool

    def options_over(self, rung: Rung) -> Rung:
        """The rung with the options that were given by hand in place of its own."""
        own_way = Execution() if self.has_own_network else options_over(rung.execution, self.config.hardware)
        return replace(rung, **own_way._asdict())

    def ladder(self, *, above: Rung, first: int) -> Iterator[tuple[int, Rung]]:
        """The plan's rungs after the first `first`, with their numbers, as this training would run them, each once."""
        rungs = list(enumerate(self.plan.fallbacks, start=1))
        # A plan that was edited by hand may stand on one of its own fallbacks, or below some of them.
        first = max([first, *(number for number, rung in rungs if rung.is_same_step(self.plan.rung))])
        for number, planned in rungs[first:]:
            rung = self._adapted(planned)
            if rung is not None and not rung.is_same_step(above) and not _is_larger(rung, above):
                above = rung
                yield number, rung

    def _adapted(self, rung: Rung) -> Rung | None:
        batch, adapted = self._batch_for(rung), self.options_over(rung)
        if batch is None or adapted.execution.problems(self.plan.network):
            return None
        accumulate = self.settings.accumulate_grad_batches * self.settings.batch_size // batch
        return replace(adapted, batch_size=batch, accumulate_grad_batches=accumulate)

    def _batch_for(self, rung: Rung) -> int | None:
        """The run's own batch, divided to be no larger than the rung's, or None where it must not be divided."""
        own = self.settings.batch_size
        if self.plan.network.norm == "batch" and not self.has_own_network:
            # Batch norm in a smaller batch would be another training.
            return own if rung.batch_size >= min(own, self.plan.batch_size) else None
        # A divisor, so that optimiser steps and epochs end where they did.
        return max(size for size in range(1, own + 1) if own % size == 0 and size <= rung.batch_size)


def _is_larger(rung: Rung, above: Rung) -> bool:
    """Whether a rung surely takes more of the device: more voxels, or the same patch with less in host memory.

    Or the same batch of it with some stages run plainly, and no others in another way.
    """
    if rung.voxels > above.voxels or rung.patch_size != above.patch_size:
        return rung.voxels > above.voxels
    plainer = rung.batch_size == above.batch_size and _is_plainer(rung.execution, above.execution)
    return plainer or rung.offload_stages < above.offload_stages


def _is_plainer(execution: Execution, above: Execution) -> bool:
    """Whether all stages are run as in `above` or plainly; stages in slabs are not recomputed."""
    if execution.offload_stages > above.offload_stages or execution.slab_stages > above.slab_stages:
        return False
    same_slabs = execution.slab_stages == above.slab_stages
    return execution.recompute_stages <= (max(above[:2]) if same_slabs else execution.slab_stages)


def _window(rung: Rung) -> list[object]:
    return [getattr(rung, name) for name in CHANGES_A_WINDOW]


def options_in_the_way(plan: Plan, config: TrainConfig, standing: Standing, where: Phase) -> list[str]:
    """Names of the options given by hand that lower rungs of the plan would have otherwise, where that would help."""
    return [
        f"hardware.{name}"
        for name in Execution._fields
        if getattr(config.hardware, name) == getattr(standing.rung, name)
        and (where != "validation" or name in CHANGES_A_WINDOW)
        and any(getattr(rung, name) != getattr(standing.rung, name) for rung in plan.fallbacks[standing.fallback :])
    ]
