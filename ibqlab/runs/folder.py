"""The files of a run folder: their names, how each is written whole or not at all, and who may write.

Nothing is written through a link that leads out of the folder, and what a killed process left half written is swept.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ibqlab.base import files
from ibqlab.base.checks import require_at_most
from ibqlab.base.escaping import for_terminal
from ibqlab.base.locking import FileLock, read_holder
from ibqlab.config import content_hash, dump_yaml
from ibqlab.runs.provenance_record import provenance

LOCK_FILE = "lock"
CLAIM_SECONDS = 1.0
"""How long a lock is tried for: whoever looks at a run holds it for an instant."""
FOLDERS = ("snapshots", "checkpoints", "figures")
PLUGINS = "plugins"
"""Folder of a run that keeps the files of the user's that its settings name."""
WRITTEN = ("config.yaml", "metrics.jsonl", "alarms.jsonl", "provenance.json", LOCK_FILE, PLUGINS, *FOLDERS)
"""What a training writes into a run folder."""


def is_free(path: Path) -> bool:
    """Whether a folder is missing or empty; raises where it is neither that nor a run."""
    with files.explained(path):
        if os.path.isdir(path) and os.path.samefile(path, os.curdir):
            raise files.RunError(f"a run needs a folder of its own, got {path}, the current one: --output NAME")
        free = not os.path.lexists(path) or (os.path.isdir(path) and not any(os.scandir(path)))
    if not free and not files.is_ordinary(path / "config.yaml"):
        raise files.RunError(
            f"{path} exists and is no run; nothing was changed. Choose another folder, or empty this one"
        )
    return free


def create(path: Path, config: dict[str, Any], copies: Mapping[str, bytes]) -> bool:
    """Make a new run folder in one move; False if another process was faster.

    Args:
        path: the folder.
        config: its settings, plain.
        copies: further files, path in the folder → content.
    """
    facts = {"status": "running", "config_hash": content_hash(config), **provenance(private=True)}
    building = files.temporary_beside(path)
    with files.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            building.mkdir()
            for folder in FOLDERS:
                (building / folder).mkdir()
            texts = {"provenance.json": json_text(facts), "metrics.jsonl": "", "config.yaml": config_text(config)}
            require_at_most("bytes of a run's settings", len(texts["config.yaml"].encode()), files.TEXT_BYTES)
            for name, content in {**{name: text.encode() for name, text in texts.items()}, **copies}.items():
                (building / name).parent.mkdir(exist_ok=True)
                with files.create_new(building / name) as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
            files.force_to_disk(building)
            os.rename(building, path)
        except BaseException as error:
            shutil.rmtree(building, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return False
            raise
        files.force_to_disk(path.parent)
    return True


def claim_folder(folder: Path) -> FileLock:
    """Hold a run folder for one training, until the lock's `release` or this process's end.

    Raises:
        RunError: another process, or another training of this one, holds it; or the folder cannot be written.
    """
    lock = FileLock(folder / LOCK_FILE)
    with files.explained(lock.file):
        if lock.acquire(CLAIM_SECONDS):
            return lock
    holder = read_holder(lock.file)
    since = f" since {for_terminal(holder.since)}" if holder else ""
    raise files.RunError(
        f"{folder}: {holder or 'another process'} is training here{since}; nothing was changed. Wait for it, or choose "
        "another folder (--output FOLDER)"
    )


def config_text(config: dict[str, Any]) -> str:
    return f"# settings of an ibqlab run, content hash {content_hash(config)}\n{dump_yaml(config)}"


def json_text(facts: Mapping[str, Any]) -> str:
    """JSON for people; bytes of names that are not UTF-8 become escapes."""
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


@contextmanager
def writing(path: Path, file: Path) -> Iterator[BinaryIO]:
    """A stream whose content appears under a run's file when the block ends well, and nowhere otherwise.

    Args:
        path: the run folder.
        file: in it, or in one of its folders, which is made where it is missing.
    Raises:
        RunError: the disk is full or the file cannot be written.
    """
    require_own_files(path, file.relative_to(path).parts[0])
    with files.explained(file, lambda: what_is_left(path)):
        file.parent.mkdir(exist_ok=True)
    with files.replacing(file, lambda: what_is_left(path)) as stream:
        yield stream


def require_own_files(path: Path, *names: str) -> None:
    """Refuse to write through links that lead out of the run folder, such as into another run's checkpoints."""
    for name in names:
        file = path / name
        if not file.is_symlink():
            continue
        inside, target = os.path.realpath(path), os.path.realpath(file)
        if os.path.commonpath([inside, target]) != inside:
            raise files.RunError(
                f"{file} is a link that leads out of the run folder, to {target}; nothing was written. Put the "
                "files themselves there, or link to the whole run folder instead"
            )


def require_folders(path: Path) -> None:
    """Refuse to resume where a file, or a link to nothing, has taken a folder's place."""
    for name in FOLDERS:
        folder = path / name
        if os.path.lexists(folder) and not folder.is_dir():
            raise files.RunError(f"{folder} must be a folder; nothing was changed. Move what is there away")


def sweep_run(path: Path) -> None:
    """Delete what killed processes left half written."""
    files.sweep(path)
    for name in FOLDERS:
        if not (path / name).is_symlink():
            files.sweep(path / name)


def what_is_left(path: Path) -> str:
    """The end of an error message: from where the run would go on."""
    good = last_checkpoint(path)
    if good is None:
        return ": it starts from the first step, there is no checkpoint yet"
    return f": it continues from the last good checkpoint, {good.name}, which is intact"


def steps_of_files(folder: Path, suffix: str) -> list[int]:
    """Steps that a folder has a file of, in no order."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    matches = [re.fullmatch(rf"step_([0-9]{{8,18}}){re.escape(suffix)}", name) for name in names]
    return [int(match[1]) for match in matches if match]


def step_file(path: Path, folder: str, step: int, suffix: str) -> Path:
    """The file of a step in one of a run's folders."""
    if step < 0:
        raise ValueError(f"a step is ≥ 0, got {step}")
    return path / folder / f"step_{step:08d}{suffix}"


def last_checkpoint(path: Path) -> Path | None:
    """The newest checkpoint's file; None before the first."""
    steps = steps_of_files(path / "checkpoints", ".pt")
    return step_file(path, "checkpoints", max(steps), ".pt") if steps else None
