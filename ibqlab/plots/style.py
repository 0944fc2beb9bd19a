"""How every figure looks: colours, markers, lines, captions.

One meaning everywhere: colour and marker are the method, dashes are the codebook's start, shades and open markers are
variants of one method. Grey dots are a reference and no measurement, an open grey diamond is a paper's number. Where no
methods are compared, other colours and markers are used. Colours are Okabe and Ito's, which stay apart for colour-blind
readers; markers, dashes and shades do so in grey.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from ibqlab.base.escaping import for_matplotlib
from ibqlab.quantizers.base import registrations

CAPTION_SIZE = 8.0
"""Points: the smallest text in any figure."""
LONGEST_LABEL = 60
"""Letters of a name in a legend or beside an axis; the middle of a longer one becomes an ellipsis."""
_LETTERS_PER_INCH = 16
_WARNING = "#B00000"
_BAND = 0.3
"""Inches of what `mark_too_short` adds at the top."""
_CAPTION_LINE = 0.15
"""Inches of a line of a caption."""
REFERENCE_GREY = "#555555"
REFERENCE_LINE = (0, (1, 1.2))
"""Dotted, and grey: what is no measurement of a run, such as even use. No start has it."""
REFERENCE = {"color": REFERENCE_GREY, "linestyle": REFERENCE_LINE}
"""The look of such a line."""
START_LINES: dict[str, str | tuple] = {
    "N(0, 1)": "-",
    "U(±1/K)": (0, (4, 1.5)),
    "N(0, 1/D)": (0, (6, 1.5, 1, 1.5)),
    "k-means": (0, (6, 1.5, 1, 1.5, 1, 1.5)),
    "fixed grid": (0, (9, 1.5)),
    "its library's": (0, (9, 1.5, 3, 1.5)),
}
"""Where a codebook started → its line, the same in every figure."""
EACH_STEP = {"linestyle": "-", "linewidth": 0.7, "alpha": 0.7}
"""Usage of a single step's tokens: thin, without markers."""
WINDOW = {"linestyle": "-", "linewidth": 4.0, "alpha": 0.3, "solid_capstyle": "butt"}
"""Usage of the window of latest tokens, beside one without memory: broad and pale."""
PAPER = {"marker": "D", "color": REFERENCE_GREY, "markerfacecolor": "none", "linestyle": ""}
"""A number that a paper printed."""
TRAINING_COLOR = REFERENCE_GREY
"""Of a single run's training."""
VALIDATION_LOOK = {"color": "#7F3C8D", "linestyle": "-", "marker": "d"}
"""Of a single run's validation; a line of it has a marker wherever it was measured."""


@dataclass(frozen=True, kw_only=True)
class LineStyle:
    """What makes one line recognisable: by colour, by marker, and by its name in the legend."""

    label: str
    """Name shown to readers, safe for matplotlib."""
    color: str
    """Hex colour."""
    marker: str
    """matplotlib marker."""
    line: str | tuple = "-"
    """matplotlib line style; of methods, their start's."""
    open_marker: bool = False
    """The marker is white inside: every second variant of one method."""

    @property
    def look(self) -> dict[str, Any]:
        """Colour, line and marker as `Axes.plot` takes them."""
        fill = "white" if self.open_marker else self.color
        return {"color": self.color, "linestyle": self.line, "marker": self.marker, "markerfacecolor": fill}


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


def method_style(name: str) -> LineStyle | None:
    """A method's look: a built-in one's, else what its registration says; None where that says no colour.

    Args:
        name: as it is registered.
    """
    if name in METHOD_STYLES:
        return METHOD_STYLES[name]
    registered = registrations().get(name)
    if registered is None or not registered.look.color:
        return None
    look = registered.look
    return LineStyle(label=text_label(look.label or name), color=look.color, marker=look.marker or "o")


def method_label(name: str) -> str:
    """A method's proper name for tables: "soft_vq" → "Soft VQ"; one without a label stays as it is."""
    if name in METHOD_STYLES:
        return METHOD_STYLES[name].label
    registered = registrations().get(name)
    return (registered.look.label if registered else "") or name


