"""The canvas of a map: jupyter-scatter's plot, and beside it what draws one step's points after another into it.

jupyter-scatter copies a table of all points for every change and drops a change that comes while it draws. Here each
step goes to the browser once, as plain numbers, and the step that was asked for last is always the one that stands.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import jscatter
import numpy as np
import pandas as pd
import traitlets

from ibqlab.views.map_colors import LOOKS, Coloring, palette
from ibqlab.views.map_data import MapData
from ibqlab.views.snapshot_arrays import NEVER, NOT_STORED

GROUNDS = {False: "#ffffff", True: "#111111"}
"""Background on a light and on a dark page; those of JupyterLab's own themes."""
_TIPS = {False: [1.0, 1.0, 1.0, 1.0], True: [0.2, 0.2, 0.2, 1.0]}
_RETICLES = {False: [0.0, 0.0, 0.0, 0.1], True: [1.0, 1.0, 1.0, 0.15]}
TOLD = ("point", "hits", "last hit", "norm")
"""What hovering tells of a point."""


class Painter(anywidget.AnyWidget):
    """Draws steps into the plot beside it; has no face of its own."""

    _esm = Path(__file__).with_name("map_canvas.js")
    frame = traitlets.Int(0).tag(sync=True)
    frames = traitlets.Int(1).tag(sync=True)
    coloring = traitlets.Unicode("hits").tag(sync=True)
    version = traitlets.Int(0).tag(sync=True)
    looks = traitlets.Int(LOOKS).tag(sync=True)
    watching = traitlets.Bool(False).tag(sync=True)


class MapCanvas(ipywidgets.VBox):
    """A plot of points that move.

    Args:
        height: CSS pixels.
        coloring: gives the colouring of a name.
        chosen: called with the rows that were clicked or lassoed, features first; empty for a lasso over nothing.
        looked: called every few seconds while `watching`.
    """

    def __init__(
        self,
        height: int,
        coloring: Callable[[str], Coloring],
        chosen: Callable[[np.ndarray], None],
        looked: Callable[[], None],
    ):
        self.data: MapData | None = None
        self.is_dark = False
        self._coloring, self._chosen, self._looked = coloring, chosen, looked
        self._is_marking = False
        self._dark_listener: Callable[[], None] = lambda: None
        self._plot = self._make_plot(height)
        self.plot = self._plot.widget
        self.plot.points = np.zeros((1, 4), np.float32)
        self.plot._handle_tooltip = self._tell
        self.plot.observe(self._hear_selection, names="selection")
        self.plot.observe(self._hear_lasso, names="lasso_selection_polygon")
        self.painter = Painter(layout={"height": "0", "margin": "0"})
        self.painter.on_msg(self._hear)
        super().__init__([self.plot, self.painter])
        self.add_class("ibqlab-map-canvas")

    def show(self, data: MapData, frame: int) -> None:
        """Show another map from now on."""
        self.data = data
        with self.painter.hold_sync():
            self.painter.frames, self.painter.frame = len(data.steps), frame
            self.painter.version += 1
        self.dress()

    def dress(self) -> None:
        """Colours, sizes and background for the colouring and the page's theme."""
        colors, sizes, opacities = palette(self.is_dark, self._coloring(self.painter.coloring), len(self.data.code_ids))
        # Not by `background`, which would bring axes and a legend along.
        self.plot.background_color = GROUNDS[self.is_dark]
        self.plot.tooltip_color, self.plot.reticle_color = _TIPS[self.is_dark], _RETICLES[self.is_dark]
        self._plot.color(map=colors, selected="#ff6d00", hover="#ff6d00")
        self._plot.size(map=sizes)
        self._plot.opacity(map=opacities)

    def on_dark(self, listener: Callable[[], None]) -> None:
        """Call a function when the page's theme has turned."""
        self._dark_listener = listener

    def mark(self, rows: Sequence[int]) -> None:
        """Mark points, as if they had been clicked, without telling anybody."""
        self._is_marking = True
        try:
            self.plot.selection = np.asarray(rows, dtype=np.uint32)
        finally:
            self._is_marking = False

    # --- inside ---

    @staticmethod
    def _make_plot(height: int) -> jscatter.Scatter:
        """A plot whose settings are jupyter-scatter's; its points come from the painter."""
        table = pd.DataFrame({"x": [-1.0, 1.0], "y": [-1.0, 1.0], "look": [0.0, LOOKS - 1.0]})
        for name in TOLD:
            table[name] = ""
        plot = jscatter.Scatter(data=table, x="x", x_scale=(-1, 1), y="y", y_scale=(-1, 1), height=height)
        # One number says what a point is, and lists say how that looks.
        ends = (0, LOOKS - 1)
        plot.color(by="look", map=["#000000"] * LOOKS, norm=ends)
        plot.size(by="look", map=[1.0] * LOOKS, norm=ends)
        plot.opacity(by="look", map=[1.0] * LOOKS, norm=ends)
        plot.tooltip(enable=True, properties=list(TOLD), histograms=False)
        plot.mouse("lasso")
        plot.axes(False)
        plot.legend(False)
        return plot

    def _hear(self, _: Any, content: Any, __: Any) -> None:
        if not isinstance(content, dict):
            return
        if "dark" in content:
            self._turn(bool(content["dark"]))
        elif "look" in content:
            self._looked()
        elif "want" in content and self.data is not None:
            self._send_step(int(content["want"]), str(content.get("coloring", "hits")), content)

    def _turn(self, dark: bool) -> None:
        self.is_dark = dark
        if self.data is not None:
            self.dress()
            self._dark_listener()

    def _send_step(self, frame: int, coloring: str, content: dict[str, Any]) -> None:
        """A step's looks, and its places where the browser does not have them."""
        if not 0 <= frame < len(self.data.steps):
            return
        began = time.process_time()
        buffers = [self._coloring(coloring).looks(self.data, frame).tobytes()]
        has_places = bool(content.get("places"))
        if has_places:
            buffers.append(places_of(self.data, frame).tobytes())
        message = {"frame": frame, "coloring": coloring, "places": has_places, "version": self.painter.version}
        message |= {"next": bool(content.get("next")), "kernel_ms": 1000 * (time.process_time() - began)}
        self.painter.send(message, buffers)

    def _hear_selection(self, change: Any) -> None:
        if not self._is_marking:
            self._chosen(np.asarray(change["new"] if change["new"] is not None else [], dtype=int))

    def _hear_lasso(self, change: Any) -> None:
        """A lasso over nothing changes no selection, and says so."""
        drawn = change["new"] is not None and len(change["new"])
        if drawn and not len(np.atleast_1d(self.plot.selection if self.plot.selection is not None else [])):
            self._chosen(np.zeros(0, int))

    def _tell(self, event: dict[str, Any]) -> None:
        """What hovering shows of a point."""
        if self.data is None:
            return
        properties = describe_point(self.data, self.painter.frame, int(event["index"]))
        self.plot.send({"type": "tooltip", "index": event["index"], "preview": None, "properties": properties})


