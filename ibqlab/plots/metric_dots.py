"""Several tokenizers side by side, metric by metric."""

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

_COLUMNS = ["label", "key", "metric", "value", "unit", "better", "published"]
_PER_ROW = 3


def plot_metric_dots(table: pd.DataFrame, caption: str = "") -> Figure:
    """One panel per metric, one dot per tokenizer, better to the side that the arrow names.

    Panels have scales of their own that need not begin at zero: read distances on the axis. An open diamond is the
    value that a paper printed; a metric that was not computed leaves its line empty.

    Args:
        table: one row per tokenizer and metric: label, key, metric (title), value, unit ("share" is drawn in %), better
            ("higher" or "lower"), published (NaN: nothing to show). The figure shows this table and nothing else.
        caption: how it was measured.
    Returns:
        The figure.
    Raises:
        ValueError: a missing column, or no value at all.
    """
    require_columns(table, _COLUMNS, "a table of metric dots")
    if table["value"].isna().all():
        raise ValueError("metric dots need at least one value; got none: choose metrics whose weights are there")
    table = table[table.groupby("key")["value"].transform(lambda values: values.notna().any())]
    labels = list(dict.fromkeys(table["label"]))
    styles = styles_for(labels)
    keys = list(dict.fromkeys(table["key"]))
    rows, columns = math.ceil(len(keys) / _PER_ROW), min(len(keys), _PER_ROW)
    height = rows * (0.85 + 0.26 * len(labels)) + 0.5
    with styled_figure(PAGE_WIDTH, height) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for panel, key in zip(grid.flat, keys, strict=False):
            _draw_metric(panel, table[table["key"] == key], labels, styles)
        for panel in grid.flat[len(keys) :]:
            panel.set_visible(False)
        for panel in grid[:, 1:].flat:
            panel.set_yticklabels([])
        if table["published"].notna().any():
            diamond = Line2D([], [], markersize=8, label="printed by the paper", **PAPER)
            figure.legend(handles=[diamond], loc="outside upper right")
        if caption:
            add_caption(figure, textwrap.fill(caption, 110))
    return figure


def _draw_metric(axes: Axes, rows: pd.DataFrame, labels: list[str], styles: dict[str, LineStyle]) -> None:
    first = rows.iloc[0]
    scale, unit = (100, "%") if first["unit"] == SHARE else (1, first["unit"])
    for _, row in rows.iterrows():
        number, look = labels.index(row["label"]), styles[row["label"]]
        axes.plot(row["value"] * scale, number, color=look.color, marker=look.marker, markersize=6, linestyle="")
        if pd.notna(row["published"]):
            axes.plot(row["published"] * scale, number, markersize=8, **PAPER)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), [textwrap.fill(styles[label].label, 22) for label in labels])
    axes.margins(x=0.15)
    better = "right" if first["better"] == "higher" else "left"
    arrow = {"right": "better →", "left": "← better"}[better]
    axes.set_title(textwrap.fill(first["metric"], 26, break_on_hyphens=False), fontsize=9)
    axes.set_xlabel(f"{unit}   {arrow}".strip())
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    fix_tick_size(axes)
