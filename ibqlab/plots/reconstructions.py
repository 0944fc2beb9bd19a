"""Pictures before and after the codebook."""

import math

import numpy as np
import pandas as pd
from jaxtyping import UInt8
from matplotlib.figure import Figure

from ibqlab.base.measures import measure
from ibqlab.plots.gallery import show_picture
from ibqlab.plots.printing import PAGE_WIDTH, styled_figure
from ibqlab.plots.style import add_caption, styles_for

_LETTER_WIDTH = 0.062
"""Inches that a letter of a row's label takes, on average."""


def reconstruction_table(
    images: UInt8[np.ndarray, "B H W 3"], reconstructions: dict[str, UInt8[np.ndarray, "B H W 3"]]
) -> pd.DataFrame:
    """The numbers behind `plot_reconstructions`: PSNR of every image under every method.

    PSNR = 10 log₁₀(255² / mean squared error), in decibels, per image; infinite where nothing changed.

    Args:
        images: originals, values 0 to 255.
        reconstructions: label → the same images reconstructed.
    Returns:
        One row per (label, image): label, image (its place), psnr_db.
    Raises:
        ValueError: no images, other types than uint8, or shapes that differ.
    """
    _check_images(images, reconstructions)
    frames = []
    for label, pictures in reconstructions.items():
        errors = np.square(images.astype(np.float64) - pictures).mean((1, 2, 3))  # (B,)
        with np.errstate(divide="ignore"):
            decibels = 20 * math.log10(255) - 10 * np.log10(errors)
        frames.append(pd.DataFrame({"label": label, "image": range(len(images)), "psnr_db": decibels}))
    return pd.concat(frames, ignore_index=True)


def plot_reconstructions(
    images: UInt8[np.ndarray, "B H W 3"],
    reconstructions: dict[str, UInt8[np.ndarray, "B H W 3"]],
    *,
    max_images: int = 8,
    which: str = "",
) -> Figure:
    """A grid of images: the originals, then one row per method with its mean PSNR.

    Compare columns downwards. A collapsed codebook shows as patches that repeat; PSNR does not see texture, so look.
    Where there are more images than columns, those with most contrast are shown, in their order: flat crops look alike
    under every method. The PSNR is of all images given, whichever are drawn.

    Args:
        images: originals, values 0 to 255, channels last.
        reconstructions: label → the same images reconstructed; at least one.
        max_images: columns; further images count for the PSNR but are not drawn.
        which: which images these are, for the caption: "the first 16 of 360 validation images".
    Returns:
        The figure; its numbers are `reconstruction_table(images, reconstructions)`.
    Raises:
        ValueError: as for `reconstruction_table`, or max_images below 1.
    """
    if max_images < 1:
        raise ValueError(f"max_images must be at least 1; got {max_images}")
    means = reconstruction_table(images, reconstructions).groupby("label", sort=False)["psnr_db"].mean()
    styles, unit = styles_for(list(reconstructions)), measure("psnr").sign
    rows = {"original": images}
    rows |= {
        f"{styles[label].label}\n{means[label]:.1f} {unit}": pictures for label, pictures in reconstructions.items()
    }
    chosen = _most_contrast(images, max_images)
    columns = len(chosen)
    # Few images stay of readable size instead of filling the page.
    letters = max(len(line) for label in rows for line in label.split("\n"))
    labels = min(0.2 + _LETTER_WIDTH * letters, PAGE_WIDTH / 2)
    side = min((PAGE_WIDTH - labels) / columns, 1.5)
    height = side * images.shape[1] / images.shape[2]
    with styled_figure(max(labels + side * columns, 3.4), height * len(rows) + 0.5, "compressed") as figure:
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for row, (label, pictures) in zip(grid, rows.items(), strict=True):
            for axes, picture in zip(row, pictures[chosen], strict=True):
                show_picture(axes, picture)
            row[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6)
        add_caption(figure, _caption(images, columns, which))
    return figure


def _most_contrast(images: UInt8[np.ndarray, "B H W 3"], count: int) -> list[int]:
    """The images whose grey levels are spread most, in their order."""
    if len(images) <= count:
        return list(range(len(images)))
    spread = images.mean(-1).std((1, 2))
    return sorted(np.argsort(-spread, kind="stable")[:count].tolist())


def _caption(images: UInt8[np.ndarray, "B H W 3"], columns: int, selection: str) -> str:
    """What the decibels are a mean of, and which images are seen."""
    count = f"{len(images):,} images" if len(images) > 1 else "1 image"
    text = f"{measure('psnr').title}: mean over {count} of {images.shape[1]} × {images.shape[2]} pixels"
    if selection:
        text += f", {selection}"
    return text if columns == len(images) else f"{text}; drawn: the {columns} with most contrast"


def _check_images(images: np.ndarray, reconstructions: dict[str, np.ndarray]) -> None:
    """Refuse what cannot be compared pixel by pixel."""
    if not reconstructions:
        raise ValueError("reconstructions must hold at least one method; got none")
    for label, pictures in {"images": images, **reconstructions}.items():
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3 or len(pictures) == 0:
            raise ValueError(
                f"{label!r} must be uint8 of shape (B, H, W, 3), B at least 1; got {pictures.dtype} of shape "
                f"{pictures.shape}: convert images in [-1, 1] by ((x + 1) * 127.5).round() and put channels last"
            )
        if pictures.shape != images.shape:
            raise ValueError(
                f"{label!r} must have the originals' shape {images.shape}; got {pictures.shape}: reconstruct the same "
                "images, at the same size"
            )
