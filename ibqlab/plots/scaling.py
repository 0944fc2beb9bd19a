"""Scaling: what codebook size and code dimension do to usage and reconstruction."""

from dataclasses import replace

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ibqlab.base.measures import measure
from ibqlab.plots.printing import PAGE_WIDTH, fix_tick_size, styled_figure
from ibqlab.plots.steps import IN_PERCENT
from ibqlab.plots.style import (
    LineStyle,
    add_caption,
    at_least,
    even_columns,
    in_order,
    method_label,
    require_columns,
    seeds_text,
    start_line,
    styles_for,
    text_label,
    vary,
)

_KEYS = ["method", "init", "codebook_size", "code_dim"]
_NUMBERS = [
    f"{measure}_{part}" for measure in ("validation_usage", "validation_psnr") for part in ("mean", "min", "max")
]
_COLUMNS = [*_KEYS, *_NUMBERS, "validation_tokens", "seeds", "steps"]


def scaling_table(summary: pd.DataFrame) -> pd.DataFrame:
    """The numbers behind `plot_scaling`: validation usage (share) and PSNR (dB) per method, start, K and D.

    Args:
        summary: of `ibqlab.studies.summary_table`, or any frame with its columns.
    Raises:
        ValueError: a missing column or no rows.
    """
    require_columns(summary, _COLUMNS, "a scaling table")
    return summary[_COLUMNS].sort_values(_KEYS, kind="stable").reset_index(drop=True)


def plot_scaling(table: pd.DataFrame) -> Figure:
    """Two panels against codebook size: validation usage and PSNR.

    Colour and marker: method. Line style: start. Shade and filling, and a place of its own beside K: code dimension.
    Bars: lowest to highest seed. Usage that falls as the
    codebook grows means that added codes are dead weight; PSNR that stays flat says the same from the picture's side.

    Args:
        table: of `scaling_table`; one start per method.
    Returns:
        The figure.
    Raises:
        ValueError: a method appears with two starts, which one line cannot show.
    """
    if (table.groupby("method")["init"].nunique() > 1).any():
        raise ValueError("a scaling plot shows one start per method; give initialisations=[published] or one other")
    dims = sorted(table["code_dim"].unique(), reverse=True)
    starts = table.groupby("method")["init"].first()
    methods = in_order(table["method"])
    looks = dimension_looks(methods, dims, starts.to_dict())
    lines = dict(iter(table.groupby(["method", "code_dim"])))
    with styled_figure(PAGE_WIDTH, 3.4) as figure:
        usage, psnr = figure.subplots(1, 2)
        for (method, dim), look in looks.items():
            if (method, dim) not in lines:
                continue
            group = lines[method, dim]
            sizes = group["codebook_size"] * beside(dims, dim)
            for axes, key in ((usage, "validation_usage"), (psnr, "validation_psnr")):
                mean, low, high = (group[f"{key}_{part}"] * measure(key).scale for part in ("mean", "min", "max"))
                bars = [mean - low, high - mean]
                axes.errorbar(sizes, mean, yerr=bars, capsize=2, label=look.label, **look.look)
        usage.set(ylabel=f"validation {measure('usage').label} (% of K)", ylim=IN_PERCENT)
        psnr.set_ylabel(measure("validation_psnr").axis)
        for axes in (usage, psnr):
            finish_sizes(axes, table["codebook_size"])
        handles, labels = usage.get_legend_handles_labels()
        columns = even_columns(len(handles), 3)
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, handlelength=4)
        add_caption(figure, _caption(table))
    return figure


def dimension_looks(methods: list[str], dims: list[int], starts: dict[str, str]) -> dict[tuple[str, int], LineStyle]:
    """The look of each method at each code dimension: the method's own at the largest, its variants below.

    Args:
        methods: in the order of the legend.
        dims: largest first.
        starts: method → where its codebook starts.
    """
    styles = styles_for(methods)
    looks = {}
    for method in methods:
        for number, dim in enumerate(dims):
            label = text_label(f"{method_label(method)}, D = {dim:,}")
            look = replace(styles[method], label=label, line=start_line(starts.get(method, "")))
            looks[method, dim] = vary(look, number)
    return looks


def beside(dims: list[int], dim: int) -> float:
    """Factor on a codebook size that sets the code dimensions beside each other on a logarithmic axis."""
    return 2 ** (0.12 * (dims.index(dim) - (len(dims) - 1) / 2))


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
    starts = "; ".join(f"{method_label(method)} from {init}" for method, init in pairs.to_numpy())
    fewest = (table["validation_tokens"] / table["codebook_size"]).min()
    runs = f"{int(table['steps'].max()):,} steps, {seeds_text(table['seeds'])}"
    return f"{starts}\n{runs}, at least {at_least(fewest)} validation tokens per code"
