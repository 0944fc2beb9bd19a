"""One run, explored by hand: a slider over its snapshots, a tokenizer's or those that a monitor stored."""

from typing import Any

import ipywidgets

from ibqlab.base.escaping import for_html
from ibqlab.plots import plot_usage_histogram
from ibqlab.runs import Run, RunError
from ibqlab.runs.kinds import is_monitored, quantizer_settings
from ibqlab.widgets.explorer import JointMap, describe_counts
from ibqlab.widgets.live import picture_html, with_static_page


class RunExplorer(ipywidgets.VBox):
    """A slider over one run's snapshots, with the map of codes and features and the usage histogram of each.

    Args:
        run: with at least one snapshot.
        projection: "pca" (a second) or "umap" (some seconds, keeps neighbourhoods).
    Raises:
        RunError: no snapshot.
    """

    def __init__(self, run: Run, projection: str = "pca"):
        steps = run.snapshot_steps
        if not steps:
            why = "has no snapshot yet" if run.path.exists() else "is gone: its folder was moved or deleted"
            raise RunError(f"{run.path} {why}, so there is nothing to explore")
        self.run, self.projection = run, projection
        self.method = quantizer_settings(run.config).get("name") or run.name
        self._tokens = "tokens of training" if is_monitored(run.config) else "validation tokens"
        self._pages: dict[int, dict[str, str]] = {}
        self._map: JointMap | None = None
        self.step = ipywidgets.SelectionSlider(
            options=[(f"{step:,}", step) for step in steps],
            value=steps[-1],
            description="training step",
            style={"description_width": "initial"},
            layout={"width": "min(100%, 640px)"},
        )
        self.numbers = ipywidgets.HTML()
        self.code_map = ipywidgets.HTML(layout={"width": "40%", "min_width": "400px"})
        self.histogram = ipywidgets.HTML(layout={"width": "53%", "min_width": "400px"})
        row = ipywidgets.HBox([self.code_map, self.histogram], layout={"flex_flow": "row wrap"})
        super().__init__([self.step, self.numbers, row])
        self.step.observe(self._redraw, names="value")
        self._redraw()

    def static_html(self) -> str:
        """Numbers, map and histogram as they are shown now, without the slider."""
        pictures = f"<div>{self.code_map.value}</div><div>{self.histogram.value}</div>"
        return f'<p>{self.numbers.value}</p><div style="display: flex; flex-wrap: wrap">{pictures}</div>'

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return with_static_page(super()._repr_mimebundle_(**kwargs), self.static_html())

    def _redraw(self, _: Any = None) -> None:
        """Show the chosen snapshot, or why it cannot be shown: an error in a callback would be seen by nobody."""
        step = self.step.value
        try:
            if step not in self._pages:
                self._pages[step] = self._draw(step)
            pages = self._pages[step]
        except (RunError, LookupError, ValueError, ImportError) as error:
            pages = {"code_map": "", "histogram": "", "numbers": f"<b>{for_html(error, None)}</b>"}
        for name, page in pages.items():
            getattr(self, name).value = page

    def _draw(self, step: int) -> dict[str, str]:
        """Pictures of one snapshot; the map only where codebook and features were stored."""
        snapshot = self.run.snapshot(step)
        counts, title = snapshot["counts"], f"{self.run.name}, step {step:,}"
        text = f"{title}: {describe_counts(counts, self._tokens)}"
        histogram = plot_usage_histogram({str(self.method): counts})
        code_map = "no codebook and features were stored"
        if {"codebook", "features"} <= set(snapshot):
            if self._map is None:
                self._map = JointMap(self.run, self.projection)
            code_map = self._map.html(step, counts, title, f"map of codes and features: {text}")
        return {
            "code_map": code_map,
            "histogram": picture_html(histogram, f"hits per code by rank: {text}"),
            "numbers": for_html(text, None),
        }


def explore_run(run: Run, projection: str = "pca") -> ipywidgets.VBox:
    """A slider over the snapshots of one run: the map of its codes among features, and its hits per code.

    All steps share one jointly fitted map, its axes and its scale of hits, so that what moves is a code or a feature.

    Args:
        run: a tokenizer's, or one that a monitor wrote, with at least one snapshot.
        projection: "pca" (a second) or "umap" (some seconds, keeps neighbourhoods).
    Returns:
        The view, to be shown as a notebook's output; it needs a running kernel.
    Raises:
        RunError: no snapshot.
    """
    return RunExplorer(run, projection)
