"""A study of the link between the stages: tokenizers of several codebook sizes, and a generator over each.

Each generator is trained twice, the second time over code numbers that a permutation gave anew. What a generator learns
about neighbouring numbers would show as a difference; one that embeds every code on its own has none to lose, one that
takes numbers apart into bits has.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ibqlab.base.checks import CODES, SEED, STEPS, STUDY_RUNS, require, require_at_most, require_between
from ibqlab.base.progress import tell, why_too_short
from ibqlab.config import content_hash, to_dict
from ibqlab.generating.token_statistics import describe_tokenizer, save_token_figure
from ibqlab.plots import plot_token_scaling, save_figure, token_scaling_table
from ibqlab.pretrained import load_tokenizer
from ibqlab.recipes.presets import find_preset
from ibqlab.runs import Run, runs_root
from ibqlab.runs.finding import output_folder, run_name
from ibqlab.tokens.report import TokenReport
from ibqlab.training import GeneratorTrainConfig, TrainConfig, recipe_config, train, train_generator

PERMUTATION = 1
"""Seed of the permutation of the code numbers."""
SMALL_GENERATOR = {"generator.width": 64, "generator.depth": 3, "generator.num_heads": 4}


@dataclass(frozen=True, kw_only=True)
class LinkParameters:
    """What the `parameters` cell of the notebook on the link between the stages may set."""

    preset: str = "laptop"
    """One of `preset_names("link")`."""
    codebook_sizes: tuple[int, ...] = (64, 256, 1024)
    """K of IBQ's tokenizers, each at least 2."""
    lookup_free_bits: int = 8
    """Bits of an LFQ tokenizer beside them, whose generator takes numbers apart into two halves; 0 for none."""
    steps: int = 0
    """Of every generator; 0: the preset's."""
    permute: bool = True
    """Train each generator once more over code numbers given anew."""
    seed: int = 0
    """Of all runs."""
    output: str = ""
    """Folder of all runs of this study: a name below the folder of all runs, or a path that starts with / ./ or ~;
    empty: named by preset and settings."""

    def __post_init__(self):
        find_preset(self.preset, "link")
        require_at_most("codebook_sizes (how many)", len(self.codebook_sizes), STUDY_RUNS)
        for size in self.codebook_sizes:
            require_between("codebook_sizes", size, 2, CODES)
        require_between("steps", self.steps, 0, STEPS)
        require_between("seed", self.seed, 0, SEED)
        require(
            len(set(self.codebook_sizes)) == len(self.codebook_sizes),
            f"codebook_sizes must be different numbers; got {list(self.codebook_sizes)}",
        )
        bits = self.lookup_free_bits
        require(bits == 0 or 2 <= bits <= 18, f"lookup_free_bits must be 0, or 2 to 18; got {bits}")
        require(len(self.codebook_sizes) > 0 or bits > 0, "a study needs at least one tokenizer; got none")


@dataclass(frozen=True, kw_only=True)
class LinkCell:
    """One tokenizer and the generators over it, trained or not."""

    name: str
    """For tables: "IBQ, K = 256"."""
    folder: str
    """Below the folder of all runs."""
    tokenizer: TrainConfig
    """Its settings."""
    generators: dict[str, GeneratorTrainConfig]
    """"generator", and "permuted" where codes are numbered anew."""

    def train(self) -> None:
        """Whatever is not trained yet."""
        train(self.tokenizer, runs_root() / self.folder / "tokenizer")
        for name, config in self.generators.items():
            train_generator(config, runs_root() / self.folder / name)

    def describe(self) -> TokenReport:
        """Counted and learned costs of the tokens; needs all runs."""
        place = runs_root() / self.folder
        tokenizer = load_tokenizer(place / "tokenizer", "raw")
        first = next(iter(self.generators.values()))
        return describe_tokenizer(
            tokenizer,
            first.data,
            validation_images=first.record.validation_images,
            generators={name: Run(place / name) for name in self.generators},
        )


