"""The link between the stages: where one tokenizer's tokens are uncertain, and what they cost a generator."""

import textwrap
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator

from ibqlab.base.measures import measure
from ibqlab.plots import style
from ibqlab.plots.printing import PAGE_WIDTH, fix_tick_size, styled_figure
from ibqlab.tokens.report import TokenReport

BASELINE_NAMES: dict[str, str] = {
    "uniform": "uniform, log₂ K",
    "unigram": "unigram",
    "position": "unigram by position",
    "left": "left neighbour",
    "upper": "upper neighbour",
    "mix": "neighbours mixed",
    "class": "unigram by class",
    "mix_class": "mixed, with class",
}
"""Names of `ibqlab.tokens.ngrams.BASELINES` on an axis."""
_BASELINE_MARKER = "8"
_ENTROPY = "entropy"


def token_link_table(report: TokenReport) -> pd.DataFrame:
    """The numbers behind `plot_token_link`.

    Args:
        report: of one tokenizer.
    Returns:
        One row per number drawn: name ("entropy", a baseline or a generator), kind ("entropy", "baseline" or
        "generator"), position (0 to T − 1 row by row, empty for the mean over all), row, column, bits.
    """
    means = report.table[["name", "kind"]].assign(bits=report.table["bits_per_token"])
    curves = [(_ENTROPY, "entropy", report.entropy.position), ("mix", "baseline", report.positions["mix"])]
    generators = report.table.query("kind == 'generator'")["name"]
    curves += [(name, "generator", report.positions[name]) for name in generators if name in report.positions]
    parts = []
    for name, kind, bits in curves:
        row, column = np.divmod(np.arange(len(bits)), report.grid[1])
        cells = {"position": np.arange(len(bits)), "row": row, "column": column}
        parts.append(pd.DataFrame({"name": name, "kind": kind, **cells, "bits": bits}))
    table = pd.concat([means, *parts], ignore_index=True)
    whole = ["position", "row", "column"]
    table[whole] = table[whole].astype("Int64")
    return table[["name", "kind", *whole, "bits"]]


