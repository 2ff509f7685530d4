"""Cases of a dataset that its plan was made without, which stay out of the store."""

from __future__ import annotations

from pathlib import Path

from pipeline.allocation import resolve_num_workers
from pipeline.artifacts import content_hash, read_artifact, to_json
from pipeline.config import PreprocessConfig
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.fingerprint import Fingerprint, fingerprint_path
from pipeline.datasets.inspection import find_bad_cases
from pipeline.log import get_logger
from pipeline.plan import Plan


def left_out_by_plan(made: Plan, dataset: Dataset, config: PreprocessConfig) -> dict[str, str]:
    """Reasons by case id, from the fingerprint beside the plan; without that the dataset is checked anew.

    Raises:
        InputError: The dataset has problems and `skip_bad_cases` is off.
    """
    path = fingerprint_path(Path(config.plan))
    if path.is_file():
        fingerprint = read_artifact(path, Fingerprint)
        if content_hash(to_json(fingerprint)) == made.fingerprint_hash:
            if fingerprint.left_out:
                get_logger("preprocess").info("cases that the plan was made without stay out; plan again to use them")
            return dict(fingerprint.left_out)
    num_workers = resolve_num_workers(config.num_workers)
    return find_bad_cases(dataset, num_workers=num_workers, skip=config.skip_bad_cases)
