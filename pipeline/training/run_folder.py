"""The run's own folder: whether a command may begin in it, or go on with what it finds there."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pipeline.artifacts import content_hash, read_artifact, to_json, write_artifact
from pipeline.config import TrainConfig
from pipeline.datasets.splits import Splits
from pipeline.errors import InputError
from pipeline.plan import Plan
from pipeline.run_files import RunFiles
from pipeline.run_record import RunRecord
from pipeline.saved_config import find_changes, write_config

# Parts of a plan that no training depends on; what was measured is not the same in two plannings.
SAID_ONLY = ("candidates", "memory", "notes", "probe", "segment_codes")
# What may change between two starts of one run. Paths may: what they lead to is compared instead (the plan) or was
# checked against it (the store). `max_epochs` may not: the learning-rate schedule is stretched over it.
WHERE_ONLY = ("plan", "store", "stage_to", "run_dir")
HARMLESS = (*WHERE_ONLY, "validate_every_n_epochs", "save_every_minutes", "max_time", "hardware.", "tracking.")


class RunFolder(RunFiles):
    """The folder of one training: its names, and what it takes to begin in it or to go on."""

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is anything to go on from, or that looks like it."""
        checkpoints = (self.last_checkpoint, self.previous_checkpoint, self.best_checkpoint)
        return any(path.is_file() for path in checkpoints)

    def read_record(self) -> RunRecord | None:
        """`run.json`, or None before the first start."""
        return read_artifact(self.record, RunRecord) if self.record.is_file() else None

    def begin(self, plan: Plan, splits: Splits, config: TrainConfig) -> None:
        """Write down plan, folds and options, or check that the run found here had the same; sweep up what a kill left.

        Raises:
            InputError: The folder holds a run with other options, another plan or other folds; the difference is shown.
        """
        self._check_splits(splits)
        if self._is_begun:
            differences = [*self._plan_differences(plan), *find_changes(self.config, config, harmless=HARMLESS)]
            if differences:
                raise InputError(
                    f"holds a run with other options: {'; '.join(differences)}",
                    where=self.path,
                    fix="Put them back to resume it, or give another --run_dir",
                )
        else:
            write_artifact(self.plan, plan)
        if not self._holds(splits):
            write_artifact(self.splits, splits)
        for path in self.path.rglob(".*.partial.*"):
            path.unlink(missing_ok=True)
        write_config(self.config, config)

    def check_plan(self, plan: Plan) -> None:
        """Find out, before anything is made by a plan, whether the run that was begun here could go on with it.

        Raises:
            InputError: It was begun with another one.
        """
        differences = list(self._plan_differences(plan)) if self._is_begun else []
        if differences:
            raise InputError(
                f"was begun with another plan: {'; '.join(differences)}",
                where=self.path,
                fix=f"Put {self.plan} in the place of the plan that was changed, or begin in another folder",
            )

    @property
    def _is_begun(self) -> bool:
        return self.config.is_file() and self.plan.is_file()

    def _check_splits(self, splits: Splits) -> None:
        """Also when `splits.json` was deleted and made anew: `run.json` tells which folds were trained with."""
        record = self.read_record()
        if record is None:
            return
        same = record.splits_hash == hash_of(splits) if record.splits_hash else self._holds(splits)
        if not same:
            raise InputError(
                "the folds are not those the run was trained with",
                where=self.splits,
                fix="Put them back to resume it, or give another --run_dir",
            )

    def _holds(self, splits: Splits) -> bool:
        return self.splits.is_file() and read_artifact(self.splits, Splits) == splits

    def _plan_differences(self, plan: Plan) -> Iterator[str]:
        before, now = json.loads(to_json(read_artifact(self.plan, Plan))), json.loads(to_json(plan))
        for key in now:
            if key not in SAID_ONLY and before.get(key) != now[key]:
                shown = f" (was {before.get(key)}, now {now[key]})" if not isinstance(now[key], dict | list) else ""
                yield f"the plan's {key}{shown}"


def hash_of(splits: Splits) -> str:
    """A short stable hash of all folds."""
    return content_hash(to_json(splits))
