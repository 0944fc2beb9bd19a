"""The first images of a folder of samples as one picture, so that there is something to look at."""

import tarfile
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import UInt8

from ibqlab.base.files import RunError, UnreadableFile, open_ordinary, read_json
from ibqlab.data.pictures import open_picture
from ibqlab.data.shards import SAMPLES_PICTURE
from ibqlab.generating.sampling_runs import MANIFEST, SHARD
from ibqlab.plots import plot_gallery, save_figure

CLASSES, COLUMNS = 10, 8
"""Rows and columns of the picture, at most."""


def save_sample_picture(folder: Path, names: list[str]) -> Path:
    """The first images of the first classes in a grid, saved as `samples.png` beside the shards, with its table.

    Args:
        folder: whole, as `sample_images` leaves it.
        names: of the classes by label; empty where nobody knows them.
    Returns:
        Path of the picture.
    Raises:
        RunError: a shard is missing or damaged; the disk is full.
    """
    manifest = read_json(folder / MANIFEST)
    labels, per_class = manifest["classes"][:CLASSES], manifest["images_per_class"]
    shown = min(per_class, COLUMNS)
    numbers = [row * per_class + column for row in range(len(labels)) for column in range(shown)]
    pictures = np.stack(_read(folder, numbers, manifest["shard_size"]))
    rows = [names[label] if label < len(names) else f"class {label}" for label in labels]
    columns = [f"image {column + 1}" for column in range(shown)]
    figure = plot_gallery(
        pictures.reshape(len(labels), shown, *pictures.shape[1:]),
        rows,
        columns,
        caption=f"{folder.name}: {_shown(manifest['sampling'])}; the first images of {len(labels):,} of "
        f"{len(manifest['classes']):,} classes",
    )
    table = pd.DataFrame(
        {
            "image": numbers,
            "class": np.repeat(labels, shown),
            "seed": [manifest["seed"] + number for number in numbers],
        }
    )
    return save_figure(figure, folder / SAMPLES_PICTURE, table)[0]


def _read(folder: Path, numbers: list[int], shard_size: int) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Images by number, in rising order."""
    pictures = []
    for shard, group in groupby(numbers, lambda number: number // shard_size):
        file = folder / SHARD.format(shard)
        try:
            with open_ordinary(file) as stream, tarfile.open(fileobj=stream) as tar:
                pictures += [np.asarray(open_picture(tar.extractfile(f"{number:09d}.png"))) for number in group]
        except (OSError, UnreadableFile, KeyError, ValueError, SyntaxError, tarfile.TarError) as error:
            raise RunError(
                f"{file} is missing or damaged ({error}); delete it and samples.npz, and start the same command again"
            ) from None
    return pictures


def _shown(sampling: dict[str, Any]) -> str:
    """Guidance and temperature as a caption says them."""
    return f"guidance {sampling['cfg_scale']}, temperature {sampling['temperature']}"
