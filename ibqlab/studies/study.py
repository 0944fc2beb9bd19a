"""A study is a grid of training runs in one folder: method × initialisation × codebook size × code dimension × seed.

Started again it trains only what is missing. Its cells are independent runs; tables and figures read their folders.
"""

import itertools
import math
import os
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from ibqlab.base.checks import (
    CODE_DIM,
    CODES,
    PROCESSES,
    SEED,
    STEPS,
    STUDY_RUNS,
    require,
    require_at_most,
    require_between,
    require_choice,
)
from ibqlab.base.files import write_whole
from ibqlab.config import ConfigError, content_hash, nearest, parse, split_assignment
from ibqlab.diagnostics.projection import PROJECTION_METHODS
from ibqlab.grids.cells import PARAMETERS_FILE, Cell, CellStore, StudyError, as_json
from ibqlab.grids.engine import Outcome, run_cells
from ibqlab.grids.local import Launcher, LocalLauncher
from ibqlab.grids.opening import as_typed, command_of_study, read_parameters_of, require_same_study
from ibqlab.grids.slurm import SlurmLauncher
from ibqlab.quantizers import INITIALISATIONS, available_quantizers
from ibqlab.recipes.presets import load_presets
from ibqlab.recipes.recipe_files import EXPERIMENTS, recipe_config
from ibqlab.runs import Run
from ibqlab.runs.finding import output_folder, run_name
from ibqlab.runs.provenance_record import COMMAND, portable