class LinkStudy:
    """All tokenizers of a study, in the order of their tables.

    Args:
        parameters: what to compare.
    Raises:
        RunError: the folder holds runs with other settings.
    """

    def __init__(self, parameters: LinkParameters) -> None:
        name = f"link_stages-{parameters.preset}-{content_hash(to_dict(parameters))}"
        self.folder = run_name(output_folder(parameters.output, default=name))
        self.parameters = parameters
        self.cells = list(_cells(parameters, self.folder))
        for cell in self.cells:
            for name, config in {"tokenizer": cell.tokenizer, **cell.generators}.items():
                Run.check(runs_root() / cell.folder / name, config)

    def train(self) -> None:
        """Whatever is not trained yet; a killed study goes on where it stopped."""
        self._tell()
        for number, cell in enumerate(self.cells, start=1):
            print(f"{number} of {len(self.cells)}: {cell.name}")
            cell.train()
        self._tell()

    def _tell(self, result: str = "") -> None:
        tell(folder=str((runs_root() / self.folder).resolve()), result=result)

    @cached_property
    def reports(self) -> dict[str, TokenReport]:
        """Tokenizer's name → what its tokens cost."""
        return {cell.name: cell.describe() for cell in self.cells}

    def figures(self) -> Iterator[Figure]:
        """One figure per tokenizer, with its table beside it, saved as `token_link_…` into the study's folder."""
        for cell in self.cells:
            yield save_token_figure(self.reports[cell.name], self._figure(Path(cell.folder).name), cell.name)

    def figure_scaling(self) -> Figure:
        """Bits against codebook size and usage, saved as `token_scaling`."""
        table = self.table()
        self._tell(describe_costs(table, self.parameters.preset))
        figure = plot_token_scaling(table)
        save_figure(figure, runs_root() / self.folder / "figures" / "token_scaling", table)
        return figure

    def table(self) -> pd.DataFrame:
        """The rows behind `figure_scaling`."""
        return token_scaling_table(self.reports)

    def permutation_table(self) -> pd.DataFrame:
        """What numbering the codes anew costs.

        Returns:
            One row per tokenizer: tokenizer, codebook_size, bits (per token, class given), permuted_bits, difference.
        """
        table = self.table().query("kind == 'generator' and given_class")
        rows = []
        for name, part in table.groupby("tokenizer", sort=False):
            bits = part.set_index("permuted")["bits_per_token"]
            if set(bits.index) == {False, True}:
                row = {"tokenizer": name, "codebook_size": int(part["codebook_size"].iloc[0]), "bits": bits[False]}
                rows.append(row | {"permuted_bits": bits[True], "difference": bits[True] - bits[False]})
        return pd.DataFrame(rows)

    def _figure(self, name: str) -> Path:
        return runs_root() / self.folder / "figures" / f"token_link_{name}"


def describe_costs(table: pd.DataFrame, preset: str) -> str:
    """What a token costs each generator that knows the class, in a sentence.

    Args:
        table: of `LinkStudy.table`.
        preset: of the notebook.
    """
    learned = table.query("kind == 'generator' and given_class and not permuted")
    costs = zip(learned["tokenizer"], learned["bits_per_token"], strict=True)
    reason = why_too_short(None, preset)
    shown = "; ".join(f"{name}: {bits:.2f}" for name, bits in costs)
    return f"bits per token, class given: {shown}" + (f" ({reason}: too short to mean anything)" if reason else "")


def _cells(parameters: LinkParameters, folder: str) -> Iterator[LinkCell]:
    for size in parameters.codebook_sizes:
        quantizer = {"tokenizer.quantizer.codebook_size": size}
        yield _cell(parameters, f"IBQ, K = {size:,}", f"{folder}/ibq-{size}", quantizer)
    bits = parameters.lookup_free_bits
    if bits:
        settings = {"tokenizer.quantizer": {"name": "lfq", "codebook_size": 2**bits, "code_dim": bits}}
        yield _cell(parameters, f"LFQ, K = {2**bits:,}", f"{folder}/lfq-{2**bits}", settings)


def _cell(parameters: LinkParameters, name: str, folder: str, quantizer: dict[str, Any]) -> LinkCell:
    first, second = find_preset(parameters.preset, "link")
    tokenizer = recipe_config(first, {**quantizer, "seed": parameters.seed})
    settings = {"tokenizer": f"{folder}/tokenizer", "seed": parameters.seed}
    settings |= {"steps": parameters.steps} if parameters.steps else {}
    settings |= _generator_settings(second, tokenizer.tokenizer.quantizer)
    orders = {"generator": -1} | ({"permuted": PERMUTATION} if parameters.permute else {})
    generators = {
        kind: recipe_config(second, {**settings, "index_permutation": order}) for kind, order in orders.items()
    }
    return LinkCell(name=name, folder=folder, tokenizer=tokenizer, generators=generators)


def _generator_settings(recipe: str, quantizer: Any) -> dict[str, Any]:
    """A small generator over a tokenizer's codes: IBQ's, or for LFQ Open-MAGVIT2's with bits in two halves."""
    plain = recipe_config(recipe, SMALL_GENERATOR)
    if quantizer.config_name != "lfq":
        return {**SMALL_GENERATOR, "generator.vocabulary_size": quantizer.codebook_size}
    given, bits = to_dict(plain.generator), quantizer.code_dim
    shared = {
        key: value for key, value in given.items() if key not in ("name", "vocabulary_size", "depth", "gate_scale")
    }
    half = bits // 2
    # One block along the parts of a token, and one less along the image.
    depths = {"spatial_depth": max(1, given["depth"] - 1), "factorized_depth": 1}
    return {"generator": {"name": "magvit2", "bits": [half, bits - half], **depths, **shared}}
