"""What a view of trainings shows: curves, hits per code and the map of one run, and a measure of several."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ibqlab.base.escaping import for_html
from ibqlab.base.files import RunError
from ibqlab.base.measures import measure
from ibqlab.diagnostics.alarm import AlarmEvent
from ibqlab.plots import plot_code_map, plot_generator_curves, plot_run_curves, plot_usage_histogram, style
from ibqlab.plots.alarms import mark_alarms
from ibqlab.plots.printing import PAGE_WIDTH, styled_figure
from ibqlab.plots.steps import finish_panel, finish_steps
from ibqlab.runs import Run
from ibqlab.runs.kinds import kind_of
from ibqlab.studies.run_explanation import run_alarms
from ibqlab.views.live_plane import LivePlane
from ibqlab.widgets.live import picture_html

_ALARMS_SHOWN = 3
_MOST_SNAPSHOTS_PLACED = 8
"""That a view which is opened late reads from before, evenly chosen."""
_ALARM = (
    '<div style="border-left: 4px solid #B00000; padding: 2px 8px; margin: 4px 0; max-width: 72em; line-height: 1.4">'
    "{}</div>"
)
_TEXT = '<div style="max-width: 34em; line-height: 1.4">{}</div>'


class RunPictures:
    """Pictures of one run; the plane of its map stays from one drawing to the next.

    Args:
        name: heading of the pictures; "": the run's own.
    """

    def __init__(self, name: str = ""):
        self.name = name
        self.plane = LivePlane()

    def curves(self, run: Run) -> str:
        """Its metrics against the step as HTML, alarms marked; a sentence before the first row."""
        metrics = run.metrics
        if not len(metrics):
            return "curves appear with the first step"
        if kind_of(run.config) == "generator":
            figure = plot_generator_curves(metrics)
        else:
            figure = plot_run_curves(metrics)
            mark_alarms(figure, run_alarms(run)[0])
        return picture_html(figure, f"curves of {self.name or run.name}, up to step {int(metrics['step'].max())}")

    def snapshot(self, run: Run) -> tuple[str, str]:
        """The map and the hits per code of the last snapshot as HTML; "" of a run that has none of them."""
        steps = run.snapshot_steps
        if kind_of(run.config) == "generator" or not steps:
            return "", ""
        name, last = self.name or run.name, steps[-1]
        counts = run.snapshot().get("counts")
        if counts is None:
            return "", f"<div>no hits per code: the snapshots of {for_html(name)} hold none</div>"
        histogram = picture_html(plot_usage_histogram({name: counts}), f"{name}, step {last}: hits per code")
        try:
            for step in _evenly([step for step in steps if step > (self.plane.steps or [-1])[-1]]):
                self.plane.add(step, run.snapshot(step))
            figure = plot_code_map(
                self.plane.projection, -1, counts, f"{name}, step {last:,}", most_hits=self.plane.most_hits
            )
        except (RunError, ValueError) as error:
            return f"<div>{for_html(error, None)}</div>", histogram
        # The figure's own caption speaks of a plane that is fitted to all snapshots.
        drawn = " ".join(figure.get_supxlabel().split()).partition("; drawn: ")[2]
        style.add_caption(figure, f"PCA of codes and features of step {self.plane.fitted_at:,}; drawn: {drawn}")
        code_map = picture_html(figure, f"{name}, step {last}: map of codes and features")
        return code_map + _TEXT.format(for_html(self.plane.describe(), None)), histogram


def alarms_html(events: Sequence[AlarmEvent]) -> str:
    """The latest alarms, each as the sentence that the run's own terminal shows; "" where there is none."""
    shown = "".join(_ALARM.format(for_html(event, None)) for event in events[-_ALARMS_SHOWN:])
    earlier = len(events) - _ALARMS_SHOWN
    return (f"<div>earlier alarms, marked in the curves: {earlier}</div>" if earlier > 0 else "") + shown


def together_html(runs: Mapping[str, Run], key: str) -> str:
    """One measure of several runs as a picture, or why there is none yet.

    Args:
        runs: name in the legend → run.
        key: of the measure.
    """
    curves = {name: run.metrics for name, run in runs.items()}
    figure = plot_runs_together(curves, key)
    if figure is None:
        return f"no run has measured {for_html(measure(key).title)} yet"
    last = max(int(rows["step"].max()) for rows in curves.values() if key in rows and len(rows))
    return picture_html(figure, f"{measure(key).title} of {len(curves)} runs, up to step {last}")


def plot_runs_together(metrics: Mapping[str, pd.DataFrame], key: str) -> Figure | None:
    """One measure of several runs against the step; None where none has it.

    Args:
        metrics: name → rows of a run. Names that begin with a method have its colour.
        key: of the measure.
    """
    known = {name: rows.dropna(subset=[key]) for name, rows in metrics.items() if key in rows}
    known = {name: rows for name, rows in known.items() if len(rows)}
    if not known:
        return None
    quantity, looks = measure(key), style.styles_for(list(known))
    with styled_figure(PAGE_WIDTH, 3.0) as figure:
        axes = figure.subplots()
        for name, rows in known.items():
            look: dict[str, Any] = dict(looks[name].look)
            if len(rows) > 1:
                look |= {"markevery": max(1, len(rows) // 8)}
            axes.plot(rows["step"], rows[key] * quantity.scale, label=looks[name].label, markersize=4, **look)
        finish_panel(axes, quantity)
        finish_steps(axes, pd.concat([rows["step"] for rows in known.values()]), "training step")
        figure.legend(loc="outside right upper", fontsize=style.CAPTION_SIZE)
    return figure


def _evenly(steps: Sequence[int]) -> list[int]:
    """At most so many of them, the first and the last among them."""
    if len(steps) <= _MOST_SNAPSHOTS_PLACED:
        return list(steps)
    last = len(steps) - 1
    return [steps[round(number * last / (_MOST_SNAPSHOTS_PLACED - 1))] for number in range(_MOST_SNAPSHOTS_PLACED)]
