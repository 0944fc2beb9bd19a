"""The runs behind the paper's tables: rows that stand as recipes of the paper, translated to the hardware at hand.

    grid = PaperTables(AblationParameters(preset="laptop", tables=("key_designs",)))
    grid.tables["key_designs"]             # names of rows → their runs, one per seed

A table is a file under experiments/tables/. Each row names the ImageNet recipe behind it; the preset translates what
the row is about (quantizer, codebook size, code dimension, residual blocks, depth of the generator) and leaves the rest
as its own recipe has it. Rows of several tables that are the same run are trained once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ibqlab.base.checks import SEED, STUDY_RUNS, require_at_most, require_between
from ibqlab.config import ConfigError, content_hash, nearest
from ibqlab.grids.cells import Cell, EvaluationRequest, codebook_labels
from ibqlab.pretrained.start_settings import recipe_config
from ibqlab.recipes.recipe_files import load_recipe
from ibqlab.studies.study import SharedParameters, require_distinct
from ibqlab.studies.table_files import TableFile, TableRow, read_preset, read_table, table_names
from ibqlab.training import GeneratorTrainConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class AblationParameters(SharedParameters):
    """What the `parameters` cell of ablations may set. Empty or 0 means: as the preset says."""

    tables: tuple[str, ...] = ()
    """Names of files under experiments/tables/; empty: all."""
    seeds: tuple[int, ...] = ()
    """Of every cell; with two or more, tables have intervals."""

    def __post_init__(self):
        super().__post_init__()
        require_at_most("seeds (how many)", len(self.seeds), STUDY_RUNS)
        for seed in self.seeds:
            require_between("seeds", seed, 0, SEED)
        require_distinct("tables", self.tables)
        require_distinct("seeds", self.seeds)


class RowCells(NamedTuple):
    """A row of a table, and the runs behind it, one per seed."""

    row: TableRow
    printed: dict[str, float]
    """The paper's numbers, by the keys of `PRINTED`."""
    tokenizers: Sequence[Cell]
    generators: Sequence[Cell]
    """Empty where the row has none."""


