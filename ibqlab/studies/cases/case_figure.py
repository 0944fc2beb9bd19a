"""Curves of a case: one panel per measure, one line per setting."""

import pandas as pd
from matplotlib.axes import Axes

from ibqlab.plots import steps, style
from ibqlab.plots.printing import PAGE_WIDTH, PrintFigure, fix_tick_size, styled_figure
from ibqlab.studies.cases.case import REPORTED, CaseMeasure, CaseResult

_REPORTED_COLOR = "#B00000"
"""Of the setting that shows the symptom; the same in every case."""


def case_table(result: CaseResult) -> pd.DataFrame:
    """The numbers behind `plot_case`: one row per setting and x.

    Returns:
        label, role, step (the x of the case), seeds, and *_mean, *_min and *_max of each measure that has a panel.
    """
    drawn = [measure.key for measure in result.case.measures if measure.drawn]
    curves = result.curves.rename(columns={"x": "step"})
    return steps.over_seeds(curves, ("label", "role"), drawn, {})


def plot_case(result: CaseResult) -> PrintFigure:
    """A panel per measure against the step, a line per setting; the one that was reported is red and thick.

    Lines are means over seeds, bands lowest to highest.

    Args:
        result: of a case's runs.
    Returns:
        The figure; its numbers are `case_table(result)`.
    """
    case, table = result.case, case_table(result)
    looks = style.styles_for([arm.label for arm in case.arms])
    drawn = [measure for measure in case.measures if measure.drawn]
    with styled_figure(PAGE_WIDTH, 3.1) as figure:
        for axes, measure in zip(figure.subplots(1, len(drawn), squeeze=False).flat, drawn, strict=True):
            for label, rows in table.groupby("label", sort=False):
                is_reported = rows["role"].iloc[0] == REPORTED
                _draw(axes, rows, measure, looks[label], is_reported)
            _finish(axes, measure, result)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        columns = style.even_columns(len(labels), 3)
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, handlelength=2.4, columnspacing=1.0)
        style.add_caption(figure, f"{case.setting} {style.seeds_text(table['seeds']).capitalize()}.")
    return figure


def _draw(axes: Axes, rows: pd.DataFrame, measure: CaseMeasure, look: style.LineStyle, is_reported: bool) -> None:
    """One setting's line within the range of its seeds."""
    rows = rows.dropna(subset=[f"{measure.key}_mean"])
    low, mean, high = (rows[f"{measure.key}_{statistic}"] * measure.scale for statistic in ("min", "mean", "max"))
    shown = look.look | ({"color": _REPORTED_COLOR, "markerfacecolor": _REPORTED_COLOR} if is_reported else {})
    label = f"{look.label} (as reported)" if is_reported else look.label
    axes.fill_between(rows["step"], low, high, color=shown["color"], alpha=0.15, linewidth=0)
    every = max(1, len(rows) // 6)
    axes.plot(
        *(rows["step"], mean),
        linewidth=2.4 if is_reported else 1.4,
        markersize=4,
        markevery=every,
        label=label,
        zorder=3 if is_reported else 2,
        **shown,
    )


def _finish(axes: Axes, measure: CaseMeasure, result: CaseResult) -> None:
    """Titles, scales, and the line that a measure is read against."""
    unit = measure.unit.strip()
    title = measure.title[:1].upper() + measure.title[1:]
    axes.set(title=title, ylabel=measure.axis or unit)
    highest = (result.curves[measure.key] * measure.scale).max()
    if unit == "%":
        # A few per cent would lie on the floor of a panel of 100 %.
        axes.set_ylim(steps.IN_PERCENT if highest > 20 else (-0.5, max(1.0, 1.1 * highest)))
    if measure.log:
        axes.set_yscale("log")
        steps.write_numbers(axes.yaxis)
    if measure.limit is not None:
        axes.axhline(measure.limit, linewidth=1, **style.REFERENCE)
        place = {"xycoords": ("axes fraction", "data"), "ha": "left", "color": style.REFERENCE_GREY}
        style.add_note(axes, measure.limit_text, (0.02, measure.limit), (0, 3), **place)
    x = result.curves["x"]
    if result.case.x_log:
        axes.set_xscale("log", base=2)
        steps.write_numbers(axes.xaxis, ",.0f")
        axes.set_xlabel(result.case.x_title)
    else:
        steps.finish_steps(axes, x, result.case.x_title)
    if result.case.epochs:
        end = result.steps / result.case.epochs
        axes.axvline(end, linewidth=1, **style.REFERENCE)
        place = {"xycoords": ("data", "axes fraction"), "ha": "right", "color": style.REFERENCE_GREY}
        style.add_note(axes, "epoch one ends", (end, 0.03), (-3, 0), **place)
    fix_tick_size(axes)
