"""The same tokenizers under two protocols, metric by metric, with what was printed."""

import math
import textwrap

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ibqlab.base.measures import SHARE
from ibqlab.plots.printing import PAGE_WIDTH, fix_tick_size, styled_figure
from ibqlab.plots.style import PAPER, LineStyle, add_caption, require_columns, styles_for

_COLUMNS = ["label", "key", "metric", "unit", "better", "printed", "own", "same_reconstructions", "common"]
_PER_ROW = 3
_LOOKS = {
    "own": ("under its own protocol", {"marker": "o", "markersize": 5}),
    "same_reconstructions": ("the same reconstructions, measured in common", {"marker": "|", "markersize": 14}),
    "common": ("under the common protocol", {"marker": "s", "markersize": 9, "fillstyle": "none"}),
}
"""Column → name and marker."""


def plot_protocol_dots(table: pd.DataFrame, caption: str = "") -> Figure:
    """One panel per metric, one line per tokenizer: from its own protocol to the common one.

    The way from the dot to the bar is what measuring changes, from the bar to the square what preparing the images
    changes. An open diamond is the printed value. Panels have scales of their own that need not begin at zero.

    Args:
        table: of `ibqlab.grids.protocol_shares`: label, key, metric, unit ("share" is drawn in %), better, and the
            values printed, own, same_reconstructions, common. The figure shows this table and nothing else.
        caption: how it was measured.
    Returns:
        The figure.
    Raises:
        ValueError: a missing column, or no row.
    """
    require_columns(table, _COLUMNS, "a table of protocols")
    labels, keys = (list(dict.fromkeys(table[column])) for column in ("label", "key"))
    looks = styles_for(labels)
    rows, columns = math.ceil(len(keys) / _PER_ROW), min(len(keys), _PER_ROW)
    with styled_figure(PAGE_WIDTH, rows * (0.85 + 0.26 * len(labels)) + 0.9) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for panel, key in zip(grid.flat, keys, strict=False):
            _draw_metric(panel, table[table["key"] == key], looks)
        for panel in grid.flat[len(keys) :]:
            panel.set_visible(False)
        for panel in grid[:, 1:].flat:
            panel.set_yticklabels([])
        handles = [Line2D([], [], color="0.2", linestyle="", label=name, **look) for name, look in _LOOKS.values()]
        if table["printed"].notna().any():
            handles.append(Line2D([], [], markersize=8, label="printed", **PAPER))
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        if caption:
            add_caption(figure, textwrap.fill(caption, 110))
    return figure


def _draw_metric(axes: Axes, rows: pd.DataFrame, looks: dict[str, LineStyle]) -> None:
    first, labels = rows.iloc[0], list(looks)
    scale, unit = (100, "%") if first["unit"] == SHARE else (1, first["unit"])
    for _, row in rows.iterrows():
        number, color = labels.index(row["label"]), looks[row["label"]].color
        values = [scale * row[name] for name in _LOOKS]
        axes.plot(values, [number] * len(values), color=color, linewidth=0.8, zorder=1)
        for value, (_, look) in zip(values, _LOOKS.values(), strict=True):
            axes.plot(value, number, color=color, linestyle="", zorder=2, **look)
        if pd.notna(row["printed"]):
            axes.plot(scale * row["printed"], number, markersize=8, **PAPER)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), [textwrap.fill(look.label, 22) for look in looks.values()])
    axes.margins(x=0.15)
    arrow = "better →" if first["better"] == "higher" else "← better"
    axes.set_title(textwrap.fill(first["metric"], 26, break_on_hyphens=False), fontsize=9)
    axes.set_xlabel(f"{unit}   {arrow}".strip())
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    fix_tick_size(axes)
