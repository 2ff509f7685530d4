"""Options of every command: the single truth behind flags, YAML files and Python calls.

Precedence: flag > YAML > plan > default. "auto" means that the plan, or the machine, decides.
"""

from __future__ import annotations

from pipeline.config.compare import CompareConfig
from pipeline.config.doctor import DoctorConfig
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.export import ExportConfig
from pipeline.config.groups import AugmentationConfig, HardwareConfig, OptimConfig, TrackingConfig
from pipeline.config.inspect import InspectConfig
from pipeline.config.plan import PlanConfig, PlanOptions
from pipeline.config.postprocess import PostprocessConfig
from pipeline.config.predict import PredictConfig, PredictOptions
from pipeline.config.preprocess import PreprocessConfig
from pipeline.config.run import RunConfig
from pipeline.config.slurm import SlurmConfig
from pipeline.config.status import StatusConfig
from pipeline.config.train import TrainConfig, TrainOptions
from pipeline.config.values import to_dict

__all__ = [
    "AugmentationConfig",
    "CompareConfig",
    "DoctorConfig",
    "EvaluateConfig",
    "ExportConfig",
    "HardwareConfig",
    "InspectConfig",
    "OptimConfig",
    "PlanConfig",
    "PlanOptions",
    "PostprocessConfig",
    "PredictConfig",
    "PredictOptions",
    "PreprocessConfig",
    "RunConfig",
    "SlurmConfig",
    "StatusConfig",
    "TrackingConfig",
    "TrainConfig",
    "TrainOptions",
    "to_dict",
]
