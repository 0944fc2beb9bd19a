"""Recipes: training settings as YAML files under experiments/, found by name from anywhere."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ibqlab.config import ConfigError, apply_overrides, load_yaml, parse
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
