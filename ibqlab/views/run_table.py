"""The table of runs as people read it: headings, numbers, and pages of HTML without a kernel.

catalogue = RunCatalogue("runs")                              # all runs below a folder, newest first
rows = catalogue.select("method=ibq psnr>20", sort="psnr")    # as of ibqlab.runs.queries
catalogue.cells(rows); table_html(catalogue, rows); difference_html(rows[:2])
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibqlab.base.checks import is_finite_number
from ibqlab.base.escaping import for_html, for_terminal
from ibqlab.base.measures import SHARE, is_measure, measure
from ibqlab.runs import RunIndex, RunSummary, runs_root
from ibqlab.runs.comparison import NOT_SET, differing_settings
from ibqlab.runs.finding import ROOT_NAME, find_run
from ibqlab.runs.notes import note_line
from ibqlab.runs.queries import RunNames, as_text, read_condition, split_conditions

NOTE_LETTERS = 40
"""Of a note in the table; all of it stands below."""
STATIC_ROWS = 200
"""Runs in a page without a kernel."""
COMPARED = 12
"""Runs whose settings or curves are shown beside each other at most."""
NEWEST = 6
"""Runs whose curves are drawn where none is selected."""
_HEADINGS = {
    "quantizer": "method",
    "codebook_size": "K",
    "code_dim": "D",
    "codebook_init": "start",
    "validation_tokens": "in tokens",
    "usage": "window usage",
    "usage_tokens": "in window tokens",
    "perplexity": "window perplexity (codes)",
    "duration_s": "duration",
    "started": "date",
}
"""Column → what stands above it; measures have titles of their own."""
_USUAL = (
    *("name", "note", "kind", "quantizer", "codebook_size", "code_dim", "codebook_init", "status", "step"),
    *("validation_usage", "validation_tokens", "validation_perplexity", "usage", "usage_tokens", "perplexity"),
    *("validation_psnr", "validation_loss", "duration_s", "started", "problem"),
)
_OF_WINDOW = {
    "usage": "validation_usage",
    "usage_tokens": "validation_tokens",
    "perplexity": "validation_perplexity",
}
"""Of the last training steps, which say less: shown where a run has nothing from a validation → what it should have."""
STYLE = f"<style>{Path(__file__).with_name('run_table.css').read_text(encoding='utf-8')}</style>"


@dataclass(frozen=True, kw_only=True)
class BrowserParameters:
    """What the notebook of runs shows."""

    folder: str = ""
    """With its sub-folders; empty: the folder of all runs."""
    conditions: str = ""
    """Which runs, typed as for `ibqlab runs`; empty: all."""
    sort: str = ""
    """A column, setting or result; empty: newest first."""

    def open(self) -> "RunCatalogue":
        """The runs of the folder.

        Raises:
            FileNotFoundError, QueryError: there is no such folder, or a condition or name that cannot be meant.
        """
        catalogue = RunCatalogue(self.folder)
        if catalogue.runs:
            catalogue.select(self.conditions, self.sort)
        return catalogue


class RunCatalogue:
    """All runs below a folder, for a table.

    Args:
        folder: searched with all its sub-folders; "": the folder of all runs, which need not exist yet.
    Raises:
        FileNotFoundError: there is no such folder; the message gives the nearest name.
    """

    def __init__(self, folder: str | Path = ""):
        root = runs_root()
        is_root = not str(folder) or (str(folder) == ROOT_NAME and not os.path.exists(folder))
        self.folder = root if is_root else find_run(folder, "folder of runs")
        self._index = RunIndex(self.folder)
        self.runs: list[RunSummary] = []
        """Newest first, those without a date last."""
        self.names = RunNames(())
        self.refresh()

    def refresh(self) -> None:
        """Read what has changed."""
        runs = sorted(self._index.read(), key=lambda run: run.name)
        self.runs = sorted(runs, key=lambda run: run.columns.get("started", ""), reverse=True)
        self.names = RunNames(self.runs)

    def select(self, text: str = "", sort: str = "") -> list[RunSummary]:
        """The runs that fulfil conditions, in an order.

        Args:
            text: conditions as of `ibqlab.runs.queries`.
            sort: a name, the best or least first, "-" in front for the other way round; "": newest first.
        Raises:
            QueryError: a condition or a name that cannot be meant.
        """
        chosen = self.names.select(split_conditions(text))
        return self.names.sort(chosen, sort) if sort else chosen

    def usual_columns(self) -> list[str]:
        """The columns that say most, as far as any run has them; the kind where there are several."""
        kinds = {run.columns.get("kind") for run in self.runs} - {None}

        def is_shown(name: str) -> bool:
            better = _OF_WINDOW.get(name, "")
            holds = [run for run in self.runs if run.columns.get(name) is not None]
            return any(run.columns.get(better) is None for run in holds)

        return [name for name in _USUAL if is_shown(name) and (name != "kind" or len(kinds) > 1)]

    def used_columns(self, text: str = "", sort: str = "") -> list[str]:
        """The columns by which runs are chosen or sorted, as of `select`; what decides is to be seen."""
        names = [read_condition(one).name for one in split_conditions(text)]
        return [self.names.full_name(name) for name in (*names, sort.removeprefix("-")) if name]

    def further_columns(self) -> list[str]:
        """Settings that are not the same in all runs, and results: what a table may show besides."""
        settings = [
            key
            for key in self.names.settings
            if len({as_text(run.settings.get(key)) for run in self.runs if not run.problem}) > 1
        ]
        usual = self.usual_columns()
        return [*settings, *(key for key in self.names.results if key not in usual)]

    def cells(self, runs: Sequence[RunSummary], further: Sequence[str] = ()) -> dict[str, list[str]]:
        """The table as text: heading → cells of the runs; "" where a run has no such value.

        Raises:
            QueryError: a further column that no run has.
        """
        names = [*self.usual_columns(), *(self.names.full_name(name) for name in further)]
        table = {}
        for name in dict.fromkeys(names):
            title = heading(name)
            table[title if title not in table else name] = _texts(name, list(map(self.names.reader(name), runs)))
        return table


def heading(name: str) -> str:
    """What stands above a column."""
    return _HEADINGS.get(name) or (measure(name).heading if is_measure(name) else name)


def _texts(name: str, values: Sequence[Any]) -> list[str]:
    """A column's cells; numbers so that they stand under each other and a table can sort them."""
    if name == "note":
        return [note_line(value or "", NOTE_LETTERS) for value in values]
    if name == "duration_s":
        return ["" if value is None else duration_text(value) for value in values]
    scale, sign = (100.0, "%") if is_measure(name) and measure(name).unit == SHARE else (1.0, "")
    numbers = [scale * abs(value) for value in values if is_finite_number(value)]
    digits = _decimals(numbers, 2 if sign else 0)
    return [
        f"{scale * value:,.{digits}f}{sign}"
        if is_finite_number(value) and digits is not None
        else f"{value:.4g}"
        if is_finite_number(value)
        else for_terminal(as_text(value))
        for value in values
    ]


