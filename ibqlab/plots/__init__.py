"""Figures of codebooks, runs and samples. Each plot function returns a matplotlib Figure; a table function beside it
gives the numbers drawn, and either draws again from its saved CSV. What a measure is called, its unit and its scale
come from `ibqlab.base.measures`; colours, markers and line styles mean the same in every figure. Start reading at
`run_curves`, the smallest, and `style`.

    figure = plot_run_curves(run.metrics)
    save_figure(figure, "curves.png", run_curve_table(run.metrics))

run_curves.py       one run while it trains, a tokenizer's or a generator's
curves.py           usage, perplexity and gradient reach of several methods against the training step
explain.py          what explains a run: band, norms, margins, drift, lives of codes, rarefaction
alarms.py           steps at which the alarm went off
norms.py            norms of features and codes, and how far the softmax over codes is spread
steps.py            what panels against the training step share
histogram.py        hits per code by rank
code_map.py         codes and features in one plane, dead codes marked
map_details.py      what the marks of a map would hide
lab.py              several methods of the lab in one plane, and as an animation
lab_plane.py        the plane of a lab, the same for all methods and steps
reconstructions.py  images before and after the codebook
gallery.py          generated images, class by setting
metric_dots.py      several tokenizers, metric by metric
protocol_dots.py    several tokenizers under two protocols
rarefaction.py      usage against tokens looked at, several tokenizers
ablation_dots.py    one table of a paper: rows, measures, seeds, the paper's numbers
scaling.py          usage and PSNR against codebook size
power_laws.py       what grows or falls with the codebook, fitted
token_link.py       what tokens cost a generator, for one tokenizer
token_scaling.py    the same, for several tokenizers
style.py            colours, line styles, captions
printing.py         the house style, and saving a figure with its data
"""

from ibqlab.plots.code_map import code_map_table, plot_code_map, plot_code_maps
from ibqlab.plots.curves import collapse_curve_table, plot_collapse_curves
from ibqlab.plots.gallery import plot_gallery
from ibqlab.plots.histogram import plot_usage_histogram, usage_histogram_table
from ibqlab.plots.metric_dots import plot_metric_dots
from ibqlab.plots.norms import norm_curve_table, plot_norm_curves
from ibqlab.plots.printing import save_figure
from ibqlab.plots.protocol_dots import plot_protocol_dots
from ibqlab.plots.rarefaction import plot_tokenizer_rarefaction, tokenizer_rarefaction_table
from ibqlab.plots.reconstructions import plot_reconstructions, reconstruction_table
from ibqlab.plots.run_curves import generator_curve_table, plot_generator_curves, plot_run_curves, run_curve_table
from ibqlab.plots.scaling import plot_scaling, scaling_table
from ibqlab.plots.style import METHOD_STYLES
from ibqlab.plots.token_link import plot_token_link, token_link_table
from ibqlab.plots.token_scaling import plot_token_scaling, token_scaling_table

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
    "plot_protocol_dots",
    "plot_reconstructions",
    "plot_run_curves",
    "plot_scaling",
    "plot_token_link",
    "plot_token_scaling",
    "plot_tokenizer_rarefaction",
    "plot_usage_histogram",
    "reconstruction_table",
    "run_curve_table",
    "save_figure",
    "scaling_table",
    "token_link_table",
    "token_scaling_table",
    "tokenizer_rarefaction_table",
    "usage_histogram_table",
]
