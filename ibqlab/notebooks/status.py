"""What has come of a notebook so far: looked up in the folder of runs, which nothing here writes to.

A notebook leaves two things. Its study, runs or measurement lie in a folder that is named after it, or whose study.json
names it, or, for a single run, after recipe and settings; atlases lie in folders of their own. Its executed copies lie
under notebooks/<its name>.
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
from ibqlab.notebooks.results import steps_of
from ibqlab.runs.caveats import why_too_short
from ibqlab.runs.finding import run_folders
from ibqlab.runs.view import SILENT_SECONDS, RunView
from ibqlab.views.atlas_facts import atlas_facts, is_atlas

REPORTS = ("report.html", "figures/report.html", "figures/report.md", "report.md", "cards.md")
"""Where a study, a run or a measurement keeps its report, the best to read first."""


class NotebookStatus(NamedTuple):
    """How a notebook stands."""

    state: str
    """"not run yet", "running", "finished", "failed", or "stopped": begun, at rest, and not at its end; or "ready": it
    leaves nothing that would tell."""
    when: float = 0.0
    """When the newest of its files was written, in seconds since 1970; 0 where there are none."""
    detail: str = ""
    """In words: the folder, and how many of its runs there are."""
    report: Path | None = None
    executed_copy: Path | None = None
    figures: tuple[Path, ...] = ()
    """Pictures that lie in the folder, by name."""
    too_short: str = ""
    """Of what has finished, why it is too short to mean anything: its preset or its steps; "" where it is not."""

    def __str__(self) -> str:
        day = f" {datetime.fromtimestamp(self.when):%Y-%m-%d %H:%M}" if self.when else ""
        short = f"{self.too_short}: too short to mean anything" if self.too_short else ""
        return " · ".join(filter(None, (f"{self.state}{day}", self.detail, short)))


def notebook_status(
    name: str, runs: Path, *, trains_one: bool = False, writes_atlases: bool = False, looks_at_runs: bool = False
) -> NotebookStatus:
    """How a notebook stands.

    Of several folders of one notebook the one that is running counts, else the newest.

    Args:
        name: of the notebook, without .ipynb.
        runs: the folder of all runs; it need not be there.
        trains_one: whether it trains a single run, whose folder `prepare_run` has named.
        writes_atlases: whether it writes an atlas of a run, as the command of that name does, too.
        looks_at_runs: whether it only shows the runs that are there.
    """
    copy = newest_copy(name, runs)
    folders = [folder_status(folder) for folder in _folders_of(name, runs, trains_one, writes_atlases)]
    found = max(folders, key=lambda status: (status.state == "running", status.when), default=None)
    if copy is None:
        return found or (_status_of_browser(runs) if looks_at_runs else NotebookStatus("not run yet"))
    executed = _status_of_copy(copy)
    # A copy that ended without an error says less about a study than its folder: how many of its runs there are.
    if found is None or (executed.state == "failed" and executed.when > found.when and found.state != "running"):
        return executed._replace(report=found.report if found else None, figures=found.figures if found else ())
    return found._replace(executed_copy=copy)


def newest_copy(name: str, runs: Path) -> Path | None:
    """The newest executed copy of a notebook; None where there is none."""
    return max((runs / "notebooks" / name).glob("*.ipynb"), key=_time_of, default=None)


def _status_of_browser(runs: Path) -> NotebookStatus:
    """Of a notebook that only shows runs: how many there are."""
    count = sum(1 for _ in run_folders(runs))
    return NotebookStatus("ready", detail=f"{count:,} run{'' if count == 1 else 's'} to look at")


def _folders_of(name: str, runs: Path, trains_one: bool, writes_atlases: bool) -> list[Path]:
    """Folders that a notebook has worked on."""
    folders = []
    with suppress(OSError):
        folders = [folder for folder in runs.iterdir() if folder.is_dir()]
    # An atlas of a study's run starts with the study's name, and is none of its folders.
    atlases = [folder for folder in folders if is_atlas(folder)]
    if writes_atlases:
        return atlases
    others = (folder for folder in folders if folder not in atlases)
    return [folder for folder in others if _is_of(folder, name) or (trains_one and _is_run_by_settings(folder))]


def _is_run_by_settings(folder: Path) -> bool:
    return re.fullmatch(r".+-[0-9a-f]{12}", folder.name) is not None and is_ordinary(folder / "config.yaml")


def _is_of(folder: Path, name: str) -> bool:
    study = _read(folder / "study.json").get("study")
    return study == name if study else folder.name == name or folder.name.startswith(f"{name}-")


def folder_status(folder: Path) -> NotebookStatus:
    """How a study, a run, or a folder of results stands."""
    if is_atlas(folder):
        page, steps = folder / "index.html", atlas_facts(folder).get("steps")
        short = why_too_short(steps[-1]) if isinstance(steps, list) and steps else ""
        return NotebookStatus("finished", _time_of(page), for_terminal(folder.name, 60), page, too_short=short)
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
        state = "running" if is_running else at_rest
        return _with_shortness(NotebookStatus(state, when, detail, **about), folder, steps_of(folder))
    if is_ordinary(folder / "config.yaml"):
        return _status_of_runs([folder], folder, report, figures)
    runs = [path.parent for path in folder.glob("*/config.yaml")]
    if runs:
        return _status_of_runs(runs, folder, report, figures)
    state = "finished" if report or figures else "stopped"
    return _with_shortness(NotebookStatus(state, _time_of(report or folder), name, **about), folder, steps_of(folder))


def _with_shortness(status: NotebookStatus, folder: Path, steps: Any) -> NotebookStatus:
    """The status of a folder, and why what has finished in it is too short to mean anything, if it is."""
    if status.state != "finished":
        return status
    preset = _read(folder / "parameters.json").get("preset") or ("smoke" if folder.name.endswith("-smoke") else "")
    return status._replace(too_short=why_too_short(steps, preset))


def _status_of_runs(folders: list[Path], where: Path, report: Path | None, figures: tuple[Path, ...]) -> NotebookStatus:
    """How one run stands, or several that lie in the folder `where`: as the least finished of them."""
    states, words, steps = [], "", []
    for folder in folders:
        try:
            run = RunView(folder)
            states.append(run.status)
            words = run.describe_status().partition(";")[0]
            steps.append(run.step)
        except RunError as error:
            states.append("failed")
            words = for_terminal(error)
    state = next((state for state in ("running", "failed", "stopped") if state in states), "stopped")
    if set(states) == {"finished"}:
        state = "finished"
    files = (folder / file for folder in folders for file in ("provenance.json", "metrics.jsonl", "config.yaml"))
    if len(folders) > 1:
        words = f"{states.count('finished')} of {len(states)} runs"
    detail = f"{for_terminal((where if len(folders) > 1 else folders[0]).name, 60)}: {words}"
    status = NotebookStatus(state, max(map(_time_of, files)), detail, report, None, figures)
    return _with_shortness(status, where, max(steps, default=None))


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
    values = noted.get("parameters")
    preset = values.get("preset", "") if isinstance(values, dict) else ""
    short = why_too_short(None, preset) if state == "finished" else ""
    return NotebookStatus(state, _time_of(copy), executed_copy=copy, too_short=short)


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
