"""How evenly codes are used: hits by rank."""

import math
import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from ibqlab.diagnostics.usage import TOKENS_PER_CODE, count_indices
from ibqlab.plots import style
from ibqlab.plots.printing import PAGE_WIDTH, fix_tick_size, styled_figure

Counts = Int[np.ndarray, "..."] | Int[Tensor, "..."]
STEP = re.compile(r"^(.*), step ([\d,]+)$", re.DOTALL)
"""A run's label with the step of a snapshot."""
_MANY = 4
"""With more lines than this, labels that end with a step share a panel per run."""
_THROUGH_TRAINING = (2, 0, 1, 3)
"""Variants of a method's look from the first step on: light, its own, dark."""


def usage_histogram_table(
    counts_by_label: Mapping[str, Counts] | None = None,
    *,
    indices: Mapping[str, Counts] | None = None,
    codebook_size: int | None = None,
) -> pd.DataFrame:
    """The numbers behind `plot_usage_histogram`: codes of each codebook from the most to the least hit.

    Args:
        counts_by_label: label → hits per code (K,), at least one hit in total.
        indices: label → code numbers of any shape, in place of counts; they need codebook_size.
        codebook_size: K of all codebooks, where it is known; counts of another length are refused then.
    Returns:
        One row per code: label, rank (1 to K), hits, share (of that label's tokens, 0 to 1), tokens, codebook_size.
    Raises:
        ValueError: no label, counts and indices at once, what cannot be hits per code, or counts without a single hit.
    """
    if indices is not None:
        if counts_by_label is not None or codebook_size is None:
            raise ValueError(
                "indices need codebook_size=K and no counts beside them: pass indices={…}, codebook_size=K"
            )
        counts_by_label = {
            label: count_indices(torch.as_tensor(numbers), codebook_size) for label, numbers in indices.items()
        }
    if not counts_by_label:
        raise ValueError("counts_by_label must hold at least one codebook; got none")
    tables = [_ranked(label, style.as_array(counts), codebook_size) for label, counts in counts_by_label.items()]
    return pd.concat(tables, ignore_index=True)


def plot_usage_histogram(
    counts_by_label: Mapping[str, Counts] | pd.DataFrame | None = None,
    *,
    indices: Mapping[str, Counts] | None = None,
    codebook_size: int | None = None,
) -> Figure:
    """Share of tokens against the rank of the code, both logarithmic, one line per codebook.

    A flat line at 1/K (grey) is perfectly even use. A line that breaks off before K ends where the dead codes begin,
    which have no place on a logarithmic axis; the legend counts them. A codebook with one live code is a ring with its
    name beside it. Many labels that end with ", step N" get a panel per run, from light to dark through training.

    Args:
        counts_by_label: label → hits per code, or what `usage_histogram_table` returned. Labels of built-in methods
            keep their look. Code numbers are not counts: pass them as `indices`. In one dimension both are whole
            numbers and cannot be told apart, so give `codebook_size` to have the length checked; the caption says in
            any case how many codes the counts were taken for.
        indices: as for `usage_histogram_table`.
        codebook_size: likewise.
    Returns:
        The figure; its numbers are `usage_histogram_table(counts_by_label)`.
    Raises:
        ValueError: as for `usage_histogram_table`.
    """
    if isinstance(counts_by_label, pd.DataFrame):
        table = counts_by_label
    else:
        table = usage_histogram_table(counts_by_label, indices=indices, codebook_size=codebook_size)
    panels = _panels(list(dict.fromkeys(table["label"])))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    longest = max(len(looks) for looks in panels.values())
    # Legends stand above their panels.
    height = 3.2 + 0.19 * math.ceil(longest / 2) if len(panels) == 1 else (2.9 + 0.19 * longest) * rows + 0.4
    with styled_figure(PAGE_WIDTH, height) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes, (title, looks) in zip(grid.flat, panels.items(), strict=False):
            panel_rows = table[table["label"].isin(looks)]
            for order, (label, look) in enumerate(looks.items()):
                _draw(axes, panel_rows[panel_rows["label"] == label], look, order)
            for size in sorted(panel_rows["codebook_size"].unique()):
                axes.plot([1, size], [1 / size] * 2, label=f"even use, 1/{size:,}", **style.REFERENCE)
            _name_lone_codes(axes, panel_rows, looks)
            if len(panels) > 1:
                sizes = {"fontsize": 8, "title_fontsize": 9, "handlelength": 2}
                axes.legend(title=title, loc="lower left", bbox_to_anchor=(-0.05, 1), **sizes)
            _finish(axes)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        for axes in grid[-1]:
            axes.set_xlabel("rank of the code, most used first")
        for axes in grid[:, 0]:
            axes.set_ylabel("share of tokens (%)")
        if len(panels) == 1:
            figure.legend(loc="outside upper center", ncols=2, handlelength=2.8)
        # Whoever gave code numbers for counts sees it here.
        codes, tokens = style.number_range(table["codebook_size"]), style.number_range(table["tokens"])
        style.add_caption(figure, f"hits of {codes} codes; {tokens} tokens per codebook")
    return figure


