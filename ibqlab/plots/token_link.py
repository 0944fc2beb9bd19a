"""The link between the stages: what a tokenizer's tokens cost a generator."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFTBASE, CARETRIGHTBASE
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, MultipleLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from ibqlab.plots.style import (
    OTHER_LOOKS,
    PAGE_WIDTH,
    PALETTE,
    REFERENCE_GREY,
    REFERENCE_LINE,
    LineStyle,
    add_caption,
    at_least,
    fix_tick_size,
    styled_figure,
    styles_for,
    text_label,
)
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
"""Names of `ibqlab.diagnostics.BASELINES` on an axis."""
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
_BASELINE_MARKER = "8"
_DODGE = 0.75
"""Octaves of codebook size over which tokenizers of one size are spread."""
_PERMUTED = 13
"""Points that codes numbered anew stand to the right."""
_ENTROPY = "entropy"
_SCALING_COLUMNS = [
    *("tokenizer", "name", "kind", "given_class", "permuted", "bits_per_token", "bits_per_pixel"),
    *("codebook_size", "usage", "usage_tokens", "validation_images"),
]


def token_link_table(report: TokenReport) -> pd.DataFrame:
    """The numbers behind `plot_token_link`.

    Args:
        report: of one tokenizer.
    Returns:
        One row per number drawn: name ("entropy", a baseline or a generator), kind ("entropy", "baseline" or
        "generator"), position (0 to T − 1 row by row, empty for the mean over all), row, column, bits.
    """
    parts = [_by_position(_ENTROPY, "entropy", report.entropy.position, report)]
    means = report.table[["name", "kind"]].assign(bits=report.table["bits_per_token"])
    generators = report.table.query("kind == 'generator'")["name"]
    parts.append(_by_position("mix", "baseline", report.positions["mix"], report))
    parts += [
        _by_position(name, "generator", report.positions[name], report)
        for name in generators
        if name in report.positions
    ]
    table = pd.concat([means, *parts], ignore_index=True)
    whole = ["position", "row", "column"]
    table[whole] = table[whole].astype("Int64")
    return table[["name", "kind", *whole, "bits"]]


def plot_token_link(report: TokenReport, title: str = "") -> Figure:
    """Three views of one tokenizer's tokens: where they are uncertain, what they cost, and where a generator pays.

    Above left: entropy at each place of the grid. Above right: bits per token under each baseline and generator, from
    log2 K down; a filled dot knows the class. Below: each generator's bits by position, in the order of generation,
    between the entropy there and the best that counting neighbours does; how far a generator falls below the entropy
    is what the tokens before told it. An entropy that is only a lower bound (too few images) is marked as one.

    Args:
        report: of `report_tokens`.
        title: the tokenizer's name.
    Returns:
        The figure; its numbers are `token_link_table(report)`.
    """
    table = token_link_table(report)
    rows = table[table["position"].isna()]
    looks = _generator_looks(rows)
    above = 2.2 + 0.2 * max(0, len(rows) - 7)
    with styled_figure(PAGE_WIDTH, above + 2.3) as figure:
        upper, lower = figure.subfigures(2, 1, height_ratios=[above, 1.9])
        heat, dots = upper.subplots(1, 2, width_ratios=[1, 1.5])
        _draw_map(heat, report)
        _draw_costs(dots, report.table, looks)
        curves = lower.subplots()
        _draw_positions(curves, table, looks | _curve_looks(report))
        height, width = report.grid
        curves.xaxis.set_major_locator(MultipleLocator(width * -(-height // 8)))
        if title:
            figure.suptitle(text_label(title))
        add_caption(figure, textwrap.fill(_caption(report), 115))
    return figure


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
    missing = [column for column in _SCALING_COLUMNS if column not in table]
    if missing or table.empty:
        raise ValueError(f"token scaling needs rows with the columns {_SCALING_COLUMNS}; missing: {missing or 'all'}")
    table = table.assign(model=_model_names(table), place=_dodged_sizes(table))
    looks = _distinct_looks(list(table["tokenizer"].unique()))
    with styled_figure(PAGE_WIDTH, 6.0) as figure:
        grid = figure.subplots(2, 2, sharex="col", sharey="row")
        for axes, unit in zip(grid, ("bits_per_token", "bits_per_pixel"), strict=True):
            for panel, across in zip(axes, ("place", "usage"), strict=True):
                _draw_scaling(panel, table, across, unit, looks)
            axes[0].set_ylabel(unit.replace("_", " "))
        _draw_limit(grid[0, 0], table)
        for axes in grid[:, 0]:
            axes.set_ylim(bottom=0)
        _finish_scaling(grid[1], table)
        figure.legend(handles=_scaling_legend(table, looks), loc="outside upper center", ncols=3)
        add_caption(figure, _scaling_caption(table))
    return figure


def _by_position(name: str, kind: str, bits: np.ndarray, report: TokenReport) -> pd.DataFrame:
    place = np.arange(len(bits))
    width = report.grid[1]
    return pd.DataFrame(
        {"name": name, "kind": kind, "position": place, "row": place // width, "column": place % width, "bits": bits}
    )


def _generator_looks(rows: pd.DataFrame) -> dict[str, LineStyle]:
    """Colour and marker of each generator, the same in both panels."""
    names = rows.query("kind == 'generator'")["name"]
    looks = {}
    for number, name in enumerate(names):
        color, marker = OTHER_LOOKS[number % len(OTHER_LOOKS)]
        looks[name] = LineStyle(label=name, color=color, marker=marker, open_marker=number % 2 == 0)
    return looks


def _curve_looks(report: TokenReport) -> dict[str, LineStyle]:
    """How the two curves look that generators are held against."""
    bound = " (lower bound)" if report.entropy.lower_bound else ""
    return {
        _ENTROPY: LineStyle(label=f"entropy{bound}", color=REFERENCE_GREY, marker="", line=REFERENCE_LINE),
        "mix": LineStyle(label=BASELINE_NAMES["mix"], color=REFERENCE_GREY, marker=""),
    }


def _draw_map(axes: Axes, report: TokenReport) -> None:
    bits = report.entropy.position
    shown = axes.imshow(bits.reshape(report.grid), cmap="viridis", vmin=0, vmax=max(1.0, bits.max()))
    axes.grid(visible=False)
    bound = "\n(bits, lower bound)" if report.entropy.lower_bound else " (bits)"
    axes.set_title(f"entropy of the token{bound}", fontsize=9)
    axes.set_xlabel("column of the grid")
    axes.set_ylabel("row of the grid")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    scale = axes.figure.colorbar(shown, ax=axes, shrink=0.8)
    fix_tick_size(scale.ax)
    fix_tick_size(axes)


def _draw_costs(axes: Axes, table: pd.DataFrame, looks: Mapping[str, LineStyle]) -> None:
    """One line per model, dearest baseline on top, with its number at the right."""
    names = list(table["name"])
    for place, (_, row) in enumerate(table.iterrows()):
        look = looks.get(row["name"], LineStyle(label="", color=REFERENCE_GREY, marker=_BASELINE_MARKER))
        axes.plot(
            row["bits_per_token"],
            place,
            color=look.color,
            marker=look.marker,
            markerfacecolor=look.color if row["given_class"] else "white",
            linestyle="",
            clip_on=False,
            zorder=3,
        )
        axes.annotate(
            f"{row['bits_per_token']:.2f}",
            (1, place),
            xycoords=axes.get_yaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(names)), [text_label(_short(BASELINE_NAMES.get(name, name), 36)) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.margins(x=0.05)
    axes.set_xlabel("bits per token (filled: class known)")
    axes.set_title("what a token costs", fontsize=9)
    fix_tick_size(axes)


def _draw_positions(axes: Axes, table: pd.DataFrame, looks: Mapping[str, LineStyle]) -> None:
    for number, (name, group) in enumerate(table[table["position"].notna()].groupby("name", sort=False)):
        look = looks[name]
        places = group["position"].to_numpy(dtype=int)
        # Generators often coincide: later lines are thinner, and their markers stand elsewhere.
        axes.plot(
            places,
            group["bits"],
            label=text_label(_short(look.label, 30)),
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


def _distinct_looks(tokenizers: list[str]) -> dict[str, LineStyle]:
    """A colour for each tokenizer: its method's, or another where an earlier tokenizer of that method has it."""
    looks = styles_for(tokenizers)
    spare = [color for color in PALETTE if color not in {look.color for look in looks.values()}]
    taken: set[str] = set()
    for name, look in looks.items():
        if look.color in taken and spare:
            looks[name] = replace(look, color=spare.pop(0))
        taken.add(looks[name].color)
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
    place = {}
    for size, group in sizes.groupby(sizes):
        for number, name in enumerate(group.index):
            place[name] = size * 2 ** (_DODGE * (number / max(1, len(group) - 1) - 0.5 * (len(group) > 1)))
    return [place[name] for name in table["tokenizer"]]


