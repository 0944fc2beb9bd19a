"""A study's runs, explored by hand: which method, from which start, at which size, and how it came about."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
from jaxtyping import Int

from ibqlab.base.escaping import for_html
from ibqlab.diagnostics.usage import perplexity
from ibqlab.grids.cells import Cell
from ibqlab.plots import plot_code_map, plot_usage_histogram
from ibqlab.plots.style import method_label
from ibqlab.runs import Run, RunError
from ibqlab.studies import Study, StudyError
from ibqlab.studies.figures import map_run
from ibqlab.studies.method_grid import name_start, require_methods
from ibqlab.widgets.live import faded, picture_html, with_static_page

AXES = {
    "method": "method",
    "init": "codebook starts at",
    "codebook_size": "codes K",
    "code_dim": "dimension D",
    "seed": "seed",
}
"""The labels of a cell that are chosen by hand, in order, and what they are called."""
EXPLORER_POINTS = 8000
"""Points that a run's one map of all snapshots is fitted on, at most: the most that UMAP fits in about ten seconds."""
_CONTROL = {"style": {"description_width": "initial"}, "layout": {"width": "max-content"}}
_WRAPPED = {"flex_flow": "row wrap", "align_items": "flex-start"}


class StudyExplorer(ipywidgets.VBox):
    """Controls over a study's finished runs and two pictures of one snapshot, drawn from the run folder.

    Args:
        study: with at least one finished cell.
    Raises:
        StudyError: no cell is finished.
    """

    def __init__(self, study: Study):
        require_methods(study)
        self._cells = study.finished()
        if not self._cells:
            raise StudyError(
                f"no run of {study.name} is finished in {study.folder.name}, so there is nothing to explore; type "
                "study.run()"
            )
        self._projection = study.grid.projection
        self._maps: dict[Path, JointMap] = {}
        self._pages: dict[tuple[Path, int], dict[str, str]] = {}
        """Run and step → what map, histogram and numbers show, as HTML."""
        self._busy = False
        self.choices = {axis: ipywidgets.Dropdown(description=title, **_CONTROL) for axis, title in AXES.items()}
        self.step = ipywidgets.SelectionSlider(
            options=[0], description="training step", style=_CONTROL["style"], layout={"width": "min(100%, 640px)"}
        )
        self.numbers = ipywidgets.HTML()
        # Side by side where the page is wide enough for both to be read. What is left of the row takes JupyterLab's
        # signs beside widgets without a kernel.
        self.code_map = ipywidgets.HTML(layout={"width": "40%", "min_width": "400px"})
        self.histogram = ipywidgets.HTML(layout={"width": "53%", "min_width": "400px"})
        self.numbers.add_class("ibqlab-numbers")
        self.code_map.add_class("ibqlab-code-map")
        self.histogram.add_class("ibqlab-histogram")
        super().__init__(self._arranged())
        for control in (*self.choices.values(), self.step):
            control.observe(self._follow, names="value")
        with self._silent():
            self._offer(own_start=True)
            self.step.index = len(self.step.options) - 1
        self._redraw()

    def static_html(self) -> str:
        """Numbers, map and histogram as they are shown now, without controls."""
        style = "display: flex; flex-wrap: wrap"
        return (
            f"<p>{self.numbers.value}</p>"
            f'<div style="{style}"><div>{self.code_map.value}</div><div>{self.histogram.value}</div></div>'
        )

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return with_static_page(super()._repr_mimebundle_(**kwargs), self.static_html())

    @property
    def run(self) -> Run:
        """The run that the controls stand at."""
        return self._chosen()[1]

    def _arranged(self) -> list[ipywidgets.Widget]:
        """Controls above, pictures below; seeds are offered only where there are several."""
        several = len({cell.labels["seed"] for cell, _ in self._cells}) > 1
        dropdowns = [choice for axis, choice in self.choices.items() if several or axis != "seed"]
        pictures = ipywidgets.HBox([self.code_map, self.histogram], layout=_WRAPPED)
        return [ipywidgets.HBox(dropdowns, layout=_WRAPPED), self.step, self.numbers, pictures]

    def _chosen(self) -> tuple[Cell, Run]:
        return self._matching(list(AXES))[0]

    def _matching(self, axes: list[str]) -> list[tuple[Cell, Run]]:
        """Finished cells that agree with what is chosen on these axes."""
        chosen = {axis: self.choices[axis].value for axis in axes}
        return [(cell, run) for cell, run in self._cells if chosen.items() <= cell.labels.items()]

    def _offer(self, own_start: bool = False) -> None:
        """Offer on each axis what exists together with the choices before it. A choice that still exists stays.

        Args:
            own_start: choose the start that the method has of its own, where there is one.
        """
        for number, (axis, dropdown) in enumerate(self.choices.items()):
            matching = self._matching(list(AXES)[:number])
            possible = {_option(axis, cell): cell.labels[axis] for cell, _ in matching}
            choice = dropdown.value
            if axis == "init" and own_start:
                choice = next((cell.labels[axis] for cell, _ in matching if cell.labels["published_init"]), choice)
            dropdown.options = list(possible.items())
            dropdown.value = choice if choice in possible.values() else next(iter(possible.values()))
            dropdown.disabled = len(possible) == 1
        steps = self.run.snapshot_steps or [0]
        nearest = min(steps, key=lambda step: abs(step - self.step.value))
        self.step.options = [(f"{step:,}", step) for step in steps]
        self.step.value = nearest

    def _follow(self, change: Any) -> None:
        """Bring the other controls and the pictures up to date with a control that was moved."""
        if self._busy:
            return
        if change["owner"] is not self.step:
            with self._silent():
                self._offer(own_start=change["owner"] is self.choices["method"])
        self._redraw()

    @contextmanager
    def _silent(self) -> Iterator[None]:
        """Controls set here draw nothing."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _redraw(self) -> None:
        """Show the chosen snapshot, or why it cannot be shown: an error in a callback would be seen by nobody."""
        cell, run = self._chosen()
        if (run.path, self.step.value) not in self._pages:
            # The pictures of what was chosen before are dimmed until the new ones are there.
            self.numbers.value = for_html(f"{_title(cell, self.step.value)}: drawing …")
            for picture in (self.code_map, self.histogram):
                picture.value = faded(picture.value)
        try:
            pages = self._frame()
        except (RunError, ValueError, ImportError) as error:
            pages = {"code_map": "", "histogram": "", "numbers": f"<b>{for_html(error, None)}</b>"}
        for name, page in pages.items():
            getattr(self, name).value = page

    def _frame(self) -> dict[str, str]:
        """The chosen snapshot, drawn when it is first asked for."""
        cell, run = self._chosen()
        step = self.step.value
        if (run.path, step) not in self._pages:
            counts = run.snapshot(step)["counts"]
            title = _title(cell, step)
            alt = f"map of codes and encoder features: {title}; {describe_counts(counts)}"
            self._pages[run.path, step] = {
                "code_map": self._map(run).html(step, counts, title, alt),
                "histogram": _histogram_html(f"{cell.labels['method']} from {cell.labels['init']}", counts, title),
                "numbers": for_html(f"{title}: {describe_counts(counts)}", None),
            }
        return self._pages[run.path, step]

    def _map(self, run: Run) -> "JointMap":
        if run.path not in self._maps:
            self.numbers.value += " fitting one map for all snapshots of this run, once: seconds …"
            self._maps[run.path] = JointMap(run, self._projection)
        return self._maps[run.path]


class JointMap:
    """Pictures of a run's snapshots in one space, fitted once, on one scale of hits.

    Args:
        run: with at least one snapshot.
        method: "umap" or "pca".
    """

    def __init__(self, run: Run, method: str):
        self._steps: list[int] = []
        self._lack = ""
        try:
            frames = len(run.snapshot_steps)
            self._projection, self._steps = map_run(run, method, frames=frames, max_points=EXPLORER_POINTS)
        except RunError as error:
            self._lack = str(error)
        self._most_hits = max((int(run.snapshot(step)["counts"].max()) for step in self._steps), default=0)

    def html(self, step: int, counts: Int[np.ndarray, "K"], title: str, alt: str) -> str:
        """The map of a step, or a sentence where the step has none.

        Args:
            step: that has a snapshot.
            counts: its hits per code.
            title: of the picture.
            alt: the picture in words.
        """
        if step not in self._steps:
            why = "its snapshot holds NaN or infinity, no codes and features, or codes of another dimension"
            return for_html(self._lack or f"no map of step {step:,}: {why}", None)
        # Colours mean the same at all steps.
        frame = self._steps.index(step)
        return picture_html(plot_code_map(self._projection, frame, counts, title, most_hits=self._most_hits), alt)


def explore_study(study: Study) -> ipywidgets.VBox:
    """Controls for method, start of the codebook, codebook size, code dimension and seed, and a slider over the steps
    that have a snapshot; below them the map of codes and features and the usage histogram of that snapshot.

    Only combinations that were trained are offered; a method comes with the start that it has of its own. All steps of
    a run share one jointly fitted map, its axes and its scale of hits, so that what moves is a code or a feature, not
    the map. Choosing a run for the first time fits its map: seconds with "umap". The static figures of the same data
    are `figure_code_maps` and `figure_histogram`.

    Args:
        study: with at least one finished cell.
    Returns:
        The view, to be shown as a notebook's output; it needs a running kernel.
    Raises:
        StudyError: no cell is finished; the message says what to type.
    """
    return StudyExplorer(study)


def _option(axis: str, cell: Cell) -> str:
    """A cell's place on an axis, as it is offered."""
    value = cell.labels[axis]
    if axis == "method":
        return method_label(value)
    if axis == "init":
        return name_start(value, cell.labels["published_init"])
    return f"{value:,}"


def _title(cell: Cell, step: int) -> str:
    """What is shown: method, start, step."""
    return f"{_option('method', cell)} from {cell.labels['init']}, step {step:,}"


def _histogram_html(label: str, counts: Int[np.ndarray, "K"], title: str) -> str:
    """The histogram on axes that stay where they are from snapshot to snapshot."""
    picture = plot_usage_histogram({label: counts})
    picture.axes[0].set(xlim=(0.8, 1.25 * len(counts)), ylim=(0.5 / counts.sum(), 1.5))
    # About as high as the map beside it.
    picture.set_figheight(0.75 * picture.get_figwidth())
    return picture_html(picture, f"hits per code by rank: {title}; {describe_counts(counts)}")


def describe_counts(counts: Int[np.ndarray, "K"], tokens: str = "validation tokens") -> str:
    """Usage with its token count, perplexity and dead codes, as a sentence.

    Args:
        counts: hits per code.
        tokens: what was counted.
    """
    hit, size = int((counts > 0).sum()), len(counts)
    return (
        f"usage {100 * hit / size:.1f} % of {size:,} codes in {int(counts.sum()):,} {tokens}, perplexity "
        f"{perplexity(counts):,.1f} codes, {size - hit:,} dead codes"
    )
