"""What changes first, on curves whose lag is known."""

import numpy as np
import pandas as pd
import pytest

from ibqlab.studies.lead_lag import change_step, lead_lag, lead_lag_sentences, lead_lag_text


def fall(steps, at, width=5.0, low=0.05, high=0.8):
    """A measure that falls smoothly and is half down at a step."""
    return low + (high - low) / (1 + np.exp((np.asarray(steps) - at) / width))


def runs(lags, every=1):
    """One run per lag: reach is half down at step 60, usage so many steps later, features grow at step 40."""
    steps = np.arange(1, 201, every)
    frames = [
        pd.DataFrame(
            {
                "method": "vq",
                "init": "N(0, 1)",
                "seed": seed,
                "step": steps,
                "gradient_reach": fall(steps, 60),
                "step_usage": fall(steps, 60 + lag),
                "feature_norm_mean": 8 - 7 * fall(steps, 40, low=0, high=1),
                "softmax_perplexity": 1.0,
            }
        )
        for seed, lag in enumerate(lags)
    ]
    return pd.concat(frames, ignore_index=True)


def test_a_change_is_dated_by_its_half():
    steps = np.arange(0, 200)
    assert change_step(steps, fall(steps, 70)) == (pytest.approx(70, abs=0.2), 1.0)
    assert change_step(steps, 9 - 8 * fall(steps, 70))[0] == pytest.approx(70, abs=0.2)  # a rise likewise
    assert change_step([0, 10, 20, 30, 40, 50, 60], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]) == (15.0, 10.0)


@pytest.mark.parametrize("values", [[0.5] * 9, [0.5, 0.45] * 4, [1.0, 0.2], [np.nan] * 9])
def test_what_does_not_change_has_no_date(values):
    assert np.isnan(change_step(range(len(values)), values)).all()


def test_a_known_lag_is_found_with_its_interval():
    table = lead_lag(runs([11, 12, 13])).set_index("measure")
    assert set(table.index) == {"gradient_reach", "feature_norm_mean"}  # the softmax never changed
    reach = table.loc["gradient_reach"]
    assert reach["lead"] == pytest.approx(12, abs=0.3) and reach["told_apart"] and reach["seeds"] == 3
    assert reach["high"] - reach["lead"] == pytest.approx(4.302653 / np.sqrt(3), rel=0.02)
    assert table.loc["feature_norm_mean", "lead"] == pytest.approx(32, abs=0.3)
    told = lead_lag_sentences(lead_lag(runs([11, 12, 13])))
    assert "vq, N(0, 1): gradient reach changes before usage: gradient reach at step 60, usage at step 72" in told


def test_only_methods_with_a_softmax_have_its_spread_dated():
    curves = runs([12, 12])
    curves["softmax_perplexity"] = 500 * curves["gradient_reach"]
    assert "softmax_perplexity" not in set(lead_lag(curves)["measure"])
    assert "softmax_perplexity" in set(lead_lag(curves.assign(method="ibq"))["measure"])


def test_usage_that_falls_first_is_said_to():
    table = lead_lag(runs([-11, -12, -13])).set_index("measure")
    assert table.loc["gradient_reach", "lead"] == pytest.approx(-12, abs=0.3)
    assert "gradient reach changes after usage" in lead_lag_sentences(lead_lag(runs([-11, -12, -13])))


def test_no_order_is_claimed_where_seeds_disagree_or_rows_are_too_far_apart():
    assert not lead_lag(runs([-10, 2, 9]))["told_apart"].iloc[0]
    assert "gradient reach and usage are not told apart in time" in lead_lag_sentences(lead_lag(runs([-10, 2, 9])))
    close = lead_lag(runs([3.0, 3.1, 3.2], every=10)).set_index("measure").loc["gradient_reach"]
    assert close["low"] > 0 and close["resolution"] == 10 and not close["told_apart"]
    assert "one seed cannot say" in lead_lag_sentences(lead_lag(runs([12])))


def test_noise_alone_is_seldom_called_an_order():
    """With no lag and noise in every row, at most about one in twenty tables claims one."""
    claims = 0
    for trial in range(60):
        curves = runs([0, 0, 0])
        draw = np.random.default_rng(trial)
        for column in ("gradient_reach", "step_usage"):
            curves[column] += draw.normal(0, 0.03, len(curves))
        claims += bool(lead_lag(curves).set_index("measure").loc["gradient_reach", "told_apart"])
    assert claims <= 6


def test_runs_without_usage_of_steps_claim_nothing():
    older = runs([12, 12]).drop(columns="step_usage")
    assert lead_lag(older).empty and lead_lag_text(lead_lag(older)) == ""
    assert "no proof of a cause" in lead_lag_text(lead_lag(runs([12, 12])))
