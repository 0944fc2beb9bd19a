"""Which tar files a source means, and reading from many of them at any place."""

import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from ibqlab.base.checks import FILES, require
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import open_ordinary, why_not
from ibqlab.data.pictures import is_picture_name

OPEN_SHARDS = 128
"""Shards that are held open at a time, where the system allows a process four times as many files."""
PATTERN = 1000
"""Letters of a pattern."""
SAMPLES_PICTURE = "samples.png"
"""What `ibqlab sample` draws of its shards beside them; it makes their folder no folder of images."""
_NUMBERS = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)")
_LETTERS = re.compile(r"\{([a-zA-Z])\.\.([a-zA-Z])")


def find_shards(source: str, setting: str) -> list[Path]:
    """The tar files that a source as the user types it means, in order; none where it means a folder of images.

    Args:
        source: a folder that holds *.tar (sorted by name), one .tar file, or a pattern such as
            `train-{000000..001281}.tar` (in the order of the pattern). Anything else means no shards.
        setting: its name, for messages.
    Returns:
        Existing files, each once.
    Raises:
        ValueError: a folder that holds both shards and images or sub-folders, so that either could be meant, or one
            that cannot be listed; a pattern for no file, for one file twice, for a file that does not exist, or for
            more than a million.
        ImportError: a pattern without the package braceexpand, which comes with webdataset.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return _shards_in(path, source)
    if not source.endswith(".tar"):
        return []
    paths = [Path(os.path.expanduser(name)) for name in _expand(source, setting)]
    missing = [path for path in paths if not os.path.isfile(path)]
    require(
        not missing,
        f"every shard of {setting} must exist; got {for_terminal(source)!r}, where {len(missing)} of {len(paths)} are "
        f"missing or no ordinary files, first {for_terminal(missing[0].absolute()) if missing else ''}. Correct the "
        "pattern or complete the shards.",
    )
    require(
        len(set(paths)) == len(paths),
        f"every shard of {setting} must be named once; got {for_terminal(source)!r}, which names one twice. Correct "
        "the pattern.",
    )
    return paths


def _shards_in(folder: str, source: str) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            visible_entries = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"{for_terminal(folder)} cannot be listed as a source: {why_not(error)}") from error
    shards = sorted(Path(entry.path) for entry in visible_entries if entry.name.endswith(".tar"))
    pictures = [
        entry.name for entry in visible_entries if is_picture_name(entry.name) and entry.name != SAMPLES_PICTURE
    ]
    image_count = len(pictures) + sum(os.path.isdir(entry.path) for entry in visible_entries) if shards else 0
    require(
        not image_count,
        f"a source is either a folder of images or a folder of shards; got {for_terminal(os.path.abspath(folder))} "
        f"with {len(shards)} .tar files and {image_count} images or sub-folders. For the shards name them, such as "
        f"{for_terminal(source)}/name-{{000000..000009}}.tar; for the images move the .tar files elsewhere.",
    )
    return shards


class OpenFiles:
    """Reads from many files at any place, with the last few of them held open.

    Reads name their offset (pread), so processes may share an open file after a fork; a pickled copy opens its own. The
    lock keeps a second thread from reading a file that the first one has just closed.

    Args:
        paths: the files.
        limit: how many are open at a time, at least 1; None: 128, or a quarter of what the system allows a process.
    """

    def __init__(self, paths: Sequence[str], limit: int | None = None) -> None:
        self.paths, self.limit = paths, limit or files_at_a_time()
        self.handles: OrderedDict[int, BinaryIO] = OrderedDict()
        self.lock = Lock()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Bytes offset … offset + size − 1 of the file `number`.

        Raises:
            OSError, ValueError: the file is gone, cannot be read, or is shorter than that.
        """
        with self.lock:
            data = os.pread(self._handle(number).fileno(), size, offset)
        if len(data) < size:
            raise OSError(f"{self.paths[number]} ends before byte {offset + size}; it was cut after it was indexed")
        return data

    def _handle(self, number: int) -> BinaryIO:
        if number not in self.handles:
            if len(self.handles) >= self.limit:
                self.handles.popitem(last=False)[1].close()
            self.handles[number] = open_ordinary(self.paths[number])
        self.handles.move_to_end(number)
        return self.handles[number]

    def __reduce__(self) -> tuple[type, tuple[Sequence[str], int]]:
        return OpenFiles, (self.paths, self.limit)

    def __del__(self) -> None:
        while self.handles:
            self.handles.popitem()[1].close()


def files_at_a_time() -> int:
    """How many shards this process may hold open: 128, or a quarter of the files that it may open."""
    with suppress(ImportError, OSError, ValueError):
        import resource  # noqa: PLC0415 - not on every system

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft > 0:
            return max(1, min(OPEN_SHARDS, soft // 4))
    return OPEN_SHARDS


def _expand(source: str, setting: str) -> list[str]:
    if "{" not in source:
        return [source]
    try:
        from braceexpand import braceexpand  # noqa: PLC0415 - optional, and only patterns need it
    except ImportError as error:
        raise ImportError(
            f"the pattern {for_terminal(source)!r} needs the package braceexpand, which comes with webdataset. Type "
            "pip install 'ibqlab[data]', or name the folder that holds the shards."
        ) from error
    require(
        len(source) <= PATTERN and _largest_count(source) <= FILES,
        f"a pattern may stand for {FILES:,} shards at most; {setting} got {for_terminal(source)!r}. Correct the "
        "numbers in it, or name the folder that holds the shards.",
    )
    try:
        return list(braceexpand(source))
    except ValueError as error:
        raise ValueError(
            f"a pattern must have a }} for every {{; {setting} got {for_terminal(source)!r} ({error}). Correct it, "
            "such as train-{000000..000009}.tar"
        ) from error


def _largest_count(pattern: str) -> int:
    """How many names a brace pattern stands for at most, counted without expanding it.

    The product over all its braces, also nested ones: of the alternatives in each, or of the numbers in its range.
    """
    count, alternatives = 1, []
    for letter in pattern:
        if letter == "{":
            alternatives.append(1)
        elif letter == "," and alternatives:
            alternatives[-1] += 1
        elif letter == "}" and alternatives:
            count *= alternatives.pop()
    for first, last in _NUMBERS.findall(pattern):
        count *= abs(int(last) - int(first)) + 1
    for first, last in _LETTERS.findall(pattern):
        count *= abs(ord(last) - ord(first)) + 1
    return count
