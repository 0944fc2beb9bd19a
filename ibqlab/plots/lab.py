"""The lab's methods side by side: codes and features in one plane, as a picture of a step and as an animation of all of
them; and their curves.

In two dimensions the plane is the world itself. In more it is that of the features' two widest directions, the same for
all methods and steps, so that what moves from frame to frame is a code or a feature.
"""

import io
import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from ibqlab.base.checks import require, require_between, require_choice
from ibqlab.base.files import write_whole
from ibqlab.base.measures import measure
from ibqlab.diagnostics.lab import Lab, LabResult
from ibqlab.diagnostics.usage import TOKENS_PER_CODE
from ibqlab.plots import steps, style
from ibqlab.plots.code_map import DEAD_COLOR, DEAD_NAME, FEATURE_GREY, HITS_COLORS, MISSED_NAME
from ibqlab.plots.histogram import has_enough_tokens
from ibqlab.plots.lab_plane import LabPlane
from ibqlab.plots.map_details import dead_look
from ibqlab.plots.printing import PAGE_WIDTH, draw, save_figure, styled_figure

_COLUMNS = 4
_SHOWN_FEATURES = 400
"""Features of a panel; more would only make the grey darker."""
_FACTS = (
    *("codebook_size", "in_use", "tokens", "left", "right", "bottom", "top"),
    *("share_1", "share_2", "features"),
)
"""What a panel's table says once, in its first row."""
_MEASURES = ("validation_usage", "validation_perplexity", "gradient_reach", "validation_quantization_error")
FRAME_DPI = 100.0
"""Of an animation: 720 pixels wide."""


def lab_plane_table(result: LabResult, at: int | Sequence[int] = -1, methods: Sequence[str] = ()) -> pd.DataFrame:
    """The numbers behind `plot_lab_plane`: every point drawn.

    Args:
        result: of `run_lab`.
        at: one of `result.snapshot_steps`, −1 for the last one; or several of them, a column of panels each.
        methods: labels of those to show; none: all.
    Returns:
        One row per point: method, step, kind ("feature" or "code"), id (row in the snapshot), x, y, hits (of codes, in
        the step's validation). The first row of each panel says besides: codebook_size, in_use (codes with a hit),
        tokens (of the validation), left, right, bottom and top (the same for all), share_1 and share_2 (of the
        features' variance along both axes; empty where the plane is the world itself), features (where they came from),
        failed (which methods are not shown because they failed, and why; mostly empty).
    Raises:
        ValueError: there is no such method, or no snapshot of that step.
    """
    for label in methods:
        require_choice("methods", label, result.runs)
    steps_shown = [at] if isinstance(at, int) else list(at)
    require(len(steps_shown) > 0, "at must name a step, or several; got none")
    return _table(result, steps_shown, methods or list(result.runs), LabPlane.of(result))


def plot_lab_plane(table: pd.DataFrame) -> Figure:
    """Codes among features, a panel per method and step: which codes are used, and where the dead ones have stayed.

    Grey dots: features. Circles: codes in use, lighter the more features chose them. Crosses: dead codes, on top where
    they are fewer. Under a drifting encoder crosses lie where the features were; under VQ that started at U(±1/K) they
    lie at the origin.

    Args:
        table: what `lab_plane_table` returned, also as read again from its CSV.
    Returns:
        The figure.
    Raises:
        ValueError: a table without a column that it has.
    """
    return _Panels(table).figure


