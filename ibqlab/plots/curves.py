"""Collapse through training: usage, perplexity and gradient reach against the step."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from pandas.core.groupby import DataFrameGroupBy

from ibqlab.plots.style import (
    EACH_STEP,
    PAGE_WIDTH,
    REFERENCE_GREY,
    REFERENCE_LINE,
    WINDOW,
    LineStyle,
    add_caption,
    even_columns,
    fix_tick_size,
    in_order,
    stacked_width,
    start_line,
    styled_figure,
    styles_for,
    table_of,
    text_label,
)

_WITHOUT_MEMORY = ("step_usage", "validation_usage", "validation_perplexity")
_TOKENS = ("usage_tokens", "step_tokens", "validation_tokens")
_MEASURES = ("usage", "perplexity", "gradient_reach", *_WITHOUT_MEMORY)
_COLUMNS = ("step", "method", "seed", "init", *_MEASURES[:3], "usage_tokens", "codebook_size")
_TOKENS_PER_CODE = 10


def collapse_curve_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """The numbers behind `plot_collapse_curves`: mean and range over seeds, per method, initialisation and step.

    Args:
        metrics: one row per run and logged step with the columns step, method, seed, init, usage (share), usage_tokens,
            perplexity (codes), gradient_reach (share) and codebook_size; empty cells where a step did not measure.
            Runs may have one codebook size only; an optional column code_dim is named in the caption. Optional, too,
            because older runs lack them: step_usage with step_tokens, validation_usage and validation_perplexity with
            validation_tokens.
    Returns:
        One row per (method, init, step), in the order of first appearance, with codebook_size, code_dim where it was
        given (the largest), seeds, usage_tokens (the fewest of the seeds), and *_mean, *_min, *_max for usage and
        gradient_reach (shares, 0 to 1) and perplexity (codes). So for what there is without memory: step_usage and
        validation_usage (shares), validation_perplexity (codes), with step_tokens and validation_tokens (the fewest).
    Raises:
        ValueError: a missing column, no rows, or more than one codebook size.
    """
    _check_metrics(metrics)
    metrics = metrics.reindex(columns=list(dict.fromkeys([*metrics, *_WITHOUT_MEMORY, *_TOKENS])))
    groups = metrics.groupby(["method", "init", "step"], sort=False)
    table = spread_over_seeds(groups, _MEASURES).join(groups[list(_TOKENS[1:])].min())
    table["codebook_size"], table["usage_tokens"] = groups["codebook_size"].first(), groups["usage_tokens"].min()
    if "code_dim" in metrics:
        table["code_dim"] = groups["code_dim"].max()
    table = table.reset_index()
    for column in ("init", "method"):
        order = {name: place for place, name in enumerate(metrics[column].unique())}
        table[f"_{column}"] = table[column].map(order)
    table = table.sort_values(["_method", "_init", "step"], kind="stable")
    return table.drop(columns=["_method", "_init"]).reset_index(drop=True)


def spread_over_seeds(groups: DataFrameGroupBy, measures: Sequence[str]) -> pd.DataFrame:
    """Mean and range of measures within each group.

    Args:
        groups: of lines with the column seed and the measures.
        measures: columns.
    Returns:
        One line per group: seeds (how many), *_mean, *_min, *_max.
    """
    columns = {f"{name}_{part}": (name, part) for name in measures for part in ("mean", "min", "max")}
    return groups.agg(seeds=("seed", "nunique"), **columns)


def plot_collapse_curves(metrics: pd.DataFrame) -> Figure:
    """Three panels against the training step: usage, perplexity (log scale) and gradient reach.

    Usage and perplexity are of validation tokens, which remember nothing of earlier steps; the thin line is the share
    of codes that each step's own tokens hit, on the clock of the gradient reach. Runs without these have usage and
    perplexity of the window of latest training tokens, and the caption says so: a window falls late. Steps are on a
    logarithmic scale where the first ones were recorded, because collapse is decided there.

    Colour, marker and width: method. Line style: start, as in every figure; where a method has several starts, each
    start has a row of panels, so that methods are compared from the same one. Line: mean over seeds; band: lowest to
    highest seed. A codebook collapses where usage falls and stays down; gradient reach tells whether lost codes can
    still come back.

    Args:
        metrics: as for `collapse_curve_table`, or what it returned.
    Returns:
        The figure; its numbers are `collapse_curve_table(metrics)`.
    Raises:
        ValueError: as for `collapse_curve_table`.
    """
    table = table_of(metrics, "usage_mean", collapse_curve_table)
    # The CSV of an older version has no columns without memory.
    table = table.reindex(
        columns=list(dict.fromkeys([*table, *(f"{name}_mean" for name in _WITHOUT_MEMORY), *_TOKENS]))
    )
    styles = styles_for(in_order(table["method"]))
    starts = list(dict.fromkeys(table["init"]))
    apart = table.groupby("method")["init"].nunique().max() > 1
    rows = [table[table["init"] == start] for start in starts] if apart else [table]
    with styled_figure(PAGE_WIDTH, 1.1 + (2.2 + 0.25 * apart) * len(rows)) as figure:
        for row, part in zip(np.atleast_1d(figure.subfigures(len(rows), 1)), rows, strict=True):
            if apart:
                row.suptitle(text_label(f"all from {part['init'].iloc[0]}"), fontsize=10, fontweight="bold")
            _draw_row(row.subplots(1, 3), part, table, styles)
        _add_legend(figure, table, styles, starts)
        add_caption(figure, _caption(table))
    return figure


def _draw_row(panels: Sequence[Axes], part: pd.DataFrame, table: pd.DataFrame, styles: dict[str, LineStyle]) -> None:
    """Usage, perplexity and reach of the methods of one row of panels; `table` holds all rows."""
    usage, perplexity, reach = panels
    size = int(table["codebook_size"].iloc[0])
    probed = table["validation_usage_mean"].notna().any()
    for axes, measure, scale in (
        (usage, "validation_usage" if probed else "usage", 100),
        (perplexity, "validation_perplexity" if probed else "perplexity", 1),
        (reach, "gradient_reach", 100),
    ):
        for (method, init), group in part.groupby(["method", "init"], sort=False):
            style = replace(styles[method], line=start_line(init), label=text_label(f"{method}, {init}"))
            draw_band(axes, group, measure, scale, style, place=list(styles).index(method))
        axes.set_xlabel("training step")
        scale_steps(axes, table["step"])
        fix_tick_size(axes)
    _draw_beside(usage, part, _beside_measure(table), styles)
    window = "" if probed else " (window)"
    _finish_share(usage, f"Usage{window}", f"codes hit (% of {size:,})")
    _finish_perplexity(perplexity, size, f"Perplexity{window}")
    _finish_share(reach, "Gradient reach", f"codes reached (% of {size:,})")


def draw_band(axes: Axes, group: pd.DataFrame, measure: str, scale: int, style: LineStyle, *, place: int = 0) -> None:
    """One line: the mean over seeds within their range.

    Args:
        axes: to draw on.
        group: of one line, as `spread_over_seeds` makes it, with the column step.
        measure: whose *_mean, *_min and *_max are drawn.
        scale: factor on its values, 100 for shares in percent.
        style: of the line, and its name for legends.
        place: number of the line in its panel. Later ones are thinner and set their markers elsewhere, so that lines
            which coincide show as stripes.
    """
    group = group.dropna(subset=[f"{measure}_mean"])
    if group.empty:
        return
    low, mean, high = (group[f"{measure}_{part}"] * scale for part in ("min", "mean", "max"))
    axes.fill_between(group["step"], low, high, color=style.color, alpha=0.18, linewidth=0)
    every = max(1, len(group) // 5)
    axes.plot(
        group["step"],
        mean,
        linewidth=stacked_width(place),
        markersize=4,
        markevery=(place * every // 6 % every, every),
        label=style.label,
        **style.look,
    )


def scale_steps(axes: Axes, steps: pd.Series) -> None:
    """The axis of training steps: logarithmic from step 1 on where steps below a hundredth of the last have a row."""
    positive = steps[steps > 0]
    if len(positive) and positive.min() * 100 <= positive.max():
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        axes.set_xlim(-0.15, positive.max() * 1.15)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))


def _beside_measure(table: pd.DataFrame) -> str:
    """What the lines beside the marked ones of the first panel show; "" where those show all there is."""
    if table["step_usage_mean"].notna().any():
        return "step_usage"
    return "usage" if table["validation_usage_mean"].notna().any() else ""


def _draw_beside(axes: Axes, part: pd.DataFrame, measure: str, styles: dict[str, LineStyle]) -> None:
    """Usage of each step's own tokens, behind the validation's; of the window in runs that have none."""
    if not measure:
        return
    for (method, _), group in part.dropna(subset=[f"{measure}_mean"]).groupby(["method", "init"], sort=False):
        look = EACH_STEP if measure == "step_usage" else WINDOW
        shares = 100 * group[f"{measure}_mean"]
        axes.plot(group["step"], shares, color=styles[method].color, label="_beside", zorder=1.5, **look)


def _finish_share(axes: Axes, title: str, label: str) -> None:
    """A panel in percent from 0 to 100."""
    axes.set(title=title, ylabel=label, ylim=(-3, 103))


def _finish_perplexity(axes: Axes, size: int, title: str) -> None:
    """A logarithmic panel from 1 to K, with K as the line that even use would reach."""
    axes.axhline(size, color=REFERENCE_GREY, linewidth=1, linestyle=REFERENCE_LINE)
    axes.annotate(
        f"even use of all {size:,}",
        (0.98, size),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=REFERENCE_GREY,
    )
    axes.set_yscale("log")
    axes.set(title=title, ylabel="perplexity (codes)", ylim=(0.8, size * 2.2))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else ""))


def _add_legend(figure: Figure, table: pd.DataFrame, styles: dict[str, LineStyle], starts: Sequence[str]) -> None:
    """Methods by colour, marker and width, starts by line style, and what the lines beside them are."""
    handles = [
        Line2D([], [], markersize=5, linewidth=stacked_width(place), label=style.label, **style.look)
        for place, style in enumerate(styles.values())
    ]
    handles += start_handles(starts)
    beside = {"step_usage": (EACH_STEP, "each step's tokens"), "usage": (WINDOW, "window")}.get(_beside_measure(table))
    if beside:
        handles.append(Line2D([], [], color=REFERENCE_GREY, label=beside[1], **beside[0]))
    columns = even_columns(len(handles), 6)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=2.6, columnspacing=1.2)


def start_handles(starts: Sequence[str]) -> list[Line2D]:
    """Legend entries that tell starts by their line style.

    Args:
        starts: as `START_LINES` calls them.
    """
    return [
        Line2D([], [], color=REFERENCE_GREY, linestyle=start_line(start), label=text_label(f"start {start}"))
        for start in starts
    ]


def _caption(table: pd.DataFrame) -> str:
    """Sizes, tokens and seeds: what a lone picture must say."""
    size = int(table["codebook_size"].iloc[0])
    sizes = f"K = {size:,}"
    if "code_dim" in table:
        sizes += ", D = " + " and ".join(f"{int(dim):,}" for dim in sorted(table["code_dim"].unique()))
    tokens = table["usage_tokens"].dropna()
    seeds = int(table["seeds"].max())
    spread = "1 seed" if seeds == 1 else f"mean and range of {seeds} seeds"
    beside, window = _beside_measure(table), "the window of the last {} training tokens"
    counted = _few(tokens, size, window)
    if table["validation_usage_mean"].notna().any():
        counted = _few(table["validation_tokens"].dropna(), size, "{} validation tokens")
    behind = ""
    if beside:
        few = table[{"step_usage": "step_tokens", "usage": "usage_tokens"}[beside]].max()
        words, which = ("the step's own {} tokens", "thin") if beside == "step_usage" else (window, "broad pale")
        behind = f"{which} lines: usage over {words.format(f'{int(few):,}')}\n"
    return (
        f"{sizes}; usage and perplexity over {counted}; {spread}\n{behind}"
        "codes reached: gradient norm above 10⁻³ of the largest code's in that step"
    )


def _few(tokens: pd.Series, size: int, text: str) -> str:
    """How many tokens a usage was counted on, with a word where they are too few for so many codes."""
    if tokens.empty:
        return "no tokens"
    counted = text.format(f"{int(tokens.max()):,}")
    if tokens.min() < tokens.max():
        counted += f" (at first {int(tokens.min()):,})"
    if tokens.max() < _TOKENS_PER_CODE * size:
        counted += f", fewer than 10·K = {_TOKENS_PER_CODE * size:,}: reads low"
    return counted


def _check_metrics(metrics: pd.DataFrame) -> None:
    """Refuse a frame that cannot be drawn in one figure."""
    missing = [name for name in _COLUMNS if name not in metrics]
    if missing:
        raise ValueError(
            f"metrics need the columns {', '.join(_COLUMNS)}; missing {', '.join(missing)}, got {', '.join(metrics)}"
        )
    if metrics.empty:
        raise ValueError("metrics hold no rows: train at least one run, or check the filter")
    sizes = sorted(metrics["codebook_size"].unique())
    if len(sizes) > 1:
        raise ValueError(
            f"one figure shows one codebook size; got {', '.join(f'{size:,}' for size in sizes)}: "
            f"pass metrics[metrics.codebook_size == {sizes[-1]}]"
        )
