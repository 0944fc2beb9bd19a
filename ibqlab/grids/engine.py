"""Cells of a grid, each brought to its row: what is finished is left alone, what failed is told and tried on request.

    outcome = run_cells(cells, CellStore("runs/mine"), LocalLauncher(workers=2))
    print(outcome)                         # finished, failed with their last lines, not begun
    store.table(cells)                     # the rows of those that are finished, at any moment

What is unusual: the engine keeps nothing to itself. Every cell is a process of its own that shares only the folder with
others, so the engine may die at any moment; the next one reads the folder, finds the cells still at work, and goes on.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ibqlab.grids.cells import BUSY, NO_ROOM, OUTSIDE, Cell, CellStore, StudyError, check_distinct
from ibqlab.grids.local import Job, LocalLauncher
from ibqlab.grids.progress import StudyProgress
from ibqlab.grids.slurm import SlurmLauncher
from ibqlab.training import TrainingInterrupted

POLL_SECONDS = 0.5
Launcher = LocalLauncher | SlurmLauncher


@dataclass
class Outcome:
    """What became of a grid's cells."""

    finished: list[str] = field(default_factory=list)
    """Cells that have their row."""
    failed: dict[str, list[str]] = field(default_factory=dict)
    """Cell → its error and the last lines that it printed. They are tried again only when asked for."""
    killed: dict[str, list[str]] = field(default_factory=dict)
    """Likewise for cells whose process was ended from outside, or that lacked disk or memory. They go on when the study
    is started again."""
    waiting: dict[str, str] = field(default_factory=dict)
    """Cells that could not begin, and the cell that they wait for."""

    def __str__(self) -> str:
        total = len(self.finished) + len(self.failed) + len(self.killed) + len(self.waiting)
        lines = [f"{len(self.finished)} of {total} runs are finished"]
        for title, cells in (
            ("failed; try again with retry=true", self.failed),
            ("ended from outside, or lacked disk or memory; start again to go on", self.killed),
        ):
            if cells:
                lines.append(f"{len(cells)} {title}:")
                for name, (error, *printed) in cells.items():
                    lines += [f"  {name}: {error}", *(f"    {line}" for line in printed)]
        lines += [f"{name} waits for {needed}, which has not finished" for name, needed in self.waiting.items()]
        return "\n".join(lines)

    def check(self) -> None:
        """Raise StudyError unless every cell is finished."""
        if self.failed or self.killed or self.waiting:
            raise StudyError(str(self))


def run_cells(
    cells: Sequence[Cell], store: CellStore, launcher: Launcher, *, retry: bool = False, progress: bool = True
) -> Outcome:
    """Bring cells to their rows, as many at a time as the launcher has room for.

    Args:
        cells: with settings and names of their own; one that another needs must be among them.
        store: of the grid's folder.
        launcher: where they are worked on.
        retry: try again those that failed before.
        progress: show where the study stands: run, step, usage, time left.
    Returns:
        What became of them. Failures do not end the others.
    Raises:
        ConfigError: two cells with the same name or the same settings; nothing is started.
        StudyError: a cell that can never run here, such as one of more processes than there are workers.
        RunError: the folder cannot be written.
        TrainingInterrupted: Ctrl-C came; the runs in progress have been told to stop.
    """
    check_distinct(cells)
    return _Engine(cells, store, launcher, retry).run(progress)


class _Engine:
    """One pass over a grid.

    Every cell is in one place at a time: pending → running → finished, failed or killed (of the outcome). It returns
    from running to pending when another engine's process turns out to have worked on it.
    """

    def __init__(self, cells: Sequence[Cell], store: CellStore, launcher: Launcher, retry: bool):
        self.cells, self.store, self.launcher = {cell.name: cell for cell in cells}, store, launcher
        self.outcome = Outcome()
        self.pending: dict[str, Cell] = {}
        self.running: dict[str, Job] = {}
        self.others: set[str] = set()  # names of running cells whose process another engine started
        for cell in cells:
            if self._done(cell):
                continue
            store.prepare(cell)
            failure = store.failure(cell)
            if failure and failure["cause"] not in OUTSIDE and not retry:
                self.outcome.failed[cell.name] = [failure["error"], *failure["lines"]]
                continue
            self.pending[cell.name] = cell

    def run(self, progress: bool) -> Outcome:
        """Start, watch and note until nothing is left to do."""
        with StudyProgress(self.cells, list(self.pending), self.store, progress) as shown:
            try:
                while self.pending or self.running:
                    self._start_what_can()
                    if not self.running:
                        break
                    time.sleep(POLL_SECONDS)
                    for name, job in list(self.running.items()):
                        if job.ended():
                            del self.running[name]
                            self._note(self.cells[name], job)
                            shown.end(name)
                    shown.look(list(self.running), len(self.outcome.finished))
                shown.finish(len(self.outcome.finished))
            except BaseException as error:
                for job in self.running.values():
                    job.stop()
                if isinstance(error, KeyboardInterrupt):
                    raise TrainingInterrupted(
                        f"stopped with {len(self.outcome.finished)} of {len(self.cells)} runs finished; those in "
                        "progress save their last step. Start the study again to go on"
                    ) from None
                raise
        self.outcome.waiting = {name: cell.needs for name, cell in self.pending.items()}
        self.outcome.finished = [name for name in self.cells if name in self.outcome.finished]
        return self.outcome

    def _done(self, cell: Cell) -> bool:
        """Whether a cell is finished; notes it. A row without its run folder is the rest of a run that was deleted."""
        if self.store.row(cell) is None or not (self.store.folder / cell.name / "config.yaml").is_file():
            return False
        self.outcome.finished.append(cell.name)
        return True

    def _start_what_can(self) -> None:
        for name, cell in list(self.pending.items()):
            if cell.needs and cell.needs not in self.outcome.finished:
                continue
            # The cell's lock tells whether an earlier engine's process still works on it. Starting a second one would
            # only make it end with BUSY.
            job = self.launcher.find(cell, self.store)
            if job:
                self.others.add(name)
            elif self.launcher.free(cell):
                self.store.forget_failure(cell)
                job = self.launcher.start(cell, self.store)
            else:
                continue
            del self.pending[name]
            self.running[name] = job

    def _note(self, cell: Cell, job: Job) -> None:
        """What became of a cell whose process is gone."""
        if self._done(cell):
            return
        code, failure = job.code(), self.store.failure(cell)
        # BUSY: another engine's process took the lock first; the next round finds it. Or such a process died without a
        # word, and the cell is ours now.
        if code == BUSY or (cell.name in self.others and failure is None):
            self.others.discard(cell.name)
            self.pending[cell.name] = cell
            return
        if failure is None:
            # It could not write its failure down itself: killed (no code, or a signal), or the disk was full.
            cause = "killed" if code is None or code < 0 else "disk" if code == NO_ROOM else "error"
            failure = self.store.write_failure(cell, job.reason(), cause)
        failures = self.outcome.killed if failure["cause"] in OUTSIDE else self.outcome.failed
        failures[cell.name] = [failure["error"], *failure["lines"]]
