"""Figures say what they show: labels, lines, numbers behind them, nothing cut off."""

import itertools
import shutil
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFTBASE, CARETRIGHTBASE
from matplotlib.text import Text
from PIL import Image

from ibqlab.base.intervals import exponent_text
from ibqlab.base.measures import Quantity
from ibqlab.diagnostics import project_codes
from ibqlab.plots import (
    METHOD_STYLES,
    code_map_table,
    collapse_curve_table,
    norm_curve_table,
    plot_code_map,
    plot_code_maps,
    plot_collapse_curves,
    plot_norm_curves,
    plot_reconstructions,
    plot_scaling,
    plot_token_link,
    plot_token_scaling,
    plot_usage_histogram,
    reconstruction_table,
    save_figure,
    scaling_table,
    token_link_table,
    token_scaling_table,
    usage_histogram_table,
)
from ibqlab.plots.ablation_dots import plot_ablation
from ibqlab.plots.power_laws import exponent_title, plot_power_laws, supported_intervals
from ibqlab.plots.printing import styled_figure
from ibqlab.plots.style import (
    OTHER_LOOKS,
    REFERENCE_LINE,
    START_LINES,
    VALIDATION_LOOK,
    add_caption,
    at_least,
    even_columns,
    mark_too_short,
    styles_for,
)
from ibqlab.quantizers import INITIALISATIONS
from ibqlab.tokens.report import ModelCost, report_tokens


@pytest.fixture(autouse=True)
def _global_style_stays():
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before


@pytest.fixture(scope="module")
def metrics():
    rows = [
        {
            "step": step,
            "method": method,
            "seed": seed,
            "init": init,
            "usage": (0.5 if method == "ibq" else 0.01) + 0.01 * seed,
            "usage_tokens": 10_240,
            "perplexity": 100.0 + seed if method == "ibq" else 2.0,
            "gradient_reach": 0.9 if step else np.nan,
            "codebook_size": 1024,
            "code_dim": 64,
        }
        for method in ("vq", "ibq")
        for init in ("U(±1/K)", "N(0, 1)")
        for seed in range(3)
        for step in (0, 10, 20)
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def projection():
    rng = np.random.default_rng(0)
    frames = [rng.normal(size=(30, 4)).astype(np.float32) for _ in range(2)]
    return project_codes(frames, rng.normal(size=(50, 4)).astype(np.float32), "pca")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)


def _texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def _legend(figure: Figure) -> list[tuple[Text, Line2D]]:
    legend = figure.legends[0]
    return list(zip(legend.get_texts(), legend.get_lines(), strict=True))


def _assert_readable(figure: Figure) -> None:
    """At least 8 points everywhere, nothing beyond the edge of the page, no upright label longer than its panel."""
    figure.draw_without_rendering()
    for text in figure.findobj(Text):
        assert text.get_fontsize() >= 8 or not text.get_text(), text
    for axes in figure.axes:
        label, panel = axes.yaxis.label, axes.get_window_extent()
        if axes.get_visible() and label.get_text() and label.get_rotation() == 90:
            length = label.get_window_extent().height
            assert length <= 1.02 * panel.height, f"{label.get_text()!r}: {length:.0f} of {panel.height:.0f} pixels"
    drawn, page = figure.get_tightbbox(), figure.bbox_inches
    assert drawn.x0 > -0.02 and drawn.y0 > -0.02, f"cut off at the left or bottom: {drawn}"
    assert drawn.x1 < page.x1 + 0.02 and drawn.y1 < page.y1 + 0.02, f"cut off at the right or top: {drawn}"


def test_collapse_table_holds_mean_and_range_over_seeds(metrics):
    table = collapse_curve_table(metrics)
    assert len(table) == 2 * 2 * 3
    row = table.query("method == 'ibq' and init == 'N(0, 1)' and step == 20").iloc[0]
    assert (row.usage_min, row.usage_mean, row.usage_max) == pytest.approx((0.5, 0.51, 0.52))
    assert (row.perplexity_min, row.perplexity_max, row.seeds) == (100, 102, 3)
    assert table[["method", "init"]].drop_duplicates().values.tolist() == [
        ["vq", "U(±1/K)"],
        ["vq", "N(0, 1)"],
        ["ibq", "U(±1/K)"],
        ["ibq", "N(0, 1)"],
    ]


def test_collapse_curves_draw_the_table(metrics):
    figure = plot_collapse_curves(metrics)
    table = collapse_curve_table(metrics)
    usage, perplexity, reach = figure.axes[:3]
    uniform, normal = ({line.get_label(): line for line in figure.axes[row].get_lines()} for row in (0, 3))
    # Methods are compared from the same start: a row of panels for each.
    assert list(uniform) == ["vq, U(±1/K)", "ibq, U(±1/K)"] and list(normal) == ["vq, N(0, 1)", "ibq, N(0, 1)"]
    assert [row.get_suptitle() for row in figure.subfigs] == ["all from U(±1/K)", "all from N(0, 1)"]
    lines = uniform | normal
    group = table.query("method == 'ibq' and init == 'U(±1/K)'")
    line = lines["ibq, U(±1/K)"]
    assert line.get_ydata() == pytest.approx(100 * group["usage_mean"].to_numpy())
    assert line.get_color() == METHOD_STYLES["ibq"].color
    assert line.get_linestyle() != lines["ibq, N(0, 1)"].get_linestyle()
    assert line._unscaled_dash_pattern[1], "U(±1/K) is dashed in every figure"
    assert not lines["ibq, N(0, 1)"]._unscaled_dash_pattern[1], "N(0, 1) is solid"
    # Reach has no value at step 0: the line begins at the first measured step.
    assert reach.get_lines()[0].get_xdata().tolist() == [10, 20]
    assert perplexity.get_yscale() == "log"
    assert [axes.get_xlabel() for axes in figure.axes] == ["training step"] * 6
    assert (usage.get_title(), reach.get_title()) == ("Usage (window)", "Gradient reach")
    assert usage.get_ylabel() == "codes hit (%)" and "K = 1,024" in figure.get_supxlabel()
    assert perplexity.get_ylabel() == "perplexity (codes)"
    caption = figure.get_supxlabel().replace("\n", " ")
    for fact in ("K = 1,024, D = 64", "the last 10,240 training tokens", "3 seeds"):
        assert fact in caption
    assert "reads low" not in caption
    legend = {text.get_text(): line for text, line in _legend(figure)}
    assert list(legend) == ["VQ", "IBQ", "start U(±1/K)", "start N(0, 1)"]
    assert legend["IBQ"].get_linewidth() == line.get_linewidth() < legend["VQ"].get_linewidth()
    _assert_readable(figure)


