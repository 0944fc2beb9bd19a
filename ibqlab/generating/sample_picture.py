"""The first images of a folder of samples as one picture, so that there is something to look at."""

from pathlib import Path

import numpy as np
import pandas as pd

from ibqlab.base.files import read_json
from ibqlab.data.shards import SAMPLES_PICTURE
from ibqlab.generating.class_labels import SHOWN_CLASSES, row_names
from ibqlab.generating.sample_shards import MANIFEST, read_pictures
from ibqlab.plots import plot_gallery, save_figure

COLUMNS = 8
"""Images of each class, at most."""


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
    classes, per_class, sampling = manifest["classes"], manifest["images_per_class"], manifest["sampling"]
    labels, columns = classes[:SHOWN_CLASSES], min(per_class, COLUMNS)
    numbers = [row * per_class + column for row in range(len(labels)) for column in range(columns)]
    pictures = np.stack(list(read_pictures(folder, numbers, manifest["shard_size"])))
    figure = plot_gallery(
        pictures.reshape(len(labels), columns, *pictures.shape[1:]),
        row_names(labels, names),
        [f"image {column + 1}" for column in range(columns)],
        caption=f"{folder.name}: guidance {sampling['cfg_scale']}, temperature {sampling['temperature']}; the first "
        f"images of {len(labels):,} of {len(classes):,} classes",
    )
    seeds = [manifest["seed"] + number for number in numbers]
    table = pd.DataFrame({"image": numbers, "class": np.repeat(labels, columns), "seed": seeds})
    return save_figure(figure, folder / SAMPLES_PICTURE, table)[0]
