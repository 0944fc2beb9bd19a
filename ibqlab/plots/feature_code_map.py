"""The paper's figures 2 and 3 from runs: codes among features beside usage, and the gap between both through training.

Figure 6 is a map alone: `plot_code_maps`.
"""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ibqlab.base.measures import measure
from ibqlab.plots import steps, style
from ibqlab.plots.code_map import add_scale, draw_code_maps, map_handles
from ibqlab.plots.printing import PAGE_WIDTH, styled_figure

GAP_MEASURES = ("gradient_reach", "distribution_gap", "in_use_distance", "unused_distance")
"""Of `gap_curve_table`, in the order of the panels; the last two share one."""
_LINE = ("method", "init")
_USAGE = "validation_usage"


def usage_curve_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Usage on validation tokens through training, for `plot_maps_and_usage`.

    Args:
        metrics: rows of runs with step, method, init, seed, validation_usage, validation_tokens, codebook_size.
    Returns:
        One row per method, init and step with a validation: seeds, validation_usage_* (shares), validation_tokens,
        codebook_size.
    Raises:
        ValueError: a missing column, or no row with a validation.
    """
    style.require_columns(metrics, ("step", "seed", *_LINE, _USAGE, "codebook_size"), "a frame of metrics")
    measured = metrics.dropna(subset=[_USAGE])
    style.require_columns(measured, (_USAGE,), "a frame of metrics with validations")
    return steps.over_seeds(measured, _LINE, (_USAGE,), {"validation_tokens": "min", "codebook_size": "first"})


def plot_maps_and_usage(maps: pd.DataFrame, usage: pd.DataFrame, remark: str = "") -> Figure:
    """Codes among features after training, a map per method, and beside them usage through training (figure 2).

    Every map is a space of its own. Crosses away from the grey cloud are codes that the features have left behind.

    Args:
        maps: from `code_map_table`, of one or two panels.
        usage: from `usage_curve_table`, of the same methods.
        remark: one more line of the caption, such as how the paper's figure was made.
    Returns:
        The figure.
    Raises:
        ValueError: more than two maps, or a table without a column that it needs.
    """
    panels = maps["panel"].nunique()
    if panels > 2:
        raise ValueError(f"maps and usage stand in one row: pass at most two maps; got {panels}")
    looks = style.styles_for(style.in_order(usage["method"]))
    with styled_figure(PAGE_WIDTH, 4.5) as figure:
        *grid, curves = figure.subplots(1, panels + 1, width_ratios=[1.0] * panels + [1.05])
        caption = draw_code_maps(grid, maps, 3)
        if maps["hits"].notna().any():
            add_scale(figure, grid, maps, orientation="horizontal", location="bottom", aspect=40, shrink=0.7, pad=0.03)
        for number, (_, group) in enumerate(usage.groupby(list(_LINE), sort=False)):
            steps.draw_band(curves, group, _USAGE, _look(group, looks), number=number)
        steps.finish_panel(curves, measure("usage"), title="Usage through training")
        steps.finish_steps(curves, usage["step"])
        # As square as the maps beside it, and in line with them.
        curves.set_box_aspect(1)
        handles = map_handles(maps)
        handles += [Line2D([], [], markersize=4, label=look.label, **look.look) for look in _lines(usage, looks)]
        columns = style.even_columns(len(handles), 5)
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, handletextpad=0.5, columnspacing=1.2)
        tokens = steps.tokens_text(usage["validation_tokens"], "{} validation tokens")
        lines = [caption, f"usage over {tokens}; {style.seeds_text(usage['seeds'])}", remark]
        style.add_caption(figure, "\n".join(filter(None, lines)))
    return figure


def gap_curve_table(metrics: pd.DataFrame, gaps: pd.DataFrame) -> pd.DataFrame:
    """The numbers behind `plot_gap_curves`: mean and range over seeds, per method, start and step.

    Args:
        metrics: rows of runs with step, method, init, seed, codebook_size, code_dim and gradient_reach.
        gaps: one row per run and snapshot: step, method, init, seed, codebook_size, code_dim, features (how many), and
            the measures of `DistributionGap`.
    Returns:
        One row per method, init and step: seeds, *_mean, *_min and *_max of `GAP_MEASURES`, codebook_size, code_dim,
        features.
    Raises:
        ValueError: a missing column, or no snapshot.
    """
    style.require_columns(metrics, ("step", "seed", *_LINE, "gradient_reach"), "a frame of metrics")
    style.require_columns(gaps, ("step", "seed", *_LINE, *GAP_MEASURES[1:], "features"), "a table of gaps")
    keys = ["step", "seed", *_LINE, "codebook_size", "code_dim"]
    rows = metrics[[*keys, "gradient_reach"]].merge(gaps[[*keys, *GAP_MEASURES[1:], "features"]], how="outer", on=keys)
    # The merge sorts by step; lines keep the order of the runs.
    order = {pair: number for number, pair in enumerate(zip(*(metrics[key] for key in _LINE), strict=True))}
    rows = rows.assign(order=[order[pair] for pair in zip(*(rows[key] for key in _LINE), strict=True)])
    rows = rows.sort_values(["order", "seed", "step"], kind="stable")
    facts = {"codebook_size": "first", "code_dim": "first", "features": "min"}
    return steps.over_seeds(rows, _LINE, GAP_MEASURES, facts)


def plot_gap_curves(table: pd.DataFrame, remark: str = "") -> Figure:
    """Three panels against the training step: codes that gradient reaches, the gap between codes and features, and how
    far codes lie from their nearest feature (figure 3).

    The paper's figure draws the mechanism; this one measures it. Gap: 0 where codes and features have one distribution,
    1 where they are single points apart. Where few codes are reached and the gap grows, features have left codes
    behind. Where a method has several starts, each start has a row of panels: compare methods within a row.

    Args:
        table: from `gap_curve_table`.
        remark: one more line of the caption.
    Returns:
        The figure.
    """
    looks = style.styles_for(style.in_order(table["method"]))
    rows = steps.rows_by_start(table)
    with styled_figure(PAGE_WIDTH, 1.25 + steps.height_of_rows(rows)) as figure:
        for axes, part in steps.panels_by_start(figure, rows):
            _draw_row(axes, part, table, looks)
        handles = [
            Line2D([], [], markersize=5, linewidth=style.stacked_width(number), label=look.label, **look.look)
            for number, look in enumerate(looks.values())
        ]
        handles += [*steps.start_handles(list(dict.fromkeys(table["init"]))), *_state_handles()]
        columns = style.even_columns(len(handles), 4)
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=2.6, columnspacing=1.2)
        features = style.number_range(table["features"].dropna())
        lines = [
            f"{steps.sizes_text(table)}; gap and distances of each snapshot's whole codebook and {features} features; "
            f"{style.seeds_text(table['seeds'])}",
            "gap: energy distance over its largest value; distances over the features' spread around their mean; codes "
            "reached: gradient norm above 10⁻³ of the largest code's in that step",
            remark,
        ]
        style.add_caption(figure, "\n".join(filter(None, lines)))
    return figure


def _draw_row(
    panels: Sequence[Axes], part: pd.DataFrame, table: pd.DataFrame, looks: dict[str, style.LineStyle]
) -> None:
    """Reach, gap and distances of the methods of one start."""
    reach, gap, distance = panels
    for (method, _), group in part.groupby(list(_LINE), sort=False):
        look, number = _look(group, looks), list(looks).index(method)
        steps.draw_band(reach, group, "gradient_reach", look, number=number)
        steps.draw_band(gap, group, "distribution_gap", look, number=number)
        steps.draw_band(distance, group, "in_use_distance", look, number=number)
        steps.draw_band(distance, group, "unused_distance", replace(look, open_marker=True), number=number + 3)
    steps.finish_panel(reach, measure("gradient_reach"))
    steps.finish_panel(gap, measure("distribution_gap"))
    gap.set_ylim(-0.03, 1.03)
    steps.finish_panel(distance, measure("in_use_distance"), title="Codes to features", label="distance / spread")
    columns = [f"{name}_{end}" for name in GAP_MEASURES[2:] for end in ("min", "max")]
    values = table[columns].to_numpy(dtype=float)
    values = values[values > 0]
    if len(values):
        distance.set_yscale("log")
        distance.set_ylim(0.7 * values.min(), 1.4 * values.max())
        steps.write_numbers(distance.yaxis, "g")
        steps.divide_decades(distance)
    for axes in panels:
        steps.finish_steps(axes, table["step"])


def _look(group: pd.DataFrame, looks: dict[str, style.LineStyle]) -> style.LineStyle:
    """Colour and marker of a line's method, dashes of its start."""
    method, start = group["method"].iloc[0], group["init"].iloc[0]
    label = f"{looks[method].label} from {start}"
    return replace(looks[method], line=style.start_line(start), label=style.text_label(label))


def _lines(table: pd.DataFrame, looks: dict[str, style.LineStyle]) -> list[style.LineStyle]:
    return [_look(group, looks) for _, group in table.groupby(list(_LINE), sort=False)]


def _state_handles() -> list[Line2D]:
    """What filled and open markers of the last panel mean."""
    look = {"color": style.REFERENCE_GREY, "marker": "o", "linestyle": "", "markersize": 5}
    return [
        Line2D([], [], label="right: codes in use", **look),
        Line2D([], [], label="right: codes not hit", markerfacecolor="white", **look),
    ]