CLUSTERS = ("local", "slurm")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a preset of experiments/studies/*.yaml holds."""

    recipe: str
    """Name of the recipe under experiments/ that every cell starts from."""
    methods: tuple[str, ...]
    """Quantizers by their registered names."""
    initialisations: tuple[str, ...] = ("published",)
    """Starts of the codebook: "published" (each method's own), or "uniform", "normal", "unit", "kmeans" for all."""
    codebook_sizes: tuple[int, ...]
    """K, codes."""
    code_dims: tuple[int, ...]
    """D, numbers per code."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; figures show mean and range over them."""
    settings: tuple[str, ...] = ()
    """Keys of the recipe to replace in every cell: "optimizer.learning_rate=3e-4"."""
    steps: int = 0
    """Training steps of every cell; 0 as the recipe says."""
    workers: int = 1
    """Cells trained at a time, each in a process with its share of the cores."""
    projection: str = "umap"
    """How maps are drawn: "umap" or "pca"."""

    def __post_init__(self):
        for axis in ("methods", "initialisations", "codebook_sizes", "code_dims", "seeds"):
            values = getattr(self, axis)
            require(len(values) > 0, f"{axis} is empty: give at least one value")
            require(len(set(values)) == len(values), f"{axis} holds a value twice: {list(values)}")
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
        require_between("steps", self.steps, 0, STEPS)
        require_between("workers", self.workers, 1, PROCESSES)
        require_grid_fits(self)
        require_choice("projection", self.projection, PROJECTION_METHODS)

    @property
    def base(self) -> str:
        """The recipe and what is changed in it, for reading."""
        return f"{self.recipe} with {', '.join(self.settings)}" if self.settings else self.recipe


def require_grid_fits(grid: Any) -> None:
    """Refuse numbers on the axes of a grid that no run can have, and more runs than any study has.

    Args:
        grid: a `Grid`, or parameters with the same axes.
    Raises:
        ValueError: the message names the axis.
    """
    bounds = {"codebook_sizes": (1, CODES), "code_dims": (1, CODE_DIM), "seeds": (0, SEED)}
    for axis, (least, most) in bounds.items():
        for value in getattr(grid, axis):
            require_between(axis, value, least, most)
    lengths = [len(getattr(grid, axis)) or 1 for axis in ("methods", "initialisations", *bounds)]
    require_at_most("runs of the grid", math.prod(lengths), STUDY_RUNS)


@dataclass(frozen=True, kw_only=True)
class PlaceParameters:
    """Where a notebook's cells are worked on, and whether failed ones are tried again."""

    workers: int = 0
    """Cells trained at a time on this machine, one per GPU or group of cores; 0: as the preset says."""
    threads: int = 0
    """CPU threads of each; 0: the cores shared out evenly."""
    cluster: str = "local"
    """"local": processes of this machine; "slurm": jobs of the cluster that this machine submits to."""
    cluster_settings: tuple[str, ...] = ()
    """Of the cluster's jobs: ["partition=gpu", "timeout_min=600", "gpus_per_node=8"]."""
    retry: bool = False
    """Try cells again that failed before."""

    def __post_init__(self):
        require_choice("cluster", self.cluster, CLUSTERS)
        for name in ("workers", "threads"):
            require_between(name, getattr(self, name), 0, PROCESSES)
        require(
            not self.cluster_settings or self.cluster != "local",
            f"cluster_settings are for jobs of a cluster; got {list(self.cluster_settings)} with cluster=local. Give "
            "cluster=slurm",
        )

    def launcher(self, folder: Path, workers: int) -> Launcher:
        """What starts cells.

        Args:
            folder: of the study.
            workers: of the preset.
        Raises:
            StudyError: cluster=slurm where there is none.
        """
        if self.cluster == "slurm":
            return SlurmLauncher(folder, self.cluster_settings)
        return LocalLauncher(self.workers or workers, self.threads)


@dataclass(frozen=True, kw_only=True)
class StudyParameters(PlaceParameters):
    """What a study notebook's `parameters` cell may set. Empty or 0 means: as the preset says."""

    preset: str = "laptop"
    """A preset of the study's file under experiments/studies/."""
    recipe: str = ""
    """Another recipe."""
    methods: tuple[str, ...] = ()
    """Quantizers."""
    initialisations: tuple[str, ...] = ()
    """Starts of the codebook."""
    codebook_sizes: tuple[int, ...] = ()
    """K, codes."""
    code_dims: tuple[int, ...] = ()
    """D."""
    seeds: tuple[int, ...] = ()
    """Seeds."""
    settings: tuple[str, ...] = ()
    """Keys of the recipe to replace in every cell, after those that the preset replaces."""
    steps: int = 0
    """Training steps of every cell."""
    projection: str = ""
    """How maps are drawn."""
    output: str = ""
    """Folder of the study: a name below the folder of all runs, or a path that starts with / ./ or ~; empty:
    <study>-<preset>."""

    def __post_init__(self):
        super().__post_init__()
        require_between("steps", self.steps, 0, STEPS)
        require_grid_fits(self)


class Study:
    """A grid and its folder.

    Args:
        name: the study's name, for titles.
        grid: what to train.
        folder: where; created when the first cell starts.
        command: what makes it again, for reports.
        place: where its cells are worked on; None: on this machine.
    """

    def __init__(self, name: str, grid: Grid, folder: Path, command: str = "", place: PlaceParameters | None = None):
        self.name, self.grid, self.folder, self.command = name, grid, Path(folder), command
        self.place = place or PlaceParameters()
        self.cells = _cells(grid)
        self.store = CellStore(self.folder)

    def __repr__(self) -> str:
        return f"Study({self.name!r}, {len(self.cells)} runs, {str(self.folder)!r})"

    @property
    def facts(self) -> dict[str, Any]:
        """What all cells have in common; a folder holds cells of one such grid."""
        facts = {"study": self.name, "recipe": self.grid.recipe, "steps": self.grid.steps}
        return facts | ({"settings": list(self.grid.settings)} if self.grid.settings else {})

    def train(self, progress: bool = True) -> None:
        """Train every cell that is not finished, each in a process of its own.

        Raises:
            RunError: a cell's folder holds another config; nothing is trained.
            StudyError: some cells failed, listed with their last lines; the others are finished. Or the folder is
                another grid's.
        """
        self.run(progress).check()

    def run(self, progress: bool = True) -> Outcome:
        """As `train`, but what failed is returned and not raised, so that a notebook goes on to its tables."""
        for cell in self.cells:
            self._is_finished(cell)
        self.store.claim(self.facts)
        if isinstance(self.place, StudyParameters):
            write_whole(self.folder / PARAMETERS_FILE, as_json({"study": self.name, **asdict(self.place)}))
            os.environ[COMMAND] = command_of_study(self.name, asdict(self.place), self.folder)
        launcher = self.place.launcher(self.folder, self.grid.workers)
        try:
            return run_cells(self.cells, self.store, launcher, retry=self.place.retry, progress=progress)
        finally:
            launcher.close()
            os.environ.pop(COMMAND, None)

    def rows(self) -> pd.DataFrame:
        """The rows of all cells that are finished by now."""
        return self.store.table(self.cells)

    def finished(self) -> list[tuple[Cell, Run]]:
        """Cells that are done, with their runs, in the grid's order.

        Raises:
            RunError: a cell's folder holds another config.
        """
        return [(cell, Run(self.folder / cell.name)) for cell in self.cells if self._is_finished(cell)]

    def _is_finished(self, cell: Cell) -> bool:
        path = self.folder / cell.name
        if not (path / "config.yaml").is_file():
            return False
        run = Run(path)
        if run.config_hash != content_hash(cell.config):
            Run.start(path, cell.config)  # refuses, and names the keys that differ
        return run.status == "finished"

    def metrics(self) -> pd.DataFrame:
        """All logged rows of all finished cells, with the cells' labels as columns."""
        frames = [run.metrics.assign(run=cell.name, **cell.labels) for cell, run in self.finished()]
        if not frames:
            failures = [(cell.name, one["error"]) for cell in self.cells if (one := self.store.failure(cell))]
            why = "".join(f"; {name} failed: {error}" for name, error in failures[:1])
            raise StudyError(f"no run of {self.name} is finished in {self.folder.name}; call train() first{why}")
        return pd.concat(frames, ignore_index=True)

    def final_rows(self) -> pd.DataFrame:
        """The last row of each finished cell."""
        return self.metrics().groupby("run", sort=False).tail(1).reset_index(drop=True)


def open_study(name: str | Path, parameters: StudyParameters | None = None) -> Study:
    """A study, nothing trained: by its folder as it was last run, or by name, its preset overruled by parameters.

        open_study("my_collapse")                                        # the folder
        open_study("explore_collapse", StudyParameters(preset="demo"))   # new, or the same again

    Args:
        name: of a file under experiments/studies; without parameters a study's folder, a path or a name below the
            folder of all runs.
        parameters: of the notebook; None: those that the folder was last run with.
    Raises:
        ConfigError: unknown study, preset or recipe, or an impossible grid.
        FileNotFoundError: there is no such folder.
        StudyError: no study's folder, or one whose runs have another recipe, other settings or another number of steps
            than the parameters say. Other methods, sizes and seeds may be added to a folder.
    """
    if parameters is None:
        place, name, given = read_parameters_of(name)
        require(name != "ablations", f"{place} holds the tables of ablations; open it with open_ablations")
        # Without a look at the presets' content, which may have changed since: what is finished stays readable.
        return _plan_study(name, parse(StudyParameters, given, source=f"{place.name}, parameters"))
    study = _plan_study(name, parameters)
    require_same_study(study.store, study.facts)
    return study


def _plan_study(name: str, parameters: StudyParameters) -> Study:
    """A study by name and parameters, whatever its folder holds."""
    presets = load_presets(EXPERIMENTS / "studies" / f"{name}.yaml")
    if parameters.preset not in presets:
        near = nearest(parameters.preset, list(presets))
        raise ConfigError(f"the study {name} has no preset {parameters.preset!r}; {near}")
    given = {
        f.name: getattr(parameters, f.name)
        for f in fields(parameters)
        if f.name in Grid.__dataclass_fields__ and getattr(parameters, f.name)
    }
    preset = presets[parameters.preset]
    settings = preset | {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    settings["settings"] = [*preset.get("settings", []), *parameters.settings]
    grid = parse(Grid, settings, source=f"study {name}, preset {parameters.preset}")
    words = [f"preset={parameters.preset}", *(f"{key}={as_typed(value)}" for key, value in given.items())]
    folder = output_folder(parameters.output, default=f"{name}-{parameters.preset}")
    if run_name(folder) != f"{name}-{parameters.preset}":
        words.append(shlex.quote(f"output={portable(run_name(folder))}"))
    study = Study(name, grid, folder, command=" ".join(["ibqlab run", name, *words]), place=parameters)
    return study


def name_start(start: str, is_default: bool) -> str:
    """How tables and figures write where a codebook started, marking a method's own start."""
    return f"{start}, default" if is_default else start


def _cells(grid: Grid) -> list[Cell]:
    """The grid's runs; a start that is a method's published one anyway is not trained twice."""
    axes = (grid.methods, grid.initialisations, grid.codebook_sizes, grid.code_dims, grid.seeds)
    cells: dict[str, Cell] = {}
    for method, start, size, dim, seed in itertools.product(*axes):
        quantizer = {"name": method, "codebook_size": size, "code_dim": dim}
        published = recipe_config(grid.recipe, {"tokenizer.quantizer": quantizer}, grid.settings)
        if start != "published":
            quantizer["codebook_init"] = start
        settings = {"tokenizer.quantizer": quantizer, "seed": seed} | ({"steps": grid.steps} if grid.steps else {})
        config = recipe_config(grid.recipe, settings, grid.settings)
        actual = config.tokenizer.quantizer.codebook_init
        labels = {
            "method": method,
            "init": INITIALISATIONS[actual],
            "published_init": actual == published.tokenizer.quantizer.codebook_init,
            "codebook_size": size,
            "code_dim": dim,
            "seed": seed,
        }
        cell = Cell(f"{method}-{actual}-K{size}-D{dim}-seed{seed}", config, labels)
        cells.setdefault(content_hash(config), cell)
    return list(cells.values())