def test_methods_with_one_start_share_a_row(metrics):
    own = metrics[(metrics["method"] == "vq") == (metrics["init"] == "U(±1/K)")]
    figure = plot_collapse_curves(own)
    assert len(figure.axes) == 3 and len(figure.axes[0].get_lines()) == 2


def test_collapse_curves_draw_from_their_csv(metrics, tmp_path):
    table = collapse_curve_table(metrics)
    table.to_csv(tmp_path / "a.csv", index=False)
    first, second = plot_collapse_curves(metrics), plot_collapse_curves(pd.read_csv(tmp_path / "a.csv"))
    assert first.get_supxlabel() == second.get_supxlabel()
    for ours, again in zip(first.axes, second.axes, strict=True):
        for line, other in zip(ours.get_lines(), again.get_lines(), strict=True):
            assert other.get_ydata() == pytest.approx(line.get_ydata())


def test_lines_that_coincide_both_show(metrics):
    """The later one is thinner, and their markers stand elsewhere."""
    steps = [metrics.assign(step=metrics["step"] + 30 * n) for n in range(10)]
    same = pd.concat([part.assign(usage=0.5) for part in steps]).query("init == 'N(0, 1)'")
    first, *_, last = plot_collapse_curves(same).axes[0].get_lines()
    assert first.get_linewidth() > last.get_linewidth() >= 1
    assert first.get_markevery() != last.get_markevery()


def test_collapse_is_drawn_without_memory_where_it_was_recorded(metrics):
    """The window still says 50 % after the validation has seen one code in ten: the curve must not."""
    metrics = metrics[metrics["init"] == "N(0, 1)"]
    probed = metrics.assign(
        validation_usage=np.where(metrics["step"] == 0, 1.0, 0.1),
        validation_perplexity=np.where(metrics["step"] == 0, 900.0, 40.0),
        validation_tokens=10_304,
        step_usage=np.where(metrics["step"] == 0, np.nan, 0.08),
        step_tokens=512,
    )
    figure = plot_collapse_curves(probed)
    usage, perplexity, _ = figure.axes
    assert usage.get_title() == "Usage"
    thick = [line for line in usage.get_lines() if not line.get_label().startswith("_")]
    thin = [line for line in usage.get_lines() if line.get_label() == "_beside"]
    assert len(thick) == len(thin) == 2
    assert thick[0].get_ydata() == pytest.approx([100, 10, 10]) and thin[0].get_ydata() == pytest.approx([8, 8])
    assert thin[0].get_linewidth() < thick[0].get_linewidth()
    assert perplexity.get_lines()[0].get_ydata() == pytest.approx([900, 40, 40])
    for fact in ("over 10,304 validation tokens;", "thin lines: usage over the step's own 512 tokens"):
        assert fact in figure.get_supxlabel().replace("\n", " ")
    _assert_readable(figure)
    assert [text.get_text() for text, _ in _legend(figure)][-1] == "each step's tokens"
    # Runs from before steps had a usage of their own show the window, and call it that.
    older = plot_collapse_curves(probed.drop(columns=["step_usage", "step_tokens"]))
    told = older.get_supxlabel().replace("\n", " ")
    assert "broad pale lines: usage over the window of the last 10,240 training tokens" in told
    text, window = _legend(older)[-1]
    assert text.get_text() == "window" and window.get_linewidth() > 3 and window.get_alpha() < 0.5
    assert "over the window of the last 10,240 training tokens" in plot_collapse_curves(
        metrics
    ).get_supxlabel().replace("\n", " ")


def test_first_steps_have_room(metrics):
    many = pd.concat([metrics.assign(step=metrics["step"] + start) for start in (1, 300)])
    assert plot_collapse_curves(many).axes[0].get_xscale() == "symlog"
    assert plot_collapse_curves(metrics).axes[0].get_xscale() == "linear"


def test_collapse_curves_warn_of_too_few_tokens(metrics):
    caption = plot_collapse_curves(metrics.assign(usage_tokens=1000)).get_supxlabel().replace("\n", " ")
    assert "fewer than 10·K = 10,240: reads low" in caption


def test_all_methods_fit_into_one_figure(metrics):
    many = pd.concat([metrics[metrics.method == "vq"].assign(method=name) for name in METHOD_STYLES])
    figure = plot_collapse_curves(many)
    assert len({line.get_color() for line in figure.axes[0].get_lines()}) == 7
    _assert_readable(figure)


def test_collapse_curves_refuse_what_one_figure_cannot_show(metrics):
    with pytest.raises(ValueError, match="missing usage_tokens"):
        plot_collapse_curves(metrics.drop(columns="usage_tokens"))
    with pytest.raises(ValueError, match="no rows"):
        plot_collapse_curves(metrics.iloc[:0])
    two = pd.concat([metrics, metrics.assign(codebook_size=256)])
    with pytest.raises(ValueError, match="one codebook size; got 256, 1,024"):
        plot_collapse_curves(two)


@pytest.fixture(scope="module")
def norms(metrics):
    one_start = metrics[metrics["init"] == "N(0, 1)"]
    return one_start.assign(
        row=one_start["method"].map({"vq": "VQ", "ibq": "IBQ, double quantization"}),
        feature_norm_mean=np.where(one_start["method"] == "ibq", 1.2, 8.0) + 0.1 * one_start["seed"],
        code_norm_mean=8.0,
        softmax_perplexity=500.0,
    )


def test_norm_curves_draw_their_table(norms):
    table = norm_curve_table(norms)
    assert list(table["row"].unique()) == ["VQ", "IBQ, double quantization"] and table["seeds"].eq(3).all()
    assert list(table["step"]) == [0, 10, 20] * 2
    ours = table[table["row"] != "VQ"].iloc[0]
    spread = [ours[f"feature_norm_mean_{part}"] for part in ("mean", "min", "max")]
    assert spread == pytest.approx([1.3, 1.2, 1.4])
    figure = plot_norm_curves(norms)
    norms_of, softmax, reach, usage = figure.axes
    # VQ has no softmax to draw.
    assert [len(axes.get_lines()) for axes in (norms_of, softmax, reach, usage)] == [4, 1, 2, 2]
    assert usage.get_lines()[1].get_ydata()[0] == pytest.approx(51)
    told = " ".join(_texts(figure))
    assert "IBQ, double quantization" in told and "K = 1,024, D = 64; usage over the window of" in told
    assert "training tokens; mean and range of 3 seeds" in told and "Usage (window)" in told
    own = plot_norm_curves(norms.assign(step_usage=0.25, step_tokens=512))
    assert own.axes[3].get_lines()[0].get_ydata() == pytest.approx([25, 25, 25])
    assert "usage over 512 tokens of each step" in own.get_supxlabel().replace("\n", " ")
    _assert_readable(figure)


