"""Where work stands, in one line that is kept up to date wherever somebody looks.

    terminal         the line is written over itself
    file or pipe     a new line now and then, so that a log can be read
    notebook         one output that changes; in a saved copy its last state stands, because it is no widget
    ibqlab run       the command reads the line from the file that $IBQLAB_PROGRESS names, which the notebook's kernel
                     writes, and shows it in its own terminal

Start with `ProgressLine`; `CountingLine` and `track_items` say how many of how many things are done.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ibqlab.base.escaping import for_terminal

FILE_VARIABLE = "IBQLAB_PROGRESS"
"""Environment variable: the file that a kernel leaves its line in."""
EVERY = 0.5
"""Least seconds between two states of a line that can be written over."""
LOG_EVERY = 10.0
"""Least seconds between two lines of a log."""
T = TypeVar("T")


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
        self.in_notebook = shown and in_notebook()
        self.rewritable = self.in_notebook or sys.stderr.isatty()
        self._due = 0.0
        self._written = ""
        self._output: Any = None

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *error: object) -> None:
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
            from IPython.display import display  # noqa: PLC0415 - only there is it certain to be installed

            tell(line=text)
            if self._output is None:
                self._output = display({"text/plain": text}, raw=True, display_id=True)
            else:
                self._output.update({"text/plain": text}, raw=True)
        elif self.rewritable:
            # One letter less than the terminal is wide, or the line would break and stay.
            print(f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
        self._due = time.monotonic() + (EVERY if self.rewritable else LOG_EVERY)


class CountingLine(ProgressLine):
    """A line that counts what is done: "tokens: 640 of 1,797 images · 12 s left".

        with CountingLine("tokens", total=1797, unit="images") as line:
            line.advance(64)

    Args:
        label: what is done.
        total: how many there are; None: nobody knows.
        unit: what they are, in the plural.
        shown: False: nothing is shown anywhere.
    """

    def __init__(self, label: str, total: int | None, unit: str, shown: bool = True):
        super().__init__(shown)
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.began = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """Count so many more as done."""
        self.done += count
        if self.total is None:
            self.show(f"{self.label}: {self.done:,} {self.unit}")
            return
        stands = f"{self.label}: {self.done:,} of {self.total:,} {self.unit}"
        left = (time.monotonic() - self.began) / max(1, self.done) * (self.total - self.done)
        self.show(f"{stands} · {time_left(left)} left" if self.done < self.total else stands)


def track_items(items: Iterable[T], label: str, unit: str, total: int | None = None, shown: bool = True) -> Iterator[T]:
    """The items, with a line that says how many of them are done.

    Args:
        items: what to go through.
        label, unit, shown: as of `CountingLine`.
        total: how many there are; None: `len(items)`.
    """
    with CountingLine(label, len(items) if total is None else total, unit, shown) as line:
        for item in items:
            yield item
            line.advance()


def notice(text: object) -> None:
    """One line about the work, which stays on the screen."""
    print(for_terminal(text, None), file=sys.stderr, flush=True)


def in_notebook() -> bool:
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


# --- between a notebook's kernel and the command that executes it -----------------------------------------------------

_facts: dict[str, str] = {}


def tell(**facts: str) -> None:
    """Tell the command that executes this notebook; nobody listens elsewhere.

    Args:
        **facts: "line": where the work stands; "folder": of the study or run that is worked on; "result": what came
            of it in a sentence, where its folder does not say.
    """
    file = os.environ.get(FILE_VARIABLE)
    # A process that the kernel has started inherits the variable, but speaks for itself alone.
    if not file or not in_notebook():
        return
    _facts.update(facts)
    temporary = f"{file}.part"
    # A line that cannot be shown must not end the work.
    with suppress(OSError):
        Path(temporary).write_text(json.dumps(_facts), encoding="utf-8")
        os.replace(temporary, file)


def heard(file: str | Path) -> dict[str, str]:
    """What was told last."""
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
