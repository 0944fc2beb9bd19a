"""A figure in the house style, shown in notebooks and saved together with the numbers behind it.

No figure changes matplotlib's global settings or opens a window.
"""

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ibqlab.base.files import explained, replacing_path

PAGE_WIDTH = 7.2
"""Inches: the text width of a two-column paper, so that fonts keep their size in print."""
SAVED_DPI = 180
"""Dots per inch of a figure's file."""
_PRINT = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.5,
    "figure.dpi": 110.0,
    "lines.linewidth": 1.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


class PrintFigure(Figure):
    """A Figure that notebooks show by themselves, whatever plotting backend is set.

    Jupyter shows a plain Figure only under its inline backend, which papermill runs with MPLBACKEND=agg do not have.
    """

    def _repr_png_(self) -> bytes:
        """The picture for a notebook's output cell."""
        picture = io.BytesIO()
        draw(self, _PRINT["figure.dpi"]).save(picture, "png")
        return picture.getvalue()


def draw(figure: Figure, dpi: float) -> Image.Image:
    """The figure's pixels.

    Where nothing has changed since it was drawn last, at whatever dpi, everything stays where it was put then: finding
    the places takes longer than drawing. `savefig` would find them anew, and draw everything twice.
    """
    dpi_before, layout, unchanged = figure.dpi, figure.get_layout_engine(), not figure.stale
    with print_style():
        try:
            figure.dpi = dpi
            if unchanged:
                figure.set_layout_engine("none")
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
        finally:
            figure.dpi = dpi_before
            figure.set_layout_engine(layout)
    figure.stale = False  # setting the dpi back counts as a change
    return Image.fromarray(np.array(canvas.buffer_rgba()))


def print_style() -> AbstractContextManager[None]:
    """matplotlib settings of all figures, in force only within a `with` block."""
    return mpl.rc_context({**mpl.rcParamsDefault, "backend": mpl.rcParams["backend"], **_PRINT})


@contextmanager
def styled_figure(width: float, height: float, layout: str = "constrained") -> Iterator[PrintFigure]:
    """A new figure of so many inches in the house style; "compressed" suits panels of a fixed shape."""
    with print_style():
        yield PrintFigure(figsize=(width, height), layout=layout)


def save_figure(figure: Figure, path: str | Path, data: pd.DataFrame) -> list[Path]:
    """Write a figure as PNG and, beside it, the numbers it shows as CSV.

    Both are written under another name first, so that a full disk or a kill leaves the old pair as it was.

    Args:
        figure: any matplotlib Figure.
        path: file name with or without ".png"; folders are made.
        data: what is drawn, from the figure's own table function.
    Returns:
        The two paths, PNG first.
    Raises:
        ValueError: another suffix that asks for another format.
        RunError: the disk is full, or the folder may not be written to.
    """
    path = Path(path)
    if path.suffix.lower() in {".pdf", ".svg", ".jpg", ".jpeg", ".csv"}:
        raise ValueError(
            f"figures are saved as .png with a .csv beside it; got {path.name!r}: pass {path.stem + '.png'!r}"
        )
    stem = path.name.removesuffix(".png")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    png, csv = path.with_name(stem + ".png"), path.with_name(stem + ".csv")
    picture = draw(figure, SAVED_DPI)
    with replacing_path(png) as temporary:
        picture.save(temporary, "png", dpi=(SAVED_DPI, SAVED_DPI))
    with replacing_path(csv) as temporary:
        data.to_csv(temporary, index=False)
    return [png, csv]


def fix_tick_size(axes: Axes) -> None:
    """Ticks that appear only when drawn would otherwise take the reader's own settings."""
    axes.tick_params(which="both", labelsize=_PRINT["xtick.labelsize"])
