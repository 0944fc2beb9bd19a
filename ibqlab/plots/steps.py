"""Panels against the training step: lines over seeds, the axis of steps, and how a panel looks for what it shows."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ibqlab.base.checks import is_finite_number
from ibqlab.base.measures import SHARE, Quantity, measure
from ibqlab.plots.printing import fix_tick_size
from ibqlab.plots.style import REFERENCE_GREY, LineStyle, add_note, stacked_width, start_line, text_label

IN_PERCENT = (-3, 103)
"""Ends of an axis of shares; lines at 0 and 100 % keep their width."""


def metrics_by_step(metrics: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Some columns of a run's metrics as numbers, by step; empty where a step did not measure.

    Raises:
        ValueError: no column "step", or no rows.
    """
    if "step" not in metrics:
        raise ValueError(f"metrics need the column step; got {', '.join(map(str, metrics)) or 'no columns'}")
    if metrics.empty:
        raise ValueError("metrics hold no rows: train first; a run logs its first row at step 0")
    # The files of others may hold anything.
    numbers = metrics.reindex(columns=list(columns)).map(lambda value: value if is_finite_number(value) else math.nan)
    return numbers.astype(float).astype({"step": int}).sort_values("step")


def over_seeds(
    metrics: pd.DataFrame, line: Sequence[str], measures: Sequence[str], facts: Mapping[str, str]
) -> pd.DataFrame:
    """Mean and range of measures over seeds, per line of a figure and step.

    Args:
        metrics: one row per run and logged step, with the columns step and seed.
        line: columns that tell lines apart; lines keep the order in which their values first appear.
        measures: columns; NaN where they are missing.
        facts: further column → how it is put together, such as "min"; left out where it is missing.
    Returns:
        One row per line and step: seeds (how many), *_mean, *_min, *_max, and the facts.
    """
    columns = {f"{name}_{statistic}": (name, statistic) for name in measures for statistic in ("mean", "min", "max")}
    columns |= {name: (name, how) for name, how in facts.items() if name in metrics}
    groups = metrics.reindex(columns=list(dict.fromkeys([*metrics, *measures]))).groupby([*line, "step"], sort=False)
    table = groups.agg(seeds=("seed", "nunique"), **columns).reset_index()
    orders = {column: {name: number for number, name in enumerate(metrics[column].unique())} for column in line}
    return table.sort_values(
        [*line, "step"],
        kind="stable",
        key=lambda values: values.map(orders[values.name]) if values.name in orders else values,
    ).reset_index(drop=True)


def draw_measured(axes: Axes, table: pd.DataFrame, key: str, **look: object) -> None:
    """One run's line through the steps that took a measure; a single point gets a marker."""
    rows = table.dropna(subset=[key])
    if rows.empty:
        return
    if look.get("marker") is None and len(rows) == 1:
        look["marker"] = "o"
    axes.plot(rows["step"], rows[key] * measure(key).scale, **look, markersize=5)


