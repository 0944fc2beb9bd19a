"""Training: one loop for one process or many, resumed exactly, stopped at the first number that is not one."""

from ibqlab.training.config import LossConfig, OptimizerConfig, RecordConfig, TrainConfig
from ibqlab.training.generator_config import (
    GeneratorOptimizerConfig,
    GeneratorRecordConfig,
    GeneratorSpeedConfig,
    GeneratorTrainConfig,
)
from ibqlab.training.generator_loop import train_generator
from ibqlab.training.loop import TrainingError, train
from ibqlab.training.losses import TrainingInterrupted
from ibqlab.training.recipes import RunParameters, find_recipe, load_recipe, plan_run, recipe_config
from ibqlab.training.speed import SpeedConfig

__all__ = [
    "GeneratorOptimizerConfig",
    "GeneratorRecordConfig",
    "GeneratorSpeedConfig",
    "GeneratorTrainConfig",
    "LossConfig",
    "OptimizerConfig",
    "RecordConfig",
    "RunParameters",
    "SpeedConfig",
    "TrainConfig",
    "TrainingError",
    "TrainingInterrupted",
    "find_recipe",
    "load_recipe",
    "plan_run",
    "recipe_config",
    "train",
    "train_generator",
]
