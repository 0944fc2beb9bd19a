"""Training: from a recipe to a finished run folder, for tokenizers and generators.

The main idea: one loop for one process or many (`trainer`), in which every step's randomness comes from the seed and
the step's number alone. So a run that was killed is resumed bit for bit, and it stops at the first number that is not
one. What differs between the two networks lies in the packages `tokenizer` and `generator`: where batches come from,
what one step learns (`step`), what a validation measures. Start with `tokenizer/loop.py`, then `trainer`.
"""

from ibqlab.losses.errors import StoppedByAlarm, TrainingError, TrainingInterrupted
from ibqlab.pretrained.start_settings import recipe_config
from ibqlab.recipes.generator_config import (
    GeneratorOptimizerConfig,
    GeneratorRecordConfig,
    GeneratorSpeedConfig,
    GeneratorTrainConfig,
)
from ibqlab.recipes.plugins import import_plugins
from ibqlab.recipes.recipe_files import find_recipe, load_recipe
from ibqlab.recipes.tokenizer_config import LossConfig, OptimizerConfig, RecordConfig, SpeedConfig, TrainConfig
from ibqlab.training.generator.loop import train_generator
from ibqlab.training.parameters import RunParameters, prepare_run
from ibqlab.training.tokenizer.loop import train

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
    "StoppedByAlarm",
    "TrainConfig",
    "TrainingError",
    "TrainingInterrupted",
    "find_recipe",
    "import_plugins",
    "load_recipe",
    "prepare_run",
    "recipe_config",
    "train",
    "train_generator",
]
