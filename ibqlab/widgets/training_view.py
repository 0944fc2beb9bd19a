"""Runs that train in processes of their own, watched and steered from a notebook."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
from matplotlib.figure import Figure

from ibqlab.base.escaping import for_html
from ibqlab.base.files import RunError
from ibqlab.base.measures import measure
from ibqlab.plots import plot_code_map, plot_run_curves, plot_usage_histogram, style
from ibqlab.plots.alarms import mark_alarms
from ibqlab.plots.printing import PAGE_WIDTH, styled_figure
from ibqlab.plots.steps import finish_steps
from ibqlab.studies.run_explanation import run_alarms
from ibqlab.views.training_process import TrainingProcess
from ibqlab.widgets.live import picture_html, with_static_page

EVERY = 2.0
"""Seconds between two looks at the run's folder."""
COMPARED = ("validation_usage", "step_usage", "perplexity", "gradient_reach", "loss")
"""Measures that several runs can be drawn together in."""


class TrainingView(ipywidgets.VBox):
    """One or several runs while they train: curves, hits per code and the map of the chosen one, and buttons.

    Training is a process of its own: the kernel stays free, and closing it or the browser loses nothing. Making the
    view again finds the run as it stands.

    Args:
        runs: run folders or names, or processes from `TrainingProcess.begin`; one or several.
        every: seconds between two looks at the folders, at least 0.2.
    Raises:
        FileNotFoundError, RunError: there is no such run.
    """

    def __init__(self, runs: Any, every: float = EVERY):
        if every < 0.2:
            raise ValueError(f"every is a time in seconds, at least 0.2; got {every}")
        several = runs if isinstance(runs, Sequence) and not isinstance(runs, str | Path) else [runs]
        made = [one if isinstance(one, TrainingProcess) else TrainingProcess(_path_of(one)) for one in several]
        if not made:
            raise ValueError("a view needs at least one run")
        self.processes = {process.path.name: process for process in made}
        self.every = every
        self.choice = ipywidgets.Dropdown(options=list(self.processes), description="run")
        self.measure = ipywidgets.Dropdown(
            options=[(measure(key).title, key) for key in COMPARED], description="compare by"
        )
        self.start, self.stop = (
            ipywidgets.Button(description=text, layout={"width": "auto"}) for text in ("▶ start", "⏸ pause")
        )
        self.start.on_click(lambda _: self._steer("start"))
        self.stop.on_click(lambda _: self._steer("stop"))
        self.said = ipywidgets.HTML()
        self.curves, self.pictures, self.together = (ipywidgets.HTML() for _ in range(3))
        for control in (self.choice, self.measure):
            control.observe(lambda _: self.refresh(force=True), names="value")
        many = [self.choice, self.measure] if len(made) > 1 else []
        row = ipywidgets.HBox([*many[:1], self.start, self.stop, *many[1:]], layout={"flex_flow": "row wrap"})
        super().__init__([row, self.said, self.together, self.curves, self.pictures])
        self.add_class("ibqlab-training")
        self._seen: Any = None
        self._watching: asyncio.Task | None = None
        self.refresh(force=True)
        self.watch()

    @property
    def process(self) -> TrainingProcess:
        """Of the run that is chosen."""
        return self.processes[self.choice.value]

    def watch(self) -> None:
        """Look at the folders again and again, in the kernel's own loop; without one, `refresh` does by hand."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if self._watching is None or self._watching.done():
            self._watching = loop.create_task(self._look())

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self.every)
            self.refresh()

    def refresh(self, force: bool = False) -> None:
        """Draw what is new in the folders; an error is shown in place of the picture."""
        try:
            self._refresh(force)
        except (RunError, FileNotFoundError, ValueError, KeyError) as error:
            self.said.value = f"<b>{for_html(error, None)}</b>"

    def static_html(self) -> str:
        """The pictures as they are shown now."""
        return f"<p>{self.said.value}</p>{self.together.value}{self.curves.value}{self.pictures.value}"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return with_static_page(super()._repr_mimebundle_(**kwargs), self.static_html())

    def _steer(self, what: str) -> None:
        try:
            getattr(self.process, what)()
        except (RunError, OSError) as error:
            self.said.value = f"<b>{for_html(error, None)}</b>"
            return
        self.refresh(force=True)

    def _refresh(self, force: bool) -> None:
        process = self.process
        run = process.run
        running, status = process.is_running, run.status
        self.start.disabled, self.stop.disabled = running or status == "finished", not running
        self.start.description = "▶ go on" if run.step else "▶ start"
        words = "starting …" if running and status != "running" else run.describe_status()
        if not running and status not in ("finished", "stopped") and (said := process.last_words()):
            words += f"; its last words: {said.splitlines()[-1]}"
        self.said.value = for_html(f"{run.name}: {words}", None)
        seen = self._state()
        if seen == self._seen and not force:
            return
        self._seen = seen
        metrics = run.metrics
        if len(metrics):
            figure = plot_run_curves(metrics)
            mark_alarms(figure, run_alarms(run)[0])
            self.curves.value = picture_html(figure, f"curves of {run.name} up to step {run.step}")
        else:
            self.curves.value = "curves appear with the first step"
        self.pictures.value = _snapshot_html(run)
        if len(self.processes) > 1:
            self.together.value = self._together_html()

    def _state(self) -> Any:
        """What the pictures depend on: how long the metrics are, and which snapshots there are."""
        sizes = []
        for process in self.processes.values():
            file = process.path / "metrics.jsonl"
            sizes.append((file.stat().st_size if file.is_file() else 0, len(process.run.snapshot_steps)))
        return self.choice.value, self.measure.value, tuple(sizes)

    def _together_html(self) -> str:
        curves = {name: process.run.metrics for name, process in self.processes.items()}
        figure = plot_runs_together(curves, self.measure.value)
        return picture_html(figure, f"{measure(self.measure.value).title} of {len(curves)} runs") if figure else ""


def plot_runs_together(metrics: dict[str, pd.DataFrame], key: str) -> Figure | None:
    """One measure of several runs against the step; None where none has it.

    Args:
        metrics: name → rows of a run.
        key: of the measure.
    """
    known = {name: rows.dropna(subset=[key]) for name, rows in metrics.items() if key in rows}
    known = {name: rows for name, rows in known.items() if len(rows)}
    if not known:
        return None
    quantity, looks = measure(key), style.styles_for(list(known))
    with styled_figure(PAGE_WIDTH, 2.6) as figure:
        axes = figure.subplots()
        for name, rows in known.items():
            axes.plot(
                rows["step"], rows[key] * quantity.scale, label=looks[name].label, markersize=3, **looks[name].look
            )
        axes.set_ylabel(quantity.axis)
        finish_steps(axes, pd.concat([rows["step"] for rows in known.values()]), "training step")
        axes.legend(fontsize=style.CAPTION_SIZE)
    return figure


def _snapshot_html(run: Any) -> str:
    """Hits per code and the map of the last snapshot, side by side."""
    if not run.snapshot_steps:
        return ""
    from ibqlab.views.map_data import map_run_codes  # noqa: PLC0415 - the view opens without scikit-learn
    from ibqlab.views.subject import open_subject  # noqa: PLC0415

    counts, step = run.snapshot()["counts"], run.snapshot_steps[-1]
    histogram = plot_usage_histogram({run.name: counts})
    parts = [f"<div>{picture_html(histogram, f'hits per code of {run.name}, step {step}')}</div>"]
    try:
        data = map_run_codes(open_subject(run))
        frame = len(data.steps) - 1
        figure = plot_code_map(data.projection, frame, data.counts(frame), f"{run.name}, step {data.steps[-1]:,}")
        parts.append(f"<div>{picture_html(figure, f'map of codes and features of {run.name}, step {step}')}</div>")
    except (RunError, ValueError) as error:
        parts.append(f"<div>{for_html(error, None)}</div>")
    return f'<div style="display:flex;flex-wrap:wrap">{"".join(parts)}</div>'


def _path_of(run: Any) -> Any:
    return getattr(run, "path", run)
