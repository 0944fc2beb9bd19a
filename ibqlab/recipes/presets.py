"""The one table of presets: words for a size of work, the same at every door, and what each stands for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibqlab.base.checks import require_choice
from ibqlab.config import ConfigError, load_yaml


@dataclass(frozen=True, kw_only=True)
class EvaluationPreset:
    """What holds where a parameter of an evaluation notebook is empty."""

    weights: str
    """"ema" or "raw". Averages over 0.999 of the past mean nothing after a few hundred steps."""
    extractor: str = ""
    """Feature extractor in place of the protocol's Inception; empty: the protocol's."""
    metrics: tuple[str, ...] = ()
    """What is measured; empty: everything."""
    optional: tuple[str, ...] = ()
    """Metrics that are left out, with a line in the table, while their weight files are missing."""
    endless_images: int = 0
    """How many images are taken of a source without end (the built-in photographs)."""


@dataclass(frozen=True, kw_only=True)
class LabPreset:
    """Sizes of the lab without images."""

    playground: tuple[str, ...]
    """Methods of the notebook of this name, as they are typed."""
    features_lab: tuple[str, ...]
    """Likewise."""
    codebook_size: int
    """K, codes."""
    steps: int
    """Of every method."""
    batch_size: int = 512
    """Features of a step."""
    learning_rate: float = 0.01
    """Adam's."""
    snapshots: int = 32
    """Steps that leave a snapshot: the frames of the animation."""


@dataclass(frozen=True, kw_only=True)
class CasesPreset:
    """Sizes of the cases that people report."""

    seeds: tuple[int, ...]
    """Of every run. The cases' settings were found on seeds 0 to 2, so demo reports others."""
    steps: int = 0
    """Of every run; 0: each case's own."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What one word stands for, by use; empty: the word has no meaning there."""

    tokenizer: str = ""
    """Recipe of the one tokenizer that a notebook trains."""
    generator: tuple[str, ...] = ()
    """Recipes of a tokenizer and of the generator over its tokens."""
    link: tuple[str, ...] = ()
    """The same, where many pairs are trained to compare them."""
    evaluation: EvaluationPreset | None = None
    """How tokenizers are measured. Where `tokenizer` is empty, too, a checkpoint must be named, and images."""
    lab: LabPreset | None = None
    """Sizes of the lab without images."""
    cases: CasesPreset | None = None
    """Sizes of the cases that people report."""


_SMALL = ("rfid", "lpips_vgg", "psnr", "ssim", "usage", "perplexity")
_SMOKE_PAIR = ("builtin/smoke", "builtin/smoke_generator")
_DIGITS_PAIR = ("builtin/digits", "builtin/digits_generator")
_METHODS = (
    *("vq", "vq codebook_init=normal", "vq codebook_init=kmeans", "vq codebook_init=normal revive_after=20"),
    *("vq_ema", "vq_cosine codebook_init=normal", "simvq", "soft_vq", "ibq"),
)
_IN_THE_PLANE = (*_METHODS, "vq_ema revive_after=20", "ibq codebook_init=uniform", "lfq")
_OF_FEATURES = (*_METHODS, "vq_ema revive_after=20", "ibq codebook_init=uniform", "ibq codebook_init=unit")
_SMOKE_LAB = LabPreset(playground=("vq", "ibq"), features_lab=("vq", "ibq"), codebook_size=32, steps=12, snapshots=4)
_DEMO_LAB = LabPreset(playground=_IN_THE_PLANE, features_lab=_OF_FEATURES, codebook_size=256, steps=400)
_LAPTOP_LAB = LabPreset(playground=_IN_THE_PLANE, features_lab=_OF_FEATURES, codebook_size=1024, steps=400)


def _trial(images: int) -> EvaluationPreset:
    return EvaluationPreset(
        weights="raw", extractor="digits", metrics=_SMALL, optional=("lpips_vgg",), endless_images=images
    )


PRESETS = {
    "smoke": Preset(
        tokenizer="builtin/smoke",
        generator=_SMOKE_PAIR,
        link=_SMOKE_PAIR,
        evaluation=_trial(128),
        lab=_SMOKE_LAB,
        cases=CasesPreset(seeds=(0,), steps=4),
    ),
    "demo": Preset(lab=_DEMO_LAB, cases=CasesPreset(seeds=(10, 11, 12, 13, 14))),
    "laptop": Preset(tokenizer="builtin/photos", link=_DIGITS_PAIR, evaluation=_trial(1024), lab=_LAPTOP_LAB),
    "digits": Preset(tokenizer="builtin/digits", generator=_DIGITS_PAIR),
    "photos": Preset(generator=("builtin/photos", "builtin/photos_generator")),
    "h200": Preset(tokenizer="h200/photos"),
    "paper": Preset(tokenizer="imagenet/ibq_16384", generator=("imagenet/ibq_16384", "generators/ibq_b")),
    "published": Preset(evaluation=EvaluationPreset(weights="ema")),
}
"""Every preset. What smoke, demo, laptop, h200 and paper mean to studies and tables stands in the YAML files under
experiments/studies and experiments/tables: those hold grids."""


def preset_names(use: str) -> list[str]:
    """The words that a use knows; a use is a field of `Preset`."""
    return [name for name, preset in PRESETS.items() if getattr(preset, use)]


def find_preset(name: str, use: str) -> Any:
    """What a word stands for in one use.

    Raises:
        ValueError: the use does not know the word; the message lists those it knows.
    """
    require_choice("preset", name, preset_names(use))
    return getattr(PRESETS[name], use)


def load_presets(file: Path) -> dict[str, Any]:
    """A file of grids under experiments/studies or experiments/tables: preset → its settings, as they stand.

    Raises:
        ConfigError: a preset that is none of `PRESETS`, or a file that is no YAML.
    """
    presets = load_yaml(file)
    unknown = [name for name in presets if name not in PRESETS]
    if unknown:
        raise ConfigError(
            f"{file.name}: the preset {unknown[0]!r} is none of {', '.join(PRESETS)}; use one of these words, or add "
            "it to ibqlab/recipes/presets.py"
        )
    return presets
