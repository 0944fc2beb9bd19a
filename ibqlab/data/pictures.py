"""The one door for pictures: whoever opens an image file opens it here.

Only the raster formats named below are opened, told by their content and not by their name, so that no file can start
a program as EPS starts Ghostscript. Only ordinary files, only sizes within `base.checks`, looked up in the header
before anything is decoded. Whatever is wrong with a picture arrives as one exception, `UnreadablePicture`.
"""

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, features

from ibqlab.base.checks import PICTURE_SIDE, PIXELS, require
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import UnreadableFile, open_ordinary

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "QOI": (".qoi",),
    "TGA": (".tga",),
}
"""Formats that are opened, by Pillow's names, and the suffixes of their files."""

# Formats that Pillow reads only where it was built with a library.
_LIBRARIES = {"JPEG": "jpg", "PNG": "zlib", "WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
READABLE = tuple(name for name in FORMATS if name not in _LIBRARIES or features.check(_LIBRARIES[name]))
"""Those of them that the installed Pillow reads."""
SUFFIXES = tuple(suffix for name in READABLE for suffix in FORMATS[name])
"""Suffixes of files that are taken for images."""

Picture = str | Path | bytes | BinaryIO
"""A picture's file: a path, its content, or an open stream."""


class UnreadablePicture(UnreadableFile):
    """A file that is no picture we open, or a damaged one.

    Args:
        name: of the file.
        reason: what is wrong with it, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        """Name and reason on one line."""
        return f"{for_terminal(self.name or 'the content')} cannot be read as a picture: {for_terminal(self.reason)}"


def open_picture(file: Picture, name: str = "") -> Image.Image:
    """A picture, decoded whole, in the mode that it is stored in; of an animation the first frame.

    Args:
        file: path, content or stream.
        name: what messages call it; empty: the path.
    Raises:
        UnreadablePicture: no such file, no ordinary file, none of `FORMATS`, too large, truncated or damaged.
    """
    with _opened(file, name) as picture:
        picture.load()
        return picture


def read_rgb(file: Picture, name: str = "") -> Image.Image:
    """A picture as 8-bit RGB, as images are trained on: transparency is dropped, 16-bit grey is scaled to 8 bits.

    Args: as in `open_picture`.
    Raises:
        UnreadablePicture: as `open_picture`; or 32 bits per value, whose range the file does not tell.
    """
    with _opened(file, name) as picture:
        if picture.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(picture) // 257).astype(np.uint8)).convert("RGB")
        if picture.mode in ("I", "F"):
            raise ValueError(f"32-bit values (mode {picture.mode}) have no known range; store 8 or 16 bits")
        # Decoded while the file is open; converting RGB would copy the whole picture once more.
        picture.load()
        return picture if picture.mode == "RGB" else picture.convert("RGB")


def picture_size(file: Picture, name: str = "") -> tuple[int, int]:
    """Height and width in pixels, as the header says; nothing is decoded.

    Raises:
        UnreadablePicture: as `open_picture`, as far as the header tells.
    """
    with _opened(file, name) as picture:
        return picture.height, picture.width


def is_picture_name(name: str) -> bool:
    """Whether a file of that name counts as an image: a known suffix, and no dot in front (thumbnails, leftovers)."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


@contextmanager
def _opened(file: Picture, name: str) -> Iterator[Image.Image]:
    """A picture whose header is read and within bounds; whatever goes wrong inside becomes `UnreadablePicture`."""
    name = name or (str(file) if isinstance(file, str | Path) else "")
    try:
        with _stream(file) as stream, Image.open(stream, formats=_formats(name)) as picture:
            width, height = picture.size
            require(min(width, height) >= 1, f"it has {width} × {height} pixels")
            require(
                max(width, height) <= PICTURE_SIDE and width * height <= PIXELS,
                f"its header says {width:,} × {height:,} pixels; a side may have {PICTURE_SIDE:,}, the whole "
                f"{PIXELS:,}",
            )
            yield picture
    except UnreadablePicture:
        raise
    # Decoders raise almost anything on damaged data.
    except Exception as error:
        path = str(file) if isinstance(file, str | Path) else name
        raise UnreadablePicture(name, _reason(error).removeprefix(path).lstrip(": ")) from error


def _stream(file: Picture) -> AbstractContextManager[BinaryIO]:
    """A stream of the picture's bytes; one that was given stays open."""
    if isinstance(file, str | Path):
        return open_ordinary(file)
    return nullcontext(io.BytesIO(file) if isinstance(file, bytes) else file)


def _formats(name: str) -> tuple[str, ...]:
    """Formats to try. TGA has no signature, so it is tried only where the suffix says so."""
    is_tga = name.lower().endswith(FORMATS["TGA"])
    return READABLE if is_tga else tuple(kind for kind in READABLE if kind != "TGA")


def _reason(error: Exception) -> str:
    """What is wrong, in words without the file's name."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"its content is none of {', '.join(READABLE)}"
    if isinstance(error, Image.DecompressionBombError):
        return f"its header says more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, UnreadableFile):
        return str(error)
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    return str(error) or type(error).__name__
