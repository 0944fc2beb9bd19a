"""What a notebook that trains one run may set, and the run that this describes."""

from dataclasses import dataclass
from pathlib import Path

from ibqlab.base.checks import require_choice
from ibqlab.config import content_hash
from ibqlab.diagnostics.projection import PROJECTION_METHODS
from ibqlab.pretrained.start_settings import recipe_config
from ibqlab.recipes.presets import find_preset
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.runs import Run
from ibqlab.runs.finding import output_folder
from ibqlab.training.plugin_check import warn_of_broken_rules


@dataclass(frozen=True, kw_only=True)
class RunParameters:
    """What the `parameters` cell of a notebook that trains one run may set."""

    preset: str = "laptop"
    """One of `preset_names("tokenizer")`."""
    recipe: str = ""
    """Another recipe, a path or a name under experiments/; empty: the preset's."""
    settings: tuple[str, ...] = ()
    """Keys of the recipe to replace, as typed on a command line: ["steps=500", "tokenizer.quantizer.name=vq"]."""
    output: str = ""
    """Run folder: a name below the folder of all runs, or a path that starts with / ./ or ~; empty: named by recipe and
    settings."""
    projection: str = "umap"
    """How maps are drawn: "umap" or "pca"."""
    wait: bool = True
    """Whether the training cell waits for the end; else training goes on in the background and the kernel is free."""
    plugins: tuple[str, ...] = ()
    """Files (my_quantizer.py) and modules of your own that register quantizers."""

    def __post_init__(self):
        find_preset(self.preset, "tokenizer")
        require_choice("projection", self.projection, PROJECTION_METHODS)


def prepare_run(parameters: RunParameters) -> tuple[TrainConfig, Path]:
    """Settings and folder of the run that a notebook's parameters describe.

    Raises:
        ConfigError: no such recipe, or settings that do not fit it.
        RunError: the folder holds a run with other settings.
    """
    name = parameters.recipe or find_preset(parameters.preset, "tokenizer")
    config = recipe_config(name, assignments=parameters.settings, plugins=parameters.plugins)
    folder = output_folder(parameters.output, default=f"{Path(name).stem}-{content_hash(config)}")
    Run.check(folder, config)
    warn_of_broken_rules([config])
    return config, folder
