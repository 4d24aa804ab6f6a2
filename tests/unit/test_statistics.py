"""Means, standard errors and intervals of evaluations, on data whose answers are known."""

import math
from dataclasses import astuple

import numpy as np
import pytest
from scipy.stats import ttest_rel

from mxq.evaluation import statistics
from mxq.evaluation.statistics import Estimate, Stratum, difference, estimate, exponential


def stratum(counts, *sums):
    return Stratum(np.array(counts, float), np.array(sums, float))


def test_a_mean_and_its_error_by_hand():
    # Sums 2, 6, 1 over counts 1, 2, 1: R = 9/4; e = 2 - 9/4, 6 - 9/2, 1 - 9/4 = -1/4, 3/2, -5/4,
    # which sum to 0; 3/2 (1/16 + 9/4 + 25/16) = 93/16, and its root over 4 is the error.
    (found,) = estimate([stratum([1, 2, 1], [2, 6, 1])])
    assert found.value == pytest.approx(9 / 4)
    assert found.stderr == pytest.approx(math.sqrt(93 / 16) / 4)


def test_strata_share_a_mean_but_not_their_spread_by_hand():
    # Stratum 1 has 1 and 3, stratum 2 has 10 and 14: R = 28/4 = 7. The centred e are -1, 1 and
    # -2, 2, so the variance of the sum is 2/1 (1 + 1) + 2/1 (4 + 4) = 20. The 10 between the strata
    # is no chance.
    strata = [stratum([1, 1], [1, 3]), stratum([1, 1], [10, 14])]
    (found,) = estimate(strata)
    assert (found.value, found.stderr) == (7, pytest.approx(math.sqrt(20) / 4))
    assert 5 <= found.low < found.value < found.high <= 9  # whatever is drawn, 2 of each stratum


def test_the_error_of_a_paired_difference_is_that_of_a_paired_t_test():
    generator = np.random.default_rng(0)
    hard = generator.normal(5, 3, 50)  # what both models find hard cancels
    ours, theirs = hard + generator.normal(0.1, 0.2, 50), hard
    ones = np.ones(50)
    apart = difference([Stratum(ones, ours[None])], [Stratum(ones, theirs[None])])
    (found,) = estimate(apart)
    test = ttest_rel(ours, theirs)
    assert found.value == pytest.approx(ours.mean() - theirs.mean())
    assert found.stderr == pytest.approx(found.value / test.statistic)
    unpaired = math.hypot(*(values.std(ddof=1) / math.sqrt(50) for values in (ours, theirs)))
    assert found.stderr < unpaired / 10


def test_a_model_differs_from_itself_by_exactly_nothing():
    counts, sums = np.array([7, 7, 3.0]), np.random.default_rng(0).random((3, 3))
    ours = [Stratum(counts, sums)]
    assert estimate(difference(ours, ours)) == (Estimate(0, 0, 0, 0),) * 3


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_cover_the_truth_as_often_as_they_say(confidence, monkeypatch):
    # 400 data sets of 60 windows in two domains, of 5 to 20 tokens each and skewed. The truth is
    # the mean over all windows that could have been: 1 and 3 in equal numbers of tokens.
    monkeypatch.setattr(statistics, "DRAWS", 1000)
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        strata = []
        for mean in (1, 3):
            counts = generator.integers(5, 21, 30).astype(float)
            counts *= 375 / counts.sum()  # the share of a domain is given and no chance
            level = mean * generator.gamma(4, 1 / 4, 30)  # tokens of a window have it in common
            strata.append(Stratum(counts, (counts * level)[None]))
        (found,) = estimate(strata, confidence)
        hits += found.low <= 2 <= found.high
    # A binomial share of 400 has a standard deviation of 0.011 and 0.02; a bootstrap of 30 windows
    # is known to be a little narrow. Drawing without strata would cover 1.00 of 0.95.
    assert hits / 400 == pytest.approx(confidence, abs=0.035)


def test_a_higher_confidence_gives_a_wider_interval():
    units = stratum(np.ones(40), np.random.default_rng(0).normal(size=40))
    (narrow,), (wide,) = (estimate([units], confidence) for confidence in (0.9, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    assert estimate([units], 0.9) == (narrow,)  # the same draws


def test_an_interval_of_many_units_is_the_normal_one():
    units = stratum(np.ones(400), np.random.default_rng(0).normal(size=400))
    (found,) = estimate([units], 0.95)
    # 10 000 draws know the ends of the interval to about 2 % of its width.
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.stderr, rel=0.04)


def test_quantities_of_the_same_units_do_not_disturb_each_other():
    values = np.random.default_rng(0).random((3, 30))
    together = estimate([stratum(np.ones(30), *values, np.ones(30))])
    for row, found in zip(values, together, strict=False):
        (alone,) = estimate([stratum(np.ones(30), row)])
        assert astuple(found) == pytest.approx(astuple(alone))
    assert together[3] == Estimate(1, 0, 1, 1)  # a constant is certain


def test_rounding_is_no_spread():
    # Each stratum is constant, but 0.3 / 3 and 2.3 / 5 are no binary fractions.
    (found,) = estimate([stratum([1, 1], [1, 1]), stratum([1] * 3, [0.1] * 3)])
    assert (found.stderr, found.low) == (0, found.high)
    assert found.value == pytest.approx(2.3 / 5)


def test_the_spread_of_one_unit_is_not_known():
    strata = [stratum([3, 3, 3], [1, 2, 3]), stratum([4], [8])]
    assert estimate(strata) == (Estimate(14 / 13),)


def test_exp_of_a_mean_goes_through_its_interval():
    found = exponential(Estimate(math.log(8), 0.1, math.log(4), math.log(16)))
    assert (found.value, found.low, found.high) == pytest.approx((8, 4, 16))
    assert found.stderr == pytest.approx(0.8)
    assert exponential(Estimate(0)) == Estimate(1)


def test_models_that_were_not_asked_the_same_have_no_paired_difference():
    with pytest.raises(ValueError, match="both models measured on the same units"):
        difference([stratum([1, 2], [0, 0])], [stratum([2, 1], [0, 0])])


@pytest.mark.parametrize("confidence", [0.4, 1, 95, math.nan])
def test_a_confidence_without_an_interval_is_refused(confidence):
    with pytest.raises(ValueError, match=r"a share from 0\.5 to below 1, such as 0\.95"):
        statistics.require_confidence(confidence)
