"""The paper's tables as grids: rows that stand as recipes of the paper, put by one dial on the hardware at hand.

    ablations = open_ablations(AblationParameters(preset="laptop", tables=("key_designs",)))
    print(ablations.run())                       # what became of the cells
    ablations.tables["key_designs"].rows         # names of rows → their cells, one per seed

A table is a file under experiments/tables/. Each row names the ImageNet recipe behind it; the preset translates what
the row is about (quantizer, codebook size, code dimension, residual blocks, depth of the generator) and leaves the rest
as its own recipe has it. Rows of several tables that are the same run are trained once.
"""

import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from ibqlab.base.checks import SEED, STEPS, STUDY_RUNS, require, require_at_most, require_between
from ibqlab.base.files import write_whole
from ibqlab.config import ConfigError, content_hash, nearest, parse
from ibqlab.grids.cells import PARAMETERS_FILE, Cell, CellStore, MeasureConfig, as_json
from ibqlab.grids.engine import Outcome, run_cells
from ibqlab.grids.opening import as_typed, command_of_study, read_parameters_of, require_same_study
from ibqlab.recipes.recipe_files import load_recipe, recipe_config
from ibqlab.runs.finding import output_folder, run_name
from ibqlab.runs.provenance_record import COMMAND, portable
from ibqlab.studies.study import PlaceParameters
from ibqlab.studies.table_files import Dial, Published, TableFile, TableRow, read_dial, read_table, table_names
from ibqlab.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class AblationParameters(PlaceParameters):
    """What the `parameters` cell of ablations may set. Empty or 0 means: as the preset says."""

    preset: str = "laptop"
    """A preset of experiments/tables/presets.yaml."""
    tables: tuple[str, ...] = ()
    """Names of files under experiments/tables/; empty: all."""
    seeds: tuple[int, ...] = ()
    """Of every cell; with two or more, tables have intervals."""
    steps: int = 0
    """Training steps of every cell; 0: as its recipe says."""
    output: str = ""
    """Folder: a name below the folder of all runs, or a path that starts with / ./ or ~; empty: ablations-<preset>."""

    def __post_init__(self):
        super().__post_init__()
        require_between("steps", self.steps, 0, STEPS)
        require_at_most("seeds (how many)", len(self.seeds), STUDY_RUNS)
        for seed in self.seeds:
            require_between("seeds", seed, 0, SEED)
        for axis in ("tables", "seeds"):
            values = getattr(self, axis)
            require(len(set(values)) == len(values), f"{axis} holds a value twice: {list(values)}")


class RowCells(NamedTuple):
    """The runs behind a row: one per seed."""

    row: TableRow
    printed: Published
    """The paper's numbers."""
    tokenizers: list[Cell]
    generators: list[Cell]
    """Empty where the row has none."""


class Table:
    """One table at one preset.

    Args:
        name: of its file.
        file: its content.
        cells: per row.
    """

    def __init__(self, name: str, file: TableFile, rows: dict[str, RowCells]):
        self.name, self.file, self.rows = name, file, rows

    @property
    def cells(self) -> list[Cell]:
        """All of them, tokenizers before the generators over them."""
        rows = self.rows.values()
        return [cell for row in rows for cell in row.tokenizers] + [cell for row in rows for cell in row.generators]


