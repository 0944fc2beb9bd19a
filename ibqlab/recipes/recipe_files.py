"""Recipes: training settings as YAML files under experiments/, found by name from anywhere.

A recipe may say `extends: imagenet/ibq_16384` and hold only what differs. Runs keep the merged settings, never the
reference, so a run stays readable when a recipe changes.
"""

import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ibqlab.base.resources import resource_folder
from ibqlab.config import ConfigError, apply_overrides, load_yaml, parse
from ibqlab.recipes.generator_config import GeneratorTrainConfig
from ibqlab.recipes.plugins import beside_recipe
from ibqlab.recipes.tokenizer_config import TrainConfig

EXPERIMENTS = resource_folder("experiments")
"""The recipes that come with this package."""


GENERATOR = "generator"
"""The key that a generator's recipe has and a tokenizer's has not."""
EXTENDS = "extends"
"""The key under which a recipe names its base; no setting of a run."""
START = "start_from"
"""The key that names a file whose weights a run starts from."""
Below = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
"""What stands in place of settings when those put over them name a file to start from: (settings, those put over them)
→ settings. `ibqlab.pretrained.start_settings` takes a tokenizer's from that file."""
NOT_RECIPES = ("published", "studies", "tables", "results")
"""Folders under experiments/ whose YAML files are something else."""


def find_recipe(name: str, folder: Path = EXPERIMENTS) -> Path:
    """The file of a recipe given as a path or as a name under experiments/, with or without `.yaml`.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    for candidate in (Path(name), folder / name, folder / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"there is no recipe {name!r}, neither as a file nor under experiments/{_hint(name, folder)}")


def find_recipes(name: str, folder: Path = EXPERIMENTS) -> list[Path]:
    """The files of a recipe, or of all recipes of a folder given as a path or as a name under experiments/, sorted.

    Raises:
        ConfigError: no such recipe or folder, or a folder without recipes.
    """
    for candidate in (Path(name), folder / name):
        if candidate.is_dir():
            recipes = sorted(candidate.glob("*.yaml"))
            if recipes:
                return recipes
            raise ConfigError(f"{candidate} holds no recipe; give a folder with *.yaml files, such as imagenet")
    return [find_recipe(name, folder)]


def recipe_name(file: Path, folder: Path = EXPERIMENTS) -> str:
    """A recipe's name under experiments/, without `.yaml`; for a file that lies elsewhere its path."""
    file, folder = file.resolve(), folder.resolve()
    return file.relative_to(folder).with_suffix("").as_posix() if file.is_relative_to(folder) else str(file)


def read_recipe(file: Path, folder: Path = EXPERIMENTS, below_start: Below | None = None) -> dict[str, Any]:
    """A recipe's file merged over the recipe that it extends, and so on down to one that extends none.

    `extends` names a file beside the recipe or under experiments/, with or without `.yaml`. Mappings merge key by key,
    everything else replaces; a mapping whose `name` differs from the base's (another quantizer) replaces it whole.
    Files in `plugins` may lie beside the recipe that names them.

    Args:
        file: the recipe.
        folder: of named recipes.
        below_start: changes what lies below a recipe that names a file to start from; None: nothing is changed.
    Raises:
        ConfigError: no such file, a missing base, or recipes that extend each other in a circle.
    """
    chain, layers = [], []  # files from the recipe to its last base, and what each holds
    following: Path | None = file
    while following:
        if following.resolve() in chain:
            circle = " → ".join(recipe_name(link, folder) for link in (*chain, following))
            raise ConfigError(f"{file}: recipes extend each other in a circle: {circle}; drop one `{EXTENDS}`")
        chain.append(following.resolve())
        layers.append(load_yaml(following))
        if "plugins" in layers[-1]:
            layers[-1]["plugins"] = beside_recipe(layers[-1]["plugins"], following)
        following = _base_of(following, layers[-1], folder)
    merged: dict[str, Any] = {}
    while layers:
        layer = layers.pop()
        if below_start and layer.get(START):
            merged = below_start(merged, layer)
        merged = merge_settings(merged, layer)
    return merged