def in_order(methods: Iterable[str]) -> list[str]:
    """Methods as every legend lists them: those built in first, in the order of `METHOD_STYLES`."""
    order = list(METHOD_STYLES)
    return sorted(dict.fromkeys(methods), key=lambda name: order.index(name) if name in order else len(order))


OTHER_LOOKS = (("#7F3C8D", "<"), ("#8C6D31", ">"), ("#666666", "*"), ("#117733", "h"), ("#882255", "p"))
"""Colour and marker of what is no built-in method."""
PALETTE = (*(style.color for style in METHOD_STYLES.values()), *(color for color, _ in OTHER_LOOKS))
"""All colours, those of the methods first."""
_SHADES = (0.0, -0.55, 0.55, 0.3, -0.7)
"""Variants of one colour: towards black below zero, towards white above. They stay apart in grey."""


def styles_for(names: Sequence[str]) -> dict[str, LineStyle]:
    """A distinct look for every name.

    A built-in method ("ibq" or "IBQ") looks the same in every figure, and so does one that was registered with a
    colour. A name that starts with one ("ibq, N(0, 1)") takes its colour and marker. A start of the codebook within the
    name gives the line style. Further names of one method and start are variants: other shades of the colour, every
    second with an open marker. Any other name takes the next free colour.

    Args:
        names: distinct labels of lines or panels.
    Returns:
        Name → look, in the order given; the look's label is the method's proper name, or the name itself, safe for
        matplotlib.
    """
    styles: dict[str, LineStyle] = {}
    variants: Counter = Counter()
    other_count = 0
    for name in names:
        method, line = _method_of(name), start_line(name)
        label = name if method is None else method_label(method) + name.strip()[len(method) :]
        base = method_style(method) if method else None
        if base is None:
            color, marker = OTHER_LOOKS[other_count % len(OTHER_LOOKS)]
            base = LineStyle(label="", color=color, marker=marker)
            variant = other_count // len(OTHER_LOOKS)
            other_count += 1
        else:
            variant = variants[method, line]
            variants[method, line] += 1
        styles[name] = vary(replace(base, label=text_label(label), line=line), variant)
    return styles


def start_line(name: str) -> str | tuple:
    """The line style of the start that a label names; solid where it names none."""
    named = [start for start in START_LINES if start in name]
    return START_LINES[max(named, key=len)] if named else "-"


def vary(style: LineStyle, variant: int) -> LineStyle:
    """The look of a method's n-th variant: another shade, every second marker open; 0 leaves it as it is."""
    shade = _SHADES[variant % len(_SHADES)]
    end = 0.0 if shade < 0 else 1.0
    color = to_hex([(1 - abs(shade)) * channel + abs(shade) * end for channel in to_rgb(style.color)])
    return replace(style, color=color if variant else style.color, open_marker=variant % 2 == 1)


def text_label(name: str, longest: int = LONGEST_LABEL) -> str:
    """A name from outside as a figure shows it. matplotlib leaves labels out that begin with an underscore."""
    label = for_matplotlib(name, longest)
    return f" {label}" if label.startswith("_") else label


def require_columns(table: pd.DataFrame, columns: Sequence[str], table_kind: str) -> None:
    """Refuse a table that cannot be drawn.

    Args:
        columns: that it must have, besides at least one row.
        table_kind: the table, in the message: "a scaling table".
    """
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(
            f"{table_kind} needs the columns {', '.join(columns)}; missing {', '.join(missing)}, got "
            f"{', '.join(map(str, table)) or 'none'}"
        )
    if table.empty:
        raise ValueError(f"{table_kind} has no rows: train at least one run, or check the filter")


def add_caption(figure: Figure, text: str) -> None:
    """Lines of facts at the bottom: sizes, token counts, seeds. Readers of a lone picture need them.

    Args:
        figure: in the house style.
        text: names from outside as they are; longer lines than the page is wide are wrapped.
    """
    figure.supxlabel("\n".join(_caption_lines(figure, text)), fontsize=CAPTION_SIZE, color=REFERENCE_GREY)


