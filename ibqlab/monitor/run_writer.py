"""The run folder of a monitored training: begun at the first update, continued, cut back, ended.

Only the first process writes. A folder is held by a lock while its training lives, so `ibqlab runs` tells a training
that goes on from one whose process is gone.
"""

import atexit
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ibqlab.base.checks import require_choice

_OPEN: dict[str, "RunWriter"] = {}
"""Folders that this process writes. A notebook's cell that is run again takes over from its predecessor."""


class RunWriter:
    """Writes rows and snapshots of one monitored run.

    Args:
        path: the run folder; a name as all commands take it.
        config: the run's settings, but for code_dim, which the first update knows.
    Raises:
        RunError: the folder holds something else, or a run with other settings.
        ConfigError: settings that YAML cannot hold.
    """

    def __init__(self, path: str | Path, config: dict[str, Any]):
        from ibqlab.config import to_dict
        from ibqlab.runs import Run
        from ibqlab.runs.finding import output_folder
        from ibqlab.runs.folder import is_free

        self.path = output_folder(path)
        self.config = to_dict(config)
        self.last_step = -1
        """Of the last row that was written."""
        self.run: Run | None = None
        """Once it has begun, and until it ends."""
        self.earlier_seconds = 0.0
        self.monitor_seconds = 0.0
        """Time that the monitor has taken of this start."""
        self.was_asked_to_end = False
        """Whether the alarm asked for the end at the last update, so that a training that ends here was stopped."""
        self.before_end: Callable[[], Any] = lambda: None
        """Called before the run ends: writes what the last update had no row for."""
        self._began = time.perf_counter()
        self._process = 0
        self._has_ended = False
        if not is_free(self.path):
            recorded = Run(self.path)
            recorded.require_settings(self._with_dim(recorded.config.get("code_dim")), more_steps=True)

    def _with_dim(self, code_dim: int | None) -> dict[str, Any]:
        return self.config | ({} if code_dim is None else {"code_dim": code_dim})

    @property
    def seconds(self) -> float:
        """Time since the first update, that of earlier starts included."""
        return self.earlier_seconds + time.perf_counter() - self._began

    def begin(self, step: int, code_dim: int | None) -> None:
        """Make the folder, or continue the run in it; what it holds of this step and later ones is dropped.

        Args:
            step: of the first update.
            code_dim: D; None where neither features nor codebook were given.
        Raises:
            RunError: as the constructor, or the run is finished and the step lies before its end.
        """
        from ibqlab.base.progress import notice
        from ibqlab.runs import Run, RunError
        from ibqlab.runs.metrics import last_step

        if self._has_ended:
            raise RunError(f"another monitor of this process writes {self.path} now; this one writes no more")
        key = os.path.realpath(self.path)
        if key in _OPEN:
            _OPEN[key].end("stopped")
        config = self._with_dim(code_dim)
        run = Run.start(self.path, config, claim=True, more_steps=True)
        if run.is_new:
            seed = self.config["settings"].get("seed")
            run.write_provenance(**({} if seed is None else {"seed": seed}), threads=torch.get_num_threads())
        else:
            last = last_step(run.path)
            if run.provenance.get("status") == "finished" and step <= last:
                run.release()
                raise RunError(
                    f"{run.path} holds a finished run of {last} steps, and this update is step {step}; nothing was "
                    "changed. Choose another folder, or delete this one to start again"
                )
            if step <= last:
                warnings.warn(
                    f"{run.path}: the run was at step {last} and goes on from step {step}; rows and snapshots from "
                    f"step {step} on are dropped and written again",
                    stacklevel=5,
                )
            run.truncate_metrics(step - 1)
            run.drop_snapshots_after(step - 1)
            self.earlier_seconds = run.duration
            run.note_resumed(config)
        self.run, self._began = run, time.perf_counter()
        self._process = os.getpid()
        _OPEN[key] = self
        notice(f"monitor: writes {run.path}; look at it with: ibqlab show {shlex.quote(str(run.path))}")

    def log(self, row: dict[str, Any]) -> None:
        """Append a row; errors as of `Run.log`, and a ValueError where its step lies before the last row's.

        A forked process, such as a data loader's worker, holds a copy of this object and writes nothing.
        """
        if self._process != os.getpid():
            return
        if row["step"] < self.last_step:
            raise ValueError(
                f"rows must be written in the order of their steps; got step {row['step']} after {self.last_step}, so "
                "its row is left out"
            )
        self.run.log(row)
        self.last_step = row["step"]

    def save_snapshot(self, step: int, arrays: dict[str, Any]) -> None:
        """Store a snapshot; errors as of `Run.save_snapshot`; nothing in a forked process."""
        if self._process == os.getpid():
            self.run.save_snapshot(step, **arrays)

    def give_sign_of_life(self) -> None:
        """Show that the training goes on; cheap."""
        if self.run:
            self.run.give_sign_of_life()

    def check_status(self, status: str) -> None:
        """Raise ValueError unless a run can end so."""
        from ibqlab.runs.view import ENDS

        require_choice("status", status, ENDS)

    def end(self, status: str) -> None:
        """Note how the training ended and let go of the folder; again: nothing.

        Args:
            status: "finished", "failed" or "stopped"; what finishes because the alarm asked for it was stopped.
        """
        if not self.run:
            return
        self.before_end()
        self._has_ended = True
        run, self.run = self.run, None
        _OPEN.pop(os.path.realpath(self.path), None)
        if status == "finished" and self.was_asked_to_end:
            status = "stopped"
        share = self.monitor_seconds / max(self.seconds - self.earlier_seconds, 1e-9)
        try:
            run.finish(status, duration_s=round(self.seconds, 3), monitor_share_of_time=round(share, 5))
        finally:
            run.release()


@atexit.register
def _end_all() -> None:
    """A script that ends without an error has finished its runs, whether or not it called `close`."""
    died = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    for writer in list(_OPEN.values()):
        if not died and writer._process == os.getpid():
            writer.end("finished")
