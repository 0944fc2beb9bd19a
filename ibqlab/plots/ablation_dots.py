"""One table of a paper as a picture: rows downwards, a panel per measure, seeds as dots, the paper's numbers beside."""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ibqlab.base.escaping import for_matplotlib
from ibqlab.base.measures import SHARE, Quantity
from ibqlab.plots import style
from ibqlab.plots.printing import PAGE_WIDTH, fix_tick_size, styled_figure

_ROW_LETTERS = 42
"""Letters of a row's label in one line."""
_AXIS_LETTERS = 60
"""Letters under all panels together."""
_COLUMNS = ["row", "method", "measure", "kind", "value", "low", "high", "seed"]


DOTS_KEY = "small open markers: single seeds; grey diamonds: the paper, on ImageNet. Right is better."
"""What the marks are, for captions."""


def plot_ablation(table: pd.DataFrame, measures: list[Quantity], title: str, caption: str) -> Figure:
    """Rows of a table against their measures. Better is to the right in every panel.

    Filled markers: means over seeds with their 95 % intervals; small open ones below them: single seeds; grey diamonds:
    the paper's numbers, on ImageNet. A row is called by what was run, the paper's name for it stands in brackets.

    Args:
        table: columns row, method, measure, kind ("mean", "seed" or "paper"), value, low, high, seed; and here, where
            it is known what was run: "ibq, K 256, D 64".
        measures: those to show, a panel each; by their keys in the column measure. Where less is better, the axis runs
            the other way. Shares run from 0 to 100 %.
        title: of the figure.
        caption: what runs these are.
    Raises:
        ValueError: a missing column, or nothing to show.
    """
    style.require_columns(table, _COLUMNS, "a table of an ablation")
    if not measures:
        raise ValueError("an ablation figure needs at least one panel; got none: name a measure to show")
    rows = list(dict.fromkeys(table["row"]))
    labels = [_row_label(table, row) for row in rows]
    lines = 1 + max(label.count("\n") for label in labels)
    with styled_figure(PAGE_WIDTH, 1.6 + (0.14 + 0.14 * lines) * len(rows)) as figure:
        all_axes = np.atleast_1d(figure.subplots(1, len(measures), sharey=True))
        for axes, quantity in zip(all_axes, measures, strict=True):
            _draw(axes, table[table["measure"] == quantity.key], quantity, rows)
            words = [f"{quantity.heading}, %" if quantity.unit == SHARE else quantity.heading]
            words += [] if quantity.better == "higher" else ["(axis reversed)"]
            axes.set_xlabel("\n".join(textwrap.fill(line, _AXIS_LETTERS // len(measures)) for line in words))
            axes.margins(x=0.12)
            axes.locator_params(axis="x", nbins=3 if len(measures) > 3 else 4)
        all_axes[0].set_yticks(range(len(rows)), labels)
        all_axes[0].set_ylim(len(rows) - 0.4, -0.6)
        figure.suptitle(for_matplotlib(title), fontsize=10)
        style.add_caption(figure, caption)
    return figure


def _row_label(table: pd.DataFrame, row: str) -> str:
    """What was run, and in brackets the paper's name for it. The paper's name alone where no more is known."""
    facts = table[table["row"] == row].iloc[0]
    description = facts.get("here")
    if not isinstance(description, str):
        return style.text_label(row)
    method, comma, settings = description.partition(",")
    run = style.text_label(style.method_label(method) + comma + settings)
    texts = (run, f"(paper: {for_matplotlib(row, style.LONGEST_LABEL)})")
    return "\n".join(textwrap.fill(text, _ROW_LETTERS) for text in texts)


def _draw(axes: Axes, table: pd.DataFrame, quantity: Quantity, rows: list[str]) -> None:
    places = {row: number for number, row in enumerate(rows)}
    for _, point in table.iterrows():
        y, x = places[point["row"]], point["value"] * quantity.scale
        look = style.method_style(point["method"])
        color, marker = (look.color, look.marker) if look else (style.REFERENCE_GREY, "s")
        if point["kind"] == "paper":
            axes.plot(x, y, markersize=7, zorder=1.9, **style.PAPER)
        elif point["kind"] == "seed":
            axes.plot(x, y + 0.27, marker=marker, markersize=4, markerfacecolor="none", color=color, linestyle="none")
        else:
            low, high = point["low"] * quantity.scale, point["high"] * quantity.scale
            error = [[x - low], [high - x]] if np.isfinite(low) else None
            axes.errorbar(x, y, xerr=error, marker=marker, color=color, capsize=2)
    if quantity.unit == SHARE:
        axes.set_xlim(-6, 106)
    if quantity.better != "higher":
        axes.invert_xaxis()
    fix_tick_size(axes)
