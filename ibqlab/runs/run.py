"""One run folder: create it, continue it, read it."""

import errno
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ibqlab.config import ConfigError, content_hash, dump_yaml, load_yaml, parse, to_dict
from ibqlab.files import RunError, explained, force_to_disk
from ibqlab.runs.files import check_storable, end_of_last_row, plain_array, plain_row, read_row, steps_of_files
from ibqlab.runs.origin import provenance, utc_now

if TYPE_CHECKING:
    import pandas as pd

STATUSES = ("running", "finished", "failed", "stopped")
CHECKPOINTS_KEPT = 2


class _Taken(Exception):
    """Another process has made the folder first."""


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
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"{self.path}: there is no such run folder; list the runs there are with: ibqlab runs"
            )
        if not (self.path / "config.yaml").is_file():
            raise RunError(f"{self.path} is no run: it holds no config.yaml; list the runs there are with: ibqlab runs")
        try:
            self._config = load_yaml(self.path / "config.yaml")
        except ConfigError as error:
            raise RunError(f"damaged run: {error}; restore the file or delete the folder") from None

    @classmethod
    def start(cls, path: str | Path, config: Any) -> "Run":
        """Create a run folder, or continue the one that holds the same settings.

        A setting that did not exist yet when the folder was written counts as its default.

        Args:
            path: the folder; must be missing, empty, or a run with the same content hash.
            config: a dataclass, or a mapping as `ibqlab.config.to_dict` returns it.
        Returns:
            The run. Its status is "running", or "finished" if it was so already.
        Raises:
            RunError: the folder holds a run with other settings, or something else; or it cannot be written.
        """
        path = Path(path)
        if not _occupied(path):
            try:
                _create(path, to_dict(config))
                return cls(path)
            except _Taken:
                pass  # another process was faster: its run is judged like any other that was there before
        if not (path / "config.yaml").is_file():
            raise RunError(
                f"{path} exists and is no run; nothing was changed. Choose another folder, or empty this one"
            )
        run = cls(path)
        run._must_hold(config)
        if run.status != "finished":
            again = provenance()
            earlier = run.provenance.get("resumed", [])
            run.write_provenance(
                status="running", resumed=[*earlier, {k: again[k] for k in ("started", "commit", "dirty")}]
            )
        return run

    def _must_hold(self, config: Any) -> None:
        wanted = to_dict(config)
        ours, theirs = content_hash(wanted), self.config_hash
        recorded = self.provenance.get("config_hash", theirs)
        if recorded != theirs:
            raise RunError(
                f"{self.path / 'config.yaml'} was edited after the run began (content hash {theirs}, began with "
                f"{recorded}); nothing was changed. Undo the edit, or choose another folder"
            )
        held = self._completed_config(config)
        if ours == content_hash(held):
            return
        raise RunError(
            f"{self.path} holds a run with other settings (content hash {theirs}, yours {ours}); nothing was changed. "
            f"There → yours: {_differences(held, wanted)}. Choose another folder (--output FOLDER), give the "
            f"settings it was started with to continue it, or delete it to start anew"
        )

    def _completed_config(self, config: Any) -> dict[str, Any]:
        """The folder's settings with today's defaults filled in; as they are where they no longer parse."""
        try:
            return to_dict(parse(type(config), self.config)) if is_dataclass(config) else self.config
        except ConfigError:
            return self.config

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
        if not file.is_file():
            return {}
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{file} is damaged ({error}); restore or delete it") from None
        if not isinstance(facts, dict):
            raise RunError(f"{file} is damaged (no JSON object); restore or delete it")
        return facts

    @property
    def status(self) -> str:
        """How the run stands: "running" (also after a kill, until started again), "finished", "failed" or "stopped";
        "unknown" where provenance.json does not say."""
        return self.provenance.get("status", "unknown")

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
        with explained(file, self._what_is_left), open(file, "a+b") as stream:
            size = end_of_last_row(stream)
            stream.truncate(size)
            try:
                stream.write(line.encode())
                stream.flush()
            except OSError:
                os.truncate(file, size)
                raise

    def truncate_metrics(self, step: int) -> None:
        """Drop rows later than a step, and a cut last line: resuming from that step's checkpoint writes them again."""
        rows = self._rows()
        kept = [row for row in rows if row.get("step", 0) <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        file = self.path / "metrics.jsonl"
        if file.is_file() and file.read_bytes() != text.encode():
            self._write_text(file, text)

    def _rows(self) -> list[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        *lines, rest = file.read_bytes().split(b"\n")
        rows = [read_row(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]
        try:
            return [*rows, read_row(rest, "last line")] if rest else rows
        except RunError:
            return rows

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
            with np.load(file, allow_pickle=False) as stored:
                return dict(stored)
        except Exception as error:
            raise RunError(f"{file} is damaged ({type(error).__name__}: {error}); delete it or train again") from error

    def drop_snapshots_after(self, step: int) -> None:
        """Delete snapshots later than a step: what resuming from that step's checkpoint will write again."""
        for later in self.snapshot_steps:
            if later > step:
                self._step_file("snapshots", later, ".npz").unlink()

    # --- checkpoints ---

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Store what resuming needs, whole or not at all; the newest two are kept, later ones than this are dropped.

        Args:
            step: the training step, ≥ 0.
            state: tensors, numbers, text, None, in dictionaries, lists and tuples: what loads without running code.
        Raises:
            ValueError: anything else, named by its place, before anything is written.
            RunError: the disk is full or the file cannot be written; the checkpoint before is intact.
        """
        import torch  # noqa: PLC0415 - reading runs needs no torch

        check_storable(state, "state")
        file = self._step_file("checkpoints", step, ".pt")
        with self._whole(file) as stream:
            torch.save({"step": step, "state": state}, stream)
        steps = steps_of_files(file.parent, ".pt")
        kept = sorted(old for old in steps if old <= step)[-CHECKPOINTS_KEPT:]
        for old in set(steps) - set(kept):
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
        import torch  # noqa: PLC0415 - reading runs needs no torch

        failures = []
        for step in sorted(steps_of_files(self.path / "checkpoints", ".pt"), reverse=True):
            file = self._step_file("checkpoints", step, ".pt")
            try:
                stored = torch.load(file, map_location="cpu", weights_only=True)
                found = int(stored["step"]), stored["state"]
            except (
                OSError,
                RuntimeError,
                EOFError,
                ValueError,
                LookupError,
                TypeError,
                pickle.UnpicklingError,
            ) as error:
                failures.append(f"{file.name} ({_first_line(error)})")
                continue
            if failures:
                warnings.warn(f"{self.path}: unreadable: {', '.join(failures)}; using {file.name}", stacklevel=2)
            return found
        if failures:
            raise RunError(
                f"{self.path / 'checkpoints'}: no checkpoint can be read: {', '.join(failures)}. Restore one from "
                f"a copy, or delete the run folder to train anew"
            )
        return None

    # --- the rest ---

    def write_provenance(self, **facts: Any) -> None:
        """Add facts to provenance.json, or replace them; values as in `log`.

        Raises:
            ValueError: a value that JSON cannot hold.
            RunError: the file cannot be written; it is left as it was.
        """
        merged = self.provenance | plain_row(facts, "provenance")
        self._write_text(self.path / "provenance.json", json.dumps(merged, indent=2, ensure_ascii=False) + "\n")

    def finish(self, status: str, **facts: Any) -> None:
        """Note how the run ended, and when.

        Args:
            status: "finished", "failed" or "stopped".
            **facts: whatever else is known now, such as duration_s (seconds).
        Raises:
            ValueError: another status.
        """
        if status not in STATUSES[1:]:
            raise ValueError(f"a run ends as one of {', '.join(STATUSES[1:])}; got {status!r}")
        self.write_provenance(status=status, ended=utc_now(), **facts)

    def figure_path(self, name: str) -> Path:
        """Where a figure or its CSV belongs; the folder is made.

        Args:
            name: a file name, without folders.
        """
        if not name or Path(name).name != name:
            raise ValueError(f"a figure's name is a plain file name such as collapse.png; got {name!r}")
        (self.path / "figures").mkdir(exist_ok=True)
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
        with explained(file, self._what_is_left):
            file.parent.mkdir(exist_ok=True)
            unfinished = file.with_name(f".unfinished{file.suffix}")
            try:
                with open(unfinished, "wb") as stream:
                    yield stream
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(unfinished, file)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
            force_to_disk(file.parent)

    def _what_is_left(self) -> str:
        """The end of an error message: from where the run would go on."""
        good = self.last_checkpoint
        if good is None:
            return ": it starts from the first step, there is no checkpoint yet"
        return f": it continues from the last good checkpoint, {good.name}, which is intact"

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.status})"


def _occupied(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _create(path: Path, config: dict[str, Any]) -> None:
    """Make a new run folder in one move."""
    fingerprint = content_hash(config)
    facts = {"status": "running", "config_hash": fingerprint, **provenance()}
    building = path.with_name(f".{path.name}.{os.getpid()}.new")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            for folder in ("snapshots", "checkpoints", "figures"):
                (building / folder).mkdir(parents=True, exist_ok=True)
            (building / "provenance.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            (building / "metrics.jsonl").touch()
            header = f"# settings of an ibqlab run, content hash {fingerprint}\n"
            (building / "config.yaml").write_text(header + dump_yaml(config), encoding="utf-8")
            _move(building, path)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        force_to_disk(path.parent)


def _move(building: Path, path: Path) -> None:
    try:
        os.rename(building, path)
    except OSError as error:
        raise (_Taken() if error.errno in (errno.EEXIST, errno.ENOTEMPTY) else error) from None


def _differences(there: dict[str, Any], yours: dict[str, Any], shown: int = 8) -> str:
    old, new = dict(_leaves(there, "")), dict(_leaves(yours, ""))
    changed = [key for key in (old | new) if old.get(key, "not set") != new.get(key, "not set")]
    parts = [f"{key}: {old.get(key, 'not set')} → {new.get(key, 'not set')}" for key in changed[:shown]]
    return "; ".join(parts) + (f"; and {len(changed) - shown} more" if len(changed) > shown else "")


def _leaves(mapping: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]
