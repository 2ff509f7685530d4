"""A training's length fitted to a time: how many epochs of how many iterations, from what they take."""

from __future__ import annotations

from dataclasses import dataclass

# Epochs that a training is divided into: learning rates that fall once an epoch fall in so many steps.
EPOCHS = 20


@dataclass(frozen=True)
class Pace:
    """Seconds that parts of a training take.

    Attributes:
        iteration: One, data included.
        epoch: What comes on top in every epoch: saving, plots, a validation that belongs to every epoch.
        validation: One validation of the kind that only some epochs have.
    """

    iteration: float
    epoch: float = 0.0
    validation: float = 0.0

    def seconds_of(self, schedule: Schedule) -> float:
        """What a training of that length takes."""
        per_epoch = schedule.iterations_per_epoch * self.iteration + self.epoch
        return schedule.epochs * per_epoch + schedule.num_validations * self.validation


@dataclass(frozen=True)
class Schedule:
    """The length of a training.

    Attributes:
        epochs: How many.
        iterations_per_epoch: Iterations in each.
        validate_every: Epochs between validations; the last epoch is validated in any case.
    """

    epochs: int
    iterations_per_epoch: int
    validate_every: int

    @property
    def iterations(self) -> int:
        """In all."""
        return self.epochs * self.iterations_per_epoch

    @property
    def num_validations(self) -> int:
        """In all."""
        return -(-self.epochs // self.validate_every)


def fit_schedule(seconds: float, pace: Pace, *, validations: int = 4, min_iterations: int = 1) -> Schedule:
    """The longest training of about `EPOCHS` epochs that is over within a time.

    Args:
        seconds: From the first iteration to the end of the last epoch.
        pace: What its parts take.
        validations: How many there are at most, spread evenly: fewer where they would take more than a tenth of the
            time, but one, unless there are none at all.
        min_iterations: Least iterations of an epoch: where an epoch's own cost is high, few epochs are better.

    Raises:
        ValueError: Not even one epoch fits.
    """
    if validations and pace.validation > 0:
        validations = max(1, int(min(validations, 0.1 * seconds / pace.validation)))
    left = seconds - validations * pace.validation
    per_epoch = max(min_iterations, round((left / EPOCHS - pace.epoch) / pace.iteration))
    epochs = int(left / (per_epoch * pace.iteration + pace.epoch))
    if epochs < 1:
        raise ValueError(f"no epoch of {per_epoch} iteration(s) of {pace.iteration:.1f} s fits into {seconds:.0f} s")
    spread = -(-epochs // max(1, validations))
    return Schedule(epochs=epochs, iterations_per_epoch=per_epoch, validate_every=spread)
