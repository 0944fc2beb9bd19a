"""Quantities that grow or fall with the codebook: every run as a point, fitted power laws as lines."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ibqlab.base.intervals import exponent_text
from ibqlab.plots.printing import PAGE_WIDTH, styled_figure
from ibqlab.plots.scaling import dimension_lines, finish_sizes
from ibqlab.plots.steps import write_numbers
from ibqlab.plots.style import CAPTION_SIZE, add_caption, number_range


def plot_power_laws(runs: pd.DataFrame, laws: pd.DataFrame, quantities: Mapping[str, str]) -> Figure:
    """One panel per quantity, both axes logarithmic. A law is a straight line there; its slope is the exponent.

    Colour and marker: method. Line style: start. Shade, filling and a place beside K: code dimension. Points: single
    runs, so that a line that does not fit shows. An interval needs several seeds and more than two codebook sizes;
    it is Student's, of the slope through that many runs.

    Args:
        runs: one row per run: method, codebook_size, code_dim, seed, and a column per quantity.
        laws: quantity, method, code_dim, factor, exponent, low, high, points.
        quantities: column → axis label.
    Raises:
        ValueError: no runs.
    """
    if runs.empty:
        raise ValueError("power laws need runs; got none")
    laws = supported_intervals(runs, laws)
    with styled_figure(PAGE_WIDTH, 3.4 + 0.17 * runs.groupby(["method", "code_dim"]).ngroups) as figure:
        for axes, (key, label) in zip(
            np.atleast_1d(figure.subplots(1, len(quantities))), quantities.items(), strict=True
        ):
            _draw(axes, runs, laws[laws["quantity"] == key], key)
            axes.set_ylabel(label)
            look = {"fontsize": CAPTION_SIZE, "title": exponent_title(laws), "title_fontsize": 9}
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), **look)
        add_caption(figure, _caption(laws, runs["seed"].nunique()))
    return figure


def supported_intervals(runs: pd.DataFrame, laws: pd.DataFrame) -> pd.DataFrame:
    """The laws without intervals where seeds or sizes are too few for any: one seed, or a line through two sizes."""
    if runs["seed"].nunique() < 2 or runs["codebook_size"].nunique() < 3:
        return laws.assign(low=np.nan, high=np.nan)
    return laws


def exponent_title(laws: pd.DataFrame) -> str:
    """What `exponent_text` shows, as a heading."""
    return f"exponent of K ({'95 % interval' if laws['low'].notna().any() else 'no interval'})"


def _caption(laws: pd.DataFrame, seeds: int) -> str:
    text = f"each point one run, {seeds} seed{'s' if seeds > 1 else ''}; lines: least squares of logarithms"
    if laws["low"].isna().all():
        return text
    return f"{text}; interval: Student's, of the slope through the {number_range(laws['points'])} runs of a line"


def _draw(axes: Axes, runs: pd.DataFrame, laws: pd.DataFrame, key: str) -> None:
    sizes = sorted(runs["codebook_size"].unique())
    for look, line_runs, places in dimension_lines(runs):
        points = look.look | {"linestyle": "none"}
        axes.plot(places, line_runs[key], markersize=4, alpha=0.8, **points)
        method, dim = line_runs[["method", "code_dim"]].iloc[0]
        law = laws[(laws["method"] == method) & (laws["code_dim"] == dim)]
        if len(law):
            factor, slope = law.iloc[0][["factor", "exponent"]]
            axes.plot(
                sizes,
                factor * np.asarray(sizes, dtype=float) ** slope,
                label=f"{look.label}: {exponent_text(law.iloc[0])}",
                # A marker in the legend, none on the line: points are runs.
                markevery=[],
                markersize=4,
                **look.look,
            )
    axes.set_yscale("log")
    write_numbers(axes.yaxis, ",g")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    finish_sizes(axes, runs["codebook_size"], "codebook size K (codes)")
