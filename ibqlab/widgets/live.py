"""Curves of a run that grow while it trains, and how all widgets show pictures in a page."""

import base64
import html
import time
from typing import Any

import pandas as pd

from ibqlab.diagnostics.alarm import AlarmEvent
from ibqlab.notebooks.results import text_of
from ibqlab.plots import plot_generator_curves, plot_run_curves
from ibqlab.plots.alarms import mark_alarms
from ibqlab.plots.printing import PrintFigure
from ibqlab.training import GeneratorTrainConfig, TrainConfig

_SHARE_OF_TIME = 0.125
"""Of the time that training takes, spent on drawing at most: a picture of 0.2 s every 2 s or so."""


class LivePicture:
    """An output of a notebook whose content changes in place; no widget, so that a saved notebook keeps the last one.

    Args:
        text: what stands there until there is a picture.
    """

    def __init__(self, text: str):
        self.value = html.escape(text)
        """What is shown, as HTML."""
        self._data = {"text/plain": text}
        self._outputs: list[Any] = []

    def show(self, figure: PrintFigure, description: str) -> None:
        """Show a figure instead, wherever this is displayed.

        Args:
            figure: from a plot function; shown as PNG.
            description: for readers who do not see the picture.
        """
        self.value = picture_html(figure, description)
        png = self.value.rpartition("base64,")[2].removesuffix('">')
        self._data = {"text/html": self.value, "image/png": png, "text/plain": description}
        for output in self._outputs:
            output.update(self._data, raw=True)

    def _ipython_display_(self) -> None:
        from IPython.display import display  # noqa: PLC0415 - whoever displays this has it

        self._outputs.append(display(self._data, raw=True, display_id=True))


class LiveCurves:
    """Curves of one run, redrawn while it trains: `train(config, path, watch=live)`.

    Of a tokenizer's run loss, usage, perplexity and PSNR; of a generator's, loss, gradient and learning rate.
    What the alarm finds is marked at its step.

    The picture is drawn at most every `every` seconds, and less often where drawing would take more than an eighth of
    the time; and once more when training ends, however it ends. It shows what was logged since this object was made: a
    run that is continued begins in the middle, a finished one shows nothing. `plot_run_curves(run.metrics)` draws any
    run from its folder.

    Args:
        config: of the run; the step axis then reaches to its last step from the beginning. None: a tokenizer's.
        every: least time between two drawings, seconds, ≥ 0.
    Raises:
        ValueError: a negative time.
    """

    def __init__(self, config: TrainConfig | GeneratorTrainConfig | None = None, *, every: float = 2.0):
        if every < 0:
            raise ValueError(f"every is a time in seconds and must be ≥ 0; got {every}")
        self.config, self.every = config, every
        self.of_generator = isinstance(config, GeneratorTrainConfig)
        self.rows: list[dict[str, Any]] = []
        self.alarms: list[AlarmEvent] = []
        self.widget = LivePicture("curves appear with the first step; a run that was finished before logs none")
        """The picture, to be displayed in a notebook before training begins."""
        self._due = 0.0
        self._drawn = 0

    def __call__(self, row: dict[str, Any]) -> None:
        """Take in a row of metrics, and redraw if it is time or the last step.

        Args:
            row: "step" and named numbers, as a run logs them.
        """
        self.rows.append(dict(row))
        began = time.monotonic()
        last = self.config is not None and row["step"] >= self.config.steps
        if began < self._due and not last:
            return
        self._show()
        ended = time.monotonic()
        self._due = ended + max(self.every, (ended - began) / _SHARE_OF_TIME)

    def alarm(self, event: AlarmEvent) -> None:
        """Take in an event of the alarm, which the next picture marks."""
        self.alarms.append(event)

    def finish(self) -> None:
        """Draw what was logged since the last drawing; training calls this when it ends, also when it is stopped."""
        if len(self.rows) > self._drawn:
            self._show()

    def _show(self) -> None:
        """Draw what was logged and put it into the notebook's output."""
        if self.of_generator:
            plot, description = plot_generator_curves, "loss, gradient and learning rate"
        else:
            plot, description = plot_run_curves, "loss, usage, perplexity and PSNR"
        figure = plot(pd.DataFrame(self.rows))
        if self.config is not None:
            for axes in figure.axes:
                logarithmic = axes.get_xscale() != "linear"
                axes.set_xlim(-0.15 if logarithmic else -0.02 * self.config.steps, 1.02 * self.config.steps)
        mark_alarms(figure, self.alarms)
        titles = f", alarms: {', '.join(event.title for event in self.alarms)}" if self.alarms else ""
        step = self.rows[-1]["step"]
        self.widget.show(figure, f"{description} against the step{titles}, up to step {step}")
        self._drawn = len(self.rows)


def picture_html(figure: PrintFigure, description: str) -> str:
    """A figure as an HTML image that says what it shows; ipywidgets' own Image has no place for a description.

    Args:
        figure: from a plot function; shown as PNG.
        description: for readers who do not see the picture.
    """
    data = base64.b64encode(figure._repr_png_()).decode()
    return f'<img alt="{html.escape(description)}" style="max-width: 100%" src="data:image/png;base64,{data}">'


def faded(page: str) -> str:
    """HTML of what the controls do not describe any more, so that nobody takes it for what they do; "" stays ""."""
    return f'<div style="opacity: 0.25">{page}</div>' if page else ""


def with_static_page(bundle: Any, page: str) -> Any:
    """A widget's output in a notebook, with what it shows now as HTML and as text beside the live view.

    A copy made by papermill, and every page that has no kernel to ask, then holds pictures and numbers in place of a
    widget's name.

    Args:
        bundle: what the widget itself gives to a notebook.
        page: what it shows, as HTML without controls.
    """
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    data |= {"text/html": page, "text/plain": text_of(page)}
    return bundle
