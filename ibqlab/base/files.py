"""Files in and out, at every door: written whole or not at all, read only within stated bounds.

Writing: a new file is made exclusively under a name that nobody can guess, forced to disk and renamed. A link that
somebody planted is never followed, and two processes never share a temporary. What a killed process left behind is
swept by the next one (`sweep`). Reading: only ordinary files, no larger than their kind ever is, and JSON no deeper.
Whoever reads or writes a file of the workbench goes through this module; start with `replacing` and `read_json`.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ibqlab.base.escaping import for_terminal

if TYPE_CHECKING:
    import numpy as np

JSON_BYTES = 256 * 2**20
"""Largest JSON file that is read. The largest honest one, a run's metrics of a million steps, is read line by line."""
TEXT_BYTES = 256 * 2**10
"""Largest YAML text that is read, which takes seconds; recipes and runs' settings have a few kilobytes."""
NESTING = 64
"""Deepest nesting of lists and mappings in JSON and YAML; settings have four levels."""
INTEGER_DIGITS = 4000
"""Longest whole number in JSON or YAML, in digits; Python refuses more than 4,300 with a message about itself."""


class RunError(RuntimeError):
    """A folder or file that cannot be used or written; the message says what stands there and what to do."""


class UnreadableFile(ValueError):
    """A file that is not what it should be; the message names the file, the rule and what arrived."""


# --- in --------------------------------------------------------------------------------------------------------------


def open_ordinary(path: str | Path) -> BinaryIO:
    """Open an ordinary file for reading; a pipe, a device or a folder is refused instead of waited for.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFile: it is no ordinary file, may not be read, or its name is no name.
    """
    path = Path(path)
    try:
        # Opening a pipe would wait for a writer, hence without blocking.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise UnreadableFile(f"{for_terminal(path, 120)}: {why_not(error)}") from None
    kind = _kind(os.fstat(handle).st_mode)
    if kind:
        os.close(handle)
        raise UnreadableFile(f"{path} is {kind}; give an ordinary file")
    return os.fdopen(handle, "rb")


def _kind(mode: int) -> str:
    """What a file is that is no ordinary one; "" for an ordinary one."""
    if stat.S_ISREG(mode):
        return ""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def expanded(path: str | Path) -> Path:
    """A path in which ~ is the home folder.

    Raises:
        ValueError: ~ of somebody who has none.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{for_terminal(path)}: there is no such home folder; write the whole path") from None


def is_ordinary(path: str | Path) -> bool:
    """Whether a path leads to an ordinary file; False where nothing can be told about it."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def why_not(error: BaseException) -> str:
    """What the system said about a file, in words that name a remedy where there is one."""
    if isinstance(error, PermissionError):
        return "permission denied; ask its owner, or give another file"
    if isinstance(error, OSError):
        words = {
            errno.ELOOP: "a link that leads back to itself",
            errno.ENAMETOOLONG: "the name is too long for this disk; choose a shorter one",
            errno.EISDIR: "is a folder; give a file",
            errno.ENOTDIR: "a part of the path is a file, not a folder",
            errno.EROFS: "the disk is read-only; choose a folder that you may write to",
            errno.EMFILE: "too many files are open; raise the limit with `ulimit -n 4096`",
        }
        return words.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))
    if "null byte" in str(error) or "null character" in str(error):
        return "the name holds a zero byte; no file can be called so"
    return f"{type(error).__name__}: {error}"


def read_bytes(path: str | Path, limit: int) -> bytes:
    """An ordinary file's content.

    Args:
        path: the file.
        limit: bytes at most.
    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFile: no ordinary file, may not be read, or larger than the limit.
    """
    with open_ordinary(path) as stream:
        # The size first: no memory is taken for what is refused. Then what is read: a file may grow, or tell no size.
        content = None
        if os.fstat(stream.fileno()).st_size <= limit:
            try:
                content = stream.read(limit + 1)
            except OSError as error:
                raise UnreadableFile(f"{path}: {why_not(error)}") from None
    if content is None or len(content) > limit:
        size = f"{limit / 2**20:,.0f} MiB" if limit >= 2**20 else f"{limit / 2**10:,.0f} KiB"
        raise UnreadableFile(f"{path} is larger than {size}, which no file of its kind is")
    return content


