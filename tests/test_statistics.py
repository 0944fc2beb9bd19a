"""What seeds can tell: intervals, orderings and power laws on numbers whose answers are known."""

import math

import numpy as np
import pytest

from ibqlab.studies.statistics import (
    Interval,
    compare_ordering,
    difference_is_clear,
    fit_power_law,
    mean_interval,
    name_interval,
)


class TestIntervals:
    def test_students_interval_of_three_values(self):
        found = mean_interval([1.0, 2.0, 3.0])
        assert found.mean == 2.0
        assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
        assert found.low == pytest.approx(4.0 - found.high)

    def test_one_run_has_no_interval(self):
        found = mean_interval([0.4])
        assert (found.mean, found.count) == (0.4, 1)
        assert math.isnan(found.low) and math.isnan(found.high)

    @pytest.mark.parametrize(("values", "errors"), [([1.0, 2.0], "12.7"), ([1.0, 2.0, 4.0], "4.3")])
    def test_captions_say_what_an_interval_is(self, values, errors):
        found, told = mean_interval(values), name_interval(len(values))
        assert told == f"Student's 95 % interval of the mean over {len(values)} seeds, ± {errors} standard errors"
        standard_error = np.std(values, ddof=1) / math.sqrt(len(values))
        assert f"{(found.high - found.mean) / standard_error:.1f}" == errors
        assert name_interval(1) == "1 seed, so no interval"

    def test_shares_are_cut_at_their_ends_and_missing_values_left_out(self):
        found = mean_interval([0.01, 0.99, math.nan], (0, 1))
        assert (found.low, found.high, found.count) == (0, 1, 2)
        assert mean_interval([]).count == 0

    def test_an_interval_covers_its_mean_nineteen_times_of_twenty(self):
        draws = np.random.default_rng(0).normal(3.0, 1.0, (4000, 3))
        hits = np.mean([low <= 3.0 <= high for _, low, high, _ in map(mean_interval, draws)])
        assert hits == pytest.approx(0.95, abs=0.012)

    def test_overlap(self):
        first, second, alone = Interval(1, 0, 2, 3), Interval(4, 3, 5, 3), Interval(1, math.nan, math.nan, 1)
        assert first.overlaps(second) is False
        assert first.overlaps(Interval(2, 1.5, 3, 3)) is True
        assert first.overlaps(alone) is None

    def test_differences(self):
        assert difference_is_clear([1.0, 1.1, 0.9], [5.0, 5.1, 4.9]) is True
        assert difference_is_clear([1.0, 5.0, 3.0], [2.0, 4.0, 3.3]) is False
        assert difference_is_clear([1.0], [2.0, 3.0]) is None
        assert difference_is_clear([1.0, 1.0], [1.0, 1.0]) is False


class TestOrdering:
    def compare(self, **measured):
        return compare_ordering({"a": 4.0, "b": 2.0, "c": 1.0}, measured, printed_higher=False, higher=True)

    def test_the_papers_order_holds(self):
        found = self.compare(a=[1, 1.1, 0.9], b=[5, 5.1, 4.9], c=[9, 9.1, 8.9])
        assert (found.pairs, found.same, found.clearly_same, found.clearly_other) == (3, 3, 3, 0)
        assert found.verdict() == "holds"
        assert "the paper's ordering holds here. 3 of 3 pairs stand as there" in found.describe("PSNR", "rFID")

    def test_it_does_not_hold(self):
        found = self.compare(a=[9, 9.1, 8.9], b=[5, 5.1, 4.9], c=[1, 1.1, 0.9])
        assert found.verdict() == "does not hold"
        assert (found.same, found.clearly_other) == (0, 3)

    def test_it_holds_in_part_and_the_pair_that_is_turned_round_is_named(self):
        found = self.compare(a=[5, 5.1, 4.9], b=[1, 1.1, 0.9], c=[9, 9.1, 8.9])
        assert found.verdict() == "holds in part and not as a whole"
        assert found.reversed_pairs == (("b", "a"),)
        assert "b is clearly behind a" in found.describe("PSNR", "rFID")

    def test_noise_is_not_decided(self):
        found = self.compare(a=[1, 9, 5], b=[2, 8, 5.5], c=[3, 7, 5.2])
        assert found.verdict() == "is not decided"
        assert "3 not told apart" in found.describe("PSNR", "rFID")

    def test_one_seed_claims_nothing(self):
        found = self.compare(a=[1], b=[2], c=[3])
        assert found.verdict() == "is seen, untested"
        assert "one seed cannot say how sure" in found.describe("PSNR", "rFID")
        assert self.compare(a=[1], b=[3], c=[2]).verdict() == "is partly seen, untested"
        assert self.compare(a=[3], b=[2], c=[1]).verdict() == "is not seen, untested"

    def test_equal_printed_numbers_and_missing_rows_are_no_pairs(self):
        found = compare_ordering({"a": 1, "b": 1, "c": 2}, {"a": [1], "b": [2]}, printed_higher=True, higher=True)
        assert found.pairs == 0
        assert "no two rows" in found.describe("usage", "usage")


class TestPowerLaws:
    def test_an_exact_law_is_found(self):
        x = [16, 64, 256, 1024]
        law = fit_power_law(x, [3 * k**-0.5 for k in x])
        assert law.factor == pytest.approx(3) and law.exponent == pytest.approx(-0.5)
        assert law.high - law.low == pytest.approx(0, abs=1e-6)
        assert law.factor * 100.0**law.exponent == pytest.approx(0.3)

    def test_the_interval_covers_the_exponent_nineteen_times_of_twenty(self):
        generator, x, hits = np.random.default_rng(1), [16, 16, 64, 64, 256, 256], 0
        for _ in range(1000):
            law = fit_power_law(x, [k**0.7 * math.exp(generator.normal(0, 0.3)) for k in x])
            hits += law.low <= 0.7 <= law.high
        assert hits / 1000 == pytest.approx(0.95, abs=0.025)

    def test_too_few_points(self):
        assert fit_power_law([16, 16], [1.0, 2.0]) is None
        assert math.isnan(fit_power_law([16, 64], [1.0, 2.0]).low)
        assert fit_power_law([16, 64, 256], [0.0, 1.0, 2.0]).points == 2