def plot_token_link(report: TokenReport, title: str = "") -> Figure:
    """Three views of one tokenizer's tokens: where they are uncertain, what they cost, and where a generator pays.

    Above left: entropy at each place of the grid, or of each token of a row. Above right: bits per token under each
    baseline and generator, from log2 K down; a filled dot knows the class. Below: each generator's bits by position, in
    the order of generation, between the entropy there and the best that counting neighbours does; how far a generator
    falls below the entropy is what the tokens before told it. An entropy that is only a lower bound (too few images) is
    marked as one.

    Args:
        report: of `report_tokens`.
        title: the tokenizer's name.
    Returns:
        The figure; its numbers are `token_link_table(report)`.
    """
    table = token_link_table(report)
    rows = table[table["position"].isna()]
    looks, grey = _generator_looks(rows), style.REFERENCE_GREY
    above = 2.2 + 0.2 * max(0, len(rows) - 7)
    with styled_figure(PAGE_WIDTH, above + 2.3) as figure:
        upper, lower = figure.subfigures(2, 1, height_ratios=[above, 1.9])
        heat, dots = upper.subplots(1, 2, width_ratios=[1, 1.5])
        _draw_map(heat, report)
        _draw_costs(dots, report.table, looks)
        curves = lower.subplots()
        # The two curves that generators are held against.
        bound = " (lower bound)" if report.entropy.lower_bound else ""
        entropy = style.LineStyle(label=f"entropy{bound}", marker="", color=grey, line=style.REFERENCE_LINE)
        mix = style.LineStyle(label=BASELINE_NAMES["mix"], marker="", color=grey)
        _draw_positions(curves, table, looks | {_ENTROPY: entropy, "mix": mix})
        height, width = report.grid
        rows_of_ticks = MultipleLocator(width * -(-height // 8))
        curves.xaxis.set_major_locator(rows_of_ticks if height > 1 else MaxNLocator(8, integer=True))
        if title:
            figure.suptitle(style.text_label(title))
        style.add_caption(figure, textwrap.fill(_caption(report), 115))
    return figure


def _generator_looks(rows: pd.DataFrame) -> dict[str, style.LineStyle]:
    """Colour and marker of each generator, the same in both panels."""
    names = rows.query("kind == 'generator'")["name"]
    looks = {}
    for number, name in enumerate(names):
        color, marker = style.OTHER_LOOKS[number % len(style.OTHER_LOOKS)]
        looks[name] = style.LineStyle(label=name, color=color, marker=marker, open_marker=number % 2 == 0)
    return looks


def _draw_map(axes: Axes, report: TokenReport) -> None:
    bits = report.entropy.position
    row = report.grid[0] == 1
    shape = {"aspect": "auto"} if row else {}
    image = axes.imshow(bits.reshape(report.grid), cmap="viridis", vmin=0, vmax=max(1.0, bits.max()), **shape)
    axes.grid(visible=False)
    bound = "\n(bits, lower bound)" if report.entropy.lower_bound else " (bits)"
    axes.set_title(f"entropy of the token{bound}", fontsize=9)
    axes.set(xlabel="token" if row else "column of the grid", ylabel="" if row else "row of the grid")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    if row:
        axes.set_yticks([])
    scale = axes.figure.colorbar(image, ax=axes, shrink=0.8)
    fix_tick_size(scale.ax)
    fix_tick_size(axes)


def _draw_costs(axes: Axes, table: pd.DataFrame, looks: Mapping[str, style.LineStyle]) -> None:
    """One line per model, dearest baseline on top, with its number at the right."""
    names = list(table["name"])
    for row_number, (_, row) in enumerate(table.iterrows()):
        look = looks.get(row["name"], style.LineStyle(label="", color=style.REFERENCE_GREY, marker=_BASELINE_MARKER))
        axes.plot(
            row["bits_per_token"],
            row_number,
            color=look.color,
            marker=look.marker,
            markerfacecolor=look.color if row["given_class"] else "white",
            linestyle="",
            clip_on=False,
            zorder=3,
        )
        beside = {"xycoords": axes.get_yaxis_transform(), "va": "center"}
        style.add_note(axes, f"{row['bits_per_token']:.2f}", (1, row_number), (4, 0), **beside)
    axes.set_yticks(range(len(names)), [style.text_label(BASELINE_NAMES.get(name, name), 35) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.margins(x=0.05)
    axes.set_xlabel(f"{measure('bits_per_token').axis} (filled: class known)")
    axes.set_title("what a token costs", fontsize=9)
    fix_tick_size(axes)


def _draw_positions(axes: Axes, table: pd.DataFrame, looks: Mapping[str, style.LineStyle]) -> None:
    for number, (name, group) in enumerate(table[table["position"].notna()].groupby("name", sort=False)):
        look = looks[name]
        places = group["position"].to_numpy(dtype=int)
        # Generators often coincide: later lines are thinner, and their markers stand elsewhere.
        axes.plot(
            places,
            group["bits"],
            label=style.text_label(look.label, 29),
            linewidth=max(0.8, 2.4 - 0.3 * number) if look.marker else 1.2,
            markersize=4,
            markevery=(number * len(places) // 37 % max(1, len(places) // 6), max(1, len(places) // 6)),
            **look.look,
        )
    axes.set_xlabel("position of the token, row by row")
    axes.set_ylabel("bits")
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.margins(x=0.01)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    fix_tick_size(axes)


def _caption(report: TokenReport) -> str:
    facts = report.table.iloc[0]
    count = f"{report.grid[0]} × {report.grid[1]} tokens" if report.grid[0] > 1 else f"{report.grid[1]} tokens in a row"
    text = (
        f"{report.usage}; perplexity {facts['perplexity']:,.0f} codes; {report.entropy}; "
        f"bits on {facts['validation_images']:,} validation images of {count} for "
        f"{report.image_size[0]} × {report.image_size[1]} pixels"
    )
    # textwrap breaks at plain spaces only.
    return text.replace(" = ", "\u00a0=\u00a0").replace(" × ", "\u00a0×\u00a0").replace(" %", "\u00a0%")