class Ablations:
    """Several tables that share their cells, in one folder.

    Args:
        parameters: of the notebook.
        dial: of the preset.
        tables: at that preset.
        folder: where.
    """

    def __init__(self, parameters: AblationParameters, dial: Dial, tables: dict[str, Table], folder: Path):
        self.parameters, self.dial, self.tables, self.folder = parameters, dial, tables, folder
        self.store = CellStore(folder)
        self.cells = list({cell.name: cell for table in tables.values() for cell in table.cells}.values())
        # The longest of those that wait for others come first, so that no worker is left alone with one.
        self.cells.sort(key=lambda cell: (not isinstance(cell.config, TrainConfig), -cell.labels.get("depth", 0)))
        self.seeds = parameters.seeds or dial.seeds

    @property
    def facts(self) -> dict[str, Any]:
        """What all cells have in common; a folder holds cells of one such study."""
        return {
            "study": "ablations",
            "preset": self.parameters.preset,
            "steps": self.parameters.steps,
            "dial": content_hash({**asdict(self.dial), "seeds": (), "workers": 0}),
        }

    @property
    def command(self) -> str:
        """What makes it again, for whoever may read it: paths outside this folder and ~ are cut."""
        plain = AblationParameters()
        given = {f.name: getattr(self.parameters, f.name) for f in fields(plain) if f.name not in ("retry", "output")}
        words = [
            f"{key}={as_typed(value)}"
            for key, value in given.items()
            if key == "preset" or value != getattr(plain, key)
        ]
        if run_name(self.folder) != f"ablations-{self.parameters.preset}":
            words.append(shlex.quote(f"output={portable(run_name(self.folder))}"))
        return " ".join(["ibqlab run ablations", *words])

    def run(self, progress: bool = True) -> Outcome:
        """Bring every cell to its row; failures are returned, not raised.

        Raises:
            StudyError: the folder is another study's, or there is no cluster.
            RunError: it cannot be written.
        """
        self.store.claim(self.facts)
        write_whole(self.folder / PARAMETERS_FILE, as_json({"study": "ablations", **asdict(self.parameters)}))
        os.environ[COMMAND] = command_of_study("ablations", asdict(self.parameters), self.folder)
        launcher = self.parameters.launcher(self.folder, self.dial.workers)
        try:
            return run_cells(self.cells, self.store, launcher, retry=self.parameters.retry, progress=progress)
        finally:
            launcher.close()
            os.environ.pop(COMMAND, None)


def open_ablations(parameters: AblationParameters | str | Path) -> Ablations:
    """Tables by name at a preset, nothing trained.

    Args:
        parameters: of the notebook; or a study's folder, a path or a name below the folder of all runs, which is opened
            as it was last run.
    Raises:
        ConfigError: unknown preset, table or recipe, a number of the paper that the preset does not translate, two rows
            that are the same run.
        FileNotFoundError: there is no such folder.
        StudyError: the folder is another study's.
    """
    if not isinstance(parameters, AblationParameters):
        place, name, given = read_parameters_of(parameters)
        require(name == "ablations", f"{place} holds the study {name}; open it with open_study")
        # Without a look at the presets' content, which may have changed since: what is finished stays readable.
        return _open(parse(AblationParameters, given, source=f"{place.name}, parameters"))
    study = _open(parameters)
    require_same_study(study.store, study.facts)
    return study


def _open(parameters: AblationParameters) -> Ablations:
    dial = read_dial(parameters.preset)
    known = table_names()
    for name in parameters.tables:
        if name not in known:
            raise ConfigError(f"there is no table {name!r} under experiments/tables; {nearest(name, known)}")
    scale = _Scale(parameters, dial)
    tables = {name: scale.table(name, read_table(name)) for name in parameters.tables or known}
    folder = output_folder(parameters.output, default=f"ablations-{parameters.preset}")
    return Ablations(parameters, dial, tables, folder)