def places_of(data: MapData, frame: int) -> np.ndarray:
    """Places (P, 2) of a snapshot's points within −1 to 1, features first; both axes have one unit."""
    left, right, bottom, top = data.bounds
    half = 1.05 * max(right - left, top - bottom, 1e-6) / 2
    points = np.concatenate([data.features[frame], data.codes[frame]]).astype(np.float32)
    return (points - np.float32([(left + right) / 2, (bottom + top) / 2])) / np.float32(half)


def describe_point(data: MapData, frame: int, row: int) -> dict[str, str]:
    """A point in words: what it is, its code's hits, steps since its last hit, and its norm."""
    features, nothing = data.features.shape[1], "–"
    if row < features:
        code = int(data.assignments[frame][row])
        of = f"feature of code {code:,}" if code >= 0 else "feature; its code was not stored"
        place = np.searchsorted(data.code_ids, code)
        if code < 0 or place == len(data.code_ids) or data.code_ids[place] != code:
            return {"point": of, "hits": nothing, "last hit": nothing, "norm": nothing}
    else:
        place = row - features
        dead = "no hit" if not data.can_call_dead(frame) else "dead"
        of = f"code {int(data.code_ids[place]):,} ({'in use' if data.hits[frame][place] else dead})"
    idle = int(data.idle[frame][place])
    return {
        "point": of,
        "hits": f"{int(data.hits[frame][place]):,} of {int(data.tokens[frame]):,} tokens",
        "last hit": {NEVER: "never in training", NOT_STORED: "not stored"}.get(idle, f"{idle:,} training steps ago"),
        "norm": f"{float(data.norms[frame][place]):.3g}",
    }
