"""All runs of a folder in one table: found again, compared, noted, and opened in every other view."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
from itables.widget import ITable

from ibqlab.base.measures import measure
from ibqlab.runs import Run, RunSummary, write_note
from ibqlab.views import run_table
from ibqlab.views.run_table import RunCatalogue
from ibqlab.widgets.code_card import CodeCard
from ibqlab.widgets.codebook_map import CodebookMap
from ibqlab.widgets.linked_maps import link_maps
from ibqlab.widgets.live import picture_html, with_static_page
from ibqlab.widgets.run_explorer import explore_run
from ibqlab.widgets.token_view import TokenView, compare_tokens
from ibqlab.widgets.training_view import TrainingView, plot_runs_together

VIEWS: dict[str, Callable[[Path], ipywidgets.Widget]] = {
    "map of codes": CodebookMap,
    "cards of codes": CodeCard,
    "tokens of images": TokenView,
    "step by step": lambda path: explore_run(Run(path)),
    "training": TrainingView,
}
"""What a button says → the view of a run's folder that it opens."""
PAIR_VIEWS: dict[str, Callable[[Path, Path], ipywidgets.Widget]] = {
    "both maps": lambda first, second: link_maps(CodebookMap(first), CodebookMap(second)),
    "both on one image": compare_tokens,
}
"""Likewise of the first two runs that are selected."""
FIRST_MEASURES = ("validation_usage", "usage", "validation_loss", "loss")
"""Drawn until another is chosen: the first that there is."""
PAGE_ROWS = 15
_AUTO = {"width": "auto"}


