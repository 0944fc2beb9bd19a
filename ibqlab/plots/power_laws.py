"""Quantities that grow or fall with the codebook: every run as a point, fitted power laws as lines."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ibqlab.plots.scaling import dimension_looks
from ibqlab.plots.style import CAPTION_SIZE, PAGE_WIDTH, add_caption, fix_tick_size, styled_figure


def plot_power_laws(runs: pd.DataFrame, laws: pd.DataFrame, quantities: Mapping[str, str]) -> Figure:
    """One panel per quantity, both axes logarithmic. A law is a straight line there; its slope is the exponent.

    Colour and marker: method. Line style: start. Shade, filling and a place beside K: code dimension. Points: single
    runs, so that a line that does not fit shows. An interval needs several seeds and more than two codebook sizes.

    Args:
        runs: one row per run: method, codebook_size, code_dim, seed, and a column per quantity.
        laws: quantity, method, code_dim, factor, exponent, low, high, points.
        quantities: column → axis label.
    Raises:
        ValueError: no runs.
    """
    if runs.empty:
        raise ValueError("power laws need runs; got none")
    dims = sorted(runs["code_dim"].unique(), reverse=True)
    starts = runs.groupby("method")["init"].first().to_dict() if "init" in runs else {}
    looks = dimension_looks(list(runs["method"].unique()), dims, starts)
    sizes = sorted(runs["codebook_size"].unique())
    seeds = runs["seed"].nunique()
    if seeds < 2 or len(sizes) < 3:
        laws = laws.assign(low=np.nan, high=np.nan)
    with styled_figure(PAGE_WIDTH, 3.4 + 0.17 * runs.groupby(["method", "code_dim"]).ngroups) as figure:
        for axes, (key, label) in zip(
            np.atleast_1d(figure.subplots(1, len(quantities))), quantities.items(), strict=True
        ):
            _draw(axes, runs, laws[laws["quantity"] == key], key, (looks, dims, sizes))
            axes.set_ylabel(label)
            title = "exponent of K (95 % interval)" if laws["low"].notna().any() else "exponent of K, no interval"
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=CAPTION_SIZE, title=title)
        add_caption(
            figure, f"each point one run, {seeds} seed{'s' if seeds > 1 else ''}; lines: least squares of logarithms"
        )
    return figure


def _draw(axes: Axes, runs: pd.DataFrame, laws: pd.DataFrame, key: str, looks: tuple) -> None:
    styles, dims, sizes = looks
    for (method, dim), part in runs.groupby(["method", "code_dim"], sort=False):
        look = styles[method, dim]
        beside = 2 ** (0.12 * (dims.index(dim) - (len(dims) - 1) / 2))
        points = look.look | {"linestyle": "none"}
        axes.plot(part["codebook_size"] * beside, part[key], markersize=4, alpha=0.8, **points)
        law = laws[(laws["method"] == method) & (laws["code_dim"] == dim)]
        if len(law):
            factor, slope, low, high = law.iloc[0][["factor", "exponent", "low", "high"]]
            sure = "" if np.isnan(low) else f" ({low:+.2f} to {high:+.2f})"
            axes.plot(
                sizes,
                factor * np.asarray(sizes, dtype=float) ** slope,
                label=f"{look.label}: {slope:+.2f}{sure}",
                # A marker in the legend, none on the line: points are runs.
                markevery=[],
                markersize=4,
                **look.look,
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("codebook size K (codes)")
    fix_tick_size(axes)
