"""What explains a codebook, against brute force, worked examples of textbooks, and sampling."""

import itertools
import math
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from ibqlab.diagnostics import geometry
from ibqlab.diagnostics.explain import SCALES, Drift, logit_scale_band, measure_drift
from ibqlab.diagnostics.geometry import code_feature_distances, measure_probe, softmax_perplexity, winner_margins
from ibqlab.diagnostics.lifetimes import code_lives, rarefaction, survival_curve
from ibqlab.diagnostics.recorder import Recorder
from ibqlab.plots import explain
from ibqlab.plots.printing import draw
from ibqlab.quantizers import build_quantizer

CODES, DIM = 12, 4


def vectors(seed, count, dim=DIM):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("tokens", "codes", "offset"), [(50, 40, 0.0), (40, 300, 30.0), (3, 2, 0.0)])
def test_all_measures_of_a_probe_are_those_of_the_functions_for_each(monkeypatch, tokens, codes, offset):
    draw = torch.Generator().manual_seed(tokens)
    features, codebook = (torch.randn(count, 6, generator=draw) + offset for count in (tokens, codes))
    distances, margins = code_feature_distances(codebook, features), winner_margins(features, codebook)
    expected = (
        *(float(softmax_perplexity(features, codebook).mean()), distances.feature_to_code, distances.code_to_feature),
        *(margins.distance, margins.logit),
    )
    assert measure_probe(features, codebook) == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr("ibqlab.diagnostics.geometry._BLOCK_ELEMENTS", 7 * codes)
    assert measure_probe(features, codebook) == pytest.approx(expected, rel=1e-4)


def test_a_probe_of_ties_and_of_what_is_not_finite():
    codes = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    tie = measure_probe(torch.tensor([[0.0, 1.0]]), codes)
    assert (tie.feature_to_code_distance, tie.winner_margin, tie.logit_margin) == (0, 0, 0)
    assert measure_probe(1e17 * codes, 1e17 * codes[:2]).feature_to_code_distance == 0
    for features, codebook in ((codes * math.nan, codes), (codes, codes * math.inf)):
        with pytest.raises(ValueError, match="must be finite"):
            measure_probe(features, codebook)
    with pytest.raises(ValueError, match="a feature and two codes; got 3 features and 1 codes"):
        measure_probe(codes, codes[:1])


# --- margins ---


@pytest.mark.parametrize("block", [1, 1 << 24])
def test_margins_equal_brute_force(block, monkeypatch):
    monkeypatch.setattr(geometry, "_BLOCK_ELEMENTS", block)
    features, codebook = vectors(0, 30), vectors(1, CODES)
    shares, gaps = [], []
    for z in features.tolist():
        near, far, *_ = sorted(math.dist(z, code) for code in codebook.tolist())
        first, second, *_ = sorted(sum(map(math.prod, zip(z, code, strict=True))) for code in codebook.tolist())[::-1]
        shares.append(1 - near / far)
        gaps.append(first - second)
    margins = winner_margins(features, codebook)
    assert margins.distance == pytest.approx(np.mean(shares), rel=1e-5)
    assert margins.logit == pytest.approx(np.mean(gaps), rel=1e-5)


def test_margins_at_their_ends():
    codes = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    tie, sure = winner_margins(torch.tensor([[0.0, 3.0]]), codes), winner_margins(codes, codes)
    assert (tie.distance, tie.logit) == (0, 0) and (sure.distance, sure.logit) == (1, 2)
    twice = winner_margins(codes[:1], codes[[0, 0, 1]])
    assert (twice.distance, twice.logit) == (0, 0)
    with pytest.raises(ValueError, match="a feature and two codes; got 1 features and 1 codes"):
        winner_margins(codes[:1], codes[:1])
    with pytest.raises(ValueError, match="must be finite"):
        winner_margins(codes * math.nan, codes)


def test_a_small_margin_survives_a_far_origin():
    codes = torch.tensor([[1000.0, 0.0], [1000.0, 0.01], [0.0, 0.0]])
    assert winner_margins(torch.tensor([[1000.0, 0.002]]), codes).distance == pytest.approx(0.75, abs=0.02)


# --- columns of the recorder ---