class PaperTables:
    """Several tables at a preset. Their runs are made here, once, and shared between tables.

    Args:
        parameters: of the notebook.
    Raises:
        ConfigError: an unknown preset, table or recipe, a number of the paper that the preset does not translate, two
            rows that are the same run.
    """

    def __init__(self, parameters: AblationParameters):
        self.parameters, self.preset = parameters, read_preset(parameters.preset)
        self.seeds, self.workers = parameters.seeds or self.preset.seeds, self.preset.workers
        self._steps = {"steps": parameters.steps} if parameters.steps else {}
        names = table_names()
        for name in parameters.tables:
            if name not in names:
                raise ConfigError(f"there is no table {name!r} under experiments/tables; {nearest(name, names)}")
        self.files = {name: read_table(name) for name in parameters.tables or names}
        self.tables = {name: self._row_cells(name, file) for name, file in self.files.items()}

    def _row_cells(self, name: str, file: TableFile) -> dict[str, RowCells]:
        rows: dict[str, RowCells] = {}
        labels: dict[tuple[str, str], str] = {}
        for label, row in file.rows.items():
            if self.parameters.preset in row.skip:
                continue
            try:
                tokenizers = self._tokenizers(row) if row.recipe else []
                generators = self._generators(row, tokenizers) if row.generator else []
            except ConfigError as error:
                raise ConfigError(f"tables/{name}.yaml, row {label!r}: {error}") from None
            for cell in (generators or tokenizers)[:1]:
                same = labels.setdefault((cell.key, row.inference), label)
                if same != label:
                    raise ConfigError(
                        f"tables/{name}.yaml: the rows {same!r} and {label!r} are the same run at preset "
                        f"{self.parameters.preset} (content hash {cell.key}); translate their numbers to different "
                        "ones in presets.yaml, or let one `skip` this preset"
                    )
            rows[label] = RowCells(row, row.printed(), tokenizers, generators)
        return rows

    def _tokenizers(self, row: TableRow) -> list[Cell]:
        """A row's tokenizers. Their settings are resolved once; seeds differ in nothing else."""
        config = self._tokenizer_config(row)
        quantizer, blocks = config.tokenizer.quantizer, config.tokenizer.autoencoder.num_res_blocks
        measure = EvaluationRequest(weights=self.preset.weights, metrics=self.preset.metrics)
        stem = f"{quantizer.config_name}-K{quantizer.codebook_size}-D{quantizer.code_dim}-blocks{blocks}"
        labels = codebook_labels(quantizer) | {"num_res_blocks": blocks}
        return [
            _named(f"{stem}-seed{seed}", Cell("", replace(config, seed=seed), labels | {"seed": seed}, "", measure))
            for seed in self.seeds
        ]

    def _tokenizer_config(self, row: TableRow) -> TrainConfig:
        translation = self.preset.under_generators if row.generator else self.preset.tokenizers
        if translation is None:
            return recipe_config(row.recipe, {**row.settings, **self._steps})
        paper = load_recipe(row.recipe, {**row.settings, **row.small_settings})["tokenizer"]
        quantizer, blocks = dict(paper["quantizer"]), paper["autoencoder"]["num_res_blocks"]
        size = self._translated(translation.codebook_sizes, "codebook_sizes", quantizer["codebook_size"])
        if quantizer["name"] == "lfq":
            dim = int(math.log2(size))  # LFQ's codes are the corners of a cube
        else:
            dim = self._translated(translation.code_dims, "code_dims", quantizer["code_dim"])
        settings = {
            "tokenizer.quantizer": quantizer | {"codebook_size": size, "code_dim": dim},
            "tokenizer.autoencoder.num_res_blocks": self._translated(
                translation.num_res_blocks, "num_res_blocks", blocks
            ),
            **translation.settings,
            **self._steps,
        }
        return recipe_config(translation.recipe, settings)

    def _generators(self, row: TableRow, tokenizers: Sequence[Cell]) -> list[Cell]:
        """A row's generators, each over the tokenizer of its seed."""
        preset, size = self.preset, tokenizers[0].config.tokenizer.quantizer.codebook_size
        config = self._generator_config(row, size)
        generator = config.generator
        measure = EvaluationRequest(
            samples_per_class=preset.samples_per_class,
            card=Path(row.generator).name if preset.published_cards else "",
            reference=preset.reference,
            generation_metrics=preset.generation_metrics,
            extractor=preset.extractor,
            recognised=preset.recognised,
        )
        shape = {"depth": generator.depth, "width": generator.width, "num_heads": generator.num_heads}
        cells = []
        for below in tokenizers:
            seed, labels = below.labels["seed"], {**below.labels, **shape}
            stem = f"generator{generator.depth}-over-{below.labels['method']}-K{size}-seed{seed}"
            seeded = replace(config, tokenizer=below.name, seed=seed)
            cells.append(_named(stem, Cell("", seeded, labels, below.name, measure)))
        return cells

    def _generator_config(self, row: TableRow, codebook_size: int) -> GeneratorTrainConfig:
        translation = self.preset.generators
        shared = {"generator.vocabulary_size": codebook_size, **self._steps}
        if translation is None:
            return recipe_config(row.generator, shared)
        paper = recipe_config(row.generator).generator
        depth = self._translated(translation.depths, "depths", paper.depth)
        settings = {
            "generator.depth": depth,
            "generator.width": translation.width_per_depth * depth,
            "generator.num_heads": depth,
            "generator.gate_scale": paper.gate_scale,
            "tokenizer_weights": self.preset.weights,
        }
        return recipe_config(translation.recipe, shared | settings)

    def _translated(self, translations: Mapping[int, int], axis: str, value: int) -> int:
        if value not in translations:
            raise ConfigError(
                f"preset {self.parameters.preset} does not say what {value:,} becomes: add it to its {axis} in "
                f"presets.yaml, which hold {', '.join(map(str, translations)) or 'nothing'}"
            )
        return translations[value]


def _named(stem: str, cell: Cell) -> Cell:
    """A cell whose name ends with its content, so that other settings never meet its folder."""
    return replace(cell, name=f"{stem}-{cell.key[:6]}")


def table_cells(grid: PaperTables, folder: Path) -> list[Cell]:
    """All runs, each once; tokenizers before the generators over them. They do not depend on the study's folder."""
    rows = [row for table in grid.tables.values() for row in table.values()]
    cells = {cell.name: cell for row in rows for cell in (*row.tokenizers, *row.generators)}
    # The longest of those that wait for others come first, so that no worker is left alone with one.
    return sorted(cells.values(), key=lambda cell: (bool(cell.needs), -cell.labels.get("depth", 0)))


def table_facts(grid: PaperTables) -> dict[str, Any]:
    """The preset's content counts, so that a folder never holds runs of two translations."""
    preset = content_hash({**asdict(grid.preset), "seeds": (), "workers": 0})
    return {"preset": grid.parameters.preset, "steps": grid.parameters.steps, "dial": preset}
