"""The lab's methods through time: one slider over the steps, all methods side by side."""

from typing import Any

import ipywidgets

from ibqlab.base.escaping import for_html
from ibqlab.diagnostics.lab import LabResult
from ibqlab.plots.lab import lab_plane_table, plot_lab_plane
from ibqlab.widgets.live import faded, picture_html, with_static_page


class LabExplorer(ipywidgets.VBox):
    """A slider over the steps that have a snapshot, and the plane of all methods at the chosen one.

    A picture is drawn when it is first asked for. All steps share one plane and one scale of hits, so that what moves
    is a code or a feature.

    Args:
        result: of `run_lab`.
    """

    def __init__(self, result: LabResult):
        self.result = result
        self._pages: dict[int, str] = {}
        """Step → its picture as HTML."""
        self.step = ipywidgets.SelectionSlider(
            options=[(f"{step:,}", step) for step in result.snapshot_steps],
            description="step",
            style={"description_width": "initial"},
            layout={"width": "min(100%, 640px)"},
        )
        self.numbers, self.plane = ipywidgets.HTML(), ipywidgets.HTML()
        self.plane.add_class("ibqlab-lab-plane")
        super().__init__([self.step, self.numbers, self.plane])
        self.step.index = len(self.step.options) - 1
        self.step.observe(lambda _: self._redraw(), names="value")
        self._redraw()

    def static_html(self) -> str:
        """Numbers and picture as they are shown now, without the slider."""
        return f"<p>{self.numbers.value}</p>{self.plane.value}"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return with_static_page(super()._repr_mimebundle_(**kwargs), self.static_html())

    def _redraw(self) -> None:
        """Show the chosen step."""
        step = self.step.value
        numbers = f"step {step:,}: {self._usages(step)}"
        if step not in self._pages:
            # The picture of the step before is dimmed until the new one is there.
            self.numbers.value, self.plane.value = f"step {step:,}: drawing …", faded(self.plane.value)
            figure = plot_lab_plane(lab_plane_table(self.result, step))
            self._pages[step] = picture_html(figure, f"codes and features of all methods, {numbers}")
        self.numbers.value, self.plane.value = for_html(numbers, None), self._pages[step]

    def _usages(self, step: int) -> str:
        """Usage of every method, as a sentence."""
        shares = {label: (run.snapshots[step]["counts"] > 0).mean() for label, run in self.result.runs.items()}
        words = ", ".join(f"{label} {share:.1%}" for label, share in shares.items()) + " of the codes in use"
        return f"{words}. {self.result.failed}" if self.result.failed else words


def explore_lab(result: LabResult) -> ipywidgets.VBox:
    """A slider over the steps of a lab; below it the plane of all methods at that step.

    The static figure of the same data is `plot_lab_plane`, the animation of all steps `write_lab_animation`.

    Args:
        result: of `run_lab`.
    Returns:
        The view, to be shown as a notebook's output; it needs a running kernel.
    """
    return LabExplorer(result)
