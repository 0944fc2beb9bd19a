"""What the alarm told in the runs of a study: how many runs each rule went off in, and which ones it stopped."""

from contextlib import suppress
from urllib.parse import quote

import pandas as pd

from ibqlab.base.escaping import for_markdown
from ibqlab.diagnostics.alarm import AlarmEvent
from ibqlab.grids.cells import STOPPED
from ibqlab.runs import Run, RunError
from ibqlab.runs.metrics import ALARMS_FILE
from ibqlab.studies.pages import join_parts, to_markdown
from ibqlab.studies.study import Study

SHOWN_RUNS = 8
"""Runs that are named for a rule; the others are counted."""


def study_alarms(study: Study) -> pd.DataFrame:
    """The alarms that were told in a study's runs while they trained, finished or not.

    Returns:
        One row per event: run, step, rule, title, seen, remedy, in the order of the cells; empty where there is none.
    """
    events = []
    for cell in study.cells:
        if not (study.folder / cell.name / ALARMS_FILE).is_file():
            continue
        with suppress(RunError):  # a damaged note
            for event in map(AlarmEvent.of_row, Run(study.folder / cell.name).alarms):
                shown = {"title": event.title, "seen": event.seen, "remedy": event.remedy}
                events.append({"run": cell.name, "step": event.step, "rule": event.rule, **shown})
    return pd.DataFrame(events, columns=["run", "step", "rule", "title", "seen", "remedy"])


def describe_study_alarms(study: Study) -> str:
    """The section of a study's report on its alarms, with links to what each run was told; "" where there is none."""
    events, total = study_alarms(study), len(study.cells)
    rows = {cell.name: row for cell in study.cells if (row := study.store.row(cell))}
    stopped = {name: row[STOPPED] for name, row in rows.items() if row.get(STOPPED)}
    if events.empty and not stopped:
        return ""
    lines = []
    for title, group in events.groupby("title", sort=False):
        runs = group["run"].drop_duplicates().tolist()
        links = ", ".join(f"[{for_markdown(name)}]({_link(study, name)})" for name in runs[:SHOWN_RUNS])
        more = f" and {len(runs) - SHOWN_RUNS} more" if runs[SHOWN_RUNS:] else ""
        lines.append(
            f"- **{for_markdown(title)}** in {len(runs)} of {total} runs, first at step {group['step'].min():,}: "
            f"{links}{more}"
        )
    table = pd.DataFrame({"run": list(stopped), "stopped by the alarm": list(stopped.values())})
    table["numbers of step"] = [rows[name].get("validation_step", "not noted") for name in stopped]
    return join_parts(
        "## Alarms",
        "\n".join(lines),
        to_markdown(table) if stopped else "",
        "These runs have ended before their last step, as their recipe asks for. Their numbers are those of their last "
        "whole validation, so they stand beside runs of more steps."
        if stopped
        else "",
    )


def _link(study: Study, name: str) -> str:
    """From the study's page to a run's report, or to the note of its alarms where it has none."""
    page = "report.html" if (study.folder / name / "report.html").is_file() else ALARMS_FILE
    return quote(f"{name}/{page}")