def has_enough_tokens(tokens: float, codebook_size: float) -> bool:
    """Whether so many tokens are enough to call a code without a hit dead: 10·K; even use misses e⁻¹⁰ of them then."""
    return tokens >= TOKENS_PER_CODE * codebook_size


def _panels(labels: list[str]) -> dict[str, dict[str, style.LineStyle]]:
    """Which lines share a panel, and their looks: all in one, or one panel per run with its steps."""
    steps = {label: match for label in labels if (match := STEP.match(label))}
    if len(labels) <= _MANY or len(steps) < len(labels):
        return {"": style.styles_for(labels)}
    runs = style.styles_for(list(dict.fromkeys(match[1] for match in steps.values())))
    panels: dict[str, dict[str, style.LineStyle]] = {}
    for label, match in steps.items():
        look = runs[match[1]]
        looks = panels.setdefault(look.label, {})
        variant = _THROUGH_TRAINING[len(looks) % len(_THROUGH_TRAINING)]
        look = style.LineStyle(label=f"step {match[2]}", color=look.color, marker=look.marker)
        looks[label] = style.vary(look, variant)
    return panels


def _draw(axes: Axes, codes: pd.DataFrame, look: style.LineStyle, order: int) -> None:
    """One codebook's live codes. Later lines are thinner, so that lines that coincide both show."""
    live, tokens = codes[codes["hits"] > 0], int(codes["tokens"].iloc[0])
    state = "dead" if has_enough_tokens(tokens, len(codes)) else f"not hit in {tokens:,} tokens"
    alone = len(live) == 1
    marks = {"markersize": max(7, 13 - 3 * order), "markeredgewidth": 2, "zorder": 4} if alone else {"markersize": 4.5}
    axes.plot(
        live["rank"],
        live["share"],
        linewidth=max(1.0, 2.6 - 0.5 * order),
        markevery=_log_spaced(len(live), order),
        clip_on=not alone,
        label=f"{look.label}: {len(codes) - len(live):,} of {len(codes):,} {state}",
        **look.look | ({"markerfacecolor": "none"} if alone else {}),
        **marks,
    )


def _name_lone_codes(axes: Axes, panel_rows: pd.DataFrame, looks: dict[str, style.LineStyle]) -> None:
    """Name the codebooks that are a ring. Rings lie over each other, and grey paper does not tell them apart."""
    live = panel_rows[panel_rows["hits"] > 0].groupby("label").size()
    lone = [look.label for label, look in looks.items() if live[label] == 1]
    if lone:
        text = "one code takes all tokens:\n" + "\n".join(lone)
        style.add_note(axes, text, (1, 1), (14, 8), va="top")


def _finish(axes: Axes) -> None:
    axes.set(xscale="log", yscale="log")
    # Written out, since the exponents of 10⁻³ would be too small in print.
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    fix_tick_size(axes)


def _ranked(label: str, counts: np.ndarray, codebook_size: int | None) -> pd.DataFrame:
    """One codebook's codes in falling order of hits."""
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or not counts.size or counts.min() < 0:
        raise ValueError(
            f"counts of {label!r} must be hits per code, whole numbers ≥ 0 of shape (K,); got {counts.dtype} of shape "
            f"{counts.shape}: code numbers are passed as plot_usage_histogram(indices={{…}}, codebook_size=K)"
        )
    if codebook_size is not None and len(counts) != codebook_size:
        raise ValueError(
            f"counts of {label!r} must hold one entry per code, codebook_size = {codebook_size:,}; got "
            f"{len(counts):,}: code numbers are passed as indices={{…}}"
        )
    tokens = int(counts.sum())
    if tokens == 0:
        raise ValueError(f"counts of {label!r} hold no hit, so no share can be drawn: count some tokens first")
    hits = np.sort(counts)[::-1]
    size = len(counts)
    return pd.DataFrame(
        {
            "label": label,
            "rank": np.arange(1, size + 1),
            "hits": hits,
            "share": hits / tokens,
            "tokens": tokens,
            "codebook_size": size,
        }
    )


def _log_spaced(points: int, order: int) -> list[int]:
    """Where a line has markers: evenly spaced on a logarithmic axis, shifted from line to line, and at its end."""
    spaced = np.geomspace(1, points, 8) * points ** (order % 4 / 4 / 7)
    return sorted({min(points, round(number)) - 1 for number in spaced})