def draw_band(axes: Axes, group: pd.DataFrame, key: str, style: LineStyle, *, number: int = 0) -> None:
    """One line: the mean over seeds within their range.

    Args:
        axes: to draw on.
        group: of one line, as `over_seeds` makes it, with the column step.
        key: of the measure whose *_mean, *_min and *_max are drawn.
        style: of the line, and its name for legends.
        number: of the line in its panel. Later ones are thinner and set their markers elsewhere, so that lines
            which coincide show as stripes.
    """
    group = group.dropna(subset=[f"{key}_mean"])
    if group.empty:
        return
    low, mean, high = (group[f"{key}_{statistic}"] * measure(key).scale for statistic in ("min", "mean", "max"))
    axes.fill_between(group["step"], low, high, color=style.color, alpha=0.18, linewidth=0)
    every = max(1, len(group) // 5)
    axes.plot(
        group["step"],
        mean,
        linewidth=stacked_width(number),
        markersize=4,
        markevery=(number * every // 6 % every, every),
        label=style.label,
        **style.look,
    )


def finish_panel(
    axes: Axes, quantity: Quantity, *, title: str = "", label: str = "", highest: float | None = None
) -> None:
    """Title, label and scale of a panel's upright axis, from what it shows.

    Shares run from 0 to 100 %. A number of codes is logarithmic from 1 on, because collapse is a matter of decades.

    Args:
        axes: with its lines.
        quantity: what is drawn.
        title, label: in place of the quantity's heading and axis.
        highest: upper end of a logarithmic axis; None: the lines'.
    """
    axes.set(title=title or quantity.panel_title, ylabel=label or quantity.axis)
    if quantity.unit == SHARE:
        axes.set_ylim(IN_PERCENT)
    elif quantity.least == 1:
        axes.set_yscale("log")
        axes.set_ylim(0.8, highest)
        write_numbers(axes.yaxis)
        divide_decades(axes)
    fix_tick_size(axes)


def divide_decades(axes: Axes) -> None:
    """Marks at 1, 2 and 5 of each decade where a logarithmic upright axis holds fewer than two whole decades."""
    low, high = axes.get_ylim()
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def say_empty(axes: Axes, sentence: str) -> None:
    """Write into a panel without lines what it lacks; its upright axis would number nothing.

    Args:
        axes: of the panel.
        sentence: safe for matplotlib.
    """
    axes.set_yticks([])
    add_note(axes, sentence, (0.5, 0.5), (0, 0), xycoords="axes fraction", ha="center", va="center")


def write_numbers(axis: Axis, form: str = ",.10g") -> None:
    """Numbers beside an axis written in full: powers of ten are too small in print, and one above it is overlooked."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:{form}}"))
    axis.set_minor_formatter(NullFormatter())


def finish_steps(axes: Axes, steps: pd.Series, label: str = "training step") -> None:
    """The axis of training steps: logarithmic from step 1 on where steps below a hundredth of the last have a row."""
    axes.set_xlabel(label)
    positive = steps[steps > 0]
    if len(positive) and positive.min() * 100 <= positive.max():
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        axes.set_xlim(-0.15, positive.max() * 1.15)
        write_numbers(axes.xaxis, ",.0f")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))


def rows_by_start(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows of panels: one per start where a method has several, so that what a row compares began alike; else one.

    Args:
        table: with the columns method and init.
    Returns:
        Heading of a row → its part of the table; of a single row the heading is "".
    """
    if table.groupby("method")["init"].nunique().max() <= 1:
        return {"": table}
    return {f"all from {start}": table[table["init"] == start] for start in dict.fromkeys(table["init"])}


def height_of_rows(rows: Mapping[str, pd.DataFrame]) -> float:
    """Inches that such rows take, headings included."""
    return (2.2 if "" in rows else 2.45) * len(rows)


def panels_by_start(figure: Figure, rows: Mapping[str, pd.DataFrame]) -> Iterator[tuple[np.ndarray, pd.DataFrame]]:
    """The three axes of each row, under its heading, with its part of the table."""
    for row, (heading, part) in zip(np.atleast_1d(figure.subfigures(len(rows), 1)), rows.items(), strict=True):
        if heading:
            row.suptitle(text_label(heading), fontsize=10, fontweight="bold")
        yield row.subplots(1, 3), part


def start_handles(starts: Sequence[str]) -> list[Line2D]:
    """Legend entries that tell starts by their line style.

    Args:
        starts: as `START_LINES` calls them.
    """
    return [
        Line2D([], [], color=REFERENCE_GREY, linestyle=start_line(start), label=text_label(f"start {start}"))
        for start in starts
    ]


def sizes_text(table: pd.DataFrame) -> str:
    """Codebook sizes and dimensions for a caption: "K = 1,024, D = 16 and 64"."""
    columns = {"K": "codebook_size", "D": "code_dim"}
    texts = {
        letter: " and ".join(f"{int(value):,}" for value in sorted(table[column].unique()))
        for letter, column in columns.items()
        if column in table
    }
    return ", ".join(f"{letter} = {values}" for letter, values in texts.items())


def tokens_text(tokens: pd.Series, words: str) -> str:
    """How many tokens something was counted in, for a caption; a window is shorter at first.

    Args:
        tokens: per step, at least one.
        words: with {} for the number.
    """
    at_first = f" (at first {int(tokens.min()):,})" if tokens.min() < tokens.max() else ""
    return words.format(f"{int(tokens.max()):,}") + at_first
