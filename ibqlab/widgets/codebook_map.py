"""The map of a run's codes among its features: points that move with the step, answer to the mouse, and open cards."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import jscatter
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from ibqlab.base.escaping import for_html
from ibqlab.base.files import RunError
from ibqlab.plots import plot_code_map
from ibqlab.plots.code_map import DEAD_COLOR, FEATURE_GREY, HITS_COLORS
from ibqlab.runs import Run
from ibqlab.views.cards import CardReader
from ibqlab.views.map_data import MapData, describe_frame, map_run_codes
from ibqlab.views.patches import IMAGES
from ibqlab.views.subject import Subject, lacking, open_subject
from ibqlab.widgets.code_card import CodeCard
from ibqlab.widgets.live import picture_html, with_static_page

LEVELS = 10
"""Colours of a scale."""
COLORINGS: dict[str, tuple[str, Callable[[MapData], np.ndarray], bool]] = {
    "hits": ("hits", lambda data: data.hits, True),
    "steps since last hit": ("idle", lambda data: data.idle, True),
    "norm of the code": ("norm", lambda data: data.norms, False),
    "drift since the snapshot before": ("drift", lambda data: data.drift, False),
}
"""What codes may be coloured by → column, values (F, C), whether the scale is logarithmic."""
_FEATURE, _DEAD, _FIRST = 0, 1, 2
"""Numbers of what a point is: a feature, a dead code, or a code in use on the first of `LEVELS` colours."""
_LOOKS = _FIRST + LEVELS
_SIZES = [3.0, 4.0, *[8.0] * LEVELS]
_OPACITIES = [0.45, 0.55, *[1.0] * LEVELS]
_INTERVAL = 700
"""Milliseconds between two steps while the map plays."""


class CodebookMap(ipywidgets.VBox):
    """Codes and encoder features in one plane, fitted once over all snapshots; a slider moves the points.

    A click or a lasso selects codes, or features, which stand for their codes; the card beside the map shows them.

    Args:
        what: a run, its name or folder.
        method: "pca" (distances; a second) or "umap" (neighbourhoods; half a minute the first time).
        images: as of `open_subject`, for the cards.
        count: images that the cards look at, at most.
        height: of the map, CSS pixels.
    Raises:
        RunError, FileNotFoundError: there is nothing that a map could be made of.
    """

    def __init__(
        self,
        what: str | Path | Run,
        method: str = "pca",
        images: str | Path = "",
        count: int = IMAGES,
        height: int = 480,
    ):
        self.subject: Subject = open_subject(what, images)
        self.data = map_run_codes(self.subject, method)
        self.selected: tuple[int, ...] = ()
        self._listeners: list[Callable[[tuple[int, ...]], None]] = []
        self._others: list[CodebookMap] = []
        self._silent = False
        self._rows = {int(code): row for row, code in enumerate(self.data.code_ids)}
        self.card = self._open_card(count)
        steps = [(f"{step:,}", number) for number, step in enumerate(self.data.steps)]
        last = len(steps) - 1
        self.coloring = ipywidgets.Dropdown(options=list(COLORINGS), description="colour", layout={"width": "300px"})
        self.step = ipywidgets.SelectionSlider(
            options=steps,
            value=last,
            description="training step",
            style={"description_width": "initial"},
            layout={"width": "min(100%, 460px)"},
        )
        self.play = ipywidgets.Play(value=last, min=0, max=last, interval=_INTERVAL, show_repeat=False)
        ipywidgets.jslink((self.play, "value"), (self.step, "index"))
        self.scale = ipywidgets.HTML()
        self.facts = ipywidgets.HTML()
        self.scatter = self._scatter(height)
        for control in (self.coloring, self.step):
            control.observe(self._redraw, names="value")
        self.scatter.widget.observe(self._choose, names="selection")
        controls = [ipywidgets.HBox([self.play, self.step, self.coloring], layout={"flex_flow": "row wrap"})]
        left = ipywidgets.VBox(
            [self.scatter.widget, self.scale, self.facts], layout={"width": "54%", "min_width": "420px"}
        )
        right = ipywidgets.VBox([self.card] if self.card else [], layout={"width": "44%", "min_width": "360px"})
        super().__init__([*controls, ipywidgets.HBox([left, right], layout={"flex_flow": "row wrap"})])
        self.add_class("ibqlab-codebook-map")
        self._write()

    # --- what others call ---

    def select(self, codes: Sequence[int]) -> None:
        """Select codes of the map, as a lasso would; those that are not shown are left out."""
        self._select(tuple(int(code) for code in codes if int(code) in self._rows), tell=True)

    def on_select(self, listener: Callable[[tuple[int, ...]], None]) -> None:
        """Call a function with the codes whenever others are selected."""
        self._listeners.append(listener)

    def link(self, other: "CodebookMap") -> None:
        """Selecting codes here selects the codes of the same numbers there, and the other way round."""
        for one, another in ((self, other), (other, self)):
            if another not in one._others:
                one._others.append(another)

    def static_html(self) -> str:
        """The map of this step as a picture, the facts, and the card."""
        frame = self.step.value
        figure = plot_code_map(self.data.projection, frame, self.data.counts(frame), self._title())
        card = f"<div>{self.card.static_html()}</div>" if self.card else ""
        return f"<div>{picture_html(figure, self._title())}</div>{self.facts.value}{card}"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return with_static_page(super()._repr_mimebundle_(**kwargs), self.static_html())

    # --- inside ---

    def _open_card(self, count: int) -> CodeCard | None:
        try:
            reader = CardReader(self.subject, count)
        except RunError:
            return None
        return CodeCard(reader, code=())

    def _title(self) -> str:
        return f"{self.data.name}, step {self.data.steps[self.step.value]:,}"

    def _scatter(self, height: int) -> jscatter.Scatter:
        left, right, bottom, top = self.data.bounds
        margin = 0.03 * max(right - left, top - bottom, 1e-6)
        scatter = jscatter.Scatter(
            data=self._frame(),
            x="x",
            x_scale=(left - margin, right + margin),
            y="y",
            y_scale=(bottom - margin, top + margin),
            height=height,
        )
        # One number says what a point is, and lists say how that looks: with names jscatter 1.0 takes no second frame.
        ends = (0, _LOOKS - 1)
        scatter.color(by="look", map=self._colors(), norm=ends)
        scatter.size(by="look", map=_SIZES, norm=ends)
        scatter.opacity(by="look", map=_OPACITIES, norm=ends)
        scatter.tooltip(enable=True, properties=["kind", "number", "hits", "idle", "norm", "drift"], histograms=False)
        scatter.axes(grid=False)
        scatter.legend(False)
        return scatter

    def _frame(self) -> pd.DataFrame:
        """All points of the step, features first, so that codes lie above them."""
        data, frame = self.data, self.step.value
        look, _ = self._levels()
        features = data.features.shape[1]
        places = np.concatenate([data.features[frame], data.codes[frame]])
        nothing = np.full(features, np.nan)
        columns = {
            "hits": data.hits[frame],
            "idle": data.idle[frame],
            "norm": data.norms[frame],
            "drift": data.drift[frame],
        }
        codes_of = [f"{code:,}" for code in data.assignments[frame]]
        table = pd.DataFrame(
            {
                "x": places[:, 0],
                "y": places[:, 1],
                "look": np.concatenate([np.full(features, _FEATURE), look]).astype(float),
                "kind": np.concatenate(
                    [np.full(features, "feature of code"), np.where(columns["hits"] > 0, "code", "dead code")]
                ),
                "number": [*codes_of, *(f"{code:,}" for code in data.code_ids)],
            }
        )
        for name, values in columns.items():
            table[name] = np.concatenate([nothing, values.astype(float)])
        return table

    def _levels(self) -> tuple[np.ndarray, tuple[float, float]]:
        """Each code's place on the scale, which is one for all steps; and the scale's ends."""
        _, read, is_log = COLORINGS[self.coloring.value]
        values, hits = read(self.data).astype(float), self.data.hits
        known = values[(hits > 0) & np.isfinite(values) & (values >= 0)]
        least, most = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        shown = values[self.step.value].clip(min=least)
        if is_log:
            part = (np.log1p(shown) - np.log1p(least)) / max(np.log1p(most) - np.log1p(least), 1e-9)
        else:
            part = (shown - least) / max(most - least, 1e-12)
        level = np.nan_to_num(LEVELS * part).astype(int).clip(0, LEVELS - 1)
        return np.where(hits[self.step.value] > 0, _FIRST + level, _DEAD), (least, most)

    @staticmethod
    def _colors() -> list[str]:
        """Of every look, in the order of their numbers."""
        return [FEATURE_GREY, DEAD_COLOR, *(to_hex(HITS_COLORS(level / (LEVELS - 1))) for level in range(LEVELS))]

    def _redraw(self, _: Any = None) -> None:
        self.scatter.data(self._frame(), animate=True)
        self._write()

    def _write(self) -> None:
        """The scale and the facts of the step in words."""
        _, (least, most) = self._levels()
        shades = "".join(
            f'<span style="display:inline-block;width:14px;height:10px;background:{color}"></span>'
            for color in self._colors()[_FIRST:]
        )
        dead = f'<span style="display:inline-block;width:10px;height:10px;background:{DEAD_COLOR}"></span>'
        grey = f'<span style="display:inline-block;width:10px;height:10px;background:{FEATURE_GREY}"></span>'
        self.scale.value = (
            f"codes in use, {for_html(self.coloring.value)}: {least:.3g} {shades} {most:.3g} &nbsp; {dead} dead codes "
            f"&nbsp; {grey} features"
        )
        self.facts.value = f"<p>{for_html(describe_frame(self.data, self.step.value), None)}</p>"

    def _choose(self, change: Any) -> None:
        """Points chosen in the browser: codes as they are, features for their codes."""
        if self._silent:
            return
        rows = np.asarray(change["new"], dtype=int)
        features = self.data.features.shape[1]
        codes = self.data.code_ids[rows[rows >= features] - features]
        if not len(codes):  # features alone
            codes = self.data.assignments[self.step.value][rows[rows < features]]
        self._select(tuple(int(code) for code in np.unique(codes) if code >= 0), tell=True, mark=False)

    def _select(self, codes: tuple[int, ...], *, tell: bool, mark: bool = True) -> None:
        self.selected = codes
        if mark:
            features = self.data.features.shape[1]
            self._silent = True
            self.scatter.selection([features + self._rows[code] for code in codes if code in self._rows])
            self._silent = False
        if self.card is not None:
            try:
                self.card.show(codes)
            except (RunError, ValueError) as error:
                self.facts.value = f"<p>{for_html(lacking(error), None)}</p>"
        for listener in self._listeners:
            listener(codes)
        if tell:
            for other in self._others:
                other._select(codes, tell=False)