def test_norm_curves_take_the_line_of_their_start(norms, tmp_path):
    starts = norms.assign(init=norms["method"].map({"vq": "U(±1/K)", "ibq": "N(0, 1)"}))
    norm_curve_table(starts).to_csv(tmp_path / "a.csv", index=False)
    for figure in (plot_norm_curves(starts), plot_norm_curves(pd.read_csv(tmp_path / "a.csv"))):
        vq, ibq = figure.axes[3].get_lines()
        assert vq._unscaled_dash_pattern == Line2D([], [], linestyle=START_LINES["U(±1/K)"])._unscaled_dash_pattern
        assert not ibq._unscaled_dash_pattern[1]
        assert [text.get_text() for text, _ in _legend(figure)][-2:] == ["start U(±1/K)", "start N(0, 1)"]


def test_norm_curves_refuse_missing_columns_and_no_lines(norms):
    with pytest.raises(ValueError, match="missing row"):
        plot_norm_curves(norms.drop(columns="row"))
    with pytest.raises(ValueError, match="train at least one run"):
        norm_curve_table(norms[:0])


def test_histogram_draws_live_codes_and_counts_the_dead():
    counts = {"vq": np.array([0, 90, 0, 10]), "ibq": torch.tensor([25, 25, 30, 20])}
    figure = plot_usage_histogram(counts)
    (axes,) = figure.axes
    vq, ibq, even = axes.get_lines()
    assert vq.get_xdata().tolist() == [1, 2]
    assert vq.get_ydata() == pytest.approx([0.9, 0.1])
    assert ibq.get_ydata() == pytest.approx([0.3, 0.25, 0.25, 0.2])
    assert list(even.get_ydata()) == [0.25, 0.25]
    assert [vq.get_label(), ibq.get_label()] == ["VQ: 2 of 4 dead", "IBQ: 0 of 4 dead"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_ylabel() == "share of tokens (%)"
    assert figure.get_supxlabel() == "hits of 4 codes; 100 tokens per codebook"
    table = usage_histogram_table(counts)
    assert table.groupby("label")["hits"].sum().to_dict() == {"vq": 100, "ibq": 100}
    _assert_readable(figure)


def test_a_lone_code_is_named_beside_its_ring():
    figure = plot_usage_histogram({"soft_vq": np.array([0, 100, 0, 0]), "vq": np.array([97, 1, 1, 1])})
    assert "one code takes all tokens:\nSoft VQ" in _texts(figure)
    told = _texts(plot_usage_histogram({"vq": np.array([97, 1, 1, 1])}))
    assert not any("one code takes" in text for text in told)


def test_counts_say_for_how_many_codes_they_were_taken():
    """Code numbers given for counts are whole numbers like them: the caption shows what became of them."""
    numbers = np.random.default_rng(0).integers(0, 16, 500)
    assert plot_usage_histogram({"vq": numbers}).get_supxlabel().startswith("hits of 500 codes; ")
    told = plot_usage_histogram(indices={"vq": numbers}, codebook_size=16).get_supxlabel()
    assert told == "hits of 16 codes; 500 tokens per codebook"


def test_histogram_takes_code_numbers_by_name():
    numbers = torch.tensor([[[0, 3], [3, 1]]])
    assert usage_histogram_table(indices={"vq": numbers}, codebook_size=4)["hits"].tolist() == [2, 1, 1, 0]
    with pytest.raises((ValueError, TypeError), match=r"shape \(1, 2, 2\): code numbers are passed as .*indices="):
        plot_usage_histogram({"vq": numbers})
    with pytest.raises(ValueError, match=r"one entry per code, codebook_size = 4; got 6: code numbers"):
        plot_usage_histogram({"vq": np.array([0, 3, 3, 1, 2, 2])}, codebook_size=4)
    with pytest.raises(ValueError, match=r"indices need codebook_size=K"):
        plot_usage_histogram(indices={"vq": numbers})
    for other in (np.array([0.5, 0.5]), np.array([-1, 3]), np.array([True, False])):
        with pytest.raises((ValueError, TypeError), match=r"must be hits per code|[Tt]ype-check error"):
            plot_usage_histogram({"vq": other})


def test_a_single_live_code_is_not_hidden():
    figure = plot_usage_histogram({"soft_vq": np.array([0, 100, 0, 0]), "vq": np.array([97, 1, 1, 1])})
    alone, other = figure.axes[0].get_lines()[:2]
    assert alone.get_xdata().tolist() == [1] and alone.get_markersize() > 1.5 * other.get_markersize()
    assert alone.get_zorder() > other.get_zorder() and alone.get_markerfacecolor() == "none"


def test_histograms_through_training_have_a_panel_per_run(tmp_path):
    rng = np.random.default_rng(0)
    counts = {
        f"{run}, default, step {step:,}": rng.integers(1, 50, 64)
        for run in ("vq from U(±1/K)", "ibq from N(0, 1)")
        for step in (0, 1500, 3000)
    }
    figure = plot_usage_histogram(counts)
    titles = [axes.get_legend().get_title().get_text() for axes in figure.axes]
    assert titles == ["VQ from U(±1/K), default", "IBQ from N(0, 1), default"]
    for axes in figure.axes:
        lines = axes.get_lines()[:3]
        assert [line.get_label().split(":")[0] for line in lines] == ["step 0", "step 1,500", "step 3,000"]
        tones = [_grey(line.get_color()) for line in lines]
        assert tones[0] > tones[1] + 15 and tones[1] > tones[2] + 15
    usage_histogram_table(counts).to_csv(tmp_path / "a.csv", index=False)
    assert _texts(plot_usage_histogram(pd.read_csv(tmp_path / "a.csv"))) == _texts(figure)
    _assert_readable(figure)


@pytest.mark.parametrize("lines", [1, 2, 4, 7])
def test_a_histograms_legend_leaves_the_lines_their_room(lines):
    counts = {f"ibq from N(0, 1), default, seed {n}": np.arange(1, 65) for n in range(lines)}
    figure = plot_usage_histogram(counts)
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().width > 0.75


def test_histogram_refuses_a_codebook_without_hits():
    with pytest.raises(ValueError, match="'vq' hold no hit"):
        plot_usage_histogram({"vq": np.zeros(4, int)})


def test_code_map_marks_dead_codes_where_they_are(projection):
    counts = 2 * (np.arange(30) % 3 * 5 + np.arange(30) % 2 * (np.arange(30) % 3 > 0))
    figure = plot_code_map(projection, frame=0, counts=counts, title="IBQ")
    axes = figure.axes[0]
    points = {drawn.get_label(): drawn for drawn in axes.collections}
    assert points["dead codes"].get_offsets().data == pytest.approx(projection.codes[0][counts == 0])
    # The most used below, so that no code hides another.
    order = np.argsort(-counts[counts > 0], kind="stable")
    assert points["codes in use"].get_offsets().data == pytest.approx(projection.codes[0][counts > 0][order])
    assert points["codes in use"].get_array().tolist() == counts[counts > 0][order].tolist()
    assert points["codes in use"].get_zorder() < points["dead codes"].get_zorder(), "the rarer kind lies on top"
    rare = plot_code_map(projection, counts=(np.arange(30) % 3 == 0) * 30)
    heights = {drawn.get_label(): drawn.get_zorder() for drawn in rare.axes[0].collections}
    assert heights["codes in use"] > heights["dead codes"]
    assert len(points["features"].get_offsets()) == 50
    assert axes.get_title() == "IBQ\n20 in use, 10 dead"
    assert axes.get_aspect() == 1
    assert axes.get_xlabel().startswith("PC 1 (")
    assert axes.get_xlabel().endswith(" % of variance)")
    caption = figure.get_supxlabel().replace("\n", " ")
    assert caption == (
        "PCA of codes and features, jointly fitted over 2 snapshots, 1 of them here; "
        f"drawn: all codes (K = 30; in use: hit in {counts.sum()} tokens), 50 encoder features"
    )
    assert f"hits per code in {counts.sum()} tokens" in _texts(figure)
    _assert_readable(figure)


def test_dead_codes_under_codes_in_use_are_magnified():
    rng = np.random.default_rng(0)
    codes = np.concatenate([rng.normal(size=(60, 2)) * 0.01, [[9.0, 9.0]]]).astype("f4")
    features = rng.normal(size=(80, 2)).astype("f4") * 4
    counts = np.arange(61) % 2 + (np.arange(61) == 60)
    panel = project_codes([codes], features, "pca", counts=[counts])
    figure = plot_code_map(panel, counts=counts)
    (square,) = figure.axes[0].child_axes
    dead = next(drawn for drawn in square.collections if drawn.get_label() == "dead codes").get_offsets().data
    (left, right), (bottom, top) = square.get_xlim(), square.get_ylim()
    inside = (dead >= (left, bottom)).all(1) & (dead <= (right, top)).all(1)
    assert inside.sum() > 20, "nearly all of the 30 dead codes"
    factor = next(text.get_text() for text in square.texts)
    panel_side, square_side = (np.ptp(axes.get_xlim()) for axes in (figure.axes[0], square))
    assert factor == f"×{0.42 * panel_side / square_side:,.0f}" and panel_side > 40 * square_side
    assert "squares magnify where codes crowd" in figure.get_supxlabel().replace("\n", " ")
    _assert_readable(figure)
    # Where nothing lies over them, or they lie apart, there is nothing to magnify.
    apart = plot_code_map(panel, counts=(np.arange(61) == 60).astype(int))
    spread = project_codes([rng.normal(size=(60, 2)).astype("f4")], features / 4, "pca")
    for other in (apart, plot_code_map(spread, counts=np.arange(60) % 2)):
        assert not other.axes[0].child_axes and "magnify" not in other.get_supxlabel()


def test_features_under_a_code_are_pointed_at():
    codes = np.random.default_rng(0).normal(size=(30, 2)).astype("f4")
    counts = np.eye(30, dtype=int)[4] * 90
    hidden = np.repeat(codes[4:5], 50, 0)
    figure = plot_code_map(project_codes([codes], hidden, "pca", counts=[counts]), counts=counts)
    pointer = next(text for text in figure.axes[0].texts if text.get_text() == "all features")
    used = next(drawn for drawn in figure.axes[0].collections if drawn.get_label() == "codes in use")
    assert pointer.xy == pytest.approx(tuple(used.get_offsets().data[0]), abs=1e-5)
    _assert_readable(figure)
    wide = plot_code_map(project_codes([codes], codes * 2, "pca", counts=[counts]), counts=counts)
    assert "all features" not in _texts(wide)


def test_headings_break_between_facts(projection):
    label = "Soft VQ from N(0, 1), default, step 1,500"
    figure = plot_code_maps({f"{label}{n}": (projection, 0, np.full(30, 10)) for n in range(3)})
    assert figure.axes[0].get_title().replace("\u00a0", " ").split("\n") == [
        "Soft VQ from",
        "N(0, 1), default",
        "step 1,5000",
        "30 in use, 0 dead",
    ]


def test_code_map_without_counts_calls_no_code_dead(projection):
    figure = plot_code_map(projection)
    points = {drawn.get_label(): len(drawn.get_offsets()) for drawn in figure.axes[0].collections}
    assert (points["codes"], points["dead codes"]) == (30, 0)
    assert "dead codes (no hit)" not in _texts(figure)


def test_code_map_survives_a_codebook_that_is_all_dead(projection):
    figure = plot_code_map(projection, counts=np.zeros(30, int))
    assert len(figure.axes) == 2, "the scale of hits stays, or axes would jump"
    assert "0 in use, 30 not hit in 0 tokens" in _texts(figure)


def test_few_tokens_call_no_code_dead(projection):
    counts = np.arange(30) % 2 * 19  # 285 tokens, fewer than 10·K
    for figure in (plot_code_map(projection, counts=counts), plot_usage_histogram({"mine": counts})):
        told = " ".join(_texts(figure))
        assert "15" in told and "not hit in 285 tokens" in told and "dead" not in told
    three = plot_code_maps({name: (projection, 0, counts) for name in "abc"})
    assert three.axes[0].get_title() == "a\n15 in use, 15 not hit\nin 285 tokens"


def test_a_scale_of_hits_can_be_fixed(projection):
    scales = [plot_code_map(projection, counts=np.full(30, hits), most_hits=900) for hits in (1, 40)]
    tops = [figure.axes[0].collections[-1].norm.vmax for figure in scales]
    assert tops == [900, 900]


def test_every_code_in_use_is_drawn_and_the_caption_counts_the_rest():
    rng = np.random.default_rng(0)
    codes, features = rng.normal(size=(400, 3)).astype("f4"), rng.normal(size=(900, 3)).astype("f4")
    for in_use in (1, 40, 350):
        counts = np.zeros(400, int)
        counts[rng.permutation(400)[:in_use]] = rng.integers(4000, 5000, in_use)
        thinned = project_codes([codes, codes + 1], features, "pca", counts=[counts, counts], max_points=200)
        panels = {"VQ": (thinned, 0, counts)}
        figure = plot_code_maps(panels)
        drawn = {points.get_label(): len(points.get_offsets()) for points in figure.axes[0].collections}
        table = code_map_table(panels)
        assert drawn["codes in use"] == (table["hits"] > 0).sum() == in_use
        assert 0 < drawn["dead codes"] < 400 - in_use
        assert figure.axes[0].get_title() == (
            f"VQ\n{in_use} in use, {400 - in_use} dead\n({drawn['dead codes']} of the dead drawn)"
        )
        caption = figure.get_supxlabel().replace("\n", " ")
        dead = f"every code in use and {drawn['dead codes']} of {400 - in_use} dead codes"
        assert f"{dead} (K = 400; in use: hit in {counts.sum():,} tokens), 100 of 900 encoder features" in caption
        _assert_readable(figure)


def test_maps_draw_from_their_csv(projection, tmp_path):
    counts = np.arange(30) % 3 * 5
    panels = {f"ibq, step {frame}": (projection, frame, counts * (1 + frame)) for frame in (0, 1)}
    code_map_table(panels).to_csv(tmp_path / "a.csv", index=False)
    first, again = plot_code_maps(panels), plot_code_maps(pd.read_csv(tmp_path / "a.csv"))
    assert _texts(first) == _texts(again)
    for ours, theirs in zip(first.axes[:2], again.axes[:2], strict=True):
        assert theirs.get_xlim() == pytest.approx(ours.get_xlim())
        for points, others in zip(ours.collections, theirs.collections, strict=True):
            assert others.get_offsets().data == pytest.approx(points.get_offsets().data)
    with pytest.raises(ValueError, match="missing method, frames"):
        plot_code_maps(pd.read_csv(tmp_path / "a.csv")[["panel", "kind", "id", "x", "y", "hits"]])


def _deuteranope(color) -> np.ndarray:
    """A colour as a deuteranope sees it, CIE L*a*b* (Machado, Oliveira and Fernandes 2009, severity 1)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(color)]
    seen = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(xyz) @ (np.array(seen) @ linear).clip(0, 1) / [0.9505, 1, 1.089] + 1e-9)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_dead_and_used_codes_differ_for_a_deuteranope(projection):
    figure = plot_code_map(projection, counts=np.arange(30))
    points = {drawn.get_label(): drawn for drawn in figure.axes[0].collections}
    dead = _deuteranope(points["dead codes"].get_edgecolor()[0][:3])
    for share in (0.0, 0.5, 1.0):
        used = _deuteranope(points["codes in use"].cmap(share)[:3])
        assert np.linalg.norm(used - dead) > 20


def test_maps_of_one_projection_share_axes_and_scale(projection):
    counts = np.full(30, 7)
    panels = {f"step {frame}": (projection, frame, counts) for frame in (0, 1)} | {"dead": (projection, 1, counts * 0)}
    figure = plot_code_maps(panels)
    first, second, _ = figure.axes[:3]
    assert first.get_xlim() == second.get_xlim()
    assert first.get_ylim() == second.get_ylim()
    table = code_map_table(panels)
    assert table.groupby(["panel", "kind"]).size().to_dict()[("step 1", "code")] == 30
    codes = table.query("panel == 'step 1' and kind == 'code'")[["x", "y"]].to_numpy()
    assert codes == pytest.approx(projection.codes[1])
    _assert_readable(figure)


def test_thinned_codes_take_their_own_hits():
    rng = np.random.default_rng(0)
    thinned = project_codes(
        [rng.normal(size=(200, 3)).astype("f4")], rng.normal(size=(200, 3)).astype("f4"), "pca", max_points=40
    )
    counts = np.arange(200)
    table = code_map_table({"a": (thinned, 0, counts)}).query("kind == 'code'")
    assert table["hits"].tolist() == table["id"].tolist() == thinned.code_ids[0].tolist()
    told = plot_code_map(thinned, counts=counts).get_supxlabel().replace("\n", " ")
    assert "20 of 199 codes in use (thinned: give project_codes the counts), 20 of 200 encoder features" in told
    assert "20 of 200 codes" in plot_code_map(thinned).get_supxlabel()
    with pytest.raises(ValueError, match="whole codebook, 200; got 20"):
        plot_code_map(thinned, counts=counts[:20])
    with pytest.raises(ValueError, match="frame must lie in -1 to 0"):
        plot_code_map(thinned, frame=1)


def test_reconstructions_show_psnr_of_every_row(images):
    shifted = np.where(images < 128, images + 2, images - 2).astype(np.uint8)
    rows = {"vq": shifted, "ibq": images}
    figure = plot_reconstructions(images, rows, max_images=4)
    assert len(figure.axes) == 3 * 4
    table = reconstruction_table(images, rows)
    expected = 10 * np.log10(255**2 / 4)
    assert table.query("label == 'vq'")["psnr_db"].tolist() == pytest.approx([expected] * 10)
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert labels == ["original", f"VQ\n{expected:.1f} dB", "IBQ\ninf dB"]
    # The four with most contrast, in their order.
    chosen = sorted(np.argsort(-images.mean(-1).std((1, 2)))[:4])
    for place, number in enumerate(chosen):
        assert (figure.axes[4 + place].images[0].get_array() == shifted[number]).all()
    assert "10 images of 8 × 8 pixels; drawn: the 4 with most contrast" in figure.get_supxlabel().replace("\n", " ")
    told = plot_reconstructions(images, rows, max_images=10, which="the first 10 of 160").get_supxlabel()
    assert told.replace("\n", " ") == "PSNR: mean over 10 images of 8 × 8 pixels, the first 10 of 160"
    _assert_readable(figure)
    _assert_readable(plot_reconstructions(images[:1], {"vq": images[:1]}))


def test_reconstructions_refuse_other_pictures(images):
    # Annotations, where they are checked, speak before the function's own messages do.
    with pytest.raises((ValueError, TypeError), match=r"must be uint8|Type-check error"):
        plot_reconstructions(images, {"vq": images.astype(np.float32)})
    with pytest.raises((ValueError, TypeError), match=r"same images|Type-check error"):
        plot_reconstructions(images, {"vq": images[:3]})


def test_saved_csv_is_what_the_figure_draws(tmp_path, metrics):
    paths = save_figure(
        plot_collapse_curves(metrics), tmp_path / "new" / "collapse_K1.5.png", collapse_curve_table(metrics)
    )
    assert [path.name for path in paths] == ["collapse_K1.5.png", "collapse_K1.5.csv"]
    pd.testing.assert_frame_equal(pd.read_csv(paths[1]), collapse_curve_table(metrics))
    with Image.open(paths[0]) as picture:
        assert picture.width == pytest.approx(7.2 * 180, abs=2)
    assert len(list(paths[0].parent.iterdir())) == 2
    with pytest.raises(ValueError, match=r"pass 'a\.png'"):
        save_figure(Figure(), tmp_path / "a.pdf", metrics)


def test_a_failed_save_leaves_the_old_figure(tmp_path, metrics, monkeypatch):
    old = save_figure(Figure(), tmp_path / "a", metrics)
    content = old[0].read_bytes()
    monkeypatch.setattr(Image.Image, "save", lambda _, part, *args, **settings: part.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_figure(Figure(), tmp_path / "a", metrics)
    assert old[0].read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.png"]


def test_a_figure_is_laid_out_again_only_where_it_has_changed(tmp_path, metrics, monkeypatch):
    figure = plot_collapse_curves(metrics)
    laid_out = []
    engine = type(figure.get_layout_engine())
    execute = engine.execute
    monkeypatch.setattr(engine, "execute", lambda *given: laid_out.append(given) or execute(*given))
    (png, _), dpi = save_figure(figure, tmp_path / "a", metrics), figure.dpi
    shown = figure._repr_png_()
    assert len(laid_out) == 1 and figure.dpi == dpi and isinstance(figure.get_layout_engine(), engine)
    assert Image.open(png).size == tuple(round(180 * inches) for inches in figure.get_size_inches())
    figure.axes[0].set_title("another\ntitle of\nfour\nlines")
    assert len(figure._repr_png_()) != len(shown) and len(laid_out) == 2


def test_notebooks_show_figures_under_any_backend(images):
    assert plot_reconstructions(images[:1], {"vq": images[:1]})._repr_png_().startswith(b"\x89PNG")


def test_styles_keep_methods_recognisable():
    styles = styles_for(["IBQ", "ibq, U(±1/K)", "vq_ema", "Soft VQ", "mine", "yours"])
    assert styles["IBQ"].color == styles["ibq, U(±1/K)"].color
    assert styles["IBQ"].line != styles["ibq, U(±1/K)"].line
    assert styles["ibq, U(±1/K)"].label == "IBQ, U(±1/K)"
    assert styles["vq_ema"].label == "VQ, moving average"
    assert styles["Soft VQ"].color == METHOD_STYLES["soft_vq"].color
    assert styles["mine"].color != styles["yours"].color
    assert styles["IBQ"].marker == styles["ibq, U(±1/K)"].marker
    assert set(START_LINES) == set(INITIALISATIONS.values())
    assert len({str(line) for line in (*START_LINES.values(), REFERENCE_LINE)}) == len(START_LINES) + 1
    markers = [style.marker for style in METHOD_STYLES.values()] + [marker for _, marker in OTHER_LOOKS]
    assert len(set(markers)) == len(markers) and VALIDATION_LOOK["marker"] not in markers
    colors = [to_hex(style.color) for style in METHOD_STYLES.values()]
    assert len(set(colors)) == len(colors) == len({style.marker for style in METHOD_STYLES.values()})


def _grey(color) -> float:
    """What a printer without colours makes of a colour, CIE L*, 0 to 100."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(color)]
    luminance = np.dot(linear, [0.2126, 0.7152, 0.0722])
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_variants_of_one_method_stay_apart_in_grey():
    names = ["IBQ", "IBQ, double quantization", "IBQ, deeper", "IBQ, wider", "IBQ, all"]
    looks = [styles_for(names)[name] for name in names]
    assert len({look.line for look in looks}) == 1
    for number, look in enumerate(looks):
        for other in looks[:number]:
            assert look.open_marker != other.open_marker or abs(_grey(look.color) - _grey(other.color)) > 15


@pytest.mark.parametrize("name", [r"$\frac{1}{0$", "_hidden", "a\nb\x1b[31m", "x" * 5000, "$", "ibq $x_", "ibq\u202e"])
def test_names_from_outside_harm_no_figure(metrics, name):
    figures = [
        plot_collapse_curves(metrics.assign(method=name)),
        plot_usage_histogram({name: np.array([1, 2]), "other": np.array([3, 0])}),
    ]
    for figure in figures:
        figure._repr_png_()
        assert "\x1b" not in "".join(_texts(figure)) and "\u202e" not in "".join(_texts(figure))
    assert len(figures[1].axes[0].get_legend_handles_labels()[1]) >= 2


def test_a_short_run_says_so_without_covering_anything(metrics):
    plain, marked = plot_collapse_curves(metrics), plot_collapse_curves(metrics)
    mark_too_short(marked, "12 steps")
    told = next(text for text in marked.findobj(Text) if text.get_text() == "12 steps: too short to mean anything")
    _assert_readable(marked)
    below = [axes.get_tightbbox().y1 for axes in marked.axes]
    assert told.get_window_extent().y0 > max(below)
    assert marked.get_figheight() > plain.get_figheight()


def test_captions_have_lines_of_like_length():
    with styled_figure(7.2, 2) as figure:
        add_caption(figure, "word " * 24 + "end")
    first, second = figure.get_supxlabel().split("\n")
    assert abs(len(first) - len(second)) < 12


@pytest.mark.parametrize(("entries", "most", "columns"), [(4, 3, 2), (5, 3, 3), (6, 6, 6), (7, 6, 4), (1, 3, 1)])
def test_legends_have_even_rows(entries, most, columns):
    assert even_columns(entries, most) == columns


def _token_report(codes=16, images=400, models=None, grid=(4, 6), labelled=True):
    rng = np.random.default_rng(codes)
    first = rng.integers(0, codes, (images, 1, grid[1]))
    tokens = np.where(rng.random((images, *grid)) < 0.3, rng.integers(0, codes, (images, *grid)), first)
    tokens = tokens.reshape(images, -1)
    labels = np.arange(images) % 3
    return report_tokens(
        tokens,
        tokens[::4],
        codes,
        grid,
        (32, 48),
        labels=(labels, labels[::4]) if labelled else None,
        models=models,
    )


@pytest.fixture(scope="module")
def token_report():
    by_position = np.linspace(3, 1, 24)
    return _token_report(
        models={
            "gen without class": ModelCost(bits=by_position + 0.5),
            "gen with class": ModelCost(bits=by_position, given_class=True),
            "only a mean": ModelCost(bits=2.5),
        }
    )


def test_token_link_draws_its_table(token_report):
    figure = plot_token_link(token_report, "IBQ")
    table = token_link_table(token_report)
    heat, dots = figure.axes[:2]
    curves = next(axes for axes in figure.axes if axes.get_ylabel() == "bits")
    entropy = table.query("name == 'entropy'")
    assert heat.images[0].get_array().ravel().tolist() == entropy["bits"].tolist()
    assert entropy[["row", "column"]].iloc[7].tolist() == [1, 1]
    means = table[table["position"].isna()]
    assert [line.get_xdata()[0] for line in dots.get_lines()] == pytest.approx(means["bits"].tolist())
    assert means["bits"].iloc[0] == 4
    written = _texts(figure)
    for name in ("uniform, log₂ K", "mixed, with class", "gen with class", "only a mean", "IBQ"):
        assert name in written
    assert f"{token_report.bits('mix'):.2f}" in written
    lines = {line.get_label(): line.get_ydata() for line in curves.get_lines()}
    assert list(lines) == ["entropy", "neighbours mixed", "gen without class", "gen with class"]
    assert lines["gen with class"] == pytest.approx(np.linspace(3, 1, 24))
    assert curves.get_xlabel() == "position of the token, row by row"
    caption = figure.get_supxlabel().replace("\u00a0", " ").replace("\n", " ")
    for fact in ("100.0 % of 16 codes in 9,600 tokens", "over 400 images", "100 validation images of 4 × 6 tokens"):
        assert fact in caption
    _assert_readable(figure)


def test_token_link_fills_what_knows_the_class(token_report):
    dots = next(axes for axes in plot_token_link(token_report).axes if axes.get_title() == "what a token costs")
    filled = [line.get_markerfacecolor() != "white" for line in dots.get_lines()]
    assert filled == token_report.table["given_class"].tolist()
    assert sum(filled) == 3


def test_token_link_calls_a_lower_bound_by_its_name():
    report = _token_report(codes=4096, images=50, labelled=False)
    assert report.entropy.lower_bound
    figure = plot_token_link(report)
    assert "entropy of the token\n(bits, lower bound)" in _texts(figure)
    assert "entropy (lower bound)" in _texts(figure)
    assert "codes not met before" in figure.get_supxlabel().replace("\n", " ").replace("\u00a0", " ")
    _assert_readable(figure)


def test_token_link_survives_a_constant_and_long_names():
    report = report_tokens(
        np.zeros((20, 4), int),
        np.zeros((5, 4), int),
        8,
        (2, 2),
        (4, 4),
        models={f"run-{'very-' * 9}long-{n} with class": ModelCost(bits=np.full(4, 0.1 * n)) for n in range(6)},
    )
    figure = plot_token_link(report)
    _assert_readable(figure)
    assert max(len(text) for axes in figure.axes for text in map(Text.get_text, axes.get_yticklabels())) <= 36


def test_token_scaling_shows_numberings_side_by_side():
    models = {
        "plain": ModelCost(bits=2.0, given_class=True),
        "permuted": ModelCost(bits=2.25, given_class=True, permuted=True),
    }
    reports = {"IBQ, K = 16": _token_report(models=models), "IBQ, K = 64": _token_report(64), "VQ": _token_report(16)}
    table = token_scaling_table(reports)
    assert table.groupby("tokenizer", sort=False)["name"].agg(list).to_dict() == {
        "IBQ, K = 16": ["unigram", "mix", "plain", "permuted"],
        "IBQ, K = 64": ["unigram", "mix"],
        "VQ": ["unigram", "mix"],
    }
    figure = plot_token_scaling(table)
    sizes, usage, pixels, _ = figure.axes
    points = [line for line in usage.get_lines() if line.get_marker() != "None"]
    assert [line.get_ydata()[0] for line in points] == pytest.approx(table["bits_per_token"].tolist())
    assert [line.get_markerfacecolor() == "white" for line in points] == table["permuted"].tolist()
    drawn = [line.get_ydata()[0] for line in pixels.get_lines() if line.get_marker() != "None"]
    assert drawn == pytest.approx(table["bits_per_pixel"].tolist())
    assert len({line.get_color() for line in points}) == 3
    # Two tokenizers of 16 codes stand beside each other.
    assert len({line.get_xdata()[0] for line in sizes.get_lines() if line.get_marker() != "None"}) == 3
    plain, permuted = points[2:4]
    moved = permuted.get_transform().transform((50, 2)) - plain.get_transform().transform((50, 2))
    assert moved == pytest.approx([13 / 72 * figure.dpi, 0])
    # A generator and the same with the class known are often equal: their marks stand back to back.
    assert {CARETLEFTBASE, CARETRIGHTBASE} >= {line.get_marker() for line in points[2:4]}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:3] == ["A  IBQ, K = 16", "B  IBQ, K = 64", "C  VQ"]
    assert "open: codes numbered anew" in legend
    _assert_readable(figure)


