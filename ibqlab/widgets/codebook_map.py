"""The map of a run's codes among its features: points that move with the step, answer to the mouse, and open cards."""

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np

from ibqlab.base.checks import whole_number
from ibqlab.base.escaping import for_html
from ibqlab.base.files import RunError
from ibqlab.runs import Run
from ibqlab.views.atlas.moment import Moment
from ibqlab.views.cards import CardReader
from ibqlab.views.map_colors import DEAD, FEATURE, IN_USE, LEVELS, NAMES, PLAIN, Coloring, color_codes, palette
from ibqlab.views.map_data import MapData, describe_frame, map_run_codes
from ibqlab.views.map_fit import DEAD_CODES
from ibqlab.views.map_picture import draw_map
from ibqlab.views.patches import IMAGES
from ibqlab.views.subject import Subject, lacking, open_subject
from ibqlab.widgets.code_card import CodeCard
from ibqlab.widgets.live import picture_html, with_static_page
from ibqlab.widgets.map_canvas import MapCanvas

INTERVAL = 900
"""Milliseconds between two steps while the map plays."""
PLANES = {"distances (PCA)": "pca", "neighbourhoods (UMAP)": "umap"}
"""What the plane keeps, as it is offered → how it is fitted."""
_TEXT = "line-height: 1.45; margin: 4px 14px 4px 0"
_FAULTS = (RunError, ValueError, OSError, MemoryError, LookupError)
"""What may go wrong in a view of files that somebody else writes."""
_HOW = "Click a point, or draw a lasso around some."


