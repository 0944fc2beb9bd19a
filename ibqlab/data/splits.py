"""Which images of a list are for training and which for validation, and what class each of them counts as."""

import hashlib
import re
from collections.abc import Callable, Sequence
from fnmatch import translate
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from ibqlab.base.checks import require
from ibqlab.base.escaping import for_terminal
from ibqlab.data.broken import UnreadableName, name_a_few
from ibqlab.data.file_list import NO_CLASS, FileList, printable
from ibqlab.data.source import Split

TRIED = 100
"""Images of a split that are tried at most until one can be read."""


def exclude_names(files: FileList, patterns: Sequence[str]) -> Int64[np.ndarray, "n"]:
    """Positions of the images whose name fits no pattern, in order.

    Args:
        files: a list of N images.
        patterns: file names, or globs (`*`, `?`, `[…]`; upper and lower case differ). One without a slash is held
            against the last part of a name, one with a slash against all of it.
    Raises:
        ValueError: a pattern that fits no name, or no image that is left.
    """
    is_left = np.ones(len(files), dtype=bool)
    names = files.names.all() if patterns else []
    for pattern in patterns:
        fits = re.compile(translate(pattern)).match
        texts = names if "/" in pattern else [name.rpartition("/")[2] for name in names]
        # A name that has brackets in it may be written as it is; one that is no UTF-8, as messages show it.
        excluded = [position for position, text in enumerate(texts) if pattern in (text, printable(text)) or fits(text)]
        is_left[excluded] = False
        require(
            bool(excluded),
            f"every name in exclude must fit an image; got {pattern!r}, which fits none of the {len(files)} images "
            f"in {for_terminal(files.where)}. Correct the spelling (case counts), or take it out of exclude.",
        )
    require(
        bool(is_left.any()),
        f"exclude must leave at least one image; {list(patterns)} fit all {len(files)} in "
        f"{for_terminal(files.where)}. Use less.",
    )
    return np.flatnonzero(is_left)


def split_by_name(
    files: FileList, positions: Int64[np.ndarray, "n"], share: float
) -> dict[Split, Int64[np.ndarray, "n_split"]]:
    """Training and validation positions; an image's split depends on its own name, so adding images moves no other.

    A name whose hash lies in the lowest `share` of the range is validation. Should that leave one split of a small
    set empty, the image with the nearest hash fills it.

    Args:
        files: the images.
        positions: which of them are split.
        share: of the images for validation, between 0 and 1.
    Returns:
        Positions per split, each at least one: training in the order of `positions`, validation by hash, so that the
        first n of them are a fair sample of all classes.
    Raises:
        ValueError: a single image cannot be split.
    """
    require(
        len(positions) >= 2,
        f"a source is split into training and validation images and must hold at least 2; got {len(positions)} in "
        f"{for_terminal(files.where)}. Add images, or name a folder or shards of their own in validation_source.",
    )
    hashes = _hash_names(files, positions)  # (n,), uniform over 0 … 2⁶⁴ − 1
    count = int((hashes.astype(np.float64) / 2**64 < share).sum())
    count = min(max(count, 1), len(positions) - 1)
    by_hash = np.argsort(hashes, kind="stable")
    return {"train": positions[np.sort(by_hash[count:])], "validation": positions[by_hash[:count]]}


def give_each_a_readable(
    files: FileList, splits: dict[Split, Int64[np.ndarray, "n_split"]], image_at: Callable[[int], Any]
) -> dict[Split, Int64[np.ndarray, "n_split"]]:
    """Splits with a readable image each: one is moved over where a small split has none.

    A split whose first image can be read stays as it is, so a whole data set costs two images. Splits of more than a
    hundred images stay as they are, too, and so do those of a set without any readable image: what is wrong there shows
    when they are read.

    Args:
        files: the images.
        splits: from `split_by_name`.
        image_at: a position's image, or `UnreadableName`.
    Returns:
        The splits, or new ones in the same orders.
    Raises:
        ValueError: there is only one readable image.
    """
    broken: dict[int, UnreadableName] = {}

    def is_readable(position: int) -> bool:
        if isinstance(name := image_at(position), UnreadableName):
            broken[position] = name
            return False
        return True

    for split, donor in (("validation", "train"), ("train", "validation")):
        positions = splits[split]
        if len(positions) > TRIED or any(map(is_readable, positions.tolist())):
            continue
        # As in `split_by_name`, the image whose hash is nearest to the border between both changes sides.
        candidates = order_by_hash(files, splits[donor])[:: 1 if donor == "train" else -1].tolist()
        readable = list(islice(filter(is_readable, candidates[:TRIED]), 2))
        if not readable or (len(readable) < 2 and len(candidates) > TRIED):
            return splits
        if len(readable) < 2:
            raise ValueError(
                f"training and validation need at least one readable image each; of the "
                f"{len(positions) + len(candidates):,} in {for_terminal(files.where)} only one is. Unreadable: "
                f"{name_a_few(list(broken.values()))}. Replace these files or add images, or name a folder or shards "
                "of their own in data.validation_source"
            )
        donor_positions = splits[donor][splits[donor] != readable[0]]
        longer = np.append(positions, readable[0])
        return {split: np.sort(longer) if split == "train" else longer, donor: donor_positions}
    return splits


def order_by_hash(files: FileList, positions: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    """The positions in the fixed order of validation, which mixes all classes and does not know about shards."""
    return positions[np.argsort(_hash_names(files, positions), kind="stable")]


def match_labels(files: FileList, training: FileList) -> Int32[np.ndarray, "N"]:
    """The labels of a list as indices into the classes of the training images.

    Classes are matched by name. Shards without class names have numbers only: their numbers count as they are; and
    class folders, sorted, are given the numbers of such training shards when there are as many of both. Where the
    training images have no classes, all images are of the one class `NO_CLASS`.

    Args:
        files: N images for validation.
        training: the list that defines the classes.
    Returns:
        Labels into the training classes, −1 for an image without a class.
    Raises:
        ValueError: a class that the training images do not have.
    """
    if files is training:
        return files.labels
    if training.classes == [NO_CLASS]:
        return np.zeros(len(files), dtype=np.int32)
    as_many = len(files.classes) == len(training.classes)
    by_number = not files.named or (not training.named and as_many)
    class_names, training_names = files.classes, training.classes
    if by_number:
        class_names = [str(number) for number in range(len(class_names))]
        training_names = [str(number) for number in range(len(training_names))]
    numbers = {name: number for number, name in enumerate(training_names)}
    unknown = [name for name in class_names if name not in numbers and name != NO_CLASS]
    require(
        not unknown,
        f"validation classes must be among the {len(training_names)} classes of source; got "
        f"{', '.join(map(for_terminal, unknown[:5]))} in {for_terminal(files.where)}. Rename those "
        "folders, put all validation images into the folder itself, or use shards with the labels of source.",
    )
    # One more entry at the end: label −1 looks itself up there.
    training_number = np.array([*(numbers.get(name, -1) for name in class_names), -1], dtype=np.int32)
    return training_number[files.labels]


def _hash_names(files: FileList, positions: Int64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    digests = b"".join(hashlib.sha256(name).digest()[:8] for name in files.names.encoded(positions))
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)
