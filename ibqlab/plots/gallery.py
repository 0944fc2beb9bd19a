"""Generated images: one row per class or setting, one column per seed or setting."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ibqlab.plots.printing import PAGE_WIDTH, styled_figure
from ibqlab.plots.style import CAPTION_SIZE, add_caption, text_label

_LABEL_WIDTH = 1.0
_LARGEST_SIDE = 1.2


def plot_gallery(
    images: UInt8[np.ndarray, "rows columns H W 3"],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    caption: str = "",
) -> Figure:
    """A grid of images with their settings at its edges.

    Args:
        images: values 0 to 255, channels last.
        row_labels: one per row, such as class names.
        column_labels: one per column, such as seeds.
        caption: what all images share: checkpoint, settings.
    Returns:
        The figure.
    Raises:
        ValueError: other types or shapes, or a wrong number of labels.
    """
    if images.dtype != np.uint8 or images.ndim != 5 or images.shape[-1] != 3 or not images.size:
        raise ValueError(
            f"images must be uint8 of shape (rows, columns, H, W, 3), at least one; got {images.dtype} of shape "
            f"{images.shape}: use images.reshape(rows, columns, H, W, 3)"
        )
    rows, columns = images.shape[:2]
    if (rows, columns) != (len(row_labels), len(column_labels)):
        raise ValueError(
            f"a gallery of {rows} × {columns} images needs as many labels; got {len(row_labels)} for rows and "
            f"{len(column_labels)} for columns"
        )
    side = min((PAGE_WIDTH - _LABEL_WIDTH) / columns, _LARGEST_SIDE)
    height = side * images.shape[2] / images.shape[3]
    with styled_figure(max(_LABEL_WIDTH + side * columns, 3.4), height * rows + 0.6, "compressed") as figure:
        figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, picture in zip(grid.flat, images.reshape(-1, *images.shape[2:]), strict=True):
            show_picture(axes, picture)
        for axes, label in zip(grid[:, 0], row_labels, strict=True):
            axes.set_ylabel(text_label(label), rotation=0, ha="right", va="center", labelpad=4)
        for axes, label in zip(grid[0], column_labels, strict=True):
            axes.set_title(text_label(label), fontsize=CAPTION_SIZE)
        if caption:
            add_caption(figure, caption)
    return figure


def show_picture(axes: Axes, picture: UInt8[np.ndarray, "H W 3"]) -> None:
    """An image and nothing else."""
    axes.imshow(picture, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.grid(False)
