"""The files under experiments/tables/: what the paper printed, as which recipe each row stands, and the presets."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ibqlab.base import checks
from ibqlab.base.checks import require, require_at_most, require_between, require_choice
from ibqlab.config import ConfigError, load_yaml, nearest, parse
from ibqlab.metrics.protocols import GENERATION_METRICS, RECONSTRUCTION_METRICS
from ibqlab.recipes.presets import load_presets
from ibqlab.recipes.published import PublishedRow, published_rows
from ibqlab.recipes.recipe_files import EXPERIMENTS

TABLES = EXPERIMENTS / "tables"
PRESETS_FILE = "presets.yaml"
OTHER_FILES = (PRESETS_FILE, "fair_comparison.yaml")
"""Beside the tables: their presets, and the comparison that is no table of the paper."""
ORDER = ("key_designs", "codebook_size", "code_dim", "residual_blocks", "lfq", "soft_vq", "tokenizers", "generators")
"""Tables as they are shown; others follow by name."""
PRINTED = {"rfid": 1000, "lpips": 1000, "usage": 1, "gfid": 1000, "inception_score": 1000, "precision": 1, "recall": 1}
"""What papers print for a row, on ImageNet at 256 pixels, fields of `PublishedRow` → the largest number. The Inception
Score cannot exceed its 1,000 classes; shares lie in 0 to 1."""
SHOWN_ON_REQUEST = ("feature_norm", "code_norm", "softmax_perplexity")
"""Measures of a tokenizer's features that say why its codes live or die: mean norms, and the number of codes that a
token's softmax over z·C is spread over."""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row of a table of the paper."""

    recipe: str = ""
    """The tokenizer's recipe; empty: printed numbers alone."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys of the recipe to replace, in the paper's numbers."""
    small_settings: dict[str, Any] = field(default_factory=dict)
    """Likewise, but not where the recipe itself is run."""
    generator: str = ""
    """The recipe of the generator over its tokens; empty: none."""
    inference: str = "hard"
    """"hard": single codes; "soft": averages of codes, Soft VQ's way in training."""
    skip: tuple[str, ...] = ()
    """Presets that leave this row out."""
    published: dict[str, float] | None = None
    """Printed numbers, by the keys of `PRINTED`. What is missing comes from the tokenizer's recipe, where the row has
    no settings of its own, and from the generator's, where no numbers are given here."""

    def __post_init__(self):
        require_choice("inference", self.inference, ("hard", "soft"))
        require(bool(self.recipe) or not (self.generator or self.settings), "a row with settings needs a recipe")
        for name, value in (self.published or {}).items():
            require_choice("published", name, PRINTED)
            require(0 <= value <= PRINTED[name], f"{name} must lie in 0 to {PRINTED[name]:,}; got {value:g}")

    def printed(self) -> dict[str, float]:
        """The paper's numbers for this row; what it did not print is left out."""
        values: dict[str, float] = {}
        for recipe in (self.recipe, self.generator if self.published is None else "") if not self.settings else ():
            row = all_published().get(recipe)
            values |= {name: getattr(row, name) for name in PRINTED if getattr(row, name, None) is not None}
        values |= self.published or {}
        return {name: values[name] for name in PRINTED if name in values}


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """A file under experiments/tables/."""

    title: str
    """For headings."""
    table: str
    """Where it stands in the paper."""
    source: str
    """The paper."""
    rows: dict[str, TableRow]
    """By their names, in the paper's order."""
    also: tuple[str, ...] = ()
    """Columns of ours beside the usual ones, of `SHOWN_ON_REQUEST`."""

    def __post_init__(self):
        require(len(self.rows) > 0, "rows is empty: give at least one row")
        require_at_most("rows (how many)", len(self.rows), checks.STUDY_RUNS)
        for name in self.also:
            require_choice("also", name, SHOWN_ON_REQUEST)


