"""Locks on files: one holder at a time, never the dead, and known by number and host; packages import everywhere."""

import os
import pkgutil
import socket
import subprocess
import sys
import threading
import time

import filelock
import pytest

import ibqlab
from ibqlab.base.files import RunError
from ibqlab.base.locking import FileLock, find_holder, holding, is_held, read_holder


def test_a_lock_has_one_holder_and_says_who(tmp_path):
    file = tmp_path / "lock"
    with holding(file) as ours:
        assert ours
        assert is_held(file)
        assert str(read_holder(file)) == f"process {os.getpid()} on {socket.gethostname()}"
        assert find_holder(file).process == os.getpid()
        with holding(file, remove=True) as again:
            assert not again
        assert file.exists()  # whoever does not hold it deletes nothing
    assert not is_held(file)
    assert find_holder(file) is None
    with holding(file, remove=True) as ours:
        assert ours
    assert not file.exists()
    assert not is_held(file)


def test_a_file_that_is_replaced_meanwhile_is_noticed(tmp_path, monkeypatch):
    """Its holder deletes it after another process has opened it, and a third one makes it again."""
    file, lock, real, calls = tmp_path / "lock", FileLock(tmp_path / "lock"), filelock.lock_descriptor, []

    def replaced(handle, **options):
        calls.append(handle)
        if len(calls) == 1:
            file.unlink()
        return real(handle, **options)

    monkeypatch.setattr(filelock, "lock_descriptor", replaced)
    assert lock.acquire()
    assert len(calls) == 2
    assert os.path.samestat(os.fstat(lock.handle), os.stat(file))
    assert is_held(file)


def test_asking_takes_nothing_and_changes_nothing(tmp_path):
    """Many who ask at once do not take each other for the holder, and one who asks is no obstacle to a holder."""
    file = tmp_path / "lock"
    file.write_text("somebody's\n")
    answers, stop = [], time.monotonic() + 1.0

    def ask():
        while time.monotonic() < stop:
            answers.append(is_held(file))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) > 50
    assert not any(answers)
    assert file.read_text() == "somebody's\n"


def test_a_disk_without_locks_is_warned_of(tmp_path, monkeypatch):
    def unsupported(handle, **_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(filelock, "lock_descriptor", unsupported)
    lock = FileLock(tmp_path / "lock")
    with pytest.warns(UserWarning, match="this disk has no locks"):
        assert lock.acquire()
    assert is_held(tmp_path / "lock")  # by a process that lives
    lock.release()
    assert not is_held(tmp_path / "lock")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("elsewhere")])
def test_what_is_no_ordinary_file_is_refused(tmp_path, make):
    make(tmp_path / "lock")
    with pytest.raises(RunError, match="must be an ordinary file and no link"), holding(tmp_path / "lock"):
        pass
    assert not is_held(tmp_path / "lock")


def test_a_lock_that_is_forgotten_is_free(tmp_path):
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    del lock
    assert not is_held(tmp_path / "lock")


OTHER_SYSTEM = """
import os, signal, sys
import torch, numpy, pydantic, filelock, platformdirs, voila.app  # those packages know other systems by themselves

for name in ("fcntl", "resource", "termios", "pwd", "grp", "pty", "tty", "syslog", "posix_ipc"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "setsid", "killpg", "register_at_fork", "sched_setaffinity", "sched_getaffinity",
             "getuid", "geteuid", "mkfifo", "pread", "pwrite", "fchmod", "O_CLOEXEC", "O_NOFOLLOW",
             "O_NONBLOCK", "uname", "wait", "WNOHANG", "posix_spawn", "set_blocking"):
    vars(os).pop(name, None)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGXFSZ", "pthread_sigmask", "sigwait",
             "sigwaitinfo", "setitimer"):
    vars(signal).pop(name, None)

import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
print(len(sys.argv) - 1)
"""


def test_every_package_imports_where_there_is_no_unix():
    names = ["ibqlab", *(found.name for found in pkgutil.walk_packages(ibqlab.__path__, "ibqlab."))]
    names = [name for name in names if not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", OTHER_SYSTEM, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(names) > 100
