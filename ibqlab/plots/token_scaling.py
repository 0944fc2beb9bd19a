"""What the tokens of several tokenizers cost a generator, against codebook size and usage."""

import textwrap
from collections.abc import Mapping
from dataclasses import replace
from string import ascii_uppercase

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFTBASE, CARETRIGHTBASE
from matplotlib.transforms import ScaledTranslation

from ibqlab.base.measures import measure
from ibqlab.plots import style
from ibqlab.plots.printing import PAGE_WIDTH, fix_tick_size, styled_figure
from ibqlab.plots.scaling import finish_sizes
from ibqlab.plots.token_link import BASELINE_NAMES
from ibqlab.tokens.report import TokenReport

SCALED = ("unigram", "mix")
"""Baselines that stand for a tokenizer beside others."""
_MODELS: dict[str, str | int] = {
    "unigram": "_",
    BASELINE_NAMES["mix"]: "x",
    "generator": CARETLEFTBASE,
    "generator, class known": CARETRIGHTBASE,
}
"""Markers that are no method's. The generators' two stand back to back, so that neither hides the other, and have an
inside, which tells how the codes are numbered."""
_DODGE = 0.75
"""Octaves of codebook size over which tokenizers of one size are spread."""
_PERMUTED = 13
"""Points that codes numbered anew stand to the right."""
_COLUMNS = [
    *("tokenizer", "name", "kind", "given_class", "permuted", "bits_per_token", "bits_per_pixel"),
    *("codebook_size", "usage", "usage_tokens", "validation_images"),
]


def token_scaling_table(reports: Mapping[str, TokenReport]) -> pd.DataFrame:
    """The numbers behind `plot_token_scaling`: "unigram", "mix" and the generators of each tokenizer.

    Args:
        reports: tokenizer's name → its report.
    Returns:
        One row per tokenizer and model: tokenizer, then the columns of `TokenReport.table`.
    Raises:
        ValueError: no report.
    """
    if not reports:
        raise ValueError("reports must hold at least one tokenizer; got none")
    parts = [report.table.assign(tokenizer=name) for name, report in reports.items()]
    table = pd.concat(parts, ignore_index=True)
    table = table[table["name"].isin(SCALED) | (table["kind"] == "generator")]
    return table[["tokenizer", *parts[0].columns.drop("tokenizer")]].reset_index(drop=True)


def plot_token_scaling(table: pd.DataFrame) -> Figure:
    """Several tokenizers: bits per token and per pixel against codebook size and against usage.

    Colour and letter: tokenizer. Marker: model. Filled: codes numbered as the tokenizer numbers them; open, to the
    right of it: numbered anew, which only a generator can notice. Dotted steps: log2 K. Fewer bits are a gain only at
    the same reconstruction.

    Args:
        table: of `token_scaling_table`, up to 26 tokenizers.
    Returns:
        The figure.
    Raises:
        ValueError: a missing column, or no row.
    """
    style.require_columns(table, _COLUMNS, "a table of token scaling")
    table = table.assign(model=_model_names(table), place=_dodged_sizes(table))
    looks = _distinct_looks(list(table["tokenizer"].unique()))
    with styled_figure(PAGE_WIDTH, 6.0) as figure:
        grid = figure.subplots(2, 2, sharex="col", sharey="row")
        for axes, unit in zip(grid, ("bits_per_token", "bits_per_pixel"), strict=True):
            for panel, across in zip(axes, ("place", "usage"), strict=True):
                _draw(panel, table, across, unit, looks)
            axes[0].set_ylabel(measure(unit).axis)
        # log2 K as a step at each size, as wide as its tokenizers stand apart.
        sizes, half = table["codebook_size"].unique(), 2 ** (0.6 * _DODGE)
        grid[0, 0].hlines(np.log2(sizes), sizes / half, sizes * half, linewidth=1, **style.REFERENCE)
        for axes in grid[:, 0]:
            axes.set_ylim(bottom=0)
        # The lower panels carry the axes of their columns.
        finish_sizes(grid[1, 0], table["codebook_size"])
        grid[1, 1].set_xlabel(f"{measure('usage').label} (% of K)")
        fix_tick_size(grid[1, 1])
        figure.legend(handles=_legend(table, looks), loc="outside upper center", ncols=3)
        style.add_caption(figure, _caption(table))
    return figure