@pytest.mark.parametrize(("ratio", "text"), [(10.0, "10"), (12.9, "12"), (1234.5, "1,234"), (0.4, "0.4"), (1.0, "1")])
def test_tokens_per_code_are_told_as_whole_numbers(ratio, text):
    assert at_least(ratio) == text


def test_token_scaling_says_nothing_of_numberings_it_does_not_have():
    figure = plot_token_scaling(token_scaling_table({"IBQ": _token_report()}))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["A  IBQ", "uniform, log₂ K", "unigram", "neighbours mixed"]
    _assert_readable(figure)


def test_token_scaling_refuses_nothing_to_draw():
    with pytest.raises(ValueError, match="at least one tokenizer"):
        token_scaling_table({})
    with pytest.raises(ValueError, match="missing tokenizer,"):
        plot_token_scaling(token_scaling_table({"IBQ": _token_report()}).drop(columns="tokenizer"))


def _scaling(dims=(16, 64), seeds=2, sizes=(256, 1024, 4096)):
    runs = pd.DataFrame(
        [
            {"method": method, "init": init, "codebook_size": size, "code_dim": dim, "seed": seed}
            for method, init in (("vq", "U(±1/K)"), ("ibq", "N(0, 1)"))
            for dim in dims
            for size in sizes
            for seed in range(seeds)
        ]
    )
    return runs.assign(used=runs["codebook_size"] * 0.5)


