"""Where the choice is a softmax: norms of features and codes, how far that softmax is spread, reach, and usage.

A softmax over z·C decides as its features grow: while it is undecided all codes get gradients, once it has decided only
the chosen ones. The four panels share one clock, the forward pass of each step, and none has a memory. Which of them
changes first is not read off by eye: `ibqlab.studies.lead_lag` computes it over seeds.
"""

from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure

from ibqlab.base.measures import measure
from ibqlab.plots import steps, style
from ibqlab.plots.printing import PAGE_WIDTH, styled_figure

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
    style.require_columns(metrics, _COLUMNS, "a frame of metrics")
    # A column that older runs lack stays empty.
    metrics = metrics.reindex(columns=list(dict.fromkeys([*metrics, "step_tokens"])))
    facts = dict.fromkeys(("codebook_size", "code_dim", "usage_tokens", "step_tokens"), "max")
    return steps.over_seeds(metrics, ("row", "method"), MEASURES, facts | {"init": "first"})


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
    table = metrics if "usage_mean" in metrics else norm_curve_table(metrics)
    styles = _row_styles(table)
    has_steps = "step_usage_mean" in table and table["step_usage_mean"].notna().any()
    of_usage = "step_usage" if has_steps else "usage"
    with styled_figure(PAGE_WIDTH, 5.2) as figure:
        (norms, spread), (reach, usage) = figure.subplots(2, 2)
        panels = {"feature_norm_mean": norms, "softmax_perplexity": spread, "gradient_reach": reach, of_usage: usage}
        for number, (name, group) in enumerate(table.groupby("row", sort=False)):
            look = styles[name]
            codes = group.dropna(subset=["code_norm_mean_mean"])
            for key, axes in panels.items():
                if axes is not spread or group["method"].iloc[0] in SOFTMAX_METHODS:
                    steps.draw_band(axes, group, key, look, number=number)
            thin = {"color": look.color, "linestyle": look.line, "linewidth": 0.7}
            norms.plot(codes["step"], codes["code_norm_mean_mean"], **thin)
        quantity = measure("feature_norm")
        steps.finish_panel(norms, quantity, title=f"{quantity.panel_title} (thin: of codes)")
        norms.set_yscale("log")
        steps.write_numbers(norms.yaxis)
        steps.finish_panel(spread, measure("softmax_perplexity"), label=measure("perplexity").axis)
        steps.finish_panel(reach, measure("gradient_reach"))
        window = "" if has_steps else f"{measure('usage').panel_title} (window)"
        steps.finish_panel(usage, measure(of_usage), title=window)
        for axes in panels.values():
            steps.finish_steps(axes, table["step"])
        starts = list(dict.fromkeys(table["init"])) if "init" in table else []
        handles = [*usage.get_lines(), *steps.start_handles(starts)]
        columns = style.even_columns(len(handles), 3)
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=2.8)
        tokens_text = _tokens(table, of_usage)
        facts = [steps.sizes_text(table), tokens_text and f"usage over {tokens_text}", style.seeds_text(table["seeds"])]
        style.add_caption(figure, "; ".join(filter(None, facts)))
    return figure


def _row_styles(table: pd.DataFrame) -> dict[str, style.LineStyle]:
    """The look of each row: its method's, or a variant of it, with the line of its start."""
    styles = style.styles_for(list(table["row"].unique()))
    if "init" not in table:
        return styles
    starts = table.groupby("row")["init"].first()
    return {row: replace(look, line=style.start_line(starts[row])) for row, look in styles.items()}


def _tokens(metrics: pd.DataFrame, key: str) -> str:
    """What a usage was counted on; "" where that was not recorded."""
    column = measure(key).tokens
    token_counts = metrics[column].dropna() if column in metrics else pd.Series(dtype=float)
    if token_counts.empty:
        return ""
    words = "{} tokens of each step" if key == "step_usage" else "the window of the last {} training tokens"
    return words.format(f"{int(token_counts.max()):,}")
