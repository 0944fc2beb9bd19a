"""Trainings as processes of their own, started and paused from elsewhere; the run folder is all that both share.

process = TrainingProcess.begin(config, "mine")    # or TrainingProcess("mine") for a run that is there
process.start(); process.stop()                    # stops after its step, with a checkpoint of it

A study's process is `study_process`'s.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ibqlab.base.files import explained
from ibqlab.base.locking import Holder, find_holder
from ibqlab.base.measures import measure
from ibqlab.base.progress import time_left
from ibqlab.recipes.plugins import plugin_copies
from ibqlab.runs import Run
from ibqlab.runs.finding import find_run, output_folder
from ibqlab.runs.folder import LOCK_FILE
from ibqlab.runs.kinds import is_lab, is_monitored
from ibqlab.runs.metrics import METRICS_FILE, last_rows
from ibqlab.views.subject import ViewError

CONSOLE = "console.log"
"""In the run's folder: what the process has said."""
_TAIL = 4000
_PACE_ROWS = 20
"""Rows that the time left is worked out from."""


class BackgroundProcess(ABC):
    """Work on a folder in a process of its own, whoever started it.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self._child: subprocess.Popen | None = None

    # --- what it works on ---

    @property
    @abstractmethod
    def lock(self) -> Path:
        """The file that whoever works on the folder holds locked."""

    @property
    @abstractmethod
    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""

    @property
    @abstractmethod
    def has_begun(self) -> bool:
        """Whether something was done already, so that starting means going on."""

    @abstractmethod
    def describe(self) -> str:
        """Where the work stands, in one line for people."""

    @abstractmethod
    def command(self) -> list[str]:
        """What is executed, from `working_folder`."""

    @property
    def working_folder(self) -> str | None:
        """From which relative paths count; None: the current one."""
        return None

    # --- the process ---

    @property
    def holder(self) -> Holder | None:
        """The process that works on it, on whatever machine; None where none does."""
        return find_holder(self.lock)

    @property
    def is_running(self) -> bool:
        """Whether a process works on it, here or elsewhere, or was started here and is still loading."""
        return self.is_loading or self.holder is not None

    @property
    def is_loading(self) -> bool:
        """Whether a process was started here that has not taken the folder yet."""
        return self._child is not None and self._child.poll() is None and self.holder is None

    def start(self) -> None:
        """Begin, or go on from what is saved; nothing where a process does so already.

        The process outlives this one: closing a notebook stops no training.

        Raises:
            RunError: the folder cannot be written, or the work cannot be started from here.
        """
        if self.is_running or self.is_finished:
            return
        console = self.path / CONSOLE
        with explained(console), open(console, "wb") as stream:
            self._child = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.working_folder,
                env={**os.environ, "MPLBACKEND": "agg"},  # a kernel's own draws into its notebook
            )

    def stop(self, patience: float = 0.0) -> None:
        """Ask the process to end after its step, which leaves a checkpoint of it.

        Args:
            patience: seconds to wait for it; 0: none.
        Raises:
            ViewError: it runs on another machine.
        """
        holder = self.holder
        if holder is not None and holder.host != socket.gethostname():
            raise ViewError(f"{self.path.name} trains on {holder.host}; stop it there: Ctrl-C, or scancel its job")
        if holder is not None and holder.process > 0:
            os.kill(holder.process, signal.SIGTERM)
        elif self.is_loading:
            self._child.send_signal(signal.SIGTERM)
        until = time.monotonic() + patience
        while self.is_running and time.monotonic() < until:
            time.sleep(0.05)

    def last_words(self) -> str:
        """The end of what the process has said since it was last started; "" where it said nothing."""
        file = self.path / CONSOLE
        if not file.is_file():
            return ""
        with open(file, "rb") as stream:
            stream.seek(max(0, file.stat().st_size - _TAIL))
            lines = stream.read().decode(errors="replace").replace("\r", "\n").splitlines()
        return "\n".join(line for line in lines if line.strip())[-_TAIL:]

    def last_word(self) -> str:
        """The last line of these."""
        return (self.last_words().splitlines() or [""])[-1].strip()


class TrainingProcess(BackgroundProcess):
    """The process that trains one run, whoever started it.

    Args:
        path: an existing run's folder.
    Raises:
        FileNotFoundError, RunError: there is no run.
    """

    def __init__(self, path: str | Path):
        super().__init__(find_run(path))
        Run(self.path)  # refuses what is no run

    @classmethod
    def begin(cls, config: Any, output: str | Path) -> "TrainingProcess":
        """A new run's folder, nothing trained yet; or the folder of a run with these settings.

        Args:
            config: `TrainConfig` or `GeneratorTrainConfig`.
            output: path, or name below the folder of all runs.
        Raises:
            RunError: the folder holds another run.
        """
        folder = output_folder(output, "run")
        # A run that is there is left as it stands: its process notes that it goes on, and when.
        if (folder / "config.yaml").is_file():
            Run.check(folder, config)
        else:
            Run.start(folder, config, claim=False, copies=plugin_copies(getattr(config, "plugins", ())))
        return cls(folder)

    @property
    def run(self) -> Run:
        """The run as it stands now."""
        return Run(self.path)

    @property
    def lock(self) -> Path:
        """As `BackgroundProcess`."""
        return self.path / LOCK_FILE

    @property
    def is_finished(self) -> bool:
        """As `BackgroundProcess`."""
        return self.run.status == "finished"

    @property
    def has_begun(self) -> bool:
        """As `BackgroundProcess`."""
        return bool(self.run.step or self.run.last_checkpoint)

    @property
    def working_folder(self) -> str | None:
        """Where the run was started."""
        folder = self.run.started_in
        return folder if os.path.isdir(folder) else None

    def command(self) -> list[str]:
        """As `BackgroundProcess`; several processes are torchrun's.

        Raises:
            ViewError: a monitor's or the lab's run, which no command trains.
        """
        run = self.run
        if is_monitored(run.config) or is_lab(run.config):
            raise ViewError(f"{run.name} cannot be started from here: {run.describe_status().partition('; ')[2]}")
        processes = run.config.get("processes")
        together = []
        if type(processes) is int and processes > 1:
            together = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        words = ["train", str((self.path / "config.yaml").absolute()), "--no-report"]
        return [sys.executable, *together, "-m", "ibqlab", *words, "--output", str(self.path.absolute())]

    def describe(self) -> str:
        """As `BackgroundProcess`: step, loss, usage, pace and time left while it trains; else how it ended."""
        run = self.run
        if self.is_loading:
            return f"{run.name}: the training process is loading …"
        if self.is_running:
            return describe_rows(run.name, last_rows(self.path / METRICS_FILE), run.config.get("steps"))
        if run.status == "finished" or is_monitored(run.config) or is_lab(run.config):
            return f"{run.name}: {run.describe_status()}"
        steps, said = run.config.get("steps"), self.last_word()
        at = f"at step {run.step:,}" + (f" of {steps:,}" if type(steps) is int else "")
        if run.status == "failed":
            return f"{run.name}: failed {at}; its last words: {said or 'none'}"
        if run.last_checkpoint is None:
            words = f"; its process said last: {said}" if said and not said.endswith("loading …") else ""
            return f"{run.name}: nothing is trained yet{words}"
        how = {"stopped": "paused", "unknown": "nobody noted how it ended,"}.get(run.status, "its process was ended")
        return f"{run.name}: {how} {at}; everything up to there is saved, and it can go on"


def describe_rows(name: str, rows: Sequence[dict[str, Any]], steps: Any) -> str:
    """Where a run stands while it trains, as its own progress line says it.

    Args:
        name: of the run.
        rows: its last ones, or all.
        steps: of the whole run; anything but a number: not known.
    """
    logged = [row for row in rows if isinstance(row.get("loss"), int | float)]
    step = max((row["step"] for row in rows), default=0)
    stands = f"{name}: step {step:,}" + (f" of {steps:,}" if type(steps) is int else "")
    if not logged:
        return f"{stands} · the first steps are coming"
    last = logged[-1]
    parts = [stands, f"{measure('loss').title} {last['loss']:.3f}"]
    if isinstance(last.get("usage"), int | float):
        parts.append(f"window {measure('usage').title} {last['usage']:.1%}")
    if isinstance(last.get("images_per_second"), int | float):
        parts.append(f"{measure('images_per_second').unit} {last['images_per_second']:.0f}")
    first = logged[-_PACE_ROWS] if len(logged) > _PACE_ROWS else rows[0]
    seconds = [row.get("seconds") for row in (first, last)]
    if type(steps) is int and all(isinstance(one, int | float) for one in seconds) and last["step"] > first["step"]:
        pace = (seconds[1] - seconds[0]) / (last["step"] - first["step"])
        parts.append(f"{time_left(pace * max(0, steps - step))} left")
    return " · ".join(parts)