def test_dimensions_have_looks_and_places_of_their_own():
    runs = _scaling(seeds=1)
    numbers = {f"validation_{name}_{part}": 0.5 for name in ("usage", "psnr") for part in ("mean", "min", "max")}
    table = scaling_table(runs.assign(**numbers, validation_tokens=10_240, seeds=1, steps=300))
    figure = plot_scaling(table)
    # 10,240 tokens for 4,096 codes are two and a half each.
    assert figure.get_supxlabel().endswith("300 steps, 1 seed, at least 2 validation tokens per code")
    lines = [container[0] for container in figure.axes[0].containers]
    assert len({(line.get_color(), line.get_markerfacecolor()) for line in lines}) == 4
    assert len({line.get_xdata()[0] for line in lines}) == 2, "dimensions stand beside each other"
    assert sorted(bool(line._unscaled_dash_pattern[1]) for line in lines) == [False, False, True, True], "U is dashed"


@pytest.mark.parametrize(("seeds", "sizes"), [(1, (256, 1024, 4096)), (3, (256, 1024)), (2, (256, 1024, 4096))])
def test_an_interval_needs_seeds_and_sizes(seeds, sizes):
    runs = _scaling(seeds=seeds, sizes=sizes)
    fit = {"factor": 0.5, "exponent": 1.0, "low": 0.9, "high": 1.1, "points": 6, "quantity": "used"}
    laws = pd.DataFrame([{"method": m, "code_dim": d, **fit} for m in ("vq", "ibq") for d in (16, 64)])
    told = " ".join(_texts(plot_power_laws(runs, laws, {"used": "codes in use"})))
    has_interval = seeds > 1 and len(sizes) > 2
    assert ("95 % interval" in told) == ("+0.90 to +1.10" in told) == has_interval
    assert ("of the slope through the 6 runs" in told.replace("\n", " ")) == has_interval
    shown = supported_intervals(runs, laws)
    assert exponent_title(shown) == ("exponent of K (95 % interval)" if has_interval else "exponent of K (no interval)")
    assert exponent_text(shown.iloc[0]) == ("+1.00 (+0.90 to +1.10)" if has_interval else "+1.00")


