"""Grids of tokenizers: method × start of the codebook × codebook size × code dimension × seed, on one recipe.

The studies of collapse and of scaling are such grids; their presets are files under experiments/studies/.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ibqlab.base import checks
from ibqlab.base.checks import require, require_at_most, require_between, require_choice
from ibqlab.config import ConfigError, content_hash, nearest, parse, split_assignment, to_dict
from ibqlab.diagnostics.projection import PROJECTION_METHODS
from ibqlab.grids.cells import Cell, StudyError
from ibqlab.pretrained.start_settings import recipe_config
from ibqlab.quantizers import INITIALISATIONS, available_quantizers
from ibqlab.recipes.plugins import import_plugins
from ibqlab.recipes.presets import load_presets
from ibqlab.recipes.recipe_files import EXPERIMENTS
from ibqlab.runs.finding import run_name
from ibqlab.studies.study import SharedParameters, Study, StudyDefinition, as_typed, require_distinct

BOUNDS = {"codebook_sizes": (1, checks.CODES), "code_dims": (1, checks.CODE_DIM), "seeds": (0, checks.SEED)}
AXES = ("methods", "initialisations", *BOUNDS)
LABELS = {"method", "init", "published_init", "codebook_size", "code_dim", "seed"}
"""What tells the runs of a grid of methods apart."""
DEFAULTS = {"initialisations": ["published"], "seeds": [0], "workers": 1, "projection": "umap"}
"""Of what neither the parameters nor the preset say."""


@dataclass(frozen=True, kw_only=True)
class StudyParameters(SharedParameters):
    """What the `parameters` cell of a grid of tokenizers may set. Empty or 0 means: as the preset says."""

    recipe: str = ""
    """The recipe that every run starts from: a path, or a name under experiments/."""
    methods: tuple[str, ...] = ()
    """Quantizers by their registered names."""
    initialisations: tuple[str, ...] = ()
    """Starts of the codebook: "published" (each method's own), or "uniform", "normal", "unit", "kmeans" for all."""
    codebook_sizes: tuple[int, ...] = ()
    """K, codes."""
    code_dims: tuple[int, ...] = ()
    """D, numbers per code."""
    seeds: tuple[int, ...] = ()
    """Figures show mean and range over them."""
    settings: tuple[str, ...] = ()
    """Keys of the recipe to replace in every run, after those that the preset replaces:
    "optimizer.learning_rate=3e-4"."""
    projection: str = ""
    """How maps are drawn: "umap" or "pca"."""
    plugins: tuple[str, ...] = ()
    """Files (my_quantizer.py) and modules of your own that register quantizers, for `methods` to name."""
    wait: bool = True
    """Whether the training cell waits for the end; else training goes on in the background and the kernel is free."""

    def __post_init__(self):
        super().__post_init__()
        import_plugins(self.plugins)
        for axis, (least, most) in BOUNDS.items():
            for value in getattr(self, axis):
                require_between(axis, value, least, most)
        lengths = [len(getattr(self, axis)) or 1 for axis in AXES]
        require_at_most("runs of the grid", math.prod(lengths), checks.STUDY_RUNS)
        for axis in AXES:
            require_distinct(axis, getattr(self, axis))
        for method in self.methods:
            require_choice("methods", method, available_quantizers())
        for start in self.initialisations:
            require_choice("initialisations", start, ("published", *INITIALISATIONS))
        for setting in self.settings:
            key = split_assignment(setting)[0]
            require(
                key not in ("seed", "steps") and not key.startswith("tokenizer.quantizer"),
                f"settings: {key} is the grid's own; give methods, initialisations, codebook_sizes, code_dims, seeds "
                "or steps",
            )
        if self.projection:
            require_choice("projection", self.projection, PROJECTION_METHODS)

    @property
    def base(self) -> str:
        """The recipe and what is changed in it, for reading."""
        return f"{self.recipe} with {', '.join(self.settings)}" if self.settings else self.recipe


def read_preset(name: str, parameters: StudyParameters) -> StudyParameters:
    """The parameters of a grid, with its preset's values where they say nothing.

    Args:
        name: of a file under experiments/studies/.
        parameters: of the notebook.
    Raises:
        ConfigError: no such preset, or a mistake in the file.
    """
    presets = load_presets(EXPERIMENTS / "studies" / f"{name}.yaml")
    if parameters.preset not in presets:
        near = nearest(parameters.preset, list(presets))
        raise ConfigError(f"the study {name} has no preset {parameters.preset!r}; {near}")
    return fill_in(parameters, presets[parameters.preset], f"study {name}, preset {parameters.preset}")


def fill_in(parameters: StudyParameters, preset: Mapping[str, Any], source: str) -> StudyParameters:
    """Parameters with a preset's values where they say nothing.

    Args:
        parameters: of the notebook; their settings come after the preset's.
        preset: names of parameters → values.
        source: of the preset; starts the message.
    Raises:
        ConfigError: impossible values, or a grid without runs.
    """
    typed = {key: value for key, value in to_dict(parameters).items() if value}
    settings = [*preset.get("settings", []), *parameters.settings]
    grid = parse(StudyParameters, {**DEFAULTS, **preset, **typed, "settings": settings}, source=source)
    for axis in AXES:
        if not getattr(grid, axis):
            raise ConfigError(f"{source}: {axis} is empty: give at least one value")
    if grid.workers < 1:
        raise ConfigError(f"{source}: workers must be at least 1; got {grid.workers}")
    return grid


def grid_cells(grid: StudyParameters, folder: Path) -> list[Cell]:
    """The runs of a grid with its preset's values in it; they do not depend on the study's folder.

    A start that is a method's published one anyway is not trained twice.
    """
    cells: dict[str, Cell] = {}
    axes = (grid.methods, grid.initialisations, grid.codebook_sizes, grid.code_dims, grid.seeds)
    for method, start, size, dim, seed in itertools.product(*axes):
        quantizer = {"name": method, "codebook_size": size, "code_dim": dim}
        quantizer |= {"codebook_init": start} if start != "published" else {}
        settings = {"tokenizer.quantizer": quantizer, "seed": seed} | ({"steps": grid.steps} if grid.steps else {})
        config = recipe_config(grid.recipe, settings, grid.settings, grid.plugins)
        quantizer_config = config.tokenizer.quantizer
        labels = {
            "method": method,
            "init": INITIALISATIONS[quantizer_config.codebook_init],
            "published_init": quantizer_config.codebook_init == type(quantizer_config).codebook_init,
            "codebook_size": size,
            "code_dim": dim,
            "seed": seed,
        }
        name = f"{method}-{quantizer_config.codebook_init}-K{size}-D{dim}-seed{seed}"
        cells.setdefault(content_hash(config), Cell(name, config, labels))
    return list(cells.values())


def grid_facts(grid: StudyParameters) -> dict[str, Any]:
    """What all runs of a folder have in common; sizes, methods and seeds may be added."""
    facts: dict[str, Any] = {"recipe": grid.recipe, "steps": grid.steps}
    return facts | ({"settings": list(grid.settings)} if grid.settings else {})


def grid_study(name: str, report: Callable[[Study, bool], str]) -> StudyDefinition:
    """The definition of a study that is a grid.

    Args:
        name: of the study, of its notebook and of its presets under experiments/studies/.
        report: as in `StudyDefinition`.
    """
    return StudyDefinition(
        name=name,
        parameters=StudyParameters,
        grid=partial(read_preset, name),
        cells=grid_cells,
        facts=grid_facts,
        report=report,
    )


def require_methods(study: Study) -> None:
    """Refuse a study whose runs are no grid of methods, starts, sizes, dimensions and seeds.

    Raises:
        StudyError: the message says what to type instead.
    """
    if any(not cell.labels.keys() >= LABELS for cell in study.cells):
        raise StudyError(
            f"only grids of methods can be drawn and explored so, and {study.name} is another kind of study; type\n"
            f"ibqlab report {as_typed(run_name(study.folder))}"
        )


def name_start(start: str, is_default: bool) -> str:
    """How tables and figures write where a codebook started, marking a method's own start."""
    return f"{start}, default" if is_default else start
