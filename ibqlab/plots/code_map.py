"""Codes among the features they should serve: the map of a projection."""

import textwrap
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ibqlab.base.escaping import for_matplotlib
from ibqlab.diagnostics.projection import Projection
from ibqlab.plots.histogram import STEP, has_enough_tokens
from ibqlab.plots.map_details import dead_look, magnify_crowd, point_at_features
from ibqlab.plots.printing import PAGE_WIDTH, fix_tick_size, styled_figure
from ibqlab.plots.steps import write_numbers
from ibqlab.plots.style import add_caption, as_array, number_range, require_columns, styles_for

Counts = Int[np.ndarray, "K"] | Int[Tensor, "K"]
Panel = tuple[Projection, int, Counts | None]
"""What one panel shows: a projection, the number of the frame (−1: the last), and hits per code or None."""

FEATURE_GREY = "#BDBDBD"
DEAD_COLOR = "#3C3C3C"
DEAD_NAME, MISSED_NAME = "dead codes (no hit)", "codes not hit"
"""What crosses are called, where enough tokens were counted and where they were not."""
_CODE_COLOR = "#0072B2"
HITS_COLORS = ListedColormap(colormaps["viridis"](np.linspace(0.22, 1.0, 256)), name="hits")
"""Blue to yellow, which no kind of colour blindness mixes up; its dark end is left to the dead codes."""
_COLUMNS = 3
_FACTS = (
    *("method", "frames", "codebook_size", "in_use", "tokens", "features"),
    *("left", "right", "bottom", "top", "share_1", "share_2"),
)
"""What a panel's table says once, in its first row."""


def code_map_table(panels: dict[str, Panel]) -> pd.DataFrame:
    """The numbers behind `plot_code_maps`: every point drawn.

    Args:
        panels: title → (projection, frame, hits per code or None).
    Returns:
        One row per point: panel, kind ("code" or "feature"), id (row in the codebook or the features), x, y, hits (of
        codes whose counts are given; empty otherwise). The first row of each panel says besides: method, frames,
        codebook_size, in_use (codes with a hit), tokens (counted), features (before thinning), left, right, bottom and
        top (of all frames), share_1 and share_2 (of the variance, for PCA).
    Raises:
        ValueError: no panel, a frame that the projection does not have, or counts of another codebook size.
    """
    if not panels:
        raise ValueError("panels must hold at least one map; got none")
    return pd.concat([_panel_table(title, *panel) for title, panel in panels.items()], ignore_index=True)


def plot_code_map(
    projection: Projection,
    frame: int = -1,
    counts: Counts | None = None,
    title: str = "",
    *,
    most_hits: int | None = None,
) -> Figure:
    """Codes and encoder features of one snapshot in their common plane.

    Grey dots: features. Filled circles: codes in use, larger and lighter the more tokens chose them. Crosses: dead
    codes. Crosses away from the grey cloud are codes that the features have left behind. Give `project_codes` the
    counts of all snapshots, so that every code in use is on its map.

    Args:
        projection: from `project_codes`.
        frame: snapshot to show, −1 the last.
        counts: hits per code of the whole codebook (K,) at that snapshot; without them no code is called dead.
        title: heading of the panel.
        most_hits: upper end of the colour scale, so that maps of several snapshots can be compared; None: the most hits
            there are.
    Returns:
        The figure; its numbers are `code_map_table({title: (projection, frame, counts)})`.
    Raises:
        ValueError: as for `code_map_table`.
    """
    return plot_code_maps({title: (projection, frame, counts)}, most_hits=most_hits)


