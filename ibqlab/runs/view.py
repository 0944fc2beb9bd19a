"""One run folder as it can be looked at: its settings, how it stands, and what it has logged and stored."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ibqlab.base.codebook_parts import with_codebook
from ibqlab.base.files import RunError, UnreadableFile, is_ordinary, read_json, read_npz
from ibqlab.base.locking import SILENT_SECONDS, find_holder
from ibqlab.config import ConfigError, content_hash, load_yaml
from ibqlab.runs import metrics
from ibqlab.runs.checkpoints import read_checkpoint
from ibqlab.runs.commands import train_command
from ibqlab.runs.finding import hint_at_runs
from ibqlab.runs.folder import LOCK_FILE, PLUGINS, last_checkpoint, step_file, steps_of_files
from ibqlab.runs.kinds import is_lab, is_monitored
from ibqlab.runs.paths import located

if TYPE_CHECKING:
    import pandas as pd

ENDS = ("finished", "failed", "stopped")
"""How a training notes its own end."""
STATUSES = ("running", *ENDS, "interrupted", "unknown")
"""All that `RunView.status` may say."""
SNAPSHOT_BYTES = 2**36
"""Largest snapshot, unpacked; the largest published codebook, 262,144 × 256 in float32, makes 0.25 GiB."""


class RunView:
    """What a run folder tells; nothing in it is changed.

    Args:
        path: an existing run folder.
    Raises:
        FileNotFoundError: there is no such folder.
        RunError: the folder is no run, or its config.yaml is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not os.path.isdir(self.path):
            raise FileNotFoundError(
                f"{self.path}: there is no such run folder; list the runs there are with: ibqlab runs"
            )
        if not is_ordinary(self.path / "config.yaml"):
            remedy = hint_at_runs(self.path, "show") or "list the runs there are: ibqlab runs"
            if is_ordinary(self.path / "study.json"):
                remedy = f"it is a study: ibqlab report {self.path}"
            elif is_ordinary(self.path / "manifest.json"):
                remedy = "it holds stored tokens or samples, which its manifest.json describes"
            raise RunError(f"{self.path} is no run: it holds no config.yaml; {remedy}")
        try:
            self.config = load_yaml(self.path / "config.yaml")
            """The settings as plain dictionaries; `ibqlab.config.parse` makes them typed."""
        except ConfigError as error:
            raise RunError(f"damaged run: {error}; restore the file or delete the folder") from None

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def config_hash(self) -> str:
        """Content hash of config.yaml as it stands there."""
        return content_hash(self.config)

    @property
    def provenance(self) -> dict[str, Any]:
        """What provenance.json holds; {} if the file is missing.

        Raises:
            RunError: the file is damaged.
        """
        file = self.path / "provenance.json"
        try:
            return read_json(file)
        except FileNotFoundError:
            return {}
        except UnreadableFile as error:
            raise RunError(
                f"{file} is damaged ({str(error).removeprefix(f'{file}').lstrip(': ')}); restore or delete it"
            ) from None

    @property
    def started_in(self) -> str:
        """The folder that the run was started in, from which its relative paths count; "" where nothing was noted."""
        folder = self.provenance.get("started_in")
        return folder if isinstance(folder, str) and os.path.isabs(folder) else ""

    @property
    def located_config(self) -> dict[str, Any]:
        """The settings, their relative paths made to lead from the current folder to where they led at the start, and
        their plugins to the run's own copies."""
        return self.with_copies(located(self.config, self.started_in))

    def with_copies(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings that name this run's own copies of its plugins, where it has them; nothing else is changed."""
        plugins = settings.get(PLUGINS)
        if not isinstance(plugins, list) or not plugins:
            return settings
        copies = [self.copy_of(str(plugin)) for plugin in plugins]
        pairs = zip(plugins, copies, strict=True)
        return settings | {PLUGINS: [str(copy) if is_ordinary(copy) else plugin for plugin, copy in pairs]}

    def copy_of(self, plugin: str) -> Path:
        """Where the run keeps the copy of a plugin, a file or a module, if it has one."""
        name = Path(plugin).name
        return (self.path / PLUGINS / (name if name.endswith(".py") else f"{name}.py")).absolute()

    @property
    def status(self) -> str:
        """How the run stands: "running", "finished", "failed" (by an error), "stopped" (by hand, its step saved),
        "interrupted" (its process is gone and noted no end), or "unknown" where provenance.json does not say.

        A process of this machine is known to live by its lock on the folder; one of another machine, where disks are
        shared without locks, by a sign of life in the last ten minutes.
        """
        noted = self.provenance.get("status")
        if noted not in STATUSES:
            return "unknown"
        return "interrupted" if noted == "running" and not self._is_alive() else noted

    def _is_alive(self) -> bool:
        if is_ordinary(self.path / LOCK_FILE):
            return find_holder(self.path / LOCK_FILE) is not None
        # Written without a lock: by another program, or by an older version of this one.
        files = (self.path / name for name in ("metrics.jsonl", "provenance.json"))
        return any(time.time() - file.stat().st_mtime < SILENT_SECONDS for file in files if is_ordinary(file))

    def describe_status(self) -> str:
        """How the run stands, in one line for people: "interrupted at step 60 of 300; go on with: ibqlab train …"."""
        status, steps = self.status, self.config.get("steps")
        last = self.last_checkpoint
        step = max(metrics.last_step(self.path), 0) if status == "running" else self.step
        line = f"{status} at step {step}" + (f" of {steps}" if type(steps) is int else "")
        if status == "running":
            holder = find_holder(self.path / LOCK_FILE)
            return f"{line}, {holder}" if holder else line
        if is_monitored(self.config):
            return line if status == "finished" else f"{line}; your own training goes on with it when it starts again"
        if is_lab(self.config):
            again = "the lab keeps no checkpoints and makes it again from its first step when its notebook runs again"
            return line if status == "finished" else f"{line}; {again}"
        if status == "finished":
            return line if last else f"{line}, but its checkpoints are gone: it can be looked at, not used or continued"
        return f"{line}; go on with: {self.continue_command()}"

    @property
    def step(self) -> int:
        """The step that the run would continue from: its last checkpoint's; else the last row's, 0 before the first."""
        last = self.last_checkpoint
        return int(last.stem.removeprefix("step_")) if last else max(metrics.last_step(self.path), 0)

    def continue_command(self) -> str:
        """What to type in a shell to continue the run from its last checkpoint; works for every recipe."""
        return train_command(self.path / "config.yaml", self.path, {}, self.config.get("processes"))

    @property
    def duration(self) -> float:
        """Seconds spent on the run by now, 0 where provenance.json does not say."""
        seconds = self.provenance.get("duration_s")
        return float(seconds) if type(seconds) in (int, float) and 0 <= seconds < 1e12 else 0.0

    @property
    def metrics(self) -> "pd.DataFrame":
        """All logged rows, one per row of the frame; numbers that were not finite are NaN.

        Raises:
            RunError: a line other than a cut last one is damaged; the message names file and line.
        """
        import pandas as pd  # noqa: PLC0415 - keeps `ibqlab --help` quick

        rows = metrics.read_rows(self.path)
        return pd.DataFrame(rows) if rows else pd.DataFrame({"step": pd.Series(dtype="int64")})

    @property
    def last_values(self) -> dict[str, Any]:
        """The last value of every metric that has one; errors as of `metrics`."""
        rows = metrics.read_rows(self.path)
        return {name: value for row in rows for name, value in row.items() if value is not None}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All logged rows as they stand in metrics.jsonl, None for what was not finite; errors as of `metrics`."""
        return metrics.read_rows(self.path)

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """What the alarm told while the run trained, in order; errors as of `metrics`."""
        return metrics.read_rows(self.path, metrics.ALARMS_FILE)

    @property
    def snapshot_steps(self) -> list[int]:
        """Steps that have a snapshot, ascending."""
        return sorted(steps_of_files(self.path / "snapshots", ".npz"))

    def snapshot(self, step: int = -1) -> dict[str, np.ndarray]:
        """The arrays of a step's snapshot; −1 for the last one.

        Raises:
            RunError: there is none of that step (the message lists those there are), or its file is damaged.
        """
        steps = self.snapshot_steps
        if not steps:
            if not self.path.exists():
                raise RunError(f"{self.path} is gone: its folder was moved or deleted")
            raise RunError(f"{self.path} has no snapshot: none was taken yet, or it takes none")
        if step != -1 and step not in steps:
            raise RunError(f"{self.path} has no snapshot of step {step}; there are: {', '.join(map(str, steps))}")
        file = step_file(self.path, "snapshots", steps[-1] if step == -1 else step, ".npz")
        try:
            return with_codebook(read_npz(file, SNAPSHOT_BYTES))
        except (FileNotFoundError, UnreadableFile) as error:
            raise RunError(f"{error}; delete {file.name} or train again") from error

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint's file; None before the first."""
        return last_checkpoint(self.path)

    def load_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint that can be read.

        Returns:
            Step and state, tensors on the CPU; None if there is no checkpoint. An unreadable newest one is passed over
            with a warning.
        Raises:
            RunError: there are checkpoints and none can be read.
        """
        checkpoint = read_checkpoint(self.path)
        return (checkpoint.step, checkpoint.state) if checkpoint else None

    def __repr__(self) -> str:
        try:
            return f"Run({str(self.path)!r}, {self.status})"
        except RunError:
            return f"Run({str(self.path)!r}, unreadable)"
