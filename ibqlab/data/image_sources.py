"""The image source of each split of a DataConfig. Everything that needs images opens them here."""

import os
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Int32, Int64

from ibqlab.base.escaping import for_terminal
from ibqlab.base.resources import BUILT_IN
from ibqlab.data.digits import DigitsSource
from ibqlab.data.file_list import SHOWN, FileList
from ibqlab.data.file_source import FileSource
from ibqlab.data.folder import COMPRESSED, list_folder
from ibqlab.data.photos import PhotosSource
from ibqlab.data.shard_index import index_shards
from ibqlab.data.shards import find_shards
from ibqlab.data.source import DataConfig, ImageSource, Split
from ibqlab.data.splits import exclude_names, give_each_a_readable, match_labels, order_by_hash, split_by_name


def open_data(config: DataConfig, split: Split) -> ImageSource:
    """The images of one split.

    Args:
        config: which images, how large, and how they are split.
        split: "train" or "validation"; no image (for photos: no pixel) is in both.
    Returns:
        The source; nothing is decoded yet, except for the built-in images.
    Raises:
        ValueError: no such split, no such source, an empty folder, damaged shards, a name in `exclude` that fits no
            image, or an image_size that the photographs cannot give.
        ImportError: resize="opencv" without OpenCV, or a pattern of shards without webdataset.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be 'train' or 'validation'; got {split!r}.")
    if config.source == "photos":
        return PhotosSource(image_size=config.image_size, split=split, flip=config.flip)
    if config.source == "digits":
        return DigitsSource(image_size=config.image_size, split=split)
    return _open_files(config, split)


def _open_files(config: DataConfig, split: Split) -> FileSource:
    training = list_images(config.source, "source")
    files, positions = training, exclude_names(training, config.exclude)

    def source(positions: Int64[np.ndarray, "n"], split: Split) -> FileSource:
        return FileSource(
            files,
            positions,
            labels=match_labels(files, training),
            classes=training.classes,
            image_size=config.image_size,
            resize=config.resize,
            split=split,
            flip=config.flip,
            unreadable=config.unreadable,
        )

    if config.validation_source is None:
        splits = split_by_name(files, positions, config.validation_share)
        if config.unreadable == "skip":
            # Of one image, because opening all would take their fingerprint once more; any position can be read.
            splits = give_each_a_readable(files, splits, source(positions[:1], "train").read)
        positions = splits[split]
    elif split == "validation":
        files = list_images(config.validation_source, "validation_source")
        positions = order_by_hash(files, np.arange(len(files)))
    opened = source(positions, split)
    if split == "train":
        _warn_of_unseen(training.classes, opened.labels, training.where)
    return opened


def _warn_of_unseen(classes: Sequence[str], labels: Int32[np.ndarray, "N"], where: str) -> None:
    """Warn of classes without a single training image, of which a generator would learn nothing."""
    has_images = np.bincount(labels[labels >= 0], minlength=len(classes)) > 0
    empty = np.flatnonzero(~has_images[: len(classes)])
    if len(empty):
        names = ", ".join(for_terminal(classes[number], 40) for number in empty[:SHOWN].tolist())
        warnings.warn(
            f"{len(empty):,} of {len(classes):,} classes of {for_terminal(where)} have no training image: {names}"
            f"{', …' if len(empty) > SHOWN else ''}. Nothing can be learnt of them: leave them out when sampling",
            stacklevel=2,
        )


def list_images(source: str, setting: str = "source") -> FileList:
    """What a folder, a tar file, a folder of tar files or a pattern holds.

    Args:
        source: as in `DataConfig`; "~" is expanded.
        setting: its name, for messages.
    Raises:
        ValueError: there is no such one, or nothing in it.
    """
    if shards := find_shards(source, setting):
        return index_shards(shards, source, progress=True)
    return list_folder(_existing_folder(source, setting))


def _existing_folder(path: str, setting: str) -> Path:
    folder = Path(os.path.expanduser(path))
    # os.path and not Path: a name that is too long or impossible is one that does not exist.
    if os.path.isdir(folder):
        return folder
    allowed = "'photos', 'digits' or an existing folder" if setting == "source" else "an existing folder"
    close = get_close_matches(path, BUILT_IN, n=1) if setting == "source" else []
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if path.lower().endswith(COMPRESSED):
        hint = " A shard must be an uncompressed .tar, because its images are read at any place; unpack it."
    raise ValueError(
        f"{setting} must be {allowed}; got {for_terminal(path)!r}, and "
        f"{'that is a file' if os.path.exists(folder) else 'there is none'} at {for_terminal(os.path.abspath(folder))}."
        f"{hint} Correct the path, or use source='photos' for built-in images."
    )
