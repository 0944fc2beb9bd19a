"""What a map's points look like: one number per point, and one scale that holds for all steps.

A look is a number that the canvas turns into colour, size and opacity (`palette`): a feature, a code without a value, a
code in use on one of ten levels, and a code without a hit on one of the same levels, which is drawn smaller.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.colors import to_hex

from ibqlab.plots.code_map import DEAD_COLOR, FEATURE_GREY, HITS_COLORS
from ibqlab.views.map_data import MapData
from ibqlab.views.patches import PatchIndex
from ibqlab.views.snapshot_arrays import NEVER, NOT_STORED
from ibqlab.views.subject import ViewError

LEVELS = 10
"""Colours of a scale, and classes that have a colour of their own."""
FEATURE, PLAIN, IN_USE, DEAD = 0, 1, 2, 2 + LEVELS
"""Looks: of features; of codes without a value; the first of codes in use, and of coloured dead codes."""
LOOKS = DEAD + LEVELS
REACH_FLOOR = 1e-4
"""Lower end of the scale of gradients; a code below 10⁻³ of the largest counts as not reached."""
CLASS_COLORS = (
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933"),
    *("#DDCC77", "#CC6677", "#882255", "#AA4499", "#EE7733"),
)
"""Tol's muted scheme, which no kind of colour blindness mixes up, and an orange."""
_ON_DARK = {"#332288": "#6699CC", "#117733": "#66BB77", "#882255": "#EE99AA"}
"""Lighter ones in place of those that a dark ground swallows."""


@dataclass(frozen=True, kw_only=True)
class Coloring:
    """One value per code and snapshot, on a scale."""

    name: str
    """As it is chosen."""
    unit: str
    """What the numbers of its scale count."""
    levels: UInt8[np.ndarray, "F C"]
    """Looks of the codes."""
    least: float = 0.0
    most: float = 0.0
    """Ends of the scale, over all snapshots."""
    names: tuple[str, ...] = ()
    """Of the classes on the levels; empty for a scale of numbers."""
    note: str = ""
    """What a reader has to know of it, one sentence."""

    def looks(self, data: MapData, frame: int) -> UInt8[np.ndarray, "P"]:
        """Of all points of a snapshot, features first, so that codes lie above them."""
        return np.concatenate([np.full(data.features.shape[1], FEATURE, np.uint8), self.levels[frame]])


def color_codes(data: MapData, name: str, index: PatchIndex | None, *, without_index: str = "") -> Coloring:
    """A colouring of a map.

    Args:
        data: the map.
        name: one of `COLORINGS`.
        index: the images' tokens, which classes are read from; None where there are none.
        without_index: why there are none.
    Raises:
        ViewError: the run lacks what it is about; the message is one sentence.
    """
    if name == "class":
        return _by_class(data, index, without_index)
    return COLORINGS[name](data)


def palette(dark: bool, coloring: Coloring, codes: int) -> tuple[list[str], list[float], list[float]]:
    """Colour, size in pixels and opacity of every look.

    Args:
        dark: whether the ground is dark.
        coloring: of classes or numbers.
        codes: points; many are drawn smaller.
    """
    ends = (0.3, 1.0) if dark else (0.22, 0.94)
    scale = [
        to_hex(HITS_COLORS((ends[0] + (ends[1] - ends[0]) * i / (LEVELS - 1) - 0.22) / 0.78)) for i in range(LEVELS)
    ]
    if coloring.names:
        scale = [_ON_DARK.get(color, color) if dark else color for color in CLASS_COLORS]
    feature, plain = ("#707070", "#E0E0E0") if dark else (FEATURE_GREY, DEAD_COLOR)
    unit = float(np.interp(np.log10(max(codes, 10)), [3, 5.4], [1.0, 0.3]))
    sizes = [
        max(1.0, 2.5 * unit),
        max(1.4, 5.0 * unit),
        *[max(2.0, 9.0 * unit)] * LEVELS,
        *[max(1.4, 5.0 * unit)] * LEVELS,
    ]
    return [feature, plain, *scale, *scale], sizes, [0.5, 0.6, *[1.0] * LEVELS, *[0.85] * LEVELS]


def _scaled(
    data: MapData, values: Float[np.ndarray, "F C"], *, log: bool, ends: tuple[float, float] | None = None
) -> tuple[np.ndarray, tuple[float, float]]:
    """Looks of all codes on one scale for all snapshots, and its ends."""
    known = values[np.isfinite(values) & (values >= 0)]
    least, most = ends or ((float(known.min()), float(known.max())) if known.size else (0.0, 1.0))
    if ends:  # a scale of shares, whose lower end stands for all below
        low, high, shown = np.log(least), np.log(most), np.log(np.clip(values, least, most))
    elif log:
        low, high, shown = np.log1p(least), np.log1p(most), np.log1p(np.clip(values, least, most))
    else:
        low, high, shown = least, most, np.clip(values, least, most)
    level = (np.nan_to_num(LEVELS * (shown - low) / max(high - low, 1e-12))).astype(int).clip(0, LEVELS - 1)
    looks = np.where(data.hits > 0, IN_USE + level, DEAD + level)
    return np.where(np.isfinite(values) & (values >= 0), looks, PLAIN).astype(np.uint8), (least, most)


