"""`voxfit slurm`: job scripts of a whole cross-validation, written from the plan and the dataset."""

from pipeline.job_scripts.writing import slurm

__all__ = ["slurm"]
