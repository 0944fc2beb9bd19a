"""What explains a run's codebook: the band in which a softmax teaches, norms and drift, lives of codes, rarefaction.

Every figure is of one run. Grey: what training saw, and references; colour: the encoder's features against the codes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ibqlab.base.measures import measure
from ibqlab.diagnostics.explain import BandPoint, Drift
from ibqlab.diagnostics.lifetimes import SurvivalPoint, rarefaction
from ibqlab.diagnostics.usage import even_usage
from ibqlab.plots import style
from ibqlab.plots.printing import PAGE_WIDTH, fix_tick_size, styled_figure
from ibqlab.plots.steps import IN_PERCENT, draw_measured, finish_panel, finish_steps, metrics_by_step, write_numbers

FEATURES = {"color": "#D55E00", "linestyle": "-"}
"""Of what is the encoder's."""
CODES = {"color": "#0072B2", "linestyle": "-"}
"""Of what is the codebook's."""
DEAD_CODES = {"color": "#0072B2", "linestyle": (0, (3, 1.5)), "linewidth": 1.1}
_NORMS = ("feature_norm_mean", "feature_norm_std", "code_norm_mean", "code_norm_std")
_EXPLAINING = (*_NORMS, "winner_margin", "logit_margin", "code_drift", "births", "deaths")
_DRIFT = ("features", "living_codes", "dead_codes")
_DECADES = 1e4
"""From the lower end of the axis of drift to the upper one."""
_LATEST_FIRST = (style.VALIDATION_LOOK["color"], style.REFERENCE_GREY, "#B8B8B8")


def band_table(bands: Mapping[int, Sequence[BandPoint]], codebook_size: int) -> pd.DataFrame:
    """The numbers behind `plot_band`.

    Args:
        bands: step of a snapshot → what `logit_scale_band` gave for it.
        codebook_size: K.
    Returns:
        One row per step and scale: step, scale, softmax_perplexity, gradient_reach, tokens, codebook_size.
    """
    tables = [pd.DataFrame(points).assign(step=step, codebook_size=codebook_size) for step, points in bands.items()]
    return pd.concat(tables, ignore_index=True)


def plot_band(table: pd.DataFrame) -> Figure:
    """Codes in the softmax, and reach, against a factor on z·C; a ring where the run itself stands.

    Left: codes in the softmax, K where all learn alike and none is singled out, 1 where only the chosen one learns.
    Right: the share of codes that the gradient reaches. A run whose ring has slid down the curve has lost its codes'
    gradients; one whose ring is on the upper level tells no code apart.

    Args:
        table: from `band_table`.
    Returns:
        The figure.
    """
    size = int(table["codebook_size"].iloc[0])
    steps = sorted(table["step"].unique(), reverse=True)
    with styled_figure(PAGE_WIDTH, 3.0) as figure:
        panels = dict(zip(("softmax_perplexity", "gradient_reach"), figure.subplots(1, 2), strict=True))
        for key, axes in panels.items():
            quantity = measure(key)
            for step, color in zip(steps, _LATEST_FIRST, strict=False):
                rows = table[table["step"] == step].sort_values("scale")
                axes.plot(rows["scale"], rows[key] * quantity.scale, color=color, label=f"step {step:,}")
                own = rows[np.isclose(rows["scale"], 1)]
                ring = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.8}
                axes.plot(own["scale"], own[key] * quantity.scale, color=color, linestyle="", **ring)
            axes.axvline(1, linewidth=0.8, **style.REFERENCE)
            finish_panel(axes, quantity, highest=size * 2.2 if key == "softmax_perplexity" else None)
            axes.set(xscale="log", xlabel="factor on z·C (1: the run)")
            write_numbers(axes.xaxis, "g")
        panels["softmax_perplexity"].axhline(size, linewidth=1, **style.REFERENCE)
        handles = panels["gradient_reach"].get_legend_handles_labels()[0]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        style.add_caption(
            figure,
            f"K = {size:,}; {int(table['tokens'].iloc[0]):,} tokens; ring: where the run stands; reach is of "
            "the gradient of ‖z_q − z‖² by index backpropagation, whatever the run's own estimator",
        )
    return figure