def _draw_scaling(axes: Axes, table: pd.DataFrame, across: str, unit: str, looks: Mapping[str, LineStyle]) -> None:
    """The points of one panel, and each tokenizer's letter below its lowest, away from the line of log2 K."""
    right = ScaledTranslation(_PERMUTED / 72, 0, axes.figure.dpi_scale_trans)
    for letter, (name, group) in zip(ascii_uppercase, table.groupby("tokenizer", sort=False), strict=False):
        color = looks[name].color
        scale = 100 if across == "usage" else 1
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
        axes.annotate(
            letter,
            (group[across].iloc[0] * scale, group[unit].min()),
            xytext=(0, -12),
            textcoords="offset points",
            ha="center",
            color=color,
            fontsize=8,
        )
    axes.margins(0.12)


def _draw_limit(axes: Axes, table: pd.DataFrame) -> None:
    """log2 K as a step at each size, as wide as its tokenizers stand apart."""
    sizes, half = table["codebook_size"].unique(), 2 ** (0.6 * _DODGE)
    look = {"color": REFERENCE_GREY, "linestyle": REFERENCE_LINE, "linewidth": 1}
    axes.hlines(np.log2(sizes), sizes / half, sizes * half, **look)


def _finish_scaling(row: Sequence[Axes], table: pd.DataFrame) -> None:
    """The lower panels carry the axes of their columns."""
    sizes, usage = row
    sizes.set_xscale("log", base=2)
    sizes.xaxis.set_major_locator(FixedLocator(sorted(table["codebook_size"].unique())))
    sizes.xaxis.set_minor_locator(NullLocator())
    sizes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    sizes.set_xlabel("codebook size K (codes, log scale)")
    usage.set_xlabel("codes hit (% of K)")
    for axes in row:
        fix_tick_size(axes)


