"""Who trains in a run folder now: a lock on the file `lock`, and a sign of life for other machines.

The system lets go of the lock when its process ends, however it ends, so a dead process never holds a folder. Where
disks are shared without locks, the file's time tells: whoever trains touches it every half minute.
"""

import fcntl
import json
import os
import socket
import stat
import time
import warnings
import weakref
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import RunError, UnreadableFile, explained, is_alive, open_ordinary, parse_json

LOCK_FILE = "lock"
BEAT_SECONDS = 30.0
"""Time between two signs of life of a process that trains."""
SILENT_SECONDS = 600.0
"""A process of another machine that has given no sign of life for so long counts as dead."""
PATIENCE_SECONDS = 1.0
"""How long a lock is tried for: whoever looks at a run holds it for an instant."""
_HOLDER_BYTES = 4096


class Holder(NamedTuple):
    """The process that trains in a folder."""

    process: int
    host: str
    since: str
    """UTC, ISO 8601."""

    def __str__(self) -> str:
        return f"process {self.process} on {for_terminal(self.host)} is training here since {for_terminal(self.since)}"


class FolderLock:
    """A run folder held for one training until `release`, or until this process ends.

    Args:
        folder: an existing run folder.
    Raises:
        RunError: another process, or another training of this one, holds it; or the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.file = folder / LOCK_FILE
        self.beaten = time.monotonic()
        self.handle = -1
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        stranger = RunError(f"{self.file} must be an ordinary file and no link; nothing was changed. Delete it")
        if os.path.lexists(self.file) and not stat.S_ISREG(os.lstat(self.file).st_mode):
            raise stranger
        with explained(self.file):
            handle = os.open(self.file, flags, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise stranger
            _lock(handle, folder)
        except BaseException:
            os.close(handle)
            raise
        self.handle = handle
        _HELD.add(self)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        facts = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
        # On a full disk the lock holds without its holder's name.
        with suppress(OSError):
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, (json.dumps(facts) + "\n").encode(), 0)

    def beat(self) -> None:
        """Give a sign of life, at most every half minute."""
        if time.monotonic() - self.beaten < BEAT_SECONDS:
            return
        self.beaten = time.monotonic()
        with suppress(OSError):
            os.utime(self.handle)

    def release(self) -> None:
        """Let go of the folder; the file stays, empty."""
        handle, self.handle = self.handle, -1
        if handle < 0:
            return
        with suppress(OSError):
            os.ftruncate(handle, 0)
        os.close(handle)

    def __del__(self) -> None:
        self.release()


_HELD: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()


def _close_in_child() -> None:
    """A fork, such as a process that loads images, does not hold its parent's folder: it may outlive the parent."""
    for lock in list(_HELD):
        if lock.handle >= 0:
            os.close(lock.handle)
            lock.handle = -1


os.register_at_fork(after_in_child=_close_in_child)


def _lock(handle: int, folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        except OSError as error:
            warnings.warn(
                f"{folder}: this disk has no locks ({os.strerror(error.errno)}); see to it that only one training "
                "uses the folder",
                stacklevel=4,
            )
            return
    holder = _read_holder(os.pread(handle, _HOLDER_BYTES, 0)) or "another process is training here"
    raise RunError(f"{folder}: {holder}; nothing was changed. Wait for it, or choose another folder (--output FOLDER)")


def find_holder(folder: Path) -> Holder | None:
    """The process that trains in a folder now, as far as can be seen from here; None where none does."""
    try:
        stream = open_ordinary(folder / LOCK_FILE)
    except (FileNotFoundError, UnreadableFile):
        return None
    with stream:
        holder = _read_holder(stream.read(_HOLDER_BYTES))
        silent = time.time() - os.fstat(stream.fileno()).st_mtime
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            return holder or Holder(0, "an unknown host", "an unknown time")
        except OSError:
            free = False  # nothing is known: this disk has no locks
    if holder is None or silent > SILENT_SECONDS:
        return None
    if holder.host == socket.gethostname():
        return holder if not free and is_alive(holder.process) else None
    return holder


def _read_holder(content: bytes) -> Holder | None:
    try:
        facts = parse_json(content, LOCK_FILE)
    except UnreadableFile:
        return None
    kinds = {"process": int, "host": str, "since": str}
    if any(type(facts.get(key)) is not kind for key, kind in kinds.items()):
        return None
    return Holder(*(facts[key] for key in kinds))