def _distinct_looks(tokenizers: list[str]) -> dict[str, style.LineStyle]:
    """A colour for each tokenizer: its method's, or another where an earlier tokenizer of that method has it."""
    looks = style.styles_for(tokenizers)
    spare = [color for color in style.PALETTE if color not in {look.color for look in looks.values()}]
    colors: set[str] = set()
    for name, look in looks.items():
        if look.color in colors and spare:
            looks[name] = replace(look, color=spare.pop(0))
        colors.add(looks[name].color)
    return looks


def _model_names(table: pd.DataFrame) -> list[str]:
    """Which of the four kinds of model each row is."""
    generators = {False: "generator", True: "generator, class known"}
    return [
        generators[bool(row.given_class)] if row.kind == "generator" else BASELINE_NAMES[row.name]
        for row in table.itertuples(index=False)
    ]


def _dodged_sizes(table: pd.DataFrame) -> list[float]:
    """Codebook sizes, those of several tokenizers moved apart so that their points do not hide each other."""
    sizes = table.drop_duplicates("tokenizer").set_index("tokenizer")["codebook_size"]
    positions = {}
    for size, group in sizes.groupby(sizes):
        for number, name in enumerate(group.index):
            positions[name] = size * 2 ** (_DODGE * (number / max(1, len(group) - 1) - 0.5 * (len(group) > 1)))
    return [positions[name] for name in table["tokenizer"]]


def _draw(axes: Axes, table: pd.DataFrame, across: str, unit: str, looks: Mapping[str, style.LineStyle]) -> None:
    """The points of one panel, and each tokenizer's letter below its lowest, away from the line of log2 K."""
    right = ScaledTranslation(_PERMUTED / 72, 0, axes.figure.dpi_scale_trans)
    for letter, (name, group) in zip(ascii_uppercase, table.groupby("tokenizer", sort=False), strict=False):
        color = looks[name].color
        scale = measure("usage").scale if across == "usage" else 1
        for _, row in group.iterrows():
            axes.plot(
                row[across] * scale,
                row[unit],
                marker=_MODELS[row["model"]],
                color=color,
                markerfacecolor="white" if row["permuted"] else color,
                transform=axes.transData + right if row["permuted"] else axes.transData,
                linestyle="",
                markersize=5,
            )
        lowest = (group[across].iloc[0] * scale, group[unit].min())
        style.add_note(axes, letter, lowest, (0, -12), ha="center", color=color)
    axes.margins(0.12)


def _legend(table: pd.DataFrame, looks: Mapping[str, style.LineStyle]) -> list[Line2D]:
    """Tokenizers by letter and colour, models by marker, numbering by filling."""
    entries = [
        Line2D([], [], color=look.color, linewidth=4, label=textwrap.fill(f"{letter}  {look.label}", 24))
        for letter, look in zip(ascii_uppercase, looks.values(), strict=False)
    ]
    entries.append(Line2D([], [], linewidth=1, label=BASELINE_NAMES["uniform"], **style.REFERENCE))
    plain = {"color": style.REFERENCE_GREY, "linestyle": "", "markersize": 5}
    models = [name for name in _MODELS if name in set(table["model"])]
    entries += [Line2D([], [], marker=_MODELS[name], label=name, **plain) for name in models]
    if table["permuted"].any():
        plain |= {"markerfacecolor": "white", "label": "open: codes numbered anew"}
        entries.append(Line2D([], [], marker=CARETLEFTBASE, **plain))
    return entries


def _caption(table: pd.DataFrame) -> str:
    fewest = (table["usage_tokens"] / table["codebook_size"]).min()
    images = style.number_range(table["validation_images"])
    text = f"usage in at least {style.at_least(fewest)} training tokens per code; bits on {images} validation images"
    several = table.drop_duplicates("tokenizer")["codebook_size"].duplicated().any()
    return f"{text}; tokenizers of one K stand beside each other" if several else text