def recorded(stream, window=100):
    """A recorder's rows after batches of indices."""
    torch.manual_seed(3)
    recorder = Recorder(build_quantizer("vq", codebook_size=CODES, code_dim=DIM), window, 6)
    rows = []
    for step, batch in enumerate(stream, start=1):
        recorder.before_step()
        recorder.observe(torch.tensor(batch), step)
        with torch.no_grad():
            recorder.quantizer.codes.weight[0] += 0.5
        rows.append(recorder.report(vectors(step, len(batch)).T.reshape(1, DIM, 1, -1), step))
    return recorder, rows


def test_births_and_deaths_are_those_of_the_window():
    _, rows = recorded([[0, 1, 2, 3], [3, 4, 5, 5], [0, 0, 6, 6]], window=4)
    assert [(row.get("births"), row.get("deaths")) for row in rows] == [(None, None), (2, 3), (2, 3)]
    assert [(row["births"], row["deaths"]) for row in recorded([[0, 1], [1, 2], [2, 3]])[1][1:]] == [(1, 0), (1, 0)]


def test_codes_drift_by_what_a_step_moves_them():
    _, rows = recorded([[0, 1, 2, 3]])
    assert rows[0]["code_drift"] == pytest.approx(0.5 * math.sqrt(DIM) / CODES)


def test_the_quantization_error_is_of_the_codes_that_were_chosen():
    quantizer = build_quantizer("vq", codebook_size=CODES, code_dim=DIM, codebook_init="normal")
    recorder, tokens = Recorder(quantizer, 50, 4), vectors(5, 9)
    indices = torch.arange(9) % CODES
    recorder.observe(indices, 1)
    row = recorder.report(tokens.T.reshape(1, DIM, 1, -1), 1)
    kept = torch.arange(9)[::2][:4]  # every second of nine tokens, four in all
    expected = (tokens[kept] - quantizer.codebook.detach()[indices[kept]]).square().mean()
    assert row["quantization_error"] == pytest.approx(float(expected))
    assert "quantization_error" not in recorder.report(tokens[:5].T.reshape(1, DIM, 1, -1), 2)
    assert "code_drift" not in row


def test_what_lived_goes_into_the_state_and_old_states_do_without():
    stream = [[0, 1, 2, 3], [3, 4, 5, 5], [0, 0, 6, 6]]
    recorder, rows = recorded(stream[:2], window=4)
    for state, births in ((recorder.state_dict(), 2), ({**recorder.state_dict(), "alive": None}, None)):
        again, _ = recorded([], window=4)
        again.load_state_dict({key: value for key, value in state.items() if value is not None})
        again.observe(torch.tensor(stream[2]), 3)
        assert again.report(vectors(3, 4).T.reshape(1, DIM, 1, -1), 3).get("births") == births
    assert rows[1]["births"] == 2


# --- the band ---


def test_the_band_goes_from_all_codes_to_the_chosen_one():
    features, codebook = vectors(0, 64, 8), vectors(1, 128, 8)
    band = logit_scale_band(features, codebook)
    assert [point.scale for point in band] == list(SCALES) and any(scale == pytest.approx(1) for scale in SCALES)
    spread = [point.softmax_perplexity for point in band]
    assert spread == sorted(spread, reverse=True) and spread[0] > 127 and spread[-1] < 1.2
    reach = [point.gradient_reach for point in band]
    chosen = len((features @ codebook.T).argmax(1).unique()) / 128
    assert reach[-1] < chosen + 0.25 and max(reach) > 0.9 > chosen and {point.tokens for point in band} == {64}


def test_a_point_of_the_band_equals_autograd_over_the_full_matrix():
    features, codebook = vectors(0, 20), vectors(1, CODES).requires_grad_()
    for scale in (0.3, 3.0):
        codes = codebook.detach()
        spread = torch.special.entr((scale * features @ codes.T).softmax(1)).sum(1).exp().mean()
        soft = (scale * features @ codebook.T).softmax(1)
        hard = torch.nn.functional.one_hot(soft.argmax(1), CODES)
        quantized = (hard + soft - soft.detach()) @ codebook
        (gradient,) = torch.autograd.grad((quantized - features).square().mean(), codebook)
        (point,) = logit_scale_band(features, codebook, [scale])
        assert point.gradient_reach == pytest.approx(geometry.gradient_reach(gradient))
        assert point.softmax_perplexity == pytest.approx(float(spread), rel=1e-4)


