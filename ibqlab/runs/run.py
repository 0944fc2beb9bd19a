"""One run folder: create it, continue it, read it."""

import errno
import json
import os
import pickle
import shutil
import stat
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from ibqlab.base.checks import require_at_most
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import (
    TEXT_BYTES,
    RunError,
    UnreadableFile,
    create_new,
    explained,
    force_to_disk,
    is_ordinary,
    open_ordinary,
    read_bytes,
    read_json,
    read_npz,
    replacing,
    sweep,
    temporary_beside,
)
from ibqlab.base.locking import SILENT_SECONDS, FileLock, find_holder, read_holder
from ibqlab.config import ConfigError, completed, content_hash, dump_yaml, load_yaml, to_dict
from ibqlab.runs.commands import differences, leaves, train_command
from ibqlab.runs.files import (
    METRICS_BYTES,
    SNAPSHOT_BYTES,
    check_storable,
    end_of_last_row,
    plain_array,
    plain_row,
    read_row,
    steps_of_files,
)
from ibqlab.runs.paths import located, spelt_as
from ibqlab.runs.provenance_record import provenance, utc_now

if TYPE_CHECKING:
    import pandas as pd

ENDS = ("finished", "failed", "stopped")
"""How a training notes its own end."""
STATUSES = ("running", *ENDS, "interrupted", "unknown")
"""All that `Run.status` may say."""
LOCK_FILE = "lock"
CLAIM_SECONDS = 1.0
"""How long a lock is tried for: whoever looks at a run holds it for an instant."""
CHECKPOINTS_KEPT = 2
FOLDERS = ("snapshots", "checkpoints", "figures")
WRITTEN = ("config.yaml", "metrics.jsonl", "provenance.json", LOCK_FILE, *FOLDERS)
"""What a training writes into a run folder."""


class _Taken(Exception):
    """Another process has made the folder first."""


class Checkpoint(NamedTuple):
    """What resuming needs."""

    file: Path
    step: int
    state: dict[str, Any]
    rows: dict[str, Any]
    """Of metrics.jsonl when it was written: "count", and "last_step" (None: no row). {} in older checkpoints."""


