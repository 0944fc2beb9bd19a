"""What marks of a map hide from each other: which codes lie on top, a magnified square where codes crowd, a pointer
where features do."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from ibqlab.plots.style import CAPTION_SIZE, REFERENCE_GREY, add_note

_SMALL = 0.22
"""Of a panel's side: dead codes in a smaller square are magnified where codes in use lie among them."""
_TINY = 0.04
"""Of a panel's side: features in a smaller square lie under a single code's mark."""
_FEWEST = 5
"""Dead codes that a square must hold to be magnified."""
_HIDING = 0.03
"""Codes in use among the dead ones, as a share of those: fewer hide little."""
_SQUARE = 0.42
"""Side of the magnified square, of the panel's."""


def dead_look(dead: int, live: int, linewidth: float, alpha: float) -> dict[str, Any]:
    """How the crosses of dead codes are drawn among the circles of codes in use, which have zorder 3.

    The rarer kind lies on top: many crosses stay a haze that few circles stand out from, and few crosses are seen over
    many circles, each with a white rim.

    Args:
        dead: crosses in the panel.
        live: circles in the panel.
        linewidth: of a cross, points.
        alpha: of the haze.
    Returns:
        linewidths, alpha, zorder and rim, as `Axes.scatter` takes them.
    """
    if dead >= live:
        return {"linewidths": linewidth, "alpha": alpha}
    rim = withStroke(linewidth=linewidth + 0.9, foreground="white")
    return {"linewidths": max(linewidth, 0.7), "alpha": 1.0, "zorder": 3.5, "path_effects": [rim]}


def magnify_crowd(axes: Axes, points: pd.DataFrame, draw: Callable[[Axes], None]) -> bool:
    """Draw the place of the dead codes again, larger, in the emptiest corner, where codes in use would hide them.

    Args:
        axes: a panel with its limits set.
        points: kind, x, y and hits of all that it shows.
        draw: draws the panel's marks on given axes.
    Returns:
        Whether there was such a place.
    """
    codes = points[points["kind"] == "code"]
    dead = codes[codes["hits"] == 0]
    if len(dead) < _FEWEST:
        return False
    (left, right), (bottom, top) = _middle(dead["x"]), _middle(dead["y"])
    half = 0.62 * max(right - left, top - bottom, 1e-9)
    x, y = (left + right) / 2, (bottom + top) / 2
    live = codes[codes["hits"] > 0]
    if 2 * half > _SMALL * _side(axes) or _hiding(live, (x, y), half, _side(axes)) < _HIDING * len(dead):
        return False
    square = axes.inset_axes((*_emptiest_corner(axes, points), _SQUARE, _SQUARE), zorder=5)
    draw(square)
    square.set(xlim=(x - half, x + half), ylim=(y - half, y + half), xticks=[], yticks=[])
    square.grid(visible=False)
    square.spines[:].set(visible=True, color=REFERENCE_GREY, linewidth=0.8)
    factor = _SQUARE * _side(axes) / (2 * half)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    square.text(
        0.03, 0.97, f"×{factor:,.0f}", transform=square.transAxes, va="top", fontsize=CAPTION_SIZE, bbox=box, zorder=6
    )
    axes.indicate_inset_zoom(square, edgecolor=REFERENCE_GREY, linewidth=0.6, alpha=1)
    return True


def point_at_features(axes: Axes, points: pd.DataFrame) -> None:
    """Name the place of the features where all of them lie under the mark of a code."""
    features = points[points["kind"] == "feature"]
    if features.empty:
        return
    ends = [(features[name].min(), features[name].max()) for name in ("x", "y")]
    if max(high - low for low, high in ends) > _TINY * _side(axes):
        return
    x, y = ((low + high) / 2 for low, high in ends)
    left, right = axes.get_xlim()
    x_share = (x - left) / (right - left)
    above = y < np.mean(axes.get_ylim())
    add_note(
        axes,
        "all features",
        (x, y),
        (0, 20 if above else -20),
        ha="left" if x_share < 0.25 else "right" if x_share > 0.75 else "center",
        va="bottom" if above else "top",
        arrowprops={"arrowstyle": "-", "color": REFERENCE_GREY, "linewidth": 0.8, "shrinkB": 5},
        zorder=6,
    )


def _hiding(live: pd.DataFrame, center: tuple[float, float], half: float, side: float) -> float:
    """How many codes in use lie over a square, at least. Infinite where the mark of one covers all of it."""
    x, y = center
    reach = half if half > _TINY * side else half + _TINY * side / 2
    inside = (live["x"].between(x - reach, x + reach) & live["y"].between(y - reach, y + reach)).sum()
    return np.inf if reach > half and inside else float(inside)


def _side(axes: Axes) -> float:
    left, right = axes.get_xlim()
    return right - left


def _middle(values: pd.Series) -> tuple[float, float]:
    """Where the middle 90 % of the values lie."""
    low, high = np.quantile(values, (0.05, 0.95))
    return float(low), float(high)


def _emptiest_corner(axes: Axes, points: pd.DataFrame) -> tuple[float, float]:
    """Lower left corner, as a share of the panel, of the square that covers the fewest marks."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    places = (points[["x", "y"]].to_numpy() - (left, bottom)) / (right - left, top - bottom)  # shares of the sides
    margin = 0.03
    ends = (margin, 1 - _SQUARE - margin)
    corners = [(x, y) for y in ends for x in ends]
    covered = [((places >= corner) & (places <= np.add(corner, _SQUARE))).all(1).sum() for corner in corners]
    return corners[int(np.argmin(covered))]
