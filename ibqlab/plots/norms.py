"""Where the choice is a softmax: norms of features and codes, how far that softmax is spread, reach, and usage.

A softmax over z·C decides as its features grow: while it is undecided all codes get gradients, once it has decided only
the chosen ones. The four panels share one clock, the forward pass of each step, and none has a memory. Which of them
changes first is not read off by eye: `ibqlab.studies.lead_lag` computes it over seeds.
"""

from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ibqlab.plots.curves import draw_band, scale_steps, spread_over_seeds, start_handles
from ibqlab.plots.style import (
    PAGE_WIDTH,
    LineStyle,
    add_caption,
    even_columns,
    fix_tick_size,
    start_line,
    styled_figure,
    styles_for,
    table_of,
)

MEASURES = ("usage", "step_usage", "gradient_reach", "feature_norm_mean", "code_norm_mean", "softmax_perplexity")
_COLUMNS = ("step", "row", "method", "seed", "codebook_size", "code_dim", *(m for m in MEASURES if m != "step_usage"))
SOFTMAX_METHODS = ("ibq", "soft_vq")
"""Methods that a softmax over z·C chooses for; of the others the second panel has no line."""


def norm_curve_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """The numbers behind `plot_norm_curves`: mean and range over seeds, per row and step.

    Args:
        metrics: one line per run and logged step with the columns step, row (its name in the legend), method, seed,
            codebook_size, code_dim, usage and gradient_reach (shares), feature_norm_mean, code_norm_mean and
            softmax_perplexity (codes); empty cells where a step did not measure. Optional, because older runs lack
            them: step_usage and step_tokens; and init, where the row's codebook started.
    Returns:
        One line per (row, step), rows in the order of first appearance, with method, seeds, codebook_size, code_dim,
        init where it was given, and *_mean, *_min, *_max of each measure.
    Raises:
        ValueError: a missing column, or no lines.
    """
    missing = [name for name in _COLUMNS if name not in metrics]
    if missing or metrics.empty:
        raise ValueError(
            f"metrics need lines with the columns {', '.join(_COLUMNS)}; "
            + (f"missing {', '.join(missing)}" if missing else "there are none: train at least one run")
        )
    metrics = metrics.reindex(columns=list(dict.fromkeys([*metrics, "step_usage", "step_tokens"])))
    groups = metrics.groupby(["row", "method", "step"], sort=False)
    table = spread_over_seeds(groups, MEASURES)
    for column in ("codebook_size", "code_dim", "usage_tokens", "step_tokens"):
        if column in metrics:
            table[column] = groups[column].max()
    if "init" in metrics:
        table["init"] = groups["init"].first()
    table = table.reset_index()
    order = {name: place for place, name in enumerate(metrics["row"].unique())}
    return table.sort_values(
        ["row", "step"], kind="stable", key=lambda column: column.map(order) if column.name == "row" else column
    ).reset_index(drop=True)


def plot_norm_curves(metrics: pd.DataFrame) -> Figure:
    """Four panels against the training step: norms, codes in the softmax, gradient reach, usage of each step's tokens.

    Runs without `step_usage` have the usage of the window of latest tokens, named as such: it falls late.
    Line: mean over seeds; band: lowest to highest seed. Thin lines in the first panel: norms of the codes. Colour,
    marker and width: row. Line style: start, where the table says it, as in every figure.

    Args:
        metrics: as for `norm_curve_table`, or what it returned.
    Returns:
        The figure; its numbers are `norm_curve_table(metrics)`.
    Raises:
        ValueError: as for `norm_curve_table`.
    """
    table = table_of(metrics, "usage_mean", norm_curve_table)
    styles = _row_styles(table)
    own = "step_usage_mean" in table and table["step_usage_mean"].notna().any()
    measure = "step_usage" if own else "usage"
    with styled_figure(PAGE_WIDTH, 5.2) as figure:
        (norms, spread), (reach, usage) = figure.subplots(2, 2)
        for place, (name, group) in enumerate(table.groupby("row", sort=False)):
            style = styles[name]
            draw_band(norms, group, "feature_norm_mean", 1, style, place=place)
            codes = group.dropna(subset=["code_norm_mean_mean"])
            norms.plot(
                codes["step"], codes["code_norm_mean_mean"], color=style.color, linestyle=style.line, linewidth=0.7
            )
            if group["method"].iloc[0] in SOFTMAX_METHODS:
                draw_band(spread, group, "softmax_perplexity", 1, style, place=place)
            draw_band(reach, group, "gradient_reach", 100, style, place=place)
            draw_band(usage, group, measure, 100, style, place=place)
        norms.set(title="Norm of features (thin: of codes)", ylabel="mean norm", yscale="log")
        spread.set(title="Codes in softmax(z·C)", ylabel="perplexity (codes)", yscale="log", ylim=(0.8, None))
        reach.set(title="Gradient reach", ylabel="codes reached (%)", ylim=(-3, 103))
        usage.set(
            title="Usage (each step's tokens)" if measure == "step_usage" else "Usage (window)",
            ylabel="codes hit (%)",
            ylim=(-3, 103),
        )
        for axes in (norms, spread):
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        for axes in (norms, spread, reach, usage):
            axes.set_xlabel("training step")
            scale_steps(axes, table["step"])
            fix_tick_size(axes)
        starts = list(dict.fromkeys(table["init"])) if "init" in table else []
        handles = [*usage.get_lines(), *start_handles(starts)]
        figure.legend(
            handles=handles, loc="outside upper center", ncols=even_columns(len(handles), 3), handlelength=2.8
        )
        sizes = [
            f"{letter} = {_listed(table[column])}"
            for letter, column in (("K", "codebook_size"), ("D", "code_dim"))
            if column in table
        ]
        seeds = int(table["seeds"].max())
        counted = _tokens(table, measure)
        over = "1 seed" if seeds == 1 else f"mean and range of {seeds} seeds"
        add_caption(figure, "; ".join(filter(None, [", ".join(sizes), counted and f"usage over {counted}", over])))
    return figure


def _row_styles(table: pd.DataFrame) -> dict[str, LineStyle]:
    """The look of each row: its method's, or a variant of it, with the line of its start."""
    styles = styles_for(list(table["row"].unique()))
    if "init" not in table:
        return styles
    starts = table.groupby("row")["init"].first()
    return {row: replace(style, line=start_line(starts[row])) for row, style in styles.items()}


def _tokens(metrics: pd.DataFrame, measure: str) -> str:
    """What a usage was counted on; "" where that was not recorded."""
    column = {"step_usage": "step_tokens", "usage": "usage_tokens"}[measure]
    counted = metrics[column].dropna() if column in metrics else pd.Series(dtype=float)
    if counted.empty:
        return ""
    words = "{} tokens of each step" if measure == "step_usage" else "the window of the last {} training tokens"
    return words.format(f"{int(counted.max()):,}")


def _listed(values: pd.Series) -> str:
    return " and ".join(f"{int(value):,}" for value in sorted(values.unique()))
