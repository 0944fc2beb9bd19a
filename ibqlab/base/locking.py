"""Locks on files: who writes a store or works on a cell is known to every other process that looks.

The system lets go of a lock when its process ends, however it ends, so nothing is ever locked by the dead. The file
says in words who holds it. Start with `holding`. (`ibqlab.runs.lock` is for one training per run folder, on disks
without locks, too.)
"""

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ibqlab.base.files import RunError

PATIENCE_SECONDS = 600.0
"""How long `wait_for` waits without a sign of life from those that it waits for."""
POLL_SECONDS = 0.5
_HELD: set[int] = set()
"""Open lock files of this process."""


@contextmanager
def holding(file: Path, remove: bool = False) -> Iterator[bool]:
    """Hold a file's lock inside the block.

    Args:
        file: made where it is missing; its folder must be there.
        remove: delete the file at the end, where a finished folder should not keep it.
    Returns:
        Whether the lock is ours; False if another process holds it.
    Raises:
        OSError: the file cannot be made.
    """
    handle = _open_current(file)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        if not _is_current(handle, file):
            # Its holder has deleted it since it was opened: this lock would lock nobody out.
            with holding(file, remove) as ours:
                yield ours
            return
        # On a full disk the lock holds without its holder's name.
        with suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        try:
            yield True
        finally:
            if remove:
                file.unlink(missing_ok=True)
    finally:
        _close(handle)


def _open_current(file: Path) -> int:
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o644)
    _HELD.add(handle)
    return handle


def _close(handle: int) -> None:
    # In a fork it has been closed already.
    if handle in _HELD:
        _HELD.remove(handle)
        os.close(handle)


def _close_in_child() -> None:
    """A fork, such as a process that loads images, does not hold its parent's locks: it may outlive the parent."""
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _is_current(handle: int, file: Path) -> bool:
    """Whether a file still has its name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def is_held(file: Path) -> bool:
    """Whether some process holds a file's lock now."""
    if not file.exists():
        return False
    with holding(file) as ours:
        return not ours


def holder(file: Path) -> str:
    """Who holds a lock, as its file says: "process 4711 on node3"."""
    with suppress(OSError):
        with open(file, "rb") as stream:
            text = stream.read(200).decode(errors="replace").strip()
        if text:
            return text
    return "its number is not known"


def wait_for(done: Callable[[], bool], locks: Sequence[Path], work: str) -> None:
    """Wait for other processes of the same work as long as they live: hold their locks, or touch the files.

    Args:
        done: what is waited for; looked at twice a second.
        locks: of those that are waited for.
        work: what they do, for the message.
    Raises:
        RunError: no sign of life for ten minutes.
    """
    sign, since = None, time.monotonic()
    while not done():
        current = [_touched(file) for file in locks]
        if current != sign or any(is_held(file) for file in locks):
            sign, since = current, time.monotonic()
        if time.monotonic() - since > PATIENCE_SECONDS:
            raise RunError(
                f"{work}: the other processes have shown no sign of life for {PATIENCE_SECONDS:.0f} s; start the same "
                "command again with all of its processes"
            )
        time.sleep(POLL_SECONDS)


def _touched(file: Path) -> int:
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        return 0
