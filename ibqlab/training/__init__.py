"""Training: one loop for one process or many, resumed exactly, stopped at the first number that is not one."""

from ibqlab.losses.errors import TrainingInterrupted
from ibqlab.recipes.generator_config import (
    GeneratorOptimizerConfig,
    GeneratorRecordConfig,
    GeneratorSpeedConfig,
    GeneratorTrainConfig,
)
from ibqlab.recipes.recipe_files import find_recipe, load_recipe, recipe_config
from ibqlab.recipes.tokenizer_config import LossConfig, OptimizerConfig, RecordConfig, SpeedConfig, TrainConfig
from ibqlab.training.generator_loop import train_generator
from ibqlab.training.loop import TrainingError, train
from ibqlab.training.parameters import RunParameters, plan_run

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