def _some_steps(data: MapData, which: Bool[np.ndarray, "F"]) -> str:
    """The first of some snapshots' steps, for readers."""
    steps = [f"{data.steps[frame]:,}" for frame in np.flatnonzero(which)]
    return f"{', '.join(steps[:5])}{' …' if len(steps) > 5 else ''}"


def _by_hits(data: MapData) -> Coloring:
    values = np.where(data.hits > 0, data.hits, np.nan)
    levels, (least, most) = _scaled(data, values, log=True)
    tokens = sorted({int(count) for count in data.tokens})
    of = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    return Coloring(name="hits", unit=f"hits in {of} {data.counted}, log scale", levels=levels, least=least, most=most)


def _by_idle(data: MapData) -> Coloring:
    without = (data.idle == NOT_STORED).all(1)  # (F,)
    if without.all():
        raise ViewError(
            f"{data.name} did not store when training last hit each code: it is from an older version, or was not "
            "trained by ibqlab"
        )
    levels, (least, most) = _scaled(data, data.idle.astype(np.float64), log=True)
    notes = ["Codes that training never hit have no value."] if (data.idle == NEVER).any() else []
    if without.any():
        notes.append(f"Last hits were not stored at step {_some_steps(data, without)}.")
    note = " ".join(notes)
    return Coloring(
        name="steps since last hit", unit="training steps, log scale", levels=levels, least=least, most=most, note=note
    )


def _by_norm(data: MapData) -> Coloring:
    levels, (least, most) = _scaled(data, data.norms.astype(np.float64), log=False)
    return Coloring(name="norm", unit="L2 norm in the features' units", levels=levels, least=least, most=most)


def _by_drift(data: MapData) -> Coloring:
    values = data.drift.astype(np.float64).copy()
    values[0] = np.nan
    if len(data.steps) < 2:
        raise ViewError(f"{data.name} has one snapshot alone; drift is measured between two")
    levels, (least, most) = _scaled(data, values, log=False)
    unit = "L2 distance moved since the snapshot before"
    note = f"Step {data.steps[0]:,} is the first snapshot, so nothing has moved yet."
    return Coloring(name="drift", unit=unit, levels=levels, least=least, most=most, note=note)


def _by_reach(data: MapData) -> Coloring:
    if not np.isfinite(data.reach).any():
        raise ViewError(
            f"{data.name} stored no gradient per code: it is from an older version, was not trained by ibqlab, or its "
            "codebook learns without gradients"
        )
    largest = np.nanmax(np.where(np.isfinite(data.reach), data.reach, 0.0), axis=1, keepdims=True)
    values = np.where(data.reach > 0, data.reach / np.maximum(largest, 1e-30), np.nan)
    levels, (least, most) = _scaled(data, values, log=True, ends=(REACH_FLOOR, 1.0))
    empty = ~np.isfinite(data.reach).any(1)  # (F,)
    note = "Codes without any gradient have no value."
    if empty.any():
        note += f" No gradient was stored at step {_some_steps(data, empty)}."
    unit = "gradient norm, as a share of the largest of the step, log scale"
    return Coloring(name="gradient reach", unit=unit, levels=levels, least=least, most=most, note=note)


def _by_class(data: MapData, index: PatchIndex | None, without_index: str) -> Coloring:
    if index is None:
        raise ViewError(f"Classes are read from the tokens of images, and there are none: {without_index}")
    if len(index.classes) < 2:
        raise ViewError(f"The images of {data.name} have no classes")
    squares = index.codes.shape[1] * index.codes.shape[2]
    labels = np.repeat(index.labels, squares)
    known = labels >= 0
    pairs = index.codes.ravel()[known].astype(np.int64) * len(index.classes) + labels[known]
    counts = np.bincount(pairs, minlength=index.codebook_size * len(index.classes))
    counts = counts.reshape(index.codebook_size, -1)[data.code_ids]  # (C, classes)
    largest = counts.argmax(1)
    order = np.argsort(-np.bincount(largest[counts.any(1)], minlength=len(index.classes)), kind="stable")
    room = LEVELS if len(index.classes) <= LEVELS else LEVELS - 1
    slots = np.full(len(index.classes), LEVELS - 1)
    own = np.sort(order[:room])
    slots[own] = np.arange(len(own))
    names = [index.classes[i] for i in own]
    if len(index.classes) > LEVELS:
        names.append("other classes")
    level = np.where(counts.any(1), IN_USE + slots[largest], PLAIN).astype(np.uint8)
    return Coloring(
        name="class",
        unit=f"class that most of a code's tokens come from, in {len(index.codes):,} images",
        levels=np.broadcast_to(level, (len(data.steps), len(level))),
        names=tuple(names),
        note=f"Classes are of the network {_moment(index)}, at every step alike; codes without a token in these images "
        "have no value.",
    )


def _moment(index: PatchIndex) -> str:
    return "of this file" if index.step is None else f"of step {index.step:,}, the last checkpoint"


COLORINGS: dict[str, Callable[[MapData], Coloring]] = {
    "hits": _by_hits,
    "steps since last hit": _by_idle,
    "norm": _by_norm,
    "drift": _by_drift,
    "gradient reach": _by_reach,
}
NAMES = (*COLORINGS, "class")
"""What codes may be coloured by."""
