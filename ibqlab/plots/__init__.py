"""Figures: each function returns a matplotlib Figure, and a table function beside it gives the numbers drawn.

curves.py           usage, perplexity and gradient reach against the training step
histogram.py        hits per code by rank
code_map.py         codes and features in one plane, dead codes marked
map_details.py      what the marks of a map would hide
reconstructions.py  images before and after the codebook
run_curves.py       one tokenizer's run while it trains
generator_curves.py one generator's run while it trains
gallery.py          generated images, class by setting
metric_dots.py      several tokenizers, metric by metric
ablation_dots.py    one table of a paper: rows, measures, seeds, the paper's numbers
power_laws.py       what grows or falls with the codebook, fitted
scaling.py          usage and PSNR against codebook size
token_link.py       what tokens cost a generator, for one tokenizer and for several
style.py            colours, line styles, saving a figure with its data
"""

from ibqlab.plots.code_map import code_map_table, plot_code_map, plot_code_maps
from ibqlab.plots.curves import collapse_curve_table, plot_collapse_curves
from ibqlab.plots.gallery import plot_gallery
from ibqlab.plots.generator_curves import generator_curve_table, plot_generator_curves
from ibqlab.plots.histogram import plot_usage_histogram, usage_histogram_table
from ibqlab.plots.metric_dots import plot_metric_dots
from ibqlab.plots.norms import norm_curve_table, plot_norm_curves
from ibqlab.plots.reconstructions import plot_reconstructions, reconstruction_table
from ibqlab.plots.run_curves import plot_run_curves, run_curve_table
from ibqlab.plots.scaling import plot_scaling, scaling_table
from ibqlab.plots.style import METHOD_STYLES, save_figure
from ibqlab.plots.token_link import plot_token_link, plot_token_scaling, token_link_table, token_scaling_table

__all__ = [
    "METHOD_STYLES",
    "code_map_table",
    "collapse_curve_table",
    "generator_curve_table",
    "norm_curve_table",
    "plot_code_map",
    "plot_code_maps",
    "plot_collapse_curves",
    "plot_gallery",
    "plot_generator_curves",
    "plot_metric_dots",
    "plot_norm_curves",
    "plot_reconstructions",
    "plot_run_curves",
    "plot_scaling",
    "plot_token_link",
    "plot_token_scaling",
    "plot_usage_histogram",
    "reconstruction_table",
    "run_curve_table",
    "save_figure",
    "scaling_table",
    "token_link_table",
    "token_scaling_table",
    "usage_histogram_table",
]
