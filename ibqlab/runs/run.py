"""One run folder: create it, continue it, write into it. What it tells is `view`'s."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ibqlab.base.files import RunError, explained, sweep
from ibqlab.base.locking import FileLock
from ibqlab.config import completed, content_hash, to_dict
from ibqlab.runs import folder, metrics
from ibqlab.runs.checkpoints import write_checkpoint
from ibqlab.runs.commands import differences, leaves, train_command
from ibqlab.runs.paths import spelt_as
from ibqlab.runs.provenance_record import provenance, utc_now
from ibqlab.runs.view import ENDS, RunView


class Run(RunView):
    """A run folder; arguments and errors as of `RunView`. `start` makes or continues one."""

    is_new = False
    """Whether `start` has just made the folder."""
    _lock: FileLock | None = None

    @classmethod
    def start(
        cls,
        path: str | Path,
        config: Any,
        *,
        claim: bool = False,
        more_steps: bool = False,
        copies: Mapping[str, bytes] | None = None,
    ) -> "Run":
        """Create a run folder, or continue the one that holds the same settings.

        A setting that did not exist yet when the folder was written counts as its default. What killed processes left
        half written is deleted.

        Args:
            path: the folder; must be missing, empty, or a run with the same content hash.
            config: a dataclass, or a mapping as `ibqlab.config.to_dict` returns it.
            claim: hold the folder until `release`, so that no second training uses it. Nothing in a run that is there
                is changed yet: `note_resumed` does that when its caller has read all that it needs.
            more_steps: a larger `steps` alone continues a run, too.
            copies: files that a new folder keeps: path in it → content.
        Returns:
            The run. Its status is "running", or "finished" if it was so already.
        Raises:
            RunError: the folder holds a run with other settings, or something else; another training holds it; a part
                of it leads elsewhere; or it cannot be written.
        """
        path = Path(path)
        is_new = folder.is_free(path)
        if is_new:
            sweep(path.parent)
            # Where another process is faster, its run is judged like any other that was there before.
            is_new = folder.create(path, to_dict(config), copies or {})
        run = cls(path)
        run.is_new = is_new
        if not is_new:
            run.require_settings(config, more_steps=more_steps)
            folder.require_own_files(run.path, *folder.WRITTEN)
            folder.require_folders(run.path)
        if claim:
            run._lock = folder.claim_folder(run.path)
        folder.sweep_run(run.path)
        if not is_new and not claim and run.status != "finished":
            run.note_resumed(config)
        return run

    @classmethod
    def check(cls, path: str | Path, config: Any) -> None:
        """Refuse now, for whoever plans a training, the folder that `start` would refuse for its settings.

        Raises:
            RunError: the folder holds a run with other settings than these, or with more steps, or something else.
        """
        if not folder.is_free(Path(path)):
            cls(path).require_settings(config, more_steps=True)

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
        now, noted = provenance(), self.provenance
        settings, recorded = self._spelt_alike(config)
        if content_hash(settings) != content_hash(recorded):
            # First the hash, then the settings: a kill between the two leaves a run that both commands continue.
            extension = {"from_steps": recorded["steps"], "to_steps": settings["steps"]}
            extension |= {"config_hash": self.config_hash, "started": now["started"]}
            facts["extended"] = [*_list(noted.get("extended")), extension]
        resumed = [*_list(noted.get("resumed")), {key: now[key] for key in ("started", "commit", "dirty")}]
        is_extended = "extended" in facts
        self.write_provenance(
            status="running",
            config_hash=content_hash(settings) if is_extended else self.config_hash,
            resumed=resumed,
            **facts,
        )
        if is_extended:
            self._write("config.yaml", folder.config_text(settings))
            self.config = settings

    def has_fewer_steps(self, config: Any) -> bool:
        """Whether settings are the folder's but for a larger number of steps."""
        settings, recorded = self._spelt_alike(config)
        old, new = recorded.get("steps"), settings.get("steps")
        if type(old) is not int or type(new) is not int or new <= old:
            return False
        return content_hash(recorded | {"steps": new}) == content_hash(settings)

    def require_settings(self, config: Any, *, more_steps: bool = False) -> None:
        """Refuse settings that are not the folder's. A path may be spelt in another way that leads to the same place.

        Args:
            config: as in `start`.
            more_steps: as in `start`.
        Raises:
            RunError: they differ, or config.yaml was edited; the message names the keys and what to type.
        """
        settings, recorded = self._spelt_alike(config)
        new_hash, folder_hash = content_hash(settings), self.config_hash
        facts = self.provenance
        hashes = [facts.get("config_hash", folder_hash)]
        hashes += [entry.get("config_hash") for entry in _list(facts.get("extended")) if isinstance(entry, dict)]
        if folder_hash not in hashes:
            raise RunError(
                f"{self.path / 'config.yaml'} was edited after the run began (content hash {folder_hash}, began with "
                f"{hashes[0]}); nothing was changed. Undo the edit, or choose another folder"
            )
        if new_hash == content_hash(recorded) or (more_steps and self.has_fewer_steps(config)):
            return
        raise RunError(
            f"{self.path} holds a run with other settings (content hash {folder_hash}, yours {new_hash}); nothing was "
            f"changed. There → yours: {differences(recorded, settings)}. Choose another folder (--output FOLDER), give "
            "the settings it was started with to continue it, or delete it to start anew"
            f"{self.how_to_start_from(config)}"
        )

    def how_to_start_from(self, config: Any) -> str:
        """The end of a message: how to train on from this run's weights with other settings; "" where none can."""
        settings, recorded = self._spelt_alike(config)
        old, new = dict(leaves(recorded)), dict(leaves(settings))
        changed = {key: value for key, value in new.items() if old.get(key, "not set") != value}
        fits = "start_from" in new and changed and not any(key.startswith("tokenizer.") for key in changed)
        if not fits or not folder.steps_of_files(self.path / "checkpoints", ".pt"):
            return ""
        command = train_command(
            self.path / "config.yaml",
            self.path.with_name(f"{self.name}-2"),
            changed | {"start_from": str(self.path.absolute())},
            settings.get("processes"),
        )
        return f". To train on from its weights with your settings: {command}"

    def _spelt_alike(self, config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings, with paths that lead to the same files spelt as in the folder's; and the folder's."""
        recorded = self.config
        if is_dataclass(config):
            recorded = completed(type(config), self.with_copies(recorded))
            recorded |= {key: self.config[key] for key in ("plugins",) if key in self.config}
        return spelt_as(to_dict(config), recorded, self.started_in), recorded

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
        metrics.append_row(self.path, row)

    def log_alarm(self, event: Mapping[str, Any]) -> None:
        """Append one alarm to alarms.jsonl; values and errors as of `log`.

        Args:
            event: "step" and what there is to say, as `ibqlab.diagnostics.alarm.AlarmEvent.row` gives it.
        """
        metrics.append_row(self.path, event, metrics.ALARMS_FILE)

    def truncate_metrics(self, step: int) -> None:
        """Drop rows and alarms later than a step, and cut last lines: resuming from there writes them again."""
        for name in (metrics.METRICS_FILE, metrics.ALARMS_FILE):
            metrics.drop_rows_after(self.path, step, name)

    def save_snapshot(self, step: int, **arrays: Any) -> None:
        """Store named arrays of a step, whole or not at all.

        Args:
            step: the training step, ≥ 0.
            **arrays: NumPy arrays, tensors (bfloat16 becomes float32) or numbers.
        Raises:
            ValueError: an array of Python objects.
            RunError: the disk is full or the file cannot be written.
        """
        plain = {name: _plain_array(name, value) for name, value in arrays.items()}
        file = folder.step_file(self.path, "snapshots", step, ".npz")
        with folder.writing(self.path, file) as stream:
            np.savez(stream, **plain)

    def drop_snapshots_after(self, step: int) -> None:
        """Delete snapshots later than a step: what resuming from that step's checkpoint will write again."""
        for later in self.snapshot_steps:
            if later > step:
                folder.step_file(self.path, "snapshots", later, ".npz").unlink()

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
        write_checkpoint(self.path, step, state, every)

    def write_provenance(self, **facts: Any) -> None:
        """Add facts to provenance.json, or replace them; values as in `log`.

        Raises:
            ValueError: a value that JSON cannot hold.
            RunError: the file cannot be written; it is left as it was.
        """
        merged = self.provenance | metrics.plain_row(facts, "provenance")
        self._write("provenance.json", folder.json_text(merged))

    def _write(self, name: str, text: str) -> None:
        with folder.writing(self.path, self.path / name) as stream:
            stream.write(text.encode())

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
        folder.require_own_files(self.path, "figures")
        with explained(self.path / "figures"):
            (self.path / "figures").mkdir(exist_ok=True)
        folder.sweep_run(self.path)
        return self.path / "figures" / name


def _list(value: Any) -> list[Any]:
    """A list from a file that others may have edited."""
    return value if isinstance(value, list) else []


def _plain_array(name: str, value: Any) -> np.ndarray:
    """A tensor, array or number as an array of numbers."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    array = np.asarray(value)
    if array.dtype.hasobject:
        raise ValueError(f"snapshot array {name!r} holds Python objects; give numbers")
    return array
