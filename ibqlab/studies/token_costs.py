"""What tokens cost the generator: tokenizers of several codebook sizes, and a generator over each.

Each generator is trained twice, the second time over code numbers that were permuted. What a generator learns about
neighbouring numbers shows as a difference. One that embeds every code on its own has none to lose; one that takes
numbers apart into bits has.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ibqlab.base.checks import CODES, SEED, STUDY_RUNS, require, require_at_most, require_between
from ibqlab.base.escaping import for_markdown
from ibqlab.base.progress import tell
from ibqlab.config import content_hash, to_dict
from ibqlab.generating.token_statistics import describe_tokenizer, save_token_figure
from ibqlab.grids.cells import Cell, codebook_labels
from ibqlab.plots import plot_token_scaling, token_scaling_table
from ibqlab.pretrained import load_tokenizer
from ibqlab.recipes.presets import find_preset
from ibqlab.runs import Run
from ibqlab.runs.caveats import why_too_short
from ibqlab.runs.finding import run_name
from ibqlab.studies.figures import save_study_figure
from ibqlab.studies.pages import TOO_SHORT, join_parts, picture, to_markdown
from ibqlab.studies.study import SharedParameters, Study, StudyDefinition
from ibqlab.tokens.report import TokenReport
from ibqlab.training import recipe_config

PERMUTATION = 1
"""Seed of the permutation of the code numbers."""
SMALL_GENERATOR = {"generator.width": 64, "generator.depth": 3, "generator.num_heads": 4}


@dataclass(frozen=True, kw_only=True)
class LinkParameters(SharedParameters):
    """What the `parameters` cell of the notebook on the link between the stages may set."""

    codebook_sizes: tuple[int, ...] = (64, 256, 1024)
    """K of IBQ's tokenizers, each at least 2."""
    lookup_free_bits: int = 8
    """Bits of an LFQ tokenizer beside them, whose generator takes numbers apart into two halves; 0 for none."""
    permute: bool = True
    """Train each generator once more over permuted code numbers."""
    seed: int = 0
    """Of all runs."""
    workers: int = 2
    """Runs at a time. A generator waits for its tokenizer."""
    retry: bool = True
    """The notebook has no parameter for it, so that what failed is tried again."""

    def __post_init__(self):
        super().__post_init__()
        find_preset(self.preset, "link")
        require_at_most("codebook_sizes (how many)", len(self.codebook_sizes), STUDY_RUNS)
        for size in self.codebook_sizes:
            require_between("codebook_sizes", size, 2, CODES)
        require_between("seed", self.seed, 0, SEED)
        require(
            len(set(self.codebook_sizes)) == len(self.codebook_sizes),
            f"codebook_sizes must be different numbers; got {list(self.codebook_sizes)}",
        )
        bits = self.lookup_free_bits
        require(bits == 0 or 2 <= bits <= 18, f"lookup_free_bits must be 0, or 2 to 18; got {bits}")
        require(len(self.codebook_sizes) > 0 or bits > 0, "a study needs at least one tokenizer; got none")


def _folder_name(name: str, parameters: LinkParameters) -> str:
    """Named by what is compared, so that other sizes have a folder of their own."""
    compared = ("preset", "codebook_sizes", "lookup_free_bits", "steps", "permute", "seed", "output")
    values = to_dict(parameters)
    return f"{name}-{parameters.preset}-{content_hash({key: values[key] for key in compared})}"


def _cells(parameters: LinkParameters, folder: Path) -> Iterator[Cell]:
    """Per tokenizer three runs: tokenizer, generator, and the generator over permuted codes."""
    quantizers = {f"ibq-{size}": {"tokenizer.quantizer.codebook_size": size} for size in parameters.codebook_sizes}
    bits = parameters.lookup_free_bits
    if bits:
        quantizers[f"lfq-{2**bits}"] = {
            "tokenizer.quantizer": {"name": "lfq", "codebook_size": 2**bits, "code_dim": bits}
        }
    first, second = find_preset(parameters.preset, "link")
    for stem, settings in quantizers.items():
        config = recipe_config(first, {**settings, "seed": parameters.seed})
        quantizer = config.tokenizer.quantizer
        labels = codebook_labels(quantizer) | {"seed": parameters.seed}
        tokenizer = Cell(f"{stem}/tokenizer", config, labels)
        yield tokenizer
        orders = {"generator": -1} | ({"permuted": PERMUTATION} if parameters.permute else {})
        for kind, order in orders.items():
            shared = {"seed": parameters.seed, "index_permutation": order}
            shared |= {"steps": parameters.steps} if parameters.steps else {}
            shared |= {"tokenizer": _tokenizer_of(folder / stem / kind, tokenizer.name, folder)}
            generator = recipe_config(second, shared | _generator_settings(second, quantizer))
            yield Cell(f"{stem}/{kind}", generator, {**labels, "permutation": order}, needs=tokenizer.name)


def _tokenizer_of(run: Path, name: str, folder: Path) -> str:
    """What a generator calls its tokenizer: by its name in the study's folder. Runs of earlier versions, which are
    resumed as they are, call it by its name in the folder of all runs."""
    earlier = f"{run_name(folder)}/{name}"
    is_earlier = (run / "config.yaml").is_file() and Run(run).config.get("tokenizer") == earlier
    return earlier if is_earlier else name


