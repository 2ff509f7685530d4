"""How long a training has taken in all, over every start of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from pipeline.artifacts import read_artifact
from pipeline.errors import InputError
from pipeline.run_record import RunRecord
from pipeline.status import Heartbeat
from pipeline.training.run_folder import RunFolder


@dataclass(frozen=True)
class WallClock:
    """Seconds of all starts: reading, training, validations, saves, and whatever else lies between them.

    Attributes:
        began: This start, by the monotonic clock.
        before: What earlier starts took; None where one of them did not count.
    """

    began: float
    before: float | None = 0.0

    @property
    def seconds(self) -> float | None:
        """Until now; None where an earlier start did not count."""
        return None if self.before is None else round(self.before + monotonic() - self.began, 3)


def read_wall_seconds(folder: RunFolder, record: RunRecord | None) -> float | None:
    """What all starts of a run took so far: of one that was killed, up to its last heartbeat.

    Args:
        folder: The run folder.
        record: What `run.json` says; None before the first start.

    Returns:
        Seconds; None for a run that an earlier version began, which did not count them.
    """
    if record is None:
        return 0.0
    if record.status == "running" and folder.heartbeat.is_file():
        # A damaged one costs the time of a start at the most, and ends no training.
        with suppress(InputError):
            return read_artifact(folder.heartbeat, Heartbeat).wall_seconds
    return record.wall_seconds
