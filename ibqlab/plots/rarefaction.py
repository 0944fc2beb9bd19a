"""Usage against the number of tokens looked at, several tokenizers in one panel."""

from collections.abc import Mapping

import pandas as pd
from jaxtyping import Int
from matplotlib.figure import Figure
from numpy import ndarray

from ibqlab.base.measures import measure
from ibqlab.plots import style
from ibqlab.plots.explain import rarefaction_table
from ibqlab.plots.printing import PAGE_WIDTH, styled_figure
from ibqlab.plots.steps import finish_panel, write_numbers

_MARKS = 6
"""Markers along a line."""


def tokenizer_rarefaction_table(counts: Mapping[str, Int[ndarray, " K"]]) -> pd.DataFrame:
    """The numbers behind `plot_tokenizer_rarefaction`: `rarefaction_table` of the images that were measured.

    Args:
        counts: label → hits per code; labels without a hit are left out.
    """
    return rarefaction_table(counts, "tokens of the measured images")


def plot_tokenizer_rarefaction(table: pd.DataFrame) -> Figure:
    """Usage to expect from fewer tokens than were counted, one line per tokenizer, thin: even use of its codes.

    Two tokenizers compare at one number of tokens only. A line that still rises at its end has not seen all codes that
    are in use, one that is flat has, and what it misses is dead. Below its thin line it uses codes unevenly.

    Args:
        table: of `tokenizer_rarefaction_table`: label, tokens, usage and even (shares), codebook_size, source.
    Returns:
        The figure.
    Raises:
        ValueError: a missing column.
    """
    style.require_columns(table, ["label", "tokens", "usage", "even", "codebook_size", "source"], "a rarefaction table")
    quantity = measure("usage")
    labels = list(dict.fromkeys(table["label"]))
    looks = style.styles_for(labels)
    with styled_figure(PAGE_WIDTH, 3.6 + 0.1 * len(labels)) as figure:
        axes = figure.subplots()
        for label in labels:
            rows, look = table[table["label"] == label], looks[label]
            name = f"{look.label} (K = {int(rows['codebook_size'].iloc[0]):,})"
            every = max(1, len(rows) // _MARKS)
            axes.plot(
                rows["tokens"], quantity.scale * rows["usage"], **look.look, markersize=5, markevery=every, label=name
            )
            axes.plot(rows["tokens"], quantity.scale * rows["even"], color=look.color, linewidth=0.6)
        finish_panel(axes, quantity, title="")
        axes.set(xscale="log", xlabel="tokens looked at")
        write_numbers(axes.xaxis, ",.0f")
        figure.legend(loc="outside upper center", ncols=style.even_columns(len(labels), 3))
        style.add_caption(figure, f"thin: even use of all codes; {table['source'].iloc[0]}, drawn without replacement")
    return figure