def test_of_many_tokens_a_part_is_taken():
    assert logit_scale_band(vectors(0, 1100), vectors(1, CODES), [1.0])[0].tokens == 367  # every third


# --- drift ---


def test_drift_is_a_distance_per_step_apart_for_dead_codes():
    codes, features = np.zeros((3, 2)), np.zeros((2, 2))
    moved = np.array([[3, 4], [0, 0], [0, 1]])
    later = {"codebook": codes + moved, "features": features + np.array([6, 8]), "counts": [1, 0, 2]}
    first = {"codebook": codes, "features": features, "counts": [1, 1, 1]}
    assert measure_drift([(0, first), (5, later)]) == [Drift(5, 0, 2.0, 0.6, 0.0)]
    assert measure_drift([(0, first)]) == measure_drift([]) == []
    assert math.isnan(measure_drift([(0, first), (1, {**first})])[0].dead_codes)
    # Other features, or none, have not drifted; codes have, and what holds no codebook is passed over.
    for other in (later | {"features": features[:1]}, {k: v for k, v in later.items() if k != "features"}):
        (drift,) = measure_drift([(0, first), (3, {"counts": [1, 0, 2]}), (5, other)])
        assert math.isnan(drift.features) and drift[3:] == (0.6, 0.0)


# --- lives ---


def test_lives_go_from_the_first_hit_to_the_last():
    hits = np.array([[1, 0, 0, 2, 1, 0], [1, 0, 3, 0, 1, 0], [0, 0, 1, 0, 0, 0], [0, 0, 5, 0, 7, 0]])
    last = np.array([[-1] * 6, [7, -1, 2, -1, 9, 4], [13, -1, 2, -1, 9, 4], [13, -1, 2, -1, 9, 44]])
    lives = code_lives([0, 10, 20, 50], hits, last)
    # Trained last at 13; in use at the end; validated once at 0; a gap from 10 to 50; trained alone, from 10 on.
    assert lives.steps.tolist() == [13, 40, 0, 50, 40]
    assert lives.died.tolist() == [True, False, True, False, False] and lives.never == 1
    with pytest.raises(ValueError, match="two snapshots or more, in ascending order; got 1 steps"):
        code_lives([3], hits[:1], last[:1])
    with pytest.raises(ValueError, match="ascending"):
        code_lives([3, 3], hits[:2], last[:2])


