"""Options of `voxfit slurm`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pipeline.config.checks import Auto, Checked, at_least

_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")
_EXTRA = re.compile(r"(--)?[a-z][a-z-]+(=\S+)?")
_MEMORY = re.compile(r"\d+[KMGT]?")
# A variable of the shell, whose name is in one of the two groups.
VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


@dataclass(frozen=True, kw_only=True)
class SlurmConfig(Checked):
    """Write the SLURM job scripts of a cross-validation: preprocess, verify, train, predict, evaluate."""

    dataset: str
    """A dataset: MSD or nnU-Net folder, dataset.json, CSV or JSON list."""
    plan: str = "plan.json"
    """plan.json, with fingerprint.json beside it."""
    work_dir: str = "."
    """Folder that the jobs write to: store, fold_0 ..., predictions, metrics.json, logs."""
    out: str = "jobs"
    """Folder of the scripts; `bash jobs/submit.sh` starts them all."""
    train_config: str = ""
    """YAML file with options of `voxfit train`, which is given it as --config."""
    predict_input: str = ""
    """New images, as `voxfit predict --input` takes them: adds a job that segments them with all folds as one."""
    num_folds: int | Auto = "auto"
    """Folds; auto is what train_config says, or 5."""
    max_epochs: int | Auto = "auto"
    """Epochs; auto leaves them to train_config and its default."""
    tta: Literal["none", "mirror"] = "none"
    """Test-time augmentation of the predictions, of held-out cases and of new images; mirror takes up to eight times
    as long (see short_time)."""
    gpus: int = 1
    """GPUs of a training job on each node, a process for each; 0 for a network on CPUs. A prediction takes one."""
    nodes: int = 1
    """Nodes of a training job."""
    gpu_type: str = ""
    """Kind of GPU as the cluster names it, such as a100; any without."""
    cpus: int = 8
    """CPUs of a job; of a training for each of its processes."""
    memory: str = "auto"
    """Memory of a training job as SLURM takes it, such as 48G; auto follows from plan and dataset."""
    shards: int | Auto = "auto"
    """Preprocessing jobs; auto is one for every 8 cases, 16 at most."""
    time: str = "1-00:00:00"
    """Time limit of a training job, as SLURM takes it; it ends resumable and is queued again."""
    short_time: str = "04:00:00"
    """Time limit of the other jobs."""
    stage_to: str = ""
    """Folder on the node's disk that a training copies its cases to first, as in '$TMPDIR' or '/scratch/$USER': names
    of variables are filled in on the node, where they must be set."""
    signal_seconds: int = 180
    """Seconds before the time limit at which a training is told to stop: a step and the writing have to fit in."""
    account: str = ""
    """Account to charge."""
    partition: str = ""
    """Partition, or several with commas."""
    qos: str = ""
    """Quality of service."""
    extra: str = ""
    """More options of sbatch for every job, without their dashes, as in "constraint=a100 mail-type=FAIL"."""
    setup: str = ""
    """Shell lines before the command, such as "module load python" or "source .venv/bin/activate"."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `key: problem`."""
        found = at_least(self, 1, "cpus", "shards", "max_epochs") + at_least(self, 2, "num_folds")
        found += at_least(self, 1, "signal_seconds", "nodes") + at_least(self, 0, "gpus")
        for name in ("time", "short_time"):
            if not _TIME.fullmatch(getattr(self, name)):
                found.append(f"{name}: must be as in 90, 04:00:00 or 1-12:00:00, got {getattr(self, name)}")
        if re.search(r"[$`]", VARIABLE.sub("", self.stage_to)):
            found.append(f"stage_to: may hold variables such as $TMPDIR and no other $ or `, got {self.stage_to}")
        if self.memory != "auto" and not _MEMORY.fullmatch(self.memory):
            found.append(f"memory: must be as in 48G or 64000M, got {self.memory}")
        for name in ("account", "partition", "qos", "gpu_type"):
            if not re.fullmatch(r"[\w.,@:+=/-]*", getattr(self, name)):
                found.append(f"{name}: must be a name as the cluster uses it, got {getattr(self, name)}")
        wrong = [word for word in self.extra.split() if not _EXTRA.fullmatch(word)]
        if wrong:
            found.append(f"extra: must be as in constraint=a100 mail-type=FAIL, got {' '.join(wrong)}")
        return found
