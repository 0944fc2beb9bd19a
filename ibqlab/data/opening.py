"""The one door from a DataConfig to images."""

from difflib import get_close_matches
from pathlib import Path
from typing import get_args

from ibqlab.data.digits import DigitsSource
from ibqlab.data.folder import FolderSource, list_images, split_by_name
from ibqlab.data.photos import PhotosSource
from ibqlab.data.source import BUILT_IN, DataConfig, ImageSource, Split


def open_data(config: DataConfig, split: Split) -> ImageSource:
    """The images of one split.

    Args:
        config: which images, how large, and how they are split.
        split: "train" or "validation"; no image (for photos: no pixel) is in both.
    Returns:
        The source; nothing is decoded yet, except for the built-in images.
    Raises:
        ValueError: no such split, no such source, an empty folder, or an image_size that the photographs cannot give.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be 'train' or 'validation'; got {split!r}.")
    if config.source == "photos":
        return PhotosSource(image_size=config.image_size, split=split, flip=config.flip)
    if config.source == "digits":
        return DigitsSource(image_size=config.image_size, split=split)
    return _open_folder(config, split)


def _open_folder(config: DataConfig, split: Split) -> FolderSource:
    root = _existing_folder(config.source, "source")
    files = list_images(root)
    if config.validation_source is None:
        chosen = split_by_name(files, config.validation_share, root)[split]
    elif split == "validation":
        own_root = _existing_folder(config.validation_source, "validation_source")
        return FolderSource(
            own_root, list_images(own_root), classes_of=files, image_size=config.image_size, split=split
        )
    else:
        chosen = files
    return FolderSource(root, chosen, classes_of=files, image_size=config.image_size, split=split, flip=config.flip)


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
