"""How evenly codes are used: hits by rank."""

import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from ibqlab.plots.style import (
    PAGE_WIDTH,
    REFERENCE_GREY,
    add_caption,
    as_array,
    fix_tick_size,
    styled_figure,
    styles_for,
)


def usage_histogram_table(counts_by_label: dict[str, Int[np.ndarray, "_"] | Int[Tensor, "_"]]) -> pd.DataFrame:
    """The numbers behind `plot_usage_histogram`: codes of each codebook from the most to the least hit.

    Args:
        counts_by_label: label → hits per code, as many entries as codes, at least one hit in total.
    Returns:
        One row per code: label, rank (1 to K), hits, share (of that label's tokens, 0 to 1), tokens, codebook_size.
    Raises:
        ValueError: no label, or counts without a single hit.
    """
    if not counts_by_label:
        raise ValueError("counts_by_label must hold at least one codebook; got none")
    return pd.concat([_ranked(label, as_array(counts)) for label, counts in counts_by_label.items()], ignore_index=True)


def plot_usage_histogram(counts_by_label: dict[str, Int[np.ndarray, "_"] | Int[Tensor, "_"]]) -> Figure:
    """Share of tokens against the rank of the code, both logarithmic, one line per codebook.

    A flat line at 1/K (grey) is perfectly even use. A line that breaks off before K ends where the dead codes begin,
    which have no place on a logarithmic axis; the legend counts them.

    Args:
        counts_by_label: label → hits per code. Labels of built-in methods keep their look.
    Returns:
        The figure; its numbers are `usage_histogram_table(counts_by_label)`.
    Raises:
        ValueError: as for `usage_histogram_table`.
    """
    table = usage_histogram_table(counts_by_label)
    styles = styles_for(list(counts_by_label))
    with styled_figure(PAGE_WIDTH, 3.4) as figure:
        axes = figure.subplots()
        for label, codes in table.groupby("label", sort=False):
            style, live = styles[label], codes[codes["hits"] > 0]
            axes.plot(
                live["rank"],
                live["share"],
                color=style.color,
                linestyle=style.line,
                marker=style.marker,
                markersize=5,
                markevery=_log_spaced(len(live)),
                label=f"{style.label}: {len(codes) - len(live):,} of {len(codes):,} dead",
            )
        for size in sorted(table["codebook_size"].unique()):
            axes.plot([1, size], [1 / size] * 2, color=REFERENCE_GREY, linestyle=":", label=f"even use, 1/{size:,}")
        axes.set(xscale="log", yscale="log", xlabel="rank of the code, most used first", ylabel="share of tokens (%)")
        # Written out, since the exponents of 10⁻³ would be too small in print.
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        fix_tick_size(axes)
        figure.legend(loc="outside right center", handlelength=2.8)
        add_caption(figure, _caption(table))
    return figure


def _ranked(label: str, counts: Int[np.ndarray, "K"]) -> pd.DataFrame:
    """One codebook's codes in falling order of hits."""
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


def _log_spaced(points: int) -> list[int]:
    """Places of markers that look evenly spaced on a logarithmic axis, the last point among them."""
    return sorted({round(place) - 1 for place in np.geomspace(1, points, 8)})


def _caption(table: pd.DataFrame) -> str:
    """Tokens behind each line."""
    tokens = sorted(int(count) for count in table["tokens"].unique())
    if len(tokens) == 1:
        return f"{tokens[0]:,} tokens per codebook"
    return f"{tokens[0]:,} to {tokens[-1]:,} tokens per codebook"
