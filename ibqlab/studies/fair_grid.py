"""The runs of the fair comparison: every method from its own start and from common ones, each at a rate searched for.

    grid = FairGrid(FairParameters(preset="laptop"))
    grid.arms                             # a method from a start on one kind of data
    grid.search(arm), grid.final(arm, rate)   # its runs at every rate, and at the one that came out best

The file is experiments/tables/fair_comparison.yaml. All methods get the same search: the same rates, steps and seeds,
and the search's seeds are others than those of the result. A run whose loss leaves the numbers is the worst of its
search, and is no failure of the study.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ibqlab.base import checks
from ibqlab.base.checks import require, require_at_most, require_between, require_choice
from ibqlab.base.measures import measure
from ibqlab.config import ConfigError, content_hash, nearest, parse, to_dict
from ibqlab.diagnostics.lab import LabRunConfig, LabSource, LabTokenizer, World
from ibqlab.diagnostics.lab.parameters import read_methods
from ibqlab.grids.cells import OUTSIDE, STOPPED, Cell, CellStore, codebook_labels
from ibqlab.pretrained.start_settings import recipe_config
from ibqlab.quantizers import CHOSEN_STARTS, INITIALISATIONS, QuantizerConfig, quantizer_config
from ibqlab.quantizers.composite import open_sizes
from ibqlab.recipes.plugins import import_plugins
from ibqlab.recipes.presets import load_presets
from ibqlab.recipes.recipe_files import EXPERIMENTS
from ibqlab.studies.study import SharedParameters, require_distinct
from ibqlab.training import TrainConfig

FILE = EXPERIMENTS / "tables" / "fair_comparison.yaml"
LAB = "reconstruction_error"
IMAGES = "psnr"
"""By what the rate is chosen: the task that a tokenizer is trained for, not usage."""
STARTS = [start for start in CHOSEN_STARTS if start != "kmeans"]
"""That all methods with a codebook of their own can begin from."""


@dataclass(frozen=True, kw_only=True)
class FairParameters(SharedParameters):
    """What the `parameters` cell of the fair comparison may set. Empty or 0 means: as the preset says."""

    methods: tuple[str, ...] = ()
    """Quantizers by their registered names, each with settings of its own behind it where it has some:
    "vq revive_after=20"."""
    data: tuple[str, ...] = ()
    """On what: names of the preset, such as "lab", "digits", "photos"."""
    seeds: tuple[int, ...] = ()
    """Of the results; those of the search are the preset's."""
    against: str = ""
    """The method that all others are compared with, one of `methods`."""
    plugins: tuple[str, ...] = ()
    """Files (my_quantizer.py) and modules of your own that register quantizers, for `methods` to name."""

    def __post_init__(self):
        super().__post_init__()
        import_plugins(self.plugins)
        require_at_most("seeds (how many)", len(self.seeds), checks.STUDY_RUNS)
        for seed in self.seeds:
            require_between("seeds", seed, 0, checks.SEED)
        for axis in ("data", "seeds"):
            require_distinct(axis, getattr(self, axis))
        read_methods(self.methods)


@dataclass(frozen=True, kw_only=True)
class FairData:
    """One kind of data, and what is trained on it: a world of the lab, or a recipe of images."""

    world: World | None = None
    """Points and encoder of the lab."""
    recipe: str = ""
    """Of a tokenizer; with it neither world nor batch_size."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys of the recipe to replace."""
    batch_size: int = 256
    """Points of a step, of a world."""
    steps: int = 300
    """Of every run, of the search as of the result."""
    codebook_size: int = 256
    """K of methods that say nothing else, codes."""
    code_dim: int = 32
    """D likewise."""
    rates: tuple[float, ...] = (1e-3,)
    """Learning rates that are tried, the same for every method."""
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Method → settings of its size here: grids whose dimension follows from their K."""

    def __post_init__(self):
        require((self.world is None) != (not self.recipe), "data is either a world or a recipe; give one of them")
        require(not (self.world and self.settings), "settings replace keys of a recipe; a world has none")
        require(len(self.rates) > 0, "rates is empty: give at least one")
        require(len(set(self.rates)) == len(self.rates), f"rates holds one twice: {list(self.rates)}")
        for rate in self.rates:
            require(rate > 0, f"a rate must be > 0, got {rate}")

    @property
    def criterion(self) -> str:
        """The measure by which the best rate is chosen."""
        return LAB if self.world else IMAGES

    @property
    def measures(self) -> tuple[str, ...]:
        """What the tables show: use of the codes, what they lose, and the task."""
        return ("usage", "perplexity", "variance_lost", self.criterion)


@dataclass(frozen=True, kw_only=True)
class FairPreset:
    """A preset of the file."""

    methods: tuple[str, ...]
    """As in `FairParameters`."""
    data: dict[str, FairData]
    """Name → data."""
    against: str = "ibq"
    """As in `FairParameters`."""
    common_start: str = "normal"
    """The start that every method is given besides its own."""
    equal_start: str = "uniform"
    """The start of the second table: that of the comparisons which give all methods an equal budget."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the results."""
    search_seeds: tuple[int, ...] = (1000,)
    """Of the search; none of `seeds`."""
    workers: int = 2
    """Runs at a time on this machine."""

    def __post_init__(self):
        for name in ("common_start", "equal_start"):
            require_choice(name, getattr(self, name), STARTS)
        require(len(self.data) > 0 and len(self.search_seeds) > 0, "data and search_seeds need at least one entry each")
        require(self.workers >= 1, f"workers must be at least 1; got {self.workers}")


