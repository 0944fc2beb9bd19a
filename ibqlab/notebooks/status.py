"""What has come of a notebook so far: looked up in the folder of runs, which nothing here writes to.

A notebook leaves two things. Its study, runs or measurement lie in a folder that is named after it, or whose study.json
names it, or, for a single run, after recipe and settings; its executed copies lie under notebooks/<its name>.
"""

import re
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import RunError, UnreadableFile, is_ordinary, read_json
from ibqlab.base.locking import is_held
from ibqlab.notebooks.catalogue import NOTEBOOK_BYTES
from ibqlab.runs.view import SILENT_SECONDS, RunView

REPORTS = ("report.html", "figures/report.html", "figures/report.md", "report.md", "cards.md")
"""Where a study, a run or a measurement keeps its report, the best to read first."""


class NotebookStatus(NamedTuple):
    """How a notebook stands."""

    state: str
    """"not run yet", "running", "finished", "failed", or "stopped": begun, at rest, and not at its end."""
    when: float = 0.0
    """When the newest of its files was written, in seconds since 1970; 0 where there are none."""
    detail: str = ""
    """In words: the folder, and how many of its runs there are."""
    report: Path | None = None
    executed_copy: Path | None = None
    figures: tuple[Path, ...] = ()
    """Pictures that lie in the folder, by name."""

    def __str__(self) -> str:
        day = f" {datetime.fromtimestamp(self.when):%Y-%m-%d %H:%M}" if self.when else ""
        return f"{self.state}{day}" + (f" · {self.detail}" if self.detail else "")


def notebook_status(name: str, runs: Path, *, trains_one: bool = False) -> NotebookStatus:
    """How a notebook stands.

    Of several folders of one notebook the one that is running counts, else the newest.

    Args:
        name: of the notebook, without .ipynb.
        runs: the folder of all runs; it need not be there.
        trains_one: whether it trains a single run, whose folder `prepare_run` has named.
    """
    copy = newest_copy(name, runs)
    folders = [folder_status(folder) for folder in _folders_of(name, runs, trains_one)]
    found = max(folders, key=lambda status: (status.state == "running", status.when), default=None)
    if copy is None:
        return found or NotebookStatus("not run yet")
    executed = _status_of_copy(copy)
    # A copy that ended without an error says less about a study than its folder: how many of its runs there are.
    if found is None or (executed.state == "failed" and executed.when > found.when and found.state != "running"):
        return executed._replace(report=found.report if found else None, figures=found.figures if found else ())
    return found._replace(executed_copy=copy)


def newest_copy(name: str, runs: Path) -> Path | None:
    """The newest executed copy of a notebook; None where there is none."""
    return max((runs / "notebooks" / name).glob("*.ipynb"), key=_time_of, default=None)


def _folders_of(name: str, runs: Path, trains_one: bool) -> list[Path]:
    """Folders that a notebook has worked on."""
    folders = []
    with suppress(OSError):
        folders = [folder for folder in runs.iterdir() if folder.is_dir()]
    return [folder for folder in folders if _is_of(folder, name) or (trains_one and _is_run_by_settings(folder))]


def _is_run_by_settings(folder: Path) -> bool:
    return re.fullmatch(r".+-[0-9a-f]{12}", folder.name) is not None and is_ordinary(folder / "config.yaml")


def _is_of(folder: Path, name: str) -> bool:
    study = _read(folder / "study.json").get("study")
    return study == name if study else folder.name == name or folder.name.startswith(f"{name}-")


def folder_status(folder: Path) -> NotebookStatus:
    """How a study, a run, or a folder of results stands."""
    report = next((folder / file for file in REPORTS if is_ordinary(folder / file)), None)
    figures = tuple(sorted((*folder.glob("figures/*.png"), *folder.glob("*.png"))))
    about = {"report": report, "figures": figures}
    name = for_terminal(folder.name, 60)
    if (folder / "cells").is_dir():
        cells, rows = (_files_below(folder / kind) for kind in ("cells", "rows"))
        failed = _files_below(folder / "failed")
        detail = f"{name}: {len(rows)} of {len(cells)} runs" + (f", {len(failed)} failed" if failed else "")
        is_running = any(is_held(lock) for lock in (folder / "locks").rglob("*") if lock.is_file())
        at_rest = "failed" if failed else "finished" if len(rows) == len(cells) else "stopped"
        when = max(map(_time_of, (folder, *cells, *rows, *failed)))
        return NotebookStatus("running" if is_running else at_rest, when, detail, **about)
    if is_ordinary(folder / "config.yaml"):
        return _status_of_runs([folder], report, figures)
    runs = [path.parent for path in folder.glob("*/config.yaml")]
    if runs:
        return _status_of_runs(runs, report, figures)
    return NotebookStatus("finished" if report or figures else "stopped", _time_of(report or folder), name, **about)


def _status_of_runs(folders: list[Path], report: Path | None, figures: tuple[Path, ...]) -> NotebookStatus:
    """How one run stands, or several that lie in one folder: as the least finished of them."""
    states, words = [], ""
    for folder in folders:
        try:
            run = RunView(folder)
            states.append(run.status)
            words = run.describe_status().partition(";")[0]
        except RunError as error:
            states.append("failed")
            words = for_terminal(error)
    state = next((state for state in ("running", "failed", "stopped") if state in states), "stopped")
    if set(states) == {"finished"}:
        state = "finished"
    files = (folder / file for folder in folders for file in ("provenance.json", "metrics.jsonl", "config.yaml"))
    if len(folders) > 1:
        words = f"{states.count('finished')} of {len(states)} runs"
    where = folders[0] if len(folders) == 1 else folders[0].parent
    detail = f"{for_terminal(where.name, 60)}: {words}"
    return NotebookStatus(state, max(map(_time_of, files)), detail, report, None, figures)


def _status_of_copy(copy: Path) -> NotebookStatus:
    """How an execution ended, as papermill notes it in its copy."""
    try:
        noted = read_json(copy, limit=NOTEBOOK_BYTES).get("metadata", {}).get("papermill", {})
    except (OSError, UnreadableFile):
        noted = {}
    if noted.get("exception") or noted.get("end_time"):
        state = "failed" if noted.get("exception") else "finished"
    else:  # papermill writes it after every cell, and notes no process
        state = "running" if time.time() - _time_of(copy) < SILENT_SECONDS else "stopped"
    return NotebookStatus(state, _time_of(copy), executed_copy=copy)


def _files_below(folder: Path) -> list[Path]:
    return list(folder.rglob("*.json"))


def _time_of(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # deleted meanwhile
        return 0.0


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except (OSError, UnreadableFile):
        return {}
