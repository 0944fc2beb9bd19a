"""A study as a process of its own: the engine that trains its runs, started and paused from elsewhere.

    python -m ibqlab.views.study_process FOLDER

trains what a study's folder says and lacks, as `Study.run` does in a notebook. It holds the folder's engine.lock.
"""

import sys
import time
from pathlib import Path

from ibqlab.base.escaping import for_terminal
from ibqlab.base.locking import FileLock
from ibqlab.base.progress import time_left
from ibqlab.grids.progress import describe_labels
from ibqlab.studies import Study, open_study
from ibqlab.views.training_process import BackgroundProcess

ENGINE_LOCK = "engine.lock"
"""In the study's folder: held by the process that trains it."""


class StudyProcess(BackgroundProcess):
    """The process that trains what a study lacks, whoever started it.

    Stopping it stops the runs in progress after their steps; each leaves a checkpoint.

    Args:
        study: its folder is made where it is missing.
    Raises:
        StudyError, ConfigError, RunError, ValueError: as of `Study.run`; nothing is started.
    """

    def __init__(self, study: Study):
        study.prepare()
        super().__init__(study.folder)
        self.study = study
        self.labels = {cell.name: describe_labels(cell, study.cells) for cell in study.cells}
        """Name of a run → what tells it from the others, for people."""
        self._done_at_start = self._steps_done()
        self._began = time.monotonic()

    @property
    def lock(self) -> Path:
        """As `BackgroundProcess`."""
        return self.path / ENGINE_LOCK

    @property
    def is_finished(self) -> bool:
        """Whether every run has its row."""
        return self._finished() == len(self.study.cells)

    @property
    def has_begun(self) -> bool:
        """As `BackgroundProcess`."""
        return self._steps_done() > 0

    def command(self) -> list[str]:
        """As `BackgroundProcess`."""
        return [sys.executable, "-m", "ibqlab.views.study_process", str(self.path.absolute())]

    def start(self) -> None:
        """As `BackgroundProcess`."""
        self._done_at_start, self._began = self._steps_done(), time.monotonic()
        super().start()

    def training(self) -> list[str]:
        """Names of the runs that a process works on now."""
        return [cell.name for cell in self.study.cells if self.study.store.is_taken(cell.name)]

    def describe(self) -> str:
        """As `BackgroundProcess`: how many runs are finished, where those in progress stand, and the time left."""
        finished, total = self._finished(), len(self.study.cells)
        stands = f"{self.path.name}: {finished:,} of {total:,} runs are finished"
        if self.is_loading:
            return f"{stands} · the training process is loading …"
        if failures := self.study.failures():
            name, error = failures[0]
            stands += f" · {len(failures):,} failed, the first is {name}: {error}"
        training = self.training()
        if not self.is_running:
            if finished == total:
                return stands
            if training:
                return f"{stands} · {len(training):,} still save their last step"
            said = self.last_word()
            words = f"; its process said last: {said}" if said.startswith(("Error", "Traceback")) or failures else ""
            return f"{stands}; paused, every run that was in progress has saved its step, and it can go on{words}"
        steps = {cell.name: cell.config.steps for cell in self.study.cells}
        parts = [
            f"{self.labels[name]}: step {self.study.store.last_step(name):,} of {steps[name]:,}" for name in training
        ]
        return " · ".join([stands, *parts, self._left(sum(steps.values()))])

    def _finished(self) -> int:
        return sum(self.study.store.row(cell) is not None for cell in self.study.cells)

    def _steps_done(self) -> int:
        return sum(self.study.store.last_step(cell.name) for cell in self.study.cells)

    def _left(self, total: int) -> str:
        """Time left at the pace of all steps since this object saw the study start."""
        done = self._steps_done()
        if done <= self._done_at_start:
            return "time left not known yet"
        left = (time.monotonic() - self._began) / (done - self._done_at_start) * (total - done)
        return f"study {time_left(left)} left"


def main(folder: str) -> int:
    """Train what a study lacks; the exit code: 0 all runs are finished, 1 some are not, 2 it cannot be trained."""
    lock = FileLock(Path(folder) / ENGINE_LOCK)
    if not lock.acquire(patience=1.0):
        print("another process trains this study", file=sys.stderr)
        return 2
    try:
        outcome = open_study(folder).run()
    except KeyboardInterrupt as error:
        print(error or "stopped; start the study again to go on", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"Error: {for_terminal(error, None)}", file=sys.stderr)
        return 2
    finally:
        lock.release()
    unfinished = outcome.failed or outcome.killed or outcome.waiting
    print(outcome, file=sys.stderr)
    return 1 if unfinished else 0


if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    sys.exit(main(sys.argv[1]))
