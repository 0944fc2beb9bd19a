"""Collapse through training: usage, perplexity and gradient reach against the step."""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ibqlab.base.measures import measure
from ibqlab.diagnostics.usage import TOKENS_PER_CODE
from ibqlab.plots import steps, style
from ibqlab.plots.printing import PAGE_WIDTH, styled_figure

_WITHOUT_MEMORY = ("step_usage", "validation_usage", "validation_perplexity")
_BESIDE = {"step_usage": style.EACH_STEP, "usage": style.WINDOW}
"""Looks of the lines beside the marked ones of the first panel."""
_TOKENS = ("usage_tokens", "step_tokens", "validation_tokens")
_MEASURES = ("usage", "perplexity", "gradient_reach", *_WITHOUT_MEMORY)
_COLUMNS = ("step", "method", "seed", "init", *_MEASURES[:3], "usage_tokens", "codebook_size")


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
    style.require_columns(metrics, _COLUMNS, "a frame of metrics")
    sizes = sorted(metrics["codebook_size"].unique())
    if len(sizes) > 1:
        raise ValueError(
            f"one figure shows one codebook size; got {', '.join(f'{size:,}' for size in sizes)}: "
            f"pass metrics[metrics.codebook_size == {sizes[-1]}]"
        )
    # Columns that older runs lack stay empty.
    metrics = metrics.reindex(columns=list(dict.fromkeys([*metrics, *_TOKENS])))
    facts = {"step_tokens": "min", "validation_tokens": "min", "codebook_size": "first", "usage_tokens": "min"}
    return steps.over_seeds(metrics, ("method", "init"), _MEASURES, facts | {"code_dim": "max"})


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
    table = metrics if "usage_mean" in metrics else collapse_curve_table(metrics)
    # The CSV of an older version has no columns without memory.
    table = table.reindex(
        columns=list(dict.fromkeys([*table, *(f"{name}_mean" for name in _WITHOUT_MEMORY), *_TOKENS]))
    )
    styles = style.styles_for(style.in_order(table["method"]))
    rows = steps.rows_by_start(table)
    with styled_figure(PAGE_WIDTH, 1.1 + steps.height_of_rows(rows)) as figure:
        for axes, panel_rows in steps.panels_by_start(figure, rows):
            _draw_row(axes, panel_rows, table, styles)
        _add_legend(figure, table, styles, list(dict.fromkeys(table["init"])))
        style.add_caption(figure, _caption(table))
    return figure


def _draw_row(
    panels: Sequence[Axes], panel_rows: pd.DataFrame, table: pd.DataFrame, styles: dict[str, style.LineStyle]
) -> None:
    """Usage, perplexity and reach of the methods of one row of panels; `table` holds all rows."""
    size = int(table["codebook_size"].iloc[0])
    validated = table["validation_usage_mean"].notna().any()
    for axes, key in zip(panels, ("usage", "perplexity", "gradient_reach"), strict=True):
        column = f"validation_{key}" if validated and key != "gradient_reach" else key
        quantity = measure(key)
        for (method, init), group in panel_rows.groupby(["method", "init"], sort=False):
            look = replace(styles[method], line=style.start_line(init), label=style.text_label(f"{method}, {init}"))
            steps.draw_band(axes, group, column, look, number=list(styles).index(method))
        window = column == key and key != "gradient_reach"
        steps.finish_panel(
            axes,
            quantity,
            title=f"{quantity.panel_title} (window)" if window else "",
            highest=size * 2.2,
        )
        steps.finish_steps(axes, table["step"])
    _draw_beside(panels[0], panel_rows, _beside_measure(table), styles)
    _mark_even_use(panels[1], size)


def _beside_measure(table: pd.DataFrame) -> str:
    """What the lines beside the marked ones of the first panel show; "" where those show all there is."""
    if table["step_usage_mean"].notna().any():
        return "step_usage"
    return "usage" if table["validation_usage_mean"].notna().any() else ""


def _draw_beside(axes: Axes, panel_rows: pd.DataFrame, key: str, styles: dict[str, style.LineStyle]) -> None:
    """Usage of each step's own tokens, behind the validation's; of the window in runs that have none."""
    if not key:
        return
    for (method, _), group in panel_rows.dropna(subset=[f"{key}_mean"]).groupby(["method", "init"], sort=False):
        shares = group[f"{key}_mean"] * measure(key).scale
        axes.plot(group["step"], shares, color=styles[method].color, label="_beside", zorder=1.5, **_BESIDE[key])


def _mark_even_use(axes: Axes, size: int) -> None:
    """K as the line that even use of all codes would reach."""
    axes.axhline(size, linewidth=1, **style.REFERENCE)
    look = {"xycoords": ("axes fraction", "data"), "ha": "right", "color": style.REFERENCE_GREY}
    style.add_note(axes, f"even use of all {size:,}", (0.98, size), (0, 3), **look)


def _add_legend(figure: Figure, table: pd.DataFrame, styles: dict[str, style.LineStyle], starts: Sequence[str]) -> None:
    """Methods by colour, marker and width, starts by line style, and what the lines beside them are."""
    handles = [
        Line2D([], [], markersize=5, linewidth=style.stacked_width(number), label=look.label, **look.look)
        for number, look in enumerate(styles.values())
    ]
    handles += steps.start_handles(starts)
    beside = _beside_measure(table)
    if beside:
        label = "each step's tokens" if beside == "step_usage" else "window"
        handles.append(Line2D([], [], color=style.REFERENCE_GREY, label=label, **_BESIDE[beside]))
    columns = style.even_columns(len(handles), 6)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=2.6, columnspacing=1.2)


def _caption(table: pd.DataFrame) -> str:
    """Sizes, tokens and seeds: what a lone picture must say."""
    size = int(table["codebook_size"].iloc[0])
    beside, window = _beside_measure(table), "the window of the last {} training tokens"
    tokens_text = _tokens_text(table["usage_tokens"].dropna(), size, window)
    if table["validation_usage_mean"].notna().any():
        tokens_text = _tokens_text(table["validation_tokens"].dropna(), size, "{} validation tokens")
    behind = ""
    if beside:
        words, line_look = ("the step's own {} tokens", "thin") if beside == "step_usage" else (window, "broad pale")
        tokens = int(table[measure(beside).tokens].max())
        behind = f"{line_look} lines: usage over {words.format(f'{tokens:,}')}\n"
    return (
        f"{steps.sizes_text(table)}; usage and perplexity over {tokens_text}; {style.seeds_text(table['seeds'])}\n"
        f"{behind}codes reached: gradient norm above 10⁻³ of the largest code's in that step"
    )


def _tokens_text(tokens: pd.Series, size: int, words: str) -> str:
    """How many tokens a usage was counted on, with a word where they are too few for so many codes."""
    if tokens.empty:
        return "no tokens"
    few = tokens.max() < TOKENS_PER_CODE * size
    remark = f", fewer than 10·K = {TOKENS_PER_CODE * size:,}: reads low" if few else ""
    return steps.tokens_text(tokens, words) + remark
