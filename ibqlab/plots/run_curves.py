"""One run while it trains: loss, usage, perplexity and PSNR against the step."""

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ibqlab.base.checks import is_finite_number
from ibqlab.plots.curves import scale_steps
from ibqlab.plots.style import (
    EACH_STEP,
    PAGE_WIDTH,
    TRAINING_COLOR,
    VALIDATION_LOOK,
    WINDOW,
    add_caption,
    fix_tick_size,
    styled_figure,
)

_COLUMNS = (
    *("step", "loss", "usage", "usage_tokens", "perplexity", "step_usage", "step_tokens"),
    *("validation_usage", "validation_perplexity", "validation_tokens", "validation_psnr"),
)
_TRAINING, _WINDOW, _STEP, _VALIDATION = "training", "training, window", "training, each step", "validation"
_LOOKS = {
    _TRAINING: {"color": TRAINING_COLOR, "linestyle": "-"},
    _WINDOW: {"color": TRAINING_COLOR, **WINDOW},
    _STEP: {"color": TRAINING_COLOR, **EACH_STEP},
    _VALIDATION: VALIDATION_LOOK,
}


def run_curve_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """The numbers behind `plot_run_curves`: the columns it draws, by step.

    Args:
        metrics: rows of one run as `Run.metrics` holds them; rows without validation, and a first row without a loss,
            are what a run logs.
    Returns:
        One row per logged step: step, loss, usage (share of codes hit in the training window of usage_tokens),
        perplexity (codes), step_usage (share hit by the step's own step_tokens), and validation_usage,
        validation_perplexity, validation_tokens, validation_psnr (dB); empty where a step did not measure.
    Raises:
        ValueError: no column "step", or no rows.
    """
    return metrics_by_step(metrics, _COLUMNS)


def metrics_by_step(metrics: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Some columns of a run's metrics as numbers, by step; empty where a step did not measure.

    Raises:
        ValueError: no column "step", or no rows.
    """
    if "step" not in metrics:
        raise ValueError(f"metrics need the column step; got {', '.join(map(str, metrics)) or 'no columns'}")
    if metrics.empty:
        raise ValueError("metrics hold no rows: train first; a run logs its first row at step 0")
    table = metrics.reindex(columns=list(columns)).map(_number)
    return table.astype(float).astype({"step": int}).sort_values("step")


def _number(value: object) -> float:
    """A logged value, NaN where it is no number: the files of others may hold anything."""
    return float(value) if is_finite_number(value) else math.nan


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
    table = run_curve_table(metrics)
    with styled_figure(PAGE_WIDTH, 4.6) as figure:
        loss, usage, perplexity, psnr = figure.subplots(2, 2, sharex=True).flat
        _draw(loss, table, "loss", _TRAINING)
        _draw(usage, table, "step_usage", _STEP, 100)
        for axes, measure, scale in ((usage, "usage", 100), (perplexity, "perplexity", 1)):
            _draw(axes, table, measure, _WINDOW, scale)
            _draw(axes, table, f"validation_{measure}", _VALIDATION, scale)
        _draw(psnr, table, "validation_psnr", _VALIDATION)
        loss.set(title="Loss, all terms weighted", ylabel="loss (no unit)")
        usage.set(title="Usage", ylabel="codes hit (%)", ylim=(-3, 103))
        perplexity.set(title="Perplexity", ylabel="perplexity (codes)", yscale="log", ylim=(0.8, _above(table)))
        perplexity.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else ""))
        perplexity.yaxis.set_minor_formatter(NullFormatter())
        psnr.set(title="Reconstruction", ylabel="PSNR (dB)")
        for axes in (loss, usage, perplexity, psnr):
            scale_steps(axes, table["step"])
            fix_tick_size(axes)
        for axes in (perplexity, psnr):
            axes.set_xlabel("training step")
        handles = {line.get_label(): line for axes in (loss, usage, psnr) for line in axes.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
        add_caption(figure, _caption(table))
    return figure


def _draw(axes: Axes, table: pd.DataFrame, measure: str, source: str, scale: int = 1) -> None:
    """What one source says of a measure, where it says anything."""
    measured = table.dropna(subset=[measure])
    if measured.empty:
        return
    validation = source == _VALIDATION
    axes.plot(
        measured["step"],
        measured[measure] * scale,
        **({} if validation else {"marker": "o" if len(measured) == 1 else None}),
        **_LOOKS[source],
        markersize=5,
        label=source,
    )


def _above(table: pd.DataFrame) -> float:
    """Upper end of the perplexity's axis; from 1 to there lies at least one decade."""
    highest = table[["perplexity", "validation_perplexity"]].max().max()
    return 12.0 if pd.isna(highest) else max(12.0, 1.5 * highest)


def _caption(table: pd.DataFrame) -> str:
    """The last step, and the tokens behind usage and perplexity."""
    columns = ("usage_tokens", "step_tokens", "validation_tokens")
    window, step, validation = (table[column].dropna() for column in columns)
    counted = []
    if len(window):
        grown = f" (at first {int(window.min()):,})" if window.min() < window.max() else ""
        counted.append(f"a window of the last {int(window.max()):,} training tokens{grown}")
    if len(step):
        counted.append(f"{int(step.max()):,} tokens of each step")
    if len(validation):
        counted.append(f"{int(validation.max()):,} validation tokens")
    tokens = f"; usage and perplexity over {', '.join(counted)}" if counted else ""
    return f"step {int(table['step'].max()):,}{tokens}"