def merge_settings(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes put over them, by the rules of `read_recipe`; both stay as they are."""
    merged = dict(base)
    for key, value in changes.items():
        below = base.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        same = both and value.get("name", below.get("name")) == below.get("name")
        merged[key] = merge_settings(below, value) if same else value
    return merged


def _base_of(file: Path, recipe: dict[str, Any], folder: Path) -> Path | None:
    """The recipe that one extends, taking the key out of it; None where it extends none."""
    if EXTENDS not in recipe:
        return None
    name = recipe.pop(EXTENDS)
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(
            f"{file}: {EXTENDS} must name one recipe, like {EXTENDS}: imagenet/ibq_16384; got {name!r}. "
            "Leave the key out where there is no base"
        )
    candidates = [parent / end for parent in (file.parent, folder) for end in (name, f"{name}.yaml")]
    base = next((candidate for candidate in candidates if candidate.is_file()), None)
    if base is None:
        raise ConfigError(
            f"{file}: it extends {name!r}, and there is no such recipe, neither beside it nor under "
            f"experiments/{_hint(name, folder)}"
        )
    return base


def _hint(name: str, folder: Path) -> str:
    """What may have been meant, or all that there is."""
    files = (file for file in folder.glob("*/*.yaml") if file.parent.name not in NOT_RECIPES)
    names = sorted(recipe_name(file, folder) for file in files)
    near = difflib.get_close_matches(name.removesuffix(".yaml"), names, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}" if names else ""


def load_recipe(
    name: str,
    settings: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    plugins: Sequence[str] = (),
    below_start: Below | None = None,
) -> dict[str, Any]:
    """A recipe as a plain dictionary, its base merged in, with some of its keys replaced.

    Args:
        name: path, or name under experiments/.
        settings: dotted keys and their values: {"tokenizer.quantizer.codebook_size": 256}.
        assignments: the same as text, as typed on a command line: ["steps=500"].
        plugins: files and modules to run besides those that the recipe names.
        below_start: as in `read_recipe`.
    Raises:
        ConfigError: no such recipe or base, or text that is not key=value.
    """
    recipe = read_recipe(find_recipe(name), below_start=below_start)
    kind = _kind(recipe, assignments)
    typed = _replaced({}, settings, assignments, plugins, kind)
    if below_start and typed.get(START):
        recipe = below_start(recipe, typed)
    return _replaced(recipe, settings, assignments, plugins, kind)


def _replaced(
    recipe: Mapping[str, Any],
    settings: Mapping[str, Any] | None,
    assignments: Sequence[str],
    plugins: Sequence[str],
    kind: type,
) -> dict[str, Any]:
    """A copy of a recipe with what was typed, as `load_recipe` takes it, in place."""
    recipe = apply_overrides(recipe, assignments, kind)
    if plugins:
        recipe["plugins"] = list(dict.fromkeys([*(recipe.get("plugins") or []), *plugins]))
    for key, value in (settings or {}).items():
        *parents, last = key.split(".")
        section = recipe
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = copy.deepcopy(value)  # a later key may lead into it, and the caller's stays as it is
    return recipe


def recipe_config(
    name: str,
    settings: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    plugins: Sequence[str] = (),
    below_start: Below | None = None,
) -> TrainConfig | GeneratorTrainConfig:
    """A recipe, checked: a generator's where it has the key `generator`, else a tokenizer's.

    Arguments and errors as in `load_recipe`.
    """
    recipe = load_recipe(name, settings, assignments, plugins, below_start)
    return parse(_kind(recipe), recipe, source=f"recipe {name}")


def _kind(recipe: Mapping[str, Any], assignments: Sequence[str] = ()) -> type[TrainConfig | GeneratorTrainConfig]:
    """Whose settings a recipe holds, once the assignments are made."""
    is_generators = GENERATOR in recipe or any(
        assignment.partition("=")[0].split(".")[0] == GENERATOR for assignment in assignments
    )
    return GeneratorTrainConfig if is_generators else TrainConfig
