"""The benchmark's figure: time and memory of index backpropagation against the codebook's size."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from ibqlab.plots.style import PAGE_WIDTH, LineStyle, add_caption, fix_tick_size, styled_figure

LINES = {"written out": "--", "ibqlab": "-", "floor": ":"}
LOOKS = (("#56B4E9", "o"), ("#0072B2", "s"), ("#000000", "D"), ("#D55E00", "^"))
"""Of numbers of tokens, from light to dark."""
NAMES = {"written out": "written out, as published", "ibqlab": "ibqlab", "floor": "matrix products alone"}


def name_of(tokens: int) -> str:
    """A number of tokens as the legend calls it."""
    return f"N = {tokens:,}"


def plot_against_codebook_size(table: pd.DataFrame) -> Figure:
    """Two panels with logarithmic axes: seconds forward and backward, and peak memory above the inputs in MB.

    Colour and marker: tokens N. Line: form. The gap between solid and dotted is what is not a matrix product.

    Args:
        table: rows of the benchmark for one method and one device; numbers of tokens with at least two codebook sizes
            are drawn, float32 only.
    Returns:
        The figure.
    """
    table = table[table["dtype"] == "float32"].sort_values("codes")
    table = table[table.groupby("tokens")["codes"].transform("nunique") > 1]
    names = [name_of(tokens) for tokens in sorted(table["tokens"].unique())]
    looks = {
        name: LineStyle(label=name, color=color, marker=marker)
        for name, (color, marker) in zip(names, LOOKS * len(names), strict=False)
    }
    with styled_figure(PAGE_WIDTH, 3.9) as figure:
        time, memory = figure.subplots(1, 2)
        lone: list[str] = []
        for (tokens, form), line in table.groupby(["tokens", "form"]):
            look = looks[name_of(tokens)]
            style = {"color": look.color, "marker": look.marker, "linestyle": LINES[form], "markersize": 4}
            if len(line) == 1:
                # A lone point has no line that tells what it is.
                one = line.iloc[0]
                form_name = NAMES[form].split(",")[0]
                lone.append(f"{form_name}, {name_of(tokens)}: {one['seconds']:.3g} s, {one['peak_mb']:.0f} MB")
            time.plot(line["codes"], line["seconds"], **style)
            memory.plot(line["codes"], line["peak_mb"], **style)
            if form == "ibqlab":
                time.plot(line["codes"], line["floor_s"], **style | {"linestyle": LINES["floor"], "marker": ""})
        time.set_ylabel("forward and backward (s)")
        memory.set_ylabel("peak above the inputs (MB)")
        for axes in (time, memory):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sorted(table["codes"].unique()))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
            axes.tick_params(axis="x", rotation=30)
            axes.set_xlabel("codebook size K (codes)")
            fix_tick_size(axes)
        handles = [Line2D([], [], color=look.color, marker=look.marker, label=name) for name, look in looks.items()]
        handles += [Line2D([], [], color="black", linestyle=LINES[form], label=NAMES[form]) for form in LINES]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, handlelength=4)
        facts = table.iloc[0]
        device = facts["device"].replace("(R)", "")
        add_caption(
            figure,
            "".join(f"point without a line: {text}\n" for text in lone)
            + f"D = {facts['dim']}, float32, with both entropies; logarithmic axes\n{device}, torch {facts['torch']}",
        )
    return figure
