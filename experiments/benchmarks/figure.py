"""The benchmark's figure: time and memory of index backpropagation against the codebook's size."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from ibqlab.plots.printing import PAGE_WIDTH, fix_tick_size, styled_figure
from ibqlab.plots.style import METHOD_STYLES, REFERENCE_GREY, REFERENCE_LINE, add_caption, even_columns

LOOKS = {
    "written out": {"marker": METHOD_STYLES["ibq"].marker, "markerfacecolor": "white", "linewidth": 1.0},
    "ibqlab": {"marker": METHOD_STYLES["ibq"].marker, "linewidth": 1.8},
    "floor": {"linestyle": REFERENCE_LINE},
}
"""How each form is drawn: open, filled, and the dots of a reference."""
SHADES = ("#8CC5E8", "#0072B2", "#00304C")
"""Of IBQ's colour, for numbers of tokens from few to many."""
NAMES = {"written out": "written out, as published", "ibqlab": "ibqlab", "floor": "matrix products alone"}


def name_of(tokens: int) -> str:
    """A number of tokens as the legend calls it."""
    return f"N = {tokens:,}"


def plot_against_codebook_size(table: pd.DataFrame) -> Figure:
    """Two panels with logarithmic axes: seconds forward and backward, and peak memory above the inputs in MB.

    Shade: tokens N. Marker: form. The gap between the filled line and the dots is what is not a matrix product.

    Args:
        table: rows of the benchmark for one method and one device; numbers of tokens with at least two codebook sizes
            are drawn, float32 only.
    Returns:
        The figure.
    """
    table = table[table["dtype"] == "float32"].sort_values("codes")
    table = table[table.groupby("tokens")["codes"].transform("nunique") > 1]
    names = [name_of(tokens) for tokens in sorted(table["tokens"].unique())]
    shades = dict(zip(names, SHADES * len(names), strict=False))
    with styled_figure(PAGE_WIDTH, 3.9) as figure:
        time, memory = figure.subplots(1, 2)
        lone: list[str] = []
        for (tokens, form), line in table.groupby(["tokens", "form"]):
            style = {"color": shades[name_of(tokens)], "markersize": 4, **LOOKS[form]}
            if len(line) == 1:
                # A lone point has no line that tells what it is.
                one = line.iloc[0]
                form_name = NAMES[form].split(",")[0]
                lone.append(f"{form_name}, {name_of(tokens)}: {one['seconds']:.3g} s, {one['peak_mb']:.0f} MB")
            time.plot(line["codes"], line["seconds"], **style)
            memory.plot(line["codes"], line["peak_mb"], **style)
            if form == "ibqlab":
                time.plot(line["codes"], line["floor_s"], color=style["color"], **LOOKS["floor"])
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
        handles = [Line2D([], [], color=color, linewidth=4, label=name) for name, color in shades.items()]
        handles += [Line2D([], [], color=REFERENCE_GREY, label=NAMES[form], **look) for form, look in LOOKS.items()]
        columns = even_columns(len(handles), 3)
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=4)
        facts = table.iloc[0]
        device = facts["device"].replace("(R)", "")
        add_caption(
            figure,
            "".join(f"point without a line: {text}\n" for text in lone)
            + f"D = {facts['dim']}, float32, with both entropies; logarithmic axes\n{device}, torch {facts['torch']}",
        )
    return figure