def write_lab_animation(result: LabResult, path: str | Path, *, milliseconds: int = 180) -> Path:
    """All snapshots as an animated GIF that repeats, the last frame longer.

    Args:
        result: of `run_lab`.
        path: of the file, with or without .gif; folders are made.
        milliseconds: a frame is shown, 20 to 10,000.
    Returns:
        The file's path.
    Raises:
        ValueError: another ending than .gif, or a time out of bounds.
        RunError: the disk is full, or the folder may not be written to.
    Cost: about 0.3 s per frame and ten methods.
    """
    require_between("milliseconds", milliseconds, 20, 10_000)
    path = Path(path)
    if path.suffix.lower() not in ("", ".gif"):
        raise ValueError(f"an animation is a .gif; got {path.name!r}: pass {path.stem + '.gif'!r}")
    path = path.with_suffix(".gif")
    plane, panels, frames = LabPlane.of(result), None, []
    for step in result.snapshot_steps:
        table = _table(result, [step], list(result.runs), plane)
        if panels is None:
            panels = _Panels(table)
        else:
            panels.show(table)
        frames.append(panels.picture())
    # One palette for all frames: colours of their own would flicker.
    palette = frames[-1].convert("RGB").quantize(128)
    frames = [frame.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    times = [milliseconds] * (len(frames) - 1) + [10 * milliseconds]
    content = io.BytesIO()
    frames[0].save(content, "gif", save_all=True, append_images=frames[1:], duration=times, loop=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())
    return path


def save_lab_figure(lab: Lab, name: str, figure: Figure, data: pd.DataFrame) -> Figure:
    """Write a figure and its numbers into the lab's `figures/`; runs that are too short are named on its face.

    Args:
        lab: whose folder it is.
        name: of the file.
        figure: from a plot function.
        data: its numbers.
    Returns:
        The same figure.
    """
    if lab.too_short:
        style.mark_too_short(figure, lab.too_short)
    save_figure(figure, lab.folder / "figures" / name, data)
    return figure


def show_lab_table(result: LabResult) -> pd.DataFrame:
    """`result.table()` for reading: shares in %, proper names."""
    table = result.table()
    shares = {"usage": "usage", "least_usage": "lowest", "gradient_reach": measure("gradient_reach").title}
    shares["error_share"] = "error share"
    text = pd.DataFrame({"method": [look.label for look in style.styles_for(list(table["method"])).values()]})
    text["start"], text["K"] = table["start"], table["codebook_size"].map("{:,}".format)
    for key, heading in shares.items():
        text[heading] = _written(table[key], "{:.1%}")
    text["perplexity (codes)"] = _written(table["perplexity"], "{:,.1f}")
    text["validation features"] = _written(table["tokens"], "{:,.0f}")
    text["s"] = _written(table["seconds"], "{:.1f}")
    return text.assign(failed=table["failed"]) if result.failures else text


def _written(numbers: pd.Series, pattern: str) -> pd.Series:
    """Numbers as a table shows them; a method that failed has none."""
    return numbers.map(lambda number: "–" if pd.isna(number) else pattern.format(number))


def lab_curve_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """The numbers behind `plot_lab_curves`.

    Args:
        metrics: `LabResult.metrics`, of one seed or of several joined.
    Returns:
        One row per method, start and step: seeds, codebook_size, validation_tokens, and *_mean, *_min and *_max of
        validation_usage and gradient_reach (shares), validation_perplexity (codes) and validation_quantization_error.
    Raises:
        ValueError: a missing column, or no rows.
    """
    style.require_columns(metrics, ("step", "method", "seed", "init", "codebook_size"), "a lab's metrics")
    facts = {"codebook_size": "first", "code_dim": "first", "validation_tokens": "min", "failed": "max"}
    return steps.over_seeds(metrics, ("method", "init"), _MEASURES, facts)


def plot_lab_curves(metrics: pd.DataFrame) -> Figure:
    """Four panels against the step: usage, perplexity, gradient reach, and the quantization error.

    Usage, perplexity and error are of validation features, 10·K of them; gradient reach is of each logged step.
    A codebook collapses where usage falls and stays down; the error says what is lost by it.

    Args:
        metrics: as for `lab_curve_table`, or what it returned.
    Returns:
        The figure; its numbers are `lab_curve_table(metrics)`.
    Raises:
        ValueError: as for `lab_curve_table`.
    """
    table = metrics if "validation_usage_mean" in metrics else lab_curve_table(metrics)
    looks = style.styles_for(list(dict.fromkeys(table["method"])))
    with styled_figure(PAGE_WIDTH, 5.2 + 0.17 * (len(looks) / 3)) as figure:
        for axes, key in zip(figure.subplots(2, 2, sharex=True).flat, _MEASURES, strict=True):
            for number, (method, group) in enumerate(table.groupby("method", sort=False)):
                steps.draw_band(axes, group, key, looks[method], number=min(number, 5))
            quantity = measure(key)
            steps.finish_panel(axes, quantity, highest=table["codebook_size"].max() * 1.5)
            if key.endswith("error"):
                axes.set_yscale("log")
                axes.set_ylabel("mean squared difference")
                steps.write_numbers(axes.yaxis, "g")
                steps.divide_decades(axes)
            steps.finish_steps(axes, table["step"], "step" if key in _MEASURES[2:] else "")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        columns = style.even_columns(len(labels), 4)
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, handlelength=2.4, columnspacing=1.0)
        tokens = _tokens_text(table["validation_tokens"].dropna(), table["codebook_size"])
        caption = f"{steps.sizes_text(table)}; usage, perplexity and error over {tokens}"
        style.add_caption(figure, f"{caption}; {style.seeds_text(table['seeds'])}{_failed_text(table)}")
    return figure


