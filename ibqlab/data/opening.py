"""The one door from a DataConfig to images."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Int64

from ibqlab.base.escaping import for_terminal
from ibqlab.base.names import BUILT_IN
from ibqlab.data.classes import warn_of_unseen
from ibqlab.data.decoding import ListedSource
from ibqlab.data.digits import DigitsSource
from ibqlab.data.folder import COMPRESSED, FolderSource, list_folder
from ibqlab.data.index import (
    Listing,
    exclude_names,
    give_each_a_readable,
    match_labels,
    order_by_hash,
    split_by_name,
)
from ibqlab.data.photos import PhotosSource
from ibqlab.data.shard_index import ShardListing, index_shards
from ibqlab.data.shards import ShardSource, find_shards, names_shards
from ibqlab.data.source import DataConfig, ImageSource, Split


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
    return _open_listed(config, split)


def _open_listed(config: DataConfig, split: Split) -> ListedSource:
    training = list_images(config.source, "source")
    kept = exclude_names(training, config.exclude)
    if config.validation_source is None:
        parts = split_by_name(training, kept, config.validation_share)
        if config.unreadable == "skip":
            # Of one image, because opening all would take their fingerprint once more; any position can be read.
            reader = _open(config, "train", training, kept[:1], training)
            parts = give_each_a_readable(training, parts, reader.read)
        return _source(config, split, training, parts[split], training)
    if split == "train":
        return _source(config, split, training, kept, training)
    own = list_images(config.validation_source, "validation_source")
    return _source(config, split, own, order_by_hash(own, np.arange(len(own))), training)


def _source(
    config: DataConfig, split: Split, listing: Listing, positions: Int64[np.ndarray, "N"], training: Listing
) -> ListedSource:
    source = _open(config, split, listing, positions, training)
    if split == "train":
        warn_of_unseen(training.classes, source.labels, listing.where)
    return source


def _open(
    config: DataConfig, split: Split, listing: Listing, positions: Int64[np.ndarray, "N"], training: Listing
) -> ListedSource:
    labels = listing.labels if listing is training else match_labels(listing, training)
    return open_listing(
        listing,
        positions,
        labels=labels,
        classes=training.classes,
        image_size=config.image_size,
        resize=config.resize,
        split=split,
        flip=config.flip,
        unreadable=config.unreadable,
    )


def open_listing(listing: Listing, positions: Int64[np.ndarray, "N"], **settings: Any) -> ListedSource:
    """Images of a folder or of shards, whichever was listed; the settings are those of `ListedSource`."""
    return (ShardSource if isinstance(listing, ShardListing) else FolderSource)(listing, positions, **settings)


def list_images(source: str, setting: str = "source") -> Listing:
    """What a folder, a tar file, a folder of tar files or a pattern holds.

    Args:
        source: as in `DataConfig`; "~" is expanded.
        setting: its name, for messages.
    Raises:
        ValueError: there is no such one, or nothing in it.
    """
    if names_shards(source):
        return index_shards(find_shards(source, setting), source, progress=True)
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
