"""Locks on files: who trains in a run folder, writes a store or works on a cell is known to every other process.

The system lets go of a lock when its process ends, however it ends, so nothing is ever locked by the dead. The file
says who holds it. Start with `holding`. Locking itself is filelock's, which does it on every system. Around it stands
what our folders need: a forked child holds nothing, a file that was deleted meanwhile locks nobody out, and whoever
trains touches the file now and then, as a sign of life for machines that share the disk without its locks.
"""

import json
import os
import socket
import stat
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import RunError, UnreadableFile, is_alive, parse_json, read_bytes

PATIENCE_SECONDS = 600.0
"""How long `wait_for` waits without a sign of life from those that it waits for."""
POLL_SECONDS = 0.5
BEAT_SECONDS = 30.0
"""Time between two signs of life."""
SILENT_SECONDS = 600.0
"""A process of another machine that has given no sign of life for so long counts as dead."""
GLANCE_SECONDS = 0.2
"""Whoever asks about a lock holds it for an instant; a second one who asks then looks again for so long."""
_HOLDER_BYTES = 4096


class Holder(NamedTuple):
    """The process that holds a lock."""

    process: int
    host: str
    since: str
    """UTC, ISO 8601."""

    def __str__(self) -> str:
        return f"process {self.process} on {for_terminal(self.host)}"


class FileLock:
    """A lock on a file that this process may take, and holds until `release` or until it ends.

    Args:
        file: made where it is missing; its folder must exist.
    """

    def __init__(self, file: Path):
        self.file = file
        self.handle = -1
        self.beaten = 0.0
        _LOCKS.add(self)

    def acquire(self, patience: float = 0.0) -> bool:
        """Take the lock.

        Args:
            patience: seconds to try for while another process holds it.
        Returns:
            Whether it is ours. On a disk that has no locks it always is, with a warning.
        Raises:
            OSError: the file cannot be made.
            RunError: it is a link, or no ordinary file.
        """
        deadline = time.monotonic() + patience
        while True:
            self.handle = _open(self.file, os.O_RDWR | os.O_CREAT)
            is_locked = self._lock()
            # Its holder may have deleted the file since it was opened: such a lock would lock nobody out.
            if is_locked and _has_its_name(self.handle, self.file):
                self._write_holder()
                return True
            self._close()
            if not is_locked:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.02)

    def _lock(self) -> bool:
        try:
            return _try_lock(self.handle)
        except OSError as error:
            warnings.warn(
                f"{self.file.parent}: this disk has no locks ({os.strerror(error.errno)}); see to it that only one "
                "process uses the folder",
                stacklevel=4,
            )
            return True

    def _write_holder(self) -> None:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        facts = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
        self.beaten = time.monotonic()
        # On a full disk the lock holds without its holder's name.
        with suppress(OSError):
            os.ftruncate(self.handle, 0)
            os.write(self.handle, (json.dumps(facts) + "\n").encode())

    def beat(self) -> None:
        """Give a sign of life, at most every half minute."""
        if time.monotonic() - self.beaten >= BEAT_SECONDS:
            self.beaten = time.monotonic()
            with suppress(OSError):
                os.utime(self.handle)

    def release(self, remove: bool = False) -> None:
        """Let go of the lock.

        Args:
            remove: delete the file; else it stays, empty.
        """
        if self.handle >= 0:
            with suppress(OSError):
                os.ftruncate(self.handle, 0)
            if remove:
                self.file.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        handle, self.handle = self.handle, -1
        if handle >= 0:
            os.close(handle)

    def __del__(self) -> None:
        self.release()


_LOCKS: "weakref.WeakSet[FileLock]" = weakref.WeakSet()


def _close_in_child() -> None:
    """A fork, such as a process that loads images, does not hold its parent's locks: it may outlive the parent."""
    for lock in list(_LOCKS):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _open(file: Path, flags: int) -> int:
    """Open a lock's file; a link, a folder or a pipe is refused instead of followed or waited for."""
    stranger = RunError(f"{file} must be an ordinary file and no link; nothing was changed. Delete it")
    if os.path.lexists(file) and not stat.S_ISREG(os.lstat(file).st_mode):
        raise stranger
    handle = os.open(file, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o644)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise stranger
    return handle


