"""How every figure looks, and how it is saved together with the numbers behind it.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; line styles and markers tell the methods apart
once more, for print in grey. No figure changes matplotlib's global settings or opens a window.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ibqlab.files import explained, replacing_path

PAGE_WIDTH = 7.2
"""Inches: the text width of a two-column paper, so that fonts keep their size in print."""
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
CAPTION_SIZE = 8.0
"""Points: the smallest text in any figure."""
REFERENCE_GREY = "#555555"
LINE_STYLES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
"""Solid, dashed, dotted, dash-dotted: one per initialisation, or per variant of a method."""


@dataclass(frozen=True, kw_only=True)
class LineStyle:
    """What makes one line recognisable: by colour, by marker, and by its name in the legend."""

    label: str
    """Name shown to readers."""
    color: str
    """Hex colour."""
    marker: str
    """matplotlib marker."""
    line: str | tuple = "-"
    """matplotlib line style."""


METHOD_STYLES: dict[str, LineStyle] = {
    "vq": LineStyle(label="VQ", color="#D55E00", marker="o"),
    "vq_ema": LineStyle(label="VQ, moving average", color="#E69F00", marker="^"),
    "vq_cosine": LineStyle(label="VQ, cosine", color="#CC79A7", marker="v"),
    "soft_vq": LineStyle(label="Soft VQ", color="#009E73", marker="D"),
    "ibq": LineStyle(label="IBQ", color="#0072B2", marker="s"),
    "simvq": LineStyle(label="SimVQ", color="#56B4E9", marker="P"),
    "lfq": LineStyle(label="LFQ", color="#000000", marker="X"),
}
"""One look per built-in method, in every figure. The order is that of legends."""


def method_label(name: str) -> str:
    """A method's proper name for tables: "soft_vq" → "Soft VQ"; a name that is not built in stays as it is."""
    return METHOD_STYLES[name].label if name in METHOD_STYLES else name


_OTHERS = (("#7F3C8D", "<"), ("#8C6D31", ">"), ("#666666", "*"), ("#117733", "h"), ("#882255", "p"))
PALETTE = (*(style.color for style in METHOD_STYLES.values()), *(color for color, _ in _OTHERS))
"""All colours, those of the methods first."""


class PrintFigure(Figure):
    """A Figure that notebooks show by themselves, whatever plotting backend is set.

    Jupyter shows a plain Figure only under its inline backend, which papermill runs with MPLBACKEND=agg do not have.
    """

    def _repr_png_(self) -> bytes:
        """The picture for a notebook's output cell."""
        picture = io.BytesIO()
        with print_style():
            self.savefig(picture, format="png")
        return picture.getvalue()


def print_style() -> AbstractContextManager[None]:
    """matplotlib settings of all figures, in force only within a `with` block."""
    return mpl.rc_context({**mpl.rcParamsDefault, "backend": mpl.rcParams["backend"], **_PRINT})


@contextmanager
def styled_figure(width: float, height: float, layout: str = "constrained") -> Iterator[PrintFigure]:
    """A new figure of so many inches in the house style; "compressed" suits panels of a fixed shape."""
    with print_style():
        yield PrintFigure(figsize=(width, height), layout=layout)


def styles_for(names: Sequence[str]) -> dict[str, LineStyle]:
    """A distinct look for every name.

    A built-in method ("ibq" or "IBQ") looks the same in every figure. A name that starts with one ("ibq, N(0, 1)")
    takes its colour and marker, and the next line style
    where that method is already there. Any other name takes the next free colour.

    Args:
        names: distinct labels of lines or panels.
    Returns:
        Name → look, in the order given; the look's label is the method's proper name, or the name itself.
    """
    styles: dict[str, LineStyle] = {}
    others = 0
    for name in names:
        method = _method_of(name)
        if method is None:
            color, marker = _OTHERS[others % len(_OTHERS)]
            style = LineStyle(label=name, color=color, marker=marker, line=LINE_STYLES[others // len(_OTHERS) % 4])
            others += 1
        else:
            base = METHOD_STYLES[method]
            variant = sum(base.color == style.color for style in styles.values())
            label = base.label + name.strip()[len(method) :]
            style = replace(base, label=label, line=LINE_STYLES[variant % len(LINE_STYLES)])
        styles[name] = style
    return styles


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
    with print_style(), replacing_path(png) as part:
        figure.savefig(part, format="png", dpi=180)
    with replacing_path(csv) as part:
        data.to_csv(part, index=False)
    return [png, csv]


def add_caption(figure: Figure, text: str) -> None:
    """A line of facts at the bottom: sizes, token counts, seeds. Readers of a lone picture need them."""
    figure.supxlabel(text, fontsize=CAPTION_SIZE, color=REFERENCE_GREY)


def as_array(counts: Int[Tensor, "K"] | Int[np.ndarray, "K"]) -> Int[np.ndarray, "K"]:
    """Hits per code as NumPy, from a snapshot or straight from the device."""
    return torch.as_tensor(counts).cpu().numpy()


def fix_tick_size(axes: Axes) -> None:
    """Ticks that appear only when drawn would otherwise take the reader's own settings."""
    axes.tick_params(which="both", labelsize=_PRINT["xtick.labelsize"])


def _normal(name: str) -> str:
    """A label as a method's key would be written: "Soft VQ" → "soft_vq"."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _method_of(name: str) -> str | None:
    """The built-in method a label begins with, the longest that fits, or None."""
    normal = _normal(name)
    fits = [
        key for key in METHOD_STYLES if normal == key or (normal.startswith(key) and not normal[len(key)].isalnum())
    ]
    return max(fits, key=len, default=None)
