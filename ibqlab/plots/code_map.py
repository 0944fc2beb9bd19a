"""Codes among the features they should serve: the map of a projection."""

import textwrap

import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from ibqlab.diagnostics.projection import Projection
from ibqlab.plots.style import PAGE_WIDTH, add_caption, as_array, fix_tick_size, styled_figure, styles_for

Counts = Int[np.ndarray, "K"] | Int[Tensor, "K"]
Panel = tuple[Projection, int, Counts | None]
"""What one panel shows: a projection, the number of the frame (−1: the last), and hits per code or None."""

_FEATURE_GREY = "#B5B5B5"
_DEAD_COLOR = "#D55E00"
_CODE_COLOR = "#0072B2"
_HITS_COLORS = "viridis"
_COLUMNS = 3


def code_map_table(panels: dict[str, Panel]) -> pd.DataFrame:
    """The numbers behind `plot_code_maps`: every point drawn.

    Args:
        panels: title → (projection, frame, hits per code or None).
    Returns:
        One row per point: panel, kind ("code" or "feature"), id (row in the codebook or the features), x, y, hits (of
        codes whose counts are given; empty otherwise).
    Raises:
        ValueError: no panel, a frame that the projection does not have, or counts of another codebook size.
    """
    if not panels:
        raise ValueError("panels must hold at least one map; got none")
    return pd.concat([_panel_table(title, *panel) for title, panel in panels.items()], ignore_index=True)


def plot_code_map(projection: Projection, frame: int = -1, counts: Counts | None = None, title: str = "") -> Figure:
    """Codes and encoder features of one snapshot in their common plane.

    Grey dots: features. Filled circles: codes in use, larger and lighter the more tokens chose them. Crosses: dead
    codes. Crosses away from the grey cloud are codes that the features have left behind.

    Args:
        projection: from `project_codes`.
        frame: snapshot to show, −1 the last.
        counts: hits per code of the whole codebook (K,) at that snapshot; without them no code is called dead.
        title: heading of the panel.
    Returns:
        The figure; its numbers are `code_map_table({title: (projection, frame, counts)})`.
    Raises:
        ValueError: as for `code_map_table`.
    """
    return plot_code_maps({title: (projection, frame, counts)})


def plot_code_maps(panels: dict[str, Panel]) -> Figure:
    """Several maps side by side, with one scale of hits for all.

    Panels that show frames of the same projection have the same axes and can be compared point by point; panels of
    different projections share nothing but the way they are drawn.

    Args:
        panels: title → (projection, frame, hits per code or None), at most three in a row.
    Returns:
        The figure; its numbers are `code_map_table(panels)`.
    Raises:
        ValueError: as for `code_map_table`.
    """
    table = code_map_table(panels)
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // _COLUMNS)
    width = PAGE_WIDTH if columns > 1 else 5.2
    most = table["hits"].max()
    norm = None if pd.isna(most) or most < 1 else LogNorm(1, max(2, most))
    headings = {title: _heading(look.label, panels[title][2], columns) for title, look in styles_for(panels).items()}
    heading_height = 0.17 * max(text.count("\n") for text in headings.values())
    height = ((width - 0.9) / columns + heading_height) * rows + 1.2
    with styled_figure(width, height) as figure:
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (title, (projection, *_)) in zip(grid, panels.items(), strict=False):
            _draw_map(axes, table[table["panel"] == title], norm, columns)
            _finish_axes(axes, projection, columns)
            axes.set_title(headings[title], fontsize=9)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        if norm is not None:
            _add_scale(figure, grid[: len(panels)], norm, panels)
        _add_legend(figure, table)
        add_caption(figure, "\n".join(dict.fromkeys(_sentence(*panel[:2]) for panel in panels.values())))
    return figure


def _panel_table(title: str, projection: Projection, frame: int, counts: Counts | None) -> pd.DataFrame:
    """The points of one panel, features first, as they are drawn."""
    frames = len(projection.codes)
    if not -frames <= frame < frames:
        raise ValueError(f"frame must lie in {-frames} to {frames - 1}, the projection has {frames}; got {frame}")
    ids = projection.code_ids[frame]
    hits = np.full(len(ids), np.nan)
    if counts is not None:
        size = projection.codebook_sizes[frame]
        if len(counts) != size:
            raise ValueError(
                f"counts must hold one entry per code of the whole codebook, {size:,}; got {len(counts):,}: pass the "
                "counts of the same snapshot, unthinned"
            )
        hits = as_array(counts)[ids].astype(float)
    features, codes = projection.features[frame], projection.codes[frame]
    positions = np.concatenate([features, codes])
    return pd.DataFrame(
        {
            "panel": title,
            "kind": ["feature"] * len(features) + ["code"] * len(codes),
            "id": np.concatenate([projection.feature_ids[frame], ids]),
            "x": positions[:, 0],
            "y": positions[:, 1],
            "hits": np.concatenate([np.full(len(features), np.nan), hits]),
        }
    )


