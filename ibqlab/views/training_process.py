"""A training as a process of its own, started and stopped from elsewhere; the run folder is all that both share.

process = TrainingProcess.begin(config, "mine")    # or TrainingProcess("mine") for a run that is there
process.start(); process.stop()                    # stops after its step, with a checkpoint of it
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ibqlab.base.files import explained
from ibqlab.base.locking import find_holder
from ibqlab.recipes.plugins import plugin_copies
from ibqlab.runs import Run
from ibqlab.runs.finding import find_run, output_folder
from ibqlab.runs.folder import LOCK_FILE
from ibqlab.views.subject import ViewError

CONSOLE = "console.log"
"""In the run's folder: what the process has said."""
_TAIL = 4000


class TrainingProcess:
    """The process that trains one run, whoever started it.

    Args:
        path: an existing run's folder.
    Raises:
        FileNotFoundError, RunError: there is no run.
    """

    def __init__(self, path: str | Path):
        self.path = find_run(path)
        self._child: subprocess.Popen | None = None
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
        Run.start(folder, config, claim=False, copies=plugin_copies(getattr(config, "plugins", ())))
        return cls(folder)

    @property
    def run(self) -> Run:
        """The run as it stands now."""
        return Run(self.path)

    @property
    def is_running(self) -> bool:
        """Whether a process trains it, here or elsewhere, or was started here and has not begun."""
        return find_holder(self.path / LOCK_FILE) is not None or self._is_starting()

    def _is_starting(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Train, or go on from the last checkpoint; nothing where a process does so already.

        The process outlives this one: closing a notebook stops no training.

        Raises:
            RunError: the folder cannot be written.
        """
        if self.is_running or self.run.status == "finished":
            return
        command = [sys.executable, "-m", "ibqlab", "train", str(self.path / "config.yaml"), "--no-report"]
        console = self.path / CONSOLE
        with explained(console), open(console, "ab") as stream:
            self._child = subprocess.Popen(
                [*command, "--output", str(self.path.absolute())],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.run.started_in if os.path.isdir(self.run.started_in) else None,
            )

    def stop(self, patience: float = 0.0) -> None:
        """Ask the process to end after its step, which leaves a checkpoint of it.

        Args:
            patience: seconds to wait for it; 0: none.
        Raises:
            ViewError: it runs on another machine.
        """
        holder = find_holder(self.path / LOCK_FILE)
        if holder is not None and holder.host != socket.gethostname():
            raise ViewError(f"{self.path.name} trains on {holder.host}; stop it there: Ctrl-C, or scancel its job")
        if holder is not None and holder.process > 0:
            os.kill(holder.process, signal.SIGTERM)
        elif self._is_starting():
            self._child.send_signal(signal.SIGTERM)
        until = time.monotonic() + patience
        while self.is_running and time.monotonic() < until:
            time.sleep(0.05)

    def last_words(self) -> str:
        """The end of what the process has said; "" where it said nothing."""
        file = self.path / CONSOLE
        if not file.is_file():
            return ""
        with open(file, "rb") as stream:
            stream.seek(max(0, file.stat().st_size - _TAIL))
            lines = stream.read().decode(errors="replace").replace("\r", "\n").splitlines()
        return "\n".join(line for line in lines if line.strip())[-_TAIL:]
