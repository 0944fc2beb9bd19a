"""One run while it trains, a tokenizer's or a generator's: what it logs against the step."""

import math

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ibqlab.base.measures import is_measure, measure
from ibqlab.plots.printing import PAGE_WIDTH, styled_figure
from ibqlab.plots.steps import (
    draw_measured,
    finish_panel,
    finish_steps,
    metrics_by_step,
    say_empty,
    tokens_text,
    write_numbers,
)
from ibqlab.plots.style import EACH_STEP, TRAINING_COLOR, VALIDATION_LOOK, WINDOW, add_caption, number_range

_COLUMNS = (
    *("step", "loss", "usage", "usage_tokens", "perplexity", "step_usage", "step_tokens"),
    *("validation_usage", "validation_perplexity", "validation_tokens", "validation_psnr"),
)
_TRAINING = {"label": "training", "color": TRAINING_COLOR, "linestyle": "-"}
_WINDOW = {"label": "training, window", "color": TRAINING_COLOR, **WINDOW}
_STEP = {"label": "training, each step", "color": TRAINING_COLOR, **EACH_STEP}
_VALIDATION = {"label": "validation", **VALIDATION_LOOK}
_BY_AGE = {
    "validation_usage_old": {"label": "validation, old codes", "color": "#0072B2", "linestyle": "-", "marker": "s"},
    "validation_usage_new": {"label": "validation, new codes", "color": "#D55E00", "linestyle": "-", "marker": "^"},
}
"""Of a codebook that was grown, usage of the codes before and of those that were added."""
_LOSSES = {
    "loss": ("training", {"color": TRAINING_COLOR}),
    "validation_loss": ("validation, class given", VALIDATION_LOOK),
    "validation_loss_unconditional": (
        "validation, class unknown",
        {"color": "#8C6D31", "marker": "H", "markerfacecolor": "white"},
    ),
}
_GENERATOR_COLUMNS = ("step", *_LOSSES, "gradient_norm", "learning_rate", "validation_tokens")


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
    """Four panels against the training step: loss, usage, perplexity (log scale) and PSNR, of validation where it was
    measured there. A run without any PSNR has its gradient reach there, where that was measured.

    Grey: the training batches; thin: each step's own tokens; broad and pale: the window of latest tokens. Marked:
    validation images, at the steps that looked at them. The window falls late, because it remembers; the others do
    not. Of a grown codebook old and new codes have their own lines. Steps are on a logarithmic scale where the first
    ones were recorded. A codebook collapses where usage falls and stays down while the loss may still go on falling.

    Args:
        metrics: as for `run_curve_table`, of a run that may still be training, or what it returned.
    Returns:
        The figure; its numbers are `run_curve_table(metrics)`.
    Raises:
        ValueError: as for `run_curve_table`.
    """
    table = metrics_by_step(metrics, [*_COLUMNS, "psnr", "gradient_reach", *_BY_AGE])
    with styled_figure(PAGE_WIDTH, 4.6) as figure:
        loss, usage, perplexity, psnr = figure.subplots(2, 2, sharex=True).flat
        draw_measured(loss, table, "loss", **_TRAINING)
        draw_measured(usage, table, "step_usage", **_STEP)
        for axes, key in ((usage, "usage"), (perplexity, "perplexity")):
            draw_measured(axes, table, key, **_WINDOW)
            draw_measured(axes, table, f"validation_{key}", **_VALIDATION)
        for key, look in _BY_AGE.items():
            draw_measured(usage, table, key, **look)
        draw_measured(psnr, table, "psnr", **_TRAINING)  # somebody's own model, watched by a monitor
        draw_measured(psnr, table, "validation_psnr", **_VALIDATION)
        shown, heading = measure("psnr"), "Reconstruction"
        if not psnr.get_lines() and "validation_psnr" not in metrics:
            if table["gradient_reach"].notna().any():
                shown, heading = measure("gradient_reach"), ""
                draw_measured(psnr, table, "gradient_reach", **_STEP)
            else:
                say_empty(psnr, "The run measured no PSNR:\nit validates no images.")
        quantity = measure("loss")
        title, label = f"{quantity.panel_title}: weighted sum of its terms", f"{quantity.title} (no unit)"
        finish_panel(loss, quantity, title=title, label=label)
        finish_panel(usage, measure("usage"))
        # From 1 to the upper end lies at least one decade; `max` leaves NaN aside, where nothing was measured yet.
        highest = 1.5 * table[["perplexity", "validation_perplexity"]].max().max()
        finish_panel(perplexity, measure("perplexity"), highest=max(12.0, highest))
        finish_panel(psnr, shown, title=heading)
        for axes, label in ((loss, ""), (usage, ""), (perplexity, "training step"), (psnr, "training step")):
            finish_steps(axes, table["step"], label)
        handles = {line.get_label(): line for axes in (loss, usage, psnr) for line in axes.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
        add_caption(figure, _caption(table))
    return figure


def generator_curve_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """The numbers behind `plot_generator_curves`: the columns it draws, by step.

    Args:
        metrics: rows of one generator's run as `Run.metrics` holds them.
    Returns:
        One row per logged step: step; loss, validation_loss and validation_loss_unconditional (bits per token);
        gradient_norm (before it is clipped); learning_rate; validation_tokens; unit ("bits", of the losses). Empty
        where a step did not measure.
    Raises:
        ValueError: no column "step", or no rows.
    """
    table = metrics_by_step(metrics, _GENERATOR_COLUMNS)
    return table.assign(**{name: table[name] / math.log(2) for name in _LOSSES}, unit="bits")


def plot_generator_curves(metrics: pd.DataFrame) -> Figure:
    """Two panels against the training step: bits per token, and the gradient's length with the learning rate below.

    What the class is worth is the distance between both validation lines. Where validation turns up while training goes
    on falling, the generator has begun to learn its training images by heart.

    Args:
        metrics: as for `generator_curve_table`, of a run that may still be training, or what it returned.
    Returns:
        The figure; its numbers are `generator_curve_table(metrics)`.
    Raises:
        ValueError: as for `generator_curve_table`.
    """
    table = metrics if "unit" in metrics else generator_curve_table(metrics)
    with styled_figure(PAGE_WIDTH, 3.6) as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=(1.6, 1))
        loss = figure.add_subplot(grid[:, 0])
        norm, rate = (figure.add_subplot(grid[row, 1], sharex=loss) for row in range(2))
        for name, (label, look) in _LOSSES.items():
            draw_measured(loss, table, name, label=label, **look)
        draw_measured(norm, table, "gradient_norm", color=TRAINING_COLOR)
        draw_measured(rate, table, "learning_rate", color=TRAINING_COLOR)
        finish_panel(loss, measure("loss"), label=measure("bits_per_token").axis)
        finish_panel(norm, measure("gradient_norm"))
        finish_panel(rate, measure("learning_rate"))
        rate.set_ylim(0, None)
        write_numbers(rate.yaxis, "g")
        norm.tick_params(labelbottom=False)
        for axes in (loss, norm, rate):
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        for axes in (loss, rate):
            axes.set_xlabel("training step")
        if loss.get_lines():
            loss.legend()
        tokens = table["validation_tokens"].dropna()
        validation_text = f"; validation on {int(tokens.max()):,} tokens" if len(tokens) else ""
        add_caption(figure, f"step {int(table['step'].max()):,}{validation_text}")
    return figure


def _caption(table: pd.DataFrame) -> str:
    """The last step, and the tokens behind usage and perplexity."""
    window = table["usage_tokens"].dropna()
    token_texts = [tokens_text(window, "a window of the last {} training tokens")] if len(window) else []
    for column, words in (("step_tokens", "{} tokens of each step"), ("validation_tokens", "{} validation tokens")):
        if table[column].notna().any():
            token_texts.append(words.format(number_range(table[column].dropna())))
    tokens = f"; usage and perplexity over {', '.join(token_texts)}" if token_texts else ""
    return f"step {int(table['step'].max()):,}{tokens}"
