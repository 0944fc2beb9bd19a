"""What a notebook's training cell calls: train in a process of its own, show it, and wait for its end or not.

Where somebody looks on in JupyterLab or the like, training is a process of its own: its buttons answer, and closing
browser or kernel loses nothing. In copies that papermill, Voilà or `ibqlab run` execute nobody can press a button;
there a cell that waits trains inside the kernel, which saves the seconds that a further process takes to load.
"""

import asyncio
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from ibqlab.losses.errors import StoppedByAlarm, TrainingError, TrainingInterrupted
from ibqlab.runs import Run, RunError
from ibqlab.runs.finding import run_name
from ibqlab.studies import Study, StudyError
from ibqlab.training import TrainConfig, train, train_generator
from ibqlab.training.alarms import stop_reason
from ibqlab.views.study_process import StudyProcess
from ibqlab.views.training_process import BackgroundProcess, TrainingProcess
from ibqlab.widgets.live import LiveCurves
from ibqlab.widgets.training_view import TrainingView

PATIENCE = 120.0
"""Seconds that an interrupted cell waits for the step in progress to be saved."""


class NotFinished(RunError):
    """A cell needs a finished training and there is none; notebooks show the sentence in place of a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


async def train_and_watch(config: Any, path: str | Path, wait: bool = True) -> None:
    """Train a run, or go on with it, and show it in the notebook; nothing is trained where it is finished.

        await train_and_watch(config, path)

    Args:
        config: `TrainConfig` or `GeneratorTrainConfig`.
        path: the run folder.
        wait: until training ends. False: it goes on in the background, and the kernel is free at once; `finished_run`
            says whether it is through.
    Raises:
        TrainingInterrupted: interrupted, or stopped from elsewhere; the step in progress is saved. Its button's pause
            is waited through.
        TrainingError: it failed; its last words.
        RunError: the folder holds another run.
    """
    from IPython.display import display  # noqa: PLC0415 - whoever runs this in a notebook has it

    if wait and not somebody_looks_on():
        live = LiveCurves(config)
        display(live.widget)
        (train if isinstance(config, TrainConfig) else train_generator)(config, path, watch=live)
        return
    process = TrainingProcess.begin(config, path)
    if await _show(process, wait):
        check_end(process)


def check_end(process: TrainingProcess) -> None:
    """Raise unless a run whose process has ended is finished.

    Raises:
        TrainingInterrupted, TrainingError: as of `train_and_watch`.
    """
    run = process.run
    if run.status == "finished":
        return
    reason = stop_reason(run)
    if run.status == "failed" or (run.last_checkpoint is None and process.last_word().startswith("Error")):
        raise TrainingError(process.last_word().removeprefix("Error: "))
    kind = StoppedByAlarm if reason else TrainingInterrupted
    by = f" by the alarm ({reason})" if reason else ""
    steps = run.config.get("steps")
    raise kind(f"stopped at step {run.step} of {steps}{by}, everything is saved; go on with the same command")


async def train_study(study: Study, wait: bool = True) -> None:
    """Train what a study lacks, and show its runs in one chart: `await train_study(study)`.

    Args:
        study: whose folder is made where it is missing.
        wait: as of `train_and_watch`; `require_finished` says whether it is through.
    Raises:
        StudyError: a run failed.
        TrainingInterrupted: as of `train_and_watch`.
        ConfigError, RunError, ValueError: as of `Study.run`.
    """
    from IPython.display import display  # noqa: PLC0415 - as above

    process = StudyProcess(study)
    if wait and not somebody_looks_on():
        was_finished = process.is_finished
        study.run().check()
        if was_finished:  # nothing was said meanwhile
            display(TrainingView(process))
        return
    if not await _show(process, wait) or process.is_finished:
        return
    if study.failures():
        raise StudyError(f"{process.describe()}. Try again with retry=true")
    finished = sum(study.store.row(cell) is not None for cell in study.cells)
    raise TrainingInterrupted(
        f"stopped with {finished} of {len(study.cells)} runs finished; those in progress have saved their last step; "
        "go on with the same command"
    )


def finished_run(path: str | Path) -> Run:
    """A run that has been trained to its end, for cells that need one.

    Raises:
        NotFinished: it has not; the sentence says how it stands.
    """
    process = TrainingProcess(path)
    if process.is_finished or stop_reason(process.run):
        return process.run
    raise NotFinished(_not_finished(process))


def require_finished(study: Study) -> None:
    """Refuse a study whose runs are not all finished, before its figures are drawn.

    Raises:
        NotFinished: the sentence says how it stands.
    """
    if not all(study.store.row(cell) for cell in study.cells):
        raise NotFinished(_not_finished(StudyProcess(study)))


def somebody_looks_on() -> bool:
    """Whether this cell was sent by a program with a person before it: JupyterLab, Notebook, VS Code.

    They name the cell in their message; papermill, nbclient and Voilà do not.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if not hasattr(shell, "get_parent"):
        return False
    return bool((shell.get_parent() or {}).get("metadata", {}).get("cellId"))


async def _show(process: BackgroundProcess, wait: bool) -> bool:
    """Start a process and show it; whether it was waited for to its end."""
    from IPython.display import display  # noqa: PLC0415 - as above

    process.start()
    view = TrainingView(process)
    display(view)
    if not wait:
        return False
    try:
        return await view.wait()
    except (asyncio.CancelledError, KeyboardInterrupt):  # how the kernel passes an interrupt on
        # Its process has not heard the interrupt, which was for this cell.
        process.stop()
        until = time.monotonic() + PATIENCE
        while process.is_running and time.monotonic() < until:
            await asyncio.sleep(0.1)
        view.refresh(force=True)
        return True


def _not_finished(process: BackgroundProcess) -> str:
    name = shlex.quote(run_name(process.path))
    what = (
        "wait until the view above says that it is finished"
        if process.is_running
        else "press “go on” above, or run the notebook's training cell again, and wait for its end"
    )
    return (
        f"{name} is not finished, which this part of the notebook needs ({process.describe()}). First {what}, then this"
    )