@dataclass(frozen=True, kw_only=True)
class TokenizerTranslation:
    """What the paper's tokenizers become. Numbers that a table needs and a mapping lacks are an error."""

    recipe: str
    """That they are put in."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys of that recipe to replace."""
    codebook_sizes: dict[int, int]
    """The paper's K → K here."""
    code_dims: dict[int, int]
    """The paper's D → D here. LFQ's follows from K."""
    num_res_blocks: dict[int, int]
    """The paper's residual blocks per level → here."""

    def __post_init__(self):
        bounds = {"codebook_sizes": checks.CODES, "code_dims": checks.CODE_DIM, "num_res_blocks": checks.BLOCKS}
        for name, most in bounds.items():
            for value in getattr(self, name).values():
                require_between(name, value, 1, most)


@dataclass(frozen=True, kw_only=True)
class GeneratorTranslation:
    """What the paper's generators become."""

    recipe: str
    """That they are put in."""
    depths: dict[int, int]
    """The paper's blocks → here; heads are as many."""
    width_per_depth: int = 64
    """Width = this × depth (eq. 12). Paper: 64."""

    def __post_init__(self):
        for depth in self.depths.values():
            require_between("depths", depth, 1, checks.BLOCKS)
        require_between("width_per_depth", self.width_per_depth, 1, checks.CHANNELS)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A preset of experiments/tables/presets.yaml. Without translations the paper's recipes are run as they are."""

    tokenizers: TokenizerTranslation | None = None
    """Of tables without generators."""
    under_generators: TokenizerTranslation | None = None
    """Of tables with them."""
    generators: GeneratorTranslation | None = None
    """Over their tokens."""
    weights: str = "raw"
    """Of tokenizers, "ema" (published) or "raw"."""
    metrics: tuple[str, ...] = ()
    """Of reconstructions, beside what training records."""
    samples_per_class: int = 0
    """Images that each generator draws of a class. Paper: 50."""
    published_cards: bool = False
    """Draw them as the paper did for the generator's size; False: without guidance, at temperature 1."""
    generation_metrics: tuple[str, ...] = ()
    """Of these images."""
    extractor: str = ""
    """Feature extractor for them in place of Inception."""
    reference: str = ""
    """What they are compared with; empty: the validation images."""
    recognised: bool = False
    """They are digits, judged by a classifier of real ones."""
    seeds: tuple[int, ...] = (0,)
    """Of every cell."""
    workers: int = 1
    """Cells at a time."""

    def __post_init__(self):
        require_choice("weights", self.weights, ("ema", "raw"))
        for metric in self.metrics:
            require_choice("metrics", metric, RECONSTRUCTION_METRICS)
        for metric in self.generation_metrics:
            require_choice("generation_metrics", metric, GENERATION_METRICS)
        require_between("samples_per_class", self.samples_per_class, 0, checks.IMAGES)
        require_between("workers", self.workers, 1, checks.PROCESSES)
        require_between("seeds (how many)", len(self.seeds), 1, checks.STUDY_RUNS)
        for seed in self.seeds:
            require_between("seeds", seed, 0, checks.SEED)


@cache
def all_published() -> dict[str, PublishedRow]:
    """What papers printed for tokenizers and generators, by recipe; read once for all rows of all tables."""
    return published_rows() | published_rows("generator")


def table_names() -> list[str]:
    """Names of all tables, in the order of the paper's story."""
    names = [file.stem for file in sorted(TABLES.glob("*.yaml")) if file.name not in OTHER_FILES]
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def read_table(name: str) -> TableFile:
    """A table's file, checked.

    Raises:
        ConfigError: no such file, or a mistake in it.
    """
    file = TABLES / f"{name}.yaml"
    return parse(TableFile, load_yaml(file), source=file.name)


def read_preset(name: str) -> Preset:
    """A preset of the tables.

    Raises:
        ConfigError: no such preset, or a mistake in the file.
    """
    presets = load_presets(TABLES / PRESETS_FILE)
    if name not in presets:
        raise ConfigError(f"the tables have no preset {name!r}; {nearest(name, list(presets))}")
    return parse(Preset, presets[name], source=f"{PRESETS_FILE}, {name}")