@dataclass(frozen=True)
class Arm:
    """A method from one start on one kind of data."""

    data: str
    label: str
    """Of the method, with its settings: "vq, revive_after=20"."""
    start: str
    """Key of `INITIALISATIONS`; "grid" where the codes are fixed, "library" where no start can be chosen."""
    own: bool
    """Whether it is the method's own start."""

    @property
    def name(self) -> str:
        """Of its runs' folders."""
        words = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in self.label)
        return f"{self.data}/{words}-{self.start}"


class FairGrid:
    """The comparison at a preset.

    Args:
        parameters: of the notebook.
    Raises:
        ConfigError: an unknown preset or kind of data, a method that the data cannot have, seeds that the search has.
    """

    def __init__(self, parameters: FairParameters):
        self.parameters, self.preset = parameters, read_fair_preset(parameters.preset)
        preset = self.preset
        self.workers, self.seeds = preset.workers, parameters.seeds or preset.seeds
        both = sorted({*self.seeds} & {*preset.search_seeds})
        require(not both, f"seeds: {both} are those of the search; results need others")
        for name in parameters.data:
            if name not in preset.data:
                raise ConfigError(
                    f"preset {parameters.preset} has no data {name!r}; {nearest(name, list(preset.data))}"
                )
        self.data = {name: preset.data[name] for name in parameters.data or preset.data}
        self.methods = read_methods(parameters.methods or preset.methods)
        against = parameters.against or preset.against
        # A choice of methods may leave the preset's out; the first of them then stands in its place.
        self.against = against if against in self.methods or parameters.against else next(iter(self.methods))
        require_choice("against", self.against, self.methods)
        self._configs = {arm: self._run_config(arm) for arm in self._arms()}

    @property
    def arms(self) -> list[Arm]:
        """All of them, data by data, in the methods' order, own starts first."""
        return list(self._configs)

    def describe(self) -> str:
        """How many runs that makes, for reading."""
        searched = sum(len(self.search(arm)) for arm in self.arms)
        total = searched + len(self.arms) * len(self.seeds)
        return (
            f"{len(self.methods)} methods on {', '.join(self.data)}: {total:,} runs at most, {searched:,} of them the "
            f"search for {len(self.arms)} rates"
        )

    def config(self, arm: Arm) -> TrainConfig | LabRunConfig:
        """The settings of an arm's runs, but for rate and seed."""
        return self._configs[arm]

    def arm(self, data: str, label: str, start: str = "") -> Arm | None:
        """A method's arm from a start, or from its own where none is given; None where it has no such start."""
        arms = [arm for arm in self.arms if (arm.data, arm.label) == (data, label)]
        return next((arm for arm in arms if (arm.start == start if start else arm.own)), None)

    def search(self, arm: Arm) -> list[Cell]:
        """The runs of an arm's search, rate by rate."""
        rates, seeds = self.data[arm.data].rates, self.preset.search_seeds
        return [self._cell(arm, rate, seed) for rate in rates for seed in seeds]

    def final(self, arm: Arm, rate: float) -> list[Cell]:
        """The runs of an arm's result."""
        return [self._cell(arm, rate, seed) for seed in self.seeds]

    def scores(self, arm: Arm, store: CellStore) -> dict[float, float] | None:
        """What the search of an arm came to: rate → mean of the criterion over the search's seeds, NaN for a rate of
        which a run failed or was stopped. None while a run is missing: one that was killed, or had no disk or memory,
        says nothing of its rate."""
        criterion, scores = self.data[arm.data].criterion, {}
        for cell in self.search(arm):
            row, failure = store.row(cell), store.failure(cell)
            if row is None and (failure is None or failure["cause"] in OUTSIDE):
                return None
            is_whole = row is not None and not row.get(STOPPED)
            scores.setdefault(cell.labels["rate"], []).append(row[criterion] if is_whole else math.nan)
        return {rate: float(np.mean(values)) for rate, values in scores.items()}

    def best_rate(self, arm: Arm, store: CellStore) -> float | None:
        """The rate that the search of an arm chose; None while a run is missing, and where all rates failed."""
        scores = self.scores(arm, store) or {}
        known = {rate: score for rate, score in scores.items() if np.isfinite(score)}
        if not known:
            return None
        is_higher = measure(self.data[arm.data].criterion).better == "higher"
        return (max if is_higher else min)(known, key=known.__getitem__)

    def _arms(self) -> list[Arm]:
        arms = []
        for data in self.data:
            for label in self.methods:
                own = self._quantizer(data, label, "").codebook_init
                # A start that is typed is what the method is about.
                is_fixed = own not in CHOSEN_STARTS or "codebook_init" in self.methods[label]
                starts = [] if is_fixed else [self.preset.common_start, self.preset.equal_start]
                names = dict.fromkeys([own, *starts])
                arms += [Arm(data, label, start, start == own) for start in names]
        return arms

    def _quantizer(self, data: str, label: str, start: str) -> QuantizerConfig:
        """A method's settings on one kind of data; those that are typed win."""
        settings, bench = self.methods[label], self.data[data]
        preset = {"code_dim": bench.code_dim} | bench.sizes.get(settings["name"], {})
        if not open_sizes(settings, bench.codebook_size, bench.code_dim):
            preset = {}  # typed levels decide K and D
        here = preset | settings
        sized = open_sizes(here, bench.codebook_size, here.get("code_dim", bench.code_dim))
        is_grid = quantizer_config({"name": settings["name"]}).codebook_init not in CHOSEN_STARTS
        if is_grid and "codebook_size" in settings and "code_dim" not in settings:
            for sizes in (sized, here):
                sizes.pop("code_dim", None)  # a typed K has a dimension of its own, which is not the preset's
        own = {"codebook_init": start} if start else {}
        try:
            return quantizer_config({**sized, **here, **own})
        except ValueError as error:
            raise ConfigError(f"method {label!r} on {data}: {error}") from None

    def _run_config(self, arm: Arm) -> TrainConfig | LabRunConfig:
        bench, typed = self.data[arm.data], self.parameters
        quantizer = self._quantizer(arm.data, arm.label, "" if arm.own else arm.start)
        steps = typed.steps or bench.steps
        if bench.world is None:
            settings = {**bench.settings, "tokenizer.quantizer": to_dict(quantizer), "steps": steps}
            return recipe_config(bench.recipe, settings, plugins=typed.plugins)
        return LabRunConfig(
            lab=LabSource(label=arm.label, world=bench.world),
            tokenizer=LabTokenizer(quantizer=quantizer),
            steps=steps,
            batch_size=bench.batch_size,
            plugins=typed.plugins,
        )

    def _cell(self, arm: Arm, rate: float, seed: int) -> Cell:
        config = self._configs[arm]
        if isinstance(config, LabRunConfig):
            config = replace(config, learning_rate=rate, seed=seed)
        else:
            config = replace(config, optimizer=replace(config.optimizer, learning_rate=rate), seed=seed)
        labels = codebook_labels(config.tokenizer.quantizer) | {
            "data": arm.data,
            "label": arm.label,
            "init": INITIALISATIONS[arm.start],
            "own_start": arm.own,
            "rate": rate,
            "seed": seed,
        }
        return Cell(f"{arm.name}-rate{rate:g}-seed{seed}", config, labels)


