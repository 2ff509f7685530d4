"""Where a training stands on its plan's ladder, and where it goes from there when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.config import TrainConfig
from pipeline.plan import Execution, Plan, Rung
from pipeline.training.run_folder import Phase, StepDown
from pipeline.training.settings import Settings


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
            config: Options given by hand win over the rungs; rungs that do not agree with them are left out.
            settings: As resolved for the plan's own step.
            step_downs: Of the run so far.
            has_own_network: The network is not the plan's, so rungs that only run that one otherwise are left out.
        """
        adapt = _Adapter(config, settings, has_own_network)
        rung, fallback = adapt.options_over(settings.rung), 0
        if step_downs:
            rung, fallback = adapt.options_over(step_downs[-1].to_rung), step_downs[-1].fallback
        on_host = any(step.scores_on_host for step in step_downs)
        below = tuple(adapt.ladder(plan.fallbacks, above=rung, first=fallback))
        return cls(rung=rung, fallback=fallback, below=below, scores_on_host=on_host)

    def step_down(self, where: Phase, *, on_gpu: bool) -> Standing | None:
        """What to do about an out-of-memory: the next standing, or None at the end of the ladder.

        The decision hangs on its arguments alone, so that a training in several processes can take it in one of them
        and tell the others. A validation first moves its scores to the host, where they were not there yet: that costs
        the training nothing.

        Args:
            where: What the training was doing.
            on_gpu: Whether it runs on a GPU.
        """
        if where == "validation" and on_gpu and not self.scores_on_host:
            return replace(self, scores_on_host=True)
        if not self.below:
            return None
        (fallback, rung), *rest = self.below
        on_host = self.scores_on_host or where == "validation"
        return Standing(rung=rung, fallback=fallback, below=tuple(rest), scores_on_host=on_host)


@dataclass(frozen=True)
class _Adapter:
    """Makes the plan's rungs those of a training with options of its own."""

    config: TrainConfig
    settings: Settings
    has_own_network: bool

    def options_over(self, rung: Rung) -> Rung:
        """The rung with the options that were given by hand in place of its own."""
        options = Execution()._asdict() if self.has_own_network else self._by_hand()
        return replace(rung, **options)

    def _by_hand(self) -> dict[str, int]:
        return {
            name: value
            for name, value in self.settings.execution._asdict().items()
            if _is_by_hand(self.config.hardware, name)
        }

    def ladder(self, rungs: tuple[Rung, ...], *, above: Rung, first: int) -> Iterator[tuple[int, Rung]]:
        """The rungs after the first `first`, with their numbers, as this training would run them, each once."""
        adapted = [(number, self._adapted(rung)) for number, rung in enumerate(rungs, start=1)]
        # A plan that was edited by hand may stand on one of its own fallbacks, or below some of them.
        first = max([first, *(number for number, rung in adapted if rung is not None and rung.is_same_step(above))])
        for number, rung in adapted[first:]:
            if rung is not None and not rung.is_same_step(above) and not _is_larger(rung, above):
                above = rung
                yield number, rung

    def _adapted(self, rung: Rung) -> Rung | None:
        disagrees = any(getattr(rung, name) != value for name, value in self._by_hand().items())
        if disagrees and not self.has_own_network:
            return None
        own_batch = self.settings.batch_size
        if _is_by_hand(self.config, "batch_size") and rung.batch_size != own_batch:
            return None
        # A divisor, so that optimiser steps and epochs end where they did.
        batch = max(size for size in range(1, own_batch + 1) if own_batch % size == 0 and size <= rung.batch_size)
        accumulate = self.settings.accumulate_grad_batches * own_batch // batch
        return self.options_over(replace(rung, batch_size=batch, accumulate_grad_batches=accumulate))


def _is_larger(rung: Rung, above: Rung) -> bool:
    """Whether a rung surely takes more of the device: more voxels, or the same patch with less in host memory."""
    takes_back = rung.patch_size == above.patch_size and rung.offload_stages < above.offload_stages
    return rung.voxels > above.voxels or takes_back


def _is_by_hand(options: object, name: str) -> bool:
    return getattr(options, name) != "auto"


def options_by_hand(config: TrainConfig) -> list[str]:
    """Names of the options given by hand that rungs must agree with."""
    names = [f"hardware.{name}" for name in Execution._fields if _is_by_hand(config.hardware, name)]
    return [*names, "batch_size"] if _is_by_hand(config, "batch_size") else names
