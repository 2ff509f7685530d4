"""Cases that an interrupted validation has scored, in a small file by which the next start goes on with the others."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.artifacts import content_hash, read_artifact, write_artifact
from pipeline.errors import InputError
from pipeline.log import get_logger
from pipeline.plan import Record


@dataclass(frozen=True, kw_only=True)
class ValidationProgress(Record):
    """`validation_progress.json`: how far the newest validation of a run is.

    Attributes:
        key: Hash of all that the scores follow from, the weights above all.
        seconds: That its cases took, over all starts.
        by_case: Dice per foreground class by case; None where it is not defined.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1
    key: str
    seconds: float = 0.0
    by_case: dict[str, tuple[float | None, ...]] = field(default_factory=dict)


class ScoredCases:
    """Scores by case, as far as they are known for a key, and written down with every case that is added.

    The file is never needed: one that is missing, damaged or of another key counts as empty, and that it cannot be
    written ends nothing. It stays when the validation is done, until the next one begins or the run is finished: a
    training that is killed before it has saved what followed need not validate again.

    Args:
        path: The file; None keeps nothing.
        key: As `validation_key` gives it.

    Attributes:
        by_case: Dice per foreground class by case; NaN where it is not defined.
        seconds: That they took, in this and in earlier starts.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        found = _read(path, key)
        self.seconds = found.seconds
        self.by_case = {
            case_id: tuple(math.nan if score is None else score for score in scores)
            for case_id, scores in found.by_case.items()
        }

    def add(self, case_id: str, scores: tuple[float, ...], *, seconds: float) -> None:
        """Keep the scores of one more case, and the seconds that it took."""
        self.by_case[case_id] = scores
        self.seconds += seconds
        if self.path is None:
            return
        plain = {
            case_id: tuple(None if math.isnan(score) else score for score in scores)
            for case_id, scores in self.by_case.items()
        }
        try:
            write_artifact(self.path, ValidationProgress(key=self.key, seconds=self.seconds, by_case=plain))
        except InputError as error:
            get_logger("train").debug("%s", error)


def _read(path: Path | None, key: str) -> ValidationProgress:
    if path is not None and path.is_file():
        try:
            found = read_artifact(path, ValidationProgress)
        except InputError as error:
            get_logger("train").debug("%s", error)
        else:
            if found.key == key:
                return found
    return ValidationProgress(key=key)


def validation_key(network: nn.Module, *facts: object) -> str:
    """A hash of the weights and buffers of a network, bit by bit, and of what else scores follow from."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            digest.update(f"{name} {value!r}".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return content_hash(digest.hexdigest(), *facts)