def _try_lock(handle: int) -> bool:
    """Lock an open file; False if it is locked. Raises OSError where the disk has no locks."""
    from filelock import lock_descriptor  # noqa: PLC0415 - takes 0.1 s, and most commands lock nothing

    return lock_descriptor(handle, blocking=False)


def _has_its_name(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


@contextmanager
def holding(file: Path, remove: bool = False) -> Iterator[bool]:
    """Hold a file's lock inside the block.

    Args:
        file: made where it is missing; its folder must exist.
        remove: delete the file at the end, where a finished folder should not keep it.
    Returns:
        Whether the lock is ours; False if another process holds it.
    Raises:
        OSError: the file cannot be made.
        RunError: it is a link, or no ordinary file.
    """
    lock = FileLock(file)
    try:
        yield lock.acquire()
    finally:
        lock.release(remove)


def is_held(file: Path) -> bool:
    """Whether some process holds a file's lock now, as far as this machine's system knows."""
    deadline = time.monotonic() + GLANCE_SECONDS
    while True:
        try:
            handle = _open(file, os.O_RDWR if os.access(file, os.W_OK) else os.O_RDONLY)
        except (OSError, RunError):
            return False
        try:
            if _try_lock(handle):
                return False
        except OSError:
            return _lives_here(read_holder(file))  # this disk has no locks
        finally:
            os.close(handle)
        # Held: by the process that the file names, or for an instant by another one that asks.
        named = read_holder(file)
        is_abroad = named is not None and named.host != socket.gethostname()
        if is_abroad or _lives_here(named) or time.monotonic() >= deadline:
            return True
        time.sleep(0.02)


def _lives_here(holder: Holder | None) -> bool:
    return holder is not None and holder.host == socket.gethostname() and is_alive(holder.process)


def read_holder(file: Path) -> Holder | None:
    """The process that a lock's file names; None where it names none."""
    try:
        facts = parse_json(read_bytes(file, _HOLDER_BYTES), file.name)
    except (FileNotFoundError, UnreadableFile):
        return None
    kinds = {"process": int, "host": str, "since": str}
    if any(type(facts.get(key)) is not kind for key, kind in kinds.items()):
        return None
    return Holder(*(facts[key] for key in kinds))


def find_holder(file: Path) -> Holder | None:
    """The process that holds a lock, on whatever machine; None where none does.

    Where disks are shared without locks, a holder of another machine is known by its sign of life (`FileLock.beat`).
    """
    holder = read_holder(file)
    if is_held(file):
        return holder or Holder(0, "an unknown host", "an unknown time")
    if holder is None or holder.host == socket.gethostname():
        return None
    return holder if time.time() - _touched(file) < SILENT_SECONDS else None


def wait_for(is_finished: Callable[[], bool], locks: Sequence[Path], work: str) -> None:
    """Wait for other processes of the same work as long as they live. Those that live hold or touch their locks.

    Args:
        is_finished: what is waited for; looked at twice a second.
        locks: of those that are waited for.
        work: what they do, for the message.
    Raises:
        RunError: no sign of life for ten minutes.
    """
    sign, since = None, time.monotonic()
    while not is_finished():
        times = [_touched(file) for file in locks]
        if times != sign or any(is_held(file) for file in locks):
            sign, since = times, time.monotonic()
        if time.monotonic() - since > PATIENCE_SECONDS:
            raise RunError(
                f"{work}: the other processes have shown no sign of life for {PATIENCE_SECONDS:.0f} s; start the same "
                "command again with all of its processes"
            )
        time.sleep(POLL_SECONDS)


def _touched(file: Path) -> float:
    """When a file was last changed, in seconds since 1970; 0 where there is none."""
    try:
        return os.stat(file).st_mtime
    except OSError:
        return 0.0