def read_text(path: str | Path, limit: int = TEXT_BYTES) -> str:
    """An ordinary file's content as UTF-8.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFile: as `read_bytes`; or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableFile(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from None


def read_json(path: str | Path, kind: type | tuple[type, ...] = dict, limit: int = JSON_BYTES) -> Any:
    """What a JSON file holds, of the kind that it must be.

    Args:
        path: the file.
        kind: dict for an object, list for an array; a tuple for either.
        limit: bytes at most.
    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFile: as `read_text`; or no JSON, too deep, numbers too long, or of another kind.
    """
    return parse_json(read_text(path, limit), str(path), kind)


def parse_json(text: str | bytes, source: str, kind: type | tuple[type, ...] = dict) -> Any:
    """JSON text checked like a file's; the message starts with its source."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise UnreadableFile(f"{source}: nested deeper than {NESTING} levels, which no file of its kind is") from None
    except ValueError as error:
        reason = f"a number of more than {INTEGER_DIGITS:,} digits" if "digits" in str(error) else f"no JSON ({error})"
        raise UnreadableFile(f"{source}: {reason}") from None
    if nesting(value) > NESTING:
        raise UnreadableFile(f"{source}: nested deeper than {NESTING} levels, which no file of its kind is")
    if not isinstance(value, kind):
        words = {dict: "an object {…}", list: "an array […]"}
        kinds = " or ".join(words.get(cls, cls.__name__) for cls in (kind if isinstance(kind, tuple) else (kind,)))
        raise UnreadableFile(f"{source}: must hold {kinds}; got {str(value)[:40]!r}")
    return value


def nesting(value: Any, bound: int = NESTING + 1) -> int:
    """How deep lists and mappings lie in each other, counted up to a bound; without recursion."""
    depth, level = 0, [value]
    while depth < bound:
        # All lists and mappings that lie at this depth.
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            break
        depth += 1
        level = [item for holder in level for item in (holder.values() if isinstance(holder, dict) else holder)]
    return depth


def read_npz(path: str | Path, limit: int, names: Collection[str] | None = None) -> "dict[str, np.ndarray]":
    """The arrays of an .npz file; what they claim to hold is checked against the file before memory is taken.

    Args:
        path: the file.
        limit: bytes at most, of all arrays together when unpacked.
        names: those to read, as far as they are there; None: all.
    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFile: no .npz, damaged, Python objects inside, or larger than the limit.
    """
    import numpy as np  # noqa: PLC0415 - keeps `ibqlab --help` quick

    with open_ordinary(path) as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                claimed = sum(entry.file_size for entry in archive.infolist())
            if claimed > limit:
                raise UnreadableFile(
                    f"{path} unpacks to {claimed / 2**20:,.0f} MiB; at most {limit / 2**20:,.0f} MiB belong here"
                )
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files if names is None or name in names}
        except UnreadableFile:
            raise
        # What damaged archives raise is not written down anywhere: zlib's, zipfile's, struct's and NumPy's errors.
        except Exception as error:
            raise UnreadableFile(f"{path} is damaged or no .npz file ({type(error).__name__}: {error})") from None


# --- out -------------------------------------------------------------------------------------------------------------

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:4]
"""This machine, in the names of temporaries: on a shared disk another machine's processes cannot be asked."""
_TEMPORARY = re.compile(rf"\..+\.(?P<process>[0-9]+)-{_HOST}[0-9a-f]{{12}}\.part$", re.DOTALL)


def temporary_beside(file: Path) -> Path:
    """A name for a file or folder that will become `file`: hidden, with this process's number, not to be guessed."""
    return file.with_name(f".{file.name[:100]}.{os.getpid()}-{_HOST}{secrets.token_hex(6)}.part")


def is_temporary(name: str) -> bool:
    """Whether a name is one of `temporary_beside`, on whatever machine."""
    return re.fullmatch(r"\..+\.[0-9]+-[0-9a-f]{16}\.part", name, re.DOTALL) is not None


