"""Where a study stands, read from the folders of the runs that are being trained."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ibqlab.base.measures import measure
from ibqlab.base.progress import ProgressLine, tell, time_left
from ibqlab.grids.cells import Cell, CellStore
from ibqlab.runs.metrics import last_values


class StudyProgress(ProgressLine):
    """The line of a study: the run that is trained longest, its step, loss and usage, and the study's time left.

    Args:
        cells: all runs of the study, by name.
        missing: names of those that are not finished.
        store: of the study's folder.
        shown: False: nothing is shown.
    """

    def __init__(self, cells: Mapping[str, Cell], missing: Sequence[str], store: CellStore, shown: bool = True):
        super().__init__(shown)
        tell(folder=str(store.folder.resolve()))
        self.cells, self.store = cells, store
        self.steps = {name: cells[name].config.steps for name in missing}
        self.reached = {name: store.last_step(name) for name in missing} if shown else {}
        """Steps that each run had done when it was last looked at."""
        self.done_before = sum(self.reached.values())
        self.began = time.monotonic()

    def look(self, running: Sequence[str], finished: int) -> None:
        """Read where the runs stand that are being trained, if it is time to show it.

        Args:
            running: names of those that are trained now, the longest first.
            finished: how many runs of the study are finished.
        """
        if not self.due or not running:
            return
        rows = {name: last_values(self.store.folder / name / "metrics.jsonl") for name in running}
        self.reached |= {name: row["step"] for name, row in rows.items() if isinstance(row.get("step"), int)}
        name = running[0]
        # What must be read comes first: a terminal cuts the line where it ends.
        parts = [
            f"run {finished + 1:,} of {len(self.cells):,}",
            f"step {self.reached[name]:,} of {self.steps[name]:,}",
            *(f"window {text}" for text in describe_value("usage", "{:.1%}", rows[name])),
            self._left(),
            describe_labels(self.cells[name], list(self.cells.values())),
            *describe_value("loss", "{:.3g}", rows[name]),
            *([f"{len(running) - 1} more at the same time"] if len(running) > 1 else []),
        ]
        self.show(" · ".join(parts))

    def end(self, name: str) -> None:
        """Note that a run is finished, which may have been between two looks."""
        if self.shown:
            self.reached[name] = self.steps[name]

    def finish(self, finished: int) -> None:
        """Leave the last line, which stays."""
        if self.steps:
            took = time_left(time.monotonic() - self.began)
            self.show(f"{finished:,} of {len(self.cells):,} runs are finished · {took} just now")

    def _left(self) -> str:
        """The study's time left, at the pace of all steps since the study was started."""
        done = sum(self.reached.values())
        new = done - self.done_before
        if new <= 0:
            return "time left not known yet"
        left = (time.monotonic() - self.began) / new * (sum(self.steps.values()) - done)
        return f"study {time_left(left)} left"


def describe_labels(cell: Cell, cells: Sequence[Cell]) -> str:
    """What tells a run of a study from the others, such as "vq from U(±1/K), seed 0"; what all have is left out.

    A run with a folder of its own, such as "ibq-64/generator", is told by its name.
    """
    labels = cell.labels
    if "method" not in labels or "/" in cell.name:
        return cell.name
    words = [f"{labels['method']} from {labels['init']}" if "init" in labels else labels["method"]]
    titles = {"codebook_size": "K", "code_dim": "D", "num_res_blocks": "blocks", "depth": "depth", "seed": "seed"}
    differing = [key for key in titles if len({other.labels.get(key) for other in cells}) > 1 and key in labels]
    return ", ".join(words + [f"{titles[key]} {labels[key]:,}" for key in differing])


def describe_value(name: str, form: str, row: Mapping[str, Any]) -> list[str]:
    """A number of a row of metrics in words; [] where the row has none."""
    return [f"{measure(name).title} {form.format(row[name])}"] if isinstance(row.get(name), (int, float)) else []
