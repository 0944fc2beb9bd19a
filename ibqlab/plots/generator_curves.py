"""One generator's run while it trains: loss with and without the class, gradient length, learning rate."""

import math

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ibqlab.base.measures import measure
from ibqlab.plots.printing import PAGE_WIDTH, styled_figure
from ibqlab.plots.steps import draw_measured, finish_panel, metrics_by_step, write_numbers
from ibqlab.plots.style import TRAINING_COLOR, VALIDATION_LOOK, add_caption, table_of

_LOSSES = {
    "loss": ("training", {"color": TRAINING_COLOR}),
    "validation_loss": ("validation, class given", VALIDATION_LOOK),
    "validation_loss_unconditional": (
        "validation, class unknown",
        {"color": "#8C6D31", "marker": "H", "markerfacecolor": "white"},
    ),
}
_COLUMNS = ("step", *_LOSSES, "gradient_norm", "learning_rate", "validation_tokens")


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
    table = metrics_by_step(metrics, _COLUMNS)
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
    table = table_of(metrics, "unit", generator_curve_table)
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
        add_caption(figure, _caption(table))
    return figure


def _caption(table: pd.DataFrame) -> str:
    """The last step, and the tokens behind the validation."""
    tokens = table["validation_tokens"].dropna()
    counted = f"; validation on {int(tokens.max()):,} tokens" if len(tokens) else ""
    return f"step {int(table['step'].max()):,}{counted}"
