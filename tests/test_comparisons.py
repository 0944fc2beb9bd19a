"""What seeds can tell: intervals, corrected tests, orderings and power laws on numbers whose answers are known."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ibqlab.base.intervals import Interval, name_student_interval, seed_range, student_interval
from ibqlab.studies.comparisons import (
    compare_ordering,
    correct_holm,
    correct_orderings,
    is_clear,
    welch_p,
)
from ibqlab.studies.scaling import fit_power_law, scaling_sentences


class TestIntervals:
    def test_students_interval_of_three_values(self):
        found = student_interval([1.0, 2.0, 3.0])
        assert found.mean == 2.0
        assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
        assert found.low == pytest.approx(4.0 - found.high)

    def test_one_run_has_no_interval(self):
        found = student_interval([0.4])
        assert (found.mean, found.count) == (0.4, 1)
        assert math.isnan(found.low) and math.isnan(found.high)

    @pytest.mark.parametrize(("values", "errors"), [([1.0, 2.0], "12.7"), ([1.0, 2.0, 4.0], "4.3")])
    def test_captions_say_what_an_interval_is(self, values, errors):
        found, told = student_interval(values), name_student_interval(len(values))
        assert told == f"Student's 95 % interval of the mean over {len(values)} seeds, ± {errors} standard errors"
        standard_error = np.std(values, ddof=1) / math.sqrt(len(values))
        assert f"{(found.high - found.mean) / standard_error:.1f}" == errors
        assert name_student_interval(1) == "1 seed, so no interval"

    def test_shares_are_cut_at_their_ends_and_missing_values_left_out(self):
        found = student_interval([0.01, 0.99, math.nan], (0, 1))
        assert (found.low, found.high, found.count) == (0, 1, 2)
        assert student_interval([]).count == 0

    def test_an_interval_covers_its_mean_nineteen_times_of_twenty(self):
        draws = np.random.default_rng(0).normal(3.0, 1.0, (4000, 3))
        hits = np.mean([low <= 3.0 <= high for _, low, high, _ in map(student_interval, draws)])
        assert hits == pytest.approx(0.95, abs=0.012)

    def test_each_kind_is_written_with_its_mean(self):
        assert Interval(0.0534, 0.041, 0.0651, 3).text(1, 100, " %") == "5.3 % (4.1–6.5)"
        assert Interval(1234.5, 1000.0, 1500.25, 3).text(2) == "1,234.50 (1,000.00–1,500.25)"
        assert Interval(12.0, math.nan, math.nan, 1).text() == "12.0" and student_interval([]).text() == "–"
        assert seed_range(2.0, 1.0, 4.0, 3).text(0) == "2 (1–4)" and seed_range(2.0, 2.0, 2.0, 1).text(0) == "2"


class TestHolm:
    def test_differences(self):
        assert is_clear(welch_p([1.0, 1.1, 0.9], [5.0, 5.1, 4.9]))
        assert not is_clear(welch_p([1.0, 5.0, 3.0], [2.0, 4.0, 3.3]))
        assert math.isnan(welch_p([1.0], [2.0, 3.0]))

    def test_seeds_that_agree_are_not_certainty(self):
        assert welch_p([1.0, 1.0], [1.0, 1.0]) == welch_p([0.1 + 0.2] * 2, [0.3] * 2) == 1.0
        assert welch_p([1.0, 1.0], [2.0, 2.0]) == pytest.approx(2 / 6)
        assert not is_clear(welch_p([1.0] * 3, [2.0] * 3)) and is_clear(welch_p([1.0] * 5, [2.0] * 5))

    def test_welchs_test_of_two_settings_by_hand(self):
        """t = −2 / √(1/3 + 4/3) = −1.549 with 2.94 degrees of freedom."""
        degrees = (1 / 3 + 4 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)
        t = stats.t(degrees)
        assert welch_p([1, 2, 3], [2, 4, 6]) == pytest.approx(2 * t.cdf(-2 / math.sqrt(5 / 3)))

    def test_the_smallest_is_multiplied_by_the_number_of_comparisons_and_so_on_down(self):
        assert correct_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_none_comes_out_smaller_than_the_one_before_and_none_above_one(self):
        assert correct_holm([0.012, 0.013, 0.9]) == pytest.approx([0.036, 0.036, 0.9])
        assert correct_holm([0.5, 0.6, 0.7]) == [1.0, 1.0, 1.0]

    def test_what_cannot_be_tested_is_no_comparison(self):
        corrected = correct_holm([math.nan, 0.02, 0.03])
        assert math.isnan(corrected[0]) and corrected[1:] == pytest.approx([0.04, 0.04])
        assert correct_holm([]) == []

    def test_among_many_settings_without_a_difference_one_in_twenty_studies_finds_any(self):
        generator = np.random.default_rng(2)
        studies = [correct_holm([welch_p(*generator.normal(size=(2, 5))) for _ in range(6)]) for _ in range(400)]
        assert np.mean([min(p_values) < 0.05 for p_values in studies]) < 0.08


class TestOrdering:
    def compare(self, **measured):
        printed = {"a": 4.0, "b": 2.0, "c": 1.0}
        (corrected,) = correct_orderings([compare_ordering(printed, measured, printed_higher=False, higher=True)])
        return corrected

    def test_the_papers_order_holds(self):
        ordering = self.compare(a=[1, 1.1, 0.9], b=[5, 5.1, 4.9], c=[9, 9.1, 8.9])
        assert (len(ordering.pairs), ordering.same, ordering.clearly_same, ordering.reversed_pairs) == (3, 3, 3, [])
        assert ordering.verdict() == "holds"
        assert "the paper's ordering holds here. 3 of 3 pairs stand as there" in ordering.describe("PSNR", "rFID")

    def test_it_does_not_hold(self):
        ordering = self.compare(a=[9, 9.1, 8.9], b=[5, 5.1, 4.9], c=[1, 1.1, 0.9])
        assert ordering.verdict() == "does not hold"
        assert (ordering.same, len(ordering.reversed_pairs)) == (0, 3)

    def test_it_holds_in_part_and_the_pair_that_is_turned_round_is_named(self):
        ordering = self.compare(a=[5, 5.1, 4.9], b=[1, 1.1, 0.9], c=[9, 9.1, 8.9])
        assert ordering.verdict() == "holds in part and not as a whole"
        assert ordering.reversed_pairs == [("b", "a")]
        assert "b is clearly behind a" in ordering.describe("PSNR", "rFID")

    def test_noise_is_not_decided(self):
        ordering = self.compare(a=[1, 9, 5], b=[2, 8, 5.5], c=[3, 7, 5.2])
        assert ordering.verdict() == "is not decided"
        assert "3 not told apart" in ordering.describe("PSNR", "rFID")

    def test_one_seed_claims_nothing(self):
        ordering = self.compare(a=[1], b=[2], c=[3])
        assert ordering.verdict() == "is seen, untested"
        assert "one seed cannot say how sure" in ordering.describe("PSNR", "rFID")
        assert self.compare(a=[1], b=[3], c=[2]).verdict() == "is partly seen, untested"
        assert self.compare(a=[3], b=[2], c=[1]).verdict() == "is not seen, untested"

    def test_equal_printed_numbers_and_missing_rows_are_no_pairs(self):
        ordering = compare_ordering({"a": 1, "b": 1, "c": 2}, {"a": [1], "b": [2]}, printed_higher=True, higher=True)
        assert ordering.pairs == ()
        assert "no two rows" in ordering.describe("usage", "usage")

    def test_verdicts_of_all_measures_of_a_table_are_corrected_together(self):
        """p = 0.021 is clear as the only comparison, and not as the smallest of three."""
        printed, measured = {"a": 2.0, "b": 1.0}, {"a": [1.0, 1.2, 0.8], "b": [1.4, 1.8, 1.6]}
        raw = compare_ordering(printed, measured, printed_higher=False, higher=True)
        assert 0.05 / 3 < raw.p_values[0] < 0.05
        (alone,) = correct_orderings([raw])
        assert alone.verdict() == "holds" and "corrected for 1 comparison (Holm)" in alone.describe("PSNR", "rFID")
        together = correct_orderings([raw, raw, raw])
        assert [one.verdict() for one in together] == ["is not decided"] * 3
        assert "3 seeds, corrected for 3 comparisons (Holm): 0 clearly so" in together[0].describe("PSNR", "rFID")

    def test_methods_of_a_grid_are_told_apart_after_correction(self):
        usage = {
            "vq": {16: [0.9, 0.92, 0.91], 64: [0.2, 0.22, 0.21]},
            "ibq": {16: [0.95, 0.8, 1.0], 64: [0.9, 0.8, 0.95]},
        }
        rows = pd.DataFrame(
            [
                {"method": method, "codebook_size": size, "code_dim": 8, "usage": value}
                for method, sizes in usage.items()
                for size, values in sizes.items()
                for value in values
            ]
        )
        falls, rises, largest, correction = scaling_sentences(rows).splitlines()
        assert "VQ: usage falls" in falls and falls.endswith("(D = 8); told apart.")
        assert "IBQ: usage falls" in rises and rises.endswith("(D = 8); not told apart.")
        assert largest.endswith("; told apart.") and "corrected for 3 comparisons (Holm)" in correction
        alone = scaling_sentences(rows.groupby(["method", "codebook_size"]).head(1)).splitlines()
        assert len(alone) == 3 and all("one seed cannot say how sure that is" in line for line in alone)


class TestPowerLaws:
    def test_an_exact_law_is_found(self):
        x = [16, 64, 256, 1024]
        law = fit_power_law(x, [3 * k**-0.5 for k in x])
        assert law["factor"] == pytest.approx(3) and law["exponent"] == pytest.approx(-0.5)
        assert law["high"] - law["low"] == pytest.approx(0, abs=1e-6)
        assert law["factor"] * 100.0 ** law["exponent"] == pytest.approx(0.3)

    def test_the_interval_covers_the_exponent_nineteen_times_of_twenty(self):
        generator, x, hits = np.random.default_rng(1), [16, 16, 64, 64, 256, 256], 0
        for _ in range(1000):
            law = fit_power_law(x, [k**0.7 * math.exp(generator.normal(0, 0.3)) for k in x])
            hits += law["low"] <= 0.7 <= law["high"]
        assert hits / 1000 == pytest.approx(0.95, abs=0.025)

    def test_too_few_points(self):
        assert fit_power_law([16, 16], [1.0, 2.0]) is None
        assert math.isnan(fit_power_law([16, 64], [1.0, 2.0])["low"])
        assert fit_power_law([16, 64, 256], [0.0, 1.0, 2.0])["points"] == 2