class RunBrowser(ipywidgets.VBox):
    """A table of runs with filter and sort; below it what the selected ones have in common and what not.

    A click selects a row, Ctrl-click and Shift-click several. Of what is selected one measure is drawn over the steps
    and settings that differ are listed; a note is written to the run's folder; buttons open a run in another view.

    Args:
        folder: searched with all its sub-folders, studies' runs included; "": the folder of all runs.
        conditions: in the filter at first, as of `ibqlab.runs.queries`; "": all runs are shown.
        sort: likewise, a column, setting or result; "": newest first.
    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: str | Path | RunCatalogue = "", conditions: str = "", sort: str = ""):
        self.catalogue = folder if isinstance(folder, RunCatalogue) else RunCatalogue(folder)
        self.shown: list[RunSummary] = []
        """The table's rows."""
        self.selected: list[str] = []
        """Names of the runs that are selected."""
        self._further: list[str] = []
        self._pair: list[str] = []  # of the view of two runs that is open
        self._noted = ("", "")  # the run whose note can be changed, and what its folder holds
        self._silent = False
        self.filter = ipywidgets.Text(
            value=conditions,
            description="filter",
            placeholder="method=ibq psnr>20 ~word",
            continuous_update=False,
            layout={"width": "330px"},
        )
        self.sort = ipywidgets.Combobox(
            value=sort,
            description="sort by",
            placeholder="newest first",
            continuous_update=False,
            layout={"width": "250px"},
        )
        self.column = ipywidgets.Combobox(
            description="add column",
            placeholder="a setting or result",
            continuous_update=False,
            layout={"width": "300px"},
        )
        self.fewer = ipywidgets.Button(description="usual columns", layout=_AUTO)
        self.reload = ipywidgets.Button(description="↻ refresh", layout=_AUTO)
        self.said = ipywidgets.HTML()
        self.table = ipywidgets.VBox()
        self.measure = ipywidgets.Dropdown(description="draw", layout={"width": "330px"})
        self.overlay = ipywidgets.HTML(layout={"flex": "3 1 440px", "max_width": "780px"})
        self.difference = ipywidgets.HTML(layout={"flex": "2 1 340px"})
        self.run = ipywidgets.Dropdown(description="run", layout={"width": "min(100%, 420px)"})
        self.note = ipywidgets.Textarea(
            description="note",
            placeholder="what this run was for",
            layout={"width": "min(100%, 600px)", "height": "64px"},
        )
        self.save = ipywidgets.Button(description="save note", layout=_AUTO)
        self.buttons = {text: ipywidgets.Button(description=text, layout=_AUTO) for text in (*VIEWS, *PAIR_VIEWS)}
        self.answer = ipywidgets.HTML()
        self.view = ipywidgets.VBox()
        rows = [
            [self.filter, self.sort, self.column, self.fewer, self.reload],
            [self.run, ipywidgets.HTML("open:"), *self.buttons.values()],
            [self.note, self.save],
        ]
        top, opening, noting = (ipywidgets.HBox(row, layout={"flex_flow": "row wrap"}) for row in rows)
        beside = ipywidgets.HBox([self.overlay, self.difference], layout={"flex_flow": "row wrap"})
        self.details = ipywidgets.VBox([self.measure, beside])
        self.single = ipywidgets.VBox([opening, noting, self.answer, self.view])
        super().__init__([ipywidgets.HTML(run_table.STYLE), top, self.said, self.table, self.details, self.single])
        self.add_class("ibqlab-run-browser")
        self.difference.add_class("ibqlab-run-difference")
        self.answer.add_class("ibqlab-run-answer")
        self.filter.observe(self._guarded(self._show), names="value")
        self.sort.observe(self._guarded(self._show), names="value")
        self.column.observe(self._guarded(self._add_column), names="value")
        self.measure.observe(self._guarded(self._draw), names="value")
        self.run.observe(self._guarded(self._choose_run), names="value")
        for button, work in ((self.reload, self.refresh), (self.fewer, self._drop_columns), (self.save, self._save)):
            button.on_click(self._guarded(work))
        for text, button in self.buttons.items():
            button.on_click(self._guarded(lambda text=text: self.open_view(text)))
        self._offer()
        self._guarded(self._show)(None)

    # --- what others call ---

    def refresh(self) -> None:
        """Read the folder again: new runs appear, and those that train have gone on."""
        self.catalogue.refresh()
        self._offer()
        self._show()

    def select(self, names: Sequence[str]) -> None:
        """Select runs of the table by name, as clicks do; those that are not shown are left out."""
        places = {run.name: place for place, run in enumerate(self.shown)}
        rows = [places[name] for name in names if name in places]
        self._silent = True
        for table in self.table.children:
            table.selected_rows = rows
        self._silent = False
        self._choose(rows)

    def open_view(self, view: str) -> None:
        """Open the run that is chosen in another view, below; what it lacks for that is said in a sentence.

        Args:
            view: a key of `VIEWS`, or of `PAIR_VIEWS` where two runs are selected.
        """
        self._close_view()
        runs = self._selected_runs()[:2] if view in PAIR_VIEWS else [run for run in [self._chosen_run()] if run]
        names = " and ".join(run.name for run in runs)
        if len(runs) < (2 if view in PAIR_VIEWS else 1):
            self._answer(f"Select {'two runs' if view in PAIR_VIEWS else 'a run'} in the table first.")
            return
        self._answer(f"Opening: {view}, {names} …")
        try:
            self.view.children = [(VIEWS | PAIR_VIEWS)[view](*(run.path for run in runs))]
        except Exception as error:  # whatever another view cannot do with this run, its reader gets a sentence
            self._answer(f"No {view} of {names}: {error}")
            return
        self._pair = [run.name for run in runs] if view in PAIR_VIEWS else []
        self._answer(f"{view[:1].upper()}{view[1:]}: {names}")

    def static_html(self) -> str:
        """Table, curves and differences as they are shown now."""
        table = run_table.table_html(self.catalogue, self.shown, self._further)
        notes = "".join(run_table.note_html(run) for run in self._selected_runs())
        return f"{run_table.STYLE}{self.said.value}{table}{self.overlay.value}{self.difference.value}{notes}"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return with_static_page(super()._repr_mimebundle_(**kwargs), self.static_html())

    # --- inside ---

    def _guarded(self, work: Callable[[], None]) -> Callable[[Any], None]:
        """A callback that says what is wrong: an error in it would be seen by nobody."""

        def call(_: Any) -> None:
            if self._silent:
                return
            try:
                work()
            except (RuntimeError, ValueError, OSError, LookupError) as error:
                self.said.value = run_table.sentence(error)

        return call

    def _offer(self) -> None:
        """The names that may be typed."""
        usual = self.catalogue.usual_columns()
        further = self.catalogue.further_columns()
        self.column.options = further
        self.sort.options = [*usual, *(f"-{name}" for name in usual), *further]

    def _show(self) -> None:
        """The table by filter, order and columns; what was selected stays selected where it is still shown."""
        if not self.catalogue.runs:
            where = self.catalogue.folder
            gone = "" if where.is_dir() else ", which does not exist"
            self._fill([], f"No runs in {where}{gone}: make one with `ibqlab train builtin/smoke`, then press refresh.")
            return
        shown = self.catalogue.select(self.filter.value, self.sort.value.strip())
        used = self.catalogue.used_columns(self.filter.value, self.sort.value.strip())
        cells = self.catalogue.cells(shown, [*self._further, *used])
        order = f"sorted by {self.sort.value.strip()}" if self.sort.value.strip() else "newest first"
        count = f"{len(shown):,} of {len(self.catalogue.runs):,} runs" if self.filter.value else f"{len(shown):,} runs"
        words = f"{count} in {self.catalogue.folder}, {order}, read at {time.strftime('%H:%M:%S')}."
        hint = "Click a row to select it, Ctrl-click or Shift-click several." if shown else "No run fulfils the filter."
        self._fill(shown, f"{words} {hint}", cells)

    def _fill(self, shown: list[RunSummary], words: str, cells: dict[str, list[str]] | None = None) -> None:
        self.shown = shown
        self.said.value = run_table.sentence(words)
        places = {run.name: place for place, run in enumerate(shown)}
        rows = [places[name] for name in self.selected if name in places]
        for old in self.table.children:
            old.close()
        self.table.children = [self._make_table(cells, rows)] if shown and cells else []
        self._choose(rows)

    def _make_table(self, cells: dict[str, list[str]], rows: list[int]) -> ITable:
        # A new one each time: an ITable that gets other data no longer hears of clicks.
        table = ITable(
            pd.DataFrame(cells, dtype=object),
            select=True,
            selected_rows=rows,
            maxBytes=0,
            maxColumns=0,
            pageLength=PAGE_ROWS,
            lengthMenu=[PAGE_ROWS, 50, 200],
            scrollX=True,
            fixedColumns={"start": 1},
            showIndex=False,
            style="width:100%;margin:0",
            language={"search": "find:", "lengthMenu": "_MENU_ rows", "emptyTable": "no runs"},
        )
        table.observe(lambda change: self._guarded(lambda: self._choose(change["new"]))(None), names="selected_rows")
        return table

    def _choose(self, rows: Sequence[int]) -> None:
        """Rows of the table are selected: draw and compare them."""
        self.selected = [self.shown[row].name for row in rows if row < len(self.shown)]
        runs = self._compared_runs()
        self._silent = True
        titles = run_table.measures_of(runs)
        options = [(title, key) for key, title in titles.items()]
        before = self.measure.value
        first = next((key for key in (before, *FIRST_MEASURES, *titles) if key in titles), None)
        self.measure.options = options
        self.measure.value = first
        one = self.run.value
        self.run.options = self.selected
        self.run.value = one if one in self.selected else next(iter(self.selected), None)
        self._silent = False
        pairs = [(self.buttons[text], len(self.selected) > 1) for text in PAIR_VIEWS]
        for part, is_there in ((self.details, bool(runs)), (self.single, bool(self.selected)), *pairs):
            part.layout.display = "" if is_there else "none"
        self._draw()
        self._list_differences()
        self._choose_run()

    def _selected_runs(self) -> list[RunSummary]:
        names = set(self.selected)
        return [run for run in self.shown if run.name in names]

    def _compared_runs(self) -> list[RunSummary]:
        """Those selected; else the newest of the table."""
        if self.selected:
            return [run for run in self._selected_runs() if not run.problem]
        dated = sorted(self.shown, key=lambda run: run.columns.get("started", ""), reverse=True)
        return [run for run in dated if not run.problem][: run_table.NEWEST]

    def _draw(self) -> None:
        """One measure of the runs over their steps."""
        key, runs = self.measure.value, self._compared_runs()
        if key is None:
            self.overlay.value = run_table.sentence("Nothing is logged yet that could be drawn") if runs else ""
            return
        drawn, missing = runs[: run_table.COMPARED], []
        curves = {}
        for run in drawn:
            try:
                rows = Run(run.path).metrics
            except (RuntimeError, ValueError, OSError) as error:
                missing.append(f"{error}.")
                continue
            if key not in rows or not rows[key].notna().any():
                missing.append(f"{run.name} has logged none.")
            curves[run.name] = rows
        figure = plot_runs_together(curves, key) if curves else None
        title = measure(key).panel_title
        what = "selected" if self.selected else "newest"
        total = len(runs) if self.selected else len(self.shown)
        which = f"{len(drawn)} {what} runs of {total:,}" if len(drawn) < total else f"{what} runs"
        words = f"{title} of the {which}"
        picture = picture_html(figure, f"{words}: {', '.join(curves)}") if figure else ""
        self.overlay.value = f"{run_table.sentence(' '.join([f'{words}.', *missing]))}{picture}"

    def _list_differences(self) -> None:
        """What differs between the settings of the runs that are selected."""
        runs = self._selected_runs()
        readable = [run for run in runs if not run.problem]
        unread = [f"{run.name} cannot be read: {run.problem}" for run in runs if run.problem]
        table = run_table.difference_html(readable) if len(readable) > 1 else ""
        self.difference.value = table + "".join(map(run_table.sentence, unread))
        self.difference.layout.display = "" if self.difference.value else "none"

    def _chosen_run(self) -> RunSummary | None:
        return next((run for run in self.shown if run.name == self.run.value), None)

    def _choose_run(self) -> None:
        """Another run's note; what was open of the one before is closed. A note that is being typed stays."""
        run = self._chosen_run()
        note = run.note if run else ""
        is_same = run is not None and run.name == self._noted[0]
        if not is_same or self.note.value == self._noted[1]:
            self.note.value = note
        self._noted = (run.name if run else "", note)
        if not is_same or (self._pair and self._pair != [one.name for one in self._selected_runs()[:2]]):
            self._close_view()
            self._answer("")

    def _save(self) -> None:
        run = self._chosen_run()
        if run is None:
            self._answer("Select a run in the table first.")
            return
        try:
            write_note(run.path, self.note.value)
        except (RuntimeError, ValueError, OSError) as error:
            self._answer(f"No note was written: {error}")
            return
        self.refresh()
        self._answer(f"The note on {run.name} is kept in its folder, as note.txt.")

    def _add_column(self) -> None:
        name = self.column.value.strip()
        if not name:
            return
        further = [*self._further, self.catalogue.names.full_name(name)]
        self._further = list(dict.fromkeys(further))
        self._silent, self.column.value = True, ""
        self._silent = False
        self._show()

    def _drop_columns(self) -> None:
        self._further = []
        self._show()

    def _answer(self, text: str) -> None:
        self.answer.value = run_table.sentence(text) if text else ""

    def _close_view(self) -> None:
        for view in self.view.children:
            watching = getattr(view, "_watching", None)
            if watching is not None:
                watching.cancel()
            view.close()
        self.view.children, self._pair = [], []
