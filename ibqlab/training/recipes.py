"""Recipes: training settings as YAML files under experiments/, found by name from anywhere."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ibqlab.config import ConfigError, apply_overrides, content_hash, load_yaml, parse
from ibqlab.diagnostics.projection import PROJECTION_METHODS
from ibqlab.quantizers.base import require_choice
from ibqlab.runs import runs_root
from ibqlab.training.config import TrainConfig

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
"""The recipes of the checkout that this package runs from."""


def find_recipe(name: str, folder: Path = EXPERIMENTS) -> Path:
    """The file of a recipe given as a path or as a name under experiments/, with or without `.yaml`.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    for candidate in (Path(name), folder / name, folder / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.yaml"))
    near = difflib.get_close_matches(name.removesuffix(".yaml"), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}" if known else ""
    raise ConfigError(f"there is no recipe {name!r}, neither as a file nor under experiments/{hint}")


def load_recipe(
    name: str, settings: Mapping[str, Any] | None = None, assignments: Sequence[str] = ()
) -> dict[str, Any]:
    """A recipe as a plain dictionary with some of its keys replaced.

    Args:
        name: path, or name under experiments/.
        settings: dotted keys and their values: {"tokenizer.quantizer.codebook_size": 256}.
        assignments: the same as text, as typed on a command line: ["steps=500"].
    Raises:
        ConfigError: no such recipe, or text that is not key=value.
    """
    recipe = apply_overrides(load_yaml(find_recipe(name)), assignments)
    for key, value in (settings or {}).items():
        *parents, last = key.split(".")
        place = recipe
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return recipe


def recipe_config(name: str, settings: Mapping[str, Any] | None = None, assignments: Sequence[str] = ()) -> TrainConfig:
    """A recipe, checked. Arguments and errors as in `load_recipe`."""
    return parse(TrainConfig, load_recipe(name, settings, assignments), source=f"recipe {name}")


PRESETS = {
    "smoke": "builtin/smoke",
    "laptop": "builtin/photos",
    "digits": "builtin/digits",
    "h200": "h200/photos",
    "paper": "imagenet/ibq_16384",
}
"""Presets of notebooks that train one run, and the recipes they stand for."""


@dataclass(frozen=True, kw_only=True)
class RunParameters:
    """What the `parameters` cell of a notebook that trains one run may set."""

    preset: str = "laptop"
    """A key of `PRESETS`."""
    recipe: str = ""
    """Another recipe, a path or a name under experiments/; empty: the preset's."""
    settings: tuple[str, ...] = ()
    """Keys of the recipe to replace, as typed on a command line: ["steps=500", "tokenizer.quantizer.name=vq"]."""
    output: str = ""
    """Run folder; empty: named by recipe and settings. Relative paths start in the folder of all runs."""
    projection: str = "umap"
    """How maps are drawn: "umap" or "pca"."""

    def __post_init__(self):
        require_choice("preset", self.preset, PRESETS)
        require_choice("projection", self.projection, PROJECTION_METHODS)


class PlannedRun(NamedTuple):
    """A run that has not started."""

    config: TrainConfig
    path: Path


def plan_run(parameters: RunParameters) -> PlannedRun:
    """Settings and folder of the run that a notebook's parameters describe.

    Raises:
        ConfigError: no such recipe, or settings that do not fit it.
    """
    name = parameters.recipe or PRESETS[parameters.preset]
    config = recipe_config(name, assignments=parameters.settings)
    return PlannedRun(config, runs_root() / (parameters.output or f"{Path(name).stem}-{content_hash(config)}"))
