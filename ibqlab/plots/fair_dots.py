"""The fair comparison as a picture: methods downwards, a panel per measure, three starts of each method beside."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ibqlab.base.intervals import name_student_interval
from ibqlab.base.measures import SHARE, measure
from ibqlab.plots import style
from ibqlab.plots.printing import PAGE_WIDTH, fix_tick_size, styled_figure
from ibqlab.quantizers import INITIALISATIONS

_COLUMNS = ["data", "method", "start", "own_start", "is_reference", "measure", "mean", "low", "high", "seeds"]
_COLUMNS += ["rates", "steps"]
_INSIDE = ("white", "#BBBBBB")
"""Of open markers, in the order of the starts that all methods are given."""
_APART = 0.24
"""Between the lines of one method, in rows."""


def plot_fair_comparison(table: pd.DataFrame) -> Figure:
    """Methods against their measures, from every start, on one kind of data. Better is to the right in every panel.

    Filled markers: a method's own start; smaller ones, white or grey inside: the starts that all methods are given. A
    dotted line: the mean of the method that others are compared with, from its own start.

    Args:
        table: one row per method, start and measure, as `FairTables.data` gives them.
    Raises:
        ValueError: a missing column, or nothing to show.
    """
    style.require_columns(table, _COLUMNS, "a table of the fair comparison")
    table = table[table["measure"] != "perplexity"]
    methods = list(dict.fromkeys(table["method"]))
    measures = [measure(key) for key in dict.fromkeys(table["measure"])]
    looks, starts = style.styles_for(methods), _given_starts(table)
    with styled_figure(PAGE_WIDTH, 1.5 + 0.3 * len(methods)) as figure:
        panels = np.atleast_1d(figure.subplots(1, len(measures), sharey=True))
        for axes, quantity in zip(panels, measures, strict=True):
            here = table[table["measure"] == quantity.key]
            line = here[here["is_reference"] & here["own_start"]]
            if len(line):
                axes.axvline(line["mean"].iloc[0] * quantity.scale, **style.REFERENCE, linewidth=1)
            for place, method in enumerate(methods):
                _draw_method(
                    axes, here[here["method"] == method].assign(place=place), quantity.scale, looks[method], starts
                )
            axes.set_xlabel(f"{quantity.heading}, %" if quantity.unit == SHARE else quantity.heading)
            if quantity.better == "lower":
                axes.invert_xaxis()
            axes.locator_params(axis="x", nbins=4)
            fix_tick_size(axes)
        panels[0].set_yticks(range(len(methods)), [looks[method].label for method in methods])
        panels[0].set_ylim(len(methods) - 0.4, -0.6)
        data = ", ".join(map(str, table["data"].unique()))
        figure.suptitle(style.text_label(f"Every method at its best rate: {data}"), fontsize=10)
        style.add_caption(figure, describe_marks(table))
    return figure


def describe_marks(table: pd.DataFrame) -> str:
    """What the marks of the picture are, and what runs these are, for its caption."""
    starts = [INITIALISATIONS[start] for start in _given_starts(table)]
    words = [f"{inside} inside: {start}" for inside, start in zip(("white", "grey"), starts, strict=False)]
    others = f"; {', '.join(words)}, where that is not its own" if starts else ""
    facts, reference = table.iloc[0], list(table.loc[table["is_reference"], "method"].unique())
    has_line = table.loc[table["is_reference"] & table["own_start"].astype(bool), "mean"].notna().any()
    dotted = f" Dotted: {style.styles_for(reference)[reference[0]].label}, own start." if has_line else ""
    return (
        f"Filled: from the method's own start{others}. Right is better; axes where less is better run backwards."
        f"{dotted} {name_student_interval(int(table['seeds'].max()))}. Rates searched: {facts['rates']}; "
        f"{facts['steps']:,} steps."
    )


def _given_starts(table: pd.DataFrame) -> list[str]:
    """The starts that methods have besides their own."""
    return list(dict.fromkeys(table.loc[~table["own_start"].astype(bool), "start"]))


def _draw_method(axes: Axes, rows: pd.DataFrame, scale: float, look: style.LineStyle, starts: list[str]) -> None:
    rows = rows.sort_values("own_start", ascending=False, kind="stable")
    for number, (_, row) in enumerate(rows.iterrows()):
        if not np.isfinite(row["mean"]):
            continue
        middle, low, high = (row[name] * scale for name in ("mean", "low", "high"))
        error = [[middle - low], [high - middle]] if np.isfinite(low) else None
        inside = look.color if row["own_start"] else _INSIDE[starts.index(row["start"]) % len(_INSIDE)]
        y = row["place"] + (number - (len(rows) - 1) / 2) * _APART
        axes.errorbar(
            middle,
            y,
            xerr=error,
            marker=look.marker,
            markersize=6.5 if row["own_start"] else 5,
            markerfacecolor=inside,
            color=look.color,
            capsize=1.5,
            elinewidth=0.8,
        )
