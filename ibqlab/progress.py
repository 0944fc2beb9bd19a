"""Where work stands, in one line that is kept up to date wherever somebody looks.

    terminal         the line is written over itself
    file or pipe     a new line now and then, so that a log can be read
    notebook         one output that changes; in a saved copy its last state stands, because it is no widget
    ibqlab run       the command reads the line from the file that $IBQLAB_PROGRESS names, which the notebook's kernel
                     writes, and shows it in its own terminal

Start with `ProgressLine`.
"""

import json
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ibqlab.escaping import for_terminal
from ibqlab.files import UnreadableFile, parse_json

FILE_VARIABLE = "IBQLAB_PROGRESS"
"""Environment variable: the file that a kernel leaves its line in."""
EVERY = 0.5
"""Least seconds between two states of a line that can be written over."""
LOG_EVERY = 10.0
"""Least seconds between two lines of a log."""
SHORTEST = 50
"""Training steps; figures and results of shorter runs say that they mean nothing."""
TAIL_BYTES = 32 * 1024
"""Of a run's metrics that are read: some twenty rows."""


class ProgressLine:
    """One line about work in progress.

        with ProgressLine() as line:
            line.show("step 3 of 10")

    Args:
        shown: False: nothing is shown anywhere.
    """

    def __init__(self, shown: bool = True):
        self.shown = shown
        self.text = ""
        self.in_notebook = shown and _in_notebook()
        self.rewritable = self.in_notebook or sys.stderr.isatty()
        self._due = 0.0
        self._written = ""
        self._output: Any = None

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def due(self) -> bool:
        """Whether a new state would be shown now, for those to whom working it out costs something."""
        return self.shown and time.monotonic() >= self._due

    def show(self, text: str) -> None:
        """Say where the work stands; the last of several states that follow each other closely is shown by `close`."""
        self.text = text
        if self.due and text != self._written:
            self._write()

    def close(self) -> None:
        """Leave the last state where it can be read later."""
        if self.shown and self.text and self.text != self._written:
            self._write()
        if self._written and not self.in_notebook and self.rewritable:
            print(file=sys.stderr, flush=True)
        if self.shown and self.in_notebook:
            tell(line="")
        self.text = self._written = ""

    def _write(self) -> None:
        self._written, text = self.text, for_terminal(self.text, None)
        if self.in_notebook:
            tell(line=text)
            self._show_in_notebook(text)
        elif self.rewritable:
            # One letter less than the terminal is wide, or the line would break and stay.
            print(f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
        self._due = time.monotonic() + (EVERY if self.rewritable else LOG_EVERY)

    def _show_in_notebook(self, text: str) -> None:
        from IPython.display import display  # noqa: PLC0415 - only there is it certain to be installed

        if self._output is None:
            self._output = display({"text/plain": text}, raw=True, display_id=True)
        else:
            self._output.update({"text/plain": text}, raw=True)


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config


def time_left(seconds: float) -> str:
    """A time as people say it: "12 s", "2 min 10 s", "3 h 5 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def why_too_short(steps: Any, preset: str = "") -> str:
    """Why runs are too short to mean anything: their preset, or their steps; "" where they are not."""
    if preset == "smoke":
        return "preset smoke"
    return f"{steps} steps" if isinstance(steps, (int, float)) and steps < SHORTEST else ""


def last_values(file: Path) -> dict[str, Any]:
    """The last value of every metric in the last rows of a run's metrics.jsonl; {} before the first row."""
    values: dict[str, Any] = {}
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
            lines = stream.read().split(b"\n")
    except OSError:
        return values
    for line in lines:
        # The first line may be cut, and so may the last one, which is being written.
        with suppress(UnreadableFile, UnicodeDecodeError):
            values |= {key: value for key, value in parse_json(line, file.name).items() if value is not None}
    return values


# --- between a notebook's kernel and the command that executes it -----------------------------------------------------

_told: dict[str, str] = {}


def tell(**facts: str) -> None:
    """Tell the command that executes this notebook; nobody listens elsewhere.

    Args:
        **facts: "line": where the work stands; "folder": of the study or run that is worked on; "result": what came
            of it in a sentence, where its folder does not say.
    """
    file = os.environ.get(FILE_VARIABLE)
    # A process that the kernel has started inherits the variable, but speaks for itself alone.
    if not file or not _in_notebook():
        return
    _told.update(facts)
    part = f"{file}.part"
    # A line that cannot be shown must not end the work.
    with suppress(OSError):
        Path(part).write_text(json.dumps(_told), encoding="utf-8")
        os.replace(part, file)


def heard(file: str | Path) -> dict[str, str]:
    """What was told last."""
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
