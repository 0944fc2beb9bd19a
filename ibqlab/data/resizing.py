"""Ways to bring a photograph to the model's size, as published data pipelines have them.

They differ by 2 to 8 grey levels per pixel on average, so a reconstruction is compared with an image resized the same
way as the training images: "opencv" for IBQ, VQGAN and VQGAN-LC; "pil" for Open-MAGVIT2, MaskBit and SimVQ;
"pil_bicubic" for TiTok; "adm" for LlamaGen.
"""

from types import ModuleType

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ibqlab.base.checks import ASPECT, PIXELS, require, require_choice

RESIZERS = ("opencv", "pil", "pil_bicubic", "adm")
ROUND_LONG_SIDE = ("opencv", "adm")
"""Those that round the long side to the nearest pixel, and the crop's offset down."""
_PIL_FILTERS = {
    "pil": Image.Resampling.BILINEAR,
    "pil_bicubic": Image.Resampling.BICUBIC,
    "adm": Image.Resampling.BICUBIC,
}


def resize_and_crop(picture: Image.Image, image_size: int, method: str) -> UInt8[np.ndarray, "S S 3"]:
    """The centre square of a picture: short side resized to `image_size`, then cropped. As in validation.

    Args:
        picture: mode RGB, any size.
        image_size: S, height and width in pixels, at least 1.
        method: one of `RESIZERS`, see `resize_short_side`.
    Returns:
        Pixels 0 to 255.
    Raises:
        ValueError: no such method, the picture is not RGB, or image_size below 1.
        ImportError: "opencv" without OpenCV.
    Source: published data pipelines of IBQ, Open-MAGVIT2, TiTok and LlamaGen.
    """
    pixels = resize_short_side(picture, image_size, method)
    top, left = centre_offset(*pixels.shape[:2], image_size, method)
    return pixels[top : top + image_size, left : left + image_size]


def resize_short_side(picture: Image.Image, image_size: int, method: str) -> UInt8[np.ndarray, "H W 3"]:
    """The whole picture with its short side `image_size` pixels long and its long side in proportion.

    "opencv": two-tap bilinear whatever the scale, so fine detail aliases when it shrinks; long side rounded to the
    nearest pixel. "pil": bilinear with a support that grows with the shrinkage (antialias); long side rounded down.
    "pil_bicubic": the same with a bicubic filter. "adm": halved by averaging 2 × 2 pixels while the short side stays at
    least `image_size` (odd rows and columns are averaged in), then bicubic with antialias; long side rounded to the
    nearest pixel.

    Args:
        picture: mode RGB, any size.
        image_size: short side of the result in pixels, at least 1.
        method: one of `RESIZERS`.
    Returns:
        Pixels 0 to 255; the very pixels of the picture where the short side has that length already.
    Raises:
        ValueError: no such method, the picture is not RGB, image_size below 1, or a strip as `check_shape` refuses it.
        ImportError: "opencv" without OpenCV.
    Source: "opencv" is albumentations' SmallestMaxSize (published IBQ pipeline), "pil" torchvision's Resize on a PIL
    image (published Open-MAGVIT2 pipeline), "pil_bicubic" its bicubic one (1d-tokenizer's evaluation), "adm" the crop
    of guided-diffusion (LlamaGen's evaluation, 1d-tokenizer's pre-tokenization).
    """
    require_choice("method", method, RESIZERS)
    require(image_size >= 1, f"image_size must be at least 1 pixel, got {image_size}; use 256")
    require(picture.mode == "RGB", f"a picture must be RGB, got mode {picture.mode}; use picture.convert('RGB')")
    check_shape(*picture.size, image_size)
    width, height = resized_size(*picture.size, image_size, method)
    if method == "adm":
        for size in _halvings(*picture.size, image_size):
            picture = picture.resize(size, Image.Resampling.BOX)
    if method != "opencv":
        # Pillow widens the filter when it shrinks, so every pixel of the picture counts.
        return np.asarray(picture.resize((width, height), _PIL_FILTERS[method]))
    cv2 = load_opencv()
    # OpenCV looks at two pixels per axis whatever the scale: shrunk to a tenth, eight of ten rows and columns are lost.
    return cv2.resize(np.asarray(picture), (width, height), interpolation=cv2.INTER_LINEAR)


def check_shape(width: int, height: int, image_size: int) -> None:
    """Refuse a picture whose short side cannot be brought to `image_size` without filling the memory.

    The whole picture is resized before it is cropped, as published. A strip of 20,000 × 1 pixels would become 5,120,000
    × 256, of which a crop shows one smeared pixel.

    Args:
        width, height: of the picture, in pixels.
        image_size: short side of the result, in pixels.
    Raises:
        ValueError: more than 100 times as long as wide, or more than 2²⁸ pixels after resizing.
    """
    short, long = sorted((width, height))
    require(
        long <= ASPECT * short and image_size * (image_size * long // short) <= PIXELS,
        f"it is {width:,} × {height:,} pixels, and its short side would be resized to {image_size:,}; a picture may be "
        f"{ASPECT} times as long as wide, and have {PIXELS:,} pixels when resized. Crop it",
    )


def resized_size(width: int, height: int, image_size: int, method: str) -> tuple[int, int]:
    """Width and height after `resize_short_side`, in pixels; the shorter of them is `image_size`.

    Args:
        width, height: of the picture, in pixels.
        image_size: short side of the result, in pixels.
        method: "opencv" and "adm" round the long side to the nearest pixel (halves to even), "adm" that of the halved
            picture; the others round it down.
    """
    if method == "adm":
        width, height = [(width, height), *_halvings(width, height, image_size)][-1]
    short = min(width, height)
    if method in ROUND_LONG_SIDE:
        # The float64 product, and not the exact fraction, decides near a half: albumentations computes it so.
        scale = image_size / short
        return round(width * scale), round(height * scale)
    return width * image_size // short, height * image_size // short


def _halvings(width: int, height: int, image_size: int) -> list[tuple[int, int]]:
    """Widths and heights that "adm" goes through before the last step; odd sides are rounded down."""
    sizes = []
    while min(width, height) >= 2 * image_size:
        width, height = width // 2, height // 2
        sizes.append((width, height))
    return sizes


def centre_offset(height: int, width: int, image_size: int, method: str) -> tuple[int, int]:
    """Where the centre crop of a resized picture begins: spare pixels halved.

    "opencv" and "adm" round the half down, the others to the even neighbour.

    Args:
        height, width: of the resized picture, in pixels, at least `image_size`.
        image_size: side of the crop in pixels.
        method: one of `RESIZERS`.
    Returns:
        Top and left, in pixels.
    """
    if method in ROUND_LONG_SIDE:
        return (height - image_size) // 2, (width - image_size) // 2
    return round((height - image_size) / 2), round((width - image_size) / 2)


def load_opencv() -> ModuleType:
    """The module cv2, without threads of its own.

    Raises:
        ImportError: OpenCV is not installed; the message says how to install it.
    """
    try:
        import cv2  # noqa: PLC0415 - optional, and its import takes a fifth of a second
    except ImportError as error:
        raise ImportError(
            "resize='opencv' needs OpenCV (opencv-python-headless), which cannot be imported here. Type "
            "pip install 'ibqlab[data]', or use resize='pil', which is another filter."
        ) from error
    # Loader processes are the parallelism, and a thread pool does not survive the fork that starts them.
    cv2.setNumThreads(0)
    return cv2