def _telling(method: Callable[..., Any]) -> Callable[..., Any]:
    """A callback whose error is told on the view: nobody sees one that is raised."""

    @wraps(method)
    def call(self: "CodebookMap", *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except _FAULTS as error:
            self.say(lacking(error))
            return None

    return call


class CodebookMap(ipywidgets.VBox):
    """Codes and encoder features in one plane, fitted once over all snapshots; a slider moves the points.

    A click or a lasso selects codes, or features, which stand for their codes; the card beside the map shows them. What
    the run lacks is said in a sentence in place of the map.

    Args:
        what: a run, its name or folder, or a `Subject`, as of a checkpoint: `open_subject(FILE, family=…)`.
        method: at first; "pca" (distances; seconds) or "umap" (neighbourhoods; half a minute the first time).
        images: as of `open_subject`, for the cards.
        count: images that the cards look at, at most.
        height: of the map, CSS pixels.
        dead_codes: codes shown that no snapshot has in use, at most; None: all. Codes in use are always shown.
        step: training step shown first; None: the last.
        with_card: whether the card of what is selected stands beside the map.
    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: a step that is no number.
    """

    def __init__(
        self,
        what: str | Path | Run | Subject,
        method: str = "pca",
        images: str | Path = "",
        count: int = IMAGES,
        *,
        height: int = 480,
        dead_codes: int | None = DEAD_CODES,
        step: int | None = None,
        with_card: bool = True,
    ):
        self._what, self._method, self._images, self._count = what, method, images, count
        self._dead_codes = dead_codes
        self._first_step = None if step is None else whole_number("step", step, 0)
        self.subject: Subject | None = None
        self._reader: CardReader | None = None  # of a checkpoint, whose images make its one moment
        self.data: MapData | None = None
        self._newest = -1  # last step that the run had when it was read
        self.selected: tuple[int, ...] = ()
        self._stands_for_features = False
        self.card: CodeCard | None = None
        self._colorings: dict[str, Coloring] = {}
        self._listeners: list[Callable[[tuple[int, ...]], None]] = []
        self._show_listeners: list[Callable[[], None]] = []
        self._with_card, self._is_moving = with_card, False
        self._make_controls(height)
        super().__init__([self.controls, self.said, self.body])
        self.add_class("ibqlab-codebook-map")
        self._open(first=True)

    # --- what others call ---

    def select(self, codes: Sequence[int]) -> None:
        """Select codes of the map, as a lasso would; those that are not shown are left out."""
        if self.data is not None:
            self._select(tuple(int(code) for code in codes if self._row(int(code)) is not None), mark=True)

    def show_selected(self, codes: tuple[int, ...]) -> None:
        """Mark and show codes that another view has selected, without telling anybody."""
        if self.data is not None:
            self._select(codes, mark=True, tell=False)

    def on_select(self, listener: Callable[[tuple[int, ...]], None]) -> None:
        """Call a function with the codes whenever others are selected."""
        self._listeners.append(listener)

    def on_show(self, listener: Callable[[], None]) -> None:
        """Call a function whenever the run was read again."""
        self._show_listeners.append(listener)

    def refresh(self) -> None:
        """Read the run again: snapshots that have come since appear, and the plane is fitted over all."""
        self._open()

    def say(self, text: str) -> None:
        """A sentence above the map; "" takes it away."""
        self.said.value = f'<p class="ibqlab-map-said" style="{_TEXT}">{for_html(text, None)}</p>' if text else ""

    def static_html(self) -> str:
        """The map of this step as a picture, the facts, and the card."""
        if self.data is None:
            return self.said.value
        title = self._title()
        picture = picture_html(draw_map(self.data, self.step.value, title), f"map of codes and features of {title}")
        card = f"<div>{self.card.static_html()}</div>" if self.card else ""
        return f"<div>{picture}</div>{self.said.value}{self.facts.value}{card}"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return with_static_page(super()._repr_mimebundle_(**kwargs), self.static_html())

    # --- inside ---

    def _make_controls(self, height: int) -> None:
        self.coloring = ipywidgets.Dropdown(options=list(NAMES), description="colour by", layout={"width": "280px"})
        self.play, self.step = step_controls("training step")
        self.plane = ipywidgets.Dropdown(options=PLANES, description="plane of", layout={"width": "280px"})
        if self._method in PLANES.values():  # anything else is told with the map
            self.plane.value = self._method
        self.again = ipywidgets.Button(description="read the run again", icon="refresh", layout={"width": "auto"})
        self.said, self.heading, self.scale, self.facts = (ipywidgets.HTML() for _ in range(4))
        self.canvas = MapCanvas(height, self._coloring, self._choose, self._look)
        self._moving = [self.play, self.step, self.coloring, self.plane]
        row = {"flex_flow": "row wrap", "align_items": "center"}
        self.controls = ipywidgets.HBox([*self._moving, self.again], layout=row)
        share = {"width": "54%", "min_width": "min(100%, 420px)", "flex": "1 1 54%"} if self._with_card else {}
        self.left = ipywidgets.VBox(
            [self.heading, self.canvas, self.scale, self.facts], layout=share or {"width": "100%"}
        )
        self.right = ipywidgets.VBox([], layout={"width": "42%", "min_width": "min(100%, 340px)", "flex": "1 1 40%"})
        self.body = ipywidgets.HBox([self.left], layout={"flex_flow": "row wrap"})
        # The browser moves the points by itself where it has them; the kernel follows.
        ipywidgets.jslink((self.step, "index"), (self.canvas.painter, "frame"))
        self.step.observe(self._moved, names="value")
        self.coloring.observe(self._recolored, names="value")
        self.plane.observe(self._refit, names="value")
        self.again.on_click(lambda _: self._open())
        self.canvas.on_dark(self._write)

    def _open(self, first: bool = False) -> None:
        """Read the run and show it, or say what it lacks."""
        try:
            self.subject = open_subject(self._what, self._images)
            if self.subject.run is None:
                self._reader = CardReader(self.subject, self._count)
                self.subject = Moment(self._reader)  # a checkpoint has no snapshots: codes and features as they are
            self._newest = max(self.subject.steps, default=-1)
            data = map_run_codes(self.subject, self._method, dead_codes=self._dead_codes, progress=True)
            self._show(data)
        except FileNotFoundError:
            if first:
                raise
            self._lose(f"{self._what} is gone: its folder was moved or deleted.")
        except _FAULTS as error:
            self._lose(lacking(error))
        for listener in self._show_listeners:
            listener()

    def _lose(self, text: str) -> None:
        """Say why there is no map; one that stood before stays, as it was."""
        if self.data is not None:
            text += " The map shows what was read before."
        self.say(text)
        for control in self._moving:
            control.layout.display = None if self.data is not None else "none"
        self.body.layout.display = None if self.data is not None else "none"
        self.canvas.painter.watching = self.data is None and self.subject is not None

    def _show(self, data: MapData) -> None:
        before = self.data.steps[self.step.value] if self.data is not None else self._first_step
        at_end = self.data is not None and self.step.value == len(self.data.steps) - 1
        self.data, self._colorings = data, {}
        for part in (*self._moving, self.body):
            part.layout.display = None
        self.say("")
        frame = len(data.steps) - 1
        if before is not None and not at_end:
            frame = int(np.abs(np.array(data.steps) - before).argmin())
            if before != data.steps[frame]:
                self.say(f"There is no map of step {before:,}; the nearest is of step {data.steps[frame]:,}.")
        if self._newest > data.steps[-1]:
            self.say(
                f"The last snapshot, of step {self._newest:,}, is left out: it holds no finite codes and features."
            )
        self._is_moving = True
        self.step.options = [(f"{step:,}", number) for number, step in enumerate(data.steps)]
        self.step.value = self.play.value = frame
        self.play.max = len(data.steps) - 1
        self._is_moving = False
        self.again.description, self.again.button_style = "read the run again", ""
        self.canvas.painter.watching = not _is_finished(self.subject.run)
        self.canvas.show(data, frame)
        if self._with_card:
            self._open_card()
        self._write()

    @_telling
    def _open_card(self) -> None:
        reader = self._reader
        if reader is None:
            reader = CardReader(self.subject, self._count)
            reader.use_history(np.array(self.data.steps), self.data.code_ids, self.data.hits, self.data.idle)
        self.card = CodeCard(reader, code=self.selected)
        self.card.on_show(self._follow_card)
        self.right.children = [self.card]
        self.body.children = [self.left, self.right]

    def _coloring(self, name: str) -> Coloring:
        """A colouring; hits in place of one that the run lacks."""
        if name not in self._colorings:
            index = self.card.reader.index if self.card else None
            why = "; ".join(self.card.reader.lacks) if self.card else "no images were encoded for this map"
            self._colorings[name] = color_codes(self.data, name, index, without_index=why)
        return self._colorings[name]

    def _moved(self, _: Any) -> None:
        if not self._is_moving and self.data is not None:
            self.canvas.painter.frame = self.step.value
            if self._stands_for_features:  # which have other codes now; a click on them again is to be heard
                self._mark(self.selected)
                self._stands_for_features = False
            self._write()

    @_telling
    def _recolored(self, change: Any) -> None:
        if self.data is None:
            return
        try:
            self._coloring(change["new"])
        except _FAULTS:
            self.coloring.value = change["old"]
            raise
        self.say("")
        self.canvas.painter.coloring = change["new"]
        self.canvas.dress()
        self._write()

    def _refit(self, change: Any) -> None:
        """Another plane; where there can be none, the one before stays."""
        if self.data is None or change["new"] == self.data.method:
            return
        self.say("Fitting the plane over all snapshots, once; with UMAP half a minute, more for many codes …")
        self._method = change["new"]
        self._open()
        self._method = self.plane.value = self.data.method

    @_telling
    def _look(self) -> None:
        """Whether the run has a new snapshot, or is gone."""
        if not self.subject.path.exists():
            self._lose(f"{self.subject.name} is gone: its folder was moved or deleted.")
            return
        steps = self.subject.steps
        if steps and steps[-1] > self._newest:
            self.again.description = f"show step {steps[-1]:,}"
            self.again.button_style = "info"

    @_telling
    def _write(self) -> None:
        """The scale, and the facts of the step, in words."""
        coloring = self._coloring(self.canvas.painter.coloring)
        self.scale.value = scale_html(self.data, self.step.value, coloring, self.canvas.is_dark)
        heading = for_html(self._title(), None)
        self.heading.value = f'<div class="ibqlab-map-heading" style="{_TEXT}"><b>{heading}</b></div>'
        self.facts.value = f'<p style="{_TEXT}">{for_html(describe_frame(self.data, self.step.value), None)}</p>'

    def _title(self) -> str:
        """The run and its step; a file alone, which holds one moment and seldom says of which step."""
        step = self.data.steps[self.step.value]
        return f"{self.data.name}, step {step:,}" if self.subject.run else self.data.name

    def _row(self, code: int) -> int | None:
        """Which of the shown codes it is."""
        row = int(np.searchsorted(self.data.code_ids, code))
        return row if row < len(self.data.code_ids) and self.data.code_ids[row] == code else None

    @_telling
    def _choose(self, rows: np.ndarray) -> None:
        """Points chosen in the browser: codes as they are, features for their codes."""
        features = self.data.features.shape[1]
        codes = self.data.code_ids[rows[rows >= features] - features]
        self._stands_for_features = not len(codes) and bool(len(rows))
        if self._stands_for_features:
            codes = self.data.assignments[self.step.value][rows[rows < features]]
            if (codes < 0).all():
                self.say("Features were selected whose codes this snapshot did not store, so there is no card of them.")
                return
        self.say("" if len(rows) else f"Nothing is selected: no point lies there. {_HOW}")
        self._select(tuple(int(code) for code in np.unique(codes) if code >= 0))

    @_telling
    def _select(self, codes: tuple[int, ...], *, mark: bool = False, tell: bool = True) -> None:
        self.selected = codes
        if mark:
            self._mark(codes)
        if self.card is not None:
            self.card.show(codes)
        if tell:
            for listener in self._listeners:
                listener(codes)

    def _mark(self, codes: Sequence[int]) -> None:
        features = self.data.features.shape[1]
        rows = [self._row(code) for code in codes]
        self.canvas.mark([features + row for row in rows if row is not None])

    @_telling
    def _follow_card(self, codes: tuple[int, ...]) -> None:
        """The card went on to another code by itself: the map marks it too."""
        if codes and codes != self.selected:
            self.selected = codes
            self._mark(codes)
            for listener in self._listeners:
                listener(codes)


def step_controls(description: str) -> tuple[ipywidgets.Play, ipywidgets.SelectionSlider]:
    """A play button and the slider over steps that it moves, without a step yet."""
    step = ipywidgets.SelectionSlider(
        options=[("0", 0)],
        description=description,
        style={"description_width": "initial"},
        layout={"width": "min(100%, 420px)"},
    )
    play = ipywidgets.Play(min=0, max=0, interval=INTERVAL, show_repeat=False)
    ipywidgets.jslink((play, "value"), (step, "index"))
    return play, step


def _is_finished(run: Run | None) -> bool:
    """Whether nothing new will come, as of a checkpoint; a run whose facts are damaged may still train."""
    try:
        return run is None or run.status == "finished"
    except RunError:
        return False


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def scale_html(data: MapData, frame: int, coloring: Coloring, dark: bool) -> str:
    """What the colours and sizes mean, with the scale's ends, which hold for all steps."""
    colors, _, _ = palette(dark, coloring, len(data.code_ids))
    dot = '<span style="display:inline-block;width:{0}px;height:{0}px;border-radius:50%;background:{1}"></span>'
    parts = []
    if coloring.names:
        named = [f"{dot.format(11, colors[IN_USE + i])} {for_html(name)}" for i, name in enumerate(coloring.names)]
        parts.append(f"{for_html(coloring.unit)}: {' &nbsp;'.join(named)}")
    else:
        shades = "".join(
            f'<span style="display:inline-block;width:14px;height:10px;background:{color}"></span>'
            for color in colors[IN_USE : IN_USE + LEVELS]
        )
        shades = f'<span style="white-space:nowrap">{_number(coloring.least)} {shades} {_number(coloring.most)}</span>'
        parts.append(f"{for_html(coloring.unit)}: {shades} (one scale for all steps)")
    without = "dead codes" if data.can_call_dead(frame) else "codes without a hit"
    small = (
        f"{without}: small" if any((coloring.levels >= DEAD).flat[:: max(1, coloring.levels.size // 10_000)]) else ""
    )
    plain = f"{dot.format(7, colors[PLAIN])} {without if coloring.name == 'hits' else 'codes without a value'}"
    ring = dot.format(9, "none").replace("display", "border:1px solid currentColor;display")
    parts += [f"{ring} codes in use: large", small, plain]
    parts.append(f"{dot.format(4, colors[FEATURE])} features: smallest, pale")
    note = f"<br>{for_html(coloring.note, None)}" if coloring.note else ""
    return f'<div class="ibqlab-map-scale" style="{_TEXT}">{" &nbsp; ".join(filter(None, parts))}{note}</div>'
