"""What a folder or a set of shards holds, in a few arrays.

Names lie end to end in one array of bytes: for the 1.28 million images of ImageNet 40 MB that loader processes share,
where a million Python strings would be copied into each of them as soon as their reference counts move.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import translate
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt64

from ibqlab.base.checks import require
from ibqlab.base.escaping import for_terminal
from ibqlab.data.broken import name_a_few
from ibqlab.data.classes import NO_CLASS
from ibqlab.data.source import Split, UnreadableName

TRIED = 100
"""Images of a part that are tried at most until one can be read."""


class PackedNames(NamedTuple):
    """A sequence of names; `names[i]` is a str. `pack_names` makes one."""

    letters: UInt8[np.ndarray, "bytes"]
    """All names end to end in UTF-8."""

    ends: Int64[np.ndarray, "N"]
    """Where each name ends in `letters`."""

    def encoded(self, positions: Int64[np.ndarray, "n"]) -> list[bytes]:
        """The bytes of the names at these positions."""
        letters = self.letters.tobytes()
        ends = self.ends[positions]
        starts = np.where(positions > 0, self.ends[positions - 1], 0)
        return [letters[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def name(self, position: int) -> str:
        """One name; bytes that are no UTF-8 come back as Python writes them in paths (surrogateescape)."""
        start = self.ends[position - 1] if position else 0
        return _decode(self.letters[start : self.ends[position]].tobytes())

    def all(self) -> list[str]:
        """Every name in order, as strings: for one pass, not to be kept."""
        return [_decode(name) for name in self.encoded(np.arange(len(self.ends)))]


def pack_names(names: Iterable[str]) -> PackedNames:
    """Names in two arrays, in the given order."""
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    return PackedNames(np.frombuffer(b"".join(encoded), dtype=np.uint8), np.cumsum(lengths))


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Every image of one place. A position is an image's number in it, 0 to N − 1."""

    where: str
    """The place, for messages."""

    names: PackedNames
    """Relative to the place, with forward slashes on every system."""

    sizes: Int64[np.ndarray, "N"]
    """Bytes of each file; −1 where the system does not tell."""

    labels: Int32[np.ndarray, "N"]
    """Index into `classes`; −1 for an image without a class."""

    classes: list[str]
    """Class names in the order of the labels."""

    named: bool = True
    """False: the classes are known by number only, and `classes` holds "0", "1", …"""

    left_out: str = ""
    """Which files beside the images are left out, for `description`; empty: none."""

    def __len__(self) -> int:
        return len(self.sizes)