class Run:
    """A run folder.

    Args:
        path: an existing run folder.
    Raises:
        FileNotFoundError: there is no such folder.
        RunError: the folder is no run, or its config.yaml is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.is_new = False
        """Whether `start` has just made the folder."""
        self._lock: FileLock | None = None
        if not os.path.isdir(self.path):
            raise FileNotFoundError(
                f"{self.path}: there is no such run folder; list the runs there are with: ibqlab runs"
            )
        if not is_ordinary(self.path / "config.yaml"):
            study = is_ordinary(self.path / "study.json")
            remedy = f"it is a study: ibqlab report {self.path}" if study else "list the runs there are: ibqlab runs"
            raise RunError(f"{self.path} is no run: it holds no config.yaml; {remedy}")
        try:
            self._config = load_yaml(self.path / "config.yaml")
        except ConfigError as error:
            raise RunError(f"damaged run: {error}; restore the file or delete the folder") from None

    @classmethod
    def start(cls, path: str | Path, config: Any, *, claim: bool = False, more_steps: bool = False) -> "Run":
        """Create a run folder, or continue the one that holds the same settings.

        A setting that did not exist yet when the folder was written counts as its default. What killed processes left
        half written is deleted.

        Args:
            path: the folder; must be missing, empty, or a run with the same content hash.
            config: a dataclass, or a mapping as `ibqlab.config.to_dict` returns it.
            claim: hold the folder until `release`, so that no second training uses it. Nothing in a run that is there
                is changed yet: `note_resumed` does that when its caller has read all that it needs.
            more_steps: a larger `steps` alone continues a run, too.
        Returns:
            The run. Its status is "running", or "finished" if it was so already.
        Raises:
            RunError: the folder holds a run with other settings, or something else; another training holds it; a part
                of it leads elsewhere; or it cannot be written.
        """
        path = Path(path)
        is_new = cls._is_free(path)
        if is_new:
            sweep(path.parent)
            try:
                _create(path, to_dict(config))
            except _Taken:
                is_new = False  # another process was faster: its run is judged like any other that was there before
        run = cls(path)
        run.is_new = is_new
        if not is_new:
            run.require_settings(config, more_steps=more_steps)
            run._require_own_files(*WRITTEN)
            run._require_folders()
        if claim:
            run._lock = claim_folder(run.path)
        run._sweep()
        if not is_new and not claim and run.status != "finished":
            run.note_resumed(config)
        return run

    @classmethod
    def check(cls, path: str | Path, config: Any) -> None:
        """Refuse now, for whoever plans a training, the folder that `start` would refuse for its settings.

        Raises:
            RunError: the folder holds a run with other settings than these, or with more steps, or something else.
        """
        if not cls._is_free(Path(path)):
            cls(path).require_settings(config, more_steps=True)

    @staticmethod
    def _is_free(path: Path) -> bool:
        """Whether a folder is missing or empty; raises where it is neither that nor a run."""
        with explained(path):
            if os.path.isdir(path) and os.path.samefile(path, os.curdir):
                raise RunError(f"a run needs a folder of its own, got {path}, the current one: --output NAME")
            is_free = not os.path.lexists(path) or (os.path.isdir(path) and not any(os.scandir(path)))
        if not is_free and not is_ordinary(path / "config.yaml"):
            raise RunError(
                f"{path} exists and is no run; nothing was changed. Choose another folder, or empty this one"
            )
        return is_free

    def release(self) -> None:
        """Let go of a folder that `start` has claimed."""
        if self._lock:
            self._lock.release()

    def give_sign_of_life(self) -> None:
        """Show other machines that the training of a claimed folder goes on; cheap, call it at every step."""
        if self._lock:
            self._lock.beat()

    def note_resumed(self, config: Any, **facts: Any) -> None:
        """Note that the run goes on, now, and with how many steps.

        Args:
            config: as in `start`.
            **facts: whatever else provenance is to say.
        Raises:
            RunError: as `write_provenance`.
        """
        again, recorded = provenance(), self.provenance
        wanted, held = self._as_held(config)
        if content_hash(wanted) != content_hash(held):
            # First the hash, then the settings: a kill between the two leaves a run that both commands continue.
            extension = {"from_steps": held["steps"], "to_steps": wanted["steps"], "config_hash": self.config_hash}
            facts["extended"] = [*_list(recorded.get("extended")), extension | {"started": again["started"]}]
        resumed = [*_list(recorded.get("resumed")), {key: again[key] for key in ("started", "commit", "dirty")}]
        is_extended = "extended" in facts
        self.write_provenance(
            status="running",
            config_hash=content_hash(wanted) if is_extended else self.config_hash,
            resumed=resumed,
            **facts,
        )
        if is_extended:
            with self._whole(self.path / "config.yaml") as stream:
                stream.write(_config_text(wanted).encode())
            self._config = wanted

    def has_fewer_steps(self, config: Any) -> bool:
        """Whether settings are the folder's but for a larger number of steps."""
        wanted, held = self._as_held(config)
        old, new = held.get("steps"), wanted.get("steps")
        if type(old) is not int or type(new) is not int or new <= old:
            return False
        return content_hash(held | {"steps": new}) == content_hash(wanted)

    def require_settings(self, config: Any, *, more_steps: bool = False) -> None:
        """Refuse settings that are not the folder's. A path may be spelt in another way that leads to the same place.

        Args:
            config: as in `start`.
            more_steps: as in `start`.
        Raises:
            RunError: they differ, or config.yaml was edited; the message names the keys and what to type.
        """
        wanted, held = self._as_held(config)
        ours, theirs = content_hash(wanted), self.config_hash
        facts = self.provenance
        known = [facts.get("config_hash", theirs)]
        known += [entry.get("config_hash") for entry in _list(facts.get("extended")) if isinstance(entry, dict)]
        if theirs not in known:
            raise RunError(
                f"{self.path / 'config.yaml'} was edited after the run began (content hash {theirs}, began with "
                f"{known[0]}); nothing was changed. Undo the edit, or choose another folder"
            )
        if ours == content_hash(held) or (more_steps and self.has_fewer_steps(config)):
            return
        raise RunError(
            f"{self.path} holds a run with other settings (content hash {theirs}, yours {ours}); nothing was changed. "
            f"There → yours: {differences(held, wanted)}. Choose another folder (--output FOLDER), give the "
            f"settings it was started with to continue it, or delete it to start anew{self.how_to_start_from(config)}"
        )

    def how_to_start_from(self, config: Any) -> str:
        """The end of a message: how to train on from this run's weights with other settings; "" where none can."""
        wanted, held = self._as_held(config)
        old, new = dict(leaves(held)), dict(leaves(wanted))
        changed = {key: value for key, value in new.items() if old.get(key, "not set") != value}
        fits = "start_from" in new and changed and not any(key.startswith("tokenizer.") for key in changed)
        if not fits or not steps_of_files(self.path / "checkpoints", ".pt"):
            return ""
        command = train_command(
            self.path / "config.yaml",
            self.path.with_name(f"{self.name}-2"),
            changed | {"start_from": str(self.path.absolute())},
            wanted.get("processes"),
        )
        return f". To train on from its weights with your settings: {command}"

    def _as_held(self, config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Somebody's settings, with paths to the same places spelt as in the folder's, and the folder's."""
        held = self._completed_config(config)
        return spelt_as(to_dict(config), held, self.started_in), held

    @property
    def started_in(self) -> str:
        """The folder that the run was started in, from which its relative paths count; "" where nothing was noted."""
        folder = self.provenance.get("started_in")
        return folder if isinstance(folder, str) and os.path.isabs(folder) else ""

    @property
    def located_config(self) -> dict[str, Any]:
        """The settings, their relative paths made to lead from the current folder to where they led at the start."""
        return located(self.config, self.started_in)

    def _completed_config(self, config: Any) -> dict[str, Any]:
        """The folder's settings with today's defaults filled in; as they are where they no longer parse."""
        return completed(type(config), self.config) if is_dataclass(config) else self.config

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def config(self) -> dict[str, Any]:
        """The settings as plain dictionaries; `ibqlab.config.parse` makes them typed."""
        return self._config

    @property
    def config_hash(self) -> str:
        """Content hash of config.yaml as it stands there."""
        return content_hash(self._config)

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
            raise RunError(f"{file} is damaged ({_without(error, file)}); restore or delete it") from None

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
        step = max(self._logged_step(), 0) if status == "running" else self.step
        line = f"{status} at step {step}" + (f" of {steps}" if type(steps) is int else "")
        if status == "running":
            holder = find_holder(self.path / LOCK_FILE)
            return f"{line}, {holder}" if holder else line
        if status == "finished":
            return line if last else f"{line}, but its checkpoints are gone: it can be looked at, not used or continued"
        return f"{line}; go on with: {self.continue_command()}"

    @property
    def step(self) -> int:
        """The step that the run would continue from: its last checkpoint's; else the last row's, 0 before the first."""
        last = self.last_checkpoint
        return _step_of(last) if last else max(self._logged_step(), 0)

    def continue_command(self) -> str:
        """What to type in a shell to continue the run from its last checkpoint; works for every recipe."""
        return train_command(self.path / "config.yaml", self.path, {}, self.config.get("processes"))

    @property
    def duration(self) -> float:
        """Seconds spent on the run by now, 0 where provenance.json does not say."""
        seconds = self.provenance.get("duration_s")
        return float(seconds) if type(seconds) in (int, float) and 0 <= seconds < 1e12 else 0.0

    # --- metrics ---

    @property
    def metrics(self) -> "pd.DataFrame":
        """All logged rows, one per row of the frame; numbers that were not finite are NaN.

        Raises:
            RunError: a line other than a cut last one is damaged; the message names file and line.
        """
        import pandas as pd  # noqa: PLC0415 - keeps `ibqlab --help` quick

        rows = self._rows()
        return pd.DataFrame(rows) if rows else pd.DataFrame({"step": pd.Series(dtype="int64")})

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl.

        Args:
            row: "step" (≥ 0) and named numbers, texts, lists or dictionaries of them; NumPy scalars and tensors of one
                element are converted, NaN and infinities become null.
        Raises:
            ValueError: no step, or a value that is none of these.
            RunError: the file cannot be written; it is left as it was.
        """
        if not isinstance(row.get("step"), (int, np.integer)) or row["step"] < 0:
            raise ValueError(f"a logged row needs an integer step ≥ 0, got step={row.get('step')!r}")
        line = json.dumps(plain_row(row, "row"), allow_nan=False) + "\n"
        file = self.path / "metrics.jsonl"
        self._require_own_files(file.name)
        with explained(file, self._what_is_left), _open_to_append(file) as stream:
            size = end_of_last_row(stream)
            stream.truncate(size)
            stream.seek(size)
            try:
                stream.write(line.encode())
                stream.flush()
            except OSError:
                os.truncate(file, size)
                raise

    def truncate_metrics(self, step: int) -> None:
        """Drop rows later than a step, and a cut last line: resuming from that step's checkpoint writes them again."""
        kept = [row for row in self._rows() if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        file = self.path / "metrics.jsonl"
        if is_ordinary(file) and read_bytes(file, METRICS_BYTES) != text.encode():
            self._write_text(file, text)

    def _rows(self) -> list[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        *lines, rest = self._metrics_text().split(b"\n")
        rows = [read_row(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]
        try:
            return [*rows, read_row(rest, "last line")] if rest else rows
        except RunError:
            return rows

    def _metrics_text(self) -> bytes:
        file = self.path / "metrics.jsonl"
        try:
            return read_bytes(file, METRICS_BYTES)
        except FileNotFoundError:
            return b""
        except UnreadableFile as error:
            raise RunError(f"{file} cannot be read ({_without(error, file)}); mend or restore it") from None

    def _logged_step(self) -> int:
        """Step of the last row; −1 where there is none or none that can be read."""
        return _last_step(self._metrics_text())

    def _force_metrics(self) -> dict[str, Any]:
        """Force what is logged to disk; how many rows there are and the last one's step."""
        file = self.path / "metrics.jsonl"
        if is_ordinary(file):
            with explained(file), open(file, "r+b") as stream:
                os.fsync(stream.fileno())
        text = self._metrics_text()
        last = _last_step(text)
        return {"count": text.count(b"\n"), "last_step": None if last < 0 else last}

    # --- snapshots ---

    def save_snapshot(self, step: int, **arrays: Any) -> None:
        """Store named arrays of a step, whole or not at all.

        Args:
            step: the training step, ≥ 0.
            **arrays: NumPy arrays, tensors (bfloat16 becomes float32) or numbers.
        Raises:
            ValueError: an array of Python objects.
            RunError: the disk is full or the file cannot be written.
        """
        plain = {name: plain_array(name, value) for name, value in arrays.items()}
        file = self._step_file("snapshots", step, ".npz")
        with self._whole(file) as stream:
            np.savez(stream, **plain)

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
        if not steps or (step != -1 and step not in steps):
            there = ", ".join(map(str, steps)) or "none"
            raise RunError(f"{self.path} has no snapshot of step {step}; there are: {there}")
        file = self._step_file("snapshots", steps[-1] if step == -1 else step, ".npz")
        try:
            return read_npz(file, SNAPSHOT_BYTES)
        except (FileNotFoundError, UnreadableFile) as error:
            raise RunError(f"{error}; delete {file.name} or train again") from error

    def drop_snapshots_after(self, step: int) -> None:
        """Delete snapshots later than a step: what resuming from that step's checkpoint will write again."""
        for later in self.snapshot_steps:
            if later > step:
                self._step_file("snapshots", later, ".npz").unlink()

    # --- checkpoints ---

    def save_checkpoint(self, step: int, state: dict[str, Any], every: int = 1) -> None:
        """Store what resuming needs, whole or not at all; the newest two are kept, later ones than this are dropped.

        What was logged before is forced to disk first.

        Args:
            step: the training step, ≥ 0.
            state: tensors, numbers, text, None, in dictionaries, lists and tuples: what loads without running code.
            every: earlier checkpoints at other steps than its multiples are dropped, such as one of a stop by hand: a
                run that was continued then keeps what a run that was never stopped keeps.
        Raises:
            ValueError: anything else, named by its place, before anything is written.
            RunError: the disk is full or the file cannot be written; the checkpoint before is intact.
        """
        import torch  # noqa: PLC0415 - reading runs needs no torch

        check_storable(state, "state")
        file = self._step_file("checkpoints", step, ".pt")
        rows = self._force_metrics()
        with self._whole(file) as stream:
            torch.save({"step": step, "state": state, "rows": rows}, stream)
        steps = steps_of_files(file.parent, ".pt")
        regular = sorted(old for old in steps if old == step or (old < step and old % every == 0))
        for old in set(steps) - set(regular[-CHECKPOINTS_KEPT:]):
            self._step_file("checkpoints", old, ".pt").unlink(missing_ok=True)

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint's file; None before the first."""
        steps = steps_of_files(self.path / "checkpoints", ".pt")
        return self._step_file("checkpoints", max(steps), ".pt") if steps else None

    def load_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint that can be read.

        Returns:
            Step and state, tensors on the CPU; None if there is no checkpoint. An unreadable newest one is passed over
            with a warning.
        Raises:
            RunError: there are checkpoints and none can be read.
        """
        checkpoint = self.read_checkpoint()
        return (checkpoint.step, checkpoint.state) if checkpoint else None

    def read_checkpoint(self) -> Checkpoint | None:
        """Like `load_checkpoint`, with the file and what it knows of the metrics."""
        failures = []
        for step in sorted(steps_of_files(self.path / "checkpoints", ".pt"), reverse=True):
            file = self._step_file("checkpoints", step, ".pt")
            try:
                checkpoint = _read_checkpoint(file)
            except (
                OSError,
                RuntimeError,
                EOFError,
                ValueError,
                LookupError,
                TypeError,
                AttributeError,
                pickle.UnpicklingError,
            ) as error:
                failures.append(f"{file.name} ({_first_line(error)})")
                continue
            if failures:
                warnings.warn(f"{self.path}: unreadable: {', '.join(failures)}; using {file.name}", stacklevel=3)
            return checkpoint
        if failures:
            raise RunError(
                f"{self.path / 'checkpoints'}: no checkpoint can be read: {', '.join(failures)}. Restore one from "
                f"a copy, or delete the run folder to train anew"
            )
        return None

    def check_rows(self, checkpoint: Checkpoint | None) -> None:
        """Refuse to resume where rows of metrics, or all checkpoints, were lost since they were written.

        Raises:
            RunError: the message names the file and what to do.
        """
        steps = [row["step"] for row in self._rows()]
        if checkpoint is None:
            if max(steps, default=0) > 0:
                raise RunError(
                    f"{self.path / 'checkpoints'} is empty and metrics.jsonl goes up to step {max(steps)}: the "
                    "checkpoints are gone; nothing was changed. Restore one from a copy, or delete the run folder to "
                    "train anew"
                )
            return
        kept = [step for step in steps if step <= checkpoint.step]
        # Of older checkpoints it is known that the first row is that of step 0.
        last, count = checkpoint.rows.get("last_step", 0), checkpoint.rows.get("count", 0)
        if last is not None and last not in kept:
            raise RunError(
                f"{self.path / 'metrics.jsonl'} lacks the row of step {last}, which was there before "
                f"{checkpoint.file.name}: rows were lost; nothing was changed. Restore the file from a copy, or choose "
                "another folder (--output FOLDER)"
            )
        if type(count) is int and len(kept) < count:
            warnings.warn(
                f"{self.path / 'metrics.jsonl'} has {len(kept)} rows up to step {checkpoint.step}, there were {count}: "
                "curves of this run have gaps",
                stacklevel=2,
            )

    # --- the rest ---

    def write_provenance(self, **facts: Any) -> None:
        """Add facts to provenance.json, or replace them; values as in `log`.

        Raises:
            ValueError: a value that JSON cannot hold.
            RunError: the file cannot be written; it is left as it was.
        """
        merged = self.provenance | plain_row(facts, "provenance")
        self._write_text(self.path / "provenance.json", _json_text(merged))

    def finish(self, status: str, **facts: Any) -> None:
        """Note how the run ended, and when.

        Args:
            status: "finished", "failed" or "stopped".
            **facts: whatever else is known now, such as duration_s (seconds).
        Raises:
            ValueError: another status.
        """
        if status not in ENDS:
            raise ValueError(f"a run ends as one of {', '.join(ENDS)}; got {status!r}")
        self.write_provenance(status=status, ended=utc_now(), **facts)

    def figure_path(self, name: str) -> Path:
        """Where a figure or its CSV belongs; the folder is made, and what a killed process left in it is deleted.

        Args:
            name: a file name, without folders.
        """
        if not name or Path(name).name != name:
            raise ValueError(f"a figure's name is a plain file name such as collapse.png; got {name!r}")
        self._require_own_files("figures")
        with explained(self.path / "figures"):
            (self.path / "figures").mkdir(exist_ok=True)
        self._sweep()
        return self.path / "figures" / name

    def _step_file(self, folder: str, step: int, suffix: str) -> Path:
        if step < 0:
            raise ValueError(f"a step is ≥ 0, got {step}")
        return self.path / folder / f"step_{step:08d}{suffix}"

    def _write_text(self, file: Path, text: str) -> None:
        with self._whole(file) as stream:
            stream.write(text.encode())

    @contextmanager
    def _whole(self, file: Path) -> Iterator[BinaryIO]:
        """A stream whose content appears under the file's name when the block ends well, and nowhere otherwise."""
        self._require_own_files(file.relative_to(self.path).parts[0])
        with explained(file, self._what_is_left):
            file.parent.mkdir(exist_ok=True)
        with replacing(file, self._what_is_left) as stream:
            yield stream

    def _require_own_files(self, *names: str) -> None:
        """Refuse to write through links that lead out of the run folder, such as into another run's checkpoints."""
        for name in names:
            file = self.path / name
            if not file.is_symlink():
                continue
            inside, target = os.path.realpath(self.path), os.path.realpath(file)
            if os.path.commonpath([inside, target]) != inside:
                raise RunError(
                    f"{file} is a link that leads out of the run folder, to {target}; nothing was written. Put the "
                    "files themselves there, or link to the whole run folder instead"
                )

    def _require_folders(self) -> None:
        """Refuse to resume where a file, or a link to nothing, has taken a folder's place."""
        for name in FOLDERS:
            folder = self.path / name
            if os.path.lexists(folder) and not folder.is_dir():
                raise RunError(f"{folder} must be a folder; nothing was changed. Move what is there away")

    def _sweep(self) -> None:
        """Delete what killed processes left half written."""
        sweep(self.path)
        for name in FOLDERS:
            if not (self.path / name).is_symlink():
                sweep(self.path / name)

    def _what_is_left(self) -> str:
        """The end of an error message: from where the run would go on."""
        good = self.last_checkpoint
        if good is None:
            return ": it starts from the first step, there is no checkpoint yet"
        return f": it continues from the last good checkpoint, {good.name}, which is intact"

    def __repr__(self) -> str:
        try:
            return f"Run({str(self.path)!r}, {self.status})"
        except RunError:
            return f"Run({str(self.path)!r}, unreadable)"


def claim_folder(folder: Path) -> FileLock:
    """Hold a run folder for one training, until the lock's `release` or this process's end.

    Raises:
        RunError: another process, or another training of this one, holds it; or the folder cannot be written.
    """
    lock = FileLock(folder / LOCK_FILE)
    with explained(lock.file):
        if lock.acquire(CLAIM_SECONDS):
            return lock
    holder = read_holder(lock.file)
    training = (
        f"{holder} is training here since {for_terminal(holder.since)}"
        if holder
        else "another process is training here"
    )
    raise RunError(
        f"{folder}: {training}; nothing was changed. Wait for it, or choose another folder (--output FOLDER)"
    )


def _create(path: Path, config: dict[str, Any]) -> None:
    """Make a new run folder in one move."""
    facts = {"status": "running", "config_hash": content_hash(config), **provenance(private=True)}
    building = temporary_beside(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            building.mkdir()
            for folder in FOLDERS:
                (building / folder).mkdir()
            texts = {"provenance.json": _json_text(facts), "metrics.jsonl": "", "config.yaml": _config_text(config)}
            require_at_most("bytes of a run's settings", len(texts["config.yaml"].encode()), TEXT_BYTES)
            for name, text in texts.items():
                with create_new(building / name) as stream:
                    stream.write(text.encode())
                    stream.flush()
                    os.fsync(stream.fileno())
            force_to_disk(building)
            _move(building, path)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        force_to_disk(path.parent)


def _config_text(config: dict[str, Any]) -> str:
    return f"# settings of an ibqlab run, content hash {content_hash(config)}\n{dump_yaml(config)}"


def _json_text(facts: Mapping[str, Any]) -> str:
    """JSON for people; bytes of names that are not UTF-8 become escapes."""
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _move(building: Path, path: Path) -> None:
    try:
        os.rename(building, path)
    except OSError as error:
        raise (_Taken() if error.errno in (errno.EEXIST, errno.ENOTEMPTY) else error) from None


def _open_to_append(file: Path) -> BinaryIO:
    """An ordinary file for reading and writing, made where it is missing; a pipe is refused instead of waited for."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise RunError(f"{file} must be an ordinary file; delete it, or choose another folder")
    return os.fdopen(handle, "r+b")


def _read_checkpoint(file: Path) -> Checkpoint:
    import torch  # noqa: PLC0415 - reading runs needs no torch

    with open_ordinary(file) as stream:
        stored = torch.load(stream, map_location="cpu", weights_only=True)
    if not isinstance(stored["state"], dict):
        raise ValueError("it holds no state")
    rows = stored.get("rows")
    return Checkpoint(file, int(stored["step"]), stored["state"], rows if isinstance(rows, dict) else {})


def _step_of(file: Path) -> int:
    return int(file.stem.removeprefix("step_"))


def _last_step(text: bytes) -> int:
    """Step of the last whole row of metrics; −1 where there is none or none that can be read."""
    line = text[: text.rfind(b"\n") + 1].rstrip(b"\n").rpartition(b"\n")[2]
    try:
        return read_row(line, "last line")["step"]
    except RunError:
        return -1


def _list(value: Any) -> list[Any]:
    """A list from a file that others may have edited."""
    return value if isinstance(value, list) else []


def _without(error: Exception, file: Path) -> str:
    """An error's message without the file's name at its beginning."""
    return str(error).removeprefix(f"{file}").lstrip(": ")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]
