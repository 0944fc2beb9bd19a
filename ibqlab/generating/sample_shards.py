"""The files that samples are kept in: tar shards of PNGs with class and seed, the archive that evaluators read, and a
picture to look at.
"""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from ibqlab.base.files import RunError, UnreadableFile, open_ordinary, read_json, replacing
from ibqlab.data.pictures import open_picture
from ibqlab.data.shards import SAMPLES_PICTURE
from ibqlab.generating.class_labels import SHOWN_CLASSES, row_names

MANIFEST, ARCHIVE, SHARD = "manifest.json", "samples.npz", "samples-{:06d}.tar"
COLUMNS = 8
"""Images of each class, at most."""


def add_picture(tar: tarfile.TarFile, image: int, picture: UInt8[np.ndarray, "H W 3"], label: int, seed: int) -> None:
    """Write one image with its class and seed into a shard, by the number of the image."""
    png = io.BytesIO()
    Image.fromarray(picture).save(png, format="PNG")
    facts = json.dumps({"seed": seed, "class": label})
    for ending, content in {"png": png.getvalue(), "cls": str(label).encode(), "json": facts.encode()}.items():
        member = tarfile.TarInfo(f"{image:09d}.{ending}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def picture_ranges(file: Path) -> dict[int, tuple[int, int]]:
    """Image → where its picture begins in a shard's file, and its bytes.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        with open_ordinary(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            members = [member for member in tar if member.name.endswith(".png")]
            size = os.fstat(stream.fileno()).st_size
        if any(member.offset_data + member.size > size for member in members):
            raise ValueError("cut short")
        return {int(member.name.removesuffix(".png")): (member.offset_data, member.size) for member in members}
    except (OSError, UnreadableFile, ValueError, tarfile.TarError) as error:
        raise _damaged(file, error) from None


def read_pictures(folder: Path, images: Iterable[int], shard_size: int) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Images by number; one file is open at a time, however many shards there are.

    Raises:
        RunError: a shard is missing or damaged.
    """
    ranges = cache(picture_ranges)
    for image in images:
        file = folder / SHARD.format(image // shard_size)
        try:
            offset, size = ranges(file)[image]
            with open_ordinary(file) as stream:
                stream.seek(offset)
                yield np.asarray(open_picture(io.BytesIO(stream.read(size))))
        except (OSError, UnreadableFile, KeyError, ValueError, SyntaxError) as error:
            raise _damaged(file, f"image {image}: {error}") from None


def _damaged(file: Path, reason: object) -> RunError:
    return RunError(
        f"{file} is missing or damaged ({reason}); delete it, and {ARCHIVE} if it is there, and start the same command "
        "again, which draws its images again"
    )


def write_archive(file: Path, pictures: Iterator[UInt8[np.ndarray, "H W 3"]], labels: Int[np.ndarray, "N"]) -> None:
    """Write images and classes as an .npz without holding more than one image.

    Args:
        file: the archive: arr_0 (N, H, W, 3) uint8, arr_1 (N,).
        pictures: N, all of one size.
        labels: of each.
    """
    with replacing(file) as stream, zipfile.ZipFile(stream, "w", allowZip64=True) as archive:
        first = next(pictures)
        shape = (len(labels), *first.shape)
        header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            member.write(first.tobytes())
            for picture in pictures:
                member.write(picture.tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, labels)


def is_archive(file: Path, count: int) -> bool:
    """Whether an archive is there and holds so many images; a damaged one is made again."""
    try:
        with open_ordinary(file) as stream, zipfile.ZipFile(stream) as archive:
            with archive.open("arr_0.npy") as member:
                np.lib.format.read_magic(member)
                shape = np.lib.format.read_array_header_1_0(member)[0]
                whole = archive.getinfo("arr_0.npy").file_size == member.tell() + int(np.prod(shape))
            return whole and shape[:1] == (count,) and "arr_1.npy" in archive.namelist()
    except (OSError, UnreadableFile, KeyError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile):
        return False


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
    import pandas as pd  # noqa: PLC0415 - the process of one run of a grid should not wait for it, nor for matplotlib

    from ibqlab.plots import plot_gallery, save_figure  # noqa: PLC0415

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