def sweep(folder: str | Path) -> list[str]:
    """Delete what killed processes left of unfinished files and folders (`temporary_beside`) directly in a folder.

    Only temporaries of processes of this machine that no longer live; one of a live process stays.

    Returns:
        Names of what was deleted.
    """
    swept = []
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            match = _TEMPORARY.match(entry.name)
            if match is None or is_alive(int(match["process"])):
                continue
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
                swept.append(entry.name)
    return swept


def is_alive(process: int) -> bool:
    """Whether a process of this machine lives; a zombie does not."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True


def create_new(file: Path) -> BinaryIO:
    """Open a file for writing that must not exist yet, not even as a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(file, flags | getattr(os, "O_BINARY", 0), 0o666), "wb")


@contextmanager
def replacing(file: str | Path, what_is_left: Callable[[], str] = str) -> Iterator[BinaryIO]:
    """A stream whose content becomes the file when the block ends well, and is gone otherwise.

    Args:
        file: the file; what stands there is replaced, a link itself and not what it leads to.
        what_is_left: the end of the error message, worked out only then.
    Raises:
        RunError: the disk is full, or the folder may not be written to.
    """
    with _becoming(Path(file), what_is_left) as temporary, create_new(temporary) as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def replacing_path(file: str | Path, publish: Callable[[Path, Path], object] = os.replace) -> Iterator[Path]:
    """Like `replacing`, for a library that writes to a path and not to a stream; the path exists and is empty.

    Args:
        file: as for `replacing`.
        publish: gives what was written (first) its name (second).
    """
    with _becoming(Path(file), publish=publish) as temporary:
        create_new(temporary).close()
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())


@contextmanager
def _becoming(
    file: Path, what_is_left: Callable[[], str] = str, publish: Callable[[Path, Path], object] = os.replace
) -> Iterator[Path]:
    """A temporary's name, which becomes the file's when the block ends well; else the temporary is deleted."""
    temporary = temporary_beside(file)
    with explained(file, what_is_left):
        try:
            yield temporary
            publish(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        force_to_disk(file.parent)


def write_whole(file: str | Path, content: bytes) -> None:
    """Write a file that is there whole or not at all.

    Raises:
        RunError: the disk is full, or the folder may not be written to.
    """
    with replacing(file) as stream:
        stream.write(content)


@contextmanager
def explained(file: Path, what_is_left: Callable[[], str] = str) -> Iterator[None]:
    """Turn what goes wrong in writing a file into a RunError that says what is left and what to do."""
    # What is being handled already, such as a stop that is noted, is not what went wrong here.
    earlier_error = sys.exception()
    try:
        yield
    except (OSError, RuntimeError) as error:
        causes, cause = [], error  # the latest first, without `earlier_error` and what led to that
        while cause is not None and cause is not earlier_error:
            causes.append(cause)
            cause = cause.__cause__ or cause.__context__
        if any(isinstance(exception, KeyboardInterrupt) for exception in causes):
            # Ctrl-C inside torch.save comes out as an error about positions in the file.
            raise KeyboardInterrupt from None
        # torch.save reports the operating system's complaint as a RuntimeError about positions.
        cause = next((exception for exception in causes if isinstance(exception, OSError) and exception.errno), None)
        if cause is None or isinstance(error, RunError):
            raise
        raise RunError(f"{for_terminal(file, 120)}: {_reason(cause, file)}{what_is_left()}") from error


def _reason(cause: OSError, file: Path) -> str:
    if cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot be written ({os.strerror(cause.errno)}); choose a folder that you may write to"
    disk = next(folder for folder in file.absolute().parents if folder.exists())
    free = shutil.disk_usage(disk).free / 2**30
    return (
        f"the disk or a quota is full ({os.strerror(cause.errno)}; {free:.2f} GiB free on the disk), nothing was left "
        f"half written. Make room or raise the quota, then start the same command again"
    )


def force_to_disk(folder: Path) -> None:
    """Make a rename inside a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