def explanation_table(metrics: pd.DataFrame, drifts: Sequence[Drift] = ()) -> pd.DataFrame:
    """The numbers behind `plot_explanation`, by step.

    Args:
        metrics: rows of one run as `Run.metrics` holds them.
        drifts: from `measure_drift`, of the run's snapshots.
    Returns:
        One row per step with the columns that the run logged among norms, margins, code_drift, births and deaths; and
        drift_features, drift_living_codes, drift_dead_codes per step, between a snapshot and the one before.
    Raises:
        ValueError: no column "step", or no rows.
    """
    table = metrics_by_step(metrics, ("step", *_EXPLAINING))
    moved = pd.DataFrame(drifts, columns=list(Drift._fields)).set_index("step")[list(_DRIFT)].add_prefix("drift_")
    return table.merge(moved.astype(float), how="left", left_on="step", right_index=True)


def plot_explanation(table: pd.DataFrame) -> Figure:
    """Four panels against the training step: norms, margin of the winner, drift, codes born and died.

    Norms: mean within one spread; under a softmax over z·C trouble begins where features reach the codes' norm. Margin:
    how sure the choice is. Drift: codes that lie below the features' line are left behind, which dead ones mostly are.
    Births and deaths: codes that the window of latest tokens gains and loses from row to row.

    Args:
        table: from `explanation_table`.
    Returns:
        The figure; panels of what the run did not log say so.
    """
    with styled_figure(PAGE_WIDTH, 5.0) as figure:
        (norms, margin), (drift, turnover) = figure.subplots(2, 2)
        for key, look in (("feature_norm", FEATURES), ("code_norm", CODES)):
            rows = table.dropna(subset=[f"{key}_mean"])
            mean, spread = rows[f"{key}_mean"], rows[f"{key}_std"].fillna(0)
            low = (mean - spread).where(mean > spread, mean / 10)
            norms.fill_between(rows["step"], low, mean + spread, color=look["color"], alpha=0.15, linewidth=0)
            draw_measured(norms, table, f"{key}_mean", label=f"{measure(key).title.removeprefix('norm of ')}", **look)
        finish_panel(norms, measure("feature_norm"), title="Norms")
        _logarithmic(norms)
        _draw_margins(margin, table)
        looks = zip(_DRIFT, (FEATURES, CODES, DEAD_CODES), ("features", "codes hit", "codes not hit"), strict=True)
        for name, look, label in looks:
            rows = table.dropna(subset=[f"drift_{name}"])
            if len(rows):
                drift.plot(rows["step"], rows[f"drift_{name}"], marker="o", markersize=3.5, label=label, **look)
        drift.set(title="Drift between snapshots", ylabel="distance per step")
        fix_tick_size(drift)
        highest = table[[f"drift_{name}" for name in _DRIFT]].max().max()
        if highest > 0:
            _logarithmic(drift)
            # What stands still would stretch the axis without end.
            drift.set_ylim(highest / _DECADES, highest * 2)
        for key, color in (("births", "#009E73"), ("deaths", "#000000")):
            draw_measured(turnover, table, key, label=measure(key).title, color=color)
        finish_panel(turnover, measure("births"), title="Codes born and died, row to row", label="codes")
        turnover.set_yscale("symlog", linthresh=1)
        turnover.set_ylim(0, None)
        write_numbers(turnover.yaxis, ",.0f")
        for axes in (norms, margin, drift, turnover):
            finish_steps(axes, table["step"], "training step" if axes in (drift, turnover) else "")
            if axes.get_lines():
                axes.legend(fontsize=style.CAPTION_SIZE)
            else:
                style.add_note(axes, "not recorded", (0.5, 0.5), (0, 0), xycoords="axes fraction", ha="center")
        moved = {name for name in _DRIFT if table[f"drift_{name}"].notna().any()}
        of = "all codes"
        if "features" in moved:
            of = "the features of fixed images and of all codes"
        elif moved:
            of += "; that of the features needs the same images at each snapshot: monitor.update(…, probe=features)"
        style.add_caption(
            figure,
            f"step {int(table['step'].max()):,}; norms: mean within one spread of the probe tokens; drift of {of}",
        )
    return figure


def survival_table(points: Sequence[SurvivalPoint], never: int) -> pd.DataFrame:
    """The numbers behind `plot_survival`: steps, at_risk, deaths, survival, low, high; never (codes without a hit)."""
    return pd.DataFrame(points).assign(never=never)