class _Scale:
    """Makes cells of a preset from rows of the paper."""

    def __init__(self, parameters: AblationParameters, dial: Dial):
        self.parameters, self.dial = parameters, dial
        self.seeds = parameters.seeds or dial.seeds

    def table(self, name: str, file: TableFile) -> Table:
        """A table's cells.

        Raises:
            ConfigError: two rows that are the same run.
        """
        rows, seen = {}, {}
        for label, row in file.rows.items():
            if self.parameters.preset in row.skip:
                continue
            try:
                cells = RowCells(row, row.printed(), *self._cells(row))
            except ConfigError as error:
                raise ConfigError(f"tables/{name}.yaml, row {label!r}: {error}") from None
            for cell in (cells.generators or cells.tokenizers)[:1]:
                same = seen.setdefault((cell.key, row.inference), label)
                if same != label:
                    raise ConfigError(
                        f"tables/{name}.yaml: the rows {same!r} and {label!r} are the same run at preset "
                        f"{self.parameters.preset} (content hash {cell.key}); translate their numbers to different "
                        "ones in presets.yaml, or let one `skip` this preset"
                    )
            rows[label] = cells
        return Table(name, file, rows)

    def _cells(self, row: TableRow) -> tuple[list[Cell], list[Cell]]:
        if not row.recipe:
            return [], []
        tokenizers = [self._tokenizer(row, seed) for seed in self.seeds]
        if not row.generator:
            return tokenizers, []
        return tokenizers, [self._generator(row, cell) for cell in tokenizers]

    @property
    def _steps(self) -> dict[str, int]:
        return {"steps": self.parameters.steps} if self.parameters.steps else {}

    def _tokenizer(self, row: TableRow, seed: int) -> Cell:
        dial = self.dial
        scale = dial.under_generators if row.generator else dial.tokenizers
        if scale is None:
            config = recipe_config(row.recipe, {**row.settings, **self._steps, "seed": seed})
        else:
            paper = load_recipe(row.recipe, {**row.settings, **row.small_settings})["tokenizer"]
            quantizer, blocks = dict(paper["quantizer"]), paper["autoencoder"]["num_res_blocks"]
            size = self._translated(scale.codebook_sizes, "codebook_sizes", quantizer["codebook_size"])
            lfq = quantizer["name"] == "lfq"
            dim = int(math.log2(size)) if lfq else self._translated(scale.code_dims, "code_dims", quantizer["code_dim"])
            settings = {
                "tokenizer.quantizer": quantizer | {"codebook_size": size, "code_dim": dim},
                "tokenizer.autoencoder.num_res_blocks": self._translated(
                    scale.num_res_blocks, "num_res_blocks", blocks
                ),
                **scale.settings,
                **self._steps,
                "seed": seed,
            }
            config = recipe_config(scale.recipe, settings)
        quantizer, blocks = config.tokenizer.quantizer, config.tokenizer.autoencoder.num_res_blocks
        labels = {
            "method": quantizer.config_name,
            "codebook_size": quantizer.codebook_size,
            "code_dim": quantizer.code_dim,
            "num_res_blocks": blocks,
            "seed": seed,
        }
        measure = MeasureConfig(weights=dial.weights, metrics=dial.metrics)
        stem = f"{quantizer.config_name}-K{quantizer.codebook_size}-D{quantizer.code_dim}-blocks{blocks}-seed{seed}"
        return _named(stem, Cell("", config, labels, measure=measure))

    def _generator(self, row: TableRow, tokenizer: Cell) -> Cell:
        dial, size = self.dial, tokenizer.config.tokenizer.quantizer.codebook_size
        shared = {"tokenizer": tokenizer.name, "seed": tokenizer.labels["seed"], **self._steps}
        scale = dial.generators
        if scale is None:
            config = recipe_config(row.generator, {**shared, "generator.vocabulary_size": size})
        else:
            paper = recipe_config(row.generator).generator
            depth = self._translated(scale.depths, "depths", paper.depth)
            settings = {
                "generator.depth": depth,
                "generator.width": scale.width_per_depth * depth,
                "generator.num_heads": depth,
                "generator.gate_scale": paper.gate_scale,
                "generator.vocabulary_size": size,
                "tokenizer_weights": dial.weights,
            }
            config = recipe_config(scale.recipe, shared | settings)
        made = config.generator
        labels = {**tokenizer.labels, "depth": made.depth, "width": made.width, "num_heads": made.num_heads}
        measure = MeasureConfig(
            samples_per_class=dial.samples_per_class,
            card=Path(row.generator).name if dial.published_cards else "",
            reference=dial.reference,
            generation_metrics=dial.generation_metrics,
            extractor=dial.extractor,
            recognised=dial.recognised,
        )
        stem = f"generator{made.depth}-over-{tokenizer.labels['method']}-K{size}-seed{tokenizer.labels['seed']}"
        return _named(stem, Cell("", config, labels, needs=tokenizer.name, measure=measure))

    def _translated(self, known: Mapping[int, int], axis: str, value: int) -> int:
        if value not in known:
            raise ConfigError(
                f"preset {self.parameters.preset} does not say what {value:,} becomes: add it to its {axis} in "
                f"presets.yaml, which hold {', '.join(map(str, known)) or 'nothing'}"
            )
        return known[value]


def _named(stem: str, cell: Cell) -> Cell:
    """A cell whose name ends with its content, so that other settings never meet its folder."""
    return Cell(f"{stem}-{cell.key[:6]}", cell.config, cell.labels, cell.needs, cell.measure)
