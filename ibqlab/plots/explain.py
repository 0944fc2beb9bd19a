"""What explains a run's codebook: the band in which a softmax teaches, norms and drift, lives of codes, rarefaction.

Every figure is of one run. Grey: what training saw, and references; colour: the encoder's features against the codes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from ibqlab.base.measures import measure
from ibqlab.diagnostics.explain import BandPoint, Drift
from ibqlab.diagnostics.lifetimes import SurvivalPoint, rarefaction
from ibqlab.diagnostics.usage import even_usage
from ibqlab.plots import style
from ibqlab.plots.printing import PAGE_WIDTH, fix_tick_size, styled_figure
from ibqlab.plots.steps import (
    IN_PERCENT,
    divide_decades,
    draw_measured,
    finish_panel,
    finish_steps,
    metrics_by_step,
    say_empty,
    write_numbers,
)

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


def band_table(
    bands: Mapping[int, Sequence[BandPoint]], codebook_size: int, is_hypothetical: bool = False
) -> pd.DataFrame:
    """The numbers behind `plot_band`.

    Args:
        bands: step of a snapshot → what `logit_scale_band` gave for it.
        codebook_size: K.
        is_hypothetical: whether the run's own gradient goes another way than through a softmax over z·C.
    Returns:
        One row per step and scale: step, scale, softmax_perplexity, gradient_reach, tokens, codebook_size,
        is_hypothetical.
    """
    tables = [pd.DataFrame(points).assign(step=step, codebook_size=codebook_size) for step, points in bands.items()]
    return pd.concat(tables, ignore_index=True).assign(is_hypothetical=is_hypothetical)


def plot_band(table: pd.DataFrame) -> Figure:
    """Codes in the softmax, and reach, against a factor on z·C; a ring where the run itself stands.

    Left: codes in the softmax, K where all learn alike and none is singled out, 1 where only the chosen one learns.
    Right: the share of codes that the gradient of index backpropagation reaches; of a run that learns otherwise the
    title says that it is no measured reach. A run whose ring has slid down the curve has lost its codes'
    gradients; one whose ring is on the upper level tells no code apart.

    Args:
        table: from `band_table`.
    Returns:
        The figure.
    """
    size = int(table["codebook_size"].iloc[0])
    steps = sorted(table["step"].unique(), reverse=True)
    is_hypothetical = bool(table["is_hypothetical"].iloc[0])
    with styled_figure(PAGE_WIDTH, 3.0) as figure:
        panels = dict(zip(("softmax_perplexity", "gradient_reach"), figure.subplots(1, 2), strict=True))
        for key, axes in panels.items():
            quantity = measure(key)
            for step, color in zip(steps, _LATEST_FIRST, strict=False):
                rows = table[table["step"] == step].sort_values("scale")
                axes.plot(rows["scale"], rows[key] * quantity.scale, color=color, label=f"step {step:,}")
                own = rows[np.isclose(rows["scale"], 1)]
                ring = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.8}
                axes.plot(own["scale"], own[key] * quantity.scale, color=color, linestyle="", clip_on=False, **ring)
            axes.axvline(1, linewidth=0.8, **style.REFERENCE)
            finish_panel(axes, quantity, highest=size * 2.2 if key == "softmax_perplexity" else None)
            if is_hypothetical and key == "gradient_reach":
                axes.set_title("What index backpropagation would reach")
            axes.set(xscale="log", xlabel=f"factor on z·C (1: the run{'’s vectors' if is_hypothetical else ''})")
            write_numbers(axes.xaxis, "g")
        panels["softmax_perplexity"].axhline(size, linewidth=1, **style.REFERENCE)
        handles = panels["gradient_reach"].get_legend_handles_labels()[0]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        ring = (
            "the run's features and codes; its own gradient goes another way"
            if is_hypothetical
            else ("where the run stands")
        )
        style.add_caption(
            figure,
            f"K = {size:,}; {int(table['tokens'].iloc[0]):,} tokens; ring: {ring}; reach is of the gradient of "
            "‖z_q − z‖² by index backpropagation",
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
        if norms.get_lines():
            _logarithmic(norms)
        _draw_margins(margin, table)
        _draw_drift(drift, table)
        _draw_turnover(turnover, table)
        for axes in (norms, margin, drift, turnover):
            axes.set_xlim(*_padded(table["step"]))
            finish_steps(axes, table["step"], "training step" if axes in (drift, turnover) else "")
            if axes.get_lines() and axes is not margin:
                axes.legend(fontsize=style.CAPTION_SIZE)
        if not norms.get_lines():
            say_empty(norms, "The run logged no norms.")
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
    that keeps falling: codes go on dying. Codes that were never hit have no life to end, so a flat high curve does not
    mean that the codebook lives: the dotted line is the same count as a share of all codes.

    Args:
        table: from `survival_table`.
    Returns:
        The figure.
    """
    with styled_figure(PAGE_WIDTH * 0.62, 3.2) as figure:
        axes = figure.subplots()
        color = style.VALIDATION_LOOK["color"]
        lived, died, never = int(table["at_risk"].iloc[0]), int(table["deaths"].sum()), int(table["never"].iloc[0])
        low, high = (100 * table[side].astype(float).fillna(table["survival"]) for side in ("low", "high"))
        axes.fill_between(table["steps"], low, high, step="post", color=color, alpha=0.18, linewidth=0)
        label = f"of the {lived:,} that were hit"
        axes.step(table["steps"], 100 * table["survival"], where="post", color=color, label=label)
        if never:
            of_all = 100 * table["survival"] * lived / (lived + never)
            axes.step(table["steps"], of_all, where="post", label=f"of all {lived + never:,}", **style.REFERENCE)
            figure.legend(loc="outside upper center", ncols=2)
        axes.set(ylim=IN_PERCENT, xlabel="training steps since the first hit", ylabel="codes still alive (%)")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        fix_tick_size(axes)
        style.add_caption(
            figure,
            f"{lived:,} codes that were hit, {died:,} died; {never:,} never lived\n"
            "band: Greenwood's 95 % interval, as if codes died independently",
        )
    return figure