def plot_survival(table: pd.DataFrame) -> Figure:
    """Share of codes that live longer than so many steps after their first hit, with Greenwood's 95 % interval.

    A curve that falls at once and then stays: collapse is decided in the first steps, and what is left lives on. One
    that keeps falling: codes go on dying.

    Args:
        table: from `survival_table`.
    Returns:
        The figure.
    """
    with styled_figure(PAGE_WIDTH * 0.62, 3.0) as figure:
        axes = figure.subplots()
        color = style.VALIDATION_LOOK["color"]
        low, high = (100 * table[side].astype(float).fillna(table["survival"]) for side in ("low", "high"))
        axes.fill_between(table["steps"], low, high, step="post", color=color, alpha=0.18, linewidth=0)
        axes.step(table["steps"], 100 * table["survival"], where="post", color=color)
        axes.set(ylim=IN_PERCENT, xlabel="training steps since the first hit", ylabel="codes still alive (%)")
        fix_tick_size(axes)
        lived, died = int(table["at_risk"].iloc[0]), int(table["deaths"].sum())
        style.add_caption(
            figure,
            f"{lived:,} codes that were hit, {died:,} died; {int(table['never'].iloc[0]):,} never lived\n"
            "band: Greenwood's 95 % interval, as if codes died independently",
        )
    return figure


def rarefaction_table(counts: Mapping[str, Int[np.ndarray, "K"]]) -> pd.DataFrame:
    """The numbers behind `plot_rarefaction`.

    Args:
        counts: label → hits per code; labels without a hit are left out.
    Returns:
        One row per label and number of tokens: label, tokens, usage (expected), even (of even use), codebook_size.
    """
    parts = []
    for label, hits in counts.items():
        if hits.sum():
            tokens, usage = rarefaction(hits)
            even = [even_usage(len(hits), int(number)) for number in tokens]
            parts.append(
                pd.DataFrame(
                    {"label": label, "tokens": tokens, "usage": usage, "even": even, "codebook_size": len(hits)}
                )
            )
    if not parts:
        raise ValueError("no token was counted, so there is no usage to expect")
    return pd.concat(parts, ignore_index=True)


def plot_rarefaction(table: pd.DataFrame) -> Figure:
    """Usage to expect from fewer tokens than were counted, against even use of all codes.

    A curve that still rises at its end has not seen all codes that are in use: with more tokens its usage would be
    higher. A flat one has, and the codes it misses are dead.

    Args:
        table: from `rarefaction_table`.
    Returns:
        The figure.
    """
    with styled_figure(PAGE_WIDTH * 0.62, 3.2) as figure:
        axes = figure.subplots()
        quantity = measure("usage")
        labels = list(dict.fromkeys(table["label"]))
        for number, (label, color) in enumerate(zip(labels[::-1], _LATEST_FIRST, strict=False)):
            rows, width = table[table["label"] == label], style.stacked_width(4 - 2 * number)
            look = {"color": color, "linewidth": width, "zorder": 2 - 0.1 * number}
            axes.plot(rows["tokens"], quantity.scale * rows["usage"], label=style.text_label(label), **look)
        longest = table[table["label"] == labels[-1]]
        axes.plot(longest["tokens"], quantity.scale * longest["even"], label="even use", **style.REFERENCE)
        finish_panel(axes, quantity, title="")
        axes.set(xscale="log", xlabel="tokens looked at")
        write_numbers(axes.xaxis, ",.0f")
        axes.legend(loc="upper left")
        style.add_caption(
            figure,
            f"K = {int(table['codebook_size'].iloc[0]):,}; of {int(table['tokens'].max()):,} validation tokens, drawn "
            "without replacement",
        )
    return figure


def _draw_margins(axes: Axes, table: pd.DataFrame) -> None:
    """Both leads of the winner, each on a scale of its own."""
    near, logit = measure("winner_margin"), measure("logit_margin")
    draw_measured(axes, table, "winner_margin", label=f"{near.title} code", color=CODES["color"])
    finish_panel(axes, near, title="Lead of the winner", label=f"{near.title} (%)")
    if table["logit_margin"].notna().any():
        beside = axes.twinx()
        beside.spines["right"].set_visible(True)
        beside.grid(visible=False)
        draw_measured(beside, table, "logit_margin", color=FEATURES["color"])
        beside.set_ylabel(logit.axis, color=FEATURES["color"])
        beside.set_ylim(0, None)
        fix_tick_size(beside)
        axes.plot([], [], color=FEATURES["color"], label=logit.title)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic upright axis with numbers written in full, several to a decade where it has few."""
    axes.set_yscale("log")
    write_numbers(axes.yaxis, "g")
    low, high = axes.get_ylim()
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