def _scaling_legend(table: pd.DataFrame, looks: Mapping[str, LineStyle]) -> list[Line2D]:
    """Tokenizers by letter and colour, models by marker, numbering by filling."""
    entries = [
        Line2D([], [], color=look.color, linewidth=4, label=textwrap.fill(f"{letter}  {look.label}", 24))
        for letter, look in zip(ascii_uppercase, looks.values(), strict=False)
    ]
    entries.append(
        Line2D([], [], color=REFERENCE_GREY, linestyle=REFERENCE_LINE, linewidth=1, label=BASELINE_NAMES["uniform"])
    )
    plain = {"color": REFERENCE_GREY, "linestyle": "", "markersize": 5}
    there = [name for name in _MODELS if name in set(table["model"])]
    entries += [Line2D([], [], marker=_MODELS[name], label=name, **plain) for name in there]
    if table["permuted"].any():
        entries.append(
            Line2D([], [], marker=CARETLEFTBASE, markerfacecolor="white", label="open: codes numbered anew", **plain)
        )
    return entries


def _scaling_caption(table: pd.DataFrame) -> str:
    fewest = (table["usage_tokens"] / table["codebook_size"]).min()
    images = sorted(map(int, table["validation_images"].unique()))
    counted = f"{images[0]:,}" if len(images) == 1 else f"{images[0]:,} to {images[-1]:,}"
    text = f"usage in at least {at_least(fewest)} training tokens per code; bits on {counted} validation images"
    several = table.drop_duplicates("tokenizer")["codebook_size"].duplicated().any()
    return f"{text}; tokenizers of one K stand beside each other" if several else text


def _short(name: str, length: int) -> str:
    """A long name without its middle: runs differ at the end."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def _caption(report: TokenReport) -> str:
    facts = report.table.iloc[0]
    text = (
        f"{report.usage}; perplexity {facts['perplexity']:,.0f} codes; {report.entropy}; "
        f"bits on {facts['validation_images']:,} validation images of {report.grid[0]} × {report.grid[1]} tokens for "
        f"{report.image_size[0]} × {report.image_size[1]} pixels"
    )
    # textwrap breaks at plain spaces only.
    return text.replace(" = ", "\u00a0=\u00a0").replace(" × ", "\u00a0×\u00a0").replace(" %", "\u00a0%")