def _table(result: LabResult, shown: Sequence[int], methods: Sequence[str], plane: LabPlane) -> pd.DataFrame:
    """The points of one panel after the other."""
    panels = []
    for label, step in itertools.product(methods, shown):
        snapshot = result.snapshot(label, step)
        features, codes = snapshot["features"][:_SHOWN_FEATURES], snapshot["codebook"]
        positions = np.concatenate([plane.place(features), plane.place(codes)]).round(4)
        counts = snapshot["counts"]
        points = pd.DataFrame(
            {
                "method": label,
                "step": result.snapshot_steps[-1] if step == -1 else step,
                "kind": ["feature"] * len(features) + ["code"] * len(codes),
                "id": np.concatenate([np.arange(len(features)), np.arange(len(codes))]),
                "x": positions[:, 0],
                "y": positions[:, 1],
                "hits": np.concatenate([np.full(len(features), np.nan), counts]),
            }
        )
        in_use, tokens = int((counts > 0).sum()), int(counts.sum())
        facts = (len(codes), in_use, tokens, *plane.bounds, *plane.shares, result.features, result.failed)
        panels.append(points.join(pd.DataFrame([facts], columns=[*_FACTS, "failed"], index=[0])))
    return pd.concat(panels, ignore_index=True)


class _Panels:
    """Panels whose points can be replaced, so that a frame of an animation needs no new layout."""

    def __init__(self, table: pd.DataFrame):
        style.require_columns(table, ("method", "step", "kind", "x", "y", "hits", *_FACTS), "a table of a lab's plane")
        facts = table.drop_duplicates(["method", "step"])
        self.looks = style.styles_for(list(dict.fromkeys(facts["method"])))
        self.single = facts["step"].nunique() == 1
        self.norm = LogNorm(1, max(2.0, float((facts["tokens"] / facts["codebook_size"]).min()) * 10))
        # Steps side by side, or all methods of one step.
        self.columns = style.even_columns(len(facts), _COLUMNS) if self.single else facts["step"].nunique()
        rows = -(-len(facts) // self.columns)
        width = PAGE_WIDTH if self.columns > 2 else 2.6 * self.columns + 0.6
        side = (width - 0.7) / self.columns
        with styled_figure(width, rows * (side + 0.36) + 0.65, layout="compressed") as self.figure:
            grid = list(self.figure.subplots(rows, self.columns, squeeze=False).flat)
            for axes in grid[len(facts) :]:
                axes.set_visible(False)
            self.grid = grid[: len(facts)]
            for axes in self.grid:
                axes.set(xticks=[], yticks=[], aspect="equal")
                axes.set(xlim=table.loc[0, ["left", "right"]], ylim=table.loc[0, ["bottom", "top"]])
                axes.grid(False)
                axes.spines[:].set(visible=True, color="#BBBBBB", linewidth=0.6)
            self.show(table)
            scale = self.figure.colorbar(
                ScalarMappable(self.norm, HITS_COLORS), ax=grid, shrink=0.7, pad=0.01, aspect=22 * rows
            )
            scale.set_label("hits per code in the validation")
            steps.write_numbers(scale.ax.yaxis, ",.0f")
            are_dead = all(map(has_enough_tokens, facts["tokens"], facts["codebook_size"]))
            self.figure.legend(handles=_handles(are_dead), loc="outside upper center", ncols=3, handletextpad=0.3)

    def show(self, table: pd.DataFrame) -> None:
        """The points and headings of a step."""
        panels = table.groupby(["method", "step"], sort=False)
        for axes, ((method, _), points) in zip(self.grid, panels, strict=True):
            self._draw(axes, points, self.looks[method].label)
        features = (table["kind"] == "feature").groupby([table["method"], table["step"]]).sum()
        style.add_caption(self.figure, self._caption(table.dropna(subset=["tokens"]), style.number_range(features)))

    def picture(self) -> Image.Image:
        """The figure's pixels for an animation; everything stays where the first frame has put it."""
        picture = draw(self.figure, FRAME_DPI)
        self.figure.set_layout_engine("none")
        return picture

    def _draw(self, axes: Axes, points: pd.DataFrame, label: str) -> None:
        facts, area = points.iloc[0], (3 / max(3, self.columns)) ** 1.5
        for drawn in list(axes.collections):
            drawn.remove()
        features, codes = points[points["kind"] == "feature"], points[points["kind"] == "code"]
        dead, live = codes[codes["hits"] == 0], codes[codes["hits"] > 0].sort_values("hits", ascending=False)
        # Of many codes each takes less room, so that they do not become one surface.
        crowd = max(0.25, min(1.0, (64 / len(codes)) ** 0.5))
        axes.scatter(features["x"], features["y"], s=4 * area, color=FEATURE_GREY, linewidths=0, alpha=0.55)
        look = dead_look(len(dead), len(live), linewidth=0.7, alpha=0.6)
        axes.scatter(dead["x"], dead["y"], s=24 * area * crowd, color=DEAD_COLOR, marker="x", **look)
        # Of many codes in use each takes less room, or they would cover features and dead codes.
        room = max(0.4, min(1.0, (60 / max(1, len(live))) ** 0.5))
        axes.scatter(
            *(live["x"], live["y"]),
            s=46 * area * crowd * room,
            c=live["hits"],
            cmap=HITS_COLORS,
            norm=self.norm,
            edgecolors="black",
            linewidths=0.4,
            zorder=3,
        )
        lines = textwrap.wrap(label, 92 // self.columns) or [label]
        in_use, size = int(facts["in_use"]), int(facts["codebook_size"])
        step = "" if self.single else f"step {int(facts['step']):,}: "
        standing = f"{step}{in_use:,} of {size:,} in use"
        axes.set_title("\n".join([*lines[:2], standing]), fontsize=8)

    def _caption(self, facts: pd.DataFrame, features: str) -> str:
        """The step of all panels where it is one, and what is drawn where: so many features."""
        first = facts.iloc[0]
        plane = "the plane is the features' space itself"
        if pd.notna(first["share_1"]):
            shares = " and ".join(f"{100 * first[f'share_{axis}']:.0f} %" for axis in (1, 2))
            plane = (
                f"the plane of the features' two widest directions ({shares} of their variance), the same everywhere"
            )
        step = f"step {int(first['step']):,}; " if self.single else ""
        hits = f"hits in {_tokens_text(facts['tokens'], facts['codebook_size'])}"
        drawn = f"drawn: all codes and {features} features"
        return f"{step}{first['features']}; {plane}; {drawn}; {hits}{_failed_text(facts)}"


def _failed_text(table: pd.DataFrame) -> str:
    """The end of a caption: which methods failed and are not shown. Tables written by older versions do not say."""
    texts = table["failed"].dropna() if "failed" in table else pd.Series(dtype=str)
    failed = " ".join(dict.fromkeys(text for text in texts if text))
    return f". {failed}" if failed else ""


def _tokens_text(tokens: pd.Series, sizes: pd.Series) -> str:
    """How many features hits were counted in, with a word where they are too few for so many codes."""
    few = tokens.min() < TOKENS_PER_CODE * sizes.max()
    remark = f", fewer than 10·K = {TOKENS_PER_CODE * int(sizes.max()):,}: usage reads low" if few else ""
    return f"{style.number_range(tokens.astype(float))} validation features{remark}"


def _handles(are_dead: bool) -> list[Line2D]:
    """Legend entries of the marks; codes without a hit in too few features are not called dead."""
    plain: dict[str, Any] = {"linestyle": ""}
    return [
        Line2D([], [], marker="o", markersize=3.5, color=FEATURE_GREY, label="features", **plain),
        Line2D(
            *([], []),
            marker="o",
            markersize=5.5,
            color=HITS_COLORS(0.5),
            markeredgecolor="black",
            markeredgewidth=0.5,
            label="codes in use",
            **plain,
        ),
        Line2D(
            [], [], marker="x", markersize=5, color=DEAD_COLOR, label=DEAD_NAME if are_dead else MISSED_NAME, **plain
        ),
    ]
