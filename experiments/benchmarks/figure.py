"""The benchmark's figure: time and memory of index backpropagation against the codebook's size."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ibqlab.plots.style import PAGE_WIDTH, add_caption, fix_tick_size, styled_figure, styles_for


def plot_against_codebook_size(table: pd.DataFrame) -> Figure:
    """Two panels with logarithmic axes: seconds forward and backward, and peak memory above the inputs in MB.

    Colour: form. Line style: tokens. Dotted grey: the matrix products alone.

    Args:
        table: rows of the benchmark for one method and one device.
    Returns:
        The figure.
    """
    table = table[table["dtype"] == "float32"]
    forms = styles_for([f"{form}, N = {tokens:,}" for form, tokens in _lines(table)])
    with styled_figure(PAGE_WIDTH, 3.6) as figure:
        time, memory = figure.subplots(1, 2)
        for (form, tokens), look in zip(_lines(table), forms.values(), strict=True):
            line = table[(table["form"] == form) & (table["tokens"] == tokens)].sort_values("codes")
            style = {"color": look.color, "marker": look.marker, "linestyle": "-" if form == "ibqlab" else "--"}
            time.plot(line["codes"], line["seconds"], label=look.label, **style)
            memory.plot(line["codes"], line["peak_mb"], **style)
            if form == "ibqlab":
                floor = {"color": look.color, "linestyle": ":", "marker": ""}
                time.plot(line["codes"], line["floor_s"], label=f"matrix products alone, N = {tokens:,}", **floor)
        time.set_ylabel("time forward and backward (s, log scale)")
        memory.set_ylabel("peak memory above the inputs (MB, log scale)")
        for axes in (time, memory):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sorted(table["codes"].unique()))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
            axes.tick_params(axis="x", rotation=30)
            axes.set_xlabel("codebook size K (codes, log scale)")
            fix_tick_size(axes)
        figure.legend(*time.get_legend_handles_labels(), loc="outside upper center", ncols=2, handlelength=4)
        facts = table.iloc[0]
        add_caption(figure, f"D = {facts['dim']}, float32, both entropies, {facts['device']}, torch {facts['torch']}")
    return figure


def _lines(table: pd.DataFrame) -> list[tuple[str, int]]:
    pairs = table[["form", "tokens"]].drop_duplicates()
    return sorted(pairs.itertuples(index=False, name=None), key=lambda pair: (pair[0] != "ibqlab", pair[1]))