def test_an_exponent_of_nothing_has_no_sign():
    assert exponent_text(pd.Series({"exponent": -0.001, "low": -0.1, "high": 0.004})) == "0.00 (-0.10 to 0.00)"


def test_ablation_rows_say_what_was_run():
    shared = {"row": "K = 262,144", "method": "ibq", "measure": "psnr", "here": "ibq, K 4,096, D 64"}
    points = [{"kind": "mean", "value": 17.0, "low": 16, "high": 18}, {"kind": "seed", "value": 17.0, "seed": 0}]
    table = pd.DataFrame([{**shared, **point} for point in points])
    figure = plot_ablation(table, [Quantity("psnr", "rFID", "", "", "lower")], "Codebook size", "3 seeds")
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["IBQ, K 4,096, D 64\n(paper: K = 262,144)"]
    assert axes.get_xlabel() == "rFID\n(axis reversed)"
    ring = axes.get_lines()[-1]
    assert ring.get_ydata()[0] > 0.2 and ring.get_markerfacecolor() == "none", "beside the interval, not on it"
    assert ring.get_marker() == METHOD_STYLES["ibq"].marker


def test_committed_curves_draw_from_their_csv():
    figures = Path(__file__).resolve().parents[1] / "experiments" / "results" / "ablations_laptop" / "figures"
    assert len(plot_norm_curves(pd.read_csv(figures / "key_designs_norms.csv")).axes) == 4
    assert len(plot_collapse_curves(pd.read_csv(figures / "collapse.csv")).axes) == 3