def test_survival_equals_the_textbooks_leukaemia_trial():
    """Remission under 6-MP (Freireich et al., 1963; Collett, Modelling Survival Data in Medical Research)."""
    relapsed, lost = [6, 6, 6, 7, 10, 13, 16, 22, 23], [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    curve = survival_curve(relapsed + lost, [True] * 9 + [False] * 12)
    points = {point.steps: point for point in curve if point.deaths}
    assert [(point.at_risk, point.deaths) for point in points.values()] == [
        *((21, 3), (17, 1), (15, 1), (12, 1), (11, 1), (7, 1), (6, 1))
    ]
    survival = {6: 0.857, 7: 0.807, 10: 0.753, 13: 0.690, 16: 0.627, 22: 0.538, 23: 0.448}
    assert {time: round(point.survival, 3) for time, point in points.items()} == survival
    ends = {6: (0.6197, 0.9516), 7: (0.5631, 0.9228), 10: (0.5032, 0.8894), 23: (0.1881, 0.6801)}
    for time, interval in ends.items():
        assert (points[time].low, points[time].high) == pytest.approx(interval, abs=2e-4)


def test_survival_equals_brute_force():
    draw = random.Random(0)
    lengths = [draw.randrange(8) for _ in range(40)]
    died = [draw.random() < 0.6 for _ in lengths]
    share, expected = 1.0, {}
    for time in sorted(set(lengths)):
        at_risk = sum(length >= time for length in lengths)
        share *= 1 - sum(d for length, d in zip(lengths, died, strict=True) if length == time) / at_risk
        expected[time] = share
    curve = survival_curve(lengths, died)
    assert {point.steps: point.survival for point in curve[1:]} == pytest.approx(expected)
    assert curve[0].survival == 1 and all(p.low <= p.survival <= p.high for p in curve if not math.isnan(p.low))


def test_survival_at_its_ends(recwarn):
    assert [point.survival for point in survival_curve([3, 5], [True, True])] == [1, 0.5, 0]
    alive = survival_curve([3, 5], [False, False])
    assert [(point.survival, point.low, point.high) for point in alive] == [(1, 1, 1)] * 3 and not recwarn.list
    for steps, died in (([], []), ([1.0, math.nan], [True, True]), ([-1], [True]), ([1, 2], [True])):
        with pytest.raises(ValueError, match="a length ≥ 0 and an end for each life"):
            survival_curve(steps, died)


# --- rarefaction ---


def test_rarefaction_equals_counting_all_draws():
    counts, n = np.array([3, 1, 0, 2]), 3
    stream = np.repeat(np.arange(4), counts)
    drawn = [len(set(stream[list(chosen)])) / 4 for chosen in itertools.combinations(range(6), n)]
    tokens, usage = rarefaction(counts, [0, n, 6])
    assert tokens.tolist() == [0, 3, 6] and usage.tolist() == pytest.approx([0, np.mean(drawn), 0.75])


def test_rarefaction_agrees_with_sampling():
    draw = np.random.default_rng(0)
    counts = draw.multinomial(4000, draw.dirichlet(np.full(200, 0.2)))
    stream = np.repeat(np.arange(200), counts)
    for n in (50, 700):
        samples = [len(np.unique(draw.permutation(stream)[:n])) / 200 for _ in range(200)]
        (usage,) = rarefaction(counts, [n])[1]
        assert usage == pytest.approx(np.mean(samples), abs=4 * np.std(samples) / math.sqrt(200))


def test_rarefaction_of_large_numbers_and_of_none():
    tokens, usage = rarefaction(np.full(1000, 10_000))
    assert (tokens[0], tokens[-1]) == (1, 10_000_000) and (np.diff(usage) >= -1e-6).all()
    assert usage[0] == pytest.approx(1e-3, rel=1e-3) and usage[-1] == 1
    for counts, n in (([0, 0], None), ([-1, 3], None), ([2, 3], [6])):
        with pytest.raises(ValueError, match=r"rarefaction needs hits|0 to 5, the hits counted; got 6 to 6"):
            rarefaction(np.array(counts), n)


# --- figures ---


def lines(figure):
    return {text.get_text() for axes in figure.axes for text in (axes.get_legend() or axes).get_texts()}


def test_figures_draw_their_tables():
    band = explain.band_table({0: logit_scale_band(vectors(0, 16), vectors(1, CODES), [0.1, 1, 10])}, CODES)
    assert band["scale"].tolist() == [0.1, 1, 10] and set(band["codebook_size"]) == {CODES}
    left, right = explain.plot_band(band).axes
    np.testing.assert_allclose(left.get_lines()[0].get_ydata(), band["softmax_perplexity"])
    np.testing.assert_allclose(right.get_lines()[1].get_ydata(), 100 * band["gradient_reach"][1:2])
    counts = {"step 0": np.array([5, 5, 1]), "step 9": np.array([0, 0, 8]), "empty": np.zeros(3, int)}
    table = explain.rarefaction_table(counts)
    assert set(table["label"]) == {"step 0", "step 9"}
    usage = explain.plot_rarefaction(table).axes[0].get_lines()[0].get_ydata()
    np.testing.assert_allclose(usage, 100 * table[table["label"] == "step 9"]["usage"])
    with pytest.raises(ValueError, match="no token was counted"):
        explain.rarefaction_table({"empty": np.zeros(3, int)})
    survival = explain.survival_table(survival_curve([3, 5, 9], [True, True, False]), 4)
    figure = explain.plot_survival(survival)
    np.testing.assert_allclose(figure.axes[0].get_lines()[0].get_ydata(), 100 * survival["survival"])
    assert "4 never lived" in figure.get_supxlabel()


def test_a_run_that_learns_otherwise_has_no_reach_of_index_backpropagation_in_its_name():
    points = {0: logit_scale_band(vectors(0, 16), vectors(1, CODES), [0.1, 1, 10])}
    titles = [
        plot.axes[1].get_title()
        for plot in (explain.plot_band(explain.band_table(points, CODES, own)) for own in (False, True))
    ]
    assert titles == ["Gradient reach", "What index backpropagation would reach"]


def test_turnover_has_ticks_in_range_and_both_lines_show():
    rows = pd.DataFrame({"step": [1, 2, 3], "births": [0.0, 30, 0], "deaths": [0.0, 0, 60]})
    axes = explain.plot_explanation(explain.explanation_table(rows)).axes[3]
    assert axes.get_yticks().tolist() == [0, 1, 2, 5, 10, 20, 50]
    births, deaths = axes.get_lines()
    assert births.get_linewidth() > 2 * deaths.get_linewidth() and deaths.get_linestyle() == "--"


def test_survival_is_told_as_a_share_of_all_codes_too():
    """Nearly all of the few codes that were ever hit live on, and the codebook is dead all the same."""
    points = survival_curve([10, 10, 10, 10, 3], [False] * 4 + [True])
    figure = explain.plot_survival(explain.survival_table(points, 95))
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert list(lines) == ["of the 5 that were hit", "of all 100"]
    assert lines["of all 100"] == pytest.approx(0.05 * lines["of the 5 that were hit"])
    whole = explain.plot_survival(explain.survival_table(points, 0))
    assert len(whole.axes[0].lines) == 1 and not whole.legends


def test_the_caption_of_rarefaction_says_which_tokens():
    table = explain.rarefaction_table({"step 1": np.ones(CODES, int)}, "tokens of the training window")
    assert "tokens of the training window, drawn" in explain.plot_rarefaction(table).get_supxlabel().replace("\n", " ")


def test_runs_that_lack_columns_are_drawn_without_them():
    metrics = pd.DataFrame({"step": [0, 1, 2], "feature_norm_mean": [None, 1.0, 2.0], "code_norm_mean": [None, 3, 3]})
    table = explain.explanation_table(metrics, [Drift(2, 0, 0.5, 0.1, math.nan)])
    assert table["drift_features"].tolist()[2] == 0.5 and table["births"].isna().all()
    figure = explain.plot_explanation(table)
    notes = [text.get_text() for axes in figure.axes for text in axes.texts]
    lacking = ["The run logged no lead of the winner.", "The run logged no births and deaths:\nthey need two rows."]
    assert notes == lacking and len(figure.axes) == 4
    figure = explain.plot_explanation(explain.explanation_table(metrics))
    assert [text.get_text() for text in figure.axes[2].texts] == ["Drift needs two snapshots."]


def test_a_run_of_two_steps_has_no_empty_axis_and_no_warning():
    metrics = pd.DataFrame({"step": [0, 1, 2], "births": [None, None, 0.0], "deaths": [None, None, 0.0]})
    metrics = metrics.assign(winner_margin=[None, 0.1, 0.9], logit_margin=[None, 0.1, 0.5])
    still = explain.plot_explanation(explain.explanation_table(metrics, [Drift(2, 0, 0.0, 0.0, math.nan)]))
    moved = explain.plot_explanation(explain.explanation_table(metrics, [Drift(2, 0, 0.0, 0.02, math.nan)]))
    with warnings.catch_warnings(action="error"):
        for figure in (still, moved):
            draw(figure, 50)
    assert [text.get_text() for axes in still.axes[:3] for text in axes.texts][1:] == [
        "Nothing moved between snapshots."
    ]
    _, margin, drift, turnover, beside = moved.axes
    assert [text.get_text() for text in drift.get_legend().texts] == ["features (stand still)", "codes hit"]
    assert turnover.get_ylim()[1] > 1 and turnover.get_xlim() == margin.get_xlim()
    # Nothing overlaps: the lines end below the legend.
    legend = margin.get_legend().get_window_extent()
    highest = max(axes.transData.transform((2, y))[1] for axes, y in ((margin, 90), (beside, 0.5)))
    assert highest < legend.y0