def _decimals(numbers: Sequence[float], least: int) -> int | None:
    """Decimals that show four digits of the largest number; None where they would show nothing of the smallest."""
    sizes = [number for number in numbers if number]
    if not sizes or all(float(number).is_integer() for number in sizes):
        return least
    decimals = max(3 - math.floor(math.log10(max(sizes))), 1)
    if least or min(sizes) < 10.0**-decimals:
        return least or None
    while decimals > 1 and all(round(number, decimals - 1) == round(number, decimals) for number in sizes):
        decimals -= 1
    return decimals


def duration_text(seconds: float) -> str:
    """Hours, minutes and seconds, which sort as text: "00:00:43"."""
    whole = round(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def measures_of(runs: Sequence[RunSummary]) -> dict[str, str]:
    """The measures that any of some runs has logged, key → title, each title once."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.results) if is_measure(key)]
    titles: dict[str, str] = {}
    for key in keys:
        title = measure(key).heading
        titles[key] = f"{title}: {key}" if title in titles.values() else title
    return dict(sorted(titles.items(), key=lambda item: item[1].lower()))


def table_html(catalogue: RunCatalogue, runs: Sequence[RunSummary], further: Sequence[str] = ()) -> str:
    """The table as a page: at most `STATIC_ROWS` runs, and how many there are."""
    shown = runs[:STATIC_ROWS]
    cells = catalogue.cells(shown, further)
    more = f"<p>The first {len(shown):,} of {len(runs):,} runs.</p>" if len(shown) < len(runs) else ""
    return block(f"{_rows_html([*cells], zip(*cells.values(), strict=True))}{more}") if shown else ""


def difference_html(runs: Sequence[RunSummary]) -> str:
    """The settings in which runs differ, a column for each run; or one sentence.

    Raises:
        QueryError: as of `differing_settings`.
    """
    shown = runs[:COMPARED]
    rows = differing_settings(shown)
    names = " and ".join(run.name for run in shown)
    if not rows:
        return block(f"<p>{for_html(f'The settings of {names} are the same.', None)}</p>")
    body = ([key, *values] for key, values in rows.items())
    more = f"<p>The first {len(shown)} of {len(runs)} runs.</p>" if len(shown) < len(runs) else ""
    absent = f"<p>{NOT_SET}: the run has no such setting.</p>" if any(NOT_SET in row for row in rows.values()) else ""
    return block(f"{_rows_html(['what differs', *(run.name for run in shown)], body)}{more}{absent}")


def note_html(run: RunSummary) -> str:
    """The whole note on a run; "" where there is none."""
    return block(f"<p>{for_html(run.name)}:</p><pre>{_lines_html(run.note)}</pre>") if run.note else ""


def block(body: str) -> str:
    """HTML in the looks of these views, which `STYLE` gives."""
    return f'<div class="ibq-runs">{body}</div>'


def sentence(text: object) -> str:
    """Text as a paragraph that ends as a sentence does."""
    words = " ".join(str(text).split())
    return block(f"<p>{for_html(words if words.endswith(('.', '?', '!', '…')) else f'{words}.', None)}</p>")


def _lines_html(text: str) -> str:
    return "\n".join(for_html(line, None) for line in text.split("\n"))


def _rows_html(headings: Sequence[str], rows: Any) -> str:
    head = "".join(f"<th>{for_html(text)}</th>" for text in headings)
    body = "".join(f"<tr>{''.join(map(_cell_html, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell_html(text: str) -> str:
    is_number = text[:1].isdecimal() and text.strip("%").replace(",", "").replace(".", "", 1).isdecimal()
    kind = ' class="number"' if is_number else ""
    return f"<td{kind}>{for_html(text)}</td>"