def _draw_map(axes: Axes, points: pd.DataFrame, norm: LogNorm | None, columns: int) -> None:
    """Features below, dead codes above them, codes in use on top; smaller marks in smaller panels."""
    area = 1 / np.sqrt(columns)
    features, codes = points[points["kind"] == "feature"], points[points["kind"] == "code"]
    dead, live = codes[codes["hits"] == 0], codes[codes["hits"] > 0]
    unknown = codes[codes["hits"].isna()]
    axes.scatter(
        features["x"], features["y"], s=5 * area, color=_FEATURE_GREY, linewidths=0, alpha=0.6, label="features"
    )
    axes.scatter(dead["x"], dead["y"], s=14 * area, color=_DEAD_COLOR, marker="x", linewidths=0.8, label="dead codes")
    axes.scatter(
        unknown["x"], unknown["y"], s=14 * area, color=_CODE_COLOR, edgecolors="white", linewidths=0.3, label="codes"
    )
    if norm is not None:
        axes.scatter(
            live["x"],
            live["y"],
            s=area * (6 + 32 * norm(live["hits"].to_numpy())),
            c=live["hits"],
            cmap=_HITS_COLORS,
            norm=norm,
            edgecolors="black",
            linewidths=0.25,
            alpha=0.9,
            label="codes in use",
        )


def _finish_axes(axes: Axes, projection: Projection, columns: int) -> None:
    """Square axes that hold every frame, named after the method; ticks only where numbers mean something."""
    left, right, bottom, top = projection.bounds
    half = 0.54 * max(right - left, top - bottom, 1e-6)
    middle_x, middle_y = (left + right) / 2, (bottom + top) / 2
    axes.set(xlim=(middle_x - half, middle_x + half), ylim=(middle_y - half, middle_y + half), aspect="equal")
    axes.grid(False)
    if projection.explained_variance is None:
        axes.set(xlabel="UMAP 1 (no unit)", ylabel="UMAP 2 (no unit)", xticks=[], yticks=[])
        return
    shares = [f"{100 * share:.0f} %" for share in projection.explained_variance]
    names = [f"PC {axis} ({share} of variance)" for axis, share in enumerate(shares, start=1)]
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.locator_params(nbins=4 if columns > 1 else 6)
    fix_tick_size(axes)


def _add_scale(figure: Figure, grid: list[Axes], norm: LogNorm, panels: dict[str, Panel]) -> None:
    """One colour bar of hits for all panels."""
    totals = sorted({int(as_array(counts).sum()) for _, _, counts in panels.values() if counts is not None})
    tokens = f"{totals[0]:,}" if len(totals) == 1 else f"{totals[0]:,} to {totals[-1]:,}"
    scale = figure.colorbar(ScalarMappable(norm, _HITS_COLORS), ax=grid, shrink=0.85, pad=0.02, aspect=25)
    scale.set_label(f"hits per code in {tokens} tokens")
    scale.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    scale.ax.yaxis.set_minor_formatter(NullFormatter())
    fix_tick_size(scale.ax)


def _add_legend(figure: Figure, table: pd.DataFrame) -> None:
    """The kinds of points that occur, above the panels, outside the data."""
    codes = table[table["kind"] == "code"]
    handles = [_dot("encoder features", color=_FEATURE_GREY, marker="o", markersize=4)]
    if codes["hits"].isna().any():
        handles.append(_dot("codes", color=_CODE_COLOR, marker="o", markersize=5))
    if (codes["hits"] > 0).any():
        color = colormaps[_HITS_COLORS](0.5)
        handles.append(
            _dot("codes in use", color=color, marker="o", markersize=6, markeredgecolor="black", markeredgewidth=0.5)
        )
    if (codes["hits"] == 0).any():
        handles.append(_dot("dead codes (no hit)", color=_DEAD_COLOR, marker="x", markersize=5))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), handletextpad=0.3, columnspacing=1.4)


def _dot(label: str, **look: object) -> Line2D:
    """A legend entry of a single mark."""
    return Line2D([], [], linestyle="", label=label, **look)


def _heading(label: str, counts: Counts | None, columns: int) -> str:
    """A panel's label, in lines that fit its width, and how many of its codes are dead."""
    return "\n".join([*textwrap.wrap(label, 80 // columns), *filter(None, [_dead_sentence(counts)])])


def _dead_sentence(counts: Counts | None) -> str:
    """How many codes of the whole codebook no token chose."""
    if counts is None:
        return ""
    hits = as_array(counts)
    return f"{int((hits == 0).sum()):,} of {len(hits):,} dead"


def _sentence(projection: Projection, frame: int) -> str:
    """What was fitted: method, how many codes of how many, how many features."""
    shown, size = len(projection.codes[frame]), projection.codebook_sizes[frame]
    codes = f"{shown:,} codes" if shown == size else f"{shown:,} of {size:,} codes"
    features = f"{len(projection.features[frame]):,} encoder features"
    text = f"{projection.method.upper()} of {codes} and {features}, jointly fitted"
    frames = len(projection.codes)
    return text if frames == 1 else f"{text} over {frames} snapshots"