def test_long_labels_of_dots_stay_apart():
    shared = {"method": "ibq", "kind": "mean", "here": "ibq, K 256, D 32; generator of 4 blocks, width 128", "seed": 0}
    rows = [
        shared | {"row": f"IBQ-{n}, 342M", "measure": key, "value": n, "low": n - 1, "high": n + 1}
        for n in range(1, 4)
        for key in "abcd"
    ]
    labels = ("Fréchet distance (digits)", "paper's gFID", "digits recognised, %", "paper's Inception Score")
    measures = [Quantity(key, label, "", "", "higher") for key, label in zip("abcd", labels, strict=True)]
    figure = plot_ablation(pd.DataFrame(rows), measures, "Generators", "3 seeds")
    _assert_readable(figure)
    boxes = [axes.xaxis.label.get_window_extent() for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    left, right = figure.axes[0].get_xlim()
    assert left < 0 and right > 4, "no mark is cut off at the edge"


def test_committed_costs_of_tokens_draw_from_their_csv(monkeypatch, tmp_path):
    experiments = Path(__file__).resolve().parents[1] / "experiments"
    monkeypatch.syspath_prepend(str(experiments))
    import redraw  # noqa: PLC0415 - a script, found beside its results

    for name in ("token_link_ibq-64", "token_link_ibq-64_table"):
        shutil.copy(experiments / "results" / "link_stages_laptop" / f"{name}.csv", tmp_path)
    table = pd.read_csv(tmp_path / "token_link_ibq-64.csv")
    report = redraw._token_report(tmp_path / "token_link_ibq-64.png", table)
    pd.testing.assert_frame_equal(token_link_table(report), table, check_dtype=False)
    told = plot_token_link(report, redraw._tokenizer("token_link_ibq-64"))
    assert told.get_suptitle() == "IBQ, K = 64"
    caption = told.get_supxlabel().replace("\u00a0", " ").replace("\n", " ")
    assert "360 validation images of 8 × 8 tokens for 16 × 16 pixels" in caption
    # Whether entropies are lower bounds stands in no CSV, so more codes than images are left alone.
    costs = pd.read_csv(tmp_path / "token_link_ibq-64_table.csv").assign(codebook_size=4096)
    costs.to_csv(tmp_path / "token_link_ibq-64_table.csv", index=False)
    with pytest.raises(ValueError, match="lower bounds"):
        redraw._token_report(tmp_path / "token_link_ibq-64.png", table)
