"""Tar shards in webdataset's format, read at random instead of streamed.

A shard is an uncompressed tar file; what belongs together has one key: `n01440764/n01440764_10026.JPEG` and
`n01440764/n01440764_10026.cls`. Streaming readers shuffle what passes by. Here every image has a number and is read by
seeking to it, so shards obey the same rule as a folder: batch s depends on (seed, s) alone.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from PIL import Image

from ibqlab.data.listed import ListedSource
from ibqlab.data.pictures import is_picture_name, read_rgb
from ibqlab.data.shard_index import ShardListing
from ibqlab.quantizers.base import require

OPEN_SHARDS = 128


def names_shards(source: str) -> bool:
    """Whether a source as the user types it means shards: a brace pattern, a .tar file, or a folder that holds some.

    Raises:
        ValueError: a folder that holds both shards and images or sub-folders, so that either could be meant.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path.suffix == ".tar"
    if not path.is_dir():
        return source.endswith(".tar")
    with os.scandir(path) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    shards = sum(entry.name.endswith(".tar") for entry in shown)
    others = sum(entry.is_dir() or is_picture_name(entry.name) for entry in shown) if shards else 0
    require(
        not others,
        f"a source is either a folder of images or a folder of shards; got {path.absolute()} with {shards} .tar files "
        f"and {others} images or sub-folders. For the shards name them, such as {source}/name-{{000000..000009}}.tar; "
        "for the images move the .tar files elsewhere.",
    )
    return shards > 0


def find_shards(source: str, setting: str) -> list[Path]:
    """The tar files that a source means, in order.

    Args:
        source: a folder that holds *.tar (sorted by name), one .tar file, or a pattern such as
            `train-{000000..001281}.tar` (in the order of the pattern).
        setting: its name, for messages.
    Returns:
        At least one existing file, each once.
    Raises:
        ValueError: the pattern stands for no file, for one file twice, or for a file that does not exist.
        ImportError: a pattern without the package braceexpand, which comes with webdataset.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    paths = [Path(name).expanduser() for name in _expand(source)]
    missing = [path for path in paths if not path.is_file()]
    require(
        not missing,
        f"every shard of {setting} must exist; got {source!r}, where {len(missing)} of {len(paths)} are missing, first "
        f"{missing[0].absolute() if missing else ''}. Correct the pattern or complete the shards.",
    )
    require(
        len(set(paths)) == len(paths),
        f"every shard of {setting} must be named once; got {source!r}, which names one twice. Correct the pattern.",
    )
    return paths


class ShardSource(ListedSource):
    """Images of tar shards; `ListedSource` tells what becomes of them. Picklable, and safe in forked loader processes.

    The name of an image is its name inside the shard.
    """

    listing: ShardListing

    def __init__(self, listing: ShardListing, *arguments: object, **settings: object) -> None:
        super().__init__(listing, *arguments, **settings)
        self.files = OpenFiles(listing.paths)

    def _read(self, position: int) -> Image.Image:
        listing = self.listing
        place = (int(listing.shards[position]), int(listing.offsets[position]), int(listing.sizes[position]))
        return read_rgb(self.files.read(*place), self.listing.names.name(position))


class OpenFiles:
    """Reads from many files at any place, with the last few of them held open.

    Reads name their offset (pread), so processes may share an open file after a fork; a pickled copy opens its own. The
    lock keeps a second thread from reading a file that the first one has just closed.

    Args:
        paths: the files.
        limit: how many are open at a time, at least 1; systems allow a process 1,024 or fewer.
    """

    def __init__(self, paths: Sequence[str], limit: int = OPEN_SHARDS) -> None:
        self.paths, self.limit = paths, limit
        self.handles: OrderedDict[int, int] = OrderedDict()
        self.lock = Lock()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Bytes offset … offset + size − 1 of the file `number`.

        Raises:
            OSError: the file is gone, or shorter than that.
        """
        with self.lock:
            data = os.pread(self._handle(number), size, offset)
        if len(data) < size:
            raise OSError(f"{self.paths[number]} ends before byte {offset + size}; it was cut after it was indexed")
        return data

    def _handle(self, number: int) -> int:
        if number not in self.handles:
            if len(self.handles) >= self.limit:
                os.close(self.handles.popitem(last=False)[1])
            self.handles[number] = os.open(self.paths[number], os.O_RDONLY)
        self.handles.move_to_end(number)
        return self.handles[number]

    def __reduce__(self) -> tuple[type, tuple[Sequence[str], int]]:
        return OpenFiles, (self.paths, self.limit)

    def __del__(self) -> None:
        while self.handles:
            os.close(self.handles.popitem()[1])


def _expand(source: str) -> list[str]:
    if "{" not in source:
        return [source]
    try:
        from braceexpand import braceexpand  # noqa: PLC0415 - optional, and only patterns need it
    except ImportError as error:
        raise ImportError(
            f"the pattern {source!r} needs the package braceexpand, which comes with webdataset. Type "
            "pip install 'ibqlab[data]', or name the folder that holds the shards."
        ) from error
    return list(braceexpand(source))