def _generator_settings(recipe: str, quantizer: Any) -> dict[str, Any]:
    """A small generator over a tokenizer's codes: IBQ's, or for LFQ Open-MAGVIT2's with bits in two halves."""
    if quantizer.config_name != "lfq":
        return {**SMALL_GENERATOR, "generator.vocabulary_size": quantizer.codebook_size}
    plain = to_dict(recipe_config(recipe, SMALL_GENERATOR).generator)
    shared = {
        key: value for key, value in plain.items() if key not in ("name", "vocabulary_size", "depth", "gate_scale")
    }
    bits, half = quantizer.code_dim, quantizer.code_dim // 2
    # One block along the parts of a token, and one less along the image.
    depths = {"spatial_depth": max(1, plain["depth"] - 1), "factorized_depth": 1}
    return {"generator": {"name": "magvit2", "bits": [half, bits - half], **depths, **shared}}


def token_reports(study: Study) -> dict[str, TokenReport]:
    """What the tokens of each tokenizer cost, by the tokenizer's name, such as "IBQ, K = 256".

    Args:
        study: tokenizers with a run that is not finished are left out.
    Raises:
        StudyError: no tokenizer has all its runs.
    Cost: encodes some thousand images per tokenizer.
    """
    finished = {cell.name: run for cell, run in study.finished()}
    reports = {}
    for tokenizer in (cell for cell in study.cells if not cell.needs):
        generators = {cell.name: cell for cell in study.cells if cell.needs == tokenizer.name}
        if not {tokenizer.name, *generators} <= finished.keys():
            continue
        settings = next(iter(generators.values())).config
        reports[_title(tokenizer)] = describe_tokenizer(
            load_tokenizer(study.folder / tokenizer.name, "raw"),
            settings.data,
            validation_images=settings.record.validation_images,
            generators={Path(name).name: finished[name] for name in generators},
        )
    if not reports:
        raise study.nothing_finished()
    return reports


def _title(cell: Cell) -> str:
    return f"{cell.labels['method'].upper()}, K = {cell.labels['codebook_size']:,}"


def figure_tokens(study: Study, reports: Mapping[str, TokenReport], tokenizer: str) -> Figure:
    """Where the tokens of one tokenizer, a key of `token_reports`, are uncertain and what they cost; saved as
    `token_link_…` with its table beside it."""
    return save_token_figure(reports[tokenizer], study.folder / "figures" / _figure_name(study, tokenizer), tokenizer)


def _figure_name(study: Study, tokenizer: str) -> str:
    names = {_title(cell): Path(cell.name).parent.name for cell in study.cells}
    return f"token_link_{names[tokenizer]}"


def figure_token_scaling(study: Study, reports: Mapping[str, TokenReport]) -> Figure:
    """Bits against codebook size and usage, of the reports of `token_reports`; saved as `token_scaling`."""
    table = token_scaling_table(reports)
    tell(result=describe_costs(table, study.parameters.preset))
    return save_study_figure(study, "token_scaling", plot_token_scaling(table), table)


def permutation_table(table: pd.DataFrame) -> pd.DataFrame:
    """What permuting the code numbers costs.

    Args:
        table: of `ibqlab.plots.token_scaling_table`.
    Returns:
        One row per tokenizer: tokenizer, codebook_size, bits (per token, class given), permuted_bits, difference.
    """
    generators = table.query("kind == 'generator' and given_class")
    lines = []
    for name, rows in generators.groupby("tokenizer", sort=False):
        bits = rows.set_index("permuted")["bits_per_token"]
        if set(bits.index) == {False, True}:
            line = {"tokenizer": name, "codebook_size": int(rows["codebook_size"].iloc[0]), "bits": bits[False]}
            lines.append(line | {"permuted_bits": bits[True], "difference": bits[True] - bits[False]})
    return pd.DataFrame(lines)


def describe_costs(table: pd.DataFrame, preset: str) -> str:
    """What a token costs each generator that knows the class, in a sentence.

    Args:
        table: of `ibqlab.plots.token_scaling_table`.
        preset: of the notebook.
    """
    learned = table.query("kind == 'generator' and given_class and not permuted")
    costs = zip(learned["tokenizer"], learned["bits_per_token"], strict=True)
    reason = why_too_short(None, preset)
    values = "; ".join(f"{name}: {bits:.2f}" for name, bits in costs)
    return f"bits per token, class given: {values}" + (f" ({reason}: too short to mean anything)" if reason else "")


def _report(study: Study, redraw: bool) -> str:
    reports = token_reports(study)
    table = token_scaling_table(reports)
    permuted, title = permutation_table(table), "Bits against codebook size and usage"
    return join_parts(
        f"# What a tokenizer's tokens cost the generator, {for_markdown(study.folder.name)}",
        f"{len(study.finished())} of {len(study.cells)} runs finished; {describe_costs(table, '')}.",
        TOO_SHORT if study.too_short else "",
        picture(study.folder, "token_scaling", title, partial(figure_token_scaling, study, reports), redraw),
        to_markdown(table),
        *(["## Does a code's number matter?", to_markdown(permuted)] if len(permuted) else []),
        "## Tokenizer by tokenizer",
        *(
            picture(study.folder, _figure_name(study, name), name, partial(figure_tokens, study, reports, name), redraw)
            for name in reports
        ),
    )


LINK_STAGES = StudyDefinition(
    name="link_stages",
    parameters=LinkParameters,
    grid=lambda parameters: parameters,
    cells=_cells,
    facts=lambda parameters: {key: getattr(parameters, key) for key in ("preset", "steps", "seed")},
    report=_report,
    folder_name=_folder_name,
)
