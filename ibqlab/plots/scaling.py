"""Scaling: what codebook size and code dimension do to usage and reconstruction."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ibqlab.base.measures import measure
from ibqlab.plots import style
from ibqlab.plots.printing import PAGE_WIDTH, fix_tick_size, styled_figure
from ibqlab.plots.steps import IN_PERCENT

_KEYS = ["method", "init", "codebook_size", "code_dim"]
_NUMBERS = [
    f"{measure}_{statistic}"
    for measure in ("validation_usage", "validation_psnr")
    for statistic in ("mean", "min", "max")
]
_COLUMNS = [*_KEYS, *_NUMBERS, "validation_tokens", "seeds", "steps"]


def scaling_table(summary: pd.DataFrame) -> pd.DataFrame:
    """The numbers behind `plot_scaling`: validation usage (share) and PSNR (dB) per method, start, K and D.

    Args:
        summary: of `ibqlab.studies.summary_table`, or any frame with its columns.
    Raises:
        ValueError: a missing column or no rows.
    """
    style.require_columns(summary, _COLUMNS, "a scaling table")
    return summary[_COLUMNS].sort_values(_KEYS, kind="stable").reset_index(drop=True)


def plot_scaling(table: pd.DataFrame) -> Figure:
    """Two panels against codebook size: validation usage and PSNR.

    Colour and marker: method. Line style: start. Shade and filling, and a place of its own beside K: code dimension.
    Bars: lowest to highest seed. Usage that falls as the codebook grows means that added codes are dead weight; PSNR
    that stays flat says the same from the picture's side.

    Args:
        table: of `scaling_table`; one start per method.
    Returns:
        The figure.
    Raises:
        ValueError: a method appears with two starts, which one line cannot show.
    """
    if (table.groupby("method")["init"].nunique() > 1).any():
        raise ValueError("a scaling plot shows one start per method; give initialisations=[published] or one other")
    with styled_figure(PAGE_WIDTH, 3.4) as figure:
        usage, psnr = figure.subplots(1, 2)
        for look, group, sizes in dimension_lines(table):
            for axes, key in ((usage, "validation_usage"), (psnr, "validation_psnr")):
                mean, low, high = (group[f"{key}_{name}"] * measure(key).scale for name in ("mean", "min", "max"))
                bars = [mean - low, high - mean]
                axes.errorbar(sizes, mean, yerr=bars, capsize=2, label=look.label, **look.look)
        usage.set(ylabel=f"validation {measure('usage').label} (% of K)", ylim=IN_PERCENT)
        psnr.set_ylabel(measure("validation_psnr").axis)
        for axes in (usage, psnr):
            finish_sizes(axes, table["codebook_size"])
        handles, labels = usage.get_legend_handles_labels()
        columns = style.even_columns(len(handles), 3)
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, handlelength=4)
        style.add_caption(figure, _caption(table))
    return figure


def dimension_lines(table: pd.DataFrame) -> Iterator[tuple[style.LineStyle, pd.DataFrame, pd.Series]]:
    """A line per method and code dimension, in the order of legends: its look, its rows, and where they stand.

    A method has its own look at the largest dimension and variants of it below. Places are codebook sizes; dimensions
    stand beside each other on a logarithmic axis.

    Args:
        table: method, codebook_size and code_dim; and init, where a method's codebook starts, if that is known.
    """
    methods = style.in_order(table["method"])
    styles, dims = style.styles_for(methods), sorted(table["code_dim"].unique(), reverse=True)
    starts = table.groupby("method")["init"].first() if "init" in table else {}
    parts = dict(iter(table.groupby(["method", "code_dim"])))
    for method, (number, dim) in itertools.product(methods, enumerate(dims)):
        if (method, dim) in parts:
            label = style.text_label(f"{style.method_label(method)}, D = {dim:,}")
            look = replace(styles[method], label=label, line=style.start_line(starts.get(method, "")))
            beside = 2 ** (0.12 * (number - (len(dims) - 1) / 2))
            yield style.vary(look, number), parts[method, dim], parts[method, dim]["codebook_size"] * beside


def finish_sizes(axes: Axes, sizes: pd.Series, label: str = "codebook size K (codes, log scale)") -> None:
    """The axis of codebook sizes: logarithmic, with a number at each size that there is."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(sizes.unique())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes.set_xlabel(label)
    fix_tick_size(axes)


def _caption(table: pd.DataFrame) -> str:
    pairs = table[["method", "init"]].drop_duplicates()
    starts = "; ".join(f"{style.method_label(method)} from {init}" for method, init in pairs.to_numpy())
    fewest = (table["validation_tokens"] / table["codebook_size"]).min()
    runs = f"{int(table['steps'].max()):,} steps, {style.seeds_text(table['seeds'])}"
    return f"{starts}\n{runs}, at least {style.at_least(fewest)} validation tokens per code"