def add_note(axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **look: Any) -> None:
    """A small text beside a point of a panel.

    Args:
        axes: of the panel.
        text: safe for matplotlib.
        point: in the units of the axes, unless the look says otherwise.
        offset: from the point to the text, in points of print.
        look: as `Axes.annotate` takes it.
    """
    axes.annotate(text, point, xytext=offset, textcoords="offset points", fontsize=CAPTION_SIZE, **look)


def extend_caption(figure: Figure, text: str) -> None:
    """More facts at the bottom, in lines of their own; the figure grows by them, and its panels keep their size."""
    lines = _caption_lines(figure, text)
    figure.set_figheight(figure.get_figheight() + len(lines) * _CAPTION_LINE)
    caption = "\n".join([figure.get_supxlabel(), *lines])
    figure.supxlabel(caption, fontsize=CAPTION_SIZE, color=REFERENCE_GREY)


def _caption_lines(figure: Figure, text: str) -> list[str]:
    """Text escaped for matplotlib and wrapped to the width of the page; an empty text has no lines."""
    width = int(_LETTERS_PER_INCH * figure.get_figwidth())
    paragraphs = text.split("\n") if text else []
    return [for_matplotlib(line, None) for paragraph in paragraphs for line in _balanced(paragraph, width)]


def _balanced(text: str, width: int) -> list[str]:
    """Text in as few lines as the width allows, of about equal length. So no last line has one word."""
    lines = textwrap.wrap(text, width) or [""]
    for narrower in range(width - 1, width // 2, -1):
        narrow_lines = textwrap.wrap(text, narrower) or [""]
        if len(narrow_lines) > len(lines):
            break
        lines = narrow_lines
    return lines


def even_columns(entries: int, most: int) -> int:
    """Columns of a legend, at most so many, whose rows are as even as they can be."""
    return -(-entries // -(-entries // most))


def stacked_width(number: int) -> float:
    """Width of the n-th line of a panel: later ones are thinner, so that lines which coincide show as stripes."""
    return max(1.0, 2.4 - 0.3 * number)


def mark_too_short(figure: Figure, reason: str) -> None:
    """Say in a band above a figure that its runs are too short to mean anything. Nothing in the figure is covered.

    Args:
        figure: in the house style; it grows by the band.
        reason: what makes them so: "preset smoke", "12 steps".
    """
    figure.set_figheight(figure.get_figheight() + _BAND)
    text = for_matplotlib(f"{reason}: too short to mean anything")
    look = {"size": 11, "weight": "bold"}
    if figure.legends:
        # The layout leaves room for a legend above the panels or for a title, not for both.
        figure.legends[0].set_title(text, prop=look)
        figure.legends[0].get_title().set_color(_WARNING)
    else:
        figure.suptitle(text, color=_WARNING, **look)


def as_array(counts: Int[Tensor, "K"] | Int[np.ndarray, "K"]) -> Int[np.ndarray, "K"]:
    """Hits per code as NumPy, from a snapshot or straight from the device."""
    return torch.as_tensor(counts).cpu().numpy()


def number_range(values: Iterable[float]) -> str:
    """One number, or the lowest to the highest: "256 to 4,096"."""
    numbers = sorted({int(value) for value in values})
    return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"


def seeds_text(seeds: pd.Series) -> str:
    """What lines and bands or bars are of: "1 seed", "mean and range of 3 seeds"."""
    return "1 seed" if seeds.max() == 1 else f"mean and range of {int(seeds.max())} seeds"


def at_least(ratio: float) -> str:
    """A number of tokens per code, rounded down to a whole one; below 1 two digits."""
    return f"{int(ratio):,}" if ratio >= 1 else f"{ratio:.2g}"


def _method_of(name: str) -> str | None:
    """The method a label begins with, built in or registered by a user, the longest that fits, or None."""
    normal = _as_key(name)
    keys = {_as_key(key): key for key in (*registrations(), *METHOD_STYLES)}
    fits = [key for key in keys if normal == key or (normal.startswith(key) and not normal[len(key)].isalnum())]
    return keys[max(fits, key=len)] if fits else None


def _as_key(name: str) -> str:
    """A name as keys are written: "Soft VQ" → "soft_vq"."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")
