"""What each run of a folder is and has come to, read quickly: settings, last results, dates, the note on it.

runs = RunIndex("runs").read()       # a RunSummary each, by name; read again, only what has changed is opened
runs[0].settings["optimizer.learning_rate"], runs[0].results["validation_psnr"], runs[0].note
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ibqlab.base.checks import is_finite_number
from ibqlab.base.escaping import for_terminal
from ibqlab.runs.commands import leaves
from ibqlab.runs.finding import run_folders, runs_root
from ibqlab.runs.kinds import kind_of, quantizer_settings
from ibqlab.runs.metrics import METRICS_FILE, last_of_each, last_rows
from ibqlab.runs.notes import NOTE_FILE, read_note
from ibqlab.runs.run import Run

RESULT_COLUMNS = (
    *("step", "loss", "usage", "usage_tokens", "perplexity", "validation_usage", "validation_perplexity"),
    *("validation_tokens", "validation_psnr", "validation_loss"),
)
"""Results that have a column of their own."""
RUN_COLUMNS = (
    *("name", "path", "status", "kind", "quantizer", "codebook_size", "code_dim", "codebook_init", "seed"),
    *RESULT_COLUMNS,
    *("losses", "duration_s", "started", "note", "problem", "config_hash"),
)
TEXTS = (
    *("name", "path", "status", "kind", "quantizer", "codebook_init", "losses", "started", "note", "problem"),
    "config_hash",
)
"""Columns of text; the others hold numbers."""
_OF_EVERY_ROW = ("loss", "usage", "perplexity")
"""None in the last row means that it is not finite by now."""
UNREADABLE = "unreadable"
"""Status of a run whose files are damaged."""
_FILES = ("config.yaml", "provenance.json", METRICS_FILE, NOTE_FILE)


@dataclass(frozen=True)
class RunSummary:
    """A run in a table of runs."""

    name: str
    """Path below the folder that is listed."""
    path: Path
    columns: Mapping[str, Any]
    """`RUN_COLUMNS`, as far as the run tells them."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys of its config.yaml → values."""
    results: Mapping[str, Any] = field(default_factory=dict)
    """The last value of every metric that is a finite number."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What provenance.json holds."""

    @property
    def note(self) -> str:
        """What somebody has written about it; "" for nothing."""
        return self.columns.get("note", "")

    @property
    def problem(self) -> str:
        """Why it cannot be read; "" where it can."""
        return self.columns.get("problem", "")


class RunIndex:
    """The runs of a folder, studies' runs included.

    Args:
        folder: searched with all its sub-folders; the folder of all runs by default.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder) if folder is not None else runs_root()
        self._known: dict[Path, tuple[Any, RunSummary]] = {}

    def read(self) -> list[RunSummary]:
        """All runs as they stand now, by name; what has not changed since the last time is not read again.

        A run that cannot be read is told as such; it never hides the others.
        """
        known = {}
        for path in run_folders(self.folder):
            mark = _mark(path)
            if path in self._known and self._known[path][0] == mark:
                known[path] = self._known[path]
            else:
                summary = summarize_run(path, self.folder)
                # Whether a process still trains it changes without a file.
                known[path] = (None if summary.columns.get("status") == "running" else mark), summary
        self._known = known
        return [summary for _, summary in known.values()]


def _mark(path: Path) -> Any:
    """What changes when a run does."""
    marks = []
    for name in _FILES:
        try:
            state = os.stat(path / name)
            marks.append((state.st_mtime_ns, state.st_size, state.st_ino))
        except OSError:
            marks.append(None)
    return tuple(marks)


def summarize_run(path: Path, folder: Path) -> RunSummary:
    """One run of a folder; what is wrong with it is its `problem`."""
    name = path.name if path == folder else path.relative_to(folder).as_posix()
    try:
        run = Run(path)
        settings, facts = dict(leaves(run.config)), run.provenance
        quantizer = quantizer_settings(run.config)
        # A number from before the run diverged says nothing of how it stands.
        last = (last_rows(path / METRICS_FILE) or [{}])[-1]
        lost = {name for name in _OF_EVERY_ROW if name in last and last[name] is None}
        results = {name: value for name, value in last_of_each(path, RESULT_COLUMNS).items() if name not in lost}
        row = {
            **{key: results.get(key) for key in RESULT_COLUMNS},
            "name": name,
            "path": str(path),
            "status": run.status,
            "kind": kind_of(run.config),
            "quantizer": quantizer.get("name"),
            "codebook_size": quantizer.get("codebook_size", settings.get("generator.vocabulary_size")),
            "code_dim": quantizer.get("code_dim"),
            "codebook_init": quantizer.get("codebook_init"),
            "seed": settings.get("seed", settings.get("settings.seed")),
            "losses": facts.get("losses"),
            "duration_s": facts.get("duration_s"),
            "started": _local_time(facts.get("started")),
            "note": read_note(path) or None,
            "config_hash": run.config_hash,
        }
        columns = {column: value for column, value in row.items() if _fits(column, value)}
        numbers = {key: value for key, value in results.items() if is_finite_number(value)}
        return RunSummary(name, path, columns, settings, numbers, facts)
    except Exception as error:  # one run's files, whatever they hold, must not hide the others
        problem = for_terminal(str(error) or type(error).__name__)
        return RunSummary(name, path, {"name": name, "path": str(path), "status": UNREADABLE, "problem": problem})


def _local_time(text: Any) -> str | None:
    """When something was, on this machine's clock: "2026-11-27 12:16"; None where that is not told."""
    try:
        return f"{datetime.fromisoformat(text).astimezone():%Y-%m-%d %H:%M}"
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _fits(column: str, value: Any) -> bool:
    """Whether a value out of a run's files is one of its column: text, or a number that 64 bits hold."""
    return isinstance(value, str) if column in TEXTS else is_finite_number(value) and abs(value) < 2**63
