"""One run while it trains: loss, usage, perplexity and PSNR against the step."""

import pandas as pd
from matplotlib.figure import Figure

from ibqlab.base.measures import is_measure, measure
from ibqlab.plots.printing import PAGE_WIDTH, styled_figure
from ibqlab.plots.steps import draw_measured, finish_panel, finish_steps, metrics_by_step, tokens_text
from ibqlab.plots.style import EACH_STEP, TRAINING_COLOR, VALIDATION_LOOK, WINDOW, add_caption

_COLUMNS = (
    *("step", "loss", "usage", "usage_tokens", "perplexity", "step_usage", "step_tokens"),
    *("validation_usage", "validation_perplexity", "validation_tokens", "validation_psnr"),
)
_TRAINING = {"label": "training", "color": TRAINING_COLOR, "linestyle": "-"}
_WINDOW = {"label": "training, window", "color": TRAINING_COLOR, **WINDOW}
_STEP = {"label": "training, each step", "color": TRAINING_COLOR, **EACH_STEP}
_VALIDATION = {"label": "validation", **VALIDATION_LOOK}


def run_curve_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """The numbers behind `plot_run_curves`, and every further measure that the run logged, by step.

    Args:
        metrics: rows of one run as `Run.metrics` holds them; rows without validation, and a first row without a loss,
            are what a run logs.
    Returns:
        One row per logged step: step, loss, usage (share of codes hit in the training window of usage_tokens),
        perplexity (codes), step_usage (share hit by the step's own step_tokens), and validation_usage,
        validation_perplexity, validation_tokens, validation_psnr (dB); then what else `ibqlab.base.measures` lists.
        Empty where a step did not measure.
    Raises:
        ValueError: no column "step", or no rows.
    """
    return metrics_by_step(metrics, [*_COLUMNS, *(key for key in metrics if key not in _COLUMNS and is_measure(key))])


def plot_run_curves(metrics: pd.DataFrame) -> Figure:
    """Four panels against the training step: loss, usage, perplexity (log scale) and validation PSNR.

    Grey: the training batches; thin: each step's own tokens; broad and pale: the window of latest tokens. Marked:
    validation images, at the steps that looked at them. The window falls late, because it remembers; the others do
    not. Steps are on a logarithmic scale where the first ones were recorded. A codebook collapses where usage falls
    and stays down while the loss may still go on falling.

    Args:
        metrics: as for `run_curve_table`, of a run that may still be training, or what it returned.
    Returns:
        The figure; its numbers are `run_curve_table(metrics)`.
    Raises:
        ValueError: as for `run_curve_table`.
    """
    table = metrics_by_step(metrics, _COLUMNS)
    with styled_figure(PAGE_WIDTH, 4.6) as figure:
        loss, usage, perplexity, psnr = figure.subplots(2, 2, sharex=True).flat
        draw_measured(loss, table, "loss", **_TRAINING)
        draw_measured(usage, table, "step_usage", **_STEP)
        for axes, key in ((usage, "usage"), (perplexity, "perplexity")):
            draw_measured(axes, table, key, **_WINDOW)
            draw_measured(axes, table, f"validation_{key}", **_VALIDATION)
        draw_measured(psnr, table, "validation_psnr", **_VALIDATION)
        quantity = measure("loss")
        title, label = f"{quantity.panel_title}, all terms weighted", f"{quantity.title} (no unit)"
        finish_panel(loss, quantity, title=title, label=label)
        finish_panel(usage, measure("usage"))
        finish_panel(perplexity, measure("perplexity"), highest=_above(table))
        finish_panel(psnr, measure("psnr"), title="Reconstruction")
        for axes, label in ((loss, ""), (usage, ""), (perplexity, "training step"), (psnr, "training step")):
            finish_steps(axes, table["step"], label)
        handles = {line.get_label(): line for axes in (loss, usage, psnr) for line in axes.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
        add_caption(figure, _caption(table))
    return figure


def _above(table: pd.DataFrame) -> float:
    """Upper end of the perplexity's axis; from 1 to there lies at least one decade."""
    highest = table[["perplexity", "validation_perplexity"]].max().max()
    return 12.0 if pd.isna(highest) else max(12.0, 1.5 * highest)


def _caption(table: pd.DataFrame) -> str:
    """The last step, and the tokens behind usage and perplexity."""
    window = table["usage_tokens"].dropna()
    counted = [tokens_text(window, "a window of the last {} training tokens")] if len(window) else []
    for column, words in (("step_tokens", "{} tokens of each step"), ("validation_tokens", "{} validation tokens")):
        if table[column].notna().any():
            counted.append(words.format(f"{int(table[column].max()):,}"))
    tokens = f"; usage and perplexity over {', '.join(counted)}" if counted else ""
    return f"step {int(table['step'].max()):,}{tokens}"