def printable(name: str) -> str:
    """A name as text that every file can hold: bytes that are no UTF-8 become \\udcff and the like."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def exclude_names(listing: Listing, patterns: Sequence[str]) -> Int64[np.ndarray, "N_kept"]:
    """Positions of the images whose name fits no pattern, in order.

    Args:
        listing: of N images.
        patterns: file names, or globs (`*`, `?`, `[…]`; upper and lower case differ). One without a slash is held
            against the last part of a name, one with a slash against all of it.
    Raises:
        ValueError: a pattern that fits no name, or no image that is left.
    """
    kept = np.ones(len(listing), dtype=bool)
    names = listing.names.all() if patterns else []
    for pattern in patterns:
        glob = re.compile(translate(pattern)).match
        parts = names if "/" in pattern else [name.rpartition("/")[2] for name in names]
        # A name that has brackets in it may be written as it is; one that is no UTF-8, as messages show it.
        hits = [place for place, part in enumerate(parts) if pattern in (part, printable(part)) or glob(part)]
        kept[hits] = False
        require(
            bool(hits),
            f"every name in exclude must fit an image; got {pattern!r}, which fits none of the {len(listing)} images "
            f"in {for_terminal(listing.where)}. Correct the spelling (case counts), or take it out of exclude.",
        )
    require(
        bool(kept.any()),
        f"exclude must leave at least one image; {list(patterns)} fit all {len(listing)} in "
        f"{for_terminal(listing.where)}. Use less.",
    )
    return np.flatnonzero(kept)


def split_by_name(
    listing: Listing, positions: Int64[np.ndarray, "N"], share: float
) -> dict[Split, Int64[np.ndarray, "N_split"]]:
    """Training and validation positions; an image's place depends on its own name, so adding images moves no other.

    A name whose hash lies in the lowest `share` of the range is validation. Should that leave one part of a small
    set empty, the image with the nearest hash fills it.

    Args:
        listing: of the images.
        positions: which of them are split.
        share: of the images for validation, between 0 and 1.
    Returns:
        Positions per split, each at least one: training in the given order, validation by hash, so that the first n of
        them are a fair sample of all classes.
    Raises:
        ValueError: a single image cannot be split.
    """
    require(
        len(positions) >= 2,
        f"a source is split into training and validation images and must hold at least 2; got {len(positions)} in "
        f"{for_terminal(listing.where)}. Add images, or name a folder or shards of their own in validation_source.",
    )
    hashes = _hash_names(listing.names, positions)
    count = int((hashes.astype(np.float64) / 2**64 < share).sum())
    count = min(max(count, 1), len(positions) - 1)
    by_hash = np.argsort(hashes, kind="stable")
    return {"train": positions[np.sort(by_hash[count:])], "validation": positions[by_hash[:count]]}


def give_each_a_readable(
    listing: Listing, parts: dict[Split, Int64[np.ndarray, "N_split"]], read: Callable[[int], Any]
) -> dict[Split, Int64[np.ndarray, "N_split"]]:
    """A split in which training and validation have a readable image each: one is moved where a small part has none.

    A part whose first image can be read stays as it is, so a whole data set costs two images. Parts of more than a
    hundred images stay as they are, too, and so do those of a set without any readable image: what is wrong there shows
    when they are read.

    Args:
        listing: of the images.
        parts: from `split_by_name`.
        read: a position's image, or `UnreadableName`.
    Returns:
        The parts, or new ones in the same orders.
    Raises:
        ValueError: there is only one readable image.
    """
    broken: dict[int, UnreadableName] = {}

    def is_readable(position: int) -> bool:
        if isinstance(name := read(position), UnreadableName):
            broken[position] = name
            return False
        return True

    for split, other in (("validation", "train"), ("train", "validation")):
        part = parts[split]
        if len(part) > TRIED or any(map(is_readable, part.tolist())):
            continue
        # As in `split_by_name`, the image whose hash is nearest to the border between both changes sides.
        candidates = order_by_hash(listing, parts[other])[:: 1 if other == "train" else -1].tolist()
        readable = list(islice(filter(is_readable, candidates[:TRIED]), 2))
        if not readable or (len(readable) < 2 and len(candidates) > TRIED):
            return parts
        if len(readable) < 2:
            raise ValueError(
                f"training and validation need at least one readable image each; of the "
                f"{len(part) + len(candidates):,} in {for_terminal(listing.where)} only one is. Unreadable: "
                f"{name_a_few(list(broken.values()))}. Replace these files or add images, or name a folder or shards "
                "of their own in data.validation_source"
            )
        rest = parts[other][parts[other] != readable[0]]
        longer = np.append(part, readable[0])
        return {split: np.sort(longer) if split == "train" else longer, other: rest}
    return parts


def order_by_hash(listing: Listing, positions: Int64[np.ndarray, "N"]) -> Int64[np.ndarray, "N"]:
    """The positions in the fixed order of validation, which mixes all classes and does not know about shards."""
    return positions[np.argsort(_hash_names(listing.names, positions), kind="stable")]


def fingerprint(listing: Listing, positions: Int64[np.ndarray, "N"]) -> str:
    """Identity of these images by name and size, whatever their order; 16 hexadecimal digits.

    Cost: a second for a million images, no file is opened.
    """
    lines = sorted(zip(listing.names.encoded(positions), listing.sizes[positions].tolist(), strict=True))
    return hashlib.sha256(b"\n".join(b"%s\t%d" % line for line in lines)).hexdigest()[:16]


def match_labels(listing: Listing, training: Listing) -> Int32[np.ndarray, "N"]:
    """The listing's labels as indices into the classes of the training images.

    Classes are matched by name. Shards without class names have numbers only: their numbers count as they are; and
    class folders, sorted, are given the numbers of such training shards when there are as many of both. Where the
    training images have no classes, all images are of the one class `NO_CLASS`.

    Args:
        listing: of N images for validation.
        training: the listing that defines the classes.
    Returns:
        Labels into the training classes, −1 for an image without a class.
    Raises:
        ValueError: a class that the training images do not have.
    """
    if training.classes == [NO_CLASS]:
        return np.zeros(len(listing), dtype=np.int32)
    as_many = len(listing.classes) == len(training.classes)
    by_number = not listing.named or (not training.named and as_many)
    own = [str(number) for number in range(len(listing.classes))] if by_number else listing.classes
    known = [str(number) for number in range(len(training.classes))] if by_number else training.classes
    numbers = {name: number for number, name in enumerate(known)}
    unknown = [name for name in own if name not in numbers and name != NO_CLASS]
    require(
        not unknown,
        f"validation classes must be among the {len(known)} classes of source; got "
        f"{', '.join(map(for_terminal, unknown[:5]))} in {for_terminal(listing.where)}. Rename those "
        "folders, put all validation images into the folder itself, or use shards with the labels of source.",
    )
    table = np.array([*(numbers.get(name, -1) for name in own), -1], dtype=np.int32)
    return table[listing.labels]


def _hash_names(names: PackedNames, positions: Int64[np.ndarray, "N"]) -> UInt64[np.ndarray, "N"]:
    digests = b"".join(hashlib.sha256(name).digest()[:8] for name in names.encoded(positions))
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