def read_fair_preset(name: str) -> FairPreset:
    """A preset of the comparison.

    Raises:
        ConfigError: no such preset, or a mistake in the file.
    """
    presets = load_presets(FILE)
    if name not in presets:
        raise ConfigError(f"the fair comparison has no preset {name!r}; {nearest(name, list(presets))}")
    return parse(FairPreset, presets[name], source=f"{FILE.name}, {name}")


def search_cells(grid: FairGrid, folder: Path) -> Sequence[Cell]:
    """The runs of all searches; they do not depend on the study's folder."""
    return [cell for arm in grid.arms for cell in grid.search(arm)]


def final_cells(grid: FairGrid, store: CellStore) -> Sequence[Cell]:
    """The runs of the results whose rate is known by now."""
    rates = {arm: grid.best_rate(arm, store) for arm in grid.arms}
    return [cell for arm, rate in rates.items() if rate is not None for cell in grid.final(arm, rate)]


def fair_facts(grid: FairGrid) -> Mapping[str, Any]:
    """What all runs of a folder have in common: data and search. Methods and seeds may be added."""
    shared = {"data": {name: asdict(bench) for name, bench in grid.preset.data.items()}}
    shared |= {name: getattr(grid.preset, name) for name in ("common_start", "equal_start", "search_seeds")}
    return {"preset": grid.parameters.preset, "steps": grid.parameters.steps, "budget": content_hash(shared)}
