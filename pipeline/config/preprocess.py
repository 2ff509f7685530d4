"""Options of `voxfit preprocess`."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.checks import Auto, Checked, at_least, parse_share, share_problems


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(Checked):
    """Crop, resample and normalise every case into the store."""

    dataset: str
    """The dataset that the plan was made from."""
    plan: str
    """plan.json."""
    store: str
    """Folder of the store; finished cases in it are kept."""
    shard: str = ""
    """Make one share only, as in 3/16: jobs on any number of nodes fill one store, and --verify is the last of them."""
    verify: bool = False
    """Make nothing; name the cases that the store lacks (exit code 3), and remove what does not belong to it."""
    num_workers: int | Auto = "auto"
    """Processes; auto takes the CPUs this job was allotted, fewer where memory is short."""
    skip_bad_cases: bool = False
    """Leave out cases that fail instead of stopping at them (exit code 3)."""

    @property
    def share(self) -> tuple[int, int] | None:
        """Number and count of the shares in `shard`; None without."""
        return parse_share(self.shard)

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `key: problem`."""
        found = at_least(self, 1, "num_workers") + share_problems(self.shard)
        if self.shard and self.verify:
            found.append("verify: looks at the whole store, so it goes without shard")
        return found