def plot_code_maps(panels: dict[str, Panel] | pd.DataFrame, *, most_hits: int | None = None) -> Figure:
    """Several maps side by side, with one scale of hits for all.

    Panels that show frames of the same projection have the same axes and can be compared point by point; panels of
    different projections share nothing but the way they are drawn. Every code in use is drawn. Of codes in use and dead
    ones the rarer kind lies on top; where dead ones crowd, a square shows the place magnified. Features that all lie
    under one code are pointed at.

    Args:
        panels: title → (projection, frame, hits per code or None), at most three in a row; or what `code_map_table`
            returned.
        most_hits: as for `plot_code_map`.
    Returns:
        The figure; its numbers are `code_map_table(panels)`.
    Raises:
        ValueError: as for `code_map_table`, or a table without a column that it has.
    """
    table = panels if isinstance(panels, pd.DataFrame) else code_map_table(panels)
    require_columns(table, ("panel", "kind", "x", "y", "hits", *_FACTS), "a table of maps")
    facts = table.drop_duplicates("panel").set_index("panel")
    columns, rows = min(len(facts), _COLUMNS), -(-len(facts) // _COLUMNS)
    width = PAGE_WIDTH if columns > 1 else 5.2
    norm = _scale(table, most_hits)
    size = (width, _height(facts, _headings(table, facts, columns), width - (1.1 if norm else 0)))
    with styled_figure(*size) as figure:
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        caption = draw_code_maps(grid, table, columns, most_hits=most_hits)
        for axes in grid[len(facts) :]:
            axes.set_visible(False)
        if norm is not None:
            add_scale(figure, grid[: len(facts)], table, rows, most_hits=most_hits)
        handles = map_handles(table)
        look = {"ncols": len(handles), "handletextpad": 0.3, "columnspacing": 1.4}
        figure.legend(handles=handles, loc="outside upper center", **look)
        add_caption(figure, caption)
    return figure


def draw_code_maps(grid: Sequence[Axes], table: pd.DataFrame, columns: int, *, most_hits: int | None = None) -> str:
    """Draw the maps of a table into panels that are there, each with its heading.

    Args:
        grid: panels, at least as many as maps.
        table: from `code_map_table`.
        columns: panels in a row of the figure, which heading and marks are made for.
        most_hits: as for `plot_code_map`.
    Returns:
        The caption: what was fitted and what is drawn of it.
    """
    facts = table.drop_duplicates("panel").set_index("panel")
    headings, norm, magnified = _headings(table, facts, columns), _scale(table, most_hits), False
    points = {title: table[table["panel"] == title] for title in facts.index}
    for axes, title in zip(grid, facts.index, strict=False):
        draw = partial(_draw_map, points=points[title], norm=norm)
        draw(axes, area=columns**-0.5)
        _finish_axes(axes, facts.loc[title], columns)
        magnified |= magnify_crowd(axes, points[title], partial(draw, area=0.3 * columns**-0.5))
        point_at_features(axes, points[title])
        axes.set_title(headings[title], fontsize=9)
    return _caption(points, facts) + ("; squares magnify where codes crowd" if magnified else "")


def _scale(table: pd.DataFrame, most_hits: int | None) -> LogNorm | None:
    """The scale of hits, as soon as any were counted, even where no code has one."""
    if table["hits"].isna().all():
        return None
    return LogNorm(1, max(2, most_hits or np.nanmax([table["hits"].max(), 2])))


def _headings(table: pd.DataFrame, facts: pd.DataFrame, columns: int) -> dict[str, str]:
    looks = styles_for(list(facts.index))
    points = {title: table[table["panel"] == title] for title in facts.index}
    return {title: _heading(looks[title].label, points[title], facts.loc[title], columns) for title in facts.index}


def _height(facts: pd.DataFrame, headings: dict[str, str], width: float) -> float:
    """Inches that square panels in so much width take, with headings, axis labels, legend and caption."""
    columns = min(len(facts), _COLUMNS)
    lines = [1 + text.count("\n") for text in headings.values()]
    rows = [max(lines[start : start + columns]) for start in range(0, len(lines), columns)]
    beside, below = (0.28, 0.35) if facts["share_1"].isna().all() else (0.6, 0.55)  # ticks of PCA need room
    caption = 1.0 if columns > 1 else 1.4  # a narrower figure breaks it into more lines
    return sum(width / columns - beside + 0.16 * row + below for row in rows) + caption


def _panel_table(title: str, projection: Projection, frame: int, counts: Counts | None) -> pd.DataFrame:
    """The points of one panel, features first, as they are drawn."""
    frames = len(projection.codes)
    if not -frames <= frame < frames:
        raise ValueError(f"frame must lie in {-frames} to {frames - 1}, the projection has {frames}; got {frame}")
    ids = projection.code_ids[frame]
    size = projection.codebook_sizes[frame]
    hits, in_use, tokens = np.full(len(ids), np.nan), np.nan, np.nan
    if counts is not None:
        whole = as_array(counts)
        if whole.shape != (size,):
            raise ValueError(
                f"counts must hold one entry per code of the whole codebook, {size:,}; got {len(whole):,}: pass the "
                "counts of the same snapshot, unthinned: count_indices(indices, codebook_size)"
            )
        hits, in_use, tokens = whole[ids].astype(float), int((whole > 0).sum()), int(whole.sum())
    features, codes = projection.features[frame], projection.codes[frame]
    positions = np.concatenate([features, codes])
    points = pd.DataFrame(
        {
            "panel": title,
            "kind": ["feature"] * len(features) + ["code"] * len(codes),
            "id": np.concatenate([projection.feature_ids[frame], ids]),
            "x": positions[:, 0],
            "y": positions[:, 1],
            "hits": np.concatenate([np.full(len(features), np.nan), hits]),
        }
    )
    shares = projection.explained_variance or (np.nan, np.nan)
    facts = (projection.method, frames, size, in_use, tokens, projection.feature_totals[frame])
    first = pd.DataFrame([(*facts, *projection.bounds, *shares)], columns=list(_FACTS), index=[0])
    return points.join(first)


def _draw_map(axes: Axes, points: pd.DataFrame, norm: LogNorm | None, area: float) -> None:
    """Features below, codes above them, of codes in use rarely used ones last; `area` scales all marks."""
    features, codes = points[points["kind"] == "feature"], points[points["kind"] == "code"]
    dead, live = codes[codes["hits"] == 0], codes[codes["hits"] > 0].sort_values("hits", ascending=False, kind="stable")
    unknown = codes[codes["hits"].isna()]
    axes.scatter(
        features["x"], features["y"], s=5 * area, color=FEATURE_GREY, linewidths=0, alpha=0.6, label="features"
    )
    look = dead_look(len(dead), len(live), linewidth=min(0.5, 0.9 * area**0.5), alpha=0.45)
    axes.scatter(dead["x"], dead["y"], s=11 * area, color=DEAD_COLOR, marker="x", label="dead codes", **look)
    axes.scatter(
        unknown["x"], unknown["y"], s=14 * area, color=_CODE_COLOR, edgecolors="white", linewidths=0.3, label="codes"
    )
    if norm is not None:
        axes.scatter(
            live["x"],
            live["y"],
            s=area
            * max(0.4, min(1, np.sqrt(200 / max(1, len(live)))))
            * (14 + 36 * norm(live["hits"].to_numpy()).clip(0, 1)),
            c=live["hits"],
            cmap=HITS_COLORS,
            norm=norm,
            edgecolors="black",
            linewidths=0.45 * area**0.5,
            zorder=3,
            label="codes in use",
        )


def _finish_axes(axes: Axes, facts: pd.Series, columns: int) -> None:
    """Square axes that hold every frame, named after the method; ticks only where numbers mean something."""
    left, right, bottom, top = (facts[side] for side in ("left", "right", "bottom", "top"))
    half = 0.54 * max(right - left, top - bottom, 1e-6)
    middle_x, middle_y = (left + right) / 2, (bottom + top) / 2
    axes.set(xlim=(middle_x - half, middle_x + half), ylim=(middle_y - half, middle_y + half), aspect="equal")
    axes.grid(False)
    if pd.isna(facts["share_1"]):
        axes.set(xlabel="UMAP 1 (no unit)", ylabel="UMAP 2 (no unit)", xticks=[], yticks=[])
        return
    suffix = " of variance" if columns == 1 else ""
    names = [f"PC {axis} ({100 * facts[f'share_{axis}']:.0f} %{suffix})" for axis in (1, 2)]
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.locator_params(nbins=4 if columns > 1 else 6)
    fix_tick_size(axes)


def add_scale(
    figure: Figure,
    grid: Sequence[Axes],
    table: pd.DataFrame,
    rows: int = 1,
    *,
    most_hits: int | None = None,
    **place: object,
) -> None:
    """One colour bar of hits for all panels of a table's maps, whose hits were counted.

    Args:
        figure: of the panels.
        grid: the panels.
        table: from `code_map_table`.
        rows: of panels.
        most_hits: as for `plot_code_map`.
        place: as `Figure.colorbar` takes it.
    """
    place = {"shrink": 0.85, "pad": 0.02, "aspect": 25 * rows} | place
    scale = figure.colorbar(ScalarMappable(_scale(table, most_hits), HITS_COLORS), ax=list(grid), **place)
    scale.set_label(f"hits per code in {number_range(table['tokens'].dropna())} tokens")
    axis = scale.ax.xaxis if scale.orientation == "horizontal" else scale.ax.yaxis
    write_numbers(axis, ",.0f")
    fix_tick_size(scale.ax)


def map_handles(table: pd.DataFrame) -> list[Line2D]:
    """Legend entries: what each mark means, only for marks that appear.

    Args:
        table: from `code_map_table`.
    """
    codes = table[table["kind"] == "code"]
    handles = [_dot("encoder features", color=FEATURE_GREY, marker="o", markersize=4)]
    if codes["hits"].isna().any():
        handles.append(_dot("codes", color=_CODE_COLOR, marker="o", markersize=5))
    if (codes["hits"] > 0).any():
        color = HITS_COLORS(0.5)
        handles.append(
            _dot("codes in use", color=color, marker="o", markersize=6, markeredgecolor="black", markeredgewidth=0.5)
        )
    if (codes["hits"] == 0).any():
        counted = table.dropna(subset=["in_use"])
        are_dead = all(map(has_enough_tokens, counted["tokens"], counted["codebook_size"]))
        handles.append(_dot(DEAD_NAME if are_dead else MISSED_NAME, color=DEAD_COLOR, marker="x", markersize=5))
    return handles


def _dot(label: str, **look: object) -> Line2D:
    """A legend entry of a single mark."""
    return Line2D([], [], linestyle="", label=label, **look)


def _heading(label: str, points: pd.DataFrame, facts: pd.Series, columns: int) -> str:
    """A panel's label, in lines that fit its width. Below it: codes in use, dead codes, dead codes drawn."""
    step = STEP.match(label)
    name, when = (step[1], [f"step {step[2]}"]) if step else (label, [])
    # No line ends within a start's name or before the word that says whose it is.
    whole = name.replace("(0, 1", "(0,\u00a01").replace(", default", ",\u00a0default")
    lines = textwrap.wrap(whole, 84 // columns) + when
    if pd.notna(facts["in_use"]):
        in_use, dead = int(facts["in_use"]), int(facts["codebook_size"] - facts["in_use"])
        is_death = has_enough_tokens(facts["tokens"], facts["codebook_size"])
        lines.append(f"{in_use:,} in use, {dead:,} {'dead' if is_death else 'not hit'}")
        if not is_death and columns == 1:
            lines[-1] += f" in {int(facts['tokens']):,} tokens"
        elif not is_death:
            lines.append(f"in {int(facts['tokens']):,} tokens")
        dead_points = int((points["hits"] == 0).sum())
        if dead_points < dead:
            lines.append(f"({dead_points:,} of {'the dead' if is_death else 'these'} drawn)")
    return "\n".join(lines)


def _caption(points: dict[str, pd.DataFrame], facts: pd.DataFrame) -> str:
    """What was fitted and what is drawn of it."""
    frames = int(facts["frames"].max())
    method = " and ".join(for_matplotlib(name).upper() for name in facts["method"].unique())
    panel_count = int(facts.groupby(["left", "right", "bottom", "top"]).size().max())
    of_them = "" if panel_count == frames else f", {panel_count} of them here"
    over = "" if frames == 1 else f" over {frames} snapshots{of_them}"
    kinds = {title: panel_points["kind"].value_counts() for title, panel_points in points.items()}
    feature_count = number_range([kinds[title].get("feature", 0) for title in points])
    total_text = "" if feature_count == number_range(facts["features"]) else f" of {number_range(facts['features'])}"
    text = f"{method} of codes and features, jointly fitted{over}; drawn: {_codes_drawn(points, facts)}"
    return f"{text}, {feature_count}{total_text} encoder features"


def _codes_drawn(points: dict[str, pd.DataFrame], facts: pd.DataFrame) -> str:
    """Which codes are drawn: those in use all, unless the map was fitted without their counts."""
    codes = {title: panel[panel["kind"] == "code"] for title, panel in points.items()}
    if facts["in_use"].isna().any():
        code_count, size = number_range(map(len, codes.values())), number_range(facts["codebook_size"])
        return f"{code_count} codes" if code_count == size else f"{code_count} of {size} codes"
    lost = {title: int(facts.loc[title, "in_use"] - (panel["hits"] > 0).sum()) for title, panel in codes.items()}
    if any(lost.values()):
        code_count = number_range([(panel["hits"] > 0).sum() for panel in codes.values()])
        return f"{code_count} of {number_range(facts['in_use'])} codes in use (thinned: give project_codes the counts)"
    # Panels without a dead code would read "0 of 0".
    dead = {title: int(facts.loc[title, "codebook_size"] - facts.loc[title, "in_use"]) for title in codes}
    drawn = {title: int((panel["hits"] == 0).sum()) for title, panel in codes.items()}
    size = f"K = {number_range(facts['codebook_size'])}; in use: hit in {number_range(facts['tokens'])} tokens"
    if drawn == dead:
        return f"all codes ({size})"
    thinned = [title for title in codes if drawn[title] < dead[title]]
    shown, whole = (number_range(numbers[title] for title in thinned) for numbers in (drawn, dead))
    return f"every code in use and {shown} of {whole} dead codes ({size})"