def rarefaction_table(counts: Mapping[str, Int[np.ndarray, "K"]], source: str = "validation tokens") -> pd.DataFrame:
    """The numbers behind `plot_rarefaction`.

    Args:
        counts: label → hits per code; labels without a hit are left out.
        source: what was counted, for the caption.
    Returns:
        One row per label and number of tokens: label, tokens, usage (expected), even (of even use), codebook_size,
        source.
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
    return pd.concat(parts, ignore_index=True).assign(source=source)


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
        figure.legend(loc="outside upper center", ncols=2)
        style.add_caption(
            figure,
            f"K = {int(table['codebook_size'].iloc[0]):,}; of {int(table['tokens'].max()):,} "
            f"{table['source'].iloc[0]}, drawn without replacement",
        )
    return figure


def _padded(steps: pd.Series) -> tuple[float, float]:
    """Ends of an axis of steps, the same for all panels, whichever steps have a value in each."""
    first, last = float(steps.min()), float(steps.max())
    gap = 0.03 * (last - first) or 0.5
    return first - gap, last + gap


def _draw_margins(axes: Axes, table: pd.DataFrame) -> None:
    """Both leads of the winner, each on a scale of its own."""
    near, logit = measure("winner_margin"), measure("logit_margin")
    finish_panel(axes, near, title="Lead of the winner", label=f"{near.title} (%)")
    if table[["winner_margin", "logit_margin"]].isna().all(axis=None):
        say_empty(axes, "The run logged no lead of the winner.")
        return
    draw_measured(axes, table, "winner_margin", label=f"{near.title} code", color=CODES["color"])
    # The upper third is the legend's.
    axes.set_ylim(IN_PERCENT[0], 1.45 * IN_PERCENT[1])
    axes.set_yticks(range(0, 101, 20))
    if table["logit_margin"].notna().any():
        beside = axes.twinx()
        beside.spines["right"].set_visible(True)
        beside.grid(visible=False)
        draw_measured(beside, table, "logit_margin", color=FEATURES["color"])
        beside.set_ylabel(logit.axis, color=FEATURES["color"])
        highest = float(table["logit_margin"].max())
        beside.set_ylim(-0.04 * highest, 1.5 * highest or 1)
        beside.set_yticks([tick for tick in beside.get_yticks() if 0 <= tick <= 1.02 * highest])
        fix_tick_size(beside)
        axes.plot([], [], color=FEATURES["color"], label=logit.title)
    axes.legend(loc="upper right", fontsize=style.CAPTION_SIZE)


def _draw_drift(axes: Axes, table: pd.DataFrame) -> None:
    """How far features, living and dead codes move per step; what stands still is named, since no logarithm has it."""
    axes.set(title="Drift between snapshots", ylabel="distance per step")
    fix_tick_size(axes)
    columns = [f"drift_{name}" for name in _DRIFT]
    highest = table[columns].max().max()
    if not highest > 0:
        has_any = table[columns].notna().any(axis=None)
        say_empty(axes, "Nothing moved between snapshots." if has_any else "Drift needs two snapshots.")
        return
    looks = zip(_DRIFT, (FEATURES, CODES, DEAD_CODES), ("features", "codes hit", "codes not hit"), strict=True)
    for name, look, label in looks:
        rows = table.dropna(subset=[f"drift_{name}"])
        still = " (stand still)" if len(rows) and not rows[f"drift_{name}"].any() else ""
        if len(rows):
            moved = rows[f"drift_{name}"].where(rows[f"drift_{name}"] > 0)
            axes.plot(rows["step"], moved, marker="o", markersize=3.5, label=f"{label}{still}", **look)
    _logarithmic(axes)
    # Slower ones would stretch the axis without end.
    lowest = table[columns].where(table[columns] > 0).min().min()
    axes.set_ylim(max(highest / _DECADES, lowest / 2), highest * 2)
    write_decades = LogLocator(subs=(1,)) if highest > 100 * lowest else LogLocator(subs=(1, 2, 5))
    axes.yaxis.set_major_locator(write_decades)


def _draw_turnover(axes: Axes, table: pd.DataFrame) -> None:
    """Codes born and died from row to row."""
    finish_panel(axes, measure("births"), title="Codes born and died, row to row", label="codes")
    if table[["births", "deaths"]].isna().all(axis=None):
        say_empty(axes, "The run logged no births and deaths:\nthey need two rows.")
        return
    # Where both are 0 the thin broken line lies on the broad one, and both show.
    births, deaths = {"color": "#009E73", "linewidth": 3.2}, {"color": "#000000", "linestyle": (0, (3, 2))}
    for key, look in (("births", births), ("deaths", deaths | {"linewidth": 1.3})):
        draw_measured(axes, table, key, label=measure(key).title, **look)
    highest = max(1.5, 1.2 * table[["births", "deaths"]].max().max())
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(-0.08, highest)
    axes.set_yticks([0, *_round_numbers(highest)])
    axes.yaxis.set_minor_locator(NullLocator())
    write_numbers(axes.yaxis, ",.0f")


def _round_numbers(highest: float) -> list[int]:
    """1, 2, 5, 10, 20, 50 … up to a number; of more than three decades the powers of ten alone."""
    decades = range(int(np.log10(highest)) + 1)
    steps = (1, 2, 5) if len(decades) <= 3 else (1,)
    return [step * 10**decade for decade in decades for step in steps if step * 10**decade <= highest]


def _logarithmic(axes: Axes) -> None:
    """A logarithmic upright axis with numbers written in full, several to a decade where it has few."""
    axes.set_yscale("log")
    write_numbers(axes.yaxis, "g")
    divide_decades(axes)
