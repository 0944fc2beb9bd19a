"""The one door from a DataConfig to images."""

from difflib import get_close_matches
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Int64

from ibqlab.data.digits import DigitsSource
from ibqlab.data.folder import FolderSource, list_folder
from ibqlab.data.listed import ListedSource
from ibqlab.data.listing import Listing, exclude_names, match_labels, order_by_hash, split_by_name
from ibqlab.data.photos import PhotosSource
from ibqlab.data.shard_index import ShardListing, index_shards
from ibqlab.data.shards import ShardSource, find_shards, names_shards
from ibqlab.data.source import BUILT_IN, DataConfig, ImageSource, Split


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
    training = _list_images(config.source, "source")
    kept = exclude_names(training, config.exclude)
    if config.validation_source is None:
        return _source(config, split, training, split_by_name(training, kept, config.validation_share)[split], training)
    if split == "train":
        return _source(config, split, training, kept, training)
    own = _list_images(config.validation_source, "validation_source")
    return _source(config, split, own, order_by_hash(own, np.arange(len(own))), training)


def _source(
    config: DataConfig, split: Split, listing: Listing, positions: Int64[np.ndarray, "N"], training: Listing
) -> ListedSource:
    source_class = ShardSource if isinstance(listing, ShardListing) else FolderSource
    return source_class(
        listing,
        positions,
        labels=listing.labels if listing is training else match_labels(listing, training),
        classes=training.classes,
        image_size=config.image_size,
        resize=config.resize,
        split=split,
        flip=config.flip,
    )


def _list_images(source: str, setting: str) -> Listing:
    if names_shards(source):
        return index_shards(find_shards(source, setting), source, progress=True)
    return list_folder(_existing_folder(source, setting))


def _existing_folder(path: str, setting: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    close = get_close_matches(path, BUILT_IN, n=1) if setting == "source" else []
    hint = f" Did you mean {close[0]!r}?" if close else ""
    state = "that is a file" if folder.exists() else "there is none"
    allowed = "'photos', 'digits' or an existing folder" if setting == "source" else "an existing folder"
    raise ValueError(
        f"{setting} must be {allowed}; got {path!r}, and {state} at {folder.absolute()}.{hint} "
        "Correct the path, or use source='photos' for built-in images."
    )
