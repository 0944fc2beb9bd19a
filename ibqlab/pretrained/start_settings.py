"""Recipes of runs that start from a file: the tokenizer is the file's, how it is trained the recipe's.

    config = recipe_config("builtin/photos", assignments=["start_from=vq_ds16_c2i.pt"])
    config.tokenizer.quantizer.codebook_size  # 16384, whatever builtin/photos says

Any recipe works with any file. Settings are layers: a recipe's base, the recipe, what is typed. The file's settings of
the tokenizer take their place just below the layer that names the file. So what stands beside `start_from`, or above
it, wins over the file, as a larger codebook_size does, and what lies below gives way to it. Losses are no part of that:
weights of a quantizer's loss stay the recipe's, where it says any for the quantizer that the file holds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ibqlab.base.escaping import for_terminal
from ibqlab.config import ConfigError, parse, to_dict
from ibqlab.pretrained.checkpoint import Checkpoint
from ibqlab.pretrained.reading import read_checkpoint
from ibqlab.pretrained.tensor_files import CheckpointError
from ibqlab.recipes import recipe_files
from ibqlab.recipes.generator_config import GeneratorTrainConfig
from ibqlab.recipes.plugins import import_named
from ibqlab.recipes.recipe_files import GENERATOR, START, merge_settings
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.tokenizer import TokenizerConfig

SIZES = ("codebook_size", "code_dim")
"""Settings that every quantizer has and that a file's codebook shows."""
LEARNING = (
    *("beta", "beta_on", "entropy_temperature", "entropy_epsilon", "entropy_over_processes", "double_quantization"),
    *("temperature_start", "temperature_end", "straight_through", "gradient", "ema_decay", "matmul"),
)
"""Settings of quantizers that training alone reads, beside all those that end in `_weight`. The rest says what an index
means, and is the file's."""


def recipe_config(
    name: str,
    settings: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    plugins: Sequence[str] = (),
) -> TrainConfig | GeneratorTrainConfig:
    """A recipe, checked; the tokenizer of one that starts from a file has the file's settings.

    Args: as in `ibqlab.recipes.recipe_files.load_recipe`.
    Raises:
        ConfigError: no such recipe, or settings that are none or impossible.
        FileNotFoundError, CheckpointError, RunError: the file cannot be started from; see `read_start`.
    """
    return recipe_files.recipe_config(name, settings, assignments, plugins, file_settings_below)


def read_start(path: str, family: str, num_heads: Sequence[int]) -> Checkpoint:
    """The checkpoint that a run starts from.

    Args:
        path, family, num_heads: the settings start_from, start_family and start_num_heads.
    Raises:
        as `read_checkpoint`; messages name the settings of a run.
    """
    heads = tuple(num_heads) if len(num_heads) > 1 else next(iter(num_heads), None)
    try:
        return read_checkpoint(path, family=family or None, num_heads=heads)
    except CheckpointError as error:
        word = next((word for word in ("family", "num_heads") if f"{word}=" in str(error)), "")
        if not word:
            raise
        raise CheckpointError(f"{error}. Beside start_from the setting is called start_{word}") from None


def file_settings_below(below: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """Settings in which the tokenizer is that of the file that the settings above them start from.

    Args:
        below: settings of the layers below, left as they are.
        layer: those of the layer that holds `start_from`; of a run's own config.yaml, which holds every setting of the
            tokenizer, no file is needed, so that the run goes on when the file is gone.
    Raises:
        as `read_start`.
    """
    whole = merge_settings(below, layer)
    import_named(whole)  # a plugin may register the file's family, design or quantizer
    typed = _section(layer, "tokenizer")
    path, family, heads = layer[START], whole.get("start_family", ""), whole.get("start_num_heads", ())
    is_text = isinstance(path, str) and isinstance(family, str)
    are_numbers = isinstance(heads, (list, tuple)) and all(isinstance(number, int) for number in heads)
    if GENERATOR in whole or _says_all(typed) or not (is_text and are_numbers):
        return below  # of a wrong type or place the check of the settings tells
    stored = to_dict(read_start(path, family, heads).config)
    recipe = _section(_section(below, "tokenizer"), "quantizer")
    quantizer = _quantizer(stored["quantizer"], recipe, _section(typed, "quantizer"))
    return {**below, "tokenizer": {**stored, "quantizer": quantizer}}


def _section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings below a key; none where there is something else."""
    section = settings.get(name)
    return section if isinstance(section, dict) else {}


def _says_all(tokenizer: dict[str, Any]) -> bool:
    """Whether every setting of a tokenizer is written out, as in a run's config.yaml."""
    try:
        return to_dict(parse(TokenizerConfig, tokenizer)) == tokenizer
    except ConfigError:
        return False


def _quantizer(stored: dict[str, Any], recipe: dict[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
    """A file's quantizer with the recipe's loss, or another one of the same sizes, where another name is typed."""
    name = typed.get("name", stored["name"])
    settings = stored if name == stored["name"] else {key: stored[key] for key in SIZES}
    losses = {key: value for key, value in recipe.items() if key in LEARNING or key.endswith("_weight")}
    return {**settings, **(losses if recipe.get("name") == name else {}), "name": name}


def differing(config: TokenizerConfig, stored: TokenizerConfig) -> list[str]:
    """A run's settings that are not its file's, as "tokenizer.quantizer.codebook_size=65536 (there 16384)"."""
    lines = []
    for section in ("autoencoder", "quantizer"):
        run, file = (to_dict(getattr(one, section)) for one in (config, stored))
        keys = [key for key in run if run[key] != file.get(key) and key not in LEARNING and not key.endswith("_weight")]
        lines += [
            f"tokenizer.{section}.{key}={for_terminal(run[key], 60)} (there {for_terminal(file.get(key), 60)})"
            for key in keys
        ]
    return lines
